"""Prompts: rows of given and free tokens, from templates, from prefixes and suffixes, or from arrays."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from sedd.data.layout import Layout
from sedd.data.tokenizers import WHOLE_TEXT, Ends, Tokenizer
from sedd.diffusion.discrete.process import Absorbing, Process
from sedd.errors import UserError

# Groups: the backslashes before "<blank", "<blank" itself in any spelling, and the size if it is well-formed.
_BLANK = re.compile(r"(\\*)(<\s*blank)(?::([0-9]{1,18})>)?", re.IGNORECASE)
MAX_TOKENS = 2**28  # per call, over all rows: they take about 10 GB of memory


class Prompt(NamedTuple):
    """One row of L tokens; L differs between rows."""

    tokens: np.ndarray  # Int32[L]
    given: np.ndarray  # Bool[L], False at positions to fill in


def blank(length: int) -> Prompt:
    """Returns a prompt of free positions only."""
    return Prompt(np.zeros(length, np.int32), np.zeros(length, bool))


def of_text(text: str, tokenizer: Tokenizer, ends: Ends = WHOLE_TEXT) -> Prompt:
    """Returns a prompt of given tokens only. ends: True at an end of the text that is also an end of the row."""
    tokens = tokenizer.encode(text, ends)
    return Prompt(tokens, np.ones(len(tokens), bool))


def before_blank(text: str, tokenizer: Tokenizer, ends: Ends = Ends(closes=False)) -> Prompt:
    """Returns the text before a blank as a prompt of given tokens only.

    If the tokens of words begin with a space, a space at the end of the text is left out, so that the blank supplies
    it: as a token of its own, it occurs before no word of the training text.
    """

    def size(part):
        return len(tokenizer.encode(part, Ends(False, False)))

    joins = text.endswith(" ") and any(size(f" {word}") < size(" ") + size(word) for word in set(text.split()))
    return of_text(text[:-1] if joins else text, tokenizer, ends)


def around_blanks(texts: Sequence[str], tokenizer: Tokenizer) -> list[Prompt]:
    """Encodes the texts around blanks as parts of one text. All tokens are given.

    A space next to a blank is left to the blank: the one before it, or the one after it if tokens end with a space.
    """
    last = len(texts) - 1
    ends = [Ends(number == 0, number == last) for number in range(len(texts))]
    texts = [text[text[:1] == " " and tokenizer.space_follows and number > 0 :] for number, text in enumerate(texts)]
    rows = [before_blank(text, tokenizer, end) for text, end in zip(texts[:-1], ends)]
    return [*rows, of_text(texts[-1], tokenizer, ends[-1])]


def joined(*parts: Prompt) -> Prompt:
    """Concatenates prompts."""
    return Prompt(*map(np.concatenate, zip(*parts)))


def parse_template(template: str) -> tuple[list[str], list[int]]:
    r"""Parses a template. Returns the N + 1 texts around its N blanks, and the number of tokens of each blank.

    `\<blank:8>` is the text `<blank:8>`, and `\\<blank:8>` is a backslash before a blank: directly before `<blank`,
    two backslashes stand for one. UserError for a malformed blank, a blank of 0 tokens, or a template without blanks.
    """
    texts, sizes, end = [""], [], 0
    for mark in _BLANK.finditer(template):
        backslashes, opening, size = mark.groups()
        texts[-1] += template[end : mark.start()] + backslashes[: len(backslashes) // 2]
        escaped = len(backslashes) % 2
        end = mark.end(2) if escaped else mark.end()
        if escaped:
            texts[-1] += opening
        elif opening != "<blank" or size is None:
            start = mark.start(2)
            tail = re.match(r"[^>\n]{,20}>?", template[start:])
            assert tail is not None  # the pattern matches any text
            raise UserError(f"{tail[0]!r} is not a blank; write <blank:8> for 8 tokens, or \\<blank for literal text")
        elif int(size) == 0:
            raise UserError(
                f"the template {template!r} has a blank of 0 tokens; leave it out, or give it a size of at least 1"
            )
        else:
            sizes.append(int(size))
            texts.append("")
    texts[-1] += template[end:]
    if not sizes:
        raise UserError(f"the template {template!r} has no blank; add one, such as <blank:8>")
    check_size(1, sum(sizes))
    return texts, sizes


def check_size(rows: int, length: int):
    """Raises UserError for more than MAX_TOKENS tokens in all, before memory is allocated."""
    if rows * length > MAX_TOKENS:
        raise UserError(
            f"{rows:,} x {length:,} tokens are more than the {MAX_TOKENS:,} of one call; sample fewer at a time"
        )


def of_template(template: str, tokenizer: Tokenizer) -> Prompt:
    """Returns the prompt of a template, as in "The <blank:8> sat on the <blank:5>."; see `parse_template`."""
    pieces, sizes = parse_template(template)
    texts, blanks = around_blanks(pieces, tokenizer), [blank(size) for size in sizes]
    return joined(texts[0], *(part for pair in zip(blanks, texts[1:]) for part in pair))


def between(prefix: str, suffix: str, length: int, tokenizer: Tokenizer) -> Prompt:
    """Returns a prompt of `length` tokens: a blank between two texts. UserError if no token is left for the blank."""
    check_size(1, length)
    before, after = around_blanks([prefix, suffix], tokenizer)
    num_given = len(before.tokens) + len(after.tokens)
    if num_given >= length:
        raise UserError(
            f"prefix and suffix have {num_given} tokens, which leaves none of the length of {length} to fill in; "
            "shorten them, or increase the length"
        )
    return joined(before, blank(length - num_given), after)


def of_arrays(tokens: Any, given: Any, vocab_size: int) -> list[Prompt]:
    """Returns prompts from arrays.

    tokens: Int[N L], Int[L], or N rows of different lengths; given: Bool of the same shape, True at the tokens to keep.
    UserError for other shapes or types, or for ids outside 0 .. vocab_size - 1.
    """
    if tokens is None or given is None:
        raise UserError("infill: pass both tokens and given")
    if len(tokens) and np.ndim(tokens[0]) == 0:
        tokens, given = [tokens], [given]
    if len(tokens) != len(given):
        raise UserError(
            f"there are {len(tokens)} rows of tokens and {len(given)} rows of given; their numbers must be equal"
        )
    return [_of_array(np.asarray(row), np.asarray(flags), vocab_size) for row, flags in zip(tokens, given)]


def _of_array(tokens: np.ndarray, given: np.ndarray, vocab_size: int) -> Prompt:
    if tokens.ndim != 1 or tokens.shape != given.shape or (tokens.size and given.dtype != bool):
        raise UserError(
            f"given must be a bool array of the shape of tokens, {tokens.shape}, with one dimension per row"
        )
    ids = tokens[given.astype(bool)]
    if ids.size and not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"given tokens must be integers, not {tokens.dtype}")
    if ids.size and not (0 <= ids.min() and ids.max() < vocab_size):
        raise UserError(f"given tokens must be from 0 to {vocab_size - 1}")
    return Prompt(np.where(given, tokens, 0).astype(np.int32), given.astype(bool))


def as_document(row: Prompt, layout: Layout, block: int, end_of_text: int | None) -> Prompt:
    """Formats a complete text like a training document: padded ones have an end-of-text token and scored padding."""
    if not layout.padded:
        return row
    count = max(1, block - len(row.tokens)) if layout.padding == "scored" else 1
    return joined(row, Prompt(np.full(count, end_of_text, np.int32), np.ones(count, bool)))


class PromptBatch(NamedTuple):
    """N prompts in arrays of one shape, for the sampling loop."""

    tokens: np.ndarray  # Int32[N L], unspecified where free
    free: np.ndarray  # Bool[N L]
    lengths: np.ndarray  # Int32[N]

    @property
    def within(self) -> np.ndarray:
        """Bool[N L], True before the end of each row."""
        return np.arange(self.tokens.shape[1]) < self.lengths[:, None]


def collate(rows: list[Prompt], process: Process, block: int, layout: Layout) -> PromptBatch:
    """Collates rows of any lengths into a batch.

    If the network is conditioned on the lengths, tokens after the end of a row have no effect. Otherwise Absorbing
    keeps them masked, and Uniform samples the full block, to be cut; either way the row is sampled from its exact
    marginal under the model.
    """
    cut = not isinstance(process, Absorbing) and not layout.masks_padding
    lengths = np.array([len(row.tokens) for row in rows], np.int32)
    shape = (len(rows), max(int(lengths.max()), block if cut else 0))
    tokens = np.full(shape, process.mask_id if isinstance(process, Absorbing) else 0, np.int32)
    free = np.zeros(shape, bool)
    for number, row in enumerate(rows):
        tokens[number, : lengths[number]] = row.tokens
        free[number, : lengths[number]] = ~row.given
        free[number, lengths[number] :] = cut and not row.given.all()
    return PromptBatch(tokens, free, lengths)


def windows_of(batch: PromptBatch, block: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields, for each of the `windows`, its positions, Int[N block], and which are free in no window before, Bool."""
    free = batch.free.copy()
    for start in windows(batch.lengths, block):
        at = start[:, None] + np.arange(min(block, free.shape[1]))
        yield at, np.take_along_axis(free, at, axis=1)
        np.put_along_axis(free, at, False, axis=1)


def windows(lengths: np.ndarray, block: int) -> Iterator[np.ndarray]:
    """Yields the start of each row's window, Int[B], for semi-autoregressive sampling. lengths: Int[B].

    Windows overlap by half a block. The last window of a row ends with the row; shorter rows repeat their last.
    """
    last = np.maximum(lengths - block, 0)
    stride = block - block // 2
    for number in range(-(-int(last.max()) // stride) + 1):
        yield np.minimum(number * stride, last)
