"""Text laid out for scoring: rows of a block each, and what is counted of them."""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from sedd.data.batches import blocks
from sedd.data.corpus import Corpus
from sedd.data.layout import Layout, cut
from sedd.data.source import Source
from sedd.data.tokenizers import END_OF_TEXT, WHOLE_TEXT, Ends, Tokenizer
from sedd.errors import UserError

CLUSTER_BLOCKS = 16  # blocks of packed text in a cluster of the standard error: neighbours come from the same documents


@dataclasses.dataclass(frozen=True)
class ScoringRows:
    """N rows of a block each. num_bytes, num_characters: of the text they hold, UTF-8; None where some was left out."""

    tokens: np.ndarray  # Int32[N L]
    lengths: np.ndarray  # Int32[N], the positions of a row that are scored: the first ones
    counts: np.ndarray  # Int32[N], the tokens of text among them, by whose number nats are divided
    clusters: np.ndarray  # Int[N], rows that stand or fall together in the standard error
    num_bytes: int | None
    num_characters: int | None
    layout: Layout
    data: dict[str, Any]  # where the text comes from, for the record
    documents: int

    @property
    def hash(self) -> str:
        """SHA-256, in hexadecimal, of the rows and what is counted of them."""
        arrays = (self.tokens, self.lengths, self.counts, self.clusters)
        digest = hashlib.sha256(f"{self.tokens.shape} {self.layout.name}".encode())
        for array in arrays:
            digest.update(np.ascontiguousarray(array, np.int32).tobytes())
        return digest.hexdigest()


def check_compatible(corpus: Corpus, tokenizer: Tokenizer | None, vocab_size: int, layout: Layout) -> Tokenizer:
    """The corpus' tokenizer. UserError unless the corpus has the model's tokenizer and layout; of a model that has no
    tokenizer of its own, such as a published one, the size has to fit."""
    if tokenizer is None and corpus.vocab_size != vocab_size:
        raise UserError(
            f"{corpus.path} has {corpus.vocab_size} tokens, the model {vocab_size}; prepare it with the tokenizer that "
            "the model was trained with"
        )
    if tokenizer is not None and corpus.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"{corpus.path} was made with another tokenizer than the model's; prepare it with that")
    if corpus.layout.name != layout.name:
        raise UserError(
            f"{corpus.path} is {corpus.layout.name}, but the model was trained on a corpus that is {layout.name}; "
            "prepare it so"
        )
    return corpus.tokenizer


def from_corpus(corpus: Corpus, split: str, block_length: int) -> ScoringRows:
    """A split: packed in consecutive blocks, the tail with its own length, in clusters of 16 blocks; padded document
    by document, each a cluster."""
    tokens, counts, document = blocks(corpus, split, block_length)
    clusters = np.arange(len(tokens)) // CLUSTER_BLOCKS if document is None else document
    size = (corpus.num_bytes(split), corpus.num_characters(split))
    data = {"corpus": str(corpus.path), "split": split, "hash": corpus.hash}
    return _scoring_rows(tokens, counts, clusters, size, corpus.layout, data, len(corpus.document_bytes(split)))


def from_source(source: Source, tokenizer: Tokenizer, block_length: int, layout: Layout) -> ScoringRows:
    """The documents of a source, laid out as `sedd prepare` would for a model of this layout, in the source's order."""
    if layout.padded:
        texts = [text for text in _documents(source) if text]
        scored = from_texts(texts, tokenizer, block_length, layout)
        return dataclasses.replace(scored, data={"source": source.spec, "hash": scored.data["hash"]})
    end = [] if source.joiner is not None or tokenizer.end_of_text is None else [tokenizer.end_of_text]
    parts, size, count, digest = [], np.zeros(2, int), 0, hashlib.sha256()
    for text, ends in tokenizer.parts(tqdm(source, desc="tokenising", unit=" documents", delay=2)):
        parts += tokenizer.encode_all([text], [ends])
        if ends.closes:
            parts.append(np.array(end, np.int32))
        size += len(text.encode()), len(text)
        digest.update(text.encode() + b"\0" * ends.closes)
        count += ends.closes
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    if not tokens.size:
        raise UserError(f"the source {source.spec} holds no text; choose another")
    rows, counts = cut(tokens, block_length)
    data = {"source": source.spec, "hash": digest.hexdigest()}
    return _scoring_rows(
        rows, counts, np.arange(len(rows)) // CLUSTER_BLOCKS, tuple(map(int, size)), layout, data, count
    )


def from_texts(
    texts: Sequence[str], tokenizer: Tokenizer, block_length: int, layout: Layout, has_eos_markers: bool = False
) -> ScoringRows:
    """Texts one by one, cut into blocks where they are longer; each is a cluster. UserError for an empty one.

    For a model of padded documents each ends as those do, with the end-of-text id. marked: an end of text within them
    is written as `Tokenizer.decode` shows it, as it is in samples.
    """
    rows, counts, clusters = [], [], []
    end = [tokenizer.end_of_text] if layout.padded else []
    for number, text in enumerate(texts):
        if not text:
            raise UserError(f"text {number + 1} of {len(texts)} is empty; there is nothing to score")
        what = f"text {number + 1} of {len(texts)}"
        ids = (encode_with_eos_markers if has_eos_markers else encoded)(text, tokenizer, what)
        ids = np.concatenate([ids, np.array(end, np.int32)])
        if not len(ids):
            raise UserError(f"text {number + 1} of {len(texts)} has no tokens, {text!r}; there is nothing to score")
        of_text = cut(ids, block_length, *end)
        rows.append(of_text[0])
        counts.append(of_text[1])
        clusters.append(np.full(len(of_text[1]), number))
    if not rows:
        raise UserError("there are no texts to score")
    size = sum(len(text.encode()) for text in texts), sum(map(len, texts))
    data = {"texts": len(texts), "hash": hashlib.sha256("\0".join(texts).encode()).hexdigest()}
    return _scoring_rows(*map(np.concatenate, (rows, counts, clusters)), size, layout, data, len(texts))


def from_rows(rows: np.ndarray, layout: Layout, data: dict[str, Any], num_documents: int) -> ScoringRows:
    """Whole blocks, Int32[N L], in clusters of 16, of which every token counts."""
    counts = np.full(len(rows), rows.shape[1], np.int32)
    return _scoring_rows(
        rows, counts, np.arange(len(rows)) // CLUSTER_BLOCKS, (None, None), layout, data, num_documents
    )


def documents(text: Corpus | Source | Sequence[str], split: str, tokenizer: Tokenizer) -> tuple[list, dict[str, Any]]:
    """The ids of each document, Int32[T], without an end of text, empty documents too; and where they come from."""
    if isinstance(text, Corpus):
        end, offsets = text.tokenizer.end_of_text, text.offsets(split)
        tokens = text.checked(np.asarray(text.tokens(split)))
        found = [tokens[start:stop].astype(np.int32) for start, stop in zip(offsets[:-1], offsets[1:])]
        found = [ids[:-1] if len(ids) and ids[-1] == end else ids for ids in found]
        return found, {"corpus": str(text.path), "split": split, "hash": text.hash}
    if isinstance(text, Source):
        texts, data = list(_documents(text)), {"source": text.spec}
    else:
        texts, data = list(text), {"texts": len(text)}
    shown = tqdm(texts, desc="tokenising", unit=" documents", delay=2)
    found = [encoded(one, tokenizer, f"text {number + 1} of {len(texts)}") for number, one in enumerate(shown)]
    return found, {**data, "hash": hashlib.sha256("\0".join(texts).encode()).hexdigest()}


def encode_with_eos_markers(text: str, tokenizer: Tokenizer, what: str) -> np.ndarray:
    """The ids of a text in which an end of text is written as `Tokenizer.decode` shows it, Int32[T]."""
    parts = [text] if tokenizer.end_of_text is None else text.split(END_OF_TEXT)
    first, *others = (encoded(part, tokenizer, what) for part in parts)
    return np.concatenate([first, *(np.append(tokenizer.end_of_text, ids) for ids in others)]).astype(np.int32)


def encoded(text: str, tokenizer: Tokenizer, what: str, ends: Ends = WHOLE_TEXT) -> np.ndarray:
    """The ids of a text, or of a part of one, Int32[T]. UserError where it is no text at all."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad = error.object[error.start]
        raise UserError(
            f"{what} holds {bad!a}, which is no character; read it with the encoding that it was written in"
        ) from None
    return tokenizer.encode(text, ends)


def _documents(source: Source) -> Iterable[str]:
    """Every document of a source, empty ones too, each in one piece."""
    for document in source.read():
        yield document if isinstance(document, str) else "".join(document)


def _scoring_rows(tokens, counts, clusters, size, layout, data, num_documents) -> ScoringRows:
    lengths = np.full_like(counts, tokens.shape[1]) if layout.padding == "scored" else counts
    return ScoringRows(tokens, lengths, counts, clusters, *size, layout, data, num_documents)
