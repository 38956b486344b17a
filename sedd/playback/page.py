"""A page that plays back how texts emerged: one file, which needs no network."""

import html
import json
import re
from collections.abc import Mapping
from importlib import resources

import numpy as np

from sedd.data.tokenizers import Tokenizer
from sedd.playback.reader import BLOCK, Reader


def page(
    states: np.ndarray,
    given: np.ndarray,
    tokenizer: Tokenizer | None,
    mask: int | None,
    about: Mapping[str, object],
) -> str:
    """A page of HTML, complete in itself, that plays the states of a sampler.

    It holds the pieces of text once, and of each state only what differs from the one before. States in which nothing
    changed are passed over.

    Args:
      states: Int[T N L], the states after each step, -1 where there is no token: `Samples.trace`.
      given: Bool[N L], the tokens that were given.
      tokenizer: None shows the ids.
      mask: the id of the mask, from which everything starts that is not given; None where there is none.
      about: what is said of them, by name, such as {"sampler": "tweedie", "seed": 0}.
    """
    states, given = np.asarray(states), np.asarray(given)
    first = 1
    if mask is not None and len(states):
        first = 0
        start = np.where(given | (states[0] < 0), states[0], mask)
        states = np.concatenate([start[None], states])
    reader, pieces = Reader(tokenizer, mask), {None: 0, "": 1}
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
    holes = {
        "{{data}}": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),  # no text can end the script
        "{{final}}": "".join(f"<pre>{html.escape(text)}</pre>" for text in final),
    }
    template = resources.files("sedd.playback").joinpath("page.html").read_text(encoding="utf-8")
    return re.sub("{{data}}|{{final}}", lambda hole: holes[hole[0]], template)


def _changes(states: np.ndarray, reader: Reader, pieces: dict[str | None, int]) -> list[list[int]]:
    """Of a row, Int[T L]: the first state as pieces, then of each one position, piece, position, piece of what changed.

    pieces: the number of each text, with new ones added; None is the mask's. The tokens of a character that is split
    between them have their text at the first, and nothing after it.
    """
    changes, before, shown = [], None, None
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
