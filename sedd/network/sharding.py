"""Sharding constraints of the network's arrays, on the mesh under which it is traced. Without a mesh: none.

The batch is sharded over `parallel.BATCH_AXES`; heads, the MLP's hidden units and the vocabulary over
`parallel.MODEL_AXIS`. The training state shards weights over the second of BATCH_AXES too; they are gathered along it
where they are used.
"""

import math

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sedd.runtime.parallel import AXES, BATCH_AXES


def has_mesh() -> bool:
    """True if a mesh with these axes is set; False under `jax.pmap`, whose mesh is another, and in `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return set(AXES) <= set(mesh.axis_names) and set(mesh.axis_types) == {AxisType.Auto}


def num_shards() -> int:
    """The number of devices that share the logits of a batch; 1 without a mesh."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in AXES) if has_mesh() else 1


def num_row_shards() -> int:
    """The number of groups of devices that share the rows of a batch; 1 without a mesh."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in BATCH_AXES) if has_mesh() else 1


def constrain_sharding(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Constrains the axes of x to be sharded over the given mesh axes. Returns x itself if no mesh is set.

    axes: for each axis of x the mesh axes; None, or left out: not sharded. An axis whose size is not a multiple of the
    number of shards is left to the compiler.
    """
    if not has_mesh():
        return x
    return jax.lax.with_sharding_constraint(x, P(*map(_axis_if_divisible, x.shape, axes)))


def _axis_if_divisible(size, axis):
    names = (axis,) if isinstance(axis, str) else axis or ()
    num_shards = math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)
    return P.UNCONSTRAINED if size % num_shards else axis
