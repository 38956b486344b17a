"""T5's encoder, from tokens to hidden states (Raffel et al., arXiv 1910.10683)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sedd.network.layers import ACTIVATIONS, Linear, one_line


class T5Block(nn.Module):
    """One layer: attention, then MLP; each takes its normalised input, and is added to it (pre-LN)."""

    heads: int
    head_width: int
    mlp_width: int
    eps: float
    activation: str
    gated: bool

    @nn.compact
    def __call__(self, h: jax.Array, mask: jax.Array, bias: jax.Array) -> jax.Array:
        """h: Float32[B L W]; mask: Bool[B 1 1 L]; bias: Float32[1 H L L], of the logits. Returns Float32[B L W]."""
        batch, length, width = h.shape

        def linear(name, features, split="out"):
            return Linear(features, use_bias=False, split=split, name=name)

        x = nn.RMSNorm(epsilon=self.eps, name="norm_attention")(h)
        x = linear("qkv", (3, self.heads * self.head_width))(x)
        q, k, v = jnp.moveaxis(x.reshape(batch, length, 3, self.heads, self.head_width), 2, 0)
        x = jax.nn.dot_product_attention(q, k, v, bias, mask, scale=1.0).reshape(batch, length, -1)
        h = h + linear("out", width, "in")(x)

        x = nn.RMSNorm(epsilon=self.eps, name="norm_mlp")(h)
        up = linear("up", self.mlp_width)(x)
        gate = linear("gate", self.mlp_width)(x) if self.gated else up
        x = ACTIVATIONS[self.activation](gate)
        return h + linear("down", width, "in")(x * up if self.gated else x)


class T5Encoder(nn.Module):
    """Embeddings of tokens, a stack of layers that share a bias by relative position, and a last norm; float32.

    vocab_size: V; width: W; head_width: of each head, whose product with heads need not be W. buckets: of distances, of
    which those from max_distance share the last; eps: of all norms, which subtract no mean; activation: a key of
    ACTIVATIONS; gated: the activation of a second linear map multiplies the hidden units of the MLP.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    head_width: int
    mlp_width: int
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    activation: str = "relu"
    gated: bool = False

    max_length = None  # positions are relative

    def setup(self):
        normal = nn.initializers.normal
        self.embedding = self.param("embedding", normal(1.0), (self.vocab_size, self.width), jnp.float32)
        self.bias = self.param("bias", normal(0.1), (self.buckets, self.heads), jnp.float32)
        of_block = (self.heads, self.head_width, self.mlp_width, self.eps, self.activation, self.gated)
        self.block = [T5Block(*of_block) for _ in range(self.layers)]
        self.norm = nn.RMSNorm(epsilon=self.eps)

    def multiply_adds(self, length: int) -> int:
        """The number of multiply-adds at a position of a row of `length` tokens."""
        of_attention = self.heads * self.head_width * (4 * self.width + 2 * length)
        return self.layers * (of_attention + (2 + self.gated) * self.width * self.mlp_width)

    def __call__(self, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        """The hidden states after the last norm. Int[B L], Bool[B L] -> Float32[B L W].

        valid: True at the tokens that others attend to. Outputs at the other positions are unspecified.
        """
        h = self.embedding[tokens]
        bias = jnp.moveaxis(self.bias[buckets(tokens.shape[1], self.buckets, self.max_distance)], -1, 0)[None]
        for block in self.block:
            h = block(h, valid[:, None, None], bias)
        return self.norm(h)

    def static(self, tokens: jax.Array) -> jax.Array:
        """The embeddings of the tokens alone, without their context. Int[B L] -> Float32[B L W]."""
        return self.embedding[tokens]

    __repr__ = one_line


def buckets(length: int, count: int, max_distance: int) -> np.ndarray:
    """The bucket of each query (first axis) and key (last axis), by their distance. Int[L L] in [0, count).

    The second half of the buckets is for keys after the query. Of each half, half are for one distance each, from 0,
    and the others for ranges whose bounds grow geometrically up to max_distance.
    """
    half, exact = count // 2, count // 4
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    far = np.maximum(np.abs(distance), exact).astype(np.float32)  # float32 decides the bounds, as in the published code
    share = np.log(far / np.float32(exact)) / np.float32(np.log(max_distance / exact))
    growing = np.minimum(exact + (share * np.float32(half - exact)).astype(np.int32), half - 1)
    return half * (distance > 0) + np.where(np.abs(distance) < exact, np.abs(distance), growing)
