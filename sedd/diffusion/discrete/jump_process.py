"""The interface of the forward jump processes and of their reversal, as samplers, losses and bounds use it.

Per token every process is "resample from pi": dp/dsigma = Q p with Q = pi 1^T - I, so that at total noise sigma

    q(y | v) = alpha [y = v] + (1 - alpha) pi_y,   alpha = exp(-sigma).

With r, the Denoiser's distribution of the clean token, the distribution of a noisy token given the other noisy tokens
is m = alpha r + (1 - alpha) pi; the concrete score is s_y = m_y / m_x, the reverse rate pi_x s_y.

All methods are pointwise: x is Int[...], log_clean is Float[... V], sigma broadcasts to x, and the result has the dtype
of log_clean or sigma. Tokens are 0 .. V - 1; the mask, where there is one, is V.
"""

import abc
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random
from sedd.diffusion.discrete.score import Columns, ScoreStats


class Jump(NamedTuple):
    """One step of a token in two stages: whether it moves, then where to. Always a valid distribution."""

    p_move: jax.Array  # Float[...]
    log_dest: jax.Array  # Float[... V], unnormalised


@dataclasses.dataclass(frozen=True)
class Process(abc.ABC):
    """A forward process and the closed forms of its reversal. vocab_size: V, the number of clean tokens."""

    vocab_size: int
    over_latents = False  # what diffuses is tokens

    def __post_init__(self):
        if self.vocab_size < 2:
            raise ValueError(f"{type(self).__name__}: vocab_size must be at least 2, not {self.vocab_size}")

    @property
    @abc.abstractmethod
    def num_states(self) -> int:
        """S, the number of states of a token."""

    @property
    def mask_id(self) -> int | None:
        """The id of the mask, the state that no clean token has; None for a process without one."""
        return None

    @abc.abstractmethod
    def stationary(self) -> jax.Array:
        """pi, the stationary distribution. Float[S]."""

    def rate_matrix(self) -> jax.Array:
        """The rate matrix Q, for tests and teaching; columns sum to 0. Float[S S]."""
        return self.stationary()[:, None] - jnp.eye(self.num_states)

    def transition_matrix(self, sigma: jax.Array | float) -> jax.Array:
        """q(y | v) in row y, column v, for tests and teaching: exp(sigma Q). Float[S S]."""
        return jnp.exp(-sigma) * jnp.eye(self.num_states) - jnp.expm1(-sigma) * self.stationary()[:, None]

    def corrupt(self, keys: jax.Array, x0: jax.Array, sigma: jax.Array) -> jax.Array:
        """Draws x from q(x | x0) at noise sigma. Key[B], Int[B L] -> Int32[B L]; SEDD, equations 13 and 14."""
        keys = keyed_random.position_keys(keys, jnp.arange(x0.shape[-1]))
        corrupted = keyed_random.bernoulli(keyed_random.fold(keys, 0), -jnp.expm1(-jnp.broadcast_to(sigma, x0.shape)))
        return jnp.where(corrupted, self._noise(keyed_random.fold(keys, 1)), x0.astype(jnp.int32))

    def prior(self, keys: jax.Array, length: int) -> jax.Array:
        """Draws every token from pi. Key[B] -> Int32[B length]."""
        return self._noise(keyed_random.position_keys(keys, jnp.arange(length)))

    @abc.abstractmethod
    def _noise(self, keys: jax.Array) -> jax.Array:
        """Draws from pi, one token a key. Key[B L] -> Int32[B L]."""

    @abc.abstractmethod
    def movable(self, x: jax.Array) -> jax.Array:
        """True where the reverse process can still change a token. Int[...] -> Bool[...]."""

    @abc.abstractmethod
    def mask_tokens(self, x: jax.Array, where: jax.Array) -> jax.Array:
        """x prepared so that a Denoiser can be evaluated at the positions `where`. Int[...], Bool[...] -> Int[...]."""

    @abc.abstractmethod
    def log_transition(self, x: jax.Array, x0: jax.Array, sigma: jax.Array) -> jax.Array:
        """log q(x | x0) at noise sigma. Float[...]."""

    @abc.abstractmethod
    def log_noised(self, log_clean: jax.Array, sigma: jax.Array) -> jax.Array:
        """log m, the distribution of a noisy token given the others. Float[... V] -> Float[... S]."""

    @abc.abstractmethod
    def log_posterior(self, log_clean: jax.Array, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """log p(x0 = v | x), the distribution of a clean token given all noisy ones, its own included. Float[... V]."""

    @abc.abstractmethod
    def log_score(self, log_clean: jax.Array, here: jax.Array, sigma: jax.Array) -> jax.Array:
        """log s_y for the clean tokens y, pointwise in the columns; here: log r of the current token.

        Float[... V], Float[...] -> Float[... V].
        """

    def score_from_logits(self, logits: jax.Array, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """The unnormalised log score of all states that a network's logits stand for, 0 at the current token.

        Float[... S], Int[...], Float[...] -> Float[... S].
        """
        return jnp.where(jax.nn.one_hot(x, self.num_states, dtype=bool), 0.0, logits)

    @abc.abstractmethod
    def clean_from_score(self, log_score: jax.Array, sigma: jax.Array) -> jax.Array:
        """log r from any log score, unnormalised ones too. Float[... V] -> Float[... V]."""

    @abc.abstractmethod
    def tightened(self, log_score: jax.Array, sigma: jax.Array) -> jax.Array:
        """An unnormalised log score, changed so that its score entropy is never larger, for any x0. Float[... V]."""

    @abc.abstractmethod
    def stats_of_clean(
        self, columns: Columns, x: jax.Array, x0: jax.Array, sigma: jax.Array, lost: jax.Array | float = 0.0
    ) -> ScoreStats:
        """The statistics of the score that r implies, of log weights whose softmax is r: those of `columns`.

        lost: Float[...], subtracted from the weight of the column x. x, x0: Int[...]; sigma: Float[...].
        """

    @abc.abstractmethod
    def stats_of_score(
        self, columns: Columns, x: jax.Array, x0: jax.Array, sigma: jax.Array, tightened: bool = False
    ) -> ScoreStats:
        """The statistics of `score_from_logits` of the columns, or of `tightened` of that. Arguments as above."""

    @abc.abstractmethod
    def log_posterior_at(
        self, columns: Columns, x: jax.Array, x0: jax.Array, sigma: jax.Array, discount: float = 1.0
    ) -> jax.Array:
        """log p(x0 | x) of log weights whose softmax is r, with the token's own evidence. Float[...].

        discount: the odds of the evidence are divided by it. Arguments else as above.
        """

    @abc.abstractmethod
    def reverse_rate(self, log_clean: jax.Array, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """The reverse rates pi_x s_y per unit sigma, 0 at y = x. Float[... V]; SEDD, equation 3."""

    @abc.abstractmethod
    def tweedie(self, log_clean: jax.Array, x: jax.Array, sigma: jax.Array, sigma_next: jax.Array) -> Jump:
        """The exact posterior step of each token from sigma down to sigma_next; SEDD, equation 19."""

    @abc.abstractmethod
    def gibbs(self, log_clean: jax.Array, sigma: jax.Array) -> Jump:
        """Redraws a token from m, its distribution given the others. Float[... V] -> Jump."""

    @abc.abstractmethod
    def score_entropy(self, stats: ScoreStats, x: jax.Array, x0: jax.Array, sigma: jax.Array) -> jax.Array:
        """The score entropy in nats per unit sigma. Float[...]; SEDD, equation 10."""

    @abc.abstractmethod
    def prior_divergence(self, sigma: float) -> float:
        """KL(q_sigma(. | x0) || pi) of a token, nats."""

    @abc.abstractmethod
    def reconstruction(self, stats: ScoreStats, x: jax.Array, x0: jax.Array, sigma: jax.Array) -> jax.Array:
        """-log p(x0 | x) of one step from sigma to 0, nats. Float[...]."""
