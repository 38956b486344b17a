"""The likelihood of decoding in random order, against the sum over all orders and against exact distributions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import (
    Joint,
    MarkovChain,
    log_likelihood_along,
    log_likelihoods_of_orders,
    random_tables,
    standard_errors,
    states,
    table_denoiser,
)

from sedd.diffusion import keyed_random
from sedd.diffusion.discrete.exact_likelihood import importance_bound, order_log_likelihoods, subset_log_likelihood
from sedd.diffusion.discrete.process import Absorbing

V, L = 3, 4
PROCESS, MASK = Absorbing(V), V


def log_mean(values):
    return np.logaddexp.reduce(values, axis=0) - np.log(len(values))


exact = jax.jit(subset_log_likelihood, static_argnames=("process", "denoiser", "batch_size"))
TABLE = random_tables(1, L)[0]
UNTRAINED = table_denoiser(TABLE)


@jax.jit
def log_likelihoods(x0, positions):
    """The exact log-likelihood of every row of clean tokens. Int[N L], Int[n] -> Float[N]."""
    return jax.lax.map(lambda x0: subset_log_likelihood(PROCESS, UNTRAINED, x0, positions), x0)


@pytest.mark.parametrize("positions", [[0, 1, 2, 3], [2, 0], [1]], ids=str)
def test_subsets_sum_over_all_orders(positions, float64):
    """Given the other tokens, or with masks that stay; with batch sizes that divide the number of rows or do not."""
    rng = np.random.default_rng(1)
    for x0 in rng.integers(0, V, (4, L)):
        for rest in (x0, np.where(rng.random(L) < 0.5, MASK, x0)):
            row = np.where(np.isin(np.arange(L), positions), x0, rest)
            orders = log_likelihoods_of_orders(TABLE, row, positions)
            for batch_size in (64, 4):
                value = exact(PROCESS, UNTRAINED, row, np.array(positions), batch_size=batch_size)
                assert abs(value - log_mean(orders)) < 1e-10
            assert len(positions) == 1 or np.ptp(orders) > 1e-2  # the likelihood depends on the order


@pytest.mark.parametrize("given", [[], [1], [0, 3]], ids=str)
@pytest.mark.smoke
def test_the_likelihood_sums_to_one(given, float64):
    """Over the free tokens, for any network. Control: the exponentials of the mean log p over orders do not."""
    positions = np.array([i for i in range(L) if i not in given])
    x0 = np.full((V ** len(positions), L), 2)
    x0[:, positions] = states(V, len(positions))
    assert abs(np.exp(log_likelihoods(x0, positions)).sum() - 1) < 1e-10
    bounds = [log_likelihoods_of_orders(TABLE, row, positions).mean() for row in x0]
    assert np.exp(bounds).sum() < 0.99


@pytest.mark.smoke
def test_an_exact_denoiser_gives_the_joint_and_its_conditionals(float64):
    """All orders agree. Control: the Denoiser of another distribution."""
    joint, x0 = Joint.random(length=L), states(V, L)[::5]

    def gap(model, positions):
        denoiser = model.denoiser(PROCESS)
        likelihood = jax.jit(jax.vmap(lambda x0: subset_log_likelihood(PROCESS, denoiser, x0, positions)))
        return np.abs(likelihood(x0) + joint.nll(x0, np.isin(np.arange(L), positions))).max()

    assert gap(joint, np.arange(L)) < 1e-12 and gap(joint, np.array([3, 1])) < 1e-12
    assert gap(Joint.random(length=L, seed=1), np.array([3, 1])) > 0.1


def test_ten_tokens_of_a_chain_have_their_exact_conditional(float64):
    """1023 rows, jitted; two tokens are given, and two masks stay. Control: the marginal without the given tokens."""
    chain, length = MarkovChain.random(), 14
    x0 = np.random.default_rng(2).integers(0, V, length)
    given, masked = [3, 8], [5, 13]
    positions = np.setdiff1d(np.arange(length), given + masked)
    row = x0.copy()
    row[masked] = MASK
    value = exact(PROCESS, chain.denoiser, row, positions)

    def log_p(observed):  # the marginal of a chain, by its forward recursion
        weights = chain.start
        for i in range(length):
            weights = weights if i == 0 else weights @ chain.step
            weights = np.where(np.arange(V) == x0[i], weights, 0.0) if i in observed else weights
        return np.log(weights.sum())

    assert abs(value - (log_p([*given, *positions]) - log_p(given))) < 1e-12
    assert abs(value - log_p(positions)) > 0.1


def test_no_free_positions_have_log_likelihood_zero():
    assert exact(PROCESS, UNTRAINED, np.zeros(L, int), np.zeros(0, int)) == 0


def test_positions_after_the_valid_length_do_not_count_in_float32():
    """Positions after the valid length hold no mask, and do not count in the mask ratio."""
    positions, x0 = np.array([0, 2, 1]), np.array([1, 2, 0])
    table = random_tables(1, 3)[0]

    def padded(x, sigma, positions):
        return table_denoiser(table)(x[:, :3], sigma, positions)

    row = np.append(x0, 0)
    value = exact(PROCESS, padded, row, positions, lengths=jnp.array(3))
    assert value.dtype == jnp.float32 and abs(value - log_mean(log_likelihoods_of_orders(table, x0, positions))) < 1e-5
    assert abs(value - exact(PROCESS, padded, row, positions)) > 1e-3  # the control


def test_the_bound_over_orders_never_exceeds_the_likelihood(float64):
    """For a hundred inconsistent networks, on every sequence: the mean log is below the log of the mean."""
    tables, x0 = random_tables(100, 3), states(V, 3)

    @jax.jit
    def likelihoods(tables):
        def of(table, x0):
            return subset_log_likelihood(PROCESS, table_denoiser(table), x0, jnp.arange(3))

        return jax.vmap(lambda table: jax.vmap(lambda x0: of(table, x0))(x0))(tables)

    bounds = np.array([[log_likelihoods_of_orders(table, row, range(3)).mean() for row in x0] for table in tables])
    gaps = np.asarray(likelihoods(tables)) - bounds
    assert gaps.min() > -1e-12
    assert gaps.mean() > 0.05  # it is not tight, so a wrong sign would fail


ROWS = 20_000


@jax.jit
def drawn_orders(keys, x0, free):
    return order_log_likelihoods(PROCESS, UNTRAINED, keys, x0, free)


def row_keys(rows):
    return keyed_random.row_keys(jax.random.key(0), jnp.arange(rows))


def test_an_order_has_the_likelihood_of_its_steps(float64):
    """Along the order drawn for each row; free positions differ by row, and the others hold tokens or masks."""
    rng = np.random.default_rng(3)
    x0, free = rng.integers(0, V + 1, (40, L)), rng.random((40, L)) < 0.6
    x0 = np.where(free, x0 % V, x0)
    drawn, ranks = drawn_orders(row_keys(40), x0, free), np.asarray(keyed_random.ranks(row_keys(40), free))
    orders = [np.argsort(row)[:count] for row, count in zip(ranks, free.sum(-1), strict=True)]
    steps = [log_likelihood_along(TABLE, *row) for row in zip(x0, orders, strict=True)]
    np.testing.assert_allclose(drawn, steps, atol=1e-12)
    assert np.ptp(free.sum(-1)) == L  # from none to all
    backwards = [log_likelihood_along(TABLE, row, order[::-1]) for row, order in zip(x0, orders, strict=True)]
    assert np.abs(np.subtract(drawn, backwards)).max() > 0.1


def test_orders_average_to_the_likelihood():
    """In float32. Controls: the likelihood along one fixed order, and the mean of the logarithms."""
    x0 = np.array([2, 0, 1, 1])
    drawn = drawn_orders(row_keys(ROWS), np.tile(x0, (ROWS, 1)), np.ones((ROWS, L), bool))
    likelihoods = np.exp(np.asarray(drawn, np.float64))
    orders = log_likelihoods_of_orders(TABLE, x0, range(L))
    assert abs(standard_errors(likelihoods - np.exp(orders).mean())) < 4
    assert abs(standard_errors(likelihoods - np.exp(log_likelihood_along(TABLE, x0, range(L))))) > 4
    assert abs(standard_errors(likelihoods - np.exp(orders.mean()))) > 4
    assert abs(standard_errors(np.log(likelihoods) - orders.mean())) < 4  # the bound by mask count


def test_the_number_of_calls_is_the_largest_number_of_free_positions():
    """Rows with fewer free positions do not add calls."""
    calls, free = [], np.array([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]], bool)

    @jax.jit
    def counted(free):
        def denoiser(x, sigma, positions):
            jax.debug.callback(lambda: calls.append(positions.shape))
            return UNTRAINED(x, sigma, positions)

        return order_log_likelihoods(PROCESS, denoiser, row_keys(3), np.zeros((3, L), int), free)

    log_likelihood = counted(free).block_until_ready()
    jax.effects_barrier()
    assert calls == [(3, 1)] * 2 and log_likelihood[1] == 0


def test_more_orders_give_a_better_bound(float64):
    """In expectation over all tuples of K orders, for every sequence: it increases from the bound to the likelihood."""
    table = random_tables(1, 3)[0]
    orders = np.array([log_likelihoods_of_orders(table, x0, range(3)) for x0 in states(V, 3)]).T  # Float[3! V^L]

    def expected(k):
        tuples = np.array(list(itertools.product(range(len(orders)), repeat=k))).T
        return importance_bound(orders[tuples]).mean(0)

    bounds = np.array([expected(k) for k in (1, 2, 3)])
    np.testing.assert_allclose(bounds[0], orders.mean(0), rtol=1e-12)
    assert np.all(np.diff(bounds, axis=0) > 0) and np.all(bounds < log_mean(orders))
