"""How the documents of a corpus lie in blocks. A model remembers the layout of the corpus that it was trained on."""

from dataclasses import asdict, dataclass

import numpy as np

from sedd.errors import UserError

MODES = ("packed", "padded")
PADDINGS = ("scored", "ignored")


@dataclass(frozen=True)
class Layout:
    """packed: the documents one after another, cut into blocks wherever a block ends.

    padded: each document in rows of its own, filled up with the end-of-text id. That padding is either
    scored: it is text like any other, the network sees it and learns where a document ends; or
    ignored: it is no text, the network is told how many tokens of a row are valid, attends to those, and is scored on
    them, so that it models documents *given* their lengths. Samples draw their lengths from `row_lengths`.

    row_lengths: how many training rows have 0, 1, ..., L tokens; of a model, and only where padding is ignored.
    """

    mode: str = "packed"
    padding: str | None = None
    row_lengths: tuple[int, ...] | None = None

    @property
    def padded(self) -> bool:
        """Whether each document has rows of its own."""
        return self.mode == "padded"

    @property
    def masks_padding(self) -> bool:
        """Whether the network is told how many tokens of a row are valid."""
        return self.padding == "ignored"

    @property
    def name(self) -> str:
        """The mode and what becomes of the padding, in words."""
        return self.mode if self.padding is None else f"{self.mode}, its padding {self.padding}"

    def to_json(self) -> dict:
        """A dict for a JSON file."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> "Layout":
        """The inverse of `to_json`."""
        lengths = values["row_lengths"]
        return cls(values["mode"], values["padding"], lengths and tuple(lengths))


def make_layout(mode: str, padding: str | None) -> Layout:
    """The layout with this mode; padding is ignored unless told otherwise. UserError if they do not go together."""
    if mode not in MODES:
        raise UserError(f"there is no mode {mode!r}; choose packed or padded")
    if mode == "packed":
        if padding is not None:
            raise UserError("a packed corpus has no padding; leave --padding out, or choose --mode=padded")
        return Layout()
    padding = "ignored" if padding is None else padding
    if padding not in PADDINGS:
        raise UserError(f"padding is either scored or ignored, not {padding!r}")
    return Layout(mode, padding)


def cut(tokens: np.ndarray, block_length: int, padding: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Consecutive blocks, the last filled up, and how many tokens each has. Int[T] -> Int32[N L], Int32[N]."""
    count = -(-len(tokens) // block_length)
    rows = np.full(count * block_length, padding, np.int32)
    rows[: len(tokens)] = tokens
    lengths = np.full(count, block_length, np.int32)
    lengths[-1:] = len(tokens) - (count - 1) * block_length
    return rows.reshape(count, block_length), lengths


def padded_rows(offsets: np.ndarray, block_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of documents of their own; one longer than a block takes several.

    Args:
      offsets: Int64[documents + 1], where the documents begin among the tokens.

    Returns:
      Of each row: where it begins among the tokens, Int64[R]; how many it has, Int32[R]; its document, Int64[R].
    """
    sizes = np.diff(offsets)
    counts = -(-sizes // block_length)
    document = np.repeat(np.arange(len(sizes)), counts)
    within = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * block_length
    lengths = np.minimum(np.repeat(sizes, counts) - within, block_length).astype(np.int32)
    return offsets[document] + within, lengths, document
