"""Rows in blocks of equal size, corrupted independently and generated from left to right, each given those before.

Block diffusion (Arriola et al., arXiv 2503.09573): with one block a row it is diffusion, with blocks of one token it is
autoregressive. N is the number of blocks of a row, which divides its length L.
"""

import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random


def num_blocks(length: int, size: int) -> int:
    """N, of blocks of `size` positions; 1 for a size of 0. ValueError if the blocks do not fill a row."""
    if size and length % size:
        raise ValueError(f"a row of {length} positions cannot be cut into blocks of {size}")
    return length // size if size else 1


def block_keys(keys: jax.Array, count: int) -> jax.Array:
    """The key of each of `count` blocks of each row. Key[B] -> Key[B N]; for one block the keys of the rows, Key[B]."""
    return keys if count == 1 else keyed_random.position_keys(keys, jnp.arange(count))


def split(x: jax.Array, count: int) -> jax.Array:
    """Rows cut into `count` blocks. [B L] -> [B N L/N]; for one block the rows, [B L]."""
    return x if count == 1 else x.reshape(len(x), count, -1)


def of_rows(values: jax.Array) -> jax.Array:
    """Numbers of rows, or the means of those of their blocks. Float[B] or Float[B N] -> Float[B]."""
    return values if values.ndim == 1 else values.mean(axis=1)


def by_token(values: jax.Array, length: int) -> jax.Array:
    """Numbers of rows or of blocks, [B] or [B N], for the `length` tokens of a row: [B 1] or [B L]."""
    return values[:, None] if values.ndim == 1 else jnp.repeat(values, length // values.shape[1], axis=1)
