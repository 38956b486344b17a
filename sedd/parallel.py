"""The mesh, and where each array lies on it: what `jax.pmap` became.

One step is jitted over a mesh with the axes 'data', 'fsdp' and 'model'. The batch is split over the first two; the
parameters, their average and the optimiser's state by one table of parameter paths.
"""

import hashlib
import math
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from sedd.errors import UserError

AXES = ("data", "fsdp", "model")
WHOLE = 1 << 20  # bytes below which an array is not split

# The last two axes of a parameter, by its path; what stands before them (scanned layers) is not split. fsdp splits the
# width, model splits the padded vocabulary, the attention's heads and the MLP's hidden units.
_TABLE = (
    (r"trunk/embedding$", ("model", "fsdp")),
    (r"head/out/kernel$", ("fsdp", "model")),
    (r"(qkv|up)/kernel$", ("fsdp", "model")),
    (r"block\w*/(out|down)/kernel$", ("model", "fsdp")),
    (r"modulation/kernel$", (None, "fsdp")),
)


def mesh_sizes(config: ConfigDict, devices: int) -> tuple[int, ...]:
    """How many of so many devices lie along each of AXES. UserError if the mesh or the batch does not fit them."""
    sizes = [config.mesh[axis] for axis in AXES]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = max(1, devices // -math.prod(sizes))
    if math.prod(sizes) != devices or min(sizes) < 1:
        raise UserError(f"config: the mesh of {dict(config.mesh)} devices does not fit the {devices} that there are")
    rows, parts = config.training.batch_size // config.training.accumulation, sizes[0] * sizes[1]
    if rows % parts:
        raise UserError(
            f"config: {rows} rows (training.batch_size / accumulation) cannot be split over {parts} devices"
        )
    return tuple(sizes)


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over the devices, by default over all. UserError if `config.mesh` or the batch does not fit them."""
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the devices, by default of all, each of which takes rows."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices), 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over 'data' and 'fsdp'."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def name_of(path: tuple, separator: str = "/") -> str:
    """The path of a leaf as text, such as trunk/block_0/up/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator=separator)


def named(tree, separator: str = "/") -> dict:
    """The leaves of a tree by their paths, in the order of the tree."""
    return {name_of(path, separator): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def fingerprint(tree) -> str:
    """A hash of all leaves, their paths and types, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for name, leaf in named(tree).items():
        array = np.asarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8))
    return digest.hexdigest()


def shardings(mesh: Mesh | AbstractMesh, tree) -> object:
    """The sharding of each leaf of a tree of arrays or their shapes; paths may end in a parameter's path."""

    def one(path, leaf):
        name = name_of(path)
        axes = next((axes for pattern, axes in _TABLE if re.search(pattern, name)), None)
        if axes is None or leaf.ndim < 2 or leaf.size * np.dtype(leaf.dtype).itemsize < WHOLE:
            return NamedSharding(mesh, P())
        axes = (None,) * (leaf.ndim - 2) + axes
        fits = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, leaf.shape)]
        return NamedSharding(mesh, P(*fits))

    return jax.tree_util.tree_map_with_path(one, tree)


def beside(params) -> Sharding | None:
    """Whole on each of the devices that hold the parameters; None where these are on no device."""
    where = getattr(jax.tree.leaves(params)[0], "sharding", None)
    return NamedSharding(where.mesh, P()) if isinstance(where, NamedSharding) else where


def placed(shapes, shardings) -> object:
    """Shapes with their shardings, as what is to be restored is described."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
    )
