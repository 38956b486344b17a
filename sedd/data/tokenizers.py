"""Text to ids and back.

A new tokenizer is a file like `tokenizer_bytes.py`, a line in `TOKENIZERS` and one in `MADE` or `GIVEN`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from etils import epath

from sedd.data.source import pieces as cut
from sedd.data.tokenizer_bytes import Bytes
from sedd.data.tokenizer_characters import Characters
from sedd.data.tokenizer_huggingface import HuggingFace, gpt2_data
from sedd.data.tokenizer_sentencepiece import SentencePiece
from sedd.errors import UserError
from sedd.runtime.disk import absolute

END_OF_TEXT = "<|endoftext|>"  # how the id is shown; the same words in a text are text like any other


class TokenizerBackend(Protocol):
    """What tokenizers differ in: a vocabulary, wholly determined by some bytes. Threads may share it."""

    data: bytes
    size: int
    end_of_text: int | None  # an id of its own vocabulary that ends a text; no text has it in its ids

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids in [0, size) of each text, Int32[L].

        A tokenizer whose first and last ids of a text may be others than those of the same words inside of one says so
        by an attribute `marks_ends`. It is then also asked for parts of texts, as encode_all(texts, opens, closes):
        whether the texts begin, and whether they end, with these parts.
        """

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids in [0, size)."""


def _file(path: Path) -> bytes:
    file = Path(absolute(path))
    if not file.is_file():
        raise UserError(f"there is no tokenizer file {str(path)!r}; correct the path")
    return file.read_bytes()


TOKENIZERS: dict[str, type[TokenizerBackend]] = {
    "bytes": Bytes,
    "characters": Characters,
    "sentencepiece": SentencePiece,
    "huggingface": HuggingFace,
}

# What is made from text: by `made_from(texts, held_out, size)`, the size of the vocabulary being None or after a colon.
TRAINED = {"bytes": "bytes", "characters": "characters", "sentencepiece": "sentencepiece:SIZE"}

# What is given after a colon: how it is written, whose `data` it holds, and how that is read.
PRETRAINED: dict[str, tuple[str, str, Callable[[Path], bytes]]] = {
    "sentencepiece": ("sentencepiece:FILE", "sentencepiece", _file),
    "huggingface": ("huggingface:FILE", "huggingface", _file),
    "gpt2": ("gpt2:FOLDER", "huggingface", gpt2_data),
}
FORMS = (*TRAINED.values(), *(form for form, _, _ in PRETRAINED.values()))


class Ends(NamedTuple):
    """Which ends of a part of a text are ends of the text."""

    opens: bool = True
    closes: bool = True


WHOLE = Ends()


@dataclass(frozen=True)
class Tokenizer:
    """Pieces of text as ids, and where wanted one that ends a text: the pieces' own, else one after the last.

    `encode` gives only pieces; the end-of-text id is put between texts by whoever joins them.
    """

    kind: str
    pieces: TokenizerBackend
    has_end_of_text: bool

    @property
    def vocab_size(self) -> int:
        """The number of ids, the end-of-text id included."""
        return self.pieces.size + (self.has_end_of_text and self.pieces.end_of_text is None)

    @property
    def end_of_text(self) -> int | None:
        """The id that ends a text where one is wanted, else None."""
        return self._end if self.has_end_of_text else None

    @property
    def _end(self) -> int:
        return self.pieces.size if self.pieces.end_of_text is None else self.pieces.end_of_text

    def encode(self, text: str, ends: Ends = WHOLE) -> np.ndarray:
        """The ids of a text, or of a part of one, Int32[L]; one of more than a million characters is encoded in parts.

        ends: whether the text begins and ends with it. Some tokenizers put a space before a text, or drop those at its
        ends, and must not do so where other text or a blank is next to a part.
        """
        pieces = list(cut(text))
        texts, found = zip(*self.parts(zip(pieces, [False] * (len(pieces) - 1) + [True]), ends.opens))
        return np.concatenate(self.encode_all(texts, [*found[:-1], found[-1]._replace(closes=ends.closes)]))

    def encode_all(self, texts: Sequence[str], ends: Sequence[Ends] | None = None) -> list[np.ndarray]:
        """The ids of each of some texts, or parts of texts, Int32[L], none of them very long. Threads may share it."""
        if ends is None or set(ends) == {WHOLE} or not self._marks_ends:
            return self.pieces.encode_all(texts)
        found = [np.zeros(0, np.int32)] * len(texts)
        for kind in set(ends):
            at = [number for number, text in enumerate(texts) if ends[number] == kind and (text or kind == WHOLE)]
            for number, ids in zip(at, self.pieces.encode_all([texts[number] for number in at], *kind)):
                found[number] = ids
        return found

    def parts(self, pieces: Iterable[tuple[str, bool]], opens: bool = True) -> Iterator[tuple[str, Ends]]:
        """The pieces of texts, each with whether its text ends with it, as parts of which each can be encoded apart.

        White space on both sides of a cut passes to the side of the word that it belongs to. opens: whether the first
        text begins with the first piece.
        """
        waiting = None
        for text, closes in pieces:
            if waiting is not None:
                before, ends = waiting
                if not ends.closes and self._marks_ends:
                    word, rest = before.rstrip(), text.lstrip()
                    space = before[len(word) :] + text[: len(text) - len(rest)]
                    before, text = (word + space, rest) if self.space_follows else (word, space + rest)
                yield before, ends
                opens = ends.closes or (ends.opens and not before)
            waiting = text, Ends(opens, closes)
        if waiting is not None:
            yield waiting

    @property
    def _marks_ends(self) -> bool:
        return getattr(self.pieces, "marks_ends", False)

    @cached_property
    def space_follows(self) -> bool:
        """Whether a space belongs to the word before it, and not as usual to the one behind it or to none."""
        if not self._marks_ends:
            return False
        word, spaced = self.encode_all(["a", "a "], [Ends(False, False)] * 2)
        return not np.array_equal(word, spaced[: len(word)])

    def decode(self, ids: np.ndarray, after: np.ndarray | None = None) -> str:
        """The text of ids, Int[L]; an end of text reads `<|endoftext|>`, bytes that are no UTF-8 read U+FFFD.

        after: Int[K], the ids that these follow in a text; some tokenizers drop a space where a text begins.

        Raises:
          ValueError: an id is not in the vocabulary (the mask is not either).
        """
        if after is not None:
            return self.decode(np.concatenate([after, ids]))[len(self.decode(after)) :]
        ids = np.asarray(ids, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"ids must be from 0 to {self.vocab_size - 1}, got {ids.min()} to {ids.max()}")
        first, *others = np.split(ids, np.flatnonzero(ids == self._end))
        return END_OF_TEXT.join(self.pieces.decode(run) for run in [first, *(run[1:] for run in others)])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of all that determines the ids of a text."""
        return hashlib.sha256(f"{self.kind} {self.has_end_of_text} ".encode() + self.pieces.data).hexdigest()

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer.model` into a directory, which is made where it is missing."""
        directory = epath.Path(absolute(directory))
        directory.mkdir(parents=True, exist_ok=True)
        about = {"kind": self.kind, "end_of_text": self.end_of_text, "fingerprint": self.fingerprint}
        (directory / "tokenizer.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        (directory / "tokenizer.model").write_bytes(self.pieces.data)


def check_ids(ids: np.ndarray, vocab_size: int, what: str, advice: str) -> None:
    """UserError where an id is outside of the vocabulary: a model has no row for it. ids: UInt or Int, of any shape."""
    for wrong in (ids.min(initial=0), ids.max(initial=0)):
        if not 0 <= wrong < vocab_size:
            raise UserError(f"{what} has the id {wrong}, outside its vocabulary of {vocab_size} tokens; {advice}")


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into a directory.

    Raises:
      UserError: there is none, or its files are damaged.
    """
    directory = epath.Path(absolute(directory))
    try:
        about = json.loads((directory / "tokenizer.json").read_bytes())
        pieces = TOKENIZERS[about["kind"]]((directory / "tokenizer.model").read_bytes())
        tokenizer = Tokenizer(about["kind"], pieces, about["end_of_text"] is not None)
        if (tokenizer.fingerprint, tokenizer.end_of_text) == (about["fingerprint"], about["end_of_text"]):
            return tokenizer
    except FileNotFoundError as error:
        names = ("tokenizer.json", "tokenizer.model")  # in a bucket, the error does not name the file
        missing = next((name for name in names if not (directory / name).is_file()), names[0])
        raise UserError(f"there is no tokenizer in {directory}: {missing} is missing") from error
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"the tokenizer in {directory} is damaged; prepare the corpus or export the model again")


def make_tokenizer(spec: str, texts: Iterable[str], end_of_text: bool, held_out: Iterable[str] = ()) -> Tokenizer:
    """The tokenizer that a spec names, made from training texts where it is not given.

    Args:
      spec: one of `FORMS`: `bytes`, `characters`, `sentencepiece:8000` (made here) or `sentencepiece:path/to.model`,
        `huggingface:path/to/tokenizer.json`, `gpt2:folder` (given ones, whose rules are their own: they may lose spaces
        or normalise characters).
      texts: the training texts, or pieces of them; read only if the tokenizer is made from them.
      end_of_text: whether an id for the end of a text is wanted.
      held_out: the other texts; they add characters to the alphabet of `characters`, and nothing else.

    Raises:
      UserError: the spec is none of these, what it names is missing or damaged, or the size does not suit the texts.
    """
    kind, _, option = spec.partition(":")
    data = given_data(spec)
    if data is not None:
        kind = PRETRAINED[kind][1]
        return Tokenizer(kind, TOKENIZERS[kind](data), end_of_text)
    return Tokenizer(kind, TOKENIZERS[kind].train(texts, held_out, int(option) if option else None), end_of_text)


def given_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that a spec names, one that no text is needed for, with an end-of-text id.

    Raises:
      UserError: the spec is no tokenizer's, or of one that is made from text, or what it names is missing or damaged.
    """
    if given_data(spec) is None and spec != "bytes":
        there = ", ".join(["bytes", *(form for form, _, _ in PRETRAINED.values())])
        raise UserError(f"the tokenizer {spec} is made from text; name one that is there, as {there}")
    return make_tokenizer(spec, (), end_of_text=True)


def given_data(spec: str) -> bytes | None:
    """What determines a tokenizer that is given, None where one is made from text.

    Raises:
      UserError: the spec is no tokenizer's, or what it names is missing or damaged.
    """
    kind, _, option = spec.partition(":")
    if kind in TRAINED and (option.isdecimal() if ":" in TRAINED[kind] else spec == kind):
        return None
    if kind not in PRETRAINED or not option:
        raise UserError(f"unknown tokenizer {spec!r}; write {', '.join(FORMS)}")
    _, kind, read = PRETRAINED[kind]
    data = read(Path(option))
    try:
        TOKENIZERS[kind](data).size  # noqa: B018, it loads the vocabulary
    except UserError as error:
        raise UserError(f"{option}: {error}") from error
    return data
