"""The network of noisy latents of tokens: with parameters it is a Denoiser or a MeanDenoiser, and a LatentStatsFn."""

import dataclasses
import math
from typing import Protocol, cast

import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random
from sedd.diffusion.denoiser import Denoiser, Latent, MeanDenoiser, mean_from
from sedd.diffusion.gaussian.guidance import rounded
from sedd.diffusion.gaussian.likelihood import bound_of
from sedd.diffusion.gaussian.loss import LatentStatsFn, statistics, stats_from
from sedd.diffusion.gaussian.process import Gaussian
from sedd.diffusion.schedule import log_snr
from sedd.errors import UserError
from sedd.network.adapters import TokenHead, padded
from sedd.network.latent_adapters import LatentEmbedding, LatentHead, LayerEstimates
from sedd.network.latent_predictions import DENOISER, MEANS
from sedd.network.network import Network, apply


class Codec(Protocol):
    """Tokens as latents, for a `LatentNetwork`; parameters are those under "codec", trained or frozen."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def positionwise(self) -> bool: ...

    @property
    def num_parameters(self) -> int: ...

    @property
    def num_padding(self) -> int: ...

    @property
    def num_frozen(self) -> int: ...

    @property
    def wide_arrays(self) -> int: ...

    def multiply_adds(self, length: int) -> tuple[int, int]: ...

    def init(self, key: jax.Array) -> dict: ...

    def encode(self, params: dict, tokens: jax.Array, lengths: jax.Array | None = None) -> jax.Array: ...

    def log_tokens(self, params: dict, z: jax.Array, sigma: jax.Array) -> jax.Array: ...

    def tokens(self, params: dict, z0: jax.Array) -> jax.Array: ...


class Table(Codec, Protocol):
    """A codec with a latent for each token."""

    def rows(self, params: dict) -> jax.Array: ...

    def products(self, params: dict, z: jax.Array) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class LatentNetwork(Network):
    """A network over latents of tokens; prediction: "denoiser", the tokens, or a key of MEANS, their latents.

    codec: of `sedd.codecs`; a denoiser, soft tokens and rounding need a `Table`. soft_tokens: the network also takes
    the distribution of each token by its own latent, embedded as the tokens of other networks are. self_conditioning:
    it takes its last answer (Chen et al., arXiv 2208.04202), estimate_layers: in front of each layer. evidence_snr: the
    logits of a "denoiser" get the evidence of the position's own latent, in the share SNR / (SNR + evidence_snr); 0:
    none. bound_low: the noise at which the bound passes to the tokens; 0: that of `bound_of`.
    """

    process: Gaussian
    codec: Codec = dataclasses.field(kw_only=True)
    soft_tokens: bool = True
    self_conditioning: bool = False
    estimate_layers: bool = False
    evidence_snr: float = 0.0
    bound_low: float = 0.0

    @staticmethod
    def predictions():
        return (DENOISER, *MEANS)

    @property
    def vocab_size(self):
        return self.codec.vocab_size

    @property
    def has_logits(self):
        return self.prediction == DENOISER

    @property
    def self_conditioned(self):
        return self.self_conditioning

    @property
    def columns(self):
        return self.vocab_size

    @property
    def wide_arrays(self):
        return 3 * self.has_logits + 2 * self.soft_tokens + self.codec.wide_arrays

    def codec_products(self, length):
        return self.codec.multiply_adds(length)

    @property
    def num_frozen(self):
        return self.codec.num_frozen

    @property
    def infills(self):
        return self.codec.positionwise

    @property
    def _num_estimates(self) -> int:
        """The number of linear maps of the last answer."""
        return (self.trunk.layers if self.estimate_layers else 1) * self.self_conditioning

    @property
    def outer_parameters(self):
        of_embedding = self.trunk.width * (
            self.process.width * (1 + self._num_estimates) + 1 + self.vocab_size * self.soft_tokens
        )
        return self.codec.num_parameters + of_embedding + self._num_outputs * (self.trunk.width + 1)

    @property
    def outer_products(self):
        latents = self.process.width * (1 + self._num_estimates)
        soft = self.vocab_size * self.soft_tokens * (self.process.width + self.trunk.width)
        outputs = padded(self.vocab_size) if self.has_logits else self.process.width
        return (latents + outputs) * self.trunk.width + soft

    @property
    def _num_outputs(self) -> int:
        return self.vocab_size if self.has_logits else self.process.width

    @property
    def embedding(self) -> LatentEmbedding:
        states = self.vocab_size if self.soft_tokens else 0
        takes_estimate = self.self_conditioning and not self.estimate_layers
        return LatentEmbedding(self.trunk.width, states, self.embedding_std, takes_estimate, self.given_embedding)

    @property
    def layer_estimates(self) -> LayerEstimates | None:
        if not (self.self_conditioning and self.estimate_layers):
            return None
        return LayerEstimates(self.trunk.layers, self.trunk.width)

    @property
    def head(self) -> TokenHead | LatentHead:
        return TokenHead(self.vocab_size) if self.has_logits else LatentHead(self.process.width)

    @property
    def num_padding(self):
        rows = padded(self.vocab_size) - self.vocab_size
        of_head = (self.trunk.width + 1) * self.has_logits
        return self.codec.num_padding + rows * (self.trunk.width * self.soft_tokens + of_head)

    def init(self, key):
        z, sigma = jnp.zeros((1, 2, self.process.width), jnp.float32), jnp.ones(1, jnp.float32)
        soft = jnp.zeros((1, 2, self.vocab_size), jnp.float32)
        h, condition = jnp.zeros((1, 2, self.trunk.width), jnp.float32), jnp.zeros((1, self.cond_dim), jnp.float32)
        for_trunk, for_head, for_codec = jax.random.split(keyed_random.threefry(key), 3)
        trunk = {
            **self.embedding.init(for_trunk, z, soft, z)["params"],
            **({} if self.layer_estimates is None else self.layer_estimates.init(for_trunk, z)["params"]),
            **self.noise_embedding.init(for_trunk, sigma)["params"],
            **self.trunk.init(for_trunk, h, condition)["params"],
        }
        head = self.head.init(for_head, h, condition[:, None])["params"]
        return {"codec": self.codec.init(for_codec), "trunk": trunk, "head": head}

    def clean(self, params, tokens, lengths=None):
        return self.codec.encode(params["codec"], tokens, lengths)

    def shown(self, params, x):
        return self.codec.tokens(params["codec"], x.estimate)

    def denoiser(self, params, lengths=None, given=None):
        if not self.has_logits:
            return self.mean_denoiser(params, lengths=lengths, given=given)
        return self._token_denoiser(params, None, lengths, given)

    def for_sampler(self, params, denoiser, round_below=0.0):
        mean = mean_from(denoiser, self._rows(params)) if self.has_logits else denoiser
        return rounded(mean, self._rows(params), round_below) if round_below else mean

    def _rows(self, params) -> jax.Array:
        """The latents of all tokens, Float32[V D]."""
        return cast(Table, self.codec).rows(params["codec"])

    def mean_denoiser(
        self,
        params: dict,
        keys: jax.Array | None = None,
        lengths: jax.Array | None = None,
        given: jax.Array | None = None,
    ) -> MeanDenoiser:
        """Returns the MeanDenoiser of these parameters. Arguments as of `stats`."""

        if self.has_logits:
            denoiser = self._token_denoiser(params, keys, lengths, given)
            return mean_from(denoiser, self._rows(params))

        def mean(x, sigma):
            output = self._output(params, x, self._clipped(sigma), keys, lengths, given)
            return MEANS[self.prediction](output, x.z, sigma.astype(jnp.float32)[:, None, None])

        return mean

    def stats(
        self,
        params: dict,
        tokens: jax.Array,
        keys: jax.Array | None = None,
        lengths: jax.Array | None = None,
        given: jax.Array | None = None,
    ) -> LatentStatsFn:
        """Returns the LatentStatsFn of these parameters, in one call of the network, with the memory of its argument.

        tokens: Int[B L], those of z0; keys: Key[B] for dropout; lengths: Int[B]; given: Bool[B L]. A network that
        predicts latents rounds each by itself.
        """

        if self.has_logits:
            denoiser = self._token_denoiser(params, keys, lengths, given)
            return stats_from(denoiser, self._rows(params), tokens)
        mean = self.mean_denoiser(params, keys, lengths, given)

        def stats(x, sigma, z0):
            log_clean = self.codec.log_tokens(params["codec"], x.z, sigma.astype(jnp.float32)[:, None])
            return statistics(mean(x, sigma), log_clean, z0, tokens)

        return stats

    def bound(self, schedule):
        return bound_of(self.process, schedule, self.bound_low)

    def loss_at_times(self, schedule, eps, strata):
        raise UserError("this protocol is that of a discrete process, and latents diffuse here; use the protocol clean")

    def bound_stats(self, params, tokens, lengths=None, given=None, masked_pairs=False):
        stats = self.stats(params, tokens, None, lengths, given)
        if not self.self_conditioning:
            return stats
        mean = self.mean_denoiser(params, None, lengths, given)
        return lambda x, sigma, z0: stats(with_memory(x, mean(x, sigma), given), sigma, z0)

    def _token_denoiser(self, params, *inputs) -> Denoiser:
        """The Denoiser of a network with logits. inputs: keys, lengths and given, as of `stats`."""

        def denoise(x, sigma, positions=None):
            log_clean = self._log_clean(params, x, sigma, *inputs)
            return log_clean if positions is None else jnp.take_along_axis(log_clean, positions[..., None], axis=1)

        return denoise

    def _log_clean(self, params, x, sigma, *inputs) -> jax.Array:
        """The distribution of the tokens, Float32[B L V]."""
        logits = self._output(params, x, self._clipped(sigma), *inputs)
        if self.evidence_snr:
            sigma = sigma.astype(jnp.float32)[:, None]
            share = jax.nn.sigmoid(log_snr(sigma) - math.log(self.evidence_snr))
            logits = logits + share[..., None] * self._evidence(params, x.z, sigma)
        return jax.nn.log_softmax(logits, axis=-1)

    def _evidence(self, params, z, sigma) -> jax.Array:
        """The log evidence of each latent for its own token. Float[B L D], Float[B 1] -> Float32[B L V]."""
        return self.process.log_evidence(z, self._rows(params), sigma)

    def _output(self, params, x, sigma, keys=None, lengths=None, given=None) -> jax.Array:
        """The outputs of the head, conditioned on sigma without clipping. Float32[B L V] or Float32[B L D]."""
        given, soft = self._checked(given), None
        if self.soft_tokens:
            soft = jax.nn.softmax(self._evidence(params, x.z, sigma[:, None]), axis=-1)
            if given is not None:
                own = jax.nn.one_hot(self.codec.tokens(params["codec"], x.z), self.vocab_size, dtype=soft.dtype)
                soft = jnp.where(given[..., None], own, soft)
        h = apply(self.embedding, params["trunk"], x.z, soft, x.estimate, given)
        added = None if self.layer_estimates is None else apply(self.layer_estimates, params["trunk"], x.estimate)
        condition = apply(self.noise_embedding, params["trunk"], sigma)
        hidden = apply(self.trunk, params["trunk"], h, condition, keys, lengths, None, None, added)
        return apply(self.head, params["head"], hidden, condition[:, None])


def with_memory(x: Latent, estimate: jax.Array, given: jax.Array | None) -> Latent:
    """The state with an estimate as its memory; that of given latents is the latent itself. given: Bool[B L]."""
    return x._replace(estimate=estimate if given is None else jnp.where(given[..., None], x.z, estimate))
