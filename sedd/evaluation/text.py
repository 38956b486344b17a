"""Text in rows for scoring: one block a row, with the counts that a bound is divided by."""

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
from sedd.trained import Trained

CLUSTER_BLOCKS = 16  # blocks of packed text in a cluster of the standard error: neighbours share documents


@dataclasses.dataclass(frozen=True)
class ScoringRows:
    """N rows of one block each. num_bytes, num_characters: of their text, UTF-8; None where a protocol dropped some."""

    tokens: np.ndarray  # Int32[N L]
    lengths: np.ndarray  # Int32[N]: the first lengths[i] positions of row i are scored
    counts: np.ndarray  # Int32[N]: of these, tokens of text; nats per token divide by them
    clusters: np.ndarray  # Int[N]: the cluster of each row in the standard error, from 0
    num_bytes: int | None
    num_characters: int | None
    layout: Layout
    data: dict[str, Any]  # origin of the text, for the report
    documents: int  # number of documents
    given: int = 0  # tokens at the start of each row that are given, not scored

    @property
    def hash(self) -> str:
        """SHA-256, in hexadecimal, of the rows, lengths, counts and clusters."""
        arrays = (self.tokens, self.lengths, self.counts, self.clusters)
        given = f" {self.given} given" if self.given else ""
        digest = hashlib.sha256(f"{self.tokens.shape} {self.layout.name}{given}".encode())
        for array in arrays:
            digest.update(np.ascontiguousarray(array, np.int32).tobytes())
        return digest.hexdigest()


def check_compatible(corpus: Corpus, trained: Trained):
    """UserError unless the corpus has the tokenizer and the layout of the model.

    For a model without a tokenizer, such as a published one: unless it has the model's vocabulary size.
    """
    tokenizer, vocab_size, layout = trained.tokenizer, trained.vocab_size, trained.layout
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


def from_corpus(corpus: Corpus, split: str, block_length: int) -> ScoringRows:
    """The rows of a split of a corpus.

    Packed: consecutive blocks, the last with its own length, in clusters of 16 blocks. Padded: each document in rows of
    its own, and a cluster of its own.
    """
    tokens, counts, document = blocks(corpus, split, block_length)
    clusters = np.arange(len(tokens)) // CLUSTER_BLOCKS if document is None else document
    size = (corpus.num_bytes(split), corpus.num_characters(split))
    data = {"corpus": str(corpus.path), "split": split, "hash": corpus.hash}
    return _scoring_rows(tokens, counts, clusters, size, corpus.layout, data, len(corpus.document_bytes(split)))


def from_source(source: Source, trained: Trained) -> ScoringRows:
    """The rows of a source, as `sedd prepare` makes them for this model, in the order of the source."""
    tokenizer = trained.require_tokenizer()
    if trained.layout.padded:
        scored = from_texts([text for text in _documents(source) if text], trained)
        return dataclasses.replace(scored, data={"source": source.spec, "hash": scored.data["hash"]})
    end = [] if source.joiner is not None or tokenizer.end_of_text is None else [tokenizer.end_of_text]
    parts, size, num_documents, digest = [], np.zeros(2, int), 0, hashlib.sha256()
    for text, ends in tokenizer.parts(tqdm(source, desc="tokenising", unit=" documents", delay=2)):
        parts += tokenizer.encode_all([text], [ends])
        if ends.closes:
            parts.append(np.array(end, np.int32))
        size += len(text.encode()), len(text)
        digest.update(text.encode() + b"\0" * ends.closes)
        num_documents += ends.closes
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    if not tokens.size:
        raise UserError(f"the source {source.spec} holds no text; choose another")
    rows, counts = cut(tokens, trained.block_length)
    data = {"source": source.spec, "hash": digest.hexdigest()}
    clusters = np.arange(len(rows)) // CLUSTER_BLOCKS
    return _scoring_rows(rows, counts, clusters, (int(size[0]), int(size[1])), trained.layout, data, num_documents)


def from_texts(texts: Sequence[str], trained: Trained, has_eos_markers: bool = False) -> ScoringRows:
    """The rows of texts, each text cut into blocks of its own and a cluster of its own.

    For a model of padded documents each text ends with the end-of-text id. has_eos_markers: the texts hold the marker
    that `Tokenizer.decode` writes for an end of text, as samples do. UserError for an empty text, or without texts.
    """
    tokenizer, rows, counts, clusters = trained.require_tokenizer(), [], [], []
    end: list[int] = []
    if trained.layout.padded:
        assert tokenizer.end_of_text is not None  # every padded corpus has one
        end = [tokenizer.end_of_text]
    for number, text in enumerate(texts):
        if not text:
            raise UserError(f"text {number + 1} of {len(texts)} is empty; there is nothing to score")
        what = f"text {number + 1} of {len(texts)}"
        ids = (encode_with_eos_markers if has_eos_markers else encode)(text, tokenizer, what)
        ids = np.concatenate([ids, np.array(end, np.int32)])
        if not len(ids):
            raise UserError(f"text {number + 1} of {len(texts)} has no tokens, {text!r}; there is nothing to score")
        of_text = cut(ids, trained.block_length, *end)
        rows.append(of_text[0])
        counts.append(of_text[1])
        clusters.append(np.full(len(of_text[1]), number))
    if not rows:
        raise UserError("there are no texts to score")
    size = sum(len(text.encode()) for text in texts), sum(map(len, texts))
    data = {"texts": len(texts), "hash": hashlib.sha256("\0".join(texts).encode()).hexdigest()}
    arrays = (np.concatenate(rows), np.concatenate(counts), np.concatenate(clusters))
    return _scoring_rows(*arrays, size, trained.layout, data, len(texts))


def from_rows(
    rows: np.ndarray, layout: Layout, data: dict[str, Any], num_documents: int, given: int = 0
) -> ScoringRows:
    """Full blocks, Int32[N L], in clusters of 16; all tokens but the first `given` are scored and counted."""
    lengths, clusters = np.full(len(rows), rows.shape[1], np.int32), np.arange(len(rows)) // CLUSTER_BLOCKS
    scored = _scoring_rows(rows, lengths, clusters, (None, None), layout, data, num_documents)
    return dataclasses.replace(scored, counts=lengths - given, given=given)


def documents(text: Corpus | Source | Sequence[str], split: str, tokenizer: Tokenizer) -> tuple[list, dict[str, Any]]:
    """Returns the ids of each document, Int32[T], without an end of text, empty documents too; and their origin."""
    if isinstance(text, Corpus):
        end, offsets = text.tokenizer.end_of_text, text.offsets(split)
        tokens = text.checked(np.asarray(text.tokens(split)))
        rows = [tokens[start:stop].astype(np.int32) for start, stop in zip(offsets[:-1], offsets[1:])]
        rows = [ids[:-1] if len(ids) and ids[-1] == end else ids for ids in rows]
        return rows, {"corpus": str(text.path), "split": split, "hash": text.hash}
    data: dict[str, Any]
    if isinstance(text, Source):
        texts, data = list(_documents(text)), {"source": text.spec}
    else:
        texts, data = list(text), {"texts": len(text)}
    bar = tqdm(texts, desc="tokenising", unit=" documents", delay=2)
    rows = [encode(one, tokenizer, f"text {number + 1} of {len(texts)}") for number, one in enumerate(bar)]
    return rows, {**data, "hash": hashlib.sha256("\0".join(texts).encode()).hexdigest()}


def encode_with_eos_markers(text: str, tokenizer: Tokenizer, what: str) -> np.ndarray:
    """The ids, Int32[T], of a text with the marker that `Tokenizer.decode` writes for an end of text."""
    end = tokenizer.end_of_text
    if end is None:
        return encode(text, tokenizer, what)
    first, *others = (encode(part, tokenizer, what) for part in text.split(END_OF_TEXT))
    return np.concatenate([first, *(np.append(end, ids) for ids in others)]).astype(np.int32)


def encode(text: str, tokenizer: Tokenizer, what: str, ends: Ends = WHOLE_TEXT) -> np.ndarray:
    """The ids of a text, or of a part of one, Int32[T]. UserError, with `what` in front, for a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad = error.object[error.start]
        raise UserError(
            f"{what} holds {bad!a}, which is no character; read it with the encoding that it was written in"
        ) from None
    return tokenizer.encode(text, ends)


def _documents(source: Source) -> Iterable[str]:
    """Yields every document of a source as one string, empty ones too."""
    for document in source.read():
        yield document if isinstance(document, str) else "".join(document)


def _scoring_rows(
    tokens: np.ndarray,
    counts: np.ndarray,
    clusters: np.ndarray,
    size: tuple[int, int] | tuple[None, None],
    layout: Layout,
    data: dict[str, Any],
    num_documents: int,
) -> ScoringRows:
    num_bytes, num_characters = size
    lengths = np.full_like(counts, tokens.shape[1]) if layout.padding == "scored" else counts
    return ScoringRows(tokens, lengths, counts, clusters, num_bytes, num_characters, layout, data, num_documents)
