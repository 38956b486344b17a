"""Trees of arrays: the paths of their leaves, whether one tree fits another, and hashes of what they contain."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from sedd.errors import UserError


def name_of(path: tuple, separator: str = "/") -> str:
    """Returns the path of a leaf as text, such as trunk/block_0/up/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator=separator)


def named(tree, separator: str = "/") -> dict:
    """Returns the leaves of a tree by their paths, in the order of the tree."""
    return {name_of(path, separator): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def merged(tree: dict, other: dict) -> dict:
    """Returns the nested dict with the leaves of both, which have no path in common."""
    both = {name: merged(tree[name], other[name]) for name in tree.keys() & other.keys()}
    return {**tree, **other, **both}


def types(tree) -> dict[str, str]:
    """Returns the type and shape of each leaf by its path, such as float32[4, 3]. Leaves may be abstract."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in named(tree).items()}


def first_mismatch(found: dict[str, str], expected: dict[str, str], here: str = "here") -> str | None:
    """Returns the first leaf that does not fit, as "PATH is TYPE there, TYPE here"; None if all fit.

    found, expected: as of `types`.
    """
    for name in (*expected, *found):
        is_there, is_here = (leaves.get(name, "missing") for leaves in (found, expected))
        if is_there != is_here:
            return f"{name} is {is_there} there, {is_here} {here}"
    return None


def fitted(tree, like, problem: str):
    """Returns parameters, a tree or a dict by path, in the structure of `like`, those of a config's network.

    UserError, which begins with `problem` and names the first leaf, if one is missing, left over or of another type.
    """
    mismatch = first_mismatch(types(tree), types(like), "in the config's network")
    if mismatch is not None:
        raise UserError(f"{problem}: {mismatch}")
    leaves = named(tree)
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in named(like)])


def fingerprint(tree) -> str:
    """Returns a BLAKE2b hash of all leaves, their paths, types and shapes, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for name, leaf in named(tree).items():
        array = np.asarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def digests(tree) -> dict[str, str]:
    """Returns a digest of each leaf, 64 bits in hexadecimal, by its path; computed on its devices.

    Each 32-bit word is mixed with a hash of its index, and all are summed modulo 2^32, in two ways: the digest is
    independent of the devices and of the order of summation, and a change of any single word always changes it. All
    processes must call it.
    """
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
