"""The device mesh and the sharding of each array on it, for `jax.jit` instead of `jax.pmap`.

One step is jitted over a mesh with the axes 'data', 'fsdp' and 'model'. The batch is split over the first two;
parameters, their EMA and the optimiser's state are split by one table of parameter paths.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from sedd.errors import UserError
from sedd.runtime.trees import name_of

BATCH_AXES, MODEL_AXIS = ("data", "fsdp"), "model"  # the mesh axes that split a batch, and heads and vocabulary
AXES = (*BATCH_AXES, MODEL_AXIS)
MIN_SHARD_BYTES = 1 << 20  # smaller arrays are replicated

# The mesh axes of the last axes of a parameter, by its path; axes before them (scanned layers) are not split. fsdp
# splits the width; model splits the padded vocabulary, the attention heads and the hidden units of the MLP.
_TABLE = (
    (r"trunk/embedding$", ("model", "fsdp")),
    (r"codec/table$", ("model", None)),
    (r"(head|decoder)/out/kernel$", ("fsdp", "model")),
    (r"qkv/kernel$", ("fsdp", None, "model")),  # the middle axis is that of q, k and v, so that heads are not split
    (r"up/kernel$", ("fsdp", "model")),
    (r"block\w*/(out|down)/kernel$", ("model", "fsdp")),
    (r"modulation/kernel$", (None, "fsdp")),
)


def mesh_sizes(config: ConfigDict, devices: int) -> tuple[int, ...]:
    """Returns the size of each of AXES for a number of devices. UserError if the mesh or the batch does not fit."""
    sizes = [config.mesh[axis] for axis in AXES]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = max(1, devices // -math.prod(sizes))
    if math.prod(sizes) != devices or min(sizes) < 1:
        raise UserError(f"config: the mesh of {dict(config.mesh)} devices does not fit the {devices} available devices")
    if config.network.heads % sizes[2]:
        raise UserError(f"config: mesh.model={sizes[2]} does not divide network.heads={config.network.heads}")
    rows, parts = config.training.batch_size // config.training.accumulation, sizes[0] * sizes[1]
    if rows % parts:
        raise UserError(
            f"config: {rows} rows (training.batch_size / accumulation) cannot be split over {parts} devices"
        )
    return tuple(sizes)


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over the devices, by default all. UserError if `config.mesh` or the batch does not fit them."""
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with all devices, or those given, along 'data'."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices), 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of a batch: rows split over 'data' and 'fsdp'."""
    return NamedSharding(mesh, P(BATCH_AXES))


def shardings(mesh: Mesh | AbstractMesh, tree) -> Any:
    """Returns the sharding of each leaf of a tree of arrays or shapes, found by the end of its path in the table."""

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
    """Returns the number of shards of a batch on the mesh of these parameters; 1 for parameters without a mesh."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return 1
    return math.prod(sharding.mesh.shape[axis] for axis in BATCH_AXES)


def place_for_batch(params, rows: int) -> tuple[dict, Sharding | None]:
    """Returns the parameters, and the sharding of a batch of `rows` rows for them.

    Rows are split over the devices of the parameters if there is a row for each device, else replicated. With one
    process and replicated parameters, a batch smaller than that runs on one device: the parameters of that device and
    None are returned.
    """
    sharding, shards = getattr(jax.tree.leaves(params)[0], "sharding", None), num_batch_shards(params)
    if not isinstance(sharding, NamedSharding):
        return params, None
    if shards == 1 or rows >= shards:
        return params, batch_sharding(sharding.mesh)
    if jax.process_count() == 1 and all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params)):
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), params), None
    return params, NamedSharding(sharding.mesh, P())


def on_host(tree):
    """Returns the full arrays on the host, however they are sharded. All processes have to call it."""
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    mesh = next(leaf.sharding.mesh for leaf in jax.tree.leaves(tree) if isinstance(leaf.sharding, NamedSharding))
    return jax.device_get(jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))(tree))


def local_rows(mesh: Mesh, count: int) -> np.ndarray:
    """Returns the indices of the rows that devices of this process hold, of a batch of `count`, ascending. Int[R]."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((count,))
    return np.unique(np.concatenate([np.arange(count)[index] for index in indices.values()]))


def shard_batch(mesh: Mesh, batch, rows: np.ndarray, count: int) -> Any:
    """Returns a batch of `count` rows sharded over the mesh. batch: a tree of arrays [R ...]; rows: Int[R]."""

    def one(local):
        def rows_at(index):
            return local[np.searchsorted(rows, np.arange(count)[index[0]])]

        return jax.make_array_from_callback((count, *local.shape[1:]), batch_sharding(mesh), rows_at)

    return jax.tree.map(one, batch)


def put(tree, shardings) -> Any:
    """Returns the tree with its leaves, full arrays in every process, in the given shardings, one for each leaf."""

    def one(leaf, sharding):
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        full = np.asarray(leaf)
        return jax.make_array_from_callback(full.shape, sharding, lambda index: full[index])

    return jax.tree.map(one, tree, shardings)


def abstract_arrays(shapes, shardings) -> Any:
    """Returns a tree of `jax.ShapeDtypeStruct` with shardings, the target of restoring a checkpoint."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
