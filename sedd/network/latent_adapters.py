"""What connects a trunk to noisy latents: the embedding in front of it, and a head behind it that predicts latents."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sedd.network.adapters import padded
from sedd.network.layers import Linear, Norm, modulation
from sedd.network.sharding import constrain_sharding
from sedd.runtime.parallel import BATCH_AXES, MODEL_AXIS


class LatentEmbedding(nn.Module):
    """Maps noisy latents to hidden states.

    width: W; vocab_size: V, of the soft tokens, 0 without; std: of their initial embeddings; self_conditioning: takes
    the last estimate too; given_embedding: marks given positions.
    """

    width: int
    vocab_size: int
    std: float
    self_conditioning: bool = False
    given_embedding: bool = False

    @nn.compact
    def __call__(self, z, soft=None, estimate=None, given=None):
        """z, estimate: Float[B L D]; soft: Float[B L V], a distribution over tokens; given: Bool[B L].

        Returns Float32[B L W].
        """
        h = Linear(self.width, name="latent")(z)
        if self.vocab_size:
            shape = (padded(self.vocab_size), self.width)
            table = self.param("embedding", nn.initializers.normal(self.std), shape, jnp.float32)
            h = h + soft @ constrain_sharding(table, MODEL_AXIS)[: self.vocab_size]
        if self.self_conditioning:
            h = h + Linear(self.width, use_bias=False, name="estimate")(estimate)
        if self.given_embedding:
            flag = self.param("given", nn.initializers.normal(self.std), (self.width,), jnp.float32)
            h = h if given is None else jnp.where(given[..., None], h + flag[None, None], h)
        return constrain_sharding(h, BATCH_AXES)


class LayerEstimates(nn.Module):
    """Maps the last estimate to what is added to the hidden states before each layer, by a linear map for each."""

    layers: int
    width: int

    @nn.compact
    def __call__(self, estimate: jax.Array) -> jax.Array:
        """estimate: Float[B L D]. Returns Float32[layers B L W]."""
        of_layers = Linear((self.layers, self.width), use_bias=False, name="estimates")(estimate)
        return constrain_sharding(jnp.moveaxis(of_layers, -2, 0), None, BATCH_AXES)


class LatentHead(nn.Module):
    """Maps hidden states to latents. width: D."""

    width: int

    @nn.compact
    def __call__(self, hidden: jax.Array, condition: jax.Array) -> jax.Array:
        """hidden: Float[... P W]; condition: Float[... 1 C]. Returns Float32[... P D]."""
        shift, scale = modulation(condition, hidden.shape[-1], 2)
        return Linear(self.width, zero=True, name="out")(Norm(name="norm")(hidden, shift, scale))
