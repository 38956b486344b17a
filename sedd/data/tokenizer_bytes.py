"""`bytes`: one id for each of the 256 bytes of UTF-8 text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np


@dataclass(frozen=True)
class Bytes:
    """Id b is the byte b. It has no parameters, so that `data` is empty."""

    size: ClassVar[int] = 256
    end_of_text: ClassVar[None] = None
    data: bytes = b""

    @classmethod
    def train(cls, texts: Iterable[str], held_out: Iterable[str], size: int | None) -> "Bytes":
        """Returns the tokenizer without reading any text."""
        return cls()

    @property
    def vocabulary(self) -> dict[str, int]:
        """Characters of ASCII by themselves, the other bytes as SentencePiece writes them."""
        return {chr(byte) if byte < 128 else f"<0x{byte:02X}>": byte for byte in range(256)}

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: np.ndarray) -> str:
        return ids.astype(np.uint8).tobytes().decode("utf-8", errors="replace")
