"""BERT's encoder, from tokens to hidden states (Devlin et al., arXiv 1810.04805).

With other constants it is RoBERTa's (Liu et al., arXiv 1907.11692) and MiniLM's (Wang et al., arXiv 2002.10957).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sedd.errors import UserError
from sedd.network.attention import attend
from sedd.network.layers import ACTIVATIONS, Linear, dropout, one_line
from sedd.network.sharding import constrain_sharding
from sedd.network.trunk import REMAT
from sedd.runtime.parallel import BATCH_AXES, MODEL_AXIS


class BertBlock(nn.Module):
    """One layer: attention, then MLP; each is added to its input, and the sum is normalised (post-LN)."""

    heads: int
    mlp_width: int
    eps: float
    activation: str
    dropout: float
    dtype: str
    attention: str

    @nn.compact
    def __call__(self, h: jax.Array, mask: jax.Array, keys: jax.Array | None, layer: int) -> jax.Array:
        """h: Float32[B L W]; mask: as of `attend`; keys: Key[B]; layer: its number. Returns Float32[B L W]."""
        batch, length, width = h.shape

        def add(h, x, number):
            return h + dropout(x.astype(jnp.float32), self.dropout, keys, number)

        x = Linear((3, width), dtype=self.dtype, split="out", name="qkv")(h)
        q, k, v = jnp.moveaxis(x.reshape(batch, length, 3, self.heads, width // self.heads), 2, 0)
        x = attend(self.attention, q, k, v, mask=mask).reshape(batch, length, width)
        x = Linear(width, dtype=self.dtype, split="in", name="out")(x)
        h = layer_norm(self.eps, "norm_attention")(add(h, x, 2 * layer))
        x = ACTIVATIONS[self.activation](Linear(self.mlp_width, dtype=self.dtype, split="out", name="up")(h))
        x = Linear(width, dtype=self.dtype, split="in", name="down")(x)
        return layer_norm(self.eps, "norm_mlp")(add(h, x, 2 * layer + 1))


class Bert(nn.Module):
    """Embeddings of tokens, positions and token types, and a stack of layers.

    vocab_size: V; width: W, a multiple of heads; positions: rows of the table of positions, of which the first token of
    a row has row `position_offset`; types: rows of the table of token types, of which each token has the first; eps: of
    all layer norms; activation: a key of ACTIVATIONS; the rest: as of `Trunk`. UserError for an uneven width of heads.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    positions: int = 512
    position_offset: int = 0
    types: int = 2
    eps: float = 1e-12
    activation: str = "gelu"
    dropout: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "xla"

    def __post_init__(self):
        if self.width % self.heads:
            raise UserError(f"the encoder's width ({self.width}) must be a multiple of its heads ({self.heads})")
        super().__post_init__()

    def setup(self):
        def table(name, rows):
            return self.param(name, nn.initializers.normal(0.02), (rows, self.width), jnp.float32)

        self.embedding = table("embedding", self.vocab_size)
        self.position_embedding = table("position_embedding", self.positions)
        self.type_embedding = table("type_embedding", self.types)
        self.norm = layer_norm(self.eps)
        block = BertBlock
        if self.remat != "none":
            block = nn.remat(BertBlock, policy=REMAT[self.remat], static_argnums=4)
        sizes = (self.heads, self.mlp_width, self.eps, self.activation, self.dropout, self.dtype, self.attention)
        self.block = [block(*sizes) for _ in range(self.layers)]

    @property
    def max_length(self) -> int:
        """The largest number of tokens in a row."""
        return self.positions - self.position_offset

    def multiply_adds(self, length: int) -> int:
        """The number of multiply-adds at a position of a row of `length` tokens."""
        return self.layers * self.width * (4 * self.width + 2 * self.mlp_width + 2 * length)

    def __call__(self, tokens: jax.Array, valid: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """The hidden states of the last layer. Int[B L], Bool[B L] -> Float32[B L W].

        valid: True at the tokens that others attend to. Outputs at the other positions are unspecified. keys: Key[B]
        for dropout; None: no dropout. ValueError if a row is longer than `max_length`.
        """
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(f"the encoder takes rows of at most {self.max_length} tokens, not {length}")
        positions = self.position_embedding[self.position_offset :][:length]
        h = self.norm(self.static(tokens) + positions[None] + self.type_embedding[:1][None])
        h = dropout(h, self.dropout, keys, 2 * self.layers)
        for layer, block in enumerate(self.block):
            h = block(h, valid[:, None], keys, layer)
        return h

    def static(self, tokens: jax.Array) -> jax.Array:
        """The embeddings of the tokens alone, without their context. Int[B L] -> Float32[B L W]."""
        return constrain_sharding(constrain_sharding(self.embedding, MODEL_AXIS)[tokens], BATCH_AXES)

    __repr__ = one_line


def layer_norm(eps: float, name: str | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=eps, use_fast_variance=False, name=name)
