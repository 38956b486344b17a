"""TEncDM's objectives: the regression of encodings, and the decoder's cross-entropy from corrupted encodings.

The two have no parameter in common. They are trained in one run, each with clipping of its own (`sedd.training.
optimizer`), or one after the other. Shabalin et al., arXiv 2402.19097, sections 4.2 and 4.4.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sedd.codecs.decoder import CORRUPTIONS, corruption_times
from sedd.diffusion import keyed_random
from sedd.diffusion.gaussian.loss import noised
from sedd.training.latents import LatentObjective

_DIFFUSION, _DECODER, _TIME = range(3)  # folded into the keys of the rows


@dataclasses.dataclass(frozen=True)
class Encodings(LatentObjective):
    """The mean squared error of the D coordinates at stratified times, and the cross-entropy of the decoder.

    corruption: a key of CORRUPTIONS, of what the decoder sees; corruption_start, corruption_end: limits of its times.
    Each row's noise is drawn once for the network and once for the decoder.
    """

    corruption: str = "noise"
    corruption_start: float = 1e-3
    corruption_end: float = 0.15

    def losses(self, params, tokens, levels, keys, free, inputs, key):
        z0 = self.network.clean(params, tokens, inputs["lengths"])
        sigma = self.schedule.sigma(levels)
        terms = self.terms(params, tokens, z0, sigma, keys, inputs, key)
        if free is not None:
            terms = {name: jnp.where(free, term, 0.0) for name, term in terms.items()}
        return terms, sigma

    def terms(self, params, tokens, z0, sigma, keys, inputs, key) -> dict[str, jax.Array]:
        """The terms of the loss of each token, Float[B L].

        z0: Float[B L D], of the tokens; sigma: Float[B]; the rest as of `losses`.
        """
        return {
            "squares": self.squares(params, z0, sigma, keys, inputs, key),
            "decoder": self.decoder_loss(params, tokens, z0, keys),
        }

    def squares(self, params, z0, sigma, keys, inputs, key) -> jax.Array:
        """The mean squared error of the network. Arguments and result as of `terms`."""
        x = noised(self.network.process, keyed_random.fold(keys, _DIFFUSION), z0, sigma)
        x = self.with_memory(params, x, sigma, inputs, key)
        return jnp.mean((z0 - self.network.mean_denoiser(params, **inputs)(x, sigma)) ** 2, axis=-1)

    def decoder_loss(self, params, tokens, z0, keys) -> jax.Array:
        """The cross-entropy of the decoder. Arguments and result as of `terms`."""
        t = corruption_times(keyed_random.fold(keys, _TIME), self.corruption_start, self.corruption_end)
        z = CORRUPTIONS[self.corruption](self.network.process, self.schedule, keyed_random.fold(keys, _DECODER), z0, t)
        log_tokens = self.network.codec.log_tokens(params["codec"], z, self.schedule.sigma(t)[:, None])
        return -jnp.take_along_axis(log_tokens, tokens[..., None], axis=-1)[..., 0]


@dataclasses.dataclass(frozen=True)
class Denoising(Encodings):
    """The squared error alone: the decoder was trained before, in the run of `--init_from`."""

    trains_codec = False

    def terms(self, params, tokens, z0, sigma, keys, inputs, key):
        return {"squares": self.squares(params, z0, sigma, keys, inputs, key)}


@dataclasses.dataclass(frozen=True)
class Decoding(Encodings):
    """The cross-entropy of the decoder alone, a stage before `Denoising`."""

    trains_network = False

    def terms(self, params, tokens, z0, sigma, keys, inputs, key):
        return {"decoder": self.decoder_loss(params, tokens, z0, keys)}
