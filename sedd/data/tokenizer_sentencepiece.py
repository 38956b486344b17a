"""`sentencepiece:SIZE` and `sentencepiece:FILE`: subword pieces (Kudo and Richardson, arXiv 1808.06226)."""

import io
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import numpy as np

from sedd.errors import UserError

SPACE = "\u2581"  # how SentencePiece writes a space
LONGEST_LINE = 1000  # characters; it skips lines of more than 4192 bytes
MOST_LINES = 1_000_000  # more are sampled: training holds them all in memory
LONGEST_TEXT = 1_000_000  # characters; encoding takes many times the memory of its text


@dataclass(frozen=True)
class SentencePiece:
    """A SentencePiece model; `data` is its file.

    Made here, it is lossless: any text comes back as it was, but for U+2581, SentencePiece's own sign for a space,
    which comes back as a space. A newline is a piece of its own, and characters that have no piece are spelt in bytes.
    """

    sized: ClassVar[bool] = True
    data: bytes = field(repr=False)

    @classmethod
    def made_from(cls, texts: Iterable[str], held_out: Iterable[str], size: int) -> "SentencePiece":
        """A unigram model of `size` pieces, 256 bytes and an unknown piece (never used) among them.

        Raises:
          UserError: the size does not suit the texts.
        """
        import sentencepiece

        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(_sample(_lines(texts), MOST_LINES)),
                model_writer=model,
                model_type="unigram",
                vocab_size=size,
                byte_fallback=True,
                character_coverage=1.0,
                required_chars=SPACE,  # spelt in bytes it would not come back as a space
                user_defined_symbols=["\n"],
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                num_threads=1,  # the same model each time
                minloglevel=2,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(_mistake(size, str(error))) from error
        return cls(model.getvalue())

    @cached_property
    def _processor(self):
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(self.data)
        except RuntimeError as error:
            raise UserError("the tokenizer file is no SentencePiece model; give another one") from error
        return processor

    @property
    def size(self) -> int:
        return self._processor.get_piece_size()

    def encode(self, text: str) -> np.ndarray:
        parts = [text[start : start + LONGEST_TEXT] for start in range(0, len(text), LONGEST_TEXT)]
        return np.concatenate([np.asarray(self._processor.encode(part), np.int32) for part in parts or [""]])

    def decode(self, ids: np.ndarray) -> str:
        return self._processor.decode(ids.tolist())


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), LONGEST_LINE):
                yield line[start : start + LONGEST_LINE]


def _sample(lines: Iterable[str], size: int) -> list[str]:
    """`size` lines drawn without order or replacement, all where there are no more (a reservoir).

    SentencePiece can sample too, but differently each time.
    """
    draw = random.Random(0)
    sample = []
    for index, line in enumerate(lines):
        if index < size:
            sample.append(line)
        elif (slot := draw.randrange(index + 1)) < size:
            sample[slot] = line
    return sample


def _mistake(size: int, error: str) -> str:
    """What SentencePiece found wrong, in a user's words."""
    if too_large := re.search(r"too high .* <= (\d+)", error):
        return f"a vocabulary of {size} is too large for this text; choose sentencepiece:{too_large[1]} or smaller"
    if too_small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return f"a vocabulary of {size} is too small for this text; choose sentencepiece:{too_small[1]} or larger"
    return f"SentencePiece cannot be trained on this text with sentencepiece:{size}: {error}"
