"""The layout of documents in blocks. A model's config records the layout of the corpus that it was trained on."""

from dataclasses import asdict, dataclass

import numpy as np

from sedd.errors import UserError

MODES = ("packed", "padded")
PADDINGS = ("scored", "ignored")


@dataclass(frozen=True)
class Layout:
    """The mode and the padding of a corpus or a model.

    mode: "packed", consecutive documents, cut into blocks wherever a block ends; or "padded", each document in separate
    rows, padded with the end-of-text id.
    padding: None where the mode is packed. "scored": padding is ordinary text, which the network sees and from which it
    learns where a document ends. "ignored": the network is conditioned on the number of valid tokens of a row, attends
    only to those and is scored only on those, so that it models documents *given* their lengths. Samples draw their
    lengths from `row_lengths`.
    row_lengths: numbers of training rows with 0, 1, ..., L tokens; only of a model, and only where padding is ignored.
    """

    mode: str = "packed"
    padding: str | None = None
    row_lengths: tuple[int, ...] | None = None

    @property
    def padded(self) -> bool:
        """True where each document has separate rows."""
        return self.mode == "padded"

    @property
    def masks_padding(self) -> bool:
        """True where the network is conditioned on the number of valid tokens of a row (padding mask)."""
        return self.padding == "ignored"

    @property
    def name(self) -> str:
        """The mode and the padding, in words."""
        return self.mode if self.padding is None else f"{self.mode}, its padding {self.padding}"

    def to_json(self) -> dict:
        """Returns a dict for a JSON file."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> "Layout":
        """Inverse of `to_json`."""
        lengths = values["row_lengths"]
        return cls(values["mode"], values["padding"], lengths and tuple(lengths))


def make_layout(mode: str, padding: str | None) -> Layout:
    """Returns the layout of this mode and padding; by default, padding is ignored. UserError if they do not match."""
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
    """Returns consecutive blocks, the last padded, and their numbers of tokens. Int[T] -> Int32[N L], Int32[N]."""
    count = -(-len(tokens) // block_length)
    rows = np.full(count * block_length, padding, np.int32)
    rows[: len(tokens)] = tokens
    lengths = np.full(count, block_length, np.int32)
    lengths[-1:] = len(tokens) - (count - 1) * block_length
    return rows.reshape(count, block_length), lengths


def padded_rows(offsets: np.ndarray, block_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the rows of a padded split; a document longer than a block takes several.

    offsets: Int64[documents + 1], index of the first token of each document, then the number of tokens. Returns, of
    each row, the index of its first token, Int64[R]; its number of tokens, Int32[R]; its document, Int64[R].
    """
    sizes = np.diff(offsets)
    counts = -(-sizes // block_length)
    document = np.repeat(np.arange(len(sizes)), counts)
    within = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * block_length
    lengths = np.minimum(np.repeat(sizes, counts) - within, block_length).astype(np.int32)
    return offsets[document] + within, lengths, document
