"""Laws whose exact answers are known, and the statistics that hold draws against them.

`Joint` holds a law over all V^L sequences and answers by enumeration, its noise a matrix exponential; `MarkovChain`
answers for the absorbing process at any length. Laws over sequences are vectors, in the order of `states`.
"""

import dataclasses
import functools
import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.stats

from sedd.diffusion.process import Absorbing
from sedd.diffusion.samplers import Trapezoidal, halves
from sedd.diffusion.score import ScoreStats, clamped


def states(num_states, length):
    """Every sequence of so many states, in the order of their indices. Int[S^L L]."""
    return np.indices((num_states,) * length).reshape(length, -1).T


def index(x, num_states):
    """The index of each sequence among all. Int[... L] -> Int[...]."""
    return np.asarray(x) @ num_states ** np.arange(np.shape(x)[-1])[::-1]


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
    """A law over sequences of clean tokens. p: Float[V ... V], an axis a position."""

    p: np.ndarray

    @classmethod
    def random(cls, vocab_size=3, length=3, seed=0):
        """A law in which the tokens depend on each other."""
        weights = np.exp(np.random.default_rng(seed).normal(size=(vocab_size,) * length))
        return cls(weights / weights.sum())

    def independent(self):
        """The law with the same marginals, whose tokens do not depend on each other."""
        axes = range(self.p.ndim)
        marginals = [self.p.sum(tuple(j for j in axes if j != i)) for i in axes]
        return Joint(functools.reduce(np.multiply.outer, marginals))

    def law(self, process, sigma):
        """p_sigma over all noisy sequences. Float[S^L]."""
        return self.p.ravel() @ channel(process, sigma, self.p.ndim)

    def score(self, process, sigma):
        """The concrete scores p_sigma(x with x_i := y) / p_sigma(x), at every x. Float[S^L L S]."""
        law, num_states = self.law(process, sigma), process.num_states
        return law[index(changed(num_states, self.p.ndim), num_states)] / law[:, None, None]

    def conditional(self, tokens, free):
        """The law given the tokens that are not free. Int[... L], Bool[... L] -> Float[... V^L]."""
        x = states(len(self.p), self.p.ndim)
        agree = np.all(np.asarray(free)[..., None, :] | (x == np.asarray(tokens)[..., None, :]), axis=-1)
        weights = agree * self.p.ravel()
        return weights / weights.sum(-1, keepdims=True)

    def surprise(self, x0, free=True):
        """-log p(the free tokens given the others). Int[B L], Bool[B L] -> Float[B]."""
        law = self.conditional(x0, np.broadcast_to(free, np.shape(x0)))
        return -np.log(np.take_along_axis(law, index(x0, len(self.p))[:, None], axis=-1)[:, 0])

    def draw(self, rows, seed=0):
        """Clean sequences. Int[rows L]."""
        chosen = np.random.default_rng(seed).choice(self.p.size, rows, p=self.p.ravel())
        return states(len(self.p), self.p.ndim)[chosen]

    @functools.cache  # noqa: B019, there are few
    def denoiser(self, process):
        """The exact Denoiser, of any x, at sigma 0 and infinity too."""
        return self.informed(process, False)

    def informed(self, process, given):
        """The exact Denoiser that knows which tokens are given, and so clean at every sigma. given: Bool[B L]."""
        return lambda x, sigma, positions=None: self._log_clean(process, given, x, sigma, positions)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def _log_clean(self, process, given, x, sigma, positions):
        length = x.shape[-1]
        noise = jnp.where(given, 0.0, sigma[:, None])
        if isinstance(process, Absorbing):  # what is seen of a token, nothing or all, does not depend on sigma
            noise = jnp.ones_like(noise)
        seen = jax.vmap(jax.vmap(lambda x, sigma: process.transition_matrix(sigma)[x]))
        seen = seen(x, jnp.broadcast_to(noise, x.shape))[..., : process.vocab_size]  # q(x_j | v), Float[B L V]

        def without(i):
            others = [term for j in range(length) if j != i for term in (seen[:, j], [length, j])]
            return jnp.einsum(jnp.asarray(self.p, seen.dtype), list(range(length)), *others, [length, i])

        weights = jnp.stack([without(i) for i in range(length)], axis=1)
        if positions is not None:
            weights = jnp.take_along_axis(weights, positions[..., None], axis=1)
        return jnp.log(weights / weights.sum(-1, keepdims=True))

    def expectation(self, process, stats_fn, term):
        """sigma -> the exact mean over x of a row's sum of term(stats, x, x0, sigma), for each x0. Float[... V^L].

        Statistics may have axes in front, which stay.
        """
        length, clean = self.p.ndim, states(process.vocab_size, self.p.ndim)
        x = jnp.tile(states(process.num_states, length), (len(clean), 1))
        x0 = jnp.repeat(clean, len(x) // len(clean), axis=0)

        @jax.jit
        def terms(sigma):
            found = term(stats_fn(x, jnp.full(len(x), sigma), x0), x, x0, sigma).sum(-1)
            return found.reshape(*found.shape[:-1], len(clean), -1)

        return lambda sigma: np.sum(channel(process, sigma, length) * np.asarray(terms(sigma)), axis=-1)

    def integral(self, process, stats_fn, low, high, nodes=96):
        """The mean score entropy of each x0, integrated over sigma by quadrature in its logarithm. Float[... V^L]."""
        entropy = self.expectation(process, stats_fn, process.score_entropy)
        at, weights = np.polynomial.legendre.leggauss(nodes)
        half = np.log(high / low) / 2
        sigmas = low * np.exp(half * (at + 1))
        return sum(half * weight * sigma * entropy(sigma) for weight, sigma in zip(weights, sigmas, strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class MarkovChain:
    """A chain of tokens of any length. start: Float[V]; step: Float[V V], the next token's law in each row."""

    start: np.ndarray
    step: np.ndarray

    @classmethod
    def random(cls, vocab_size=3, seed=0):
        """A chain whose tokens remember."""
        weights = np.exp(2 * np.random.default_rng(seed).normal(size=(1 + vocab_size, vocab_size)))
        weights /= weights.sum(-1, keepdims=True)
        return cls(weights[0], weights[1:])

    @classmethod
    def peaked(cls, vocab_size=27, seed=0):
        """A chain in which few tokens follow each, from its stationary law on."""
        step = np.random.default_rng(seed).dirichlet(np.full(vocab_size, 0.05), vocab_size)
        start = np.linalg.matrix_power(step, 2**12)[0]
        return cls(start / start.sum(), step)

    def draw(self, length, seed=0):
        """One sequence. Int[length]."""
        rng = np.random.default_rng(seed)
        x = [rng.choice(len(self.start), p=self.start)]
        while len(x) < length:
            x.append(rng.choice(len(self.start), p=self.step[x[-1]]))
        return np.array(x)

    def surprise(self, x0):
        """-log p of one sequence, Int[L]. Float[]."""
        return -np.log(self.start[x0[0]]) - np.log(self.step[x0[:-1], x0[1:]]).sum()

    def joint(self, length):
        """The law of its first tokens, held whole."""
        p = self.start
        for _ in range(length - 1):
            p = p[..., None] * self.step
        return Joint(p)

    @functools.partial(jax.jit, static_argnums=0)
    def denoiser(self, x, sigma, positions=None):
        """The exact Denoiser of the absorbing process: what is passed on from the left, times that from the right."""
        vocab_size = len(self.start)
        seen = jnp.where(x[..., None] == vocab_size, 1.0, jax.nn.one_hot(x, vocab_size)).swapaxes(0, 1)  # Float[L B V]

        def passed(step, start, seen):
            def along(message, seen):
                after = (message * seen) @ step
                return after / after.sum(-1, keepdims=True), message

            return jax.lax.scan(along, jnp.broadcast_to(start, seen.shape[1:]), seen)[1]

        start, step = jnp.asarray(self.start), jnp.asarray(self.step)
        weights = passed(step, start, seen) * passed(step.T, jnp.ones_like(start), seen[::-1])[::-1]
        log_clean = jnp.log(weights / weights.sum(-1, keepdims=True)).swapaxes(0, 1)
        return log_clean if positions is None else jnp.take_along_axis(log_clean, positions[..., None], axis=1)


def random_tables(networks, length, vocab_size=3, seed=0):
    """Random logits for each position of each partly masked sequence. Float[networks S^L L V]."""
    shape = (networks, (vocab_size + 1) ** length, length, vocab_size)
    return np.random.default_rng(seed).normal(size=shape)


def untrained(table):
    """The Denoiser of such a table, sharper at more noise: the answers of no law, in which every order counts."""

    def denoiser(x, sigma, positions=None):
        place = (table.shape[-1] + 1) ** jnp.arange(x.shape[-1])[::-1]
        log_clean = jax.nn.log_softmax(jnp.asarray(table, float)[x @ place] * (1 + sigma[:, None, None]), axis=-1)
        return log_clean if positions is None else jnp.take_along_axis(log_clean, positions[..., None], axis=1)

    return denoiser


def answers(table, x):
    """What it believes of one row, told the noise of its own masked share. Int[L] -> Float[L V]."""
    mask = table.shape[-1]
    share = (max(np.sum(x == mask), 1) - 0.5) / len(x)
    logits = table[index(x, mask + 1)] * (1 - np.log(1 - share))
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def along(table, x0, order):
    """The log-likelihood by it of a row's positions, revealed in the order told."""
    x, total = np.array(x0), 0.0
    x[list(order)] = table.shape[-1]
    for i in order:
        total += answers(table, x)[i, x0[i]]
        x[i] = x0[i]
    return total


def along_all(table, x0, positions):
    """The log-likelihoods along each order. Float[n!]."""
    return np.array([along(table, x0, order) for order in itertools.permutations(positions)])


def scaled(process, stats_fn, factor):
    """The StatsFn of scores that are wrong by a factor: what controls are made of."""

    def stats(x, sigma, x0):
        right, more = stats_fn(x, sigma, x0), jnp.log(factor)
        others = process.vocab_size - (x < process.vocab_size)
        target = jnp.where(x == x0, 0.0, right.target + more)
        return ScoreStats(right.log_sum + more, right.sum_log + others * more, target)

    return stats


@functools.partial(jax.jit, static_argnames="num_states")
def kernel(jump, x, num_states):
    """Where one factorised step takes each sequence. Jump of Float[K L], Int[K L] -> Float[K S^L], rows sum to 1."""
    moves = jump.p_move[..., None]
    arrives = jnp.where(moves > 0, moves * jax.nn.softmax(jump.log_dest), 0.0)
    arrives = jnp.pad(arrives, [(0, 0), (0, 0), (0, num_states - arrives.shape[-1])])
    token = (1 - moves) * jax.nn.one_hot(x, num_states) + arrives
    return functools.reduce(lambda left, right: jax.vmap(jnp.kron)(left, right), token.swapaxes(0, 1))


def sampler_law(sampler, denoiser, tokens, free=True, correct=lambda law, sigma: law):
    """A grid sampler's exact law, in float64; correct: after all steps but the last. Int[L], Bool[L] -> Float[S^L]."""
    with jax.enable_x64(True):
        tokens, free = jnp.asarray(tokens), jnp.broadcast_to(jnp.asarray(free), np.shape(tokens))
        x = jnp.asarray(states(sampler.process.num_states, len(tokens)))
        law = jnp.prod(jnp.where(free, sampler.process.stationary()[x], x == tokens), axis=-1)
        plan, any_steps = sampler.plan(None, free), dataclasses.replace(sampler, steps=1)
        for k in range(sampler.steps):
            entry = jax.tree.map(operator.itemgetter(k), plan)
            law = law @ step_law(any_steps, denoiser, entry, tokens, free)
            law = law if k == sampler.steps - 1 else correct(law, entry.sigma_next)
        return np.asarray(law)


@functools.partial(jax.jit, static_argnames=("sampler", "denoiser"))
def step_law(sampler, denoiser, entry, tokens, free):
    """Where one step of a grid sampler takes each sequence. Int[L], Bool[L] -> Float[S^L S^L], rows sum to 1."""
    num_states, seen = sampler.process.num_states, clamped(denoiser, tokens, free)
    x = jnp.asarray(states(num_states, len(tokens)))

    def believed(entry):
        return seen(x, jnp.full(len(x), entry.sigma), None)

    def moved(jump):
        return kernel(jump._replace(p_move=jnp.where(free, jump.p_move, 0.0)), x, num_states)

    def one(entry):
        return moved(sampler.jump(believed(entry), x, entry))

    def two(entry):  # the second stage goes by where the first began and where it ended
        first, second = halves(entry)
        start, middle = believed(first), believed(second)

        def later(begun):
            return moved(sampler.second_jump(jnp.broadcast_to(begun, middle.shape), middle, x, second))

        return jnp.einsum("xm,xmy->xy", moved(sampler.jump(start, x, first)), jax.vmap(later)(start))

    return jax.lax.cond(entry.sigma_next > 0, two if isinstance(sampler, Trapezoidal) else one, one, entry)


def reversed_law(process, rates, length, low, high, steps=150):
    """The laws at noise `low` of reverse processes that start in pi at `high`: Runge and Kutta's ODE in log sigma.

    rates(sigma): Float[N S^L L V], those of N models from each sequence to each with one token changed. Float[N S^L].
    """
    x, width = states(process.num_states, length), np.log(high / low) / steps
    arrives = np.eye(len(x))[index(changed(process.num_states, length)[:, :, : process.vocab_size], process.num_states)]

    def flow(law, place):
        sigma = high * jnp.exp(-width * place)
        moved = width * sigma * rates(sigma) * law[..., None, None]
        return jnp.einsum("nxiv,xivy->ny", moved, arrives) - moved.sum((-2, -1))

    def step(k, law):
        first = flow(law, k)
        second = flow(law + first / 2, k + 0.5)
        third = flow(law + second / 2, k + 0.5)
        return law + (first + 2 * second + 2 * third + flow(law + third, k + 1)) / 6

    start = jnp.broadcast_to(process.stationary()[x].prod(-1), rates(high).shape[:2])
    return jax.lax.fori_loop(0, steps, step, start)


def total_variation(p, q):
    """Half the sum of the absolute differences of two laws."""
    return np.abs(p - q).sum() / 2


def standard_errors(values):
    """The mean of independent draws, in its standard errors from 0."""
    values = np.asarray(values, np.float64)
    return values.mean() / values.std(ddof=1) * len(values) ** 0.5


def p_value(seen, law):
    """Pearson's chi-square of drawn indices against a law; cells of fewer than five due draws are pooled."""
    seen, law = np.bincount(np.ravel(seen), minlength=len(law)), np.asarray(law)
    due = law * seen.sum()
    rare = due < 5
    seen, due = (np.append(cells[~rare], cells[rare].sum()) for cells in (seen, due))
    if due[-1] < 1e-6:
        if seen[-1] > 0:
            return 0.0  # an impossible draw
        seen, due = seen[:-1], due[:-1]
    return scipy.stats.chi2.sf(np.sum((seen - due) ** 2 / due), max(len(due) - 1, 1))
