"""What the logits of a network mean, and the quantities that follow from them.

They are an unnormalised log score; or log r, in which a token's own noisy state has no part; or log weights from which
the posterior follows, in which it has.
"""

import abc
import dataclasses

import jax
import jax.numpy as jnp

from sedd.diffusion.discrete.process import Process
from sedd.diffusion.discrete.score import Columns, ScoreStats

ODDS_DISCOUNT = 4.0  # of the own token's evidence that is added to the logits of a posterior; see docs/measurements.md


@dataclasses.dataclass(frozen=True)
class Prediction(abc.ABC):
    """The meaning of a network's logits, Float32[... S], at tokens x, Int[...], and noise sigma, Float[...].

    sigma is that of the noisy tokens; the network may be conditioned on another one, the nearest of its range, which is
    then the one that its logits belong to.
    """

    process: Process
    unnormalised = False
    with_mask = True  # False: for a process without a mask only

    @abc.abstractmethod
    def log_clean(self, logits: jax.Array, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """log r, normalised. Float32[... V]."""

    @abc.abstractmethod
    def log_score(self, logits: jax.Array, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """The log concrete score of all states, 0 at the current token. Float32[... S]."""

    @abc.abstractmethod
    def stats(
        self,
        columns: Columns,
        x: jax.Array,
        x0: jax.Array,
        sigma: jax.Array,
        conditioned_sigma: jax.Array,
        tightened: bool = False,
    ) -> ScoreStats:
        """The statistics of the scores at sigma. columns: the logits of the clean tokens; tightened: as of
        `Network.stats`, for unnormalised scores only.

        conditioned_sigma: Float[...], that of the network.
        """

    @abc.abstractmethod
    def log_posterior_at(self, columns: Columns, x: jax.Array, x0: jax.Array, sigma: jax.Array) -> jax.Array:
        """`log_posterior` of the tokens x0, Int[...]. Float[...]. ValueError for unnormalised scores."""

    def log_posterior(self, logits: jax.Array, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """The log posterior of the clean tokens, the token's own state included, normalised. Float32[... V]."""
        return self.process.log_posterior(self.log_clean(logits, x, sigma), x, sigma)


class ScorePrediction(Prediction):
    """The logits are an unnormalised log score, as in the SEDD paper, up to `process.score_from_logits`.

    The training loss uses it as it is; bounds also use `process.tightened` of it. Samplers use its projection to the
    simplex, `process.clean_from_score`, which is done here and nowhere else.
    """

    unnormalised = True

    def log_clean(self, logits, x, sigma):
        return self.process.clean_from_score(self.log_score(logits, x, sigma), sigma)

    def log_score(self, logits, x, sigma):
        return self.process.score_from_logits(logits, x, sigma)

    def stats(self, columns, x, x0, sigma, conditioned_sigma, tightened=False):
        def stats(tightened):
            return self.process.stats_of_score(columns, x, x0, sigma, tightened)

        return jax.tree.map(lambda *both: jnp.stack(both), stats(False), stats(True)) if tightened else stats(False)

    def log_posterior_at(self, columns, x, x0, sigma):
        raise ValueError("an unnormalised score has no posterior")


class DenoiserPrediction(Prediction):
    """The softmax of the logits of the clean tokens is r, the distribution of a clean token given all other tokens."""

    def log_clean(self, logits, x, sigma):
        return jax.nn.log_softmax(logits[..., : self.process.vocab_size], axis=-1)

    def log_score(self, logits, x, sigma):
        log_noised = self.process.log_noised(self.log_clean(logits, x, sigma), sigma)
        return log_noised - jnp.take_along_axis(log_noised, x[..., None], axis=-1)

    def stats(self, columns, x, x0, sigma, conditioned_sigma, tightened=False):
        return self.process.stats_of_clean(columns, x, x0, sigma)

    def log_posterior_at(self, columns, x, x0, sigma):
        return self.process.log_posterior_at(columns, x, x0, sigma)


class PosteriorPrediction(DenoiserPrediction):
    """The softmax of the logits, with discounted evidence of the token's own state added, is the posterior.

    `process.log_evidence` says what a token's own noisy state tells of the clean one. With its odds divided by
    ODDS_DISCOUNT it is too little by at most log ODDS_DISCOUNT nats: the rest is the network's, which so learns from
    the first step to copy its input where it fits the context. With nothing added it has to learn all of the copying;
    with all added, as for log r, it has to ignore its input, and learns much more slowly (docs/measurements.md).
    Without the rest, `process.lost_evidence`, the logits are log r: in logs, so that at low noise, where the posterior
    is close to 1 at the own token, the ratios of the others keep their precision.
    """

    with_mask = False  # of a masked token log r is the log posterior

    def log_clean(self, logits, x, sigma):
        lost = self.process.lost_evidence(x, sigma, ODDS_DISCOUNT)
        return jax.nn.log_softmax(logits[..., : self.process.vocab_size] - lost, axis=-1)

    def log_posterior(self, logits, x, sigma):
        evidence = self.process.log_evidence(x, sigma, ODDS_DISCOUNT)
        return jax.nn.log_softmax(logits[..., : self.process.vocab_size] + evidence, axis=-1)

    def stats(self, columns, x, x0, sigma, conditioned_sigma, tightened=False):
        lost = self.process.lost_at_own(x, conditioned_sigma, ODDS_DISCOUNT)
        return self.process.stats_of_clean(columns, x, x0, sigma, lost)

    def log_posterior_at(self, columns, x, x0, sigma):
        return self.process.log_posterior_at(columns, x, x0, sigma, ODDS_DISCOUNT)


PREDICTIONS: dict[str, type[Prediction]] = {
    "denoiser": DenoiserPrediction,
    "posterior": PosteriorPrediction,
    "score": ScorePrediction,
}
