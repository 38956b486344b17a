"""Embeddings of tokens as the clean latents of Gaussian diffusion (Diffusion-LM, arXiv 2205.14217, section 4.1)."""

import dataclasses

import jax
import jax.numpy as jnp

from sedd.diffusion.gaussian.guidance import nearest
from sedd.diffusion.gaussian.process import Gaussian
from sedd.network.adapters import padded

LEARNED, RANDOM = "learned", "random"
EVIDENCE, HEAD = ROUNDINGS = ("evidence", "head")
NORM = 4.0  # of a normalised row: that of 16 coordinates of unit size


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """A table with a row for each token, and the rounding of latents to tokens. Frozen and hashable.

    vocab_size: V; width: D. table: "learned" with the network; or not trained, "random" as initialised, or the path of
    the array it was initialised from. normalised: rows have the norm 4, so that no row can outgrow the noise, and a
    noise level means the same at any width; free rows are held by a loss that rounds. rounding: of a latent to a
    distribution over tokens, by "evidence", the density of the noisy latent around each row, or by a "head" as
    published: the inner products with the rows and a learned bias.
    """

    vocab_size: int
    width: int
    table: str = LEARNED
    normalised: bool = True
    rounding: str = EVIDENCE
    positionwise = True  # a latent depends on its own token only
    num_frozen = 0
    wide_arrays = 0  # the rounding is not trained

    def __post_init__(self):
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"codec.rounding must be one of {', '.join(ROUNDINGS)}, not {self.rounding}")

    @property
    def process(self) -> Gaussian:
        """The process over the latents."""
        return Gaussian(self.width)

    @property
    def num_padding(self) -> int:
        """The number of parameters that pad the vocabulary."""
        return (padded(self.vocab_size) - self.vocab_size) * (self.width + self.has_bias)

    @property
    def num_parameters(self) -> int:
        """The number of parameters, without padding."""
        return self.vocab_size * (self.width + self.has_bias)

    def multiply_adds(self, length: int) -> tuple[int, int]:
        """Multiply-adds at a position of rows of `length` tokens, of networks that are trained or frozen: none."""
        return 0, 0

    @property
    def has_bias(self) -> bool:
        """True if a token has a bias beside its row."""
        return self.rounding == HEAD

    def init(self, key: jax.Array) -> dict:
        """Initial parameters, float32; the rows of the table are padded like those of other embeddings."""
        rows = padded(self.vocab_size)
        params = {"table": jax.random.normal(key, (rows, self.width), jnp.float32)}
        return params | ({"bias": jnp.zeros(rows, jnp.float32)} if self.has_bias else {})

    def rows(self, params: dict) -> jax.Array:
        """The table. Float32[V D]."""
        table = params["table"][: self.vocab_size]
        table = table if self.table == LEARNED else jax.lax.stop_gradient(table)
        return NORM * table * jax.lax.rsqrt(jnp.sum(table**2, axis=-1, keepdims=True)) if self.normalised else table

    def encode(self, params: dict, tokens: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """The clean latents of tokens. Int[B L] -> Float32[B L D]. lengths: of no effect, as each is of one token."""
        return self.rows(params)[tokens]

    def log_tokens(self, params: dict, z: jax.Array, sigma: jax.Array) -> jax.Array:
        """The distribution of the token of each latent by itself, without its context, at noise sigma > 0.

        Float[... D], Float[...] -> Float32[... V], normalised.
        """
        if self.rounding == HEAD:
            return jax.nn.log_softmax(self.products(params, z), axis=-1)
        return jax.nn.log_softmax(self.process.log_evidence(z, self.rows(params), sigma), axis=-1)

    def tokens(self, params: dict, z0: jax.Array) -> jax.Array:
        """The most likely token of each latent without noise. Float[... D] -> Int32[...]."""
        if self.rounding == HEAD:
            return jnp.argmax(self.products(params, z0), axis=-1).astype(jnp.int32)
        return nearest(z0, self.rows(params))

    def products(self, params: dict, z: jax.Array) -> jax.Array:
        """The logits of the published head: inner products with the rows, and the biases. Float[... D] -> Float[... V].

        A loss of them keeps the rows of a learned table apart, which the evidence of little noise does not.
        """
        logits = z @ self.rows(params).T
        if not self.has_bias:
            return logits
        return logits + jnp.reshape(params["bias"][: self.vocab_size], (*[1] * (z.ndim - 1), -1))
