"""The objectives of Gaussian diffusion over embeddings: the bound, the cross-entropy, and Diffusion-LM's regression."""

import dataclasses

import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random
from sedd.diffusion.denoiser import Latent
from sedd.diffusion.gaussian.loss import LatentStatsFn, cross_entropy_loss, denoising_loss, regression
from sedd.network.latent_network import LatentNetwork, with_memory
from sedd.training.token_objective import TokenObjective

_MEMORY = 2**31  # folded into the key of a step
_LOW = 1  # folded into the keys of the rows, for the noise of the reconstruction
REGRESSION_STEPS = 2000  # of Diffusion-LM: the first of them has the clean target


@dataclasses.dataclass(frozen=True)
class LatentObjective(TokenObjective):
    """A loss of each token, from its noisy latent.

    With `network.self_conditioning` the network gets its own answer, without gradient, in half of the steps: one coin
    for the whole batch, so that the other half needs one call only.
    """

    network: LatentNetwork

    def with_memory(self, params: dict, x: Latent, sigma: jax.Array, inputs: dict, key: jax.Array) -> Latent:
        """The state that the network is trained on. inputs: as of `losses`; key: of the step."""
        if not self.network.self_conditioning:
            return x
        mean = self.network.mean_denoiser(jax.lax.stop_gradient(params), **inputs)
        remembers = keyed_random.bernoulli(keyed_random.fold(keyed_random.threefry(key), _MEMORY), jnp.float32(0.5))
        return jax.lax.cond(
            remembers, lambda: with_memory(x, jax.lax.stop_gradient(mean(x, sigma)), inputs["given"]), lambda: x
        )

    def stats(self, params: dict, tokens: jax.Array, inputs: dict, key: jax.Array) -> LatentStatsFn:
        """The LatentStatsFn to train, with memory. Arguments as of `losses`."""
        stats = self.network.stats(params, tokens, **inputs)
        return lambda x, sigma, z0: stats(self.with_memory(params, x, sigma, inputs, key), sigma, z0)


@dataclasses.dataclass(frozen=True)
class LatentBoundLoss(LatentObjective):
    """The bound at stratified times, from sigma(0) on: the weighted squared error, and -log p(tokens) at sigma(0).

    An unbiased estimate of the bound but for the prior, which rows of fixed size leave constant. Its variance is least
    on the schedule `log_snr`. Plaid trains on such a bound (Gulrajani and Hashimoto, arXiv 2305.18619).
    """

    def losses(self, params, tokens, levels, keys, free, inputs, key):
        process, z0 = self.network.process, self.network.clean(params, tokens)
        stats = self.stats(params, tokens, inputs, key)
        diffusion = denoising_loss(process, self.schedule, stats, keys, z0, levels, free)
        low = jnp.broadcast_to(self.schedule.sigma(jnp.zeros_like(levels)), levels.shape)
        reconstruction = cross_entropy_loss(process, stats, keyed_random.fold(keys, _LOW), z0, low, free)
        return {"diffusion": diffusion, "reconstruction": reconstruction}, self.schedule.sigma(levels)


@dataclasses.dataclass(frozen=True)
class LatentCrossEntropy(LatentObjective):
    """-log p(x0_i | z) at stratified times: no bound, with the same minimiser at each noise level."""

    def losses(self, params, tokens, levels, keys, free, inputs, key):
        sigma, z0 = self.schedule.sigma(levels), self.network.clean(params, tokens)
        stats = self.stats(params, tokens, inputs, key)
        return {"loss": cross_entropy_loss(self.network.process, stats, keys, z0, sigma, free)}, sigma


@dataclasses.dataclass(frozen=True)
class Regression(LatentObjective):
    """Diffusion-LM's objective, as its code has it (Li et al., arXiv 2205.14217): means over the D coordinates.

    The squared error of the predicted latent; the NLL of the tokens by the published head, from the latent of the
    lowest noise, which keeps the rows of the table apart; and the size of the latent that is left at t = 1, which keeps
    the table small.
    """

    def losses(self, params, tokens, levels, keys, free, inputs, key):
        network, z0 = self.network, self.network.clean(params, tokens)
        drawn = regression(network.process, self.schedule, keys, z0, levels, REGRESSION_STEPS, free)
        sigma = self.schedule.sigma(levels)
        x = self.with_memory(params, drawn.x, sigma, inputs, key)
        squares = jnp.mean((drawn.target - network.mean_denoiser(params, **inputs)(x, sigma)) ** 2, axis=-1)
        log_tokens = jax.nn.log_softmax(network.codec.products(params["codec"], drawn.start), axis=-1)
        rounding = -jnp.take_along_axis(log_tokens, tokens[..., None], axis=-1)[..., 0]
        prior = self.schedule.alpha(jnp.ones_like(levels))[:, None] * jnp.mean(drawn.start**2, axis=-1)
        terms = {"squares": squares, "rounding": rounding, "prior": prior}
        if free is not None:
            terms = {name: jnp.where(free, term, 0.0) for name, term in terms.items()}
        return terms, sigma
