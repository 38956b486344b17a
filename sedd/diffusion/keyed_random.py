"""Every random draw of the diffusion, and how its key is made.

Noise is keyed by (seed, global row, purpose or step, position), never by the shape of a batch: no grouping of rows
into batches, and no choice of the positions that are asked for, changes a sample. That needs keys whose numbers are the
same alone and in a batch, as threefry's are; those of JAX's hardware generators ("rbg") are not. So a key is made by
`root_key`, which names its implementation, and one from elsewhere becomes one of that kind (`threefry`).

JAX's default Gumbel noise is truncated in float32: it never draws an event rarer than about 1e-7, and an outcome of
probability 1e-3 that is spread over 50 000 states never at all (Zheng et al., arXiv 2409.02908). So all draws here are
two-stage (does a token move; then where to), in `mode="high"`, right to float32's relative accuracy.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sedd.errors import UserError
from sedd.seeds import check_seed

BLOCK = 128  # states in a block of `categorical`, at most: the unit to which heads are padded
_THREEFRY = "threefry2x32"


def root_key(seed: int) -> jax.Array:
    """The key of a seed of 64 bits, whatever generator JAX makes keys of by default. Key[].

    Below 2**32 it is JAX's own `jax.random.key(seed)`, which cuts larger seeds to 32 bits. UserError for other numbers.
    """
    words = divmod(check_seed(seed), 2**32)
    return jax.random.wrap_key_data(jnp.array(words, jnp.uint32), impl=_THREEFRY)


def threefry(keys: jax.Array) -> jax.Array:
    """Keys of any kind as ones of threefry: typed, or the words of untyped ones. Key[...] or UInt32[... W] -> Key[...].

    By their first 64 bits: in those an "rbg" key is the key that JAX's default makes of the same seed. UserError for
    what is no key.
    """
    typed = jax.dtypes.issubdtype(getattr(keys, "dtype", None), jax.dtypes.prng_key)
    if typed and str(jax.random.key_impl(keys)) == _THREEFRY:
        return keys
    words = jax.random.key_data(keys) if typed else keys
    if getattr(words, "dtype", None) != np.uint32 or words.ndim < 1 or words.shape[-1] < 2:
        raise UserError("a key is made by jax.random.key(seed), and has at least 64 bits")
    return jax.random.wrap_key_data(jnp.asarray(words[..., :2]), impl=_THREEFRY)


def _each(draw: Callable, keys: jax.Array, *args: jax.Array):
    """Maps `draw(key, *args)` over every key of an array of keys."""
    keys = threefry(keys)
    for _ in range(keys.ndim):
        draw = jax.vmap(draw)
    return draw(keys, *args)


def row_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
    """The key of each row by its global index. rows: Int[B] -> Key[B]."""
    key = threefry(key)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def fold(keys: jax.Array, number: jax.Array | int) -> jax.Array:
    """The keys of one step or purpose. Key[...] -> Key[...]."""
    return _each(lambda key: jax.random.fold_in(key, number), keys)


def sites(keys: jax.Array, positions: jax.Array) -> jax.Array:
    """The key of each position, by its index in the sequence. Key[B], Int[B P] or Int[P] -> Key[B P]."""
    positions = jnp.broadcast_to(positions, (*keys.shape, positions.shape[-1]))
    return jax.vmap(row_keys)(keys, positions)


def uniform(keys: jax.Array, dtype=jnp.float32) -> jax.Array:
    """U[0, 1), one a key, to its relative accuracy close to 0: in float32 of 64 random bits, where JAX's own has 23."""
    bits = jnp.finfo(dtype).bits
    high, low = _words(keys, f"uint{bits}")
    share = high.astype(dtype) * 2.0**-bits + low.astype(dtype) * 2.0 ** (-2 * bits)
    return jnp.minimum(share, 1 - jnp.finfo(dtype).epsneg)  # the last of them would be rounded to 1


def _words(keys: jax.Array, dtype=jnp.uint32) -> tuple[jax.Array, jax.Array]:
    """Two random words a key. Key[...] -> two UInt[...]."""
    words = _each(lambda key: jax.random.bits(key, (2,), dtype), keys)
    return words[..., 0], words[..., 1]


def integers(keys: jax.Array, high: int) -> jax.Array:
    """Uniform on 0 .. high - 1, one a key, Int32."""
    return _each(lambda key: jax.random.randint(key, (), 0, high, jnp.int32), keys)


def bernoulli(keys: jax.Array, p: jax.Array) -> jax.Array:
    """True with probability p, to p's relative accuracy; p broadcasts to the keys."""
    p = jnp.broadcast_to(p, keys.shape)
    return _each(lambda key, p: jax.random.bernoulli(key, p, mode="high"), keys, p)


def categorical(keys: jax.Array, log_weights: jax.Array) -> jax.Array:
    """One state from unnormalised log weights, to the relative accuracy of each probability; 0 where all are -inf.

    Key[...], Float[... V] -> Int32[...]. Two Gumbel races: a block of states by its mass, then a state within it. In
    blocks of about sqrt(V) states, 128 at most, that needs V/128 + 128 random numbers or fewer instead of V, and no
    cumulative sum, in which rare states would be rounded away (benchmarks/draws.py has what it costs).
    """
    states = log_weights.shape[-1]
    size = min(BLOCK, 2 ** (states.bit_length() // 2))
    top = jnp.max(log_weights, axis=-1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    # Weights are padded, and summed, in one pass over the states; padded log weights would be a copy of them.
    weights = jnp.pad(jnp.exp(log_weights - top), [(0, 0)] * keys.ndim + [(0, -states % size)])
    mass = jnp.sum(weights.reshape(*keys.shape, -1, size), axis=-1)
    first = _race(fold(keys, 0), jnp.log(mass))[..., None] * size
    within = first + jax.lax.broadcasted_iota(jnp.int32, (*keys.shape, size), keys.ndim)
    there = jnp.take_along_axis(log_weights, within, axis=-1, mode="fill", fill_value=-jnp.inf) - top
    return within[..., 0] + _race(fold(keys, 1), there)


def _race(keys: jax.Array, log_weights: jax.Array) -> jax.Array:
    """argmax of log weight plus Gumbel noise. Key[...], Float[... K] -> Int32[...]."""
    shape, dtype = log_weights.shape[-1:], log_weights.dtype
    noise = _each(lambda key: jax.random.gumbel(key, shape, dtype, mode="high"), keys)
    return jnp.argmax(log_weights + noise, axis=-1).astype(jnp.int32)


def ranks(keys: jax.Array, free: jax.Array) -> jax.Array:
    """A uniformly random order of each row's free positions. Key[B], Bool[B L] -> Int32[B L].

    Free positions get 0, 1, 2, ... in that order; the others come after all of them.
    """
    high, low = _words(sites(keys, jnp.arange(free.shape[-1])))
    order = jnp.lexsort((low, high, ~free), axis=-1)  # 23 bits would tie two of 1024 positions in 6 rows of 100
    return jnp.argsort(order, axis=-1).astype(jnp.int32)
