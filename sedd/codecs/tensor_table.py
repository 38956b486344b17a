"""Tables of published tensors: which parameter each is, and how it is stored. They are read and written by one table.

A table lists the parameters of a network by path. A format of published weights is such a table, and no code.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from sedd.errors import UserError


class Form(NamedTuple):
    """How a parameter is stored: the function of the stored tensors that returns it, and the inverse, of a list."""

    read: Callable[..., np.ndarray]
    write: Callable[[np.ndarray], list[np.ndarray]]


class Entry(NamedTuple):
    """A parameter, by its path as "trunk/block_0/up/kernel", and the names of the tensors that it is stored in."""

    path: str
    names: tuple[str, ...]
    form: Form


Table = list[Entry]

SAME = Form(lambda array: array, lambda array: [array])
TRANSPOSED = Form(lambda array: array.T, lambda array: [array.T])
# One linear map to queries, keys and values, which have an axis of their own here: Float[3 W, D] <-> Float[D 3 W].
JOINED = Form(lambda array: array.T.reshape(array.shape[1], 3, -1), lambda array: [array.reshape(len(array), -1).T])
# Three linear maps, or their biases.
STACKED = Form(lambda *maps: np.stack([one.T for one in maps], -2), lambda array: [one.T for one in _thirds(array)])


def rows(count: int, stored: int) -> Form:
    """Arrays of `count` rows, which have `stored` rows here, those after the first `count` zero."""
    return Form(lambda array: _extended(array, stored - count), lambda array: [array[:count]])


def columns(count: int, stored: int) -> Form:
    """Transposed arrays of `count` rows, which are `stored` columns here."""
    return Form(lambda array: _extended(array, stored - count).T, lambda array: [array[..., :count].T])


def linear(path: str, name: str, bias: bool = True) -> Table:
    """The entries of a linear map."""
    kernel = Entry(f"{path}/kernel", (f"{name}.weight",), TRANSPOSED)
    return [kernel, Entry(f"{path}/bias", (f"{name}.bias",), SAME)] if bias else [kernel]


def qkv(path: str, names: Iterable[str], bias: bool = True) -> Table:
    """The entries of three linear maps, to queries, keys and values."""
    parts = {"kernel": "weight", "bias": "bias"} if bias else {"kernel": "weight"}
    names = tuple(names)
    return [Entry(f"{path}/{ours}", tuple(f"{name}.{part}" for name in names), STACKED) for ours, part in parts.items()]


def norm(path: str, name: str, bias: bool = True) -> Table:
    """The entries of a layer norm."""
    scale = Entry(f"{path}/scale", (f"{name}.weight",), SAME)
    return [scale, Entry(f"{path}/bias", (f"{name}.bias",), SAME)] if bias else [scale]


def layers(count: int, block: Callable[[int], Table]) -> Table:
    """The entries of all layers. block: those of a layer, by its number."""
    return [entry for layer in range(count) for entry in block(layer)]


def params_from(tensors: Mapping[str, np.ndarray], table: Table, folder: Path, unused: Iterable[str] = ()) -> dict:
    """Returns the parameters by path, float32. unused: names of tensors that are no parameters.

    UserError, which names it, if a tensor is missing, left over, no array of floating-point numbers, or of a shape that
    its form does not take.
    """
    expected = {name for entry in table for name in entry.names}
    if missing := [name for entry in table for name in entry.names if name not in tensors]:
        raise UserError(f"{folder}: the checkpoint lacks {missing[0]}")
    if surplus := sorted(tensors.keys() - expected - set(unused)):
        raise UserError(f"{folder}: the checkpoint has tensors that the network does not have: {surplus}")
    return {entry.path: _read(entry, tensors, folder) for entry in table}


def _read(entry: Entry, tensors: Mapping[str, np.ndarray], folder: Path) -> np.ndarray:
    arrays = []
    for name in entry.names:
        array = tensors[name]
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"{folder}: {name} of the checkpoint has the type {array.dtype}, not a floating-point one")
        arrays.append(array.astype(np.float32, copy=False))
    try:
        return entry.form.read(*arrays)
    except (ValueError, IndexError, TypeError):
        shapes = ", ".join(f"{name} {list(tensors[name].shape)}" for name in entry.names)
        raise UserError(f"{folder}: the shapes of the checkpoint do not fit: {shapes}") from None


def tensors_from(params: Mapping[str, np.ndarray], table: Table) -> dict[str, np.ndarray]:
    """Returns the stored tensors of parameters by path, the inverse of `params_from`. KeyError if one is missing."""
    found: dict[str, np.ndarray] = {}
    for entry in table:
        arrays = entry.form.write(np.asarray(params[entry.path]))
        found.update(zip(entry.names, map(np.ascontiguousarray, arrays), strict=True))
    return found


def _thirds(array: np.ndarray) -> list[np.ndarray]:
    return [array[..., part, :] for part in range(3)]


def _extended(array: np.ndarray, number: int) -> np.ndarray:
    return np.pad(array, ((0, number), *((0, 0),) * (array.ndim - 1))) if number else array
