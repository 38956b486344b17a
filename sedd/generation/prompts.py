"""Prompts: rows of given and free tokens from texts, from templates, from prefixes and suffixes, or from arrays."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from sedd.data.tokenizers import WHOLE_TEXT, Ends, Tokenizer
from sedd.errors import UserError
from sedd.generation.rows import Row, check_size, joined

# Groups: the backslashes before "<blank", "<blank" itself in any spelling, and the size if it is well-formed.
_BLANK = re.compile(r"(\\*)(<\s*blank)(?::([0-9]{1,18})>)?", re.IGNORECASE)


def blank(length: int) -> Row:
    """Returns a prompt of free positions only."""
    return Row(np.zeros(length, np.int32), np.ones(length, bool))


def of_text(text: str, tokenizer: Tokenizer, ends: Ends = WHOLE_TEXT) -> Row:
    """Returns a prompt of given tokens only. ends: True at an end of the text that is also an end of the row."""
    tokens = tokenizer.encode(text, ends)
    return Row(tokens, np.zeros(len(tokens), bool))


def before_blank(text: str, tokenizer: Tokenizer, ends: Ends = Ends(closes=False)) -> Row:
    """Returns the text before a blank as a prompt of given tokens only.

    If the tokens of words begin with a space, a space at the end of the text is left out, so that the blank supplies
    it: as a token of its own, it occurs before no word of the training text.
    """

    def size(part):
        return len(tokenizer.encode(part, Ends(False, False)))

    joins = text.endswith(" ") and any(size(f" {word}") < size(" ") + size(word) for word in set(text.split()))
    return of_text(text[:-1] if joins else text, tokenizer, ends)


def around_blanks(texts: Sequence[str], tokenizer: Tokenizer) -> list[Row]:
    """Encodes the texts around blanks as parts of one text. All tokens are given.

    A space next to a blank is left to the blank: the one before it, or the one after it if tokens end with a space.
    """
    last = len(texts) - 1
    ends = [Ends(number == 0, number == last) for number in range(len(texts))]
    texts = [text[text[:1] == " " and tokenizer.space_follows and number > 0 :] for number, text in enumerate(texts)]
    rows = [before_blank(text, tokenizer, end) for text, end in zip(texts[:-1], ends)]
    return [*rows, of_text(texts[-1], tokenizer, ends[-1])]


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


def of_template(template: str, tokenizer: Tokenizer) -> Row:
    """Returns the prompt of a template, as in "The <blank:8> sat on the <blank:5>."; see `parse_template`."""
    pieces, sizes = parse_template(template)
    texts, blanks = around_blanks(pieces, tokenizer), [blank(size) for size in sizes]
    return joined(texts[0], *(part for pair in zip(blanks, texts[1:]) for part in pair))


def between(prefix: str, suffix: str, length: int, tokenizer: Tokenizer) -> Row:
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


def of_arrays(tokens: Any, given: Any, vocab_size: int) -> list[Row]:
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


def _of_array(tokens: np.ndarray, given: np.ndarray, vocab_size: int) -> Row:
    if tokens.ndim != 1 or tokens.shape != given.shape or (tokens.size and given.dtype != bool):
        raise UserError(
            f"given must be a bool array of the shape of tokens, {tokens.shape}, with one dimension per row"
        )
    ids = tokens[given.astype(bool)]
    if ids.size and not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"given tokens must be integers, not {tokens.dtype}")
    if ids.size and not (0 <= ids.min() and ids.max() < vocab_size):
        raise UserError(f"given tokens must be from 0 to {vocab_size - 1}")
    return Row(np.where(given, tokens, 0).astype(np.int32), ~given.astype(bool))
