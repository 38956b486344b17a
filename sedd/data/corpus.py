"""A prepared corpus: a folder of token files that are mapped into memory, never read whole.

meta.json               where it comes from, its layout, its counts and its hash
tokenizer/              what `Tokenizer.save` writes
train.tokens            the ids of the split, one after another; likewise for validation and test, where they are
train.offsets           Int64[documents + 1], where in them each document begins, and their number
train.byte_offsets      the same in the UTF-8 bytes of its text, joiners included
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
CHECKED = 2**24  # ids of a split that are looked at when a corpus is opened: in milliseconds, whatever its size


@dataclass(frozen=True)
class Corpus:
    """A corpus directory and what its small files say. `meta["splits"]` counts documents, tokens, bytes, characters."""

    path: Path
    meta: dict
    tokenizer: Tokenizer

    @property
    def vocab_size(self) -> int:
        """The number of ids, the end-of-text id included."""
        return self.tokenizer.vocab_size

    @property
    def hash(self) -> str:
        """SHA-256, in hexadecimal, of the tokens, their documents, the tokenizer and the layout."""
        return self.meta["hash"]

    @property
    def layout(self) -> Layout:
        """How the documents lie in blocks."""
        return Layout(self.meta["mode"], self.meta["padding"])

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that there are: train, and often validation and test."""
        return tuple(self.meta["splits"])

    def tokens(self, split: str) -> np.memmap:
        """All ids of a split, UInt[T], mapped and read-only."""
        self._counts(split)
        return np.memmap(self.path / f"{split}.tokens", self.meta["dtype"], mode="r")

    def checked(self, ids: np.ndarray) -> np.ndarray:
        """Some of its ids as they are. UserError where one is outside of the vocabulary."""
        check_ids(ids, self.vocab_size, str(self.path), "remove it and prepare it again")
        return ids

    def offsets(self, split: str) -> np.ndarray:
        """Where each document of a split begins among its tokens, and after the last T: Int64[documents + 1]."""
        return self._offsets(split, "offsets")

    def document_bytes(self, split: str) -> np.ndarray:
        """The UTF-8 bytes of each document with its joiner, Int64[documents]; an end-of-text id counts none."""
        return np.diff(self._offsets(split, "byte_offsets"))

    def num_tokens(self, split: str) -> int:
        """The number of ids of a split."""
        return self._counts(split)["tokens"]

    def num_bytes(self, split: str) -> int:
        """The UTF-8 bytes of the text of a split, joiners included."""
        return self._counts(split)["bytes"]

    def num_characters(self, split: str) -> int:
        """The characters, Unicode code points, of the text of a split, joiners included."""
        return self._counts(split)["characters"]

    def _offsets(self, split: str, kind: str) -> np.memmap:
        self._counts(split)
        return np.memmap(self.path / f"{split}.{kind}", "<i8", mode="r")

    def _counts(self, split: str) -> dict[str, int]:
        if split not in self.meta["splits"]:
            raise UserError(f"{self.path} has no split {split!r}; there are {', '.join(self.meta['splits'])}")
        return self.meta["splits"][split]


def open_corpus(path: str | Path) -> Corpus:
    """Opens a corpus directory and checks that its files have the sizes they should, and their first ids.

    The ids behind those are checked where they are read, by `batches` and `blocks`.

    Raises:
      UserError: there is no corpus, it is damaged, an id is outside its vocabulary, or another version of sedd prepared
        it.
    """
    path = Path(absolute(path)).resolve()
    if not path.is_dir():
        raise UserError(f"there is no folder {path}; make a corpus there with sedd prepare")
    try:
        meta = json.loads((path / "meta.json").read_bytes())
        version = meta["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no corpus: it has no meta.json of one; make one with sedd prepare") from error
    if version != FORMAT:
        raise UserError(f"{path} has corpus format {version}, this sedd reads {FORMAT}; remove it and prepare it again")
    corpus = Corpus(path, meta, load_tokenizer(path / "tokenizer"))
    for split in meta["splits"]:
        _check_files(corpus, split)
        if corpus.num_tokens(split):  # an empty file cannot be mapped
            corpus.checked(corpus.tokens(split)[:CHECKED])
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
            raise UserError(f"{corpus.path} is damaged: {file.name} is not whole; prepare it again")
