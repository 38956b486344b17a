"""States as text: what each token reads where it stands, and which of it is new."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sedd.data.tokenizers import END_OF_TEXT, Tokenizer

BLOCK = "\u2591"  # how a masked token is shown, a light shade
BROKEN = "\ufffd"  # what bytes read that are no whole character
WINDOW = 8  # tokens in which a character that is split between tokens ends; more are looked at where it does not


class Run(NamedTuple):
    """Consecutive tokens of one kind."""

    text: str
    kind: str  # "given", "new" (changed in this step), "settled" or "hidden" (masked)


class Reader:
    """The text of a state's tokens, each where it stands, reading as the tokenizer decodes the whole.

    tokenizer: None shows the ids. mask: the id of the mask, None where there is none.
    """

    def __init__(self, tokenizer: Tokenizer | None, mask: int | None):
        self.tokenizer, self.mask = tokenizer, mask
        self._text = functools.lru_cache(2**17)(self._decoded)
        self._first = functools.lru_cache(2**17)(self._first_of)
        self._plain: dict[int, str | None] = {}

    def cells(self, tokens: np.ndarray) -> list[str | None]:
        """The text of each token of a row, Int[L], -1 where there is none.

        None: the token is part of the character, or characters, that the tokens before it began. Masked, a token reads
        U+2591. Bytes that are no whole character (not yet, or never) read U+FFFD.
        """
        ids, cells = np.asarray(tokens).tolist(), []
        for token in set(ids) - self._plain.keys():
            self._plain[token] = self._plain_text(token)
        opening = True  # nothing is before this token; some tokenizers drop a space there
        while len(cells) < len(ids):
            text, count = self._plain[ids[len(cells)]], 1
            if opening or text is None:
                text, count = self._next(ids, len(cells), opening)
                opening = text == END_OF_TEXT or (opening and not text)
            cells.append(text)
            cells += [None] * (count - 1)
        return cells

    def _plain_text(self, token: int) -> str | None:
        """The text of a token that has the same one wherever it stands but at the opening, else None."""
        text, _ = self._next([token], 0, False)
        return None if BROKEN in text or text == END_OF_TEXT else text

    def runs(self, tokens: np.ndarray, given: np.ndarray, before: np.ndarray | None = None) -> list[Run]:
        """A row of a state, Int[L], as text of different kinds.

        given: Bool[L]. before: the state before, Int[L]; None for the first, in which all is new that was masked
        before. A character that is split between tokens is new if one of them is, and given if all are.
        """
        kinds = self._kinds(np.asarray(tokens), np.asarray(given), before)
        runs, at = [], 0
        for text, size in _grouped(self.cells(tokens)):
            group = set(kinds[at : at + size])
            kind = next(kind for kind in ("new", "hidden", "settled", "given") if kind in group)
            at += size
            if runs and runs[-1].kind == kind:
                runs[-1] = Run(runs[-1].text + text, kind)
            elif text:
                runs.append(Run(text, kind))
        return runs

    def _kinds(self, tokens, given, before) -> list[str]:
        hidden = tokens == self.mask if self.mask is not None else np.zeros(tokens.shape, bool)
        changed = ~given & (self.mask is not None) if before is None else tokens != before
        return np.select([hidden, changed, given], ["hidden", "new", "given"], "settled").tolist()

    def _next(self, ids: list[int], start: int, opening: bool) -> tuple[str, int]:
        """The text and the number of the tokens from `start` that no character is split after."""
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
        """The fewest tokens that can be decoded apart from those after them: their text and number."""
        whole = self._text(ids, opening)
        for count in range(1, len(ids)):
            text = self._text(ids[:count], opening)
            if text + self._text(ids[count:], False) == whole:
                return text, count
        return whole, len(ids)

    def _decoded(self, ids: tuple[int, ...], opening: bool) -> str:
        """The text of tokens at the opening of a text, or else as it reads after other text, which is cut off."""
        if self.tokenizer is None:
            return "".join(f"{token} " for token in ids)
        before, known = ((), "") if opening else self._before
        return self.tokenizer.decode(np.array([*before, *ids]))[len(known) :]

    @functools.cached_property
    def _before(self) -> tuple[tuple[int, ...], str]:
        """Other text: the first token that is letters or digits, and what it reads. None is needed if there is none."""
        for token in range(self.tokenizer.vocab_size):
            text = self.tokenizer.decode(np.array([token]))
            if text.isalnum():
                return (token,), text
        return (), ""


def _grouped(cells: Sequence[str | None]) -> Iterator[tuple[str, int]]:
    """The text of tokens that make characters together, and their number."""
    at = 0
    while at < len(cells):
        size = 1
        while at + size < len(cells) and cells[at + size] is None:
            size += 1
        yield cells[at], size
        at += size
