"""What is given and what is to be filled in: rows of tokens from templates, prefixes and suffixes, or arrays."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from sedd.data.layout import Layout
from sedd.data.tokenizers import WHOLE_TEXT, Ends, Tokenizer
from sedd.diffusion.process import Absorbing, Process
from sedd.errors import UserError

# What begins as a blank does, the backslashes before it, and of a well-formed one its number.
_BLANK = re.compile(r"(\\*)(<\s*blank)(?::([0-9]{1,18})>)?", re.IGNORECASE)
MOST = 2**28  # tokens of all rows of a call: they take some ten gigabytes of memory


class Prompt(NamedTuple):
    """One row, of any length."""

    tokens: np.ndarray  # Int32[L]
    given: np.ndarray  # Bool[L], False where it is to be filled in


def blank(length: int) -> Prompt:
    """Nothing given."""
    return Prompt(np.zeros(length, np.int32), np.zeros(length, bool))


def of_text(text: str, tokenizer: Tokenizer, ends: Ends = WHOLE_TEXT) -> Prompt:
    """All given. ends: whether the row begins and ends with it."""
    tokens = tokenizer.encode(text, ends)
    return Prompt(tokens, np.ones(len(tokens), bool))


def before_blank(text: str, tokenizer: Tokenizer, ends: Ends = Ends(closes=False)) -> Prompt:
    """All given, but for a space at the end where tokens begin with their space: that is left to the blank.

    Spelt out, such a space is a token that stands before no word in any text.
    """

    def size(part):
        return len(tokenizer.encode(part, Ends(False, False)))

    joins = text.endswith(" ") and any(size(f" {word}") < size(" ") + size(word) for word in set(text.split()))
    return of_text(text[:-1] if joins else text, tokenizer, ends)


def around_blanks(texts: Sequence[str], tokenizer: Tokenizer) -> list[Prompt]:
    """The texts between which there are blanks, encoded as parts of one text; all given but for spaces beside blanks.

    Where tokens end with their space, it is that behind a blank which is left to it.
    """
    last = len(texts) - 1
    ends = [Ends(number == 0, number == last) for number in range(len(texts))]
    texts = [text[text[:1] == " " and tokenizer.space_follows and number > 0 :] for number, text in enumerate(texts)]
    rows = [before_blank(text, tokenizer, end) for text, end in zip(texts[:-1], ends)]
    return [*rows, of_text(texts[-1], tokenizer, ends[-1])]


def joined(*parts: Prompt) -> Prompt:
    """One after the other."""
    return Prompt(*map(np.concatenate, zip(*parts)))


def parsed(template: str) -> tuple[list[str], list[int]]:
    r"""The N + 1 texts around the N blanks of a template, and how many tokens each blank has.

    `\<blank:8>` is the text `<blank:8>`, and `\\<blank:8>` a backslash before a blank: of the backslashes right before
    `<blank` each pair is one. UserError for anything else that begins as a blank does, and where there is none.
    """
    texts, sizes, end = [""], [], 0
    for mark in _BLANK.finditer(template):
        backslashes, begins, size = mark.groups()
        texts[-1] += template[end : mark.start()] + backslashes[: len(backslashes) // 2]
        escaped = len(backslashes) % 2
        end = mark.end(2) if escaped else mark.end()
        if escaped:
            texts[-1] += begins
        elif begins != "<blank" or size is None:
            written = re.match(r"[^>\n]{,20}>?", template[mark.start(2) :])[0]
            raise UserError(f"{written!r} is no blank; write <blank:8> for 8 tokens, or \\<blank for these letters")
        elif int(size) == 0:
            raise UserError(f"the template {template!r} has a blank of 0 tokens; leave it out, or make it longer")
        else:
            sizes.append(int(size))
            texts.append("")
    texts[-1] += template[end:]
    if not sizes:
        raise UserError(f"the template {template!r} has no blank; write one such as <blank:8>")
    check_size(1, sum(sizes))
    return texts, sizes


def check_size(rows: int, length: int):
    """UserError, before they take any memory, for rows of so many tokens that no call can hold them."""
    if rows * length > MOST:
        raise UserError(f"{rows:,} x {length:,} tokens are more than the {MOST:,} that one call draws; ask for fewer")


def of_template(template: str, tokenizer: Tokenizer) -> Prompt:
    """Text with blanks of so many tokens, as in "The <blank:8> sat on the <blank:5>."; see `parsed`."""
    pieces, sizes = parsed(template)
    texts, blanks = around_blanks(pieces, tokenizer), [blank(size) for size in sizes]
    return joined(texts[0], *(part for pair in zip(blanks, texts[1:]) for part in pair))


def between(prefix: str, suffix: str, length: int, tokenizer: Tokenizer) -> Prompt:
    """A blank between two texts, which makes them `length` tokens in all."""
    check_size(1, length)
    before, after = around_blanks([prefix, suffix], tokenizer)
    known = len(before.tokens) + len(after.tokens)
    if known >= length:
        raise UserError(
            f"prefix and suffix take {known} tokens, which leaves none of the length of {length} to fill in; "
            "shorten them, or make the length larger"
        )
    return joined(before, blank(length - known), after)


def of_arrays(tokens: Any, given: Any, vocab_size: int) -> list[Prompt]:
    """Rows of arrays. tokens: Int[N L], Int[L], or rows of any lengths, read where given: Bool of the same shape."""
    if tokens is None or given is None:
        raise UserError("infill: tokens and given go together")
    if len(tokens) and np.ndim(tokens[0]) == 0:
        tokens, given = [tokens], [given]
    if len(tokens) != len(given):
        raise UserError(f"there are {len(tokens)} rows of tokens, and {len(given)} of what is given; give both of each")
    return [_of_array(np.asarray(row), np.asarray(flags), vocab_size) for row, flags in zip(tokens, given)]


def _of_array(tokens: np.ndarray, given: np.ndarray, vocab_size: int) -> Prompt:
    if tokens.ndim != 1 or tokens.shape != given.shape or (tokens.size and given.dtype != bool):
        raise UserError(f"given must be a bool array of the shape of tokens, {tokens.shape}, and that of a row")
    known = tokens[given.astype(bool)]
    if known.size and not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"given tokens must be integers, not {tokens.dtype}")
    if known.size and not (0 <= known.min() and known.max() < vocab_size):
        raise UserError(f"given tokens must be from 0 to {vocab_size - 1}")
    return Prompt(np.where(given, tokens, 0).astype(np.int32), given.astype(bool))


def as_document(row: Prompt, layout: Layout, block: int, end_of_text: int | None) -> Prompt:
    """A whole text as the model's corpus has it: of padded documents, its end is given too, and scored padding."""
    if not layout.padded:
        return row
    spare = max(1, block - len(row.tokens)) if layout.padding == "scored" else 1
    return joined(row, Prompt(np.full(spare, end_of_text, np.int32), np.ones(spare, bool)))


class PromptBatch(NamedTuple):
    """Rows as the sampling loop takes them."""

    tokens: np.ndarray  # Int32[N L], read where not free
    free: np.ndarray  # Bool[N L]
    lengths: np.ndarray  # Int32[N]

    @property
    def within(self) -> np.ndarray:
        """Which positions are the rows', and do not follow their ends. Bool[N L]."""
        return np.arange(self.tokens.shape[1]) < self.lengths[:, None]


def collate(rows: list[Prompt], process: Process, block: int, layout: Layout) -> PromptBatch:
    """Rows of any lengths.

    Where the network is told the lengths, what follows the end of a row is of no account. Else with Absorbing it is
    held masked, and with Uniform the whole block is sampled, to be cut; either way the row has the model's exact
    marginal law.
    """
    masks = isinstance(process, Absorbing)
    cut = not masks and not layout.masks_padding
    lengths = np.array([len(row.tokens) for row in rows], np.int32)
    shape = (len(rows), max(int(lengths.max()), block if cut else 0))
    tokens = np.full(shape, process.mask if masks else 0, np.int32)
    free = np.zeros(shape, bool)
    for number, row in enumerate(rows):
        tokens[number, : lengths[number]] = row.tokens
        free[number, : lengths[number]] = ~row.given
        free[number, lengths[number] :] = cut and not row.given.all()
    return PromptBatch(tokens, free, lengths)


def windows_of(batch: PromptBatch, block: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The positions of each of the `windows`, and which of these are free and in none before. Int, Bool[N block]."""
    free = batch.free.copy()
    for start in windows(batch.lengths, block):
        at = start[:, None] + np.arange(min(block, free.shape[1]))
        yield at, np.take_along_axis(free, at, axis=1)
        np.put_along_axis(free, at, False, axis=1)


def windows(lengths: np.ndarray, block: int) -> Iterator[np.ndarray]:
    """Where each row's blocks begin, block after block: semi-autoregressively, the first half of a block given.

    The last block of a row ends where the row ends; shorter rows repeat theirs. lengths: Int[B] -> Int[B] each.
    """
    last = np.maximum(lengths - block, 0)
    stride = block - block // 2
    for number in range(-(-int(last.max()) // stride) + 1):
        yield np.minimum(number * stride, last)
