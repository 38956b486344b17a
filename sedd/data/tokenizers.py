"""Text to ids and back. A new tokenizer is a file like `tokenizer_bytes.py` and a line in `TOKENIZERS`."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from sedd.data.tokenizer_bytes import Bytes
from sedd.data.tokenizer_characters import Characters
from sedd.data.tokenizer_sentencepiece import SentencePiece
from sedd.errors import UserError

END_OF_TEXT = "<|endoftext|>"  # how the id is shown; the same words in a text are text like any other


class Pieces(Protocol):
    """What tokenizers differ in: a vocabulary, wholly determined by some bytes."""

    sized: ClassVar[bool]  # whether a spec goes on after the kind, with a vocabulary size or a file of `data`
    data: bytes
    size: int

    @classmethod
    def made_from(cls, texts: Iterable[str], held_out: Iterable[str], size: int | None) -> "Pieces": ...

    def encode(self, text: str) -> np.ndarray:
        """The ids in [0, size) of a text, Int32[L]."""

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids in [0, size)."""


TOKENIZERS: dict[str, type[Pieces]] = {"bytes": Bytes, "characters": Characters, "sentencepiece": SentencePiece}


@dataclass(frozen=True)
class Tokenizer:
    """Pieces of text as the ids 0, 1, ..., and after the last of them, where wanted, an id that ends a text.

    `encode` gives only pieces; the end-of-text id is put between texts by whoever joins them.
    """

    kind: str
    pieces: Pieces
    has_end_of_text: bool

    @property
    def vocab_size(self) -> int:
        """The number of ids, the end-of-text id included."""
        return self.pieces.size + self.has_end_of_text

    @property
    def end_of_text(self) -> int | None:
        """The last id where there is one for the end of a text, else None."""
        return self.pieces.size if self.has_end_of_text else None

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, Int32[L]."""
        return self.pieces.encode(text)

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids, Int[L]; an end of text reads `<|endoftext|>`, bytes that are no UTF-8 read U+FFFD.

        Raises:
          ValueError: an id is not in the vocabulary (the mask is not either).
        """
        ids = np.asarray(ids, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"ids must be from 0 to {self.vocab_size - 1}, got {ids.min()} to {ids.max()}")
        first, *others = np.split(ids, np.flatnonzero(ids == self.pieces.size))
        return END_OF_TEXT.join(self.pieces.decode(run) for run in [first, *(run[1:] for run in others)])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of all that determines the ids of a text."""
        return hashlib.sha256(f"{self.kind} {self.has_end_of_text} ".encode() + self.pieces.data).hexdigest()

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer.model` into a directory, which is made where it is missing."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        about = {"kind": self.kind, "end_of_text": self.end_of_text, "fingerprint": self.fingerprint}
        (directory / "tokenizer.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        (directory / "tokenizer.model").write_bytes(self.pieces.data)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into a directory.

    Raises:
      UserError: there is none, or its files are damaged.
    """
    directory = Path(directory)
    try:
        about = json.loads((directory / "tokenizer.json").read_bytes())
        pieces = TOKENIZERS[about["kind"]]((directory / "tokenizer.model").read_bytes())
        tokenizer = Tokenizer(about["kind"], pieces, about["end_of_text"] is not None)
        if tokenizer.fingerprint == about["fingerprint"]:
            return tokenizer
    except FileNotFoundError as error:
        raise UserError(f"there is no tokenizer in {directory}: {Path(error.filename).name} is missing") from error
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"the tokenizer in {directory} is damaged; prepare the corpus or export the model again")


def make_tokenizer(spec: str, texts: Iterable[str], end_of_text: bool, held_out: Iterable[str] = ()) -> Tokenizer:
    """The tokenizer that a spec names, made from training texts where it is not given.

    Args:
      spec: `bytes`, `characters`, `sentencepiece:8000` (made here) or `sentencepiece:path/to.model` (a given one, whose
        rules are its own: it may lose spaces or normalise characters).
      texts: the training texts; read only if the tokenizer is made from them.
      end_of_text: whether to add an id for the end of a text.
      held_out: the other texts; they add characters to the alphabet of `characters`, and nothing else.

    Raises:
      UserError: the spec is none of these, its file is missing or no model, or the size does not suit the texts.
    """
    file = tokenizer_file(spec)
    kind, _, size = spec.partition(":")
    if file:
        pieces = TOKENIZERS[kind](file.read_bytes())
    else:
        pieces = TOKENIZERS[kind].made_from(texts, held_out, int(size) if size else None)
    return Tokenizer(kind, pieces, end_of_text)


def tokenizer_file(spec: str) -> Path | None:
    """The model file that a spec names, None where the tokenizer is made from text.

    Raises:
      UserError: the spec is no tokenizer's, or there is no such file.
    """
    kind, _, option = spec.partition(":")
    if kind not in TOKENIZERS or bool(option) != TOKENIZERS[kind].sized:
        forms = [f"{name}:SIZE or {name}:FILE" if TOKENIZERS[name].sized else name for name in TOKENIZERS]
        raise UserError(f"unknown tokenizer {spec!r}; write {', '.join(forms)}")
    if not option or option.isdecimal():
        return None
    if not Path(option).is_file():
        raise UserError(f"there is no tokenizer file {option!r}; give a file or a vocabulary size after '{kind}:'")
    return Path(option)
