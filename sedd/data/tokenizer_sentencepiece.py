"""`sentencepiece:SIZE` and `sentencepiece:FILE`: subword pieces (Kudo and Richardson, arXiv 1808.06226)."""

import heapq
import io
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from sedd.errors import UserError

SPACE = "\u2581"  # how SentencePiece writes a space
LONGEST_LINE = 1000  # characters; it skips lines of more than 4192 bytes
MOST_TEXT = 10_000_000  # characters; more is sampled: training holds it all, and needs a minute for this much
LINE_COST = 50  # characters; what a line costs beside its text
THREADS = 16  # the model depends on their number, though not on the number of cores

# A message of protocol buffers with more after it is merged with that. These are the fields of normalizer_spec
# (sentencepiece_model.proto) that put a space before a text, drop spaces, and replace characters; here they do nothing.
KEEPS_SPACES = b"\x1a\x04\x18\x00\x20\x00"
KEEPS_ALL = KEEPS_SPACES + b"\x1a\x02\x12\x00"


@dataclass(frozen=True)
class SentencePiece:
    """A SentencePiece model; `data` is its file.

    Made here, it is lossless: any text comes back as it was, but for U+2581, SentencePiece's own sign for a space,
    which comes back as a space. A newline is a piece of its own, and characters that have no piece are spelt in bytes.
    """

    data: bytes = field(repr=False)

    @classmethod
    def train(cls, texts: Iterable[str], held_out: Iterable[str], size: int) -> "SentencePiece":
        """A unigram model of `size` pieces, 256 bytes and an unknown piece (never used) among them.

        Raises:
          UserError: the size does not suit the texts.
        """
        import sentencepiece

        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(_sample(_lines(texts), MOST_TEXT)),
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
                num_threads=THREADS,
                minloglevel=2,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(_mistake(size, str(error))) from error
        return cls(model.getvalue())

    @cached_property
    def _processor(self):
        return _processor(self.data)

    @cached_property
    def _inside(self):
        """Two that are without rules for the ends of a text: one that normalises, and one that does not."""
        return _processor(self.data + KEEPS_SPACES), _processor(self.data + KEEPS_ALL)

    @property
    def size(self) -> int:
        return self._processor.get_piece_size()

    @property
    def end_of_text(self) -> int | None:
        """The end-of-sentence id of a given model; one made here has none."""
        return self._processor.eos_id() if self._processor.eos_id() >= 0 else None

    @cached_property
    def marks_ends(self) -> bool:
        return self._processor.normalize(" a ") != f"{SPACE}a{SPACE}"

    def encode_all(self, texts: Sequence[str], opens: bool = True, closes: bool = True) -> list[np.ndarray]:
        if opens and closes:
            return self._processor.encode(list(texts), return_type="numpy")
        return self._inside[1].encode([self._normalised(text, opens, closes) for text in texts], return_type="numpy")

    def _normalised(self, text: str, opens: bool, closes: bool) -> str:
        """A part of a text as it stands in the whole, normalised."""
        found = self._inside[0].normalize(text)
        if SPACE * 2 not in self._processor.normalize("a  a"):  # the model has no two spaces in a row
            found = re.sub(f"{SPACE}+", SPACE, found)
            found = found.lstrip(SPACE) if opens else found
            found = found.rstrip(SPACE) if closes else found
        alone = self._processor.normalize("a")
        before, after = (SPACE if alone.startswith(SPACE) else ""), (SPACE if alone.endswith(SPACE) else "")
        return found and before * opens + found + after * closes

    def decode(self, ids: np.ndarray) -> str:
        return self._processor.decode(ids.tolist())


def _processor(data: bytes):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(data)
    except RuntimeError as error:
        raise UserError("the tokenizer file is no SentencePiece model; give another one") from error
    return processor


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), LONGEST_LINE):
                yield line[start : start + LONGEST_LINE]


def _sample(lines: Iterable[str], capacity: int) -> list[str]:
    """Lines drawn without replacement, each as likely as any other: as many as `capacity` characters hold.

    Each line gets a random number; those with the smallest ones stay. SentencePiece can sample too, but differently
    each time, and by the number of lines, which may be of any length.
    """
    draw = random.Random(0)
    kept, used, bound = [], 0, 1.0  # a heap of (-number, index, line); `bound` is above all its numbers
    for index, line in enumerate(lines):
        number = draw.random()
        if number >= bound:
            continue
        heapq.heappush(kept, (-number, index, line))
        used += len(line) + LINE_COST
        while used > capacity:
            dropped, _, line = heapq.heappop(kept)
            used -= len(line) + LINE_COST
            bound = -dropped
    return [line for _, _, line in sorted(kept, key=lambda entry: entry[1])]


def _mistake(size: int, error: str) -> str:
    """What SentencePiece found wrong, in a user's words."""
    if too_large := re.search(r"too high .* <= (\d+)", error):
        return f"a vocabulary of {size} is too large for this text; choose sentencepiece:{too_large[1]} or smaller"
    if too_small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return f"a vocabulary of {size} is too small for this text; choose sentencepiece:{too_small[1]} or larger"
    return f"SentencePiece cannot be trained on this text with sentencepiece:{size}: {error}"
