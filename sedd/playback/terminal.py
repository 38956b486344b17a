"""Texts that emerge live in a terminal."""

import functools
import os
import sys
import time
import unicodedata
from collections.abc import Sequence
from typing import TextIO

import numpy as np

from sedd.data.tokenizers import Tokenizer
from sedd.errors import UserError
from sedd.playback.reader import BROKEN, Reader, Run

# What is put before a kind of text: given blue, new bold green, hidden faint.
COLOURS = {"given": "\x1b[94m", "new": "\x1b[1;32m", "settled": "", "hidden": "\x1b[2m"}
PLAIN = "\x1b[0m"
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
WAITING = "waiting for the first step"
PAUSE = 0.03  # seconds between frames that can be followed
PAUSES = 8.0  # seconds that pauses may add to a run, however many steps it has
DECAY = PAUSE / PAUSES  # the share of what is left of them that a pause may take: they get shorter, and never end
SHORTEST = 0.015  # seconds; a frame that comes sooner after the one before is not drawn


class Terminal:
    """Draws texts in a terminal as they emerge: a `Watch`, used in a `with` statement.

    Frames are slowed down so that they can be followed, by 30 ms at first and in all by 8 s at most. What is drawn last
    stays. Colours are left out where the environment has NO_COLOR. What the stream's encoding lacks is shown as "?".

    texts: how many there are in all, where they come in groups. UserError if `stream` (stderr) is no terminal.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, mask: int | None, texts: int | None = None, stream: TextIO | None = None
    ):
        self._stream = sys.stderr if stream is None else stream
        if not self._stream.isatty() or os.environ.get("TERM") == "dumb":
            raise UserError("--watch needs a terminal; leave it out, or write a page with --html=FILE")
        self._encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._reader, self._texts = Reader(tokenizer, mask), texts
        self._colours = {} if os.environ.get("NO_COLOR") else COLOURS
        self._before: dict[int, np.ndarray] = {}  # of each row, what is on the screen
        self._tops: dict[int, int] = {}  # of each row, the first of its lines that is on the screen
        self._pending = None  # a frame that came too soon
        self._drawn = 0  # lines on the screen
        self._last, self._pauses = 0.0, PAUSES

    def __enter__(self) -> "Terminal":
        self._stream.write(HIDE_CURSOR + self._coloured([("hidden", WAITING)]))  # while the loop is compiled
        self._stream.flush()
        return self

    def __exit__(self, *_) -> None:
        try:
            if self._pending is not None:
                self._draw(*self._pending)
        finally:
            self._stream.write(PLAIN + ("\n" if self._drawn else "\r\x1b[J") + SHOW_CURSOR)
            self._stream.flush()

    def __call__(self, rows: np.ndarray, tokens: np.ndarray, given: np.ndarray, steps: int) -> None:
        """Shows a state. rows: Int[B], their numbers among all. tokens, given: [B L]. steps: so many are done."""
        self._pending = rows, tokens.copy(), given.copy(), steps
        pause = min(PAUSE, self._pauses * DECAY) - (time.monotonic() - self._last)
        if pause > 0:
            self._pauses -= pause
            time.sleep(pause)
        if time.monotonic() - self._last >= SHORTEST:
            self._draw(*self._pending)
            self._pending, self._last = None, time.monotonic()

    def _draw(self, rows, tokens, given, steps) -> None:
        columns, height = self._size()
        many = len(rows) > 1 or (self._texts or 1) > 1
        margin = len(f"{rows[-1] + 1}  ") if many else 0
        texts = []
        for row, ids, flags in zip(rows.tolist(), tokens, given):
            runs = self._reader.runs(ids, flags, self._before.get(row))
            texts.append(wrapped(runs, columns - margin, self._encoding))
            self._before[row] = ids
        lines = [self._header(rows, steps, many)]
        fits = max(1, height - 2)
        shares = _shares([len(text) for text in texts], fits - (len(texts) > fits))
        for row, text, share in zip(rows.tolist(), texts, shares):
            for number, line in enumerate(self._window(row, text, share)):
                label = f"{row + 1 if number == 0 else '':>{margin - 2}}  " if many else ""
                lines.append(self._coloured([("hidden", label), *line]))
        if left := len(texts) - len(shares):
            lines.append(self._coloured([("hidden", f"and {left} more"[:columns])]))
        up = f"\x1b[{self._drawn - 1}A" if self._drawn > 1 else ""
        self._stream.write(f"\r{up}" + "\n".join(f"{line}\x1b[K" for line in lines[: height - 1]) + "\x1b[J")
        self._stream.flush()
        self._drawn = min(len(lines), height - 1)

    def _size(self) -> tuple[int, int]:
        """Columns and lines; the last column is left free, for what happens after it differs between terminals."""
        try:
            columns, height = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError):
            columns, height = 0, 0
        return max(10, (columns or 80) - 1), max(3, height or 24)

    def _header(self, rows, steps, many: bool) -> str:
        which = f"text {rows[0] + 1}" if len(rows) == 1 else f"texts {rows[0] + 1} to {rows[-1] + 1}"
        of = f" of {self._texts}" if self._texts and self._texts > len(rows) else ""
        words = f"step {steps}" + (f", {which}{of}" if many else "")
        return self._coloured([("hidden", words[: self._size()[0]])])

    def _window(self, row: int, lines: list[list[tuple[str, str]]], share: int) -> list[list[tuple[str, str]]]:
        """The lines of a text that are shown. It is turned on when nothing happens in those that are."""
        top = self._tops.get(row, 0)
        busy = [number for number, line in enumerate(lines) if any(kind in ("new", "hidden") for kind, _ in line)]
        if busy and not any(top <= number < top + share for number in busy):
            top = busy[0]
        self._tops[row] = top = max(0, min(top, len(lines) - share))
        return lines[top : top + share]

    def _coloured(self, line: list[tuple[str, str]]) -> str:
        colours = ((self._colours.get(kind, ""), text) for kind, text in line)
        return "".join(f"{colour}{text}{PLAIN}" if colour and text else text for colour, text in colours)


def wrapped(runs: Sequence[Run], columns: int, encoding: str = "utf-8") -> list[list[tuple[str, str]]]:
    """Lines of (kind, text) that take at most `columns` of a terminal, broken between words where that is possible."""
    lines, line, width = [], [], 0  # of the line so far: (kind, character, columns), and its columns
    for text, kind in runs:
        for character in (_visible(character, encoding) for character in text):
            size = _columns(character)
            if character == "\n" or width + size > columns:
                alone = character in "\n " or kind == "hidden" or size == 2
                kept = [] if alone else _after_last_break(line)
                lines.append(line[: len(line) - len(kept)])
                line, width = kept, sum(size for *_, size in kept)
                if character in "\n ":  # a space that does not fit is the end of the line
                    continue
            line.append((kind, character, size))
            width += size
    return [_merged(line) for line in [*lines, line]]


def _after_last_break(line: list[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """What goes to the next line: the last word, unless it is all there is."""
    for at in range(len(line), 0, -1):
        kind, character, size = line[at - 1]
        if character == " " or kind == "hidden" or size == 2:
            return line[at:]
    return []


def _merged(line: list[tuple[str, str, int]]) -> list[tuple[str, str]]:
    merged = []
    for kind, character, _ in line:
        if merged and merged[-1][0] == kind:
            merged[-1] = kind, merged[-1][1] + character
        else:
            merged.append((kind, character))
    return merged


@functools.lru_cache(2**16)
def _visible(character: str, encoding: str) -> str:
    """A character as a terminal may have it: one that the encoding has, and that takes as many columns as it says."""
    shown = _harmless(character)
    try:
        shown.encode(encoding)
    except UnicodeEncodeError:
        return "?" if _columns(shown) else ""
    return shown


def _harmless(character: str) -> str:
    """A character that does not move the cursor, nor turn the text round."""
    category = unicodedata.category(character)
    if character == "\n":
        return character
    if character in "\t\u2028\u2029":
        return " "
    if category == "Cc":
        return chr(0x2400 + ord(character)) if ord(character) < 32 else BROKEN
    return BROKEN if category == "Cs" else "" if category == "Cf" and character != "\u200d" else character


@functools.lru_cache(2**16)
def _columns(character: str) -> int:
    if not character or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _shares(wanted: Sequence[int], lines: int) -> list[int]:
    """Lines for each text, in order, until there are none: short ones have what they want, long ones equal parts."""
    wanted = list(wanted[:lines])
    shares = [0] * len(wanted)
    for left, number in enumerate(sorted(range(len(wanted)), key=wanted.__getitem__)):
        shares[number] = min(wanted[number], (lines - sum(shares)) // (len(wanted) - left))
    return shares
