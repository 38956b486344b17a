"""The bound with the exact scores is no bound but the likelihood, of each sequence."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from oracle import channel, index, scaled, standard_errors

from sedd.diffusion import draws
from sedd.diffusion.likelihood import sigma_bound
from sedd.diffusion.process import Absorbing
from sedd.diffusion.score import score_stats, stats_from


def test_the_bound_is_the_likelihood_of_each_sequence(process, joint, float64):
    """prior + integral + joint reconstruction = -log p(x0): a wrong constant, sign or range shows for each x0."""
    low, high = 1e-3, 12.0
    at_low, at_high = channel(process, low, 3), channel(process, high, 3)
    prior = scipy.special.rel_entr(at_high, joint.law(process, high)).sum(-1)  # the base is the law's own p_T
    posterior = joint.p.reshape(-1, 1) * at_low / joint.law(process, low)
    reconstruction = -scipy.special.xlogy(at_low, posterior).sum(-1)

    def gap(stats_fn):
        return prior + joint.integral(process, stats_fn, low, high) + reconstruction + np.log(joint.p.ravel())

    stats_fn = stats_from(process, joint.denoiser(process))
    assert np.abs(gap(stats_fn)).max() < 1e-6
    assert gap(scaled(process, stats_fn, 1.1)).min() > 1e-3


def test_the_bound_of_the_last_step_averages_to_the_entropy(process, joint, float64):
    """With the process's own reconstruction, each token apart, it is tight to second order in the last noise."""
    stats_fn, surprise = stats_from(process, joint.denoiser(process)), -np.log(joint.p.ravel())
    reconstruction = joint.expectation(process, stats_fn, process.reconstruction)

    def gap(low, high=40.0):
        return joint.p.ravel() @ (joint.integral(process, stats_fn, low, high) + reconstruction(low) - surprise)

    assert 0 <= gap(1e-4) < 1e-6 and gap(1e-2) < 1e-3
    assert joint.p.ravel() @ reconstruction(1e-4) > 1e-4  # the control: what would be missing


ROWS = 30_000


def drawn_bound(process, stats_fn, x0, **settings):
    """One draw a row, of scores that are wrong by a factor."""

    @jax.jit
    def bound(factor):
        keys = draws.row_keys(jax.random.key(0), jnp.arange(ROWS))
        level = draws.uniform(draws.fold(keys, 2))
        return sum(sigma_bound(process, scaled(process, stats_fn, factor), keys, x0, level, **settings))

    return bound


def test_draws_average_to_the_bound_between_two_noises(process, joint):
    """Each against the exact bound of its own sequence: levels, weights, ends. Control: scores half too large."""
    low, high, top = (0.3, math.inf, 40.0) if isinstance(process, Absorbing) else (0.3, 3.0, 3.0)
    x0, stats_fn = joint.draw(ROWS), stats_from(process, joint.denoiser(process))
    with jax.enable_x64(True):
        exact = joint.integral(process, stats_fn, low, top) + 3 * process.prior_divergence(high)
        exact += joint.expectation(process, stats_fn, process.reconstruction)(low)
    bound = drawn_bound(process, stats_fn, x0, low=low, high=high)
    assert abs(standard_errors(bound(1.0) - exact[index(x0, 3)])) < 4
    assert standard_errors(bound(1.5) - exact[index(x0, 3)]) > 4


def test_draws_given_tokens_average_to_the_conditional_entropy(process, joint):
    """Other tokens are free in each row; the rest is seen clean and not scored. Control: scores half too large."""
    x0, free = joint.draw(ROWS), np.random.default_rng(0).random((ROWS, 3)) < 0.6
    informed = stats_from(process, joint.informed(process, ~free))

    def stats_fn(x, sigma, x0):  # no number if a given token was touched
        stats = informed(x, sigma, x0)
        return stats._replace(log_sum=jnp.where(jnp.all(free | (x == x0), -1)[:, None], stats.log_sum, jnp.nan))

    ends = {} if isinstance(process, Absorbing) else {"low": 1e-4, "high": 12.0}
    bound = drawn_bound(process, stats_fn, x0, free=jnp.asarray(free), **ends)
    assert abs(standard_errors(bound(1.0) - joint.surprise(x0, free))) < 4
    assert standard_errors(bound(1.5) - joint.surprise(x0, free)) > 4


def test_the_bound_is_finite_at_every_level(process, joint):
    """A uniform draw in float32 can be 0, and the last of B strata, (B - 1 + u) / B, may round to 1.

    One such row would make the mean over a corpus NaN.
    """
    level = jnp.array([0.0, 2.0**-24, 1 - 2.0**-24, 1.0])
    stats_fn, keys = stats_from(process, joint.denoiser(process)), draws.row_keys(jax.random.key(0), jnp.arange(4))
    bound = jax.jit(lambda level: sum(sigma_bound(process, stats_fn, keys, joint.draw(4), level)))(level)
    assert np.all(np.isfinite(bound)), bound


def test_prior_and_reconstruction_are_what_they_say(process, joint, float64):
    """KL(q_sigma(. | x0) || pi), and -log of the posterior of x0 under m: neither is 0 by a slip."""
    sigma = 0.7
    divergence = scipy.special.rel_entr(channel(process, sigma)[0], process.stationary()).sum()
    np.testing.assert_allclose(process.prior_divergence(sigma), divergence, rtol=1e-12)
    assert process.prior_divergence(math.inf) == 0
    x, x0 = (v.ravel() for v in np.meshgrid(np.arange(process.num_states), np.arange(3)))
    score = np.exp(np.random.default_rng(0).normal(size=(len(x), 3)))
    score = np.where(np.arange(3) == x[:, None], 1.0, score)
    law = score * channel(process, sigma)[:, x].T
    exact = law[np.arange(len(x)), x0] / law.sum(-1)
    term = process.reconstruction(score_stats(jnp.log(score), x, x0), x, x0, sigma)
    possible = exact > 0
    np.testing.assert_allclose(np.exp(-term)[possible], exact[possible], rtol=1e-12)
