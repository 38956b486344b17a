"""Distributions with known exact posteriors, and the statistics that test draws against them.

`Joint` holds a distribution over all V^L sequences; its results are enumerated, its noise is a matrix exponential.
`MarkovChain` has the exact posteriors of the absorbing process at any length. Distributions over sequences are vectors,
in the order of `states`.
"""

import dataclasses
import functools
import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import scipy.integrate
import scipy.linalg
import scipy.special
import scipy.stats

from sedd.diffusion import keyed_random
from sedd.diffusion.denoiser import clamped
from sedd.diffusion.discrete.process import Absorbing
from sedd.diffusion.discrete.samplers import Trapezoidal, halves
from sedd.diffusion.discrete.score import ScoreStats


def states(num_states, length):
    """Every sequence of `length` states, in the order of `index`. Int[S^L L]."""
    return np.indices((num_states,) * length).reshape(length, -1).T


def index(x, num_states):
    """The index of each sequence among all sequences. Int[... L] -> Int[...]."""
    return np.asarray(x) @ num_states ** np.arange(np.shape(x)[-1])[::-1]


def completions(tokens, free, num_states):
    """Every way to fill in the free positions of one row. Int[L], Bool[L] -> Int[S^free L]."""
    x0 = np.tile(tokens, (num_states ** free.sum(), 1))
    x0[:, free] = states(num_states, free.sum())
    return x0


def changed(num_states, length):
    """Every sequence with each of its positions set to each state. Int[S^L L S L]."""
    at, y = np.eye(length, dtype=bool)[:, None], np.arange(num_states)[:, None]
    return np.where(at, y, states(num_states, length)[:, None, None])


def channel(process, sigma, length=1):
    """q_sigma(x | x0) of whole sequences, x0 over clean ones: expm(sigma Q) at each position. Float[V^L S^L]."""
    pi = np.zeros(process.num_states)
    pi[process.vocab_size :] = 1.0  # the mask, if there is one
    pi = pi if pi.any() else pi + 1 / pi.size
    q = scipy.linalg.expm(sigma * (pi[:, None] - np.eye(pi.size)))[:, : process.vocab_size]
    return functools.reduce(np.kron, [q.T] * length)


@dataclasses.dataclass(frozen=True, eq=False)
class Joint:
    """A distribution over sequences of clean tokens. p: Float[V ... V], one axis for each position."""

    p: np.ndarray

    @classmethod
    def random(cls, vocab_size=3, length=3, seed=0):
        """A random distribution with dependent tokens."""
        weights = np.exp(np.random.default_rng(seed).normal(size=(vocab_size,) * length))
        return cls(weights / weights.sum())

    def independent(self):
        """The product of the marginals: the same marginals, independent tokens."""
        axes = range(self.p.ndim)
        marginals = [self.p.sum(tuple(j for j in axes if j != i)) for i in axes]
        return Joint(functools.reduce(np.multiply.outer, marginals))

    def noisy_distribution(self, process, sigma):
        """p_sigma over all noisy sequences. Float[S^L]."""
        return self.p.ravel() @ channel(process, sigma, self.p.ndim)

    def score(self, process, sigma):
        """The concrete scores p_sigma(x with x_i := y) / p_sigma(x), at every x. Float[S^L L S]."""
        p, num_states = self.noisy_distribution(process, sigma), process.num_states
        return p[index(changed(num_states, self.p.ndim), num_states)] / p[:, None, None]

    def conditional(self, tokens, free):
        """The conditional distribution given the tokens that are not free. Int[... L], Bool[... L] -> [... V^L]."""
        x = states(len(self.p), self.p.ndim)
        agree = np.all(np.asarray(free)[..., None, :] | (x == np.asarray(tokens)[..., None, :]), axis=-1)
        weights = agree * self.p.ravel()
        return weights / weights.sum(-1, keepdims=True)

    def nll(self, x0, free=True):
        """-log p(the free tokens given the others). Int[B L], Bool[B L] -> Float[B]."""
        p = self.conditional(x0, np.broadcast_to(free, np.shape(x0)))
        return -np.log(np.take_along_axis(p, index(x0, len(self.p))[:, None], axis=-1)[:, 0])

    def draw(self, rows, seed=0):
        """Draws clean sequences. Int[rows L]."""
        chosen = np.random.default_rng(seed).choice(self.p.size, rows, p=self.p.ravel())
        return states(len(self.p), self.p.ndim)[chosen]

    @functools.cache  # noqa: B019, a small number of instances
    def denoiser(self, process):
        """The exact Denoiser for any x, at every sigma including 0 and infinity."""
        return self.denoiser_given(process, False)

    def denoiser_given(self, process, given):
        """The exact Denoiser conditioned on which tokens are given, and so clean at every sigma. given: Bool[B L]."""
        return lambda x, sigma, positions=None: self._log_clean(process, given, x, sigma, positions)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def _log_clean(self, process, given, x, sigma, positions):
        length = x.shape[-1]
        noise = jnp.where(given, 0.0, sigma[:, None])
        if isinstance(process, Absorbing):  # the likelihood of a token, up to a factor, does not depend on sigma
            noise = jnp.ones_like(noise)
        likelihood = jax.vmap(jax.vmap(lambda x, sigma: process.transition_matrix(sigma)[x]))
        likelihood = likelihood(x, jnp.broadcast_to(noise, x.shape))[..., : process.vocab_size]  # q(x_j | v), [B L V]

        def without(i):
            others = [term for j in range(length) if j != i for term in (likelihood[:, j], [length, j])]
            return jnp.einsum(jnp.asarray(self.p, likelihood.dtype), list(range(length)), *others, [length, i])

        weights = jnp.stack([without(i) for i in range(length)], axis=1)
        if positions is not None:
            weights = jnp.take_along_axis(weights, positions[..., None], axis=1)
        return jnp.log(weights / weights.sum(-1, keepdims=True))

    def expectation(self, process, stats_fn, term):
        """sigma -> the exact mean over x of a row's sum of term(stats, x, x0, sigma), for each x0. Float[... V^L].

        Leading axes of the statistics are kept.
        """
        length, clean = self.p.ndim, states(process.vocab_size, self.p.ndim)
        x = jnp.tile(states(process.num_states, length), (len(clean), 1))
        x0 = jnp.repeat(clean, len(x) // len(clean), axis=0)

        @jax.jit
        def terms(sigma):
            row_sums = term(stats_fn(x, jnp.full(len(x), sigma), x0), x, x0, sigma).sum(-1)
            return row_sums.reshape(*row_sums.shape[:-1], len(clean), -1)

        return lambda sigma: np.sum(channel(process, sigma, length) * np.asarray(terms(sigma)), axis=-1)

    def posterior(self, process, sigma):
        """p(x0_i = v | x), the token's own noisy state included, at every x. Float[S^L L V]."""
        one_hot = np.eye(process.vocab_size)[states(process.vocab_size, self.p.ndim)]
        weights = self.p.ravel()[:, None] * channel(process, sigma, self.p.ndim)
        return np.einsum("kx,kiv->xiv", weights / weights.sum(0), one_hot)

    def bound_gap(self, process, stats_fn, low, high):
        """The bound of each x0 less its -log p, with the joint reconstruction from `low`. Float[V^L].

        The prior is against the exact distribution at `high`, so that of exact scores the gap is 0.
        """
        at_low, at_high = channel(process, low, self.p.ndim), channel(process, high, self.p.ndim)
        prior = scipy.special.rel_entr(at_high, self.noisy_distribution(process, high)).sum(-1)
        posterior = self.p.reshape(-1, 1) * at_low / self.noisy_distribution(process, low)
        reconstruction = -scipy.special.xlogy(at_low, posterior).sum(-1)
        return prior + self.integral(process, stats_fn, low, high) + reconstruction + np.log(self.p.ravel())

    def integral(self, process, stats_fn, low, high, nodes=96):
        """The mean score entropy of each x0, integrated over sigma by quadrature in its logarithm. Float[... V^L]."""
        entropy = self.expectation(process, stats_fn, process.score_entropy)
        at, weights = np.polynomial.legendre.leggauss(nodes)
        half = np.log(high / low) / 2
        sigmas = low * np.exp(half * (at + 1))
        return sum(half * weight * sigma * entropy(sigma) for weight, sigma in zip(weights, sigmas, strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class MarkovChain:
    """A Markov chain of any length. start: Float[V]; step: Float[V V], the next token's distribution in each row."""

    start: np.ndarray
    step: np.ndarray

    @classmethod
    def random(cls, vocab_size=3, seed=0):
        """A random chain with strongly dependent tokens."""
        weights = np.exp(2 * np.random.default_rng(seed).normal(size=(1 + vocab_size, vocab_size)))
        weights /= weights.sum(-1, keepdims=True)
        return cls(weights[0], weights[1:])

    @classmethod
    def peaked(cls, vocab_size=27, seed=0):
        """A chain with a small number of likely next tokens, started in its stationary distribution."""
        step = np.random.default_rng(seed).dirichlet(np.full(vocab_size, 0.05), vocab_size)
        start = np.linalg.matrix_power(step, 2**12)[0]
        return cls(start / start.sum(), step)

    def draw(self, length, seed=0):
        """Draws one sequence. Int[length]."""
        rng = np.random.default_rng(seed)
        x = [rng.choice(len(self.start), p=self.start)]
        while len(x) < length:
            x.append(rng.choice(len(self.start), p=self.step[x[-1]]))
        return np.array(x)

    def nll(self, x0):
        """-log p of one sequence, Int[L]. Float[]."""
        return -np.log(self.start[x0[0]]) - np.log(self.step[x0[:-1], x0[1:]]).sum()

    def joint(self, length):
        """The joint distribution of its first `length` tokens."""
        p = self.start
        for _ in range(length - 1):
            p = p[..., None] * self.step
        return Joint(p)

    @functools.partial(jax.jit, static_argnums=0)
    def denoiser(self, x, sigma, positions=None):
        """The exact Denoiser of the absorbing process, by the forward-backward algorithm."""
        vocab_size = len(self.start)
        likelihood = jnp.where(x[..., None] == vocab_size, 1.0, jax.nn.one_hot(x, vocab_size)).swapaxes(0, 1)  # [L B V]

        def messages(step, start, likelihood):
            def pass_on(message, likelihood):
                after = (message * likelihood) @ step
                return after / after.sum(-1, keepdims=True), message

            return jax.lax.scan(pass_on, jnp.broadcast_to(start, likelihood.shape[1:]), likelihood)[1]

        start, step = jnp.asarray(self.start), jnp.asarray(self.step)
        weights = messages(step, start, likelihood) * messages(step.T, jnp.ones_like(start), likelihood[::-1])[::-1]
        log_clean = jnp.log(weights / weights.sum(-1, keepdims=True)).swapaxes(0, 1)
        return log_clean if positions is None else jnp.take_along_axis(log_clean, positions[..., None], axis=1)


def random_tables(networks, length, vocab_size=3, seed=0):
    """Random logits for each position of each partly masked sequence. Float[networks S^L L V]."""
    shape = (networks, (vocab_size + 1) ** length, length, vocab_size)
    return np.random.default_rng(seed).normal(size=shape)


def table_denoiser(table):
    """The Denoiser of such a table, sharper at higher noise, whose likelihoods depend on the order of decoding."""

    def denoiser(x, sigma, positions=None):
        place = (table.shape[-1] + 1) ** jnp.arange(x.shape[-1])[::-1]
        log_clean = jax.nn.log_softmax(jnp.asarray(table, float)[x @ place] * (1 + sigma[:, None, None]), axis=-1)
        return log_clean if positions is None else jnp.take_along_axis(log_clean, positions[..., None], axis=1)

    return denoiser


def table_log_clean(table, x):
    """log r of one row by `table_denoiser`, conditioned on its own mask ratio. Int[L] -> Float[L V]."""
    mask = table.shape[-1]
    ratio = (max(np.sum(x == mask), 1) - 0.5) / len(x)
    logits = table[index(x, mask + 1)] * (1 - np.log(1 - ratio))
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def log_likelihood_along(table, x0, order):
    """The log-likelihood of a row's positions under `table_denoiser`, unmasked in the given order."""
    x, total = np.array(x0), 0.0
    x[list(order)] = table.shape[-1]
    for i in order:
        total += table_log_clean(table, x)[i, x0[i]]
        x[i] = x0[i]
    return total


def log_likelihoods_of_orders(table, x0, positions):
    """The log-likelihood along each order of the positions. Float[n!]."""
    return np.array([log_likelihood_along(table, x0, order) for order in itertools.permutations(positions)])


def scaled(process, stats_fn, factor):
    """The StatsFn of scores that are wrong by a factor, for controls."""

    def stats(x, sigma, x0):
        exact, shift = stats_fn(x, sigma, x0), jnp.log(factor)
        others = process.vocab_size - (x < process.vocab_size)
        target = jnp.where(x == x0, 0.0, exact.target + shift)
        return ScoreStats(exact.log_sum + shift, exact.sum_log + others * shift, target)

    return stats


@functools.partial(jax.jit, static_argnames="num_states")
def kernel(jump, x, num_states):
    """The transition matrix of one factorised step. Jump of Float[K L], Int[K L] -> Float[K S^L], rows sum to 1."""
    moves = jump.p_move[..., None]
    arrives = jnp.where(moves > 0, moves * jax.nn.softmax(jump.log_dest), 0.0)
    arrives = jnp.pad(arrives, [(0, 0), (0, 0), (0, num_states - arrives.shape[-1])])
    token = (1 - moves) * jax.nn.one_hot(x, num_states) + arrives
    return functools.reduce(lambda left, right: jax.vmap(jnp.kron)(left, right), token.swapaxes(0, 1))


def sampler_distribution(sampler, denoiser, tokens, free=True, correct=lambda p, sigma: p):
    """A grid sampler's exact distribution, in float64. Int[L], Bool[L] -> Float[S^L].

    correct: applied to the distribution after each step but the last.
    """
    with jax.enable_x64(True):
        tokens, free = jnp.asarray(tokens), jnp.broadcast_to(jnp.asarray(free), np.shape(tokens))
        x = jnp.asarray(states(sampler.process.num_states, len(tokens)))
        p = jnp.prod(jnp.where(free, sampler.process.stationary()[x], x == tokens), axis=-1)
        plan, any_steps = sampler.plan(None, free), dataclasses.replace(sampler, steps=1)
        for k in range(sampler.steps):
            entry = jax.tree.map(operator.itemgetter(k), plan)
            p = p @ step_matrix(any_steps, denoiser, entry, tokens, free)
            p = p if k == sampler.steps - 1 else correct(p, entry.sigma_next)
        return np.asarray(p)


@functools.partial(jax.jit, static_argnames=("sampler", "denoiser"))
def step_matrix(sampler, denoiser, entry, tokens, free):
    """The transition matrix of one step of a grid sampler. Int[L], Bool[L] -> Float[S^L S^L], rows sum to 1."""
    num_states, clamped_denoiser = sampler.process.num_states, clamped(denoiser, tokens, free)
    x = jnp.asarray(states(num_states, len(tokens)))

    def log_clean(entry):
        return clamped_denoiser(x, jnp.full(len(x), entry.sigma), None)

    def matrix(jump):
        return kernel(jump._replace(p_move=jnp.where(free, jump.p_move, 0.0)), x, num_states)

    def one_stage(entry):
        return matrix(sampler.jump(log_clean(entry), x, entry))

    def two_stages(entry):  # the second stage depends on the first stage's start and on its end
        first, second = halves(entry)
        start, middle = log_clean(first), log_clean(second)

        def second_stage(log_clean_at_start):
            before = jnp.broadcast_to(log_clean_at_start, middle.shape)
            return matrix(sampler.second_jump(before, middle, x, second))

        return jnp.einsum("xm,xmy->xy", matrix(sampler.jump(start, x, first)), jax.vmap(second_stage)(start))

    stages = two_stages if isinstance(sampler, Trapezoidal) else one_stage
    return jax.lax.cond(entry.sigma_next > 0, stages, one_stage, entry)


def reverse_distribution(process, rates, length, low, high, steps=150):
    """The distributions at noise `low` of reverse processes from pi at `high`, by a Runge-Kutta ODE in log sigma.

    rates(sigma): Float[N S^L L V], of N models from each sequence to each with one token changed. Float[N S^L].
    """
    x, width = states(process.num_states, length), np.log(high / low) / steps
    arrives = np.eye(len(x))[index(changed(process.num_states, length)[:, :, : process.vocab_size], process.num_states)]

    def flow(p, place):
        sigma = high * jnp.exp(-width * place)
        moved = width * sigma * rates(sigma) * p[..., None, None]
        return jnp.einsum("nxiv,xivy->ny", moved, arrives) - moved.sum((-2, -1))

    def step(k, p):
        first = flow(p, k)
        second = flow(p + first / 2, k + 0.5)
        third = flow(p + second / 2, k + 0.5)
        return p + (first + 2 * second + 2 * third + flow(p + third, k + 1)) / 6

    start = jnp.broadcast_to(process.stationary()[x].prod(-1), rates(high).shape[:2])
    return jax.lax.fori_loop(0, steps, step, start)


def by_time(k, n, eps=0.01, low=0.05):
    """The weight of the cross-entropy of k certain masks of a block of n tokens, at a uniform time t from `low` to 1.

    Each is masked with probability (1 - eps) t, and weighs 1 / t.
    """

    def at(t):
        return ((1 - eps) * t) ** k * (1 - (1 - eps) * t) ** (n - k) / t

    return scipy.integrate.quad(at, low, 1)[0] / (1 - low)


def row_keys(rows):
    """The keys of this number of rows. Key[rows]."""
    return keyed_random.row_keys(jax.random.key(0), jnp.arange(rows))


def gap(left, right):
    """The largest absolute difference."""
    return np.abs(np.asarray(left) - np.asarray(right)).max()


def total_variation(p, q):
    """The total variation distance of two distributions."""
    return np.abs(p - q).sum() / 2


def standard_errors(values):
    """The mean of independent draws divided by its standard error."""
    values = np.asarray(values, np.float64)
    return values.mean() / values.std(ddof=1) * len(values) ** 0.5


def p_value(indices, p):
    """The p-value of Pearson's chi-square test of indices against p; cells with expectation below 5 are pooled."""
    seen, p = np.bincount(np.ravel(indices), minlength=len(p)), np.asarray(p)
    due = p * seen.sum()
    rare = due < 5
    seen, due = (np.append(cells[~rare], cells[rare].sum()) for cells in (seen, due))
    if due[-1] < 1e-6:
        if seen[-1] > 0:
            return 0.0  # an impossible draw
        seen, due = seen[:-1], due[:-1]
    return scipy.stats.chi2.sf(np.sum((seen - due) ** 2 / due), max(len(due) - 1, 1))
