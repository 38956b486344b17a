"""A digest of each array, computed where it lies: it shows whether what was read is what was written.

Each 32-bit word is mixed with a hash of its place, and all are added modulo 2^32, twice: so a digest depends on neither
the devices nor the order of the sum, and a change of any one word always changes it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sedd.parallel import named


def digests(tree) -> dict[str, str]:
    """The digest of each leaf, 64 bits in hexadecimal, by its path. All processes have to call it."""
    found = {name: _digest(leaf) for name, leaf in named(tree).items()}
    return {name: "".join(f"{half:08x}" for half in np.asarray(pair)) for name, pair in found.items()}


@jax.jit
def _digest(leaf: jax.Array) -> jax.Array:
    """UInt32[2]."""
    words = _words(leaf)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        place = place * jnp.uint32(0x01000193) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    first = _mixed(words ^ _mixed(place))
    second = _mixed(words + _mixed(~place))
    return jnp.stack([jnp.sum(half, dtype=jnp.uint32) for half in (first, second)])


def _words(leaf: jax.Array) -> jax.Array:
    """The bits of an array as UInt32, with an axis of two behind for elements of 64 bits."""
    size = leaf.dtype.itemsize
    if leaf.dtype == bool or size == 1:
        return leaf.view(jnp.uint8).astype(jnp.uint32) if leaf.dtype != bool else leaf.astype(jnp.uint32)
    if size == 2:
        return jax.lax.bitcast_convert_type(leaf, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit numbers in which every bit depends on every other (MurmurHash3's last step)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
