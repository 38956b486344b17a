"""A prepared corpus: a directory of memory-mapped token files.

meta.json               source, layout, counts and hash
tokenizer/              the files that `Tokenizer.save` writes
train.tokens            the ids of the split, consecutive; likewise for validation and test, if present
train.offsets           Int64[documents + 1], index of the first token of each document, then the number of tokens
train.byte_offsets      the same in UTF-8 bytes of the text, joiners included
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sedd.data.layout import Layout
from sedd.data.tokenizers import Tokenizer, check_ids, load_tokenizer
from sedd.errors import UserError
from sedd.runtime.disk import absolute

FORMAT = 3
NUM_CHECKED = 2**24  # number of ids of a split that `open_corpus` checks, which takes milliseconds for any corpus size


@dataclass(frozen=True)
class Corpus:
    """A corpus directory. meta: its meta.json; `meta["splits"]` has the counts documents, tokens, bytes, characters."""

    path: Path
    meta: dict
    tokenizer: Tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of ids, the end-of-text id included."""
        return self.tokenizer.vocab_size

    @property
    def hash(self) -> str:
        """SHA-256, in hexadecimal, of the tokens, their documents, the tokenizer and the layout."""
        return self.meta["hash"]

    @property
    def layout(self) -> Layout:
        """How documents are arranged in blocks."""
        return Layout(self.meta["mode"], self.meta["padding"])

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits: train, and often validation and test."""
        return tuple(self.meta["splits"])

    def tokens(self, split: str) -> np.memmap:
        """Returns all ids of a split, UInt[T], memory-mapped and read-only."""
        self._counts(split)
        return np.memmap(self.path / f"{split}.tokens", self.meta["dtype"], mode="r")

    def checked(self, ids: np.ndarray) -> np.ndarray:
        """Returns ids of this corpus unchanged. UserError if one is outside of the vocabulary."""
        check_ids(ids, self.vocab_size, str(self.path), "remove it and prepare it again")
        return ids

    def offsets(self, split: str) -> np.ndarray:
        """Returns the index of the first token of each document of a split, then T: Int64[documents + 1]."""
        return self._offsets(split, "offsets")

    def document_bytes(self, split: str) -> np.ndarray:
        """Returns the UTF-8 bytes of each document with its joiner, Int64[documents]; an end-of-text id has 0 bytes."""
        return np.diff(self._offsets(split, "byte_offsets"))

    def num_tokens(self, split: str) -> int:
        """Returns the number of ids of a split."""
        return self._counts(split)["tokens"]

    def num_bytes(self, split: str) -> int:
        """Returns the number of UTF-8 bytes of the text of a split, joiners included."""
        return self._counts(split)["bytes"]

    def num_characters(self, split: str) -> int:
        """Returns the number of characters (Unicode code points) of the text of a split, joiners included."""
        return self._counts(split)["characters"]

    def _offsets(self, split: str, kind: str) -> np.memmap:
        self._counts(split)
        return np.memmap(self.path / f"{split}.{kind}", "<i8", mode="r")

    def _counts(self, split: str) -> dict[str, int]:
        if split not in self.meta["splits"]:
            raise UserError(f"{self.path} has no split {split!r}; there are {', '.join(self.meta['splits'])}")
        return self.meta["splits"][split]


def open_corpus(path: str | Path) -> Corpus:
    """Opens a corpus directory; checks the sizes of its files and the first ids of each split.

    `batches` and `blocks` check the other ids when they read them. UserError if there is no corpus, it is damaged, an
    id is outside of its vocabulary, or another version of sedd prepared it.
    """
    path = Path(absolute(path)).resolve()
    if not path.is_dir():
        raise UserError(f"there is no folder {path}; make a corpus there with sedd prepare")
    try:
        meta = json.loads((path / "meta.json").read_bytes())
        version = meta["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a corpus: it has no valid meta.json; make one with sedd prepare") from error
    if version != FORMAT:
        raise UserError(f"{path} has corpus format {version}, this sedd reads {FORMAT}; remove it and prepare it again")
    corpus = Corpus(path, meta, load_tokenizer(path / "tokenizer"))
    for split in meta["splits"]:
        _check_files(corpus, split)
        if corpus.num_tokens(split):  # an empty file cannot be mapped
            corpus.checked(corpus.tokens(split)[:NUM_CHECKED])
    return corpus


def _check_files(corpus: Corpus, split: str) -> None:
    counts = corpus.meta["splits"][split]
    offsets = 8 * (counts["documents"] + 1)
    sizes = {
        "tokens": counts["tokens"] * np.dtype(corpus.meta["dtype"]).itemsize,
        "offsets": offsets,
        "byte_offsets": offsets,
    }
    for part, size in sizes.items():
        file = corpus.path / f"{split}.{part}"
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(f"{corpus.path} is damaged: {file.name} is missing or incomplete; prepare it again")
