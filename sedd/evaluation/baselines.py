"""Baselines for a bound: n-gram models and compressors on the same held-out text, in bits per byte."""

import lzma
import math
import zlib

import numpy as np

from sedd.data.corpus import Corpus


def baselines(corpus: Corpus, split: str) -> dict[str, float]:
    """Returns bits per byte of a split under n-gram models and compressors.

    unigram, bigram: smoothed cross-entropies, fitted to the tokens of the training split; zlib: without the training
    split; xz: given the training split. Reads both splits into memory.
    """
    train, held_out = (np.asarray(corpus.tokens(name)) for name in ("train", split))
    num_bytes = corpus.num_bytes(split)
    train_text, text = (corpus.tokenizer.decode(tokens).encode() for tokens in (train, held_out))
    return {
        "unigram": unigram_nats(train, held_out, corpus.vocab_size) / math.log(2) / num_bytes,
        "bigram": bigram_nats(train, held_out, corpus.vocab_size) / math.log(2) / num_bytes,
        "zlib": 8 * len(zlib.compress(text, 9)) / num_bytes,
        "xz, given train": 8 * (_xz(train_text + text) - _xz(train_text)) / num_bytes,
    }


def unigram_nats(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    """Nats of the held-out tokens under the training frequencies with add-one smoothing. train, held_out: Int[T]."""
    counts = np.bincount(train, minlength=vocab_size) + 1
    return -float(np.log(counts / counts.sum())[held_out].sum())


def bigram_nats(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    """Nats of the held-out tokens, each given the one before, with Witten-Bell smoothing by the unigram.

    train, held_out: Int[T].
    """
    counts = np.bincount(train, minlength=vocab_size) + 1
    unigram = counts / counts.sum()
    pairs, pair_counts = np.unique(train[:-1].astype(np.int64) * vocab_size + train[1:], return_counts=True)
    followed = np.bincount(pairs // vocab_size, pair_counts, vocab_size)  # by token: number of successors
    distinct = np.bincount(pairs // vocab_size, minlength=vocab_size)  # by token: number of distinct successors
    before, after = held_out[:-1].astype(np.int64), held_out[1:]
    queries = before * vocab_size + after
    at = np.minimum(np.searchsorted(pairs, queries), len(pairs) - 1)
    query_counts = np.where(pairs[at] == queries, pair_counts[at], 0)
    weight = np.maximum(distinct[before], 1)  # after a token without successors: the unigram alone
    p = (query_counts + weight * unigram[after]) / (followed[before] + weight)
    return -float(np.log(p).sum() + np.log(unigram[held_out[0]]))


def _xz(text: bytes) -> int:
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
