"""Random numbers by explicit keys: every random draw of the diffusion, and how its key is made.

Noise is keyed by (seed, global row, purpose or step, position), never by the shape of a batch: neither the grouping of
rows into batches nor the choice of positions at which the network is evaluated changes a sample. That requires a
generator whose numbers are the same alone and in a batch, as threefry's are; those of JAX's hardware generators ("rbg")
are not. So `root_key` makes threefry keys explicitly, and `threefry` converts keys from elsewhere.

JAX's default Gumbel noise is truncated in float32: it never draws an event rarer than about 1e-7, nor ever an outcome
of probability 1e-3 that is spread over 50 000 states (Zheng et al., arXiv 2409.02908). So all draws here are two-stage
(whether a token moves; then where to), in `mode="high"`, accurate to float32's relative precision.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sedd.errors import UserError
from sedd.seeds import check_seed

BLOCK = 128  # largest number of states in a block of `categorical`; the unit to which heads are padded
_THREEFRY = "threefry2x32"


def root_key(seed: int) -> jax.Array:
    """The threefry key of a 64-bit seed, whichever generator is JAX's default. Key[].

    Below 2**32 it equals `jax.random.key(seed)`, which truncates larger seeds to 32 bits. UserError if the seed is not
    a 64-bit number.
    """
    words = divmod(check_seed(seed), 2**32)
    return jax.random.wrap_key_data(jnp.array(words, jnp.uint32), impl=_THREEFRY)


def threefry(keys: jax.Array) -> jax.Array:
    """Converts typed or raw keys of any generator to threefry. Key[...] or UInt32[... W] -> Key[...].

    Only the first 64 bits are used; those of an "rbg" key are the threefry key of the same seed. UserError if the
    argument is not a key.
    """
    typed = jax.dtypes.issubdtype(getattr(keys, "dtype", None), jax.dtypes.prng_key)
    if typed and str(jax.random.key_impl(keys)) == _THREEFRY:
        return keys
    words = jax.random.key_data(keys) if typed else keys
    if getattr(words, "dtype", None) != np.uint32 or words.ndim < 1 or words.shape[-1] < 2:
        raise UserError("a key is made by jax.random.key(seed), and has at least 64 bits")
    return jax.random.wrap_key_data(jnp.asarray(words[..., :2]), impl=_THREEFRY)


def _vmap_over_keys(draw: Callable, keys: jax.Array, *args: jax.Array):
    """Maps `draw(key, *args)` over all keys of an array of any rank."""
    keys = threefry(keys)
    for _ in range(keys.ndim):
        draw = jax.vmap(draw)
    return draw(keys, *args)


def row_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
    """The key of each row, from its global index. rows: Int[B] -> Key[B]."""
    key = threefry(key)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def fold(keys: jax.Array, number: jax.Array | int) -> jax.Array:
    """`jax.random.fold_in` of every key: the keys of one step or purpose. Key[...] -> Key[...]."""
    return _vmap_over_keys(lambda key: jax.random.fold_in(key, number), keys)


def position_keys(keys: jax.Array, positions: jax.Array) -> jax.Array:
    """The key of each position, from its index in the sequence. Key[B], Int[B P] or Int[P] -> Key[B P]."""
    positions = jnp.broadcast_to(positions, (*keys.shape, positions.shape[-1]))
    return jax.vmap(row_keys)(keys, positions)


def uniform(keys: jax.Array, dtype=jnp.float32) -> jax.Array:
    """U[0, 1), one number a key, to full relative precision near 0: float32 from 64 random bits; JAX's own uses 23."""
    bits = jnp.finfo(dtype).bits
    high, low = _random_words(keys, f"uint{bits}")
    u = high.astype(dtype) * 2.0**-bits + low.astype(dtype) * 2.0 ** (-2 * bits)
    return jnp.minimum(u, 1 - jnp.finfo(dtype).epsneg)  # the largest values would be rounded to 1


def _random_words(keys: jax.Array, dtype=jnp.uint32) -> tuple[jax.Array, jax.Array]:
    """Two random words a key. Key[...] -> two UInt[...]."""
    words = _vmap_over_keys(lambda key: jax.random.bits(key, (2,), dtype), keys)
    return words[..., 0], words[..., 1]


def integers(keys: jax.Array, high: int) -> jax.Array:
    """Uniform on 0 .. high - 1, one number a key. Key[...] -> Int32[...]."""
    return _vmap_over_keys(lambda key: jax.random.randint(key, (), 0, high, jnp.int32), keys)


def bernoulli(keys: jax.Array, p: jax.Array) -> jax.Array:
    """True with probability p, to full relative precision; p broadcasts to the keys. Key[...] -> Bool[...]."""
    p = jnp.broadcast_to(p, keys.shape)
    return _vmap_over_keys(lambda key, p: jax.random.bernoulli(key, p, mode="high"), keys, p)


def kept(keys: jax.Array, rate: float, shape: tuple[int, ...]) -> tuple[jax.Array, float]:
    """A mask that drops entries at a rate, and the share that it keeps; the rate is rounded to a multiple of 2^-16.

    Key[B] -> Bool[B *shape], True where an entry is kept. Two random words for each index of all axes but the last are
    hashed with the index along the last axis: one pass without an array of random words, so that dropout, whose
    numbers need not be those of a cipher, costs little. The multipliers are those of lowbias32 (C. Wellons, 2018).
    """
    threshold = round(rate * 2**16)
    words = _vmap_over_keys(lambda key: jax.random.bits(key, (2, *shape[:-1], 1), jnp.uint32), keys)
    first, second = jnp.moveaxis(words, 1, 0)
    index = jax.lax.broadcasted_iota(jnp.uint32, (len(keys), *shape), len(shape))
    bits = first + index * jnp.uint32(0x9E3779B9)
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D) + second
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits >> 16 >= threshold, 1 - threshold / 2**16


def normal(keys: jax.Array, width: int, dtype=jnp.float32) -> jax.Array:
    """Standard normal, `width` numbers a key. Key[...] -> Float[... width]."""
    return _vmap_over_keys(lambda key: jax.random.normal(key, (width,), dtype), keys)


def categorical(keys: jax.Array, log_weights: jax.Array) -> jax.Array:
    """Draws a state from unnormalised log weights, to full relative precision; 0 where all are -inf.

    Key[...], Float[... V] -> Int32[...]. Two Gumbel-max draws: a block of states by its mass, then a state within it.
    With blocks of about sqrt(V) states, 128 at most, that takes at most V/128 + 128 random numbers instead of V, and no
    cumulative sum, which would round rare states away. Its cost is measured in benchmarks/categorical.py.
    """
    states = log_weights.shape[-1]
    size = min(BLOCK, 2 ** (states.bit_length() // 2))
    top = jnp.max(log_weights, axis=-1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    # Padding and summing the weights is one fused pass over the states; padding the log weights would copy them.
    weights = jnp.pad(jnp.exp(log_weights - top), [(0, 0)] * keys.ndim + [(0, -states % size)])
    mass = jnp.sum(weights.reshape(*keys.shape, -1, size), axis=-1)
    first = _gumbel_max(fold(keys, 0), jnp.log(mass))[..., None] * size
    within = first + jax.lax.broadcasted_iota(jnp.int32, (*keys.shape, size), keys.ndim)
    log_weights = jnp.take_along_axis(log_weights, within, axis=-1, mode="fill", fill_value=-jnp.inf) - top
    return within[..., 0] + _gumbel_max(fold(keys, 1), log_weights)


def _gumbel_max(keys: jax.Array, log_weights: jax.Array) -> jax.Array:
    """argmax of log weight plus Gumbel noise. Key[...], Float[... K] -> Int32[...]."""
    shape, dtype = log_weights.shape[-1:], log_weights.dtype
    noise = _vmap_over_keys(lambda key: jax.random.gumbel(key, shape, dtype, mode="high"), keys)
    return jnp.argmax(log_weights + noise, axis=-1).astype(jnp.int32)


def ranks(keys: jax.Array, free: jax.Array) -> jax.Array:
    """Ranks of each row's free positions in a uniformly random order. Key[B], Bool[B L] -> Int32[B L].

    Free positions have ranks 0, 1, 2, ...; the others have larger ranks.
    """
    high, low = _random_words(position_keys(keys, jnp.arange(free.shape[-1])))
    order = jnp.lexsort((low, high, ~free), axis=-1)  # 23 bits would tie two of 1024 positions in 6 % of rows
    return jnp.argsort(order, axis=-1).astype(jnp.int32)
