"""A digest of each array, computed on its devices, to verify that the arrays read are the arrays written.

Each 32-bit word is mixed with a hash of its index, and all are summed modulo 2^32, in two ways: the digest is
independent of the devices and of the order of summation, and a change of any single word always changes it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sedd.runtime.parallel import named


def digests(tree) -> dict[str, str]:
    """Returns the digest of each leaf, 64 bits in hexadecimal, by its path. All processes must call it."""
    halves = {name: _digest(leaf) for name, leaf in named(tree).items()}
    return {name: "".join(f"{half:08x}" for half in np.asarray(pair)) for name, pair in halves.items()}


@jax.jit
def _digest(leaf: jax.Array) -> jax.Array:
    """Returns the two halves of the digest. UInt32[2]."""
    words = _words(leaf)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        index = index * jnp.uint32(0x01000193) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    first = _mix(words ^ _mix(index))
    second = _mix(words + _mix(~index))
    return jnp.stack([jnp.sum(half, dtype=jnp.uint32) for half in (first, second)])


def _words(leaf: jax.Array) -> jax.Array:
    """Returns the bits of an array as UInt32, with a trailing axis of size two for 64-bit elements."""
    size = leaf.dtype.itemsize
    if leaf.dtype == bool or size == 1:
        return leaf.view(jnp.uint8).astype(jnp.uint32) if leaf.dtype != bool else leaf.astype(jnp.uint32)
    if size == 2:
        return jax.lax.bitcast_convert_type(leaf, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: a bijection of 32-bit numbers in which every bit depends on every other."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
