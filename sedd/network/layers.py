"""The layers that the trunk and its adapters are made of.

Parameters, residual stream, norms and logits are float32; the linear maps and the attention of the trunk run in its
`dtype`. Dropout masks are drawn from the key of each example, so that they do not depend on how a batch is sharded.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from sedd.diffusion import keyed_random
from sedd.network.sharding import constrain_sharding, num_shards
from sedd.runtime.parallel import BATCH_AXES, MODEL_AXIS

NORM_EPS = 1e-5

# Of pretrained encoders, by the names of their config.json.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
}


def _torch_uniform(fan_in: int):
    """Initialiser U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default, used for the published models."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x, kernel, in_axis, out_axes):
    """x W, in the dtype of x. x: Float[N D]; kernel: Float32[D ...].

    in_axis: the mesh axis that shards D; out_axes: those of the kernel's other axes.
    The gradient equals JAX's. The backward pass gathers and casts the kernel again, where JAX would save the gathered
    copy; and the gradient of the kernel, summed over devices, has the kernel's dtype, where JAX would round each
    device's part to that of x.
    """
    x = constrain_sharding(x, BATCH_AXES, in_axis)
    kernel = constrain_sharding(kernel.astype(x.dtype), in_axis, *out_axes)
    return constrain_sharding(jnp.tensordot(x, kernel, 1), BATCH_AXES, *out_axes)


def _product_forward(x, kernel, in_axis, out_axes):
    return _product(x, kernel, in_axis, out_axes), (x, kernel)


def _product_backward(in_axis, out_axes, residuals, gradient):
    x, kernel = residuals
    gradient = constrain_sharding(gradient, BATCH_AXES, *out_axes)
    # Without the barrier XLA would keep the copy that the forward pass gathered.
    gathered = constrain_sharding(jax.lax.optimization_barrier(kernel).astype(x.dtype), in_axis, *out_axes)
    columns = tuple(range(1, kernel.ndim))
    grad_x = constrain_sharding(jnp.tensordot(gradient, gathered, (columns, columns)), BATCH_AXES, in_axis)
    if jax.default_backend() == "cpu":  # XLA for CPUs lacks some products of bfloat16 with float32 sums
        x, gradient = x.astype(kernel.dtype), gradient.astype(kernel.dtype)
    return grad_x, jnp.tensordot(x, gradient, (0, 0), preferred_element_type=kernel.dtype)


_product.defvjp(_product_forward, _product_backward)


class Linear(nn.Module):
    """x W + b over the last axis; with `zero` initialised to zero.

    features: size of the output's last axis, or of its last axes. split: the features that are sharded over MODEL_AXIS,
    those of the output ("out", the last axis), those of x ("in") or neither (None).
    """

    features: int | tuple[int, ...]
    use_bias: bool = True
    zero: bool = False
    dtype: str = "float32"
    split: str | None = None

    @nn.compact
    def __call__(self, x):
        features = self.features if isinstance(self.features, tuple) else (self.features,)
        init = nn.initializers.zeros if self.zero else _torch_uniform(x.shape[-1])
        kernel = self.param("kernel", init, (x.shape[-1], *features), jnp.float32)
        in_axis, out_axis = MODEL_AXIS if self.split == "in" else None, MODEL_AXIS if self.split == "out" else None
        flat = x.reshape(-1, x.shape[-1]).astype(self.dtype)  # the gradient of 3-D products takes twice as long on CPUs
        out_axes = (*(None,) * (len(features) - 1), out_axis)
        if num_shards() == 1:  # a sum over one axis needs no copy of the kernel
            kernel, out_axes = kernel.reshape(len(kernel), -1), (None,)
        y = checkpoint_name(_product(flat, kernel, in_axis, out_axes), "dot").reshape(-1, *features)
        if self.use_bias:
            y = y + self.param("bias", init, features, jnp.float32)[None].astype(self.dtype)
        return y.reshape(*x.shape[:-1], *features)


class Norm(nn.Module):
    """Layer normalisation, modulated: with u the normalised x, (u w + b) (1 + scale) + shift.

    The weight w and, with `bias`, b are parameters. shift, scale: Float32[... W] that broadcast to x, or numbers.
    """

    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, shift: jax.Array | float = 0.0, scale: jax.Array | float = 0.0) -> jax.Array:
        """Float[... W] -> Float[... W], float32 at least."""
        shape = (*(1,) * (x.ndim - 1), x.shape[-1])
        gain = self.param("scale", nn.initializers.ones, shape[-1:], jnp.float32).reshape(shape) * (1 + scale)
        offset = jnp.zeros(shape, jnp.float32) + shift
        if self.bias:
            offset += self.param("bias", nn.initializers.zeros, shape[-1:], jnp.float32).reshape(shape) * (1 + scale)
        return _normalised(x.astype(jnp.promote_types(x.dtype, jnp.float32)), gain, offset)


@jax.custom_vjp
def _normalised(x, gain, offset):
    """u gain + offset, with u the normalised x, whose rank they have. The gradient saves no array but these."""
    return _normalised_forward(x, gain, offset)[0]


def _normalised_forward(x, gain, offset):
    mean = jnp.mean(x, axis=-1, keepdims=True)
    rate = jax.lax.rsqrt(jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True) + NORM_EPS)
    return (x - mean) * rate * gain + offset, (x, mean, rate, gain, offset)


def _normalised_backward(residuals, gradient):
    x, mean, rate, gain, offset = residuals
    # Without the barrier XLA would keep the normalised x of the forward pass.
    unit, of_unit = (jax.lax.optimization_barrier(x) - mean) * rate, gradient * gain
    along = jnp.mean(of_unit * unit, axis=-1, keepdims=True)
    of_x = rate * (of_unit - jnp.mean(of_unit, axis=-1, keepdims=True) - unit * along)
    return of_x, _summed(gradient * unit, gain), _summed(gradient, offset)


_normalised.defvjp(_normalised_forward, _normalised_backward)


def _summed(values: jax.Array, like: jax.Array) -> jax.Array:
    """Sums `values` over the axes along which `like`, of the same rank, was broadcast."""
    axes = tuple(axis for axis, size in enumerate(like.shape) if size < values.shape[axis])
    return jnp.sum(values, axis=axes, keepdims=True).astype(like.dtype)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """nn.gelu(approximate=True). The gradient saves x alone, and computes the rest again."""
    return nn.gelu(x, approximate=True)


def _gelu_backward(x, gradient):
    # Without the barrier XLA would keep what the forward pass computed.
    return jax.vjp(nn.gelu, jax.lax.optimization_barrier(x))[1](gradient)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def modulation(condition: jax.Array, width: int, count: int) -> list:
    """The first `count` of a shift, a scale, a gate and so on, from the condition. Float[... C] -> Float32[... W] each.

    With a condition of size 0 they are the numbers that change nothing.
    """
    if not condition.shape[-1]:
        return [0.0, 0.0, 1.0, 0.0, 0.0, 1.0][:count]
    return jnp.split(Linear(count * width, zero=True, name="modulation")(condition), count, axis=-1)


@jax.named_scope("dropout")
def dropout(x: jax.Array, rate: float, keys: jax.Array | None, number: int | jax.Array) -> jax.Array:
    """Dropout with the key of each example, folded with `number`. x: Float[B L W]; keys: Key[B]; None: no dropout."""
    if keys is None or rate == 0:
        return x
    keep, share = keyed_random.kept(keyed_random.fold(keys, number), rate, x.shape[1:])
    return jnp.where(keep, x / share, 0.0)


def one_line(module: nn.Module) -> str:
    """A module as text, as results record it; that of linen has a line for each attribute."""
    names = [field.name for field in dataclasses.fields(module) if field.name not in ("parent", "name")]
    return f"{type(module).__name__}({', '.join(f'{name}={getattr(module, name)!r}' for name in names)})"


def frequencies(count: int) -> jax.Array:
    """The geometric series 10000^(-i / count), from 1 towards 1 / 10000. Float32[1 count]."""
    return (10000.0 ** (-jnp.arange(count, dtype=jnp.float32) / count))[None]


def rotary(x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
    """Rotary position embedding, base 10000, halves paired (Su et al., arXiv 2104.09864). x: Float[B L H K].

    positions: Int[B L] or Int[1 L]; None: 0 .. L - 1.
    """
    cos, sin = _rotations(x.shape[1], x.shape[-1] // 2)
    if positions is not None:
        angle = positions.astype(jnp.float32)[..., None] * frequencies(x.shape[-1] // 2)[None]
        cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@functools.cache
def _rotations(length: int, count: int) -> tuple[Any, Any]:
    """Cosines and sines at 0 .. length - 1, constants of the compiled program. Float32[1 length 1 count] each."""
    angle = np.arange(length)[:, None] * (10000.0 ** (-np.arange(count) / count))[None]
    return np.cos(angle).astype(np.float32)[None, :, None], np.sin(angle).astype(np.float32)[None, :, None]
