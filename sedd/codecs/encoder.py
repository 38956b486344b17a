"""The hidden states of a frozen, pretrained encoder as the clean latents of Gaussian diffusion (TEncDM).

    z0 = (h - mean) basis,   h = encoder(tokens),

a coordinate of z0 having unit variance over the ordinary tokens of the training corpus. A decoder, trained on corrupted
latents, turns them into tokens (Shabalin et al., arXiv 2402.19097).
"""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp

from sedd.codecs.decoder import Decoder
from sedd.diffusion import keyed_random
from sedd.diffusion.gaussian.process import Gaussian
from sedd.network.adapters import padded
from sedd.network.bert import Bert
from sedd.network.network import apply
from sedd.network.t5 import T5Encoder


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A frozen encoder and a trained decoder. Frozen and hashable.

    width: D; vocab_size: V, of the corpus. static: the encoder's embeddings of the tokens alone, without context.
    Parameters are {"decoder": ...}, which are trained, and beside them the arrays of `sedd.codecs.frozen`.
    """

    encoder: Bert | T5Encoder
    vocab_size: int
    width: int
    decoder: Decoder
    static: bool = False
    positionwise = False  # a latent depends on all tokens of its row
    wide_arrays = 3  # of the decoder's logits

    @property
    def process(self) -> Gaussian:
        """The process over the latents."""
        return Gaussian(self.width)

    @property
    def num_padding(self) -> int:
        """The number of parameters that pad the vocabulary."""
        return (padded(self.vocab_size) - self.vocab_size) * (self.decoder.width + 1)

    @property
    def num_parameters(self) -> int:
        """The number of trained parameters, without padding."""
        shapes = jax.eval_shape(self.init, keyed_random.root_key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes)) - self.num_padding

    @property
    def num_frozen(self) -> int:
        """The number of parameters of the encoder, and of what normalises its states."""
        tokens, valid = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
        shapes = jax.eval_shape(self.encoder.init, keyed_random.root_key(0), tokens, valid)
        return sum(leaf.size for leaf in jax.tree.leaves(shapes)) + self.encoder.width * (1 + self.width)

    def multiply_adds(self, length: int) -> tuple[int, int]:
        """Multiply-adds at a position of rows of `length` tokens, of the decoder, and of the frozen encoder."""
        decoder, encoder = self.decoder, self.encoder
        layers = decoder.layers * decoder.width * (12 * decoder.width + 2 * length)
        of_decoder = decoder.width * (self.width + padded(self.vocab_size)) + layers
        of_encoder = 0 if self.static else encoder.multiply_adds(length)
        return of_decoder, of_encoder + encoder.width * self.width

    def init(self, key: jax.Array) -> dict:
        """Initial parameters of the decoder, float32."""
        return {"decoder": self.decoder.init(key, jnp.zeros((1, 2, self.width), jnp.float32))["params"]}

    def encode(self, params: dict, tokens: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """The clean latents of tokens. Int[B L] -> Float32[B L D]. lengths: Int[B], number of valid tokens.

        The encoder sees each row as in its pretraining: after its start token, whose state is dropped, and without
        padding: what follows the valid tokens, or the first of the end-of-text ids that end a row. The latents of
        padding are 0; those of other special tokens are their embeddings, of norm sqrt(D) (the TEncDM code).
        """
        states, padding, is_special = self.states(params, tokens, lengths)
        z0 = (states - params["mean"]) @ params["basis"]
        special = is_special.astype(z0.dtype) @ params["special"]
        z0 = jnp.where(jnp.any(is_special, axis=-1, keepdims=True), special, z0)
        return jnp.where(padding[..., None], 0.0, z0)

    def states(
        self, params: dict, tokens: jax.Array, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The states of the encoder before they are normalised, for which `params` need not have what does that.

        Arguments as of `encode`. Returns the states, Float32[B L H]; which tokens are padding, Bool[B L]; and which of
        the special tokens each is, Bool[B L K].
        """
        ending = jnp.flip(jnp.cumprod(jnp.flip(tokens == params["end"], axis=-1), axis=-1), axis=-1) == 1
        padding = ending & jnp.pad(ending, ((0, 0), (1, 0)))[:, :-1]
        if lengths is not None:
            padding = padding | (jnp.arange(tokens.shape[1])[None] >= lengths[:, None])
        is_special = tokens[..., None] == params["special_ids"][None, None]
        return self._last_states(params, params["ids"][tokens], ~padding), padding, is_special

    def _last_states(self, params: dict, ids: jax.Array, valid: jax.Array) -> jax.Array:
        """The last hidden states, or the static embeddings. Int[B L], Bool[B L] -> Float32[B L H]."""
        if self.static:
            return cast(jax.Array, self.encoder.apply({"params": params["encoder"]}, ids, method="static"))
        if "start" not in params:
            return apply(self.encoder, params["encoder"], ids, valid)
        start = jnp.full_like(ids[:, :1], params["start"])
        ids = jnp.concatenate([start, ids], axis=1)
        valid = jnp.concatenate([jnp.ones_like(valid[:, :1]), valid], axis=1)
        return apply(self.encoder, params["encoder"], ids, valid)[:, 1:]

    def log_tokens(self, params: dict, z: jax.Array, sigma: jax.Array) -> jax.Array:
        """The distribution of each token given noisy latents of its row, by the decoder, which infers the noise.

        Float[B L D], Float[...] -> Float32[B L V], normalised.
        """
        return jax.nn.log_softmax(apply(self.decoder, params["decoder"], z), axis=-1)

    def tokens(self, params: dict, z0: jax.Array) -> jax.Array:
        """The most likely token of each latent. Float[B L D] -> Int32[B L]."""
        return jnp.argmax(apply(self.decoder, params["decoder"], z0), axis=-1).astype(jnp.int32)
