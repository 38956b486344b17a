"""`characters`: one id for each character of the corpus."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import ClassVar

import numpy as np

from sedd.errors import UserError


@dataclass(frozen=True)
class Characters:
    """Ids in the order of code points. `data` is the alphabet, in UTF-8."""

    end_of_text: ClassVar[None] = None
    data: bytes = field(repr=False)

    @classmethod
    def train(cls, texts: Iterable[str], held_out: Iterable[str], size: int | None) -> "Characters":
        """Collects the characters of all texts, held-out ones too, since there is no id for unknown characters."""
        alphabet: set[str] = set()
        for text in chain(texts, held_out):
            alphabet.update(text)
        return cls("".join(sorted(alphabet)).encode("utf-8"))

    @cached_property
    def _code_points(self) -> np.ndarray:
        return _code_points(self.data.decode("utf-8"))

    @cached_property
    def _ids(self) -> np.ndarray:
        """The id of each code point, -1 where it has none; the last entry, -1, is for all higher code points."""
        ids = np.full(int(self._code_points.max(initial=0)) + 2, -1, np.int32)
        ids[self._code_points] = np.arange(self.size)
        return ids

    @property
    def size(self) -> int:
        return len(self._code_points)

    @property
    def vocabulary(self) -> dict[str, int]:
        return {character: number for number, character in enumerate(self.data.decode("utf-8"))}

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        ids = self._ids.take(_code_points(text), mode="clip")
        if ids.min(initial=0) < 0:
            unknown = text[np.argmin(ids)]
            raise UserError(f"the character {unknown!r} (U+{ord(unknown):04X}) is not in the alphabet; leave it out")
        return ids

    def decode(self, ids: np.ndarray) -> str:
        return self._code_points[ids].tobytes().decode("utf-32-le")


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")
