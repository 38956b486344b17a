"""What connects a trunk to tokens and noise: the embeddings in front of it and the head behind it.

Embedding and head are not tied.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sedd.diffusion.schedule import log_snr
from sedd.network.layers import Linear, Norm, frequencies, modulation
from sedd.network.sharding import constrain_sharding
from sedd.runtime.parallel import BATCH_AXES, MODEL_AXIS

MULTIPLE = 128  # embedding rows and head columns are padded to a multiple of this, so that a mesh can shard them
FREQUENCIES = 256  # sine and cosine features of sigma
CONSTANT = "constant"
CONDITIONING = {  # what is embedded of the noise level, Float[B] -> Float[B]
    "sigma": lambda sigma: sigma,  # as in the published models; levels below .1 are nearly the same
    "log_snr": lambda sigma: log_snr(jnp.clip(sigma, 1e-9, 20.0)),  # finite at 0 and infinity
    CONSTANT: jnp.zeros_like,  # nothing: the same at any noise
}


def padded(states: int) -> int:
    """The number of states, rounded up to the stored size: a multiple of MULTIPLE."""
    return states + -states % MULTIPLE


class TokenEmbedding(nn.Module):
    """Maps tokens to hidden states. states: S; std: of the initial embeddings; given_embedding: marks given tokens."""

    states: int
    width: int
    std: float
    given_embedding: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array, given: jax.Array | None = None) -> jax.Array:
        """tokens: Int[B L]. Returns Float32[B L W].

        given: Bool[B L], True at tokens that are clean at any sigma, used with `given_embedding` only; None: no token.
        """
        normal, shape = nn.initializers.normal(self.std), (padded(self.states), self.width)
        table = self.param("embedding", normal, shape, jnp.float32)
        h = constrain_sharding(constrain_sharding(table, MODEL_AXIS)[tokens], BATCH_AXES)
        if self.given_embedding:
            flag = self.param("given", normal, (self.width,), jnp.float32)
            h = h if given is None else jnp.where(given[..., None], h + flag[None, None], h)
        return h


class NoiseEmbedding(nn.Module):
    """Maps the noise level to the vector that the trunk and the head are conditioned on.

    cond_dim: C, its size, 0 for networks that are not conditioned on the noise; conditioning: a key of CONDITIONING.
    """

    cond_dim: int
    conditioning: str = "sigma"

    @nn.compact
    def __call__(self, sigma: jax.Array) -> jax.Array:
        """sigma: Float[B], total noise. Returns Float32[B C]."""
        if not self.cond_dim:
            return jnp.zeros((*sigma.shape, 0), jnp.float32)
        level = CONDITIONING[self.conditioning](sigma.astype(jnp.float32))
        angle = level[:, None] * frequencies(FREQUENCIES // 2)
        features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        hidden = nn.silu(Linear(self.cond_dim, name="sigma_in")(features))
        return nn.silu(Linear(self.cond_dim, name="sigma_out")(hidden))


class TokenHead(nn.Module):
    """Maps hidden states to logits, at any subset of positions. states: S."""

    states: int

    @nn.compact
    def __call__(self, hidden: jax.Array, condition: jax.Array, features: bool = False) -> jax.Array:
        """hidden: Float[... P W]; condition: Float[... P C] or Float[... 1 C]. Returns Float32[... P S].

        features: returns the inputs of the last linear map in place of its outputs. Float32[... P W].
        """
        shift, scale = modulation(condition, hidden.shape[-1], 2)
        x = Norm(not condition.shape[-1], name="norm")(hidden, shift, scale)
        if features:
            return x
        return Linear(padded(self.states), zero=True, split="out", name="out")(x)[..., : self.states]
