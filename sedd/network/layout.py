"""Where the network's arrays lie on the mesh that it is traced under. Without a mesh nothing is said, nothing changes.

Rows lie over ROWS. What a layer does within a row lies over SPLIT: heads, the MLP's hidden units, the vocabulary.
Weights, of which the state keeps a slice along ROWS' second axis, are whole along it where they are used.
"""

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

ROWS, SPLIT = ("data", "fsdp"), "model"


def laid(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """x, its axes split over those of the mesh; None: whole, as are the axes left out.

    An axis that the mesh does not divide is left to the compiler. Under a mesh of other axes, such as one that
    `jax.pmap` makes, or inside `jax.shard_map`, x is what it was.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not {*ROWS, SPLIT} <= set(mesh.axis_names) or set(mesh.axis_types) != {AxisType.Auto}:
        return x
    return jax.lax.with_sharding_constraint(x, P(*(_fits(mesh, size, axis) for size, axis in zip(x.shape, axes))))


def _fits(mesh, size, axis):
    names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
    parts = 1
    for name in names:
        parts *= mesh.shape[name]
    return axis if size % parts == 0 else P.UNCONSTRAINED
