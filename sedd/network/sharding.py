"""Where the network's arrays lie on the mesh that it is traced under. Without a mesh nothing is said, nothing changes.

Rows lie over ROWS. What a layer does within a row lies over SPLIT: heads, the MLP's hidden units, the vocabulary.
Weights, of which the state keeps a slice along the second axis of ROWS, are whole along it where they are used.
"""

import math

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

ROWS, SPLIT = ("data", "fsdp"), "model"


def has_mesh() -> bool:
    """Whether a mesh with these axes is set: not under `jax.pmap`, which has one of its own, or in `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return {*ROWS, SPLIT} <= set(mesh.axis_names) and set(mesh.axis_types) == {AxisType.Auto}


def constrain_sharding(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """x, its axes split over those of the mesh; None: whole, as are the axes left out. x itself where none is set.

    An axis that the mesh does not divide is left to the compiler.
    """
    if not has_mesh():
        return x
    return jax.lax.with_sharding_constraint(x, P(*map(_fitting, x.shape, axes)))


def _fitting(size, axis):
    names = (axis,) if isinstance(axis, str) else axis or ()
    parts = math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)
    return P.UNCONSTRAINED if size % parts else axis
