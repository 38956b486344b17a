"""Generation in blocks from left to right, and the bound in discrete time, against distributions with known answers."""

import dataclasses
import functools
import itertools
import math
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from oracle import Joint, index, kernel, p_value, random_tables, scaled, standard_errors, states, table_denoiser
from small import name_of, parts, shaken, small_config, small_corpus, untrained_model

from sedd import config as configs
from sedd.data.batches import Batch, batch
from sedd.diffusion import keyed_random
from sedd.diffusion.denoiser import condition_on_mask_ratio
from sedd.diffusion.discrete import likelihood
from sedd.diffusion.discrete.blocks import num_blocks
from sedd.diffusion.discrete.correctors import Renoise
from sedd.diffusion.discrete.likelihood import DiscreteTimeBound, MaskCountBound, TimeLoss
from sedd.diffusion.discrete.pickers import Entropy, EntropyBounded, Margin
from sedd.diffusion.discrete.process import Absorbing, Jump, Uniform
from sedd.diffusion.discrete.samplers import Euler, Trapezoidal, Tweedie
from sedd.diffusion.discrete.score import clean_stats, score_stats, stats_from
from sedd.diffusion.discrete.unmasking import Adaptive, Blockwise, Counts, FirstHitting, FixedCounts
from sedd.diffusion.sampling import Corrected, sample
from sedd.diffusion.schedule import LogLinear
from sedd.errors import UserError
from sedd.generation.rows import windows
from sedd.network.block_network import AutoregressiveNetwork, BlockNetwork
from sedd.network.token_network import TokenNetwork
from sedd.network.trunk import Trunk, scanned
from sedd.recipes import BLOCKS, RECIPES, kind_of
from sedd.runtime import parallel
from sedd.training.score_entropy import ScoreEntropy
from sedd.training.step import init_state, make_step

V, L = 3, 4
PROCESS, MASK = Absorbing(V), V
TABLE = random_tables(1, L)[0]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def at_one_noise(table):
    """The Denoiser of a table at one noise level: a network of blocks is not conditioned on the noise."""
    return lambda x, sigma, positions=None: table_denoiser(table)(x, jnp.ones_like(sigma), positions)


UNTRAINED = at_one_noise(TABLE)  # its likelihoods depend on the order of decoding


def seen(x, x0, number, size, mask=MASK):
    """What a network of blocks sees for block `number` of a row: the clean blocks before it, its own, no later one."""
    where, block = (np if isinstance(x, np.ndarray) else jnp).where, np.arange(x.shape[-1])[None] // size
    return where(block < number, x0, where(block == number, x, mask))


def stats_of_blocks(denoiser, size, process=PROCESS):
    """The StatsFn of a network of blocks whose outputs are those of a Denoiser at what the network sees."""

    def stats(x, sigma, x0):
        x, place, ones = jnp.asarray(x), np.arange(x.shape[1]), jnp.ones(len(x))
        numbers = range(x.shape[1] // size)
        by_block = [denoiser(seen(x, x0, number, size, process.mask_id), ones) for number in numbers]
        log_clean = jnp.moveaxis(jnp.stack(by_block)[place // size, :, place], 0, 1)
        return clean_stats(process, log_clean, x, x0, sigma if sigma.ndim > 1 else sigma[:, None])

    return stats


def along(table, x0, groups, size=None):
    """The log-likelihood of rows whose positions are unmasked in groups, one call after the other. Int[K L] -> [K].

    By `at_one_noise`, written out. size: of the blocks of which it sees what a network of blocks does, or all of a row.
    """
    mask, rows, total = table.shape[-1], np.arange(len(x0)), np.zeros(len(x0))
    x = np.array(x0)
    x[:, [i for group in groups for i in group]] = mask
    for group in groups:
        visible = x if size is None else seen(x, x0, group[0] // size, size, mask)
        log_clean = scipy.special.log_softmax(2 * table[index(visible, mask + 1)], axis=-1)
        total += sum(log_clean[rows, i, x0[:, i]] for i in group)
        x[:, group] = x0[:, group]
    return total


def blocks_of(free, size):
    """The free positions of each block that has any, as lists."""
    found = [[i for i in range(start, min(start + size, len(free))) if free[i]] for start in range(0, len(free), size)]
    return [block for block in found if block]


def orders_of(free, size):
    """Every order of the free positions from block to block, one position a call."""
    within = [itertools.permutations(block) for block in blocks_of(free, size)]
    return [[[i] for block in orders for i in block] for orders in itertools.product(*within)]


def along_orders(table, x0, size, free=None):
    """The log-likelihoods of rows along every order from block to block. Int[K L] -> Float[orders K]."""
    free = np.ones(x0.shape[1], bool) if free is None else free
    return np.array([along(table, x0, order, size) for order in orders_of(free, size)])


def row_keys(rows):
    return keyed_random.row_keys(jax.random.key(0), jnp.arange(rows))


def total(draws):
    """Each draw of each row's bound. Float64[M B]."""
    return np.asarray(draws.prior + draws.diffusion + draws.reconstruction, np.float64)


def gap(left, right):
    return np.abs(np.asarray(left) - np.asarray(right)).max()


# The bound by mask counts.


def over_counts_and_orders(bound, stats_fn, x0, num_draws=1):
    """The exact means of the bound's draws, over all mask counts and orders of each block. Int[K L] -> Float[M K].

    A function of the factor by which the scores are wrong. Only the random draws are replaced, by enumeration.
    """
    size = bound.block_size or x0.shape[1]
    blocks, orders = x0.shape[1] // size, np.array(list(itertools.permutations(range(size))))
    choices = np.array(list(itertools.product(range(size * len(orders)), repeat=blocks)))  # of a count and an order
    u = np.tile((choices % size + 0.5) / size, (len(x0), 1))
    ranks = np.tile(orders[choices // size], (len(x0), 1, 1))
    rows = np.repeat(x0, len(choices), axis=0)

    def enumerated_ranks(keys, free):
        return jnp.repeat(ranks, len(free) // (len(rows) * blocks), axis=0).reshape(free.shape)

    @jax.jit
    def draws(factor):
        return bound.draws(scaled(bound.process, stats_fn, factor), row_keys(len(rows)), rows, num_draws)

    def means(factor=1.0):
        with mock.patch.object(likelihood, "in_stratum", lambda *_: jnp.asarray(u if blocks > 1 else u[:, 0])):
            with mock.patch.object(keyed_random, "ranks", enumerated_ranks):
                return total(draws(factor)).reshape(num_draws, len(x0), -1).mean(-1)

    return means


@pytest.mark.parametrize(
    "vocab_size, length, size, num_draws",
    [(3, 4, 2, 1), (3, 4, 2, 4), slow(2, 6, 3, 4), slow(2, 6, 2, 4), slow(3, 3, 3, 4), slow(3, 4, 1, 1)],
)
def test_the_bound_of_exact_blocks_is_the_likelihood_of_each_sequence(vocab_size, length, size, num_draws, float64):
    """In the mean over mask counts and orders of each block, with and without pairs. Control: scores a tenth larger."""
    process, joint, x0 = Absorbing(vocab_size), Joint.random(vocab_size, length), states(vocab_size, length)
    bound = MaskCountBound(process, size)
    assert bound.takes_pairs(num_draws) == (num_draws == 4)
    means = over_counts_and_orders(bound, stats_of_blocks(joint.denoiser(process), size, process), x0, num_draws)
    assert gap(means(), joint.nll(x0)) < 1e-12 and (means(1.1) - joint.nll(x0)).min() > 1e-3


@pytest.mark.parametrize(
    "vocab_size, length, size", [(3, 4, 2), slow(2, 6, 3), slow(2, 6, 2), slow(3, 3, 3), slow(3, 4, 1)]
)
def test_the_bound_averages_over_the_orders_within_blocks(vocab_size, length, size, float64):
    """For an inconsistent network; and it is at least -log p, where p is the mean of the orders' likelihoods.

    Controls: orders that go from one block to another and back; scores a tenth larger.
    """
    process, x0, table = Absorbing(vocab_size), states(vocab_size, length), random_tables(1, length, vocab_size)[0]
    means = over_counts_and_orders(
        MaskCountBound(process, size), stats_of_blocks(at_one_noise(table), size, process), x0
    )
    log_p = along_orders(table, x0, size)
    assert gap(means(), -log_p.mean(0)) < 1e-12 < 1e-3 < gap(means(1.1), -log_p.mean(0))
    p = np.exp(log_p).mean(0)
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-12)
    assert (means() + np.log(p)).min() > (1e-9 if size > 1 else -1e-12)
    assert size == length or gap(log_p.mean(0), along_orders(table, x0, length).mean(0)) > 0.1


# Rows with all or some positions free; the others hold tokens, or masks that stay.
CASES = np.array([[2, 0, 1, 1], [0, 1, 2, 0], [1, MASK, 0, 2], [MASK, 2, MASK, 1], [0, 0, 1, 2], [2, 1, MASK, MASK]])
CASES_FREE = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0], [1, 1, 0, 0]], bool)
REPEATS = 2_500


def of_cases(function):
    """A function of one row and its free positions, for each of many copies of the cases. Float[B]."""
    return np.tile([function(x0[None], free) for x0, free in zip(CASES, CASES_FREE, strict=True)], REPEATS)


def drawn_of_cases(bound, num_draws):
    """The draws of many copies of the cases, as a function of the factor by which the scores are wrong."""
    x0, free = np.tile(CASES, (REPEATS, 1)), np.tile(CASES_FREE, (REPEATS, 1))
    stats_fn = stats_of_blocks(UNTRAINED, bound.block_size)
    return jax.jit(
        lambda factor: bound.draws(scaled(PROCESS, stats_fn, factor), row_keys(len(x0)), x0, num_draws, free)
    )


def unbiased(values, exact):
    """True if each half of the draws is unbiased, and the halves are uncorrelated. Float[M B]."""
    halves = values.reshape(2, -1, values.shape[-1]).mean(1) - exact
    return max(abs(standard_errors(value)) for value in (*halves, halves[0] * halves[1])) < 4


def one_by_one(x0, free):
    """The bound by mask counts of one row, whose tokens are drawn one by one."""
    return -along_orders(TABLE, x0, 2, free).mean()


def together(x0, free):
    """The bound of one row, the tokens of each of whose blocks are drawn at once."""
    return -along(TABLE, x0, blocks_of(free, 2), 2)[0]


@pytest.mark.parametrize("num_draws", [4, slow(1), slow(3), slow(6), slow(8)])
def test_drawn_counts_of_blocks_average_to_the_bound(num_draws, float64):
    """With given tokens and masks that stay, by block. Controls: wrong scores; half of the strata."""
    draws, exact = drawn_of_cases(MaskCountBound(PROCESS, 2), num_draws), of_cases(one_by_one)
    drawn = draws(1.0)
    values = total(drawn)
    assert len(values) == num_draws and abs(standard_errors(values.mean(0) - exact)) < 4
    assert standard_errors(total(draws(1.5)).mean(0) - exact) > 4 and (num_draws % 2 or unbiased(values, exact))
    if num_draws == 4:
        assert not unbiased(values[[0, 2, 1, 3]], exact)
        np.testing.assert_allclose(np.asarray(drawn.level).reshape(2, 2, -1).mean(1), 0.5, atol=1e-12)


def test_blocks_of_one_token_have_the_exact_likelihood_in_every_draw(float64):
    """Of any network, by one call of it, for any number of draws. Control: the draws of blocks of two differ."""
    calls = []

    def counted(x, sigma, x0):
        jax.debug.callback(lambda: calls.append(x.shape))
        return stats_of_blocks(UNTRAINED, 1)(x, sigma, x0)

    @jax.jit
    def drawn():
        def of(size, stats_fn, num_draws):
            return MaskCountBound(PROCESS, size).draws(stats_fn, row_keys(len(CASES)), CASES, num_draws, CASES_FREE)

        blocks = stats_of_blocks(UNTRAINED, 2)
        return [of(1, counted, num_draws) for num_draws in (1, 3, 4, 16)], of(2, blocks, 3)

    exact = [-along_orders(TABLE, x0[None], 1, free)[0, 0] for x0, free in zip(CASES, CASES_FREE, strict=True)]
    of_ones, of_twos = drawn()
    jax.effects_barrier()
    assert calls == [CASES.shape] * 4 and [len(total(draws)) for draws in of_ones] == [1, 3, 4, 16]
    for values in map(total, of_ones):
        assert gap(values, exact) < 1e-12 and np.ptp(values, axis=0).max() == 0
    assert not MaskCountBound(PROCESS, 1).takes_pairs(4) and np.ptp(total(of_twos), axis=0).max() > 0.1


@pytest.mark.parametrize(
    "bound",
    [MaskCountBound(PROCESS), DiscreteTimeBound(PROCESS, 3), TimeLoss(PROCESS, LogLinear(), 1e-3, 4)],
    ids=lambda bound: type(bound).__name__,
)
def test_one_block_a_row_is_no_blocks_bit_for_bit(bound):
    """They are the same program. Control: two blocks."""

    def program(size, num_draws):
        def draws(keys):
            one = dataclasses.replace(bound, block_size=size)
            return one.draws(stats_of_blocks(UNTRAINED, L), keys, CASES, num_draws, CASES_FREE, rows=jnp.arange(6))

        return str(jax.make_jaxpr(draws)(row_keys(6)))

    for num_draws in (3, 4):
        assert program(L, num_draws) == program(0, num_draws) != program(2, num_draws)
    assert num_blocks(L, 0) == num_blocks(L, L) == 1 and num_blocks(L, 2) == 2
    with pytest.raises(ValueError, match="4 positions cannot be cut into blocks of 3"):
        program(3, 4)


def test_antithetic_pairs_mask_every_token_of_each_block_and_one_twice():
    """Of each block with free tokens, at most L + N in all. Control: pairs without blocks do not."""
    rows, length, size = 300, 12, 3
    free = np.random.default_rng(0).random((rows, length)) < 0.6
    free[:10] = True
    in_blocks = free.reshape(rows, -1, size).sum(-1)

    def stats_fn(x, sigma, x0):  # NaN for a pair of rows that masks other tokens
        masks = (x == MASK).reshape(-1, 2, length).sum(1)
        of_blocks = masks.reshape(rows, -1, size).sum(-1)
        each = jnp.all((masks >= free) & (masks <= 2 * free), axis=-1) & (masks.sum(-1) <= length + length // size)
        paired = each & jnp.all(of_blocks == jnp.where(in_blocks > 0, in_blocks + 1, 0), axis=-1)
        stats = score_stats(jnp.zeros((*x.shape, V)), x, x0)
        return stats._replace(log_sum=jnp.where(jnp.repeat(paired, 2)[:, None], stats.log_sum, jnp.nan))

    @jax.jit
    def drawn():
        bounds = (MaskCountBound(PROCESS, size), MaskCountBound(PROCESS))
        x0 = jnp.zeros((rows, length), int)
        return [bound.draws(stats_fn, row_keys(rows), x0, 8, jnp.asarray(free)).diffusion for bound in bounds]

    of_blocks, of_rows = drawn()
    assert np.isfinite(of_blocks).all() and not np.isfinite(of_rows).all()


@pytest.mark.parametrize("bound", [MaskCountBound(PROCESS, 2), slow(DiscreteTimeBound(PROCESS, 3, 2))], ids=["k", "T"])
def test_the_bound_of_blocks_given_the_length_is_independent_of_padding(bound, float64):
    """Padding may be blocks of its own. The network is conditioned on the mask ratio. Control: other lengths."""
    x0, rows = np.random.default_rng(0).integers(0, 3, (50, L)), 50
    padded, free = np.pad(x0, ((0, 0), (0, 4))), np.tile(np.arange(8) < L, (50, 1))

    def stats_fn(x, sigma, x0):
        stats = stats_of_blocks(UNTRAINED, 2)(x[:, :L], sigma, x0[:, :L])
        stats = stats._replace(log_sum=stats.log_sum + 0.1 * jnp.expm1(-sigma[:, None]))
        return jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (0, x.shape[1] - L))), stats)

    draws = jax.jit(lambda n: bound.draws(stats_fn, row_keys(rows), padded, 4, free, n).diffusion)
    alone = jax.jit(lambda: bound.draws(stats_fn, row_keys(rows), x0, 4).diffusion)()
    np.testing.assert_allclose(draws(np.full(50, L)), alone, rtol=1e-12)
    assert gap(draws(np.full(50, 8)), alone) > 1e-2


# The bound in discrete time.


def over_steps_and_masks(bound, stats_fn, x0):
    """The draws at every step of each block, and at the masks of an even grid of random numbers at each position.

    Their mean is exact: the chance of a mask is a multiple of 1 / T. Int[K L] -> Float[... K T^N T^L].
    """
    length, steps = x0.shape[1], bound.steps
    blocks = num_blocks(length, bound.block_size)
    step, cell = states(steps, blocks), (states(steps, length) + 0.5) / steps
    u = np.tile(np.repeat((step + 0.5) / steps, len(cell), axis=0), (len(x0), 1))
    cells, rows = np.tile(cell, (len(x0) * len(step), 1)), np.repeat(x0, len(step) * len(cell), axis=0)
    with mock.patch.object(likelihood, "in_stratum", lambda *_: jnp.asarray(u if blocks > 1 else u[:, 0])):
        with mock.patch.object(keyed_random, "bernoulli", lambda keys, p: cells < p):
            draws = jax.jit(lambda: bound.draws(stats_fn, row_keys(len(rows)), rows, 1))()
    values = np.asarray(draws.diffusion)[0]
    return values.reshape(*values.shape[:-1], len(x0), len(step), len(cell))


@functools.partial(jax.jit, static_argnums=(1, 2))
def of_tweedie(log_clean, steps, size):
    """The distribution of Tweedie in even steps of the mask ratio, from block to block. Float[S^L L V] -> [V^L]."""
    length = log_clean.shape[1]
    x = jnp.asarray(states(V + 1, length))
    p = jnp.all(x == MASK, axis=-1).astype(log_clean.dtype)
    for number in range(length // size):
        masked = (x == MASK) & (jnp.arange(length)[None] // size == number)
        for i in range(steps, 0, -1):
            p = p @ kernel(Jump(masked / i, log_clean), x, V + 1)
    return p[index(states(V, length), V + 1)]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_bound_in_discrete_time_is_never_below_the_likelihood_of_its_sampler(steps, float64):
    """For a hundred inconsistent networks, conditioned on the mask ratio; with one step, of independent tokens, equal.

    Controls: without the last step, or with the weight T / (i + 1), it is not a bound.
    """
    tables = np.linspace(0.01, 1, 100)[:, None, None, None] * random_tables(100, 2)

    def stats_fn(*state):
        return jax.vmap(lambda table: stats_from(PROCESS, table_denoiser(table))(*state))(tables)

    @jax.jit
    @jax.vmap
    def distribution(table):
        denoiser = condition_on_mask_ratio(PROCESS, table_denoiser(table))
        return of_tweedie(denoiser(jnp.asarray(states(V + 1, 2)), None), steps, 2)

    p = distribution(tables)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-12)
    values = over_steps_and_masks(DiscreteTimeBound(PROCESS, steps), stats_fn, states(V, 2)).mean(-1)  # of each step
    i, gaps = np.arange(1, steps + 1), values.mean(-1) + np.log(p)
    assert gaps.min() > -1e-12 and (gaps.max() < 1e-12) == (steps == 1)
    for wrong in (values * (i > 1), values * i / (i + 1)):
        assert (wrong.mean(-1) + np.log(p)).min() < -1e-2


@pytest.mark.parametrize("steps", [1, 3, slow(2)])
def test_the_bound_of_blocks_in_discrete_time_is_that_of_tweedie_from_block_to_block(steps, float64):
    """For an inconsistent network. Two tokens fall into one of T steps with probability 1 / T, and are drawn one by one
    else: so it is a mean of the bounds by mask counts and of one step, and tends to the first. Control: other T."""
    x0 = states(V, L)
    values = over_steps_and_masks(DiscreteTimeBound(PROCESS, steps, 2), stats_of_blocks(UNTRAINED, 2), x0)
    values = values.mean((-1, -2))
    at_once, in_turn = -along(TABLE, x0, [[0, 1], [2, 3]], 2), -along_orders(TABLE, x0, 2).mean(0)
    assert gap(values, in_turn + (at_once - in_turn) / steps) < 1e-12
    assert gap(values, in_turn + (at_once - in_turn) / (steps + 1)) > 1e-2
    p = of_tweedie(jax.nn.log_softmax(2 * jnp.asarray(TABLE)), steps, 2)
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-12)
    assert (values + np.log(p)).min() > -1e-12 and (gap(values, -np.log(p)) < 1e-12) == (steps == 1)


@pytest.mark.parametrize("length, steps", [(2, (1, 2, 4, 8)), slow(3, (1, 2, 4))])
def test_the_bound_in_discrete_time_falls_to_that_by_mask_counts(length, steps, float64):
    """With an exact Denoiser, in the mean over the sequences, to the entropy. For two tokens the excess is their mutual
    information over T: they are drawn independently if they fall into one step."""
    joint, x0 = Joint.random(length=length), states(V, length)
    stats_fn, p = stats_from(PROCESS, joint.denoiser(PROCESS)), joint.p.ravel()
    entropy = p @ over_counts_and_orders(MaskCountBound(PROCESS), stats_fn, x0)()[0]
    information = p @ joint.independent().nll(x0) - p @ joint.nll(x0)

    def excess(steps):
        return p @ over_steps_and_masks(DiscreteTimeBound(PROCESS, steps), stats_fn, x0).mean((-1, -2)) - entropy

    excesses = np.array([excess(count) for count in steps])
    np.testing.assert_allclose([entropy, excesses[0]], [p @ joint.nll(x0), information], rtol=1e-12)
    assert np.all(excesses[1:] < 0.6 * excesses[:-1]) and information > 0.1
    if length == 2:
        np.testing.assert_allclose(excesses, information / np.array(steps), rtol=1e-10)


@pytest.mark.parametrize("num_draws", [4, slow(3)])
def test_drawn_steps_of_blocks_average_to_the_bound(num_draws, float64):
    """With given tokens and masks that stay. Controls: wrong scores; half of the strata; another number of steps."""
    draws, at_once, in_turn = (
        drawn_of_cases(DiscreteTimeBound(PROCESS, 4, 2), num_draws),
        *map(of_cases, (together, one_by_one)),
    )
    drawn, exact = draws(1.0), in_turn + (at_once - in_turn) / 4
    values = total(drawn)
    assert len(values) == num_draws and abs(standard_errors(values.mean(0) - exact)) < 4
    assert standard_errors(total(draws(1.5)).mean(0) - exact) > 4 and standard_errors(values.mean(0) - at_once) < -4
    if num_draws == 4:
        assert unbiased(values, exact) and not unbiased(values[[0, 2, 1, 3]], exact)
    level = np.asarray(drawn.level)  # the mean of the ratios i / 4 of two blocks
    assert np.all(8 * level == np.round(8 * level)) and level.min() == 1 / 4 and level.max() == 1


def by_time(k, n, eps=0.01, low=0.05):
    """The weight of the cross-entropy of k certain masks of a block of n tokens, at a uniform time t from `low` to 1.

    Each is masked with probability (1 - eps) t, and weighs 1 / t.
    """

    def at(t):
        return ((1 - eps) * t) ** k * (1 - (1 - eps) * t) ** (n - k) / t

    return scipy.integrate.quad(at, low, 1)[0] / (1 - low)


def by_count(k, n):
    """The same weight at one of n counts: of one of the sets of that size, n / k."""
    return 1 / (math.comb(n, k) * k)


@pytest.mark.parametrize("strata", [4, slow(1)])
def test_the_loss_of_blocks_at_times_averages_to_its_integral(strata, float64):
    """Over consecutive rows of one text. Controls: wrong scores; another schedule."""
    x0 = np.repeat(states(V, L), 4 * 50, axis=0)
    at_once, in_turn = -along(TABLE, states(V, L), [[0, 1], [2, 3]], 2), -along_orders(TABLE, states(V, L), 2).mean(0)
    loss = TimeLoss(PROCESS, LogLinear(0.01), 0.05, strata, 2)
    stats_fn = stats_of_blocks(UNTRAINED, 2)

    @jax.jit
    def drawn(factor):
        wrong = scaled(PROCESS, stats_fn, factor)
        return loss.draws(wrong, row_keys(len(x0)), x0, 1, rows=jnp.arange(len(x0))).diffusion[0]

    def errors(factor=1.0, **ends):  # of the means of four rows of one text
        exact = by_time(1, 2, **ends) * (2 * in_turn - at_once) + by_time(2, 2, **ends) * at_once
        return standard_errors((drawn(factor).reshape(81, -1) - exact[:, None]).reshape(-1, 4).mean(-1))

    assert abs(errors()) < 4 < min(errors(1.5), errors(eps=0.3))


@pytest.mark.parametrize("strata", [2, 8])
def test_every_block_of_a_row_has_times_of_all_strata(strata):
    """Over as many consecutive rows; and the consecutive blocks of a row, if they are as many."""
    loss, times = TimeLoss(PROCESS, LogLinear(1e-6), 1e-6, strata, 2), []

    def stats_fn(x, sigma, x0):
        jax.debug.callback(times.append, -jnp.expm1(-sigma[:, ::2]))
        return score_stats(jnp.zeros((*x.shape, V)), x, x0)

    jax.jit(lambda: loss.draws(stats_fn, row_keys(8), jnp.zeros((8, 16), int), 1, rows=jnp.arange(8)))()
    jax.effects_barrier()
    strata_of, due = np.floor(times[0] * strata), np.sort(np.arange(8) % strata)
    np.testing.assert_array_equal(np.sort(strata_of, axis=0), np.tile(due[:, None], (1, 8)))
    np.testing.assert_array_equal(np.sort(strata_of, axis=1), np.tile(due, (8, 1)))


def test_bounds_say_what_they_bound_and_refuse_what_they_cannot():
    """In one line each."""
    assert "from left to right, each in random order" in MaskCountBound(PROCESS, 2).likelihood_of
    assert "one token at a time from left to right" in MaskCountBound(PROCESS, 1).likelihood_of
    assert "left to right" not in MaskCountBound(PROCESS).likelihood_of
    assert "1,000 even steps" in DiscreteTimeBound(PROCESS, 1000).likelihood_of
    assert "block after block of 2 tokens" in DiscreteTimeBound(PROCESS, 8, 2).likelihood_of
    for make, message in [
        (lambda: DiscreteTimeBound(Uniform(V), 4), "needs the absorbing process"),
        (lambda: DiscreteTimeBound(PROCESS, 0), "at least one step, not 0"),
        (lambda: TokenNetwork(Uniform(V), "denoiser", TRUNK, (1e-3, 7.0), bound_steps=4), "bound_steps is for"),
    ]:
        with pytest.raises(ValueError, match=message) as raised:
            make()
        assert "\n" not in str(raised.value)


# Samplers from block to block.

run = jax.jit(sample, static_argnames=("denoiser", "sampler", "trace"))

# The given positions differ by row: none, a prefix, a whole block, some of each block, a mask that stays.
TOKENS = np.array([[0, 1, 2, 1], [2, 0, 1, 1], [1, 1, 0, 2], [0, 2, 2, 0], [MASK, 0, 2, 1]])
FREE = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 1], [0, 1, 1, 1]], bool)


def completions(tokens, free):
    """Every way to fill in the free positions. Int[V^free L]."""
    x0 = np.tile(tokens, (V ** free.sum(), 1))
    x0[:, free] = states(V, free.sum())
    return x0


ROWS = np.concatenate([completions(*row) for row in zip(TOKENS, FREE, strict=True)])
ROWS_FREE = np.repeat(FREE, V ** FREE.sum(-1), axis=0)
GROUPS = np.repeat(np.arange(len(FREE)), V ** FREE.sum(-1))
CELLS = index(ROWS, V + 1) + (V + 1) ** L * GROUPS  # among all sequences of all rows of TOKENS


def fits(drawn, p):
    """The p-value of drawn copies of TOKENS, Int[B L], against the probabilities of ROWS."""
    due = np.zeros((V + 1) ** L * len(TOKENS))
    due[CELLS] = p / len(TOKENS)
    return p_value(index(drawn, V + 1).reshape(-1, len(TOKENS)) + (V + 1) ** L * np.arange(len(TOKENS)), due)


def probabilities(plans):
    """The exact probabilities of ROWS. plans: of free positions, Bool[L], the groups of the calls, equally likely."""
    of_rows = zip(TOKENS, FREE, strict=True)
    return np.concatenate(
        [
            np.mean([np.exp(along(TABLE, completions(*row), groups)) for groups in plans(row[1])], axis=0)
            for row in of_rows
        ]
    )


def in_intervals(free, size, steps):
    """The groups of `Counts` with an even grid, from block to block: each position falls into one of the intervals."""
    for intervals in itertools.product(range(steps), repeat=int(free.sum())):
        interval = dict(zip(np.flatnonzero(free), intervals))
        groups = [[i for i in block if interval[i] == k] for block in blocks_of(free, size) for k in range(steps)]
        yield [group for group in groups if group]


def one_then_others(free, size):
    """The groups of `FixedCounts` with the weights 1 and 2, of blocks of at most three free positions."""
    for order in orders_of(free, size):
        of_blocks = [[i for (i,) in order if i in block] for block in blocks_of(free, size)]
        yield [group for block in of_blocks for group in (block[:1], block[1:]) if group]


PLANS = {
    FirstHitting(PROCESS).in_blocks(2): lambda free: orders_of(free, 2),
    FirstHitting(PROCESS).in_blocks(1): lambda free: orders_of(free, 1),
    FirstHitting(PROCESS).in_blocks(3): lambda free: orders_of(free, 3),
    FixedCounts(PROCESS, (1, 2)).in_blocks(3): lambda free: list(one_then_others(free, 3)),
    Counts(PROCESS, LogLinear(), 1).in_blocks(2): lambda free: [blocks_of(free, 2)],
    Counts(PROCESS, LogLinear(), 2).in_blocks(2): lambda free: list(in_intervals(free, 2, 2)),
    FirstHitting(PROCESS): lambda free: orders_of(free, L),
}


@functools.cache
def all_probabilities():
    return [probabilities(plans) for plans in PLANS.values()]


@pytest.mark.parametrize(
    "kind, calls",
    [slow(0, 4), (1, 4), slow(2, 4), (3, 3), slow(4, 2), (5, 4)],
    ids=["hitting 2", "hitting 1", "hitting 3", "fixed 3", "counts 1", "counts 2"],
)
def test_blocks_are_sampled_from_their_exact_distribution(kind, calls):
    """The jitted loop in float32, with an inconsistent network, given tokens and masks, and a last block that is short.

    In the calls of the row with most. Controls: the distributions of the other samplers, and of a row in random order.
    """
    tokens, free, sampler = np.tile(TOKENS, (6_000, 1)), np.tile(FREE, (6_000, 1)), list(PLANS)[kind]
    drawn, number, _ = run(jax.random.key(0), UNTRAINED, sampler, tokens, free)
    assert number == calls and isinstance(sampler, Blockwise)
    assert np.array_equal(np.where(free, tokens, drawn), tokens) and np.all(drawn[free] < MASK)
    of_all = [fits(drawn, p) for p in all_probabilities()]
    assert of_all.pop(kind) > 1e-3 and max(of_all) < 1e-6


def test_blocks_of_an_exact_denoiser_are_the_joint_distribution():
    """Given a prefix too. Control: independent tokens of the same marginals."""
    joint, rows = Joint.random(V, L), ~np.any(TOKENS == MASK, axis=-1)
    tokens, free = np.tile(TOKENS[rows], (6_000, 1)), np.tile(FREE[rows], (6_000, 1))
    drawn = run(jax.random.key(1), joint.denoiser(PROCESS), FirstHitting(PROCESS).in_blocks(2), tokens, free).tokens

    def fits(joint):
        due = joint.conditional(TOKENS[rows], FREE[rows]) / rows.sum()
        return p_value(index(drawn, V).reshape(-1, rows.sum()) + V**L * np.arange(rows.sum()), due.ravel())

    assert fits(joint) > 1e-3 and fits(joint.independent()) < 1e-6


def certainty(picker, log_r):
    """The certainty of one position, written out."""
    p = np.sort(np.exp(log_r))
    return p[-1] - p[-2] if isinstance(picker, Margin) else np.sum(p * np.log(p))


def certain_first(picker, x0, free, size):
    """The log-likelihood of one row, call after call and block after block, written out."""
    x, masked, log_p = np.where(free, MASK, x0), list(np.flatnonzero(free)), 0.0
    while masked:
        log_clean = scipy.special.log_softmax(2 * TABLE[index(x, V + 1)], axis=-1)
        block = [i for i in masked if i // size == masked[0] // size]
        block.sort(key=lambda i: -certainty(picker, log_clean[i]))
        count = picker.count
        if isinstance(picker, EntropyBounded):  # all entropies but the largest are within gamma
            entropies = [-certainty(picker, log_clean[i]) for i in block]
            count = max([1, *(n for n in range(2, len(block) + 1) if sum(entropies[: n - 1]) <= picker.gamma)])
        for i in block[:count]:
            log_p += log_clean[i, x0[i]]
            x[i] = x0[i]
            masked.remove(i)
    return log_p


scored = jax.jit(Adaptive.log_likelihood, static_argnames=("self", "denoiser"))


@pytest.mark.parametrize(
    "picker, size", [(Margin(1), 3), (EntropyBounded(0.8), 2), slow(Entropy(2), 3), slow(Margin(1), 2)], ids=str
)
def test_the_likelihood_of_an_adaptive_sampler_in_blocks_sums_to_one(picker, size, float64):
    """And is that of picking within one block after the other, written out. Control: within the whole row."""
    log_p = np.asarray(scored(Adaptive(PROCESS, picker).in_blocks(size), UNTRAINED, ROWS, ROWS_FREE))
    np.testing.assert_allclose(np.bincount(GROUPS, np.exp(log_p)), 1, rtol=1e-12)
    by_hand = [
        [certain_first(picker, *row, of_size) for row in zip(ROWS, ROWS_FREE, strict=True)] for of_size in (size, L)
    ]
    assert gap(log_p, by_hand[0]) < 1e-12 and gap(log_p, by_hand[1]) > 1e-2


@pytest.mark.slow
def test_an_adaptive_sampler_in_blocks_samples_the_distribution_of_its_likelihood():
    """The jitted loop in float32. Control: without blocks."""
    tokens, free, sampler = np.tile(TOKENS, (6_000, 1)), np.tile(FREE, (6_000, 1)), Adaptive(PROCESS, Entropy(2))
    drawn, calls, _ = run(jax.random.key(0), UNTRAINED, sampler.in_blocks(3), tokens, free)
    assert calls == 3  # two of the first block's three positions, the third, the last block
    p, without = (np.exp(scored(one, UNTRAINED, ROWS, ROWS_FREE)) for one in (sampler.in_blocks(3), sampler))
    assert fits(drawn, p) > 1e-3 and fits(drawn, without) < 1e-6


LENGTH = 11  # three blocks of three, and a short one
HASHED = np.random.default_rng(1).normal(size=(97, V))
PATTERNS = np.random.default_rng(0).random((24, LENGTH)) < np.linspace(0, 1, 24)[:, None]
PATTERNS[0], PATTERNS[-1] = False, True


def hashing(x, sigma, positions=None):
    """A Denoiser that depends on all of a row, by hashing."""
    at = jnp.arange(LENGTH) if positions is None else positions
    return jax.nn.log_softmax(jnp.asarray(HASHED)[((x @ jnp.arange(1, LENGTH + 1))[:, None] + 7 * at) % len(HASHED)])


@pytest.mark.parametrize(
    "sampler",
    [
        Counts(PROCESS, LogLinear(), 2),
        Adaptive(PROCESS, EntropyBounded(1.0)),
        slow(FirstHitting(PROCESS)),
        slow(FixedCounts(PROCESS, (1, 1))),
        slow(Adaptive(PROCESS, Margin(2))),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_every_call_unmasks_positions_of_the_first_block_with_a_mask(sampler):
    """Of each row by itself, each free position once, in the calls of its plan; a row draws the same in any batch.

    Controls: blocks of another size; other row numbers.
    """
    sampler, numbers = sampler.in_blocks(3), np.arange(len(PATTERNS))
    tokens = np.where(np.arange(LENGTH) % 4 == 2, MASK, 0) * np.ones((len(PATTERNS), 1), int)

    def sampled(order, numbers):
        return run(jax.random.key(0), hashing, sampler, tokens, PATTERNS[order], numbers, trace=True)

    drawn, calls, trace = sampled(numbers, numbers)
    states = np.concatenate([np.where(PATTERNS, MASK, tokens)[None], trace[:calls]])
    masked = (states == MASK) & PATTERNS
    unmasked = masked[:-1] & ~masked[1:]
    assert np.array_equal(unmasked.sum(0), PATTERNS) and np.all((states[1:] == states[:-1]) | unmasked)

    def in_order(size):
        block = np.arange(LENGTH) // size
        return np.all(~unmasked | (block == block[np.argmax(masked[:-1], axis=-1)][..., None]))

    assert in_order(3) and not in_order(2) and not in_order(4)
    assert np.array_equal(sampled(numbers[::-1], numbers[::-1]).tokens, drawn[::-1])
    assert np.any(sampled(numbers[::-1], numbers).tokens != drawn[::-1])
    if isinstance(sampler, Blockwise):
        plan = jax.jit(lambda: sampler.plan(row_keys(len(PATTERNS)), jnp.asarray(PATTERNS)))()
        sizes, (calls, width) = np.asarray(plan.chosen).sum(-1), sampler.plan_shape(LENGTH)
        assert np.array_equal(sizes.sum(0), PATTERNS.sum(-1)) and len(sizes) == calls
        assert plan.positions.shape[-1] == width <= 3 and sizes.max() <= width
        assert np.all((sizes[1:] == 0) | (sizes[:-1] > 0))  # no empty call between others


def test_samplers_that_know_no_blocks_are_refused():
    """With a message of one line. A sampler in blocks is its own for blocks of its size."""
    hitting, tweedie = FirstHitting(PROCESS), Tweedie(PROCESS, LogLinear(), 4)
    blocks = hitting.in_blocks(2)
    assert blocks == Blockwise(PROCESS, hitting, 2) and blocks.in_blocks(2) is blocks
    on_grid = [tweedie, Euler(PROCESS, LogLinear(), 4), Trapezoidal(PROCESS, LogLinear(), 4)]
    refused = [
        *((functools.partial(one.in_blocks, 2), "does not generate block after block") for one in on_grid),
        (lambda: Corrected(tweedie, Renoise()).in_blocks(2), "Corrected does not generate block after block"),
        (lambda: blocks.in_blocks(4), "for blocks of 2 tokens, the model for blocks of 4"),
        (lambda: hitting.in_blocks(0), "at least one position, not 0"),
        (lambda: Blockwise(Uniform(V), hitting, 2), "needs the absorbing process"),
    ]
    for make, message in refused:
        with pytest.raises(ValueError, match=message) as raised:
            make()
        assert "\n" not in str(raised.value)


# Networks of blocks.

B, N_V, N_L = 28, 5, 6  # rows, tokens and length of the networks
TRUNK = Trunk(width=8, layers=2, heads=2)
SETTINGS = dict(prediction="denoiser", trunk=TRUNK, sigma_range=(1e-3, 7.0), cond_dim=4, conditioning="constant")
NETWORK = BlockNetwork(Absorbing(N_V), block_size=2, **SETTINGS)
THREES = dataclasses.replace(NETWORK, block_size=3)
CAUSAL = AutoregressiveNetwork(Absorbing(N_V), **SETTINGS)
NETWORKS = pytest.mark.parametrize("network", [NETWORK, CAUSAL, slow(THREES)], ids=["2", "1", "3"])


@functools.cache
def params_of(network):
    """Random parameters, without the zeros of initialisation, so that every path affects the output."""
    rng, leaves = np.random.default_rng(0), jax.eval_shape(network.init, jax.random.key(0))
    with jax.ensure_compile_time_eval():
        return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), leaf.dtype), leaves)


@functools.partial(jax.jit, static_argnums=0)
def in_training(network, params, x, x0, lengths=None):
    """The hidden states of noisy tokens given the clean ones. Float[B L W]."""
    return network.hidden(params, x, jnp.ones(len(x)), lengths=lengths, context=x0)[0]


@functools.partial(jax.jit, static_argnums=0)
def in_sampling(network, params, x, lengths=None):
    """The hidden states of a Denoiser's input. Float[B L W]."""
    return network.hidden(params, x, jnp.ones(len(x)), lengths=lengths)[0]


def random_tokens(rows, seed=0):
    return np.random.default_rng(seed).integers(0, N_V, (rows, N_L))


@NETWORKS
def test_noisy_tokens_see_their_own_block_and_the_clean_blocks_before_it(network):
    """Token by token: outputs depend on all of these, and on no others. Of blocks of one token, on clean ones only."""
    x, x0 = np.tile(random_tokens(1, 1), (B, 1)), np.tile(random_tokens(1), (B, 1))
    x[:, 1::4] = N_V
    for changed, tokens in enumerate((x, x0)):  # rows 1 .. L and L + 1 .. 2 L differ in one token from row 0
        tokens[1 + changed * N_L + np.arange(N_L), np.arange(N_L)] = (tokens[0] + 1) % N_V
    hidden = np.asarray(in_training(network, params_of(network), x, x0))
    depends = np.abs(hidden - hidden[:1]).max(-1) > 1e-5
    block = np.arange(N_L) // network.block_size
    own = (block[:, None] == block) & (network.block_size > 1)
    assert np.array_equal(depends[1 : N_L + 1].T, own)
    assert np.array_equal(depends[N_L + 1 : 2 * N_L + 1].T, block[:, None] > block)
    assert network.block_of_generation == network.block_size
    assert network.trunk_length(N_L) == (2 * N_L if network.block_size > 1 else N_L)


def half_written(network, length=N_L):
    """Rows whose first masked block is any of them, in part or all masked, and any tokens or masks after it."""
    x0, size, rng = random_tokens(B)[:, :length], network.block_size, np.random.default_rng(5)
    first = np.arange(B)[:, None] % -(-length // size)
    block = np.arange(length)[None] // size
    at = np.minimum(first * size + rng.integers(0, size, (B, 1)), length - 1)  # one that is masked for certain
    masked = (block == first) & ((rng.random(x0.shape) < 0.5) | (np.arange(length) == at))
    x = np.where(masked | ((block > first) & (rng.random(x0.shape) < 0.7)), N_V, x0)
    return x, x0, masked, block > first


@pytest.mark.parametrize(
    "network, length",
    [(NETWORK, 5), (CAUSAL, 6), slow(NETWORK, 6), slow(CAUSAL, 5), slow(THREES, 6), slow(THREES, 5), slow(THREES, 2)],
    ids=lambda value: str(getattr(value, "block_size", value)),
)
def test_the_denoiser_is_the_form_of_training_at_the_first_block_with_a_mask(network, length):
    """Of rows whose length is no multiple of a block too: the form of training then has padding. At any positions.

    Control: the blocks after it, which have other tokens in the two forms.
    """
    params, (x, x0, masked, later) = params_of(network), half_written(network, length)
    positions = np.argsort(~masked, axis=1, kind="stable")[:, :2]

    @jax.jit
    def losses():
        sigma, denoiser = jnp.ones(B), network.denoiser(params)
        full = [np.pad(tokens, ((0, 0), (0, N_L - length))) for tokens in (x, x0)]
        in_training = network.stats(params, lengths=jnp.full(B, length))(full[0], sigma, full[1])
        log_clean = denoiser(x, sigma, None)
        log_r = jnp.take_along_axis(log_clean, x0[..., None], axis=-1)[..., 0]
        return -log_r, (in_training.log_sum - in_training.target)[:, :length], log_clean, denoiser(x, sigma, positions)

    of_denoiser, trained, log_clean, at_some = map(np.asarray, losses())
    np.testing.assert_allclose(of_denoiser[masked], trained[masked], rtol=1e-4, atol=1e-5)
    later = later & (x == N_V)
    assert length == 2 or gap(of_denoiser[later], trained[later]) > 1e-2
    np.testing.assert_allclose(at_some, np.take_along_axis(log_clean, positions[..., None], 1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.exp(log_clean).sum(-1), 1, rtol=1e-4)


@NETWORKS
def test_tokens_beyond_the_end_of_a_row_have_no_effect(network):
    """Noisy or clean, in both forms. Control: without lengths they do (of a causal network, never)."""
    params, lengths, (x, x0, _, _) = params_of(network), 1 + np.arange(B) % N_L, half_written(network)
    within, last = np.arange(N_L) < lengths[:, None], np.arange(N_L) == lengths[:, None] - 1
    masks = np.where(within & ~last, x0, N_V)

    def changed(tokens):
        return np.where(within, tokens, (tokens + 1) % N_V)

    def change(form, where, *tokens, **of_rows):
        hidden, other = (
            np.asarray(form(network, params, *inputs, **of_rows)) for inputs in (tokens, map(changed, tokens))
        )
        return gap(hidden[where], other[where])

    assert change(in_training, within, x, x0, lengths=lengths) == 0
    assert change(in_sampling, last, masks, lengths=lengths) == 0
    assert (change(in_training, within, x, x0) > 1e-2) == (network.block_size > 1)


@pytest.mark.parametrize("network", [NETWORK, slow(CAUSAL)], ids=["2", "1"])
def test_devices_sample_blocks_without_the_rows_of_others(network):
    """The program of rows on four devices has no communication."""
    devices = NamedSharding(Mesh(np.array(jax.devices()[:4]), "data"), PartitionSpec("data"))
    program = in_sampling.lower(network, params_of(network), jax.device_put(half_written(network)[0], devices))
    assert not re.search("all-gather|all-reduce|all-to-all|collective", program.compile().as_text())


@pytest.mark.slow
@pytest.mark.parametrize("network", [NETWORK, CAUSAL], ids=["2", "1"])
def test_scanned_layers_of_a_network_of_blocks_are_the_same_function(network):
    """In both forms, with recomputation in training."""
    params, (x, x0, _, _) = params_of(network), half_written(network)
    other = dataclasses.replace(network, trunk=network.trunk.clone(scan=True, remat="full"))
    for form, rows in ((in_training, (x, x0)), (in_sampling, (x,))):
        expected = form(network, params, *rows)
        np.testing.assert_allclose(form(other, scanned(params), *rows), expected, rtol=1e-4, atol=1e-5)


def test_draws_with_the_head_at_masked_positions_equal_those_with_the_head_everywhere():
    """Of pairs, the L + N masked ones, with padding, given tokens and masks that stay. Control: other lengths."""
    x0, lengths = random_tokens(8), np.array([6, 5, 4, 3, 2, 1, 6, 6])
    x0[7, 4:] = N_V
    free = (np.arange(N_L) < lengths[:, None]) & (x0 != N_V)
    free[6, 1] = False
    network, bound = with_trunk(NETWORK, SHALLOW), NETWORK.bound(LogLinear())
    assert bound == MaskCountBound(NETWORK.process, 2) and bound.takes_pairs(4)

    @functools.partial(jax.jit, static_argnums=0)
    def draws(masked_pairs, lengths):
        repeated = jnp.repeat(lengths, 2)
        stats = network.bound_stats(params_of(network), x0, repeated, masked_pairs=masked_pairs)
        return bound.draws(stats, row_keys(8), x0, 4, free, lengths).diffusion

    at_masks, everywhere = draws(True, lengths), draws(False, lengths)
    np.testing.assert_allclose(at_masks, everywhere, rtol=1e-5)
    assert np.all(everywhere > 0) and gap(draws(True, np.full(8, N_L)), everywhere) > 1e-3


def test_networks_of_blocks_refuse_what_they_cannot_be():
    """Each with a message of one line. They have the parameters of a network of tokens of the same sizes."""
    plain, schedule = TokenNetwork(Absorbing(N_V), **SETTINGS), LogLinear()
    for network in (NETWORK, CAUSAL):
        assert network.num_parameters() == plain.num_parameters()
        assert jax.tree.structure(params_of(network)) == jax.tree.structure(params_of(plain))
    assert CAUSAL.loss_at_times(schedule, 1e-3, 4) == CAUSAL.bound(schedule) == MaskCountBound(CAUSAL.process, 1)
    assert NETWORK.loss_at_times(schedule, 1e-3, 4) == TimeLoss(NETWORK.process, schedule, 1e-3, 4, 2)
    assert dataclasses.replace(NETWORK, bound_steps=7).bound(schedule) == DiscreteTimeBound(NETWORK.process, 7, 2)
    needs = "is for the absorbing process, network.prediction=denoiser and network.conditioning=constant"
    refused = [
        *((dict(process=Uniform(N_V)), needs), (dict(prediction="score"), needs), (dict(conditioning="sigma"), needs)),
        (dict(given_embedding=True), "given_embedding is for the uniform process"),
    ]
    for network in (NETWORK, CAUSAL):
        for changes, message in refused:
            with pytest.raises(ValueError, match=message) as raised:
                dataclasses.replace(network, **changes)
            assert "\n" not in str(raised.value)
        with pytest.raises(ValueError, match="no embedding of given tokens"):
            network.denoiser({}, given=jnp.zeros((1, N_L), bool))(jnp.zeros((1, N_L), int), jnp.ones(1))
    with pytest.raises(ValueError, match="an autoregressive network has blocks of one token, not 2"):
        dataclasses.replace(CAUSAL, block_size=2)
    with pytest.raises(TypeError, match="block_size"):
        BlockNetwork(Absorbing(N_V), **SETTINGS)


# Training.

LENGTHS = np.array([6, 6, 5, 4, 2, 1, 3, 6], np.int32)
TRAINED = random_tokens(8, seed=3)
SHALLOW = Trunk(width=8, layers=1, heads=2, dropout=0.2)  # dropout in losses only


def objective_of(network, noise_sampling, batch_size=8):
    return ScoreEntropy(network, LogLinear(0.01), batch_size, 0.05, noise_sampling)


def with_trunk(network, trunk):
    return dataclasses.replace(network, trunk=trunk)


@functools.partial(jax.jit, static_argnums=0)
def cross_entropies(network, params, x0, lengths):
    """Those of masked tokens with each set of the positions of every block masked. Float[2^b B L]."""
    size = network.block_size

    def of_masks(where):
        x = network.process.mask_tokens(x0, jnp.tile(where, N_L // size) & (jnp.arange(N_L) < lengths[:, None]))
        sigma = jnp.ones(len(x))
        return network.process.cross_entropy(network.stats(params, lengths=lengths)(x, sigma, x0), x, sigma[:, None])

    return jax.lax.map(of_masks, jnp.asarray(states(2, size)) == 1)


def expected_losses(network, weight, lengths=LENGTHS):
    """The exact mean of each row's loss. weight(k, n): of each set of k masked tokens of a block of n."""
    size, sets = network.block_size, states(2, network.block_size) == 1
    of_sets = np.asarray(cross_entropies(network, params_of(network), TRAINED, lengths), np.float64)
    means = np.zeros(len(lengths))
    for row, start in itertools.product(range(len(lengths)), range(0, N_L, size)):
        n = min(max(lengths[row] - start, 0), size)
        for where, losses in zip(sets, of_sets, strict=True):
            if where.any() and not where[n:].any():
                means[row] += weight(int(where.sum()), n) * losses[row, start : start + n].sum()
    return means


@pytest.mark.parametrize("noise_sampling", ["mask_count", slow("time")])
def test_the_loss_of_blocks_averages_to_the_bound(noise_sampling):
    """Over the keys of steps and the rows of a batch of one text, whose length may be no multiple of a block.

    Against the enumerated sets of masks. Controls: the weights of another schedule; the lengths of other texts.
    """
    network, rows = with_trunk(THREES, SHALLOW.clone(dropout=0.0)), jnp.arange(8)
    objective = objective_of(network, noise_sampling)

    @jax.jit
    def drawn(keys):  # of texts and keys, the mean of the rows
        def losses(text, length, key):
            batch = Batch(jnp.tile(text, (8, 1)), jnp.full(8, length))
            return objective(params_of(network), batch, rows, key).loss.mean()

        over_texts = jax.vmap(losses, (0, 0, None))
        return jax.lax.map(lambda key: over_texts(jnp.asarray(TRAINED), jnp.asarray(LENGTHS), key), keys)

    values = np.asarray(drawn(jax.random.split(jax.random.key(7), 300)), np.float64)
    weight = {"mask_count": by_count, "time": by_time}[noise_sampling]

    def largest_error(weight, lengths=LENGTHS):
        due, error = expected_losses(network, weight, lengths), values.std(0) / len(values) ** 0.5
        return np.max(np.abs(values.mean(0) - due) / (error + 1e-5))  # some losses have no variance

    assert largest_error(weight) < 4
    assert largest_error(functools.partial(by_time, eps=0.3)) > 6 and largest_error(weight, np.roll(LENGTHS, 1)) > 6


class Everywhere(BlockNetwork):
    """A network of blocks whose head runs at all positions."""

    def stats(self, params, **inputs):
        return super().stats(params, **inputs | {"masked_pairs": False})


DROPPING = with_trunk(THREES, SHALLOW)
BATCH = (params_of(DROPPING), TRAINED, LENGTHS, np.arange(8), jax.random.key(5))


@pytest.mark.parametrize("lengths", [LENGTHS, slow(None)], ids=["padded", "full"])
def test_the_head_at_the_masked_positions_of_pairs_gives_the_same_losses(lengths):
    """For each row, with dropout. The head runs at half of L + N positions a row. Control: other keys."""
    everywhere = Everywhere(**{field.name: getattr(DROPPING, field.name) for field in dataclasses.fields(DROPPING)})
    paired, params, tokens, *others = objective_of(DROPPING, "mask_count"), *BATCH[:2], *BATCH[3:]

    @functools.partial(jax.jit, static_argnums=0)
    def losses(network, key):
        return objective_of(network, "mask_count")(params, Batch(tokens, lengths), others[0], key).loss

    at_masks = losses(DROPPING, others[1])
    np.testing.assert_allclose(at_masks, losses(everywhere, others[1]), rtol=1e-5)
    assert gap(at_masks, losses(everywhere, jax.random.key(4))) > 1e-2
    assert paired.head_positions(8, N_L) == 8 * (N_L + 2) / 2
    assert objective_of(DROPPING, "time").head_positions(8, N_L) == 8 * N_L


@pytest.mark.parametrize("noise_sampling", ["mask_count", slow("time")])
def test_the_gradient_of_blocks_is_independent_of_devices_and_microbatches(noise_sampling):
    """On four devices, and on one in two microbatches of the rows, by their global numbers; padded, with dropout.

    Control: the numbers of other rows.
    """
    objective, (params, *rows, key) = objective_of(DROPPING, noise_sampling), BATCH

    @jax.jit
    def gradient(tokens, lengths, numbers):
        def loss(params):
            losses = objective(params, Batch(tokens, lengths), numbers, key).loss
            return losses.sum(), losses

        return jax.grad(loss, has_aux=True)(params)

    devices = NamedSharding(Mesh(np.array(jax.devices()[:4]), "data"), PartitionSpec("data"))
    on_devices, losses = gradient(*jax.device_put(rows, devices))
    assert len(losses.sharding.device_set) == 4
    halves = [gradient(*(array[half] for array in rows)) for half in np.split(np.arange(8), 2)]
    np.testing.assert_allclose(losses, np.concatenate([half[1] for half in halves]), rtol=1e-5)
    summed = jax.tree.map(jnp.add, halves[0][0], halves[1][0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), on_devices, summed)
    assert gap(gradient(*(array[:4] for array in rows[:2]), np.arange(4, 8))[1], losses[:4]) > 1e-2


def is_stratified(levels):
    """True if each of n equal parts of [0, 1) has one of n levels."""
    return np.array_equal(np.floor(np.sort(np.ravel(levels)) * np.size(levels)), np.arange(np.size(levels)))


@pytest.fixture(scope="module")
def levels():
    """The levels in [0, 1) of the blocks of a batch, of times and of mask counts, each Float[rows blocks]."""
    rows, length, key, fine = jnp.arange(16), 8, jax.random.key(2), 2**20
    times = np.asarray(objective_of(NETWORK, "time", 16).levels(rows, key, length))
    objective = objective_of(NETWORK, "mask_count", 16)
    counts = np.asarray(objective.counts(rows, key, fine, 4))  # of blocks of so many tokens that a count has one level
    assert np.all(counts[::2] + counts[1::2] == fine + 1)  # antithetic
    of_two = np.asarray(objective.levels(rows, key, length))
    assert np.array_equal(np.bincount(of_two.ravel())[1:], [32, 32]) and np.all(of_two[::2] + of_two[1::2] == 3)
    return {"time": (times - 0.05) / 0.95, "mask_count": (counts[::2] - 0.5) / fine}


@pytest.mark.parametrize("noise_sampling", ["time", "mask_count"])
def test_each_stratum_of_a_batch_has_exactly_one_block(levels, noise_sampling):
    """Of mask counts, of the even rows of pairs. Control: the levels of a half of the batch."""
    assert is_stratified(levels[noise_sampling]) and levels[noise_sampling].shape[1] == 4
    assert not is_stratified(np.tile(levels[noise_sampling][::2], (2, 1)))


@pytest.mark.parametrize("noise_sampling", ["time", "mask_count"])
def test_the_blocks_at_each_place_of_a_row_have_all_levels(levels, noise_sampling):
    """In the batch, and on each of two devices; otherwise the loss of that place is not that of all noise levels."""
    for rows in (levels[noise_sampling], *np.split(levels[noise_sampling], 2)):
        assert all(is_stratified(of_place) for of_place in rows.T), rows


@pytest.mark.parametrize("lengths", [LENGTHS, slow(None)], ids=["padded", "full"])
def test_the_loss_of_blocks_of_one_token_is_the_cross_entropy_for_every_key(lengths):
    """The bound too, and the sum of the Denoiser's log-likelihoods, each given the tokens before it. Control: times."""
    network = with_trunk(CAUSAL, SHALLOW.clone(dropout=0.0))
    params, rows = params_of(network), jnp.arange(8)
    free = np.arange(N_L) < (np.full(8, N_L) if lengths is None else lengths)[:, None]

    @jax.jit
    def nats():
        def given_before(i):
            x = jnp.where(jnp.arange(N_L) < i, TRAINED, N_V)
            log_r = network.denoiser(params)(x, jnp.ones(8), None)[jnp.arange(8), i, jnp.asarray(TRAINED)[:, i]]
            return jnp.where(jnp.asarray(free)[:, i], -log_r, 0.0)

        keys = jax.random.split(jax.random.key(0), 3)
        count, time = (objective_of(network, noise_sampling) for noise_sampling in ("mask_count", "time"))
        losses = [
            jax.vmap(lambda key: one(params, Batch(TRAINED, lengths), rows, key).loss)(keys) for one in (count, time)
        ]
        stats = network.bound_stats(params, TRAINED, lengths)
        draws = network.bound(LogLinear()).draws(stats, row_keys(8), TRAINED, 4, jnp.asarray(free), lengths)
        return jax.lax.map(given_before, jnp.arange(N_L)).sum(0), *losses, draws.diffusion

    exact, of_counts, of_times, draws = nats()
    np.testing.assert_allclose(of_counts, np.tile(exact, (3, 1)), rtol=1e-5)
    np.testing.assert_allclose(draws, np.tile(exact, (4, 1)), rtol=1e-5)
    assert np.ptp(of_times, axis=0).max() > 0.1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("small"))


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 1])
def test_losses_of_steps_are_independent_of_devices_and_microbatches(corpus, size):
    """Five steps of training, with dropout, on one device and on four in two microbatches. Control: another size."""

    def losses(size, devices, accumulation):
        settings = ("network.dropout=0.1", f"training.accumulation={accumulation}", f"network.block_size={size}")
        config = small_config(corpus, *settings, "training.batch_size=16")
        objective, optimizer, mesh = parts(config, corpus, devices)
        _, step, shardings = make_step(config, objective, optimizer, mesh)
        state = jax.device_put(jax.jit(lambda: init_state(config, objective, optimizer))(), shardings)
        values = []
        for k in range(5):
            rows = jax.device_put(batch(corpus, 16, 16, 0, k), parallel.batch_sharding(mesh))
            state, metrics = step(state, rows, {})
            values.append(float(metrics["loss"]))
        return np.array(values)

    alone = losses(size, 1, 1)
    np.testing.assert_allclose(losses(size, 4, 2), alone, rtol=1e-4)
    assert np.abs(losses(2, 1, 1) / alone - 1).max() > 1e-3


# Evaluation and generation.


@pytest.mark.parametrize("settings", [{}, slow({"steps": 3}), slow({"protocol": "duo"})], ids=str)
def test_an_evaluation_of_blocks_is_read_again_from_its_folder(corpus, tmp_path, settings):
    """With the same result: the noise levels of its records are those of its rows."""
    model, texts = shaken(untrained_model(corpus, "network.block_size=4")), ["the 3 times table: 3, 6, 9.\n" * 3]
    first, again = (model.perplexity(texts, draws=4, out=tmp_path / "out", **settings) for _ in range(2))
    assert first.nats_per_token == again.nats_per_token


def test_windows_start_at_multiples_with_the_stride_asked_for():
    """The last covers the end of its row, shorter rows repeat their last, and none leaves a gap."""
    lengths = np.array([5, 16, 17, 24, 40, 41])
    for stride, multiple in itertools.product((None, 4, 8, 16), (1, 2, 4)):
        starts, step = np.array(list(windows(lengths, 16, stride, multiple))).T, stride or 8
        assert np.all(starts % multiple == 0) and np.all(np.diff(starts) >= 0) and np.all(np.diff(starts) <= step)
        end = starts[:, -1] + 16
        assert np.all(end >= lengths) and np.all(end < np.maximum(lengths, 16) + multiple)
        assert np.array_equal(starts, np.minimum(step * np.arange(starts.shape[1]), starts[:, -1:]))
        assert starts.shape[1] == -(-starts.max() // step) + 1  # no window more than needed


def test_windows_overlap_by_half_a_block_by_default():
    """Without a multiple as before; of half a block's multiples the largest, at least one."""
    lengths = np.array([3, 7, 12, 30])
    for block in (5, 6, 16):
        stride, last = block - block // 2, np.maximum(lengths - block, 0)
        due = [np.minimum(number * stride, last) for number in range(-(-last.max() // stride) + 1)]
        np.testing.assert_array_equal(list(windows(lengths, block)), due)
    assert np.array(list(windows(np.array([24]), 12, None, 4))).T.tolist() == [[0, 4, 8, 12]]
    assert np.array(list(windows(np.array([23]), 12, None, 6))).T.tolist() == [[0, 6, 12]]
    assert np.array(list(windows(np.array([20]), 8, None, 8))).T.tolist() == [[0, 8, 16]]


# The config.


@pytest.mark.parametrize(
    "settings, message",
    [
        (["process.name=uniform"], "block_size=4 needs process.name=absorbing"),
        (["process.name=gaussian"], "block_size=4 needs process.name=absorbing"),
        (["network.prediction=score"], "network.prediction=denoiser"),
        (["network.conditioning=sigma"], "needs network.conditioning=constant: each block has a noise level"),
        (["training.loss=cross_entropy", "training.noise_sampling=time"], "block_size=4 needs training.loss=bound"),
        (["data.block_length=30"], "block_size=4 must divide data.block_length=30"),
        (["data.block_length=4"], "must divide data.block_length=4, and be less; network.block_size=0 is one block"),
        (["network.block_size=64"], "block_size=64 must divide data.block_length=32, and be less"),
        (["network.attention=splash", "data.block_length=128"], "which network.attention=splash does not take"),
        (["network.architecture=bert"], "block_size is for network.architecture=dit"),
        (["network.block_size=-1"], "network.block_size must not be negative"),
        (["network.given_embedding=true"], "given_embedding is for process.name=uniform"),
    ],
)
def test_settings_that_do_not_go_with_blocks_are_one_line(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        configs.override(configs.default(), ["network.block_size=4", *settings])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size, kind", [(0, TokenNetwork), (1, AutoregressiveNetwork), (4, BlockNetwork)], ids=name_of)
def test_a_size_of_blocks_makes_the_network_and_its_recipe(size, kind):
    """Blocks have a recipe of their own, whose network is not conditioned on the noise. What is set stays set."""
    config = configs.override(configs.default(), [f"network.block_size={size}"])
    assert kind_of(config) == (BLOCKS if size else "absorbing")
    resolved = configs.resolved(config)
    assert resolved.network.conditioning == ("constant" if size else "sigma")
    for key, value in RECIPES[kind_of(config)].items():
        group, name = key.split(".")
        assert config[group][name] is None and resolved[group][name] == value
    process, _, network = configs.build(config, N_V)
    assert type(network) is kind and process == Absorbing(N_V) and network.block_of_generation == (size or None)
    at_times = configs.override(config, ["training.noise_sampling=time"])
    assert configs.resolved(at_times).training.noise_sampling == "time"
    assert kind_of(configs.override(configs.default(), ["process.name=uniform"])) == "uniform"
