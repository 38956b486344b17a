"""Attention for CPUs, where XLA's gradient of it takes more than half as long again, and stores all of its weights.

Rows are taken a few at a time, so that their weights stay in the cache; the backward pass computes them again from the
logarithm of their sums (as flash attention does; Dao et al., arXiv 2205.14135).
"""

import functools

import jax
import jax.numpy as jnp

from sedd.network.sharding import num_shards

MAX_WEIGHTS = 2**19  # attention weights at a time
MASKED = -1e30  # a logit of weight 0; finite, so that a query without keys has a value


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """softmax(q k / sqrt(K)) v in float32 at least. q, k, v: Float[B L H K]; mask: Bool[B 1 L L] or Bool[1 1 L L]."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    return _attention(*(jnp.swapaxes(x, 1, 2).astype(dtype) for x in (q, k, v)), mask).astype(v.dtype)


@jax.custom_vjp
def _attention(q, k, v, mask):
    """q, k, v: Float[B H L K]. Returns Float[B L H K]."""
    return _forward(q, k, v, mask)[0]


def _forward(q, k, v, mask):
    def row(mask, q, k, v):
        logits = _logits(q, k, mask)
        top = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        return _by_position(_dot(weights, v, 2, 1) / total), top + jnp.log(total)

    out, log_total = _over_rows(row, mask, q, k, v)
    return out, (q, k, v, mask, log_total, out)


def _backward(residuals, gradient):
    q, k, v, mask, log_total, out = residuals

    def row(mask, q, k, v, log_total, out, gradient):
        weights = jnp.exp(_logits(q, k, mask) - log_total)
        gradient = _by_head(gradient)
        mean = jnp.sum(gradient * _by_head(out), axis=-1, keepdims=True)
        of_logits = weights * (_dot(gradient, v, 2, 2) - mean) * q.shape[-1] ** -0.5
        return _dot(of_logits, k, 2, 1), _dot(of_logits, q, 1, 1), _dot(weights, gradient, 1, 1)

    return *_over_rows(row, mask, q, k, v, log_total, out, gradient), None


_attention.defvjp(_forward, _backward)


def _over_rows(function, mask, *rows):
    """Maps function(mask, *row) over rows; on several devices over all at once, since they share them."""
    batch, heads, length = rows[0].shape[:3]
    at_once = batch if num_shards() > 1 else max(1, MAX_WEIGHTS // (heads * length**2))
    if mask is None or len(mask) == 1:
        function, inputs = functools.partial(function, None if mask is None else mask[0]), rows
    else:
        inputs = (mask, *rows)
    if at_once >= batch:
        return jax.vmap(function)(*inputs)
    return jax.lax.map(lambda row: function(*row), inputs, batch_size=at_once if at_once > 1 else None)


def _logits(q, k, mask):
    """q k / sqrt(K) of a row. Float[H L K] each -> Float[H L L]; mask: Bool[1 L L]."""
    logits = _dot(q * q.shape[-1] ** -0.5, k, 2, 2)
    return logits if mask is None else jnp.where(mask, logits, MASKED)


def _by_head(x):
    return jnp.swapaxes(x, 0, 1)


_by_position = _by_head


def _dot(a, b, of_a: int, of_b: int):
    """The product of each head, summed over the axis `of_a` of a and `of_b` of b. Float[H ...]."""
    return jax.lax.dot_general(a, b, (((of_a,), (of_b,)), ((0,), (0,))))
