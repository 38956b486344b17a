"""The text of each token in a state, and which tokens are new."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sedd.data.tokenizers import END_OF_TEXT, Tokenizer

BLOCK = "\u2591"  # shown for a masked token: a light shade
BROKEN = "\ufffd"  # shown for bytes that are not a complete character
WINDOW = 8  # tokens to decode at first for a character that is split between tokens


class Run(NamedTuple):
    """Consecutive tokens of one kind."""

    text: str
    kind: str  # "given", "new" (changed in this step), "unchanged" or "masked"


class Reader:
    """Decodes the tokens of a state one by one; joined, their texts are what the tokenizer decodes from all of them.

    tokenizer: None shows ids; mask: the id of the mask, None for a process without one.
    """

    def __init__(self, tokenizer: Tokenizer | None, mask: int | None):
        self.tokenizer, self.mask = tokenizer, mask
        self._text = functools.lru_cache(2**17)(self._decoded)
        self._first = functools.lru_cache(2**17)(self._first_of)
        self._plain: dict[int, str | None] = {}

    def cells(self, tokens: np.ndarray) -> list[str | None]:
        """Returns the text of each token of a row. tokens: Int[L], -1 where there is no token.

        None marks a token whose characters began in a token before it. The text of a mask is U+2591, that of bytes that
        are not a complete character U+FFFD.
        """
        ids = np.asarray(tokens).tolist()
        cells: list[str | None] = []
        for token in set(ids) - self._plain.keys():
            self._plain[token] = self._plain_text(token)
        opening = True  # no text is before this token; some tokenizers drop a space there
        while len(cells) < len(ids):
            text, count = self._plain[ids[len(cells)]], 1
            if opening or text is None:
                text, count = self._next(ids, len(cells), opening)
                opening = text == END_OF_TEXT or (opening and not text)
            cells += [text, *[None] * (count - 1)]
        return cells

    def _plain_text(self, token: int) -> str | None:
        """Returns the text of a token if it is the same everywhere but at the opening, else None."""
        text, _ = self._next([token], 0, False)
        return None if BROKEN in text or text == END_OF_TEXT else text

    def runs(self, tokens: np.ndarray, given: np.ndarray, before: np.ndarray | None = None) -> list[Run]:
        """Returns a row of a state as runs of text of one kind.

        tokens: Int[L]; given: Bool[L]; before: Int[L], the state before, or None for the first, in which all unmasked
        tokens are new. A character that is split between tokens is new if one of them is, and given if all are.
        """
        kinds = self._kinds(np.asarray(tokens), np.asarray(given), before)
        runs: list[Run] = []
        at = 0
        for text, size in _grouped(self.cells(tokens)):
            group = set(kinds[at : at + size])
            kind = next(kind for kind in ("new", "masked", "unchanged", "given") if kind in group)
            at += size
            if runs and runs[-1].kind == kind:
                runs[-1] = Run(runs[-1].text + text, kind)
            elif text:
                runs.append(Run(text, kind))
        return runs

    def _kinds(self, tokens, given, before) -> list[str]:
        masked = tokens == self.mask if self.mask is not None else np.zeros(tokens.shape, bool)
        changed = ~given & (self.mask is not None) if before is None else tokens != before
        return np.select([masked, changed, given], ["masked", "new", "given"], "unchanged").tolist()

    def _next(self, ids: list[int], start: int, opening: bool) -> tuple[str, int]:
        """Returns the text and number of tokens from `start` up to the first end of a character."""
        if ids[start] < 0:
            return "", 1
        if ids[start] == self.mask:
            return BLOCK, 1
        text = self._text((ids[start],), opening)
        if BROKEN not in text:
            return text, 1
        end = start + 1
        while end < len(ids) and ids[end] >= 0 and ids[end] != self.mask and BROKEN in self._text((ids[end],), False):
            end += 1
        width = WINDOW
        while True:
            stop = min(end, start + width)
            text, count = self._first(tuple(ids[start:stop]), opening)
            if count < stop - start or stop == end:
                return text, count
            width += WINDOW

    def _first_of(self, ids: tuple[int, ...], opening: bool) -> tuple[str, int]:
        """Returns the text and number of the shortest prefix that decodes independently of the tokens after it."""
        joint = self._text(ids, opening)
        for count in range(1, len(ids)):
            text = self._text(ids[:count], opening)
            if text + self._text(ids[count:], False) == joint:
                return text, count
        return joint, len(ids)

    def _decoded(self, ids: tuple[int, ...], opening: bool) -> str:
        """Decodes tokens at the opening of a text, or else after a context token, whose text is removed."""
        if self.tokenizer is None:
            return "".join(f"{token} " for token in ids)
        context, text = ((), "") if opening else self._context
        return self.tokenizer.decode(np.array([*context, *ids]))[len(text) :]

    @functools.cached_property
    def _context(self) -> tuple[tuple[int, ...], str]:
        """The first token of letters or digits, and its text; empty if the vocabulary has none."""
        assert self.tokenizer is not None
        for token in range(self.tokenizer.vocab_size):
            text = self.tokenizer.decode(np.array([token]))
            if text.isalnum():
                return (token,), text
        return (), ""


def _grouped(cells: Sequence[str | None]) -> Iterator[tuple[str, int]]:
    """Yields the text and number of tokens that form characters together."""
    at = 0
    while at < len(cells):
        size = 1
        while at + size < len(cells) and cells[at + size] is None:
            size += 1
        yield cells[at] or "", size
        at += size
