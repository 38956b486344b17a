"""Generation in blocks from left to right, and the bound in discrete time, against distributions with known answers."""

import dataclasses
import functools
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from oracle import (
    Joint,
    by_time,
    completions,
    gap,
    index,
    kernel,
    p_value,
    random_tables,
    row_keys,
    scaled,
    standard_errors,
    states,
    table_denoiser,
)

from sedd.diffusion import keyed_random
from sedd.diffusion.denoiser import condition_on_mask_ratio
from sedd.diffusion.discrete import likelihood
from sedd.diffusion.discrete.blocks import num_blocks
from sedd.diffusion.discrete.correctors import Renoise
from sedd.diffusion.discrete.likelihood import DiscreteTimeBound, MaskCountBound, TimeLoss
from sedd.diffusion.discrete.loss import count_loss
from sedd.diffusion.discrete.pickers import Entropy, EntropyBounded, Margin
from sedd.diffusion.discrete.process import Absorbing, Jump, Uniform
from sedd.diffusion.discrete.samplers import Euler, Trapezoidal, Tweedie
from sedd.diffusion.discrete.score import clean_stats, score_stats, stats_from
from sedd.diffusion.discrete.unmasking import Adaptive, Blockwise, Counts, FirstHitting, FixedCounts
from sedd.diffusion.sampling import Corrected, sample
from sedd.diffusion.schedule import LogLinear

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


def total(draws):
    """Each draw of each row's bound. Float64[M B]."""
    return np.asarray(draws.prior + draws.diffusion + draws.reconstruction, np.float64)


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
    [(3, 4, 2, 4), slow(3, 4, 2, 1), slow(2, 6, 3, 4), slow(2, 6, 2, 4), slow(3, 3, 3, 4), slow(3, 4, 1, 1)],
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
REPEATS = 500


def of_cases(function):
    """A function of one row and its free positions, for each of many copies of the cases. Float[B]."""
    return np.tile([function(x0[None], free) for x0, free in zip(CASES, CASES_FREE, strict=True)], REPEATS)


@functools.cache
def drawn_of_cases(bound, num_draws):
    """The draws of many copies of the cases, as a function of the factor by which the scores are wrong."""
    x0, free = np.tile(CASES, (REPEATS, 1)), np.tile(CASES_FREE, (REPEATS, 1))
    stats_fn = stats_of_blocks(UNTRAINED, bound.block_size)

    @jax.jit
    def draws(factor, x0, free):
        return bound.draws(scaled(PROCESS, stats_fn, factor), row_keys(len(x0)), x0, num_draws, free)

    return lambda factor=1.0: draws(factor, x0, free)


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
    drawn = draws()
    values = total(drawn)
    assert len(values) == num_draws and abs(standard_errors(values.mean(0) - exact)) < 4
    assert standard_errors(total(draws(1.5)).mean(0) - exact) > 4 and (num_draws % 2 or unbiased(values, exact))
    if num_draws == 4:
        assert not unbiased(values[[0, 2, 1, 3]], exact)
        np.testing.assert_allclose(np.asarray(drawn.level).reshape(2, 2, -1).mean(1), 0.5, atol=1e-12)


@pytest.mark.parametrize("num_draws", [4, slow(1), slow(3), slow(16)])
def test_blocks_of_one_token_have_the_exact_likelihood_in_every_draw(num_draws, float64):
    """Of any network, by one call of it, for any number of draws. Control: the draws of blocks of two differ."""
    bound, calls = MaskCountBound(PROCESS, 1), []

    def counted(x, sigma, x0):
        jax.debug.callback(lambda: calls.append(x.shape))
        return stats_of_blocks(UNTRAINED, 1)(x, sigma, x0)

    draws = jax.jit(lambda x0, free: bound.draws(counted, row_keys(len(x0)), x0, num_draws, free))
    values = total(draws(CASES, CASES_FREE))
    jax.effects_barrier()
    exact = [-along_orders(TABLE, x0[None], 1, free)[0, 0] for x0, free in zip(CASES, CASES_FREE, strict=True)]
    assert calls == [CASES.shape] and len(values) == num_draws and not bound.takes_pairs(4)
    assert gap(values, exact) < 1e-12 and np.ptp(values, axis=0).max() == 0
    assert np.ptp(total(drawn_of_cases(MaskCountBound(PROCESS, 2), 4)()), axis=0).max() > 0.1


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

    for num_draws in (3, 4) if bound.takes_pairs(4) else (4,):
        assert program(L, num_draws) == program(0, num_draws)
    assert program(0, 4) != program(2, 4)
    assert num_blocks(L, 0) == num_blocks(L, L) == 1 and num_blocks(L, 2) == 2
    with pytest.raises(ValueError, match="4 positions cannot be cut into blocks of 3"):
        program(3, 4)


@pytest.mark.parametrize("size", [3, slow(0)], ids=["blocks", "rows"])
def test_antithetic_pairs_mask_every_token_of_each_block_and_one_twice(size):
    """Of each block with free tokens, at most L + N in all. Controls: rows of two pairs; pairs without blocks."""
    free, x = np.random.default_rng(0).random((300, 12)) < 0.6, []
    free[:10] = True

    def stats_fn(rows, sigma, x0):
        jax.debug.callback(x.append, rows)
        return score_stats(jnp.zeros((*rows.shape, V)), rows, x0)

    draws = jax.jit(lambda x0, free: MaskCountBound(PROCESS, size).draws(stats_fn, row_keys(300), x0, 8, free))
    jax.block_until_ready(draws(np.zeros_like(free, int), free))
    jax.effects_barrier()
    masked = np.reshape(x, (-1, 300, 2, 12)) == MASK

    def are_pairs(masked):
        both, n = masked.sum(-2), free.reshape(300, 4, 3).sum(-1)
        in_blocks = both.reshape(-1, 300, 4, 3).sum(-1)
        return np.all((both >= free) & (both <= 2 * free)) and np.all(in_blocks == n + (n > 0))

    assert len(masked) == 4 and are_pairs(masked) == (size == 3)
    assert not are_pairs(np.stack([masked[0, :, 0], masked[1, :, 1]], axis=1)[None])


def at_counts(stats_fn, keys, x0, free=None, lengths=None):
    """The loss of rows in blocks of two, one or both of whose tokens are masked."""
    k = 1 + (np.arange(len(x0))[:, None] + np.arange(x0.shape[1] // 2)) % 2
    return count_loss(PROCESS, stats_fn, keys, x0, k, free, lengths).sum(-1)


def draws_of(bound, num_draws):
    """The draws of a bound, with the arguments of `at_counts`."""
    return lambda stats_fn, keys, x0, *row: bound.draws(stats_fn, keys, x0, num_draws, *row).diffusion


@pytest.mark.parametrize(
    "loss",
    [
        at_counts,
        slow(draws_of(MaskCountBound(PROCESS, 2), 1)),
        slow(draws_of(MaskCountBound(PROCESS, 2), 4)),
        slow(draws_of(DiscreteTimeBound(PROCESS, 3, 2), 4)),
    ],
    ids=["loss", "k", "pairs of k", "T"],
)
def test_the_bound_of_blocks_given_the_length_is_independent_of_padding(loss, float64):
    """Padding may be blocks of its own. The network is conditioned on the mask ratio. Control: other lengths."""
    x0 = np.random.default_rng(0).integers(0, 3, (50, L))
    padded, free = np.pad(x0, ((0, 0), (0, 4))), np.tile(np.arange(8) < L, (50, 1))

    def stats_fn(x, sigma, x0):
        stats = stats_of_blocks(UNTRAINED, 2)(x[:, :L], sigma, x0[:, :L])
        stats = stats._replace(log_sum=stats.log_sum + 0.1 * jnp.expm1(-sigma[:, None]))
        return jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (0, x.shape[1] - L))), stats)

    nats = jax.jit(lambda *row: loss(stats_fn, row_keys(50), *row))
    alone = nats(x0)
    np.testing.assert_allclose(nats(padded, free, np.full(50, L)), alone, rtol=1e-12)
    assert gap(nats(padded, free, np.full(50, 8)), alone) > 1e-2


# The bound in discrete time.


def over_steps_and_masks(bound, stats_fn, x0, free=None):
    """The draws at every step of each block, and at the masks of an even grid of random numbers at each position.

    Their mean is exact: the chance of a mask is a multiple of 1 / T. Int[K L], Bool[K L] -> Float[... K T^N T^L].
    """
    free = np.ones(x0.shape, bool) if free is None else free
    length, steps = x0.shape[1], bound.steps
    blocks = num_blocks(length, bound.block_size)
    step, cell = states(steps, blocks), (states(steps, length) + 0.5) / steps
    u = np.tile(np.repeat((step + 0.5) / steps, len(cell), axis=0), (len(x0), 1))
    cells = np.tile(cell, (len(x0) * len(step), 1))
    rows = [np.repeat(of_text, len(step) * len(cell), axis=0) for of_text in (x0, free)]
    with mock.patch.object(likelihood, "in_stratum", lambda *_: jnp.asarray(u if blocks > 1 else u[:, 0])):
        with mock.patch.object(keyed_random, "bernoulli", lambda keys, p: cells < p):
            draws = jax.jit(lambda x0, free: bound.draws(stats_fn, row_keys(len(x0)), x0, 1, free).diffusion)
            values = np.asarray(draws(*rows))[0]
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


@pytest.mark.parametrize("steps", [4, slow(1), slow(2)])
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


@pytest.mark.parametrize("steps", [3, slow(1), slow(2)])
def test_the_bound_of_blocks_in_discrete_time_is_that_of_tweedie_from_block_to_block(steps, float64):
    """For an inconsistent network. Two tokens fall into one of T steps with probability 1 / T, and are drawn one by one
    else: so it is a mean of the bounds by mask counts and of one step, and tends to the first. Control: other T.

    With given tokens and masks that stay, too.
    """
    rows = np.concatenate([states(V, L), CASES]), np.concatenate([np.ones((V**L, L), bool), CASES_FREE])
    bound, stats_fn = DiscreteTimeBound(PROCESS, steps, 2), stats_of_blocks(UNTRAINED, 2)
    values = over_steps_and_masks(bound, stats_fn, *rows).mean((-1, -2))
    at_once, in_turn = (
        np.array([function(x0[None], free) for x0, free in zip(*rows)]) for function in (together, one_by_one)
    )
    assert gap(values, in_turn + (at_once - in_turn) / steps) < 1e-12
    assert gap(values, in_turn + (at_once - in_turn) / (steps + 1)) > 1e-2
    values, p = values[: V**L], of_tweedie(scipy.special.log_softmax(2 * TABLE, axis=-1), steps, 2)
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-12)
    assert (values + np.log(p)).min() > -1e-12 and (gap(values, -np.log(p)) < 1e-12) == (steps == 1)


@pytest.mark.parametrize("length, steps", [(2, (1, 4)), slow(2, (1, 2, 4, 8)), slow(3, (1, 2, 4))])
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


@pytest.mark.slow
@pytest.mark.parametrize("num_draws", [4, 3])
def test_drawn_steps_of_blocks_average_to_the_bound(num_draws, float64):
    """With given tokens and masks that stay. Controls: wrong scores; half of the strata; another number of steps."""
    draws = drawn_of_cases(DiscreteTimeBound(PROCESS, 4, 2), num_draws)
    at_once, in_turn = map(of_cases, (together, one_by_one))
    drawn, exact = draws(), in_turn + (at_once - in_turn) / 4
    values = total(drawn)
    assert len(values) == num_draws and abs(standard_errors(values.mean(0) - exact)) < 4
    assert standard_errors(total(draws(1.5)).mean(0) - exact) > 4 and standard_errors(values.mean(0) - at_once) < -4
    if num_draws == 4:
        assert unbiased(values, exact) and not unbiased(values[[0, 2, 1, 3]], exact)
    level = np.asarray(drawn.level)  # the mean of the ratios i / 4 of two blocks
    assert np.all(8 * level == np.round(8 * level)) and level.min() == 1 / 4 and level.max() == 1


@pytest.mark.parametrize("strata", [4, slow(1)])
def test_the_loss_of_blocks_at_times_averages_to_its_integral(strata, float64):
    """Over consecutive rows of one text, whose times are of all strata. Controls: wrong scores; another schedule."""
    x0 = np.repeat(states(V, L), 4 * 25, axis=0)
    at_once, in_turn = -along(TABLE, states(V, L), [[0, 1], [2, 3]], 2), -along_orders(TABLE, states(V, L), 2).mean(0)
    loss, times = TimeLoss(PROCESS, LogLinear(0.01), 0.05, strata, 2), []

    @jax.jit
    def drawn(factor, x0):
        def stats_fn(x, sigma, x0):
            jax.debug.callback(times.append, (-jnp.expm1(-sigma[:, ::2]) / 0.99 - 0.05) / 0.95)
            return stats_of_blocks(UNTRAINED, 2)(x, sigma, x0)

        scores = scaled(PROCESS, stats_fn, factor)
        return loss.draws(scores, row_keys(len(x0)), x0, 1, rows=jnp.arange(len(x0))).diffusion[0]

    def errors(values, **ends):  # of the means of four rows of one text
        exact = by_time(1, 2, **ends) * (2 * in_turn - at_once) + by_time(2, 2, **ends) * at_once
        return standard_errors((np.reshape(values, (81, -1)) - exact[:, None]).reshape(-1, 4).mean(-1))

    values, wrong = drawn(1.0, x0), drawn(2.0, x0)
    assert abs(errors(values)) < 4 < min(errors(wrong), errors(values, eps=0.3))
    jax.effects_barrier()
    of_rows = np.sort(np.floor(np.reshape(times[0], (-1, strata, 2)) * strata), axis=1)
    assert np.all(of_rows == np.arange(strata)[:, None]) and np.ptp(times[0]) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("strata", [8, 2])
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
    ]:
        with pytest.raises(ValueError, match=message) as raised:
            make()
        assert "\n" not in str(raised.value)


# Samplers from block to block.

run = jax.jit(sample, static_argnames=("denoiser", "sampler", "trace"))

# The given positions differ by row: none, a prefix, a whole block, some of each block, a mask that stays.
TOKENS = np.array([[0, 1, 2, 1], [2, 0, 1, 1], [1, 1, 0, 2], [0, 2, 2, 0], [MASK, 0, 2, 1]])
FREE = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 1], [0, 1, 1, 1]], bool)
COPIES = 1_000


ROWS = np.concatenate([completions(*row, V) for row in zip(TOKENS, FREE, strict=True)])
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
            np.mean([np.exp(along(TABLE, completions(*row, V), groups)) for groups in plans(row[1])], axis=0)
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
    [slow(0, 4), slow(1, 4), slow(2, 4), (3, 3), slow(4, 2), slow(5, 4)],
    ids=["hitting 2", "hitting 1", "hitting 3", "fixed 3", "counts 1", "counts 2"],
)
def test_blocks_are_sampled_from_their_exact_distribution(kind, calls):
    """The jitted loop in float32, with an inconsistent network, given tokens and masks, and a last block that is short.

    In the calls of the row with most. Controls: the distributions of the other samplers, and of a row in random order.
    """
    tokens, free, sampler = np.tile(TOKENS, (COPIES, 1)), np.tile(FREE, (COPIES, 1)), list(PLANS)[kind]
    drawn, number, _ = run(jax.random.key(0), UNTRAINED, sampler, tokens, free)
    assert number == calls and isinstance(sampler, Blockwise)
    assert np.array_equal(np.where(free, tokens, drawn), tokens) and np.all(drawn[free] < MASK)
    of_all = [fits(drawn, p) for p in all_probabilities()]
    assert of_all.pop(kind) > 1e-3 and max(of_all) < 1e-6


@pytest.mark.slow
def test_blocks_of_an_exact_denoiser_are_the_joint_distribution():
    """Given a prefix too. Control: independent tokens of the same marginals."""
    joint, rows = Joint.random(V, L), ~np.any(TOKENS == MASK, axis=-1)
    tokens, free = np.tile(TOKENS[rows], (COPIES, 1)), np.tile(FREE[rows], (COPIES, 1))
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
    "picker, size", [(EntropyBounded(0.8), 2), slow(Margin(1), 3), slow(Entropy(2), 3), slow(Margin(1), 2)], ids=str
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
    tokens, free, sampler = np.tile(TOKENS, (COPIES, 1)), np.tile(FREE, (COPIES, 1)), Adaptive(PROCESS, Entropy(2))
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
        FixedCounts(PROCESS, (1, 1)),
        slow(Counts(PROCESS, LogLinear(), 2)),
        slow(FirstHitting(PROCESS)),
        slow(Adaptive(PROCESS, EntropyBounded(1.0))),
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
    sizes = unmasked.sum(-1)
    assert np.all((sizes[1:] == 0) | (sizes[:-1] > 0))  # no empty call between others
    if isinstance(sampler, Blockwise):
        plan, (most_calls, width) = jax.eval_shape(sampler.plan, row_keys(1), PATTERNS[:1]), sampler.plan_shape(LENGTH)
        assert plan.chosen.shape == plan.positions.shape == (most_calls, 1, width)
        assert calls <= most_calls and sizes.max() <= width <= 3


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
