"""The absorbing and the uniform process: the closed forms of the forward process and of its reversal.

Absorbing has pi = the mask, Uniform has pi = 1/V. Interface and notation: `sedd.diffusion.discrete.jump_process`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random
from sedd.diffusion.discrete.jump_process import Jump, Process
from sedd.diffusion.discrete.score import ScoreStats
from sedd.diffusion.schedule import log_snr


@dataclasses.dataclass(frozen=True)
class Absorbing(Process):
    """Every token is in the end replaced by the mask, whose id is V (SEDD, equation 16)."""

    @property
    def num_states(self):
        return self.vocab_size + 1

    @property
    def mask_id(self) -> int:
        """The id of the mask: the last state."""
        return self.vocab_size

    def stationary(self):
        return (jnp.arange(self.num_states) == self.mask_id).astype(float)

    def _noise(self, keys):
        return jnp.full(keys.shape, self.mask_id, jnp.int32)

    def movable(self, x):
        return x == self.mask_id

    def mask_tokens(self, x, where):
        """x with masks at the positions `where`. Int[...], Bool[...] -> Int[...]."""
        return jnp.where(where, self.mask_id, x)

    def gibbs(self, log_clean, sigma):
        """Redraws a masked token from m: unmasked with probability alpha. Float[... V] -> Jump."""
        alpha = jnp.exp(-jnp.broadcast_to(sigma, log_clean.shape[:-1]))
        return Jump(alpha, log_clean)

    def sigma_from_mask_ratio(self, x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """The noise level of each row's own mask ratio. Int[B L] -> Float[B].

        With k of a row's n positions masked, 1 - alpha = (k - 1/2) / n: the middle of the k-th of n equal intervals.
        lengths: Int[B], the n of each row if not all are L; positions beyond it are not counted.
        """
        masked = x == self.mask_id
        if lengths is not None:
            masked &= jax.lax.broadcasted_iota(lengths.dtype, x.shape, x.ndim - 1) < lengths[..., None]
        count = jnp.sum(masked, axis=-1, dtype=float)
        length = x.shape[-1] if lengths is None else jnp.maximum(lengths, 1).astype(count.dtype)
        ratio = (jnp.maximum(count, 1) - 0.5) / length
        return -jnp.log1p(-ratio)

    def log_transition(self, x, x0, sigma):
        stayed = jnp.where(x == x0, -sigma, -jnp.inf)
        return jnp.where(x == self.mask_id, jnp.log(-jnp.expm1(-sigma)), stayed)

    def log_noised(self, log_clean, sigma):
        sigma = jnp.broadcast_to(sigma, log_clean.shape[:-1])[..., None]
        return jnp.concatenate([log_clean - sigma, jnp.log(-jnp.expm1(-sigma))], axis=-1)

    def log_posterior(self, log_clean, x, sigma):
        kept = jnp.where(jax.nn.one_hot(x, self.vocab_size, dtype=bool), 0.0, -jnp.inf)
        return jnp.where(self.movable(x)[..., None], log_clean, kept)

    def log_score(self, log_clean, here, sigma):
        """log s_y of a masked token for the clean tokens y: s_y = r_y / (e^sigma - 1). Float[... V].

        Of `here`, log r of the current token, only the shape is used. Tokens that are not masked never move.
        """
        return log_clean + log_snr(jnp.broadcast_to(sigma, here.shape))[..., None]

    def score_from_logits(self, logits, x, sigma):
        """The logits less log(e^sigma - 1) + log V; SEDD, appendix C.2. Equal logits are the score of a uniform r."""
        shift = log_snr(sigma) - math.log(self.vocab_size)
        return super().score_from_logits(logits + shift[..., None], x, sigma)

    def clean_from_score(self, log_score, sigma):
        """log r from any log score of a masked token, without its mask column (if it has one). Float[... V].

        An unnormalised score is normalised, which discards the total rate that it predicts.
        """
        return jax.nn.log_softmax(log_score[..., : self.vocab_size], axis=-1)

    def tightened(self, log_score, sigma):
        """A log score of masked tokens with the true normaliser, sum s = 1 / (e^sigma - 1). Float[... V].

        For any x0 its score entropy is smaller by w (Z - 1 - log Z), with w = 1 / (e^sigma - 1) and
        Z = (sum s) / w of the unnormalised score (the true normaliser: Ou et al., arXiv 2406.03736, theorem 1).
        """
        return self.log_score(self.clean_from_score(log_score, sigma), jnp.zeros(log_score.shape[:-1]), sigma)

    def stats_of_clean(self, columns, x, x0, sigma, lost=0.0):
        sums, weight = columns.sums(x, x0), log_snr(sigma)
        log_sum = jnp.broadcast_to(weight, sums.log_sum.shape)  # that of r is 0
        shift = weight - sums.log_sum
        return ScoreStats(log_sum, sums.total + self.vocab_size * shift, jnp.where(x == x0, 0.0, sums.target + shift))

    def stats_of_score(self, columns, x, x0, sigma, tightened=False):
        if tightened:
            return self.stats_of_clean(columns, x, x0, sigma)
        sums, shift = columns.sums(x, x0), log_snr(sigma) - math.log(self.vocab_size)
        total, target = sums.total + self.vocab_size * shift, jnp.where(x == x0, 0.0, sums.target + shift)
        return ScoreStats(sums.log_sum + shift, total, target)

    def log_posterior_at(self, columns, x, x0, sigma, discount=1.0):
        sums = columns.sums(x, x0)
        return jnp.where(self.movable(x), sums.target - sums.log_sum, jnp.where(x == x0, 0.0, -jnp.inf))

    def reverse_rate(self, log_clean, x, sigma):
        here = jnp.zeros(x.shape, log_clean.dtype)
        return jnp.where(self.movable(x)[..., None], jnp.exp(self.log_score(log_clean, here, sigma)), 0.0)

    def tweedie(self, log_clean, x, sigma, sigma_next):
        p_unmask = jnp.exp(-sigma_next) * jnp.expm1(sigma_next - sigma) / jnp.expm1(-sigma)
        return Jump(jnp.where(self.movable(x), p_unmask, 0.0), log_clean)

    def score_entropy(self, stats, x, x0, sigma):
        """The score entropy in nats per unit sigma, 0 where x is not the mask. Float[...]; SEDD, equation 10.

        It is w = 1 / (e^sigma - 1) times `cross_entropy`.
        """
        return jnp.where(x == self.mask_id, jnp.exp(log_snr(sigma)) * self.cross_entropy(stats, x, sigma), 0.0)

    def cross_entropy(self, stats: ScoreStats, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """The score entropy divided by its weight w = 1 / (e^sigma - 1), nats, 0 where x is not the mask. Float[...].

        With c = log(sum s / w) it is (log sum s - log s_x0) + (e^c - 1 - c): the cross-entropy of the normalised score
        plus the error of its normaliser. Both terms are nonnegative.
        """
        masked = x == self.mask_id
        excess = jnp.where(masked, stats.log_sum - log_snr(sigma), 0.0)
        return jnp.where(masked, (stats.log_sum - stats.target) + (jnp.expm1(excess) - excess), 0.0)

    def prior_divergence(self, sigma):
        """KL(q_sigma(. | x0) || pi) of a token, nats: infinite unless every token is masked."""
        return 0.0 if math.exp(-sigma) == 0 else math.inf

    def reconstruction(self, stats, x, x0, sigma):
        return jnp.where(x == self.mask_id, stats.log_sum - stats.target, 0.0)


@dataclasses.dataclass(frozen=True)
class Uniform(Process):
    """Every token is in the end uniformly random over the V tokens (SEDD, equation 15, over V)."""

    @property
    def num_states(self):
        return self.vocab_size

    def stationary(self):
        return jnp.full(self.num_states, 1 / self.num_states)

    def _noise(self, keys):
        return keyed_random.integers(keys, self.vocab_size)

    def movable(self, x):
        return jnp.ones(x.shape, bool)

    def mask_tokens(self, x, where):
        """x unchanged: a Denoiser's output at a position does not depend on the token there."""
        return x

    def gibbs(self, log_clean, sigma):
        return Jump(jnp.ones(log_clean.shape[:-1], log_clean.dtype), self.log_noised(log_clean, sigma))

    def barker(self, log_clean: jax.Array, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """Barker's rates s_y / (1 + s_y) / V, 0 at y = x, whose sum is less than 1. Float[... V].

        They satisfy detailed balance with p_sigma, as all rates g(s) with g(s) = s g(1/s) do (Zhao et al.,
        arXiv 2407.21243, section 3).
        """
        here = jnp.take_along_axis(log_clean, x[..., None], axis=-1)[..., 0]
        rates = jax.nn.sigmoid(self.log_score(log_clean, here, sigma)) / self.vocab_size
        return jnp.where(jax.nn.one_hot(x, self.vocab_size, dtype=bool), 0.0, rates)

    def log_transition(self, x, x0, sigma):
        other = -jnp.expm1(-sigma) / self.vocab_size
        return jnp.log(jnp.where(x == x0, jnp.exp(-sigma) + other, other))

    def log_noised(self, log_clean, sigma):
        return self._log_mixed(log_clean, jnp.broadcast_to(sigma, log_clean.shape[:-1])[..., None])

    def log_posterior(self, log_clean, x, sigma):
        """log p(x0 = v | x) by Bayes' rule: r_v q(x | v) / m_x, where q(x | x) / q(x | v) = 1 + odds. Float[... V]."""
        return jax.nn.log_softmax(log_clean + self.log_evidence(x, sigma), axis=-1)

    def log_score(self, log_clean, here, sigma):
        """log s_y = log (m_y / m_x), 0 at y = x, pointwise in the columns. here: log r_x.

        Near 0 it is computed as the log1p of the relative difference: at high noise all scores are close to 1, and
        the information is in their differences from 1.
        """
        sigma, here = jnp.broadcast_to(sigma, here.shape)[..., None], here[..., None]
        log_there, log_here = self._log_mixed(log_clean, sigma), self._log_mixed(here, sigma)
        change = jnp.exp(-sigma - log_here) * (jnp.exp(log_clean) - jnp.exp(here))
        near = jnp.abs(change) < 0.5
        return jnp.where(near, jnp.log1p(jnp.where(near, change, 0.0)), jnp.where(near, 0.0, log_there - log_here))

    def clean_from_score(self, log_score, sigma):
        """log r from any log score that is 0 at the current token; r is clipped at 0 and normalised. Float[... V].

        m = s / sum s and r = (m - (1 - alpha) / V) / alpha, which for an unnormalised score may leave the simplex.
        """
        sigma = jnp.broadcast_to(sigma, log_score.shape[:-1])[..., None]
        alpha = jnp.exp(-sigma)
        excess = jnp.expm1(log_score)  # s - 1: at high noise the information is in the differences of s from 1
        mean = jnp.mean(excess, axis=-1, keepdims=True)
        noisy = alpha * (1 + mean) + (excess - mean)
        clear = jnp.exp(log_score) + jnp.expm1(-sigma) * (1 + mean)
        weight = jnp.maximum(jnp.where(alpha > 0.5, clear, noisy), 0.0)
        return jnp.log(weight) - jnp.log(jnp.sum(weight, axis=-1, keepdims=True))

    def tightened(self, log_score, sigma):
        """A log score clipped to the range of true ratios, [rho, 1 / rho]. Float[... V].

        rho = (1 - alpha) / (V alpha + 1 - alpha). Clipping never increases the score entropy, for any x and x0: given
        x0 each true ratio is rho, 1 or 1 / rho, and s - a log s is convex in s with its minimum at a. The score of
        `clean_from_score` can have a larger one.
        """
        odds = self._odds(jnp.broadcast_to(sigma, log_score.shape[:-1])[..., None])
        return jnp.clip(log_score, -jnp.log1p(odds), jnp.log1p(odds))

    def stats_of_clean(self, columns, x, x0, sigma, lost=0.0):
        first = columns.sums(x, x0)
        own = first.own - lost
        log_total = jnp.logaddexp(first.log_sum, own)

        def log_score(weights, log_total, here, sigma):
            return self.log_score(weights - log_total[..., None], here, sigma)

        at = (log_total, own - log_total, jnp.broadcast_to(sigma, x.shape))
        sums = columns.sums(x, x0, log_score, *at)
        target = log_score(jnp.where(x == x0, own, sums.target)[..., None], *at)[..., 0]
        return ScoreStats(sums.log_sum, sums.total, jnp.where(x == x0, 0.0, target))

    def stats_of_score(self, columns, x, x0, sigma, tightened=False):
        sums = columns.sums(x, x0, *((self.tightened, jnp.broadcast_to(sigma, x.shape)) if tightened else ()))
        target = self.tightened(sums.target[..., None], sigma)[..., 0] if tightened else sums.target
        return ScoreStats(sums.log_sum, sums.total, jnp.where(x == x0, 0.0, target))

    def log_posterior_at(self, columns, x, x0, sigma, discount=1.0):
        sums = columns.sums(x, x0)
        own = sums.own + jnp.log1p(self._odds(jnp.broadcast_to(sigma, x.shape)) / discount)
        return jnp.where(x == x0, own, sums.target) - jnp.logaddexp(sums.log_sum, own)

    def reverse_rate(self, log_clean, x, sigma):
        current = jax.nn.one_hot(x, self.vocab_size, dtype=bool)
        here = jnp.take_along_axis(log_clean, x[..., None], axis=-1)[..., 0]
        score = jnp.exp(self.log_score(log_clean, here, sigma))
        return jnp.where(current, 0.0, score / self.vocab_size)

    def tweedie(self, log_clean, x, sigma, sigma_next):
        """The exact posterior step of each token from sigma down to sigma_next; SEDD, equation 19.

        p(y) = q(x | y) m_y / m_x, with q from sigma_next to sigma, m_y at sigma_next, m_x at sigma. For y != x it is
        a product of positive numbers; p_move is their sum, without the term at x.
        """
        current = jax.nn.one_hot(x, self.vocab_size, dtype=bool)
        sigma = jnp.broadcast_to(sigma, x.shape)
        sigma_next = jnp.broadcast_to(sigma_next, x.shape)
        here = jnp.take_along_axis(log_clean, x[..., None], axis=-1)[..., 0]
        elsewhere = jnp.sum(jnp.where(current, 0.0, jnp.exp(log_clean)), axis=-1)
        others = (self.vocab_size - 1) / self.vocab_size
        moved = jnp.exp(-sigma_next) * elsewhere - jnp.expm1(-sigma_next) * others
        through = -jnp.expm1(sigma_next - sigma) / self.vocab_size
        p_move = through * moved * jnp.exp(-self._log_mixed(here, sigma))
        return Jump(p_move, jnp.where(current, -jnp.inf, self._log_mixed(log_clean, sigma_next[..., None])))

    def score_entropy(self, stats, x, x0, sigma):
        """The score entropy in nats per unit sigma. Float[...]; SEDD, equation 10.

        It is (1/V) sum_{y != x} [s_y - rho_y - rho_y log(s_y / rho_y)] with the true ratios rho_y = q(y|x0) / q(x|x0):
        where x = x0 all are rho < 1; else 1 / rho at x0 and 1 elsewhere. Grouped as here, the terms do not cancel: the
        result is accurate down to noise levels where rho is 1e-11.
        """
        odds = self._odds(sigma)
        rho, log_rho = 1 / (1 + odds), -jnp.log1p(odds)
        others = self.vocab_size - 1
        mean = stats.log_sum - math.log(others)
        excess = mean - log_rho
        same = others * rho * ((jnp.expm1(excess) - excess) + (mean - stats.sum_log / others))
        total, target = jnp.where(x == x0, 0.0, stats.log_sum), jnp.where(x == x0, -math.log(others), stats.target)
        rest = -jnp.exp(total) * jnp.expm1(target - total) - (others - 1) - (stats.sum_log - target)
        at_x0 = (jnp.expm1(target + log_rho) - (target + log_rho)) / rho
        return jnp.where(x == x0, same, rest + at_x0) / self.vocab_size

    def prior_divergence(self, sigma):
        alpha, others = math.exp(-sigma), self.vocab_size - 1
        at_x0 = (1 + alpha * others) / self.vocab_size
        return at_x0 * math.log1p(alpha * others) + (1 - at_x0) * math.log1p(-alpha)

    def reconstruction(self, stats, x, x0, sigma):
        """-log p(x0 | x) of one step from sigma to 0, nats. Float[...].

        The step is p(v) ~ m_v q(x | v), a distribution for any score. Tweedie's has r_v for m_v: the two differ by
        O(sigma).
        """
        odds = self._odds(sigma)
        log_total = jnp.logaddexp(jnp.log1p(odds), stats.log_sum)
        return log_total - jnp.where(x == x0, jnp.log1p(odds), stats.target)

    def log_evidence(self, x: jax.Array, sigma: jax.Array, discount: float = 1.0) -> jax.Array:
        """log q(x | v) up to a constant in v: log (1 + odds) at v = x, 0 elsewhere. Float[... V].

        It is what a token's own noisy state says of the clean one: the log posterior less log r, up to a constant.
        discount: the odds are divided by it, as if the token were noisier.
        """
        return self._at_own(x, jnp.log1p(self._odds(jnp.broadcast_to(sigma, x.shape)) / discount))

    def lost_evidence(self, x: jax.Array, sigma: jax.Array, discount: float) -> jax.Array:
        """What a discount takes from `log_evidence`: `lost_at_own` at v = x, 0 elsewhere. Float[... V]."""
        return self._at_own(x, self.lost_at_own(x, sigma, discount))

    def lost_at_own(self, x: jax.Array, sigma: jax.Array, discount: float) -> jax.Array:
        """What a discount takes from the evidence of the own token, at most log discount. Float[...].

        In one logarithm, as (1 + odds) / (1 + odds / d) is 1 + (d - 1) / (1 + d / odds): finite at every noise, and XLA
        cannot merge log1p of two multiples, which it does at a fault (tests/test_compiled.py).
        """
        return jnp.log1p((discount - 1) / (1 + discount / self._odds(jnp.broadcast_to(sigma, x.shape))))

    def _at_own(self, x: jax.Array, values: jax.Array) -> jax.Array:
        """The values at v = x, 0 elsewhere. Int[...], Float[...] -> Float[... V]."""
        return jnp.where(jax.nn.one_hot(x, self.vocab_size, dtype=bool), values[..., None], 0.0)

    def _odds(self, sigma: jax.Array) -> jax.Array:
        """V alpha / (1 - alpha): q(x | x) = (1 + odds) q(x | v)."""
        return self.vocab_size * jnp.exp(-sigma) / -jnp.expm1(-sigma)

    def _log_mixed(self, log_clean: jax.Array, sigma: jax.Array) -> jax.Array:
        """log (alpha r + (1 - alpha) / V), pointwise; sigma broadcasts to log_clean."""
        return jnp.logaddexp(log_clean - sigma, jnp.log(-jnp.expm1(-sigma)) - math.log(self.vocab_size))
