"""Shows sampling live in a terminal."""

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
from sedd.generation.playback.reader import BROKEN, Reader, Run

# Escape sequences by kind of text: given blue, new bold green, masked faint.
COLOURS = {"given": "\x1b[94m", "new": "\x1b[1;32m", "unchanged": "", "masked": "\x1b[2m"}
PLAIN = "\x1b[0m"
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
WAITING = "waiting for the first step"
PAUSE = 0.03  # seconds between frames at first
PAUSES = 8.0  # seconds that all pauses add to a run at most
DECAY = PAUSE / PAUSES  # fraction of the remaining seconds that one pause takes at most
SHORTEST = 0.015  # seconds; a frame that follows sooner is skipped


class Terminal:
    """Shows the state after each step in a terminal: a `Watch`, used in a `with` statement.

    Frames are delayed to be readable, by 30 ms at first and by 8 s in all at most. The last frame stays on the screen.
    There are no colours if NO_COLOR is set. Characters that the encoding of the stream lacks are shown as "?".

    texts: number of texts over all groups; stream: stderr by default. UserError if it is not a terminal.
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
        self._before: dict[int, np.ndarray] = {}  # by row, the tokens on the screen
        self._tops: dict[int, int] = {}  # by row, the first of its lines on the screen
        self._pending: tuple[np.ndarray, np.ndarray, np.ndarray, int] | None = None  # a skipped frame
        self._num_lines = 0  # on the screen
        self._last, self._pauses = 0.0, PAUSES

    def __enter__(self) -> "Terminal":
        self._stream.write(HIDE_CURSOR + self._coloured([("masked", WAITING)]))  # until the loop is compiled
        self._stream.flush()
        return self

    def __exit__(self, *_) -> None:
        try:
            if self._pending is not None:
                self._draw(*self._pending)
        finally:
            self._stream.write(PLAIN + ("\n" if self._num_lines else "\r\x1b[J") + SHOW_CURSOR)
            self._stream.flush()

    def __call__(self, rows: np.ndarray, tokens: np.ndarray, given: np.ndarray, steps: int) -> None:
        """Shows a state. rows: Int[B], numbers of the texts; tokens: Int[B L]; given: Bool[B L]; steps: number done."""
        frame = self._pending = rows, tokens.copy(), given.copy(), steps
        pause = min(PAUSE, self._pauses * DECAY) - (time.monotonic() - self._last)
        if pause > 0:
            self._pauses -= pause
            time.sleep(pause)
        if time.monotonic() - self._last >= SHORTEST:
            self._draw(*frame)
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
                lines.append(self._coloured([("masked", label), *line]))
        if left := len(texts) - len(shares):
            lines.append(self._coloured([("masked", f"and {left} more"[:columns])]))
        up = f"\x1b[{self._num_lines - 1}A" if self._num_lines > 1 else ""
        self._stream.write(f"\r{up}" + "\n".join(f"{line}\x1b[K" for line in lines[: height - 1]) + "\x1b[J")
        self._stream.flush()
        self._num_lines = min(len(lines), height - 1)

    def _size(self) -> tuple[int, int]:
        """Returns columns and lines. The last column stays free, since terminals differ in when they wrap."""
        try:
            columns, height = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError):
            columns, height = 0, 0
        return max(10, (columns or 80) - 1), max(3, height or 24)

    def _header(self, rows, steps, many: bool) -> str:
        which = f"text {rows[0] + 1}" if len(rows) == 1 else f"texts {rows[0] + 1} to {rows[-1] + 1}"
        of = f" of {self._texts}" if self._texts and self._texts > len(rows) else ""
        words = f"step {steps}" + (f", {which}{of}" if many else "")
        return self._coloured([("masked", words[: self._size()[0]])])

    def _window(self, row: int, lines: list[list[tuple[str, str]]], share: int) -> list[list[tuple[str, str]]]:
        """Returns `share` lines of a text. Scrolls to the first change if no visible line changes."""
        top = self._tops.get(row, 0)
        busy = [number for number, line in enumerate(lines) if any(kind in ("new", "masked") for kind, _ in line)]
        if busy and not any(top <= number < top + share for number in busy):
            top = busy[0]
        self._tops[row] = top = max(0, min(top, len(lines) - share))
        return lines[top : top + share]

    def _coloured(self, line: list[tuple[str, str]]) -> str:
        colours = ((self._colours.get(kind, ""), text) for kind, text in line)
        return "".join(f"{colour}{text}{PLAIN}" if colour and text else text for colour, text in colours)


def wrapped(runs: Sequence[Run], columns: int, encoding: str = "utf-8") -> list[list[tuple[str, str]]]:
    """Wraps runs into lines of (kind, text) of at most `columns`, between words if possible."""
    lines: list[list[tuple[str, str, int]]] = []  # of (kind, character, columns)
    line: list[tuple[str, str, int]] = []  # the current one
    width = 0  # columns of the current line
    for text, kind in runs:
        for character in (_visible(character, encoding) for character in text):
            size = _columns(character)
            if character == "\n" or width + size > columns:
                breaks = character in "\n " or kind == "masked" or size == 2
                kept = [] if breaks else _after_last_break(line)
                lines.append(line[: len(line) - len(kept)])
                line, width = kept, sum(size for *_, size in kept)
                if character in "\n ":  # a space at the end of a line is dropped
                    continue
            line.append((kind, character, size))
            width += size
    return [_merged(line) for line in [*lines, line]]


def _after_last_break(line: list[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """Returns the part of a line to move to the next one: its last word, or nothing if it has one word."""
    for at in range(len(line), 0, -1):
        kind, character, size = line[at - 1]
        if character == " " or kind == "masked" or size == 2:
            return line[at:]
    return []


def _merged(line: list[tuple[str, str, int]]) -> list[tuple[str, str]]:
    merged: list[tuple[str, str]] = []
    for kind, character, _ in line:
        if merged and merged[-1][0] == kind:
            merged[-1] = kind, merged[-1][1] + character
        else:
            merged.append((kind, character))
    return merged


@functools.lru_cache(2**16)
def _visible(character: str, encoding: str) -> str:
    """Replaces a character that the terminal cannot show by one of the same number of columns."""
    shown = _harmless(character)
    try:
        shown.encode(encoding)
    except UnicodeEncodeError:
        return "?" if _columns(shown) else ""
    return shown


def _harmless(character: str) -> str:
    """Replaces a character that would move the cursor or change the direction of the text."""
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


def _shares(lengths: Sequence[int], lines: int) -> list[int]:
    """Divides the lines of the screen between texts: short texts are shown in full, long ones get equal shares."""
    lengths = list(lengths[:lines])
    shares = [0] * len(lengths)
    for done, number in enumerate(sorted(range(len(lengths)), key=lengths.__getitem__)):
        shares[number] = min(lengths[number], (lines - sum(shares)) // (len(lengths) - done))
    return shares
