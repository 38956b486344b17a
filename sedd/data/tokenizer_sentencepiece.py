"""`sentencepiece:SIZE` and `sentencepiece:FILE`: subword tokens (Kudo and Richardson, arXiv 1808.06226)."""

import heapq
import io
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from sedd.errors import UserError

SPACE = "\u2581"  # SentencePiece's symbol for a space
LONGEST_LINE = 1000  # characters; SentencePiece skips lines of more than 4192 bytes
MAX_TRAINING_TEXT = 10_000_000  # characters; more is sampled: training holds all text, and needs a minute for this size
LINE_COST = 50  # characters; memory of a line beside its text
THREADS = 16  # the model depends on their number, though not on the number of cores

# Bytes appended to a protocol buffer message are merged into it. These set the fields of normalizer_spec
# (sentencepiece_model.proto) that put a space before a text, drop spaces, and replace characters to no-ops.
KEEPS_SPACES = b"\x1a\x04\x18\x00\x20\x00"
KEEPS_ALL = KEEPS_SPACES + b"\x1a\x02\x12\x00"


@dataclass(frozen=True)
class SentencePiece:
    """A SentencePiece model; `data` is its file.

    A model trained here is lossless, except that U+2581, SentencePiece's symbol for a space, decodes to a space. A
    newline is a token, and characters without a token are encoded as their bytes.
    """

    data: bytes = field(repr=False)

    @classmethod
    def train(cls, texts: Iterable[str], held_out: Iterable[str], size: int | None) -> "SentencePiece":
        """Trains a unigram model of `size` tokens, 256 bytes and an unknown token (never used) among them.

        UserError if the size is too large or too small for the texts.
        """
        import sentencepiece

        assert size is not None  # the form is sentencepiece:SIZE
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(_sample(_lines(texts), MAX_TRAINING_TEXT)),
                model_writer=model,
                model_type="unigram",
                vocab_size=size,
                byte_fallback=True,
                character_coverage=1.0,
                required_chars=SPACE,  # encoded as bytes it would not decode to a space
                user_defined_symbols=["\n"],
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                num_threads=THREADS,
                minloglevel=2,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(_training_error(size, str(error))) from error
        return cls(model.getvalue())

    @cached_property
    def _processor(self):
        return _processor(self.data)

    @cached_property
    def _inside(self):
        """Two processors without rules for the ends of a text: one normalises, one does not."""
        return _processor(self.data + KEEPS_SPACES), _processor(self.data + KEEPS_ALL)

    @property
    def size(self) -> int:
        return self._processor.get_piece_size()

    @property
    def vocabulary(self) -> dict[str, int]:
        return {self._processor.id_to_piece(number): number for number in range(self.size)}

    @property
    def end_of_text(self) -> int | None:
        """The end-of-sentence id of a pretrained model; a model trained here has none."""
        return self._processor.eos_id() if self._processor.eos_id() >= 0 else None

    @cached_property
    def marks_ends(self) -> bool:
        """See `EndSensitiveBackend`."""
        return self._processor.normalize(" a ") != f"{SPACE}a{SPACE}"

    def encode_all(self, texts: Sequence[str], opens: bool = True, closes: bool = True) -> list[np.ndarray]:
        if opens and closes:
            return self._processor.encode(list(texts), return_type="numpy")
        return self._inside[1].encode([self._normalised(text, opens, closes) for text in texts], return_type="numpy")

    def _normalised(self, text: str, opens: bool, closes: bool) -> str:
        """Returns a part of a text as it is in the normalised text."""
        normalised = self._inside[0].normalize(text)
        if SPACE * 2 not in self._processor.normalize("a  a"):  # the model merges consecutive spaces
            normalised = re.sub(f"{SPACE}+", SPACE, normalised)
            normalised = normalised.lstrip(SPACE) if opens else normalised
            normalised = normalised.rstrip(SPACE) if closes else normalised
        alone = self._processor.normalize("a")
        before, after = (SPACE if alone.startswith(SPACE) else ""), (SPACE if alone.endswith(SPACE) else "")
        return normalised and before * opens + normalised + after * closes

    def decode(self, ids: np.ndarray) -> str:
        return self._processor.decode(ids.tolist())


def _processor(data: bytes):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(data)
    except RuntimeError as error:
        raise UserError("the tokenizer file is not a SentencePiece model; give another one") from error
    return processor


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), LONGEST_LINE):
                yield line[start : start + LONGEST_LINE]


def _sample(lines: Iterable[str], capacity: int) -> list[str]:
    """Returns lines drawn uniformly without replacement, up to `capacity` characters in total.

    Each line gets a random number, and those with the smallest ones are kept. SentencePiece's own sampling is not
    deterministic, and limits the number of lines, which may be of any length.
    """
    generator = random.Random(0)
    kept: list[tuple[float, int, str]] = []  # a heap of (-number, index, line)
    used, bound = 0, 1.0  # `bound` is above all numbers in the heap
    for index, line in enumerate(lines):
        number = generator.random()
        if number >= bound:
            continue
        heapq.heappush(kept, (-number, index, line))
        used += len(line) + LINE_COST
        while used > capacity:
            dropped, _, line = heapq.heappop(kept)
            used -= len(line) + LINE_COST
            bound = -dropped
    return [line for _, _, line in sorted(kept, key=lambda entry: entry[1])]


def _training_error(size: int, error: str) -> str:
    """Returns the message for an error of SentencePiece, with the size to choose instead."""
    if too_large := re.search(r"too high .* <= (\d+)", error):
        return f"a vocabulary of {size} is too large for this text; choose sentencepiece:{too_large[1]} or smaller"
    if too_small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return f"a vocabulary of {size} is too small for this text; choose sentencepiece:{too_small[1]} or larger"
    return f"SentencePiece cannot be trained on this text with sentencepiece:{size}: {error}"
