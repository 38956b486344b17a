"""Tokenizers: text to ids and back.

To add one, write a file like `tokenizer_bytes.py` and add a line to `TOKENIZERS` and one to `TRAINED` or `PRETRAINED`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import numpy as np
from etils import epath

from sedd.data.source import split_document
from sedd.data.tokenizer_bytes import Bytes
from sedd.data.tokenizer_characters import Characters
from sedd.data.tokenizer_huggingface import HuggingFace, gpt2_data, with_special_token
from sedd.data.tokenizer_sentencepiece import SentencePiece
from sedd.data.tokenizer_wordpieces import prune_wordpieces
from sedd.errors import UserError
from sedd.runtime.disk import absolute, write_bytes_atomic, write_text_atomic

END_OF_TEXT = "<|endoftext|>"  # how the id is decoded; the same characters in a text are ordinary text


class TokenizerBackend(Protocol):
    """A vocabulary with its rules, completely determined by `data`. Threads may share it."""

    def __init__(self, data: bytes) -> None: ...

    @property
    def data(self) -> bytes:
        """The content of the saved file."""

    @property
    def size(self) -> int:
        """Number of ids."""

    @property
    def end_of_text(self) -> int | None:
        """An id of the vocabulary that ends a text, if there is one; text is never encoded to it."""

    @property
    def vocabulary(self) -> dict[str, int]:
        """The ids by the text of the token."""

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids in [0, size) of each text, Int32[L]."""

    def decode(self, ids: np.ndarray) -> str:
        """Returns the text of ids in [0, size)."""


class TrainableBackend(TokenizerBackend, Protocol):
    """A backend that is trained on text; those of `TRAINED`."""

    @classmethod
    def train(cls, texts: Iterable[str], held_out: Iterable[str], size: int | None) -> TokenizerBackend:
        """Returns the backend trained on these texts. size: of the vocabulary, if the spec has one."""


class EndSensitiveBackend(TokenizerBackend, Protocol):
    """A backend with special rules for the ends of a text, such as a space before it."""

    @property
    def marks_ends(self) -> bool:
        """True where a text's first and last ids may differ from those of the same words inside of a text."""

    def encode_all(self, texts: Sequence[str], opens: bool = True, closes: bool = True) -> list[np.ndarray]:
        """Returns the ids of parts of texts. opens, closes: True where the parts begin, or end, their texts."""


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

# Forms of the specs of tokenizers that are trained on the corpus.
TRAINED = {"bytes": "bytes", "characters": "characters", "sentencepiece": "sentencepiece:SIZE"}

# Pretrained tokenizers: the form of the spec, the key in `TOKENIZERS`, and the function that reads the `data`.
PRETRAINED: dict[str, tuple[str, str, Callable[[Path], bytes]]] = {
    "sentencepiece": ("sentencepiece:FILE", "sentencepiece", _file),
    "huggingface": ("huggingface:FILE", "huggingface", _file),
    "wordpieces": ("wordpieces:FILE", "huggingface", _file),
    "gpt2": ("gpt2:FOLDER", "huggingface", gpt2_data),
}

# Pretrained tokenizers that keep only what the training texts use: the function of the `data` and these texts.
PRUNED: dict[str, Callable[[bytes, Iterable[str]], bytes]] = {"wordpieces": prune_wordpieces}

FORMS = (*TRAINED.values(), *(form for form, _, _ in PRETRAINED.values()))


class Ends(NamedTuple):
    """The ends of a part of a text that are ends of the text."""

    opens: bool = True
    closes: bool = True


WHOLE_TEXT = Ends()


@dataclass(frozen=True)
class Tokenizer:
    """A backend, optionally with an id that ends a text: that of the backend, else one more id after its last.

    `encode` never returns the end-of-text id; the caller inserts it where texts are joined.
    """

    kind: str
    backend: TokenizerBackend
    has_end_of_text: bool

    @property
    def vocab_size(self) -> int:
        """Number of ids, the end-of-text id included."""
        return self.backend.size + (self.has_end_of_text and self.backend.end_of_text is None)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """The ids by the text of the token; that of the end of a text also by END_OF_TEXT."""
        return self.backend.vocabulary | ({} if self.end_of_text is None else {END_OF_TEXT: self.end_of_text})

    @property
    def end_of_text(self) -> int | None:
        """The id that ends a text; None without one."""
        return self._end if self.has_end_of_text else None

    @property
    def _end(self) -> int:
        return self.backend.size if self.backend.end_of_text is None else self.backend.end_of_text

    def encode(self, text: str, ends: Ends = WHOLE_TEXT) -> np.ndarray:
        """Returns the ids of a text, or of a part of one, Int32[L]; a text of over 10^6 characters is encoded in parts.

        ends: the ends of the part that are ends of the text. Some tokenizers put a space before a text, or drop spaces
        at its ends, and must not do so where a part adjoins other text or a blank.
        """
        pieces = list(split_document(text))
        texts, all_ends = zip(*self.parts(zip(pieces, [False] * (len(pieces) - 1) + [True]), ends.opens))
        return np.concatenate(self.encode_all(texts, [*all_ends[:-1], all_ends[-1]._replace(closes=ends.closes)]))

    def encode_all(self, texts: Sequence[str], ends: Sequence[Ends] | None = None) -> list[np.ndarray]:
        """Returns the ids of each text, or part of a text, Int32[L]. Threads may share it.

        Texts should have at most a million characters, since they are not encoded in parts.
        """
        if ends is None or set(ends) == {WHOLE_TEXT} or not self._marks_ends:
            return self.backend.encode_all(texts)
        backend = cast(EndSensitiveBackend, self.backend)
        all_ids = [np.zeros(0, np.int32)] * len(texts)
        for kind in set(ends):
            indices = [i for i, text in enumerate(texts) if ends[i] == kind and (text or kind == WHOLE_TEXT)]
            for i, ids in zip(indices, backend.encode_all([texts[i] for i in indices], *kind)):
                all_ids[i] = ids
        return all_ids

    def parts(self, pieces: Iterable[tuple[str, bool]], opens: bool = True) -> Iterator[tuple[str, Ends]]:
        """Yields parts of texts that can be encoded separately.

        pieces: consecutive pieces of texts, each with True where it ends its text. White space on both sides of a cut
        moves to the word that it belongs to. opens: True where the first piece begins its text.
        """
        pending = None
        for text, closes in pieces:
            if pending is not None:
                before, ends = pending
                if not ends.closes and self._marks_ends:
                    word, rest = before.rstrip(), text.lstrip()
                    space = before[len(word) :] + text[: len(text) - len(rest)]
                    before, text = (word + space, rest) if self.space_follows else (word, space + rest)
                yield before, ends
                opens = ends.closes or (ends.opens and not before)
            pending = text, Ends(opens, closes)
        if pending is not None:
            yield pending

    @property
    def _marks_ends(self) -> bool:
        return getattr(self.backend, "marks_ends", False)

    @cached_property
    def space_follows(self) -> bool:
        """True where a space belongs to the word before it, and not, as usual, to the one after it or to none."""
        if not self._marks_ends:
            return False
        word, spaced = self.encode_all(["a", "a "], [Ends(False, False)] * 2)
        return not np.array_equal(word, spaced[: len(word)])

    def decode(self, ids: np.ndarray, after: np.ndarray | None = None) -> str:
        """Returns the text of ids, Int[L]; the end-of-text id reads `<|endoftext|>`, bytes that are not UTF-8 U+FFFD.

        after: Int[K], the ids before these in the text; some tokenizers drop a space where a text begins. ValueError
        if an id is outside of the vocabulary (as the mask is).
        """
        if after is not None:
            return self.decode(np.concatenate([after, ids]))[len(self.decode(after)) :]
        ids = np.asarray(ids, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"ids must be from 0 to {self.vocab_size - 1}, got {ids.min()} to {ids.max()}")
        first, *others = np.split(ids, np.flatnonzero(ids == self._end))
        return END_OF_TEXT.join(self.backend.decode(one) for one in [first, *(one[1:] for one in others)])

    def with_padding(self) -> "Tokenizer":
        """Returns the tokenizer with one more token, [PAD], if it is of the kind `huggingface`; else itself."""
        if not isinstance(self.backend, HuggingFace):
            return self
        return Tokenizer(self.kind, HuggingFace(with_special_token(self.backend.data, "[PAD]")), self.has_end_of_text)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of everything that determines the ids of a text."""
        return hashlib.sha256(f"{self.kind} {self.has_end_of_text} ".encode() + self.backend.data).hexdigest()

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer.model` into a directory, created if missing; each atomically."""
        folder = epath.Path(absolute(directory))
        folder.mkdir(parents=True, exist_ok=True)
        about = {"kind": self.kind, "end_of_text": self.end_of_text, "fingerprint": self.fingerprint}
        write_text_atomic(folder / "tokenizer.json", json.dumps(about, indent=2) + "\n")
        write_bytes_atomic(folder / "tokenizer.model", self.backend.data)


def check_ids(ids: np.ndarray, vocab_size: int, what: str, advice: str) -> None:
    """UserError, with the advice, if an id is outside of the vocabulary. ids: UInt or Int, of any shape."""
    for extreme in (ids.min(initial=0), ids.max(initial=0)):
        if not 0 <= extreme < vocab_size:
            raise UserError(f"{what} has the id {extreme}, outside its vocabulary of {vocab_size} tokens; {advice}")


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Loads the tokenizer that `Tokenizer.save` wrote into a directory. UserError if it is missing or damaged."""
    folder = epath.Path(absolute(directory))
    try:
        about = json.loads((folder / "tokenizer.json").read_bytes())
        backend = TOKENIZERS[about["kind"]]((folder / "tokenizer.model").read_bytes())
        tokenizer = Tokenizer(about["kind"], backend, about["end_of_text"] is not None)
        if (tokenizer.fingerprint, tokenizer.end_of_text) == (about["fingerprint"], about["end_of_text"]):
            return tokenizer
    except FileNotFoundError as error:
        names = ("tokenizer.json", "tokenizer.model")  # in a bucket, the error does not name the file
        missing = next((name for name in names if not (folder / name).is_file()), names[0])
        raise UserError(f"there is no tokenizer in {folder}: {missing} is missing") from error
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"the tokenizer in {folder} is damaged; prepare the corpus or export the model again")


def make_tokenizer(spec: str, texts: Iterable[str], end_of_text: bool, held_out: Iterable[str] = ()) -> Tokenizer:
    """Returns the tokenizer of a spec: pretrained, pruned to the training texts, or trained on them.

    spec: one of `FORMS`: `bytes`, `characters`, `sentencepiece:8000` (trained here) or `sentencepiece:path/to.model`,
    `huggingface:path/to/tokenizer.json`, `gpt2:folder` (pretrained; their own rules may lose spaces or normalise
    characters), `wordpieces:path/to/tokenizer.json` (pretrained, with only the pieces that the training texts use).
    texts: the training texts, or pieces of them; read only to train or prune a tokenizer.
    end_of_text: True to have an id that ends a text.
    held_out: the other texts; used only to add their characters to the alphabet of `characters`.

    UserError if the spec is invalid, its file is missing or damaged, or the size is unsuitable for the texts.
    """
    kind, _, option = spec.partition(":")
    data = pretrained_data(spec)
    if data is not None:
        data = PRUNED[kind](data, texts) if kind in PRUNED else data
        kind = PRETRAINED[kind][1]
        return Tokenizer(kind, TOKENIZERS[kind](data), end_of_text)
    backend = cast(type[TrainableBackend], TOKENIZERS[kind])  # as all of `TRAINED` are
    return Tokenizer(kind, backend.train(texts, held_out, int(option) if option else None), end_of_text)


def pretrained_tokenizer(spec: str) -> Tokenizer:
    """Returns the tokenizer of a spec that needs no training text, with an end-of-text id.

    UserError if the spec is invalid or needs training text, or its file is missing or damaged.
    """
    needs_text = pretrained_data(spec) is None or spec.partition(":")[0] in PRUNED
    if needs_text and spec != "bytes":
        forms = ", ".join(["bytes", *(form for kind, (form, _, _) in PRETRAINED.items() if kind not in PRUNED)])
        raise UserError(f"the tokenizer {spec} is trained on text; name a pretrained one: {forms}")
    return make_tokenizer(spec, (), end_of_text=True)


def pretrained_data(spec: str) -> bytes | None:
    """Returns the `data` of a pretrained tokenizer, before it is pruned; None for a tokenizer that is trained on text.

    UserError if the spec is invalid, or its file is missing or damaged.
    """
    kind, _, option = spec.partition(":")
    if kind in TRAINED and (option.isdecimal() if ":" in TRAINED[kind] else spec == kind):
        return None
    if kind not in PRETRAINED or not option:
        raise UserError(f"unknown tokenizer {spec!r}; write {', '.join(FORMS)}")
    _, backend, read = PRETRAINED[kind]
    data = read(Path(option))
    try:
        TOKENIZERS[backend](data).size  # noqa: B018, it loads the vocabulary
        if kind in PRUNED:
            PRUNED[kind](data, ())  # an error comes before any text is read
    except UserError as error:
        raise UserError(f"{option}: {error}") from error
    return data


def vocabulary_of(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the ids of a pretrained tokenizer by the text of the token. UserError for another kind."""
    if not isinstance(tokenizer.backend, HuggingFace):
        raise UserError(
            f"an encoder needs a corpus of its own tokens, not of {tokenizer.kind}; prepare it with the encoder's "
            "tokenizer.json, as huggingface:FILE or wordpieces:FILE"
        )
    return tokenizer.backend.vocabulary
