"""The forward jump processes and the closed forms of their reversal.

Per token every process is "resample from pi": dp/dsigma = Q p with Q = pi 1^T - I, so that at total noise sigma

    q(y | v) = alpha [y = v] + (1 - alpha) pi_y,   alpha = exp(-sigma).

Absorbing is pi = the mask, Uniform is pi = 1/V. With r, what a Denoiser believes of the clean token, the law of a token
given the others is m = alpha r + (1 - alpha) pi; the concrete score is s_y = m_y / m_x, the reverse rate pi_x s_y.

All methods are pointwise: x is Int[...], log_clean is Float[... V], sigma broadcasts to x, and the result has the dtype
of log_clean or sigma. Tokens are 0 .. V - 1; the mask, where there is one, is V.
"""

import abc
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random
from sedd.diffusion.score import ScoreStats


class Jump(NamedTuple):
    """A two-stage step of a token: whether it moves, and where to. A law by construction."""

    p_move: jax.Array  # Float[...]
    log_dest: jax.Array  # Float[... V], unnormalised


@dataclasses.dataclass(frozen=True)
class Process(abc.ABC):
    """What both processes share. vocab_size: V, the number of clean tokens."""

    vocab_size: int

    def __post_init__(self):
        if self.vocab_size < 2:
            raise ValueError(f"{type(self).__name__}: vocab_size must be at least 2, not {self.vocab_size}")

    @property
    @abc.abstractmethod
    def num_states(self) -> int:
        """S, the number of states of a token."""

    @abc.abstractmethod
    def stationary(self) -> jax.Array:
        """pi, the law in which the noise ends. Float[S]."""

    def rate_matrix(self) -> jax.Array:
        """Q, for tests and teaching; columns sum to 0. Float[S S]."""
        return self.stationary()[:, None] - jnp.eye(self.num_states)

    def transition_matrix(self, sigma: jax.Array | float) -> jax.Array:
        """q(y | v) in row y, column v, for tests and teaching: exp(sigma Q). Float[S S]."""
        return jnp.exp(-sigma) * jnp.eye(self.num_states) - jnp.expm1(-sigma) * self.stationary()[:, None]

    def perturb(self, keys: jax.Array, x0: jax.Array, sigma: jax.Array) -> jax.Array:
        """A draw of x at noise sigma. keys: Key[B]; x0: Int[B L] -> Int32[B L]; SEDD, equations 13 and 14."""
        sites = keyed_random.sites(keys, jnp.arange(x0.shape[-1]))
        corrupted = keyed_random.bernoulli(keyed_random.fold(sites, 0), -jnp.expm1(-jnp.broadcast_to(sigma, x0.shape)))
        return jnp.where(corrupted, self._noise(keyed_random.fold(sites, 1)), x0.astype(jnp.int32))

    def prior(self, keys: jax.Array, length: int) -> jax.Array:
        """A draw from the law in which the noise ends. Key[B] -> Int32[B length]."""
        return self._noise(keyed_random.sites(keys, jnp.arange(length)))

    @abc.abstractmethod
    def log_noised(self, log_clean: jax.Array, sigma: jax.Array) -> jax.Array:
        """log m, the law of a noisy token given the others. Float[... V] -> Float[... S]."""

    @abc.abstractmethod
    def _noise(self, sites: jax.Array) -> jax.Array:
        """Draws from pi. Key[B L] -> Int32[B L]."""


@dataclasses.dataclass(frozen=True)
class Absorbing(Process):
    """Every token is in the end replaced by the mask, whose id is V (SEDD, equation 16)."""

    @property
    def num_states(self):
        return self.vocab_size + 1

    @property
    def mask(self) -> int:
        """The id of the mask: the last state."""
        return self.vocab_size

    def stationary(self):
        return (jnp.arange(self.num_states) == self.mask).astype(float)

    def _noise(self, sites):
        return jnp.full(sites.shape, self.mask, jnp.int32)

    def movable(self, x: jax.Array) -> jax.Array:
        """Whether the reverse process can still change a token. Int[...] -> Bool[...]."""
        return x == self.mask

    def mask_tokens(self, x: jax.Array, where: jax.Array) -> jax.Array:
        """x with masks at the positions told, where a Denoiser can then be asked. Int[...], Bool[...] -> Int[...]."""
        return jnp.where(where, self.mask, x)

    def redraw(self, log_clean: jax.Array, sigma: jax.Array) -> Jump:
        """A draw of a hidden token from m, its law given the others. Float[... V] -> Jump."""
        alpha = jnp.exp(-jnp.broadcast_to(sigma, log_clean.shape[:-1]))
        return Jump(alpha, log_clean)

    def sigma_from_mask_ratio(self, x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """The noise that a network is told where rows, not times, say how much is masked. Int[B L] -> Float[B].

        With k of a row's n positions masked it is that of the middle of the k-th of n equal shares,
        1 - alpha = (k - 1/2) / n. lengths: Int[B], n where it is not all L; what follows is not counted.
        """
        masked = x == self.mask
        if lengths is not None:
            masked &= jax.lax.broadcasted_iota(lengths.dtype, x.shape, x.ndim - 1) < lengths[..., None]
        masked = jnp.sum(masked, axis=-1, dtype=float)
        length = x.shape[-1] if lengths is None else jnp.maximum(lengths, 1).astype(masked.dtype)
        share = (jnp.maximum(masked, 1) - 0.5) / length
        return -jnp.log1p(-share)

    def log_transition(self, x: jax.Array, x0: jax.Array, sigma: jax.Array) -> jax.Array:
        """log q(x | x0) at noise sigma. Float[...]."""
        stayed = jnp.where(x == x0, -sigma, -jnp.inf)
        return jnp.where(x == self.mask, jnp.log(-jnp.expm1(-sigma)), stayed)

    def log_noised(self, log_clean, sigma):
        sigma = jnp.broadcast_to(sigma, log_clean.shape[:-1])[..., None]
        return jnp.concatenate([log_clean - sigma, jnp.log(-jnp.expm1(-sigma))], axis=-1)

    def log_score(self, log_clean: jax.Array, here: jax.Array, sigma: jax.Array) -> jax.Array:
        """log s_y of a masked token for the clean tokens y: r_y / (e^sigma - 1). Float[... V].

        Pointwise in the columns. here, log r of the current token (Float[...]), is of no use under a mask; other
        tokens never move.
        """
        return log_clean - log_expm1(jnp.broadcast_to(sigma, here.shape))[..., None]

    def clean_from_score(self, log_score: jax.Array, sigma: jax.Array) -> jax.Array:
        """log r from any log score of a masked token, its mask column (if there) left out. Float[... V].

        A free score is normalised: what it says of the total rate is not seen.
        """
        return jax.nn.log_softmax(log_score[..., : self.vocab_size], axis=-1)

    def tightened(self, log_score: jax.Array, sigma: jax.Array) -> jax.Array:
        """A free log score of masked tokens with the true normaliser, sum s = 1 / (e^sigma - 1). Float[... V].

        Its score entropy is never above the free one's, for any x0: less by w (Z - 1 - log Z), where Z is what the
        normaliser is off (Ou et al., arXiv 2406.03736, theorem 1, has the true one).
        """
        return self.log_score(self.clean_from_score(log_score, sigma), jnp.zeros(log_score.shape[:-1]), sigma)

    def rate(self, log_clean: jax.Array, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """The reverse rates pi_x s_y per unit sigma. Float[... V]; SEDD, equation 3."""
        here = jnp.zeros(x.shape, log_clean.dtype)
        return jnp.where(self.movable(x)[..., None], jnp.exp(self.log_score(log_clean, here, sigma)), 0.0)

    def tweedie(self, log_clean: jax.Array, x: jax.Array, sigma: jax.Array, sigma_next: jax.Array) -> Jump:
        """The exact posterior step of each token from sigma down to sigma_next; SEDD, equation 19."""
        revealed = jnp.exp(-sigma_next) * jnp.expm1(sigma_next - sigma) / jnp.expm1(-sigma)
        return Jump(jnp.where(self.movable(x), revealed, 0.0), log_clean)

    def score_entropy(self, stats: ScoreStats, x: jax.Array, x0: jax.Array, sigma: jax.Array) -> jax.Array:
        """The score entropy in nats per unit sigma, 0 where x is no mask. Float[...]; SEDD, equation 10.

        It is w = 1 / (e^sigma - 1) times the `cross_entropy`.
        """
        return jnp.where(x == self.mask, jnp.exp(-log_expm1(sigma)) * self.cross_entropy(stats, x, sigma), 0.0)

    def cross_entropy(self, stats: ScoreStats, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """The score entropy over its weight w = 1 / (e^sigma - 1), in nats, 0 where x is no mask. Float[...].

        With c = log(sum s / w) it is (log sum s - log s_x0) + (e^c - 1 - c): the cross-entropy of the normalised score,
        and what its normaliser is off. Both parts are positive.
        """
        masked = x == self.mask
        excess = jnp.where(masked, stats.log_sum + log_expm1(sigma), 0.0)
        return jnp.where(masked, (stats.log_sum - stats.target) + (jnp.expm1(excess) - excess), 0.0)

    def prior_divergence(self, sigma: float) -> float:
        """KL(q_sigma(. | x0) || pi) of a token, nats: infinite until every token is masked."""
        return 0.0 if math.exp(-sigma) == 0 else math.inf

    def reconstruction(self, stats: ScoreStats, x: jax.Array, x0: jax.Array, sigma: jax.Array) -> jax.Array:
        """-log of the chance that one step from sigma to 0 gives x0. Float[...], nats."""
        return jnp.where(x == self.mask, stats.log_sum - stats.target, 0.0)


@dataclasses.dataclass(frozen=True)
class Uniform(Process):
    """Every token is in the end uniformly random over the V tokens (SEDD, equation 15, over V)."""

    @property
    def num_states(self):
        return self.vocab_size

    def stationary(self):
        return jnp.full(self.num_states, 1 / self.num_states)

    def _noise(self, sites):
        return keyed_random.integers(sites, self.vocab_size)

    def movable(self, x: jax.Array) -> jax.Array:
        """Whether the reverse process can still change a token: always. Int[...] -> Bool[...]."""
        return jnp.ones(x.shape, bool)

    def mask_tokens(self, x: jax.Array, where: jax.Array) -> jax.Array:
        """x as it is: a Denoiser never sees the token that it is asked about. Int[...], Bool[...] -> Int[...]."""
        return x

    def redraw(self, log_clean: jax.Array, sigma: jax.Array) -> Jump:
        """A draw of a token from m, its law given the others. Float[... V] -> Jump."""
        return Jump(jnp.ones(log_clean.shape[:-1], log_clean.dtype), self.log_noised(log_clean, sigma))

    def barker(self, log_clean: jax.Array, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """Rates s_y / (1 + s_y) / V, 0 at y = x, in balance with p_sigma; less than 1 in all. Float[... V].

        Any rates g(s) with g(s) = s g(1/s) are: Barker's of Zhao et al., arXiv 2407.21243, section 3.
        """
        here = jnp.take_along_axis(log_clean, x[..., None], axis=-1)[..., 0]
        rates = jax.nn.sigmoid(self.log_score(log_clean, here, sigma)) / self.vocab_size
        return jnp.where(jax.nn.one_hot(x, self.vocab_size, dtype=bool), 0.0, rates)

    def log_transition(self, x: jax.Array, x0: jax.Array, sigma: jax.Array) -> jax.Array:
        """log q(x | x0) at noise sigma. Float[...]."""
        other = -jnp.expm1(-sigma) / self.vocab_size
        return jnp.log(jnp.where(x == x0, jnp.exp(-sigma) + other, other))

    def log_noised(self, log_clean, sigma):
        return self._log_mixed(log_clean, jnp.broadcast_to(sigma, log_clean.shape[:-1])[..., None])

    def log_score(self, log_clean: jax.Array, here: jax.Array, sigma: jax.Array) -> jax.Array:
        """log s_y = log (m_y / m_x), 0 at y = x. Float[... V]. Pointwise in the columns; here: log r_x, Float[...].

        Near 0 it is the log1p of the relative difference: at much noise all scores are close to 1, and what a
        network knows is in what they lack of it.
        """
        sigma, here = jnp.broadcast_to(sigma, here.shape)[..., None], here[..., None]
        log_there, log_here = self._log_mixed(log_clean, sigma), self._log_mixed(here, sigma)
        change = jnp.exp(-sigma - log_here) * (jnp.exp(log_clean) - jnp.exp(here))
        near = jnp.abs(change) < 0.5
        return jnp.where(near, jnp.log1p(jnp.where(near, change, 0.0)), jnp.where(near, 0.0, log_there - log_here))

    def clean_from_score(self, log_score: jax.Array, sigma: jax.Array) -> jax.Array:
        """log r from any log score, with 0 at the current token, cut at 0 and normalised. Float[... V].

        m = s / sum s and r = (m - (1 - alpha) / V) / alpha; a free score may lie outside of the simplex.
        """
        sigma = jnp.broadcast_to(sigma, log_score.shape[:-1])[..., None]
        alpha = jnp.exp(-sigma)
        excess = jnp.expm1(log_score)  # s - 1: at much noise the information is in what s lacks of 1
        mean = jnp.mean(excess, axis=-1, keepdims=True)
        noisy = alpha * (1 + mean) + (excess - mean)
        clear = jnp.exp(log_score) + jnp.expm1(-sigma) * (1 + mean)
        weight = jnp.maximum(jnp.where(alpha > 0.5, clear, noisy), 0.0)
        return jnp.log(weight) - jnp.log(jnp.sum(weight, axis=-1, keepdims=True))

    def tightened(self, log_score: jax.Array, sigma: jax.Array) -> jax.Array:
        """A free log score cut, state by state, to what a ratio can be. Float[... V].

        That is [rho, 1 / rho], rho = (1 - alpha) / (V alpha + 1 - alpha). Its score entropy is never above the free
        one's, for any x and x0: the true ratio of one x0 is rho, 1 or 1 / rho, and s - a log s is convex in s with its
        least value at a. `clean_from_score` can be worse.
        """
        odds = self._odds(jnp.broadcast_to(sigma, log_score.shape[:-1])[..., None])
        return jnp.clip(log_score, -jnp.log1p(odds), jnp.log1p(odds))

    def rate(self, log_clean: jax.Array, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """The reverse rates pi_x s_y per unit sigma, 0 at y = x. Float[... V]; SEDD, equation 3."""
        current = jax.nn.one_hot(x, self.vocab_size, dtype=bool)
        here = jnp.take_along_axis(log_clean, x[..., None], axis=-1)[..., 0]
        score = jnp.exp(self.log_score(log_clean, here, sigma))
        return jnp.where(current, 0.0, score / self.vocab_size)

    def tweedie(self, log_clean: jax.Array, x: jax.Array, sigma: jax.Array, sigma_next: jax.Array) -> Jump:
        """The exact posterior step of each token from sigma down to sigma_next; SEDD, equation 19.

        p(y) = q(x | y) m_y / m_x, q from sigma_next to sigma, m_y at sigma_next, m_x at sigma: for y != x a product
        of positive numbers, whose sum is taken without the term at x.
        """
        current = jax.nn.one_hot(x, self.vocab_size, dtype=bool)
        sigma = jnp.broadcast_to(sigma, x.shape)
        sigma_next = jnp.broadcast_to(sigma_next, x.shape)
        here = jnp.take_along_axis(log_clean, x[..., None], axis=-1)[..., 0]
        elsewhere = jnp.sum(jnp.where(current, 0.0, jnp.exp(log_clean)), axis=-1)
        share = (self.vocab_size - 1) / self.vocab_size
        moved = jnp.exp(-sigma_next) * elsewhere - jnp.expm1(-sigma_next) * share
        through = -jnp.expm1(sigma_next - sigma) / self.vocab_size
        p_move = through * moved * jnp.exp(-self._log_mixed(here, sigma))
        return Jump(p_move, jnp.where(current, -jnp.inf, self._log_mixed(log_clean, sigma_next[..., None])))

    def score_entropy(self, stats: ScoreStats, x: jax.Array, x0: jax.Array, sigma: jax.Array) -> jax.Array:
        """The score entropy in nats per unit sigma. Float[...]; SEDD, equation 10.

        It is (1/V) sum_{y != x} [s_y - rho_y - rho_y log(s_y / rho_y)] with the true ratios rho_y = q(y|x0) / q(x|x0):
        all rho < 1 where x = x0; else 1 / rho at x0 and 1 elsewhere. In that grouping nothing of the size of the
        answer cancels, down to noise where rho is 1e-11.
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

    def prior_divergence(self, sigma: float) -> float:
        """KL(q_sigma(. | x0) || pi) of a token, nats."""
        alpha, others = math.exp(-sigma), self.vocab_size - 1
        at_x0 = (1 + alpha * others) / self.vocab_size
        return at_x0 * math.log1p(alpha * others) + (1 - at_x0) * math.log1p(-alpha)

    def reconstruction(self, stats: ScoreStats, x: jax.Array, x0: jax.Array, sigma: jax.Array) -> jax.Array:
        """-log of the chance that one step from sigma to 0 gives x0. Float[...], nats.

        The step is p(v) ~ m_v q(x | v), a law for any score; Tweedie's has r_v for m_v, which differs by O(sigma).
        """
        odds = self._odds(sigma)
        log_total = jnp.logaddexp(jnp.log1p(odds), stats.log_sum)
        return log_total - jnp.where(x == x0, jnp.log1p(odds), stats.target)

    def _odds(self, sigma: jax.Array) -> jax.Array:
        """V alpha / (1 - alpha): q(x | x) = (1 + odds) q(x | v)."""
        return self.vocab_size * jnp.exp(-sigma) / -jnp.expm1(-sigma)

    def _log_mixed(self, log_clean: jax.Array, sigma: jax.Array) -> jax.Array:
        """log (alpha r + (1 - alpha) / V), pointwise; sigma broadcasts to log_clean."""
        return jnp.logaddexp(log_clean - sigma, jnp.log(-jnp.expm1(-sigma)) - math.log(self.vocab_size))


def log_expm1(sigma: jax.Array) -> jax.Array:
    """log(e^sigma - 1), without overflow."""
    return sigma + jnp.log(-jnp.expm1(-sigma))
