"""The concrete score network of SEDD as two linen modules: a diffusion transformer trunk, and a head.

Bidirectional attention with rotary positions, conditioned on sigma by adaLN-zero (Peebles and Xie, arXiv 2212.09748);
embedding and head are not tied. Parameters, residual stream, norms and logits are float32; the linear maps and the
attention of the trunk run in `dtype`. Dropout masks are drawn from the key of each example, so that they do not
depend on how a batch is sharded.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sedd.diffusion import keyed_random
from sedd.network.attention import attend
from sedd.network.sharding import BATCH_AXES, MODEL_AXIS, constrain_sharding

MULTIPLE = 128  # embedding rows and head columns are padded to a multiple of this, so that a mesh can shard them
FREQUENCIES = 256  # sine and cosine features of sigma
REMAT = {  # the part of a layer that the backward pass recomputes -> the policy for what is saved
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names("dot"),  # recomputes all but the outputs of the linear maps
}


def padded(states: int) -> int:
    """The number of states, rounded up to the stored size: a multiple of MULTIPLE."""
    return states + -states % MULTIPLE


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
        y = checkpoint_name(_product(flat, kernel, in_axis, out_axes), "dot")
        if self.use_bias:
            y = y + self.param("bias", init, features, jnp.float32)[None].astype(self.dtype)
        return y.reshape(*x.shape[:-1], *features)


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, use_bias=False, name=name)


def _modulate(x, shift, scale):
    return x * (1 + scale) + shift


def _dropout(x, rate: float, keys, number):
    """Dropout with the key of each example, folded with `number`. x: Float[B L D]; keys: Key[B]; None: no dropout."""
    if keys is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keyed_random.fold(keys, number))
    return jnp.where(keep, x / (1 - rate), 0.0)


def _frequencies(count: int):
    """The geometric series 10000^(-i / count), from 1 towards 1 / 10000. Float32[1 count]."""
    return (10000.0 ** (-jnp.arange(count, dtype=jnp.float32) / count))[None]


def _rotary(x):
    """Rotary position embedding, base 10000, halves paired (Su et al., arXiv 2104.09864). x: Float[B L ... K]."""
    length, half = x.shape[1], x.shape[-1] // 2
    position, frequency = jnp.arange(length, dtype=jnp.float32), _frequencies(half)
    angle = (position[:, None] * frequency).reshape(1, length, *[1] * (x.ndim - 3), half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Block(nn.Module):
    """Attention and MLP, each modulated and gated by `condition`. (h, layer) -> (h, None), as `nn.scan` requires."""

    heads: int
    dropout: float
    dtype: str
    attention: str

    @nn.compact
    def __call__(self, h, layer, condition, keys, lengths):
        batch, length, width = h.shape
        modulation = Linear(6 * width, zero=True, name="modulation")(condition)[:, None]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)

        x = _modulate(_norm("norm_attention")(h), shift_a, scale_a)
        x = Linear((3, width), use_bias=False, dtype=self.dtype, split="out", name="qkv")(x)
        q, k, v = jnp.moveaxis(x.reshape(batch, length, 3, self.heads, width // self.heads), 2, 0)
        x = attend(self.attention, _rotary(q), _rotary(k), v, lengths).reshape(batch, length, width)
        x = Linear(width, use_bias=False, dtype=self.dtype, split="in", name="out")(x)
        h = h + gate_a * _dropout(x.astype(jnp.float32), self.dropout, keys, 2 * layer)

        x = _modulate(_norm("norm_mlp")(h), shift_m, scale_m)
        x = Linear(4 * width, dtype=self.dtype, split="out", name="up")(x)
        x = Linear(width, dtype=self.dtype, split="in", name="down")(nn.gelu(x, approximate=True))
        h = h + gate_m * _dropout(x.astype(jnp.float32), self.dropout, keys, 2 * layer + 1)
        return h, None


class Trunk(nn.Module):
    """Maps tokens and noise to hidden states. states: S; scan: the layers are scanned, else unrolled."""

    states: int
    width: int
    layers: int
    heads: int
    cond_dim: int
    embedding_std: float
    dropout: float
    dtype: str
    scan: bool
    remat: str
    attention: str
    given_embedding: bool = False

    @nn.compact
    def __call__(self, tokens, sigma, keys=None, lengths=None, given=None):
        """Returns hidden states, Float32[B L D], and the conditioning vector of sigma, Float32[B C].

        tokens: Int[B L]; sigma: Float[B], total noise; keys: Key[B] for dropout; None: no dropout; lengths: Int[B],
        number of valid tokens of each row; None: L; given: Bool[B L], True at tokens that are clean at any sigma, used
        with `given_embedding` only; None: no token.
        """
        normal, shape = nn.initializers.normal(self.embedding_std), (padded(self.states), self.width)
        table = self.param("embedding", normal, shape, jnp.float32)
        h = constrain_sharding(constrain_sharding(table, MODEL_AXIS)[tokens], BATCH_AXES)
        if self.given_embedding:
            flag = self.param("given", normal, (self.width,), jnp.float32)
            h = h if given is None else jnp.where(given[..., None], h + flag[None, None], h)
        angle = sigma[:, None].astype(jnp.float32) * _frequencies(FREQUENCIES // 2)
        features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        hidden = nn.silu(Linear(self.cond_dim, name="sigma_in")(features))
        condition = nn.silu(Linear(self.cond_dim, name="sigma_out")(hidden))

        block = Block
        if self.remat != "none":
            block = nn.remat(Block, prevent_cse=not self.scan, policy=REMAT[self.remat])
        sizes = dict(heads=self.heads, dropout=self.dropout, dtype=self.dtype, attention=self.attention)
        if self.scan:
            inputs = (0, nn.broadcast, nn.broadcast, nn.broadcast)
            layers = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=inputs, length=self.layers
            )
            h, _ = layers(name="blocks", **sizes)(h, jnp.arange(self.layers), condition, keys, lengths)
        else:
            for layer in range(self.layers):
                h, _ = block(name=f"block_{layer}", **sizes)(h, layer, condition, keys, lengths)
        return h, condition


class Head(nn.Module):
    """Maps hidden states to logits, at any subset of positions. states: S."""

    states: int

    @nn.compact
    def __call__(self, hidden, condition):
        """hidden: Float[... P D]; condition: Float[... P C] or Float[... 1 C]. Returns Float32[... P S]."""
        shift, scale = jnp.split(Linear(2 * hidden.shape[-1], zero=True, name="modulation")(condition), 2, axis=-1)
        x = _modulate(_norm("norm")(hidden), shift, scale)
        return Linear(padded(self.states), zero=True, split="out", name="out")(x)[..., : self.states]
