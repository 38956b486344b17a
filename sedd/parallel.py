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
from sedd.network.attention import check_platform

AXES = ("data", "fsdp", "model")
MIN_SHARD_BYTES = 1 << 20  # bytes below which an array is not split

# The last axes of a parameter, by its path; what stands before them (scanned layers) is not split. fsdp splits the
# width, model splits the padded vocabulary, the attention's heads and the MLP's hidden units.
_TABLE = (
    (r"trunk/embedding$", ("model", "fsdp")),
    (r"head/out/kernel$", ("fsdp", "model")),
    (r"qkv/kernel$", ("fsdp", None, "model")),  # of queries, keys and values, so that heads stay whole
    (r"up/kernel$", ("fsdp", "model")),
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
    if config.network.heads % sizes[2]:
        raise UserError(f"config: mesh.model={sizes[2]} does not divide network.heads={config.network.heads}")
    rows, parts = config.training.batch_size // config.training.accumulation, sizes[0] * sizes[1]
    if rows % parts:
        raise UserError(
            f"config: {rows} rows (training.batch_size / accumulation) cannot be split over {parts} devices"
        )
    return tuple(sizes)


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over the devices, by default over all. UserError if `config.mesh` or the batch does not fit them."""
    devices = jax.devices() if devices is None else devices
    check_platform(config.network.attention, devices[0].platform)
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
        if axes is None or leaf.ndim < 2 or leaf.size * np.dtype(leaf.dtype).itemsize < MIN_SHARD_BYTES:
            return NamedSharding(mesh, P())
        axes = (None,) * (leaf.ndim - len(axes)) + axes
        fits = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, leaf.shape)]
        return NamedSharding(mesh, P(*fits))

    return jax.tree_util.tree_map_with_path(one, tree)


def num_batch_shards(params) -> int:
    """Over how many devices the rows of a batch can be split beside these parameters."""
    where = getattr(jax.tree.leaves(params)[0], "sharding", None)
    return where.mesh.shape["data"] * where.mesh.shape["fsdp"] if isinstance(where, NamedSharding) else 1


def place_for_batch(params, rows: int) -> tuple[dict, Sharding | None]:
    """The parameters, and where so many rows lie beside them: split over their devices, or whole where they are few.

    Few rows of one process take the parameters of one device, where these are whole. None: wherever that is.
    """
    where, parts = getattr(jax.tree.leaves(params)[0], "sharding", None), num_batch_shards(params)
    if parts == 1 or rows >= parts:
        return params, batch_sharding(where.mesh) if isinstance(where, NamedSharding) else None
    if jax.process_count() == 1 and all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params)):
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), params), None
    return params, NamedSharding(where.mesh, P())


def on_host(tree):
    """Arrays on the host, whole, whatever devices they are split over. All processes have to call it."""
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    mesh = next(leaf.sharding.mesh for leaf in jax.tree.leaves(tree) if isinstance(leaf.sharding, NamedSharding))
    return jax.device_get(jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))(tree))


def local_rows(mesh: Mesh, count: int) -> np.ndarray:
    """Which rows of a batch of `count` lie on devices of this process, in their order. Int[R]."""
    places = batch_sharding(mesh).addressable_devices_indices_map((count,))
    return np.unique(np.concatenate([np.arange(count)[index] for index in places.values()]))


def shard_batch(mesh: Mesh, batch, rows: np.ndarray, count: int) -> object:
    """A batch of `count` rows over the mesh, of which this process has these. batch: a tree of arrays [R ...]."""

    def one(local):
        def of_device(index):
            return local[np.searchsorted(rows, np.arange(count)[index[0]])]

        return jax.make_array_from_callback((count, *local.shape[1:]), batch_sharding(mesh), of_device)

    return jax.tree.map(one, batch)


def put(tree, shardings) -> object:
    """Arrays that every process has whole, laid out as told; a sharding for each leaf."""

    def one(leaf, where):
        if where.is_fully_addressable:
            return jax.device_put(leaf, where)
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])

    return jax.tree.map(one, tree, shardings)


def abstract_arrays(shapes, shardings) -> object:
    """Shapes with their shardings, as what is to be restored is described."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
    )
