"""`characters`: each character that the corpus uses is an id."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import ClassVar

import numpy as np

from sedd.errors import UserError


@dataclass(frozen=True)
class Characters:
    """Ids in the order of code points. `data` is the alphabet, in UTF-8."""

    sized: ClassVar[bool] = False
    data: bytes = field(repr=False)

    @classmethod
    def made_from(cls, texts: Iterable[str], held_out: Iterable[str], size: None) -> "Characters":
        """All characters of all texts: there is no id for an unknown one, and held-out text has to have ids too."""
        alphabet = sorted(set(chain.from_iterable(chain(texts, held_out))))
        return cls("".join(alphabet).encode("utf-8"))

    @cached_property
    def _code_points(self) -> np.ndarray:
        return _code_points(self.data.decode("utf-8"))

    @property
    def size(self) -> int:
        return len(self._code_points)

    def encode(self, text: str) -> np.ndarray:
        code_points = _code_points(text)
        ids = np.searchsorted(self._code_points, code_points)
        known = self._code_points[np.minimum(ids, self.size - 1)] == code_points
        if not known.all():
            unseen = text[np.argmin(known)]
            raise UserError(f"the character {unseen!r} (U+{ord(unseen):04X}) is not in the alphabet; leave it out")
        return ids.astype(np.int32)

    def decode(self, ids: np.ndarray) -> str:
        return self._code_points[ids].tobytes().decode("utf-32-le")


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")
