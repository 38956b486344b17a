"""A self-contained HTML page that plays the steps of sampling. It loads nothing from the network."""

import html
import json
import re
from collections.abc import Mapping
from importlib import resources

import numpy as np

from sedd.data.tokenizers import Tokenizer
from sedd.generation.playback.reader import BLOCK, Reader


def page(
    states: np.ndarray,
    given: np.ndarray,
    tokenizer: Tokenizer | None,
    mask: int | None,
    about: Mapping[str, object],
) -> str:
    """Returns a self-contained HTML page that plays the states of a sampler.

    states: Int[T N L], the state after each step, -1 where there is no token: `Samples.trace`; given: Bool[N L];
    tokenizer: None shows ids; mask: the id of the mask, at which free positions start, or None for a process without
    one; about: names and values for the head of the page, such as {"sampler": "tweedie", "seed": 0}.

    The page stores each distinct piece of text once, and each state as its differences from the one before. States
    without a change are left out.
    """
    states, given = np.asarray(states), np.asarray(given)
    first = 1  # the number of the first state: 0 is the masked state before the first step
    if mask is not None and len(states):
        first = 0
        start = np.where(given | (states[0] < 0), states[0], mask)
        states = np.concatenate([start[None], states])
    reader = Reader(tokenizer, mask)
    pieces: dict[str | None, int] = {None: 0, "": 1}
    played = [_changes(states[:, row], reader, pieces) for row in range(len(given))] if len(states) else []
    last = len(states) - 1
    shown = [step for step in range(1, last + 1) if step == last or any(row[step] for row in played)]
    data = {
        "about": {name: str(value) for name, value in about.items()},
        "first": first,
        "last": last + first,
        "pieces": [BLOCK if piece is None else piece for piece in pieces],
        "given": [np.flatnonzero(flags).tolist() for flags in given],
        "base": [row[0] for row in played],
        "frames": [[step + first, [row[step] for row in played]] for step in shown],
    }
    final = ["".join(cell or "" for cell in reader.cells(tokens)) for tokens in states[-1]] if len(states) else []
    values = {
        "{{data}}": json.dumps(data, separators=(",", ":")).replace(
            "<", "\\u003c"
        ),  # so that no text ends the script element
        "{{final}}": "".join(f"<pre>{html.escape(text)}</pre>" for text in final),
    }
    template = resources.files("sedd.generation.playback").joinpath("page.html").read_text(encoding="utf-8")
    return re.sub("{{data}}|{{final}}", lambda name: values[name[0]], template)


def _changes(states: np.ndarray, reader: Reader, pieces: dict[str | None, int]) -> list[list[int]]:
    """Encodes the states of a row, Int[T L]: the first as piece numbers, each other as position, piece, position, ...

    pieces: the number of each piece of text, extended in place; None is that of the mask. Of the tokens of a split
    character, the first has its text and the others have the empty piece.
    """
    changes: list[list[int]] = []
    before: np.ndarray | None = None
    shown = np.zeros(0, np.int64)
    for tokens in states:
        if before is not None and np.array_equal(tokens, before):
            changes.append([])
            continue
        cells = reader.cells(tokens)
        number = {cell: pieces.setdefault(cell or "", len(pieces)) for cell in dict.fromkeys(cells)}
        numbers = np.array([number[cell] for cell in cells], np.int64)
        if reader.mask is not None:
            numbers[tokens == reader.mask] = pieces[None]
        if before is None:
            changes.append(numbers.tolist())
        else:
            starts = np.where([cell is not None for cell in cells], np.arange(len(cells)), 0)
            changed = numbers != shown
            changed[np.maximum.accumulate(starts)[tokens != before]] = True
            at = np.flatnonzero(changed)
            changes.append(np.stack([at, numbers[at]], axis=1).ravel().tolist())
        before, shown = tokens, numbers
    return changes
