"""What to hold a bound against: simple codes of the same held-out text, in bits per byte."""

import lzma
import math
import zlib

import numpy as np

from sedd.data.corpus import Corpus


def baselines(corpus: Corpus, split: str) -> dict[str, float]:
    """Bits per byte of a split under models and compressors that know the training split, or nothing (zlib).

    unigram and bigram: smoothed entropies of the same tokens. Reads both splits into memory.
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
    """Nats of the held-out tokens under the training frequencies, with one added to each count."""
    counts = np.bincount(train, minlength=vocab_size) + 1
    return -float(np.log(counts / counts.sum())[held_out].sum())


def bigram_nats(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    """Nats of the held-out tokens given the one before, with Witten-Bell smoothing by the unigram."""
    counts = np.bincount(train, minlength=vocab_size) + 1
    unigram = counts / counts.sum()
    pairs, times = np.unique(train[:-1].astype(np.int64) * vocab_size + train[1:], return_counts=True)
    seen = np.bincount(pairs // vocab_size, times, vocab_size)  # how often a token is followed by another
    kinds = np.bincount(pairs // vocab_size, minlength=vocab_size)  # by how many different ones
    before, after = held_out[:-1].astype(np.int64), held_out[1:]
    asked = before * vocab_size + after
    at = np.minimum(np.searchsorted(pairs, asked), len(pairs) - 1)
    found = np.where(pairs[at] == asked, times[at], 0)
    weight = np.maximum(kinds[before], 1)  # a token never seen has the unigram alone
    p = (found + weight * unigram[after]) / (seen[before] + weight)
    return -float(np.log(p).sum() + np.log(unigram[held_out[0]]))


def _xz(text: bytes) -> int:
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
