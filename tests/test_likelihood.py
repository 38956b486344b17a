"""With exact scores the bound equals the negative log-likelihood of each sequence; its draws average to it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from oracle import (
    Joint,
    MarkovChain,
    channel,
    index,
    log_likelihoods_of_orders,
    random_tables,
    reverse_distribution,
    scaled,
    standard_errors,
    states,
    table_denoiser,
)

from sedd.diffusion import keyed_random
from sedd.diffusion.discrete.likelihood import MaskCountBound, NoiseLevelBound, TimeLoss, sigma_bound
from sedd.diffusion.discrete.process import Absorbing, Uniform
from sedd.diffusion.discrete.score import score_stats, stats_from
from sedd.diffusion.schedule import Geometric, LogLinear


@pytest.mark.smoke
def test_the_bound_is_the_likelihood_of_each_sequence(process, joint, float64):
    """prior + integral + joint reconstruction = -log p(x0): a wrong constant, sign or range breaks it for each x0."""
    stats_fn = stats_from(process, joint.denoiser(process))
    assert np.abs(joint.bound_gap(process, stats_fn, 1e-3, 12.0)).max() < 1e-6
    assert joint.bound_gap(process, scaled(process, stats_fn, 1.1), 1e-3, 12.0).min() > 1e-3


def test_the_bound_of_the_last_step_averages_to_the_entropy(process, joint, float64):
    """With the factorised reconstruction of the process it is tight to second order in the last noise."""
    stats_fn, nll = stats_from(process, joint.denoiser(process)), -np.log(joint.p.ravel())
    reconstruction = joint.expectation(process, stats_fn, process.reconstruction)

    def gap(low, high=40.0):
        return joint.p.ravel() @ (joint.integral(process, stats_fn, low, high) + reconstruction(low) - nll)

    assert 0 <= gap(1e-4) < 1e-6 and gap(1e-2) < 1e-3
    assert joint.p.ravel() @ reconstruction(1e-4) > 1e-4  # the control: the bound without it


def test_the_bound_is_never_below_the_negative_log_likelihood(process, float64):
    """For a hundred inconsistent networks that depend on the noise, a little or much, on all sequences of two tokens.

    The likelihood is that of the reverse process with its last step, by solving its ODE; the absorbing one is all masks
    at a noise of 40. Control: without a fiftieth of the integral it is not a bound.
    """
    low, high, top = (1e-3, math.inf, 40.0) if isinstance(process, Absorbing) else (1e-3, 12.0, 12.0)
    tables = np.linspace(0.01, 1, 100)[:, None, None, None] * random_tables(100, 2)
    x, joint = states(process.num_states, 2), Joint.random(length=2)

    def of_networks(sigma, function):  # of log r, for all networks and sequences
        return jax.vmap(lambda table: function(table_denoiser(table)(x, jnp.full(len(x), sigma))))(tables)

    def rates(sigma):
        return of_networks(sigma, lambda log_clean: process.reverse_rate(log_clean, x, sigma))

    def last_step(log_clean):  # v with the weight m_v q(x | v)
        weights = process.log_noised(log_clean, low)[..., :3] + jnp.log(channel(process, low).T[x])
        return jax.nn.softmax(weights, axis=-1)

    @jax.jit
    def likelihood():
        at_low = reverse_distribution(process, rates, 2, low, top)
        steps = jnp.moveaxis(of_networks(low, last_step), 2, 0)
        return jnp.einsum("nx,nxu,nxv->nuv", at_low, *steps).reshape(100, -1)

    def stats_fn(*state):
        return jax.vmap(lambda table: stats_from(process, table_denoiser(table))(*state))(tables)

    ends = 2 * process.prior_divergence(high) + joint.expectation(process, stats_fn, process.reconstruction)(low)
    integral = joint.integral(process, stats_fn, low, top)
    log_p = np.log(likelihood())
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, rtol=1e-8)
    gaps = ends + integral + log_p
    assert gaps.min() > -1e-7
    assert gaps.mean() > 0.1 and (gaps - integral / 50).min() < -1e-2


ROWS = 20_000


def row_keys(rows):
    return keyed_random.row_keys(jax.random.key(0), jnp.arange(rows))


def total(draws):
    """Each draw of each row's bound, without the prior. Float64[M B]."""
    return np.asarray(draws.diffusion + draws.reconstruction, np.float64)


def unbiased(values, exact):
    """True if each half of the draws is unbiased, and the halves are uncorrelated. Float[M B]."""
    halves = values.reshape(2, -1, values.shape[-1]).mean(1) - exact
    return max(abs(standard_errors(value)) for value in (*halves, halves[0] * halves[1])) < 4


def test_draws_average_to_the_bound_between_two_noise_levels(process, joint):
    """Each row against the exact bound of its own sequence. Control: scores half too large."""
    low, high, top = (0.3, math.inf, 40.0) if isinstance(process, Absorbing) else (0.3, 3.0, 3.0)
    x0, stats_fn = joint.draw(ROWS), stats_from(process, joint.denoiser(process))
    with jax.enable_x64(True):
        exact = joint.integral(process, stats_fn, low, top)
        exact += joint.expectation(process, stats_fn, process.reconstruction)(low)

    @jax.jit
    def draws(factor):
        return NoiseLevelBound(process, low, high).draws(scaled(process, stats_fn, factor), row_keys(ROWS), x0, 3)

    assert abs(standard_errors(total(draws(1.0)).mean(0) - exact[index(x0, 3)])) < 4
    assert standard_errors(total(draws(1.5)).mean(0) - exact[index(x0, 3)]) > 4


def test_draws_given_tokens_average_to_the_conditional_entropy(process, joint, float64):
    """Free positions differ by row; given tokens are clean and not scored. Two halves of two strata.

    Controls: scores half too large; halves of one stratum each.
    """
    x0, free = joint.draw(ROWS), np.random.default_rng(0).random((ROWS, 3)) < 0.6
    exact_stats, exact = stats_from(process, joint.denoiser_given(process, ~free)), joint.nll(x0, free)

    def stats_fn(x, sigma, x0):  # NaN if a given token is corrupted
        stats = exact_stats(x, sigma, x0)
        return stats._replace(log_sum=jnp.where(jnp.all(free | (x == x0), -1)[:, None], stats.log_sum, jnp.nan))

    ends = {} if isinstance(process, Absorbing) else {"low": 1e-4, "high": 12.0}

    @jax.jit
    def draws(factor):
        wrong = scaled(process, stats_fn, factor)
        return NoiseLevelBound(process, **ends).draws(wrong, row_keys(ROWS), x0, 4, jnp.asarray(free))

    values = total(draws(1.0))
    assert abs(standard_errors(values.mean(0) - exact)) < 4 < standard_errors(total(draws(1.5)).mean(0) - exact)
    assert unbiased(values, exact) and not unbiased(values[[0, 2, 1, 3]], exact)


def test_the_bound_is_finite_at_every_noise_level(process, joint):
    """A uniform draw in float32 can be 0, and the last of B strata, (B - 1 + u) / B, may round to 1.

    One such row would make the mean over a corpus NaN.
    """
    u = jnp.array([0.0, 2.0**-24, 1 - 2.0**-24, 1.0])
    stats_fn, keys = stats_from(process, joint.denoiser(process)), row_keys(4)
    bound = jax.jit(lambda u: sum(sigma_bound(process, stats_fn, keys, joint.draw(4), u)))(u)
    assert np.all(np.isfinite(bound)), bound


@pytest.mark.smoke
def test_prior_and_reconstruction_equal_their_definitions(process, joint, float64):
    """KL(q_sigma(. | x0) || pi), and -log of the posterior of x0 under m."""
    sigma = 0.7
    divergence = scipy.special.rel_entr(channel(process, sigma)[0], process.stationary()).sum()
    np.testing.assert_allclose(process.prior_divergence(sigma), divergence, rtol=1e-12)
    assert process.prior_divergence(math.inf) == 0
    x, x0 = (v.ravel() for v in np.meshgrid(np.arange(process.num_states), np.arange(3)))
    score = np.exp(np.random.default_rng(0).normal(size=(len(x), 3)))
    score = np.where(np.arange(3) == x[:, None], 1.0, score)
    weights = score * channel(process, sigma)[:, x].T
    exact = weights[np.arange(len(x)), x0] / weights.sum(-1)
    term = process.reconstruction(score_stats(jnp.log(score), x, x0), x, x0, sigma)
    possible = exact > 0
    np.testing.assert_allclose(np.exp(-term)[possible], exact[possible], rtol=1e-12)


def test_noise_levels_are_dense_where_the_uniform_process_has_high_variance(joint, float64):
    """That is at low noise. Even levels of the same integral have more than twice the variance."""
    process, (low, high) = Uniform(3), (1e-2, 12.0)
    x0, keys, stats_fn = joint.draw(ROWS), row_keys(ROWS), stats_from(process, joint.denoiser(process))

    @jax.jit
    def at_even_levels():
        u = keyed_random.uniform(keyed_random.fold(keys, 0), float)
        corruption = -jnp.expm1(-low) + (jnp.exp(-low) - jnp.exp(-high)) * u
        sigma = -jnp.log1p(-corruption)
        x = process.corrupt(keyed_random.fold(keys, 1), x0, sigma[:, None])
        entropy = process.score_entropy(stats_fn(x, sigma, x0), x, x0, sigma[:, None]).sum(-1)
        return (jnp.exp(-low) - jnp.exp(-high)) / (1 - corruption) * entropy

    even = np.asarray(at_even_levels())
    dense = jax.jit(lambda: NoiseLevelBound(process, low, high).draws(stats_fn, keys, x0, 1).diffusion[0])()
    assert abs(standard_errors(dense - even)) < 4
    assert even.var() > 2 * np.var(dense)


# Rows with all or some positions free; the others hold tokens, or masks that stay.
MASK = 3
CASES = np.array([[2, 0, 1, 1], [0, 1, 2, 0], [1, MASK, 0, 2], [MASK, 2, MASK, 1], [0, 0, 1, 2], [2, 1, MASK, 0]])
CASES_FREE = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0], [1, 1, 0, 0]], bool)
TABLE = random_tables(1, 4)[0]


@pytest.mark.parametrize("num_draws", [3, 4, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 6))])
def test_stratified_mask_counts_average_to_the_bound_over_orders(num_draws, float64):
    """For an inconsistent network that depends on the noise. Controls: wrong scores; half of the strata.

    Of four draws two are antithetic to the others: with k for n + 1 - k they would all be like the first.
    """
    process, repeats = Absorbing(3), ROWS // len(CASES)
    x0, free = np.tile(CASES, (repeats, 1)), np.tile(CASES_FREE, (repeats, 1))
    exact = [
        -log_likelihoods_of_orders(TABLE, x0, np.flatnonzero(free)).mean()
        for x0, free in zip(CASES, CASES_FREE, strict=True)
    ]
    exact = np.tile(exact, repeats)

    @jax.jit
    def draws(factor):
        stats_fn = scaled(process, stats_from(process, table_denoiser(TABLE)), factor)
        return MaskCountBound(process).draws(stats_fn, row_keys(len(x0)), x0, num_draws, free)

    drawn = draws(1.0)
    values = total(drawn)
    assert len(values) == num_draws and abs(standard_errors(values.mean(0) - exact)) < 4
    assert standard_errors(total(draws(1.5)).mean(0) - exact) > 4 and (num_draws % 2 or unbiased(values, exact))
    if num_draws == 4:
        assert not unbiased(values[[0, 2, 1, 3]], exact)
        np.testing.assert_allclose(np.asarray(drawn.level).reshape(2, 2, -1).mean(1), 0.5, atol=1e-12)


def test_the_bound_given_the_length_is_independent_of_padding(float64):
    """A padded text with its length has the draws of the text alone. Control: the padding counted as valid."""
    process, x0, keys = Absorbing(3), np.random.default_rng(0).integers(0, 3, (50, 4)), row_keys(50)
    padded, free = np.pad(x0, ((0, 0), (0, 3))), np.tile(np.arange(7) < 4, (50, 1))

    def denoiser(x, sigma, positions):
        return jnp.pad(table_denoiser(TABLE)(x[:, :4], sigma), ((0, 0), (0, 3), (0, 0)))

    stats_fn = stats_from(process, denoiser)
    draws = jax.jit(lambda *row: MaskCountBound(process).draws(stats_fn, keys, padded, 4, *row).diffusion)
    alone_fn = stats_from(process, table_denoiser(TABLE))
    alone = jax.jit(lambda: MaskCountBound(process).draws(alone_fn, keys, x0, 4).diffusion)()
    np.testing.assert_allclose(draws(free, np.full(50, 4)), alone, rtol=1e-12)
    assert np.abs(draws(free, np.full(50, 7)) - alone).max() > 0.1


@pytest.mark.parametrize("counts", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["counts", "levels"])
def test_a_short_text_in_a_masked_block_has_its_exact_marginal(counts, float64):
    """Its other positions stay masked; lengths differ by row. Control: scores half too large.

    A pair of rows holds n + 1 masks of free tokens, and every token is masked in one of them.
    """
    process, chain, lengths = Absorbing(3), MarkovChain.random(), np.arange(ROWS) % 4 + 1
    tokens, free = chain.joint(4).draw(ROWS), np.arange(7) < lengths[:, None]
    x0 = process.mask_tokens(np.pad(tokens, ((0, 0), (0, 3))), ~free)
    exact = np.choose(lengths - 1, [chain.joint(n).nll(tokens[:, :n]) for n in range(1, 5)])

    def stats_fn(x, sigma, x0):
        stats = stats_from(process, chain.denoiser)(x, sigma, x0)
        if not counts:
            return stats
        masks = jnp.sum(((x == MASK) & (x0 != MASK)).reshape(-1, 2, 7), axis=1)  # of each pair of rows
        expected = (x0 != MASK)[::2]
        paired = jnp.all((masks > 0) == expected, -1) & (masks.sum(-1) == expected.sum(-1) + 1)
        return stats._replace(log_sum=jnp.where(jnp.repeat(paired, 2)[:, None], stats.log_sum, jnp.nan))

    @jax.jit
    def draws(factor):
        wrong = scaled(process, stats_fn, factor)
        return (MaskCountBound if counts else NoiseLevelBound)(process).draws(wrong, row_keys(ROWS), x0, 4, free)

    values = total(draws(1.0))
    assert abs(standard_errors(values.mean(0) - exact)) < 4 and unbiased(values, exact)
    assert standard_errors(total(draws(1.5)).mean(0) - exact) > 4


@pytest.mark.parametrize(
    "process, schedule",
    [
        (Absorbing(3), LogLinear(0.01)),
        pytest.param(Uniform(3), Geometric(1e-2, 5.0), marks=pytest.mark.slow),
        pytest.param(Absorbing(3), Geometric(1e-2, 5.0), marks=pytest.mark.slow),
        pytest.param(Uniform(3), LogLinear(0.01), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_draws_of_the_time_loss_average_to_the_loss_that_papers_report(process, joint, schedule, float64):
    """The mean loss over the times from eps to 1, whether a row draws any of them or those of its stratum.

    The widths average to the range of the corruption probability. Controls: scores half too large; one stratum only.
    """
    eps, stats_fn = 0.05, stats_from(process, joint.denoiser(process))
    low, high = float(schedule.sigma(eps)), float(schedule.sigma(1.0))
    x0 = np.repeat(joint.draw(ROWS // 4), 4, axis=0)
    exact = joint.integral(process, stats_fn, low, high)[index(x0, 3)] / (1 - eps)

    @functools.partial(jax.jit, static_argnums=1)
    def draws(factor, strata):
        wrong, loss = scaled(process, stats_fn, factor), TimeLoss(process, schedule, eps, strata)
        return loss.draws(wrong, row_keys(ROWS), x0, 3, rows=jnp.arange(ROWS))

    for strata in (1, 4):
        drawn = draws(1.0, strata)
        errors, wrong = ((total(one).mean(0) - exact).reshape(-1, 4) for one in (drawn, draws(1.5, strata)))
        assert abs(standard_errors(errors.mean(-1))) < 4 < standard_errors(wrong.mean(-1))
        close(drawn.width.mean(0), np.exp(-low) - np.exp(-high))
    assert abs(standard_errors(errors[:, 0])) > 4


def close(values, exact):
    """Tests the mean of draws, which may all be equal."""
    spread = 4 * np.std(values) / len(values) ** 0.5
    np.testing.assert_allclose(np.mean(values), exact, rtol=0, atol=spread + 1e-9)


def test_widths_weight_draws_to_integrals_over_the_corruption_probability(process, float64):
    """Of any function of the noise level, here its square, as in information profiles. Control: other ends."""

    def stats_fn(x, sigma, x0):
        return score_stats(jnp.zeros((*x.shape, 3)), x, x0)

    drawn = jax.jit(lambda keys: NoiseLevelBound(process, 0.3, 3.0).draws(stats_fn, keys, jnp.zeros((ROWS, 1), int), 4))
    level, width = map(np.asarray, drawn(row_keys(ROWS))[:2])
    low, high = -np.expm1(-0.3), -np.expm1(-3.0)
    assert low <= level.min() < low + 0.01 and high - 0.01 < level.max() <= high
    close(width.mean(0), high - low)
    weighted = (width * level**2).mean(0)
    assert abs(standard_errors(weighted - (high**3 - low**3) / 3)) < 4
    assert abs(standard_errors(weighted - 1 / 3)) > 4


@pytest.mark.slow
def test_stratified_draws_of_a_long_text_have_less_variance():
    """One text of 1024 peaked tokens, eight draws a row: two halves of four strata, mask counts in pairs too.

    All draws of all rows are draws at random noise levels, whose means of eight have an eighth of their variance.
    Control: single draws by mask count have as much variance.
    """
    process, chain, rows = Absorbing(27), MarkovChain.peaked(seed=1), 128
    text, stats_fn = chain.draw(1024, seed=1), stats_from(process, chain.denoiser)

    @functools.partial(jax.jit, static_argnums=0)
    def drawn(bound):
        return bound.draws(stats_fn, row_keys(rows), jnp.tile(text, (rows, 1)), 8)

    def variances(bound):
        values = total(drawn(bound))
        assert abs(standard_errors(values.mean(0) - chain.nll(text))) < 4
        return values.var() / 8, values.mean(0).var()

    (at_random, levels), (random_counts, counts) = (
        variances(NoiseLevelBound(process)),
        variances(MaskCountBound(process)),
    )
    assert at_random > 10 * counts and at_random > 5 * levels and levels > 1.2 * counts
    assert at_random < 1.5 * random_counts
