"""The bound with the exact scores is no bound but the likelihood, of each sequence."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from oracle import channel, scaled, standard_errors, states

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

    assert 0 <= gap(1e-4) < 1e-6 and gap(1e-2) < 1e-2
    assert joint.p.ravel() @ reconstruction(1e-4) > 1e-4  # the control: what would be missing


def test_draws_of_the_bound_average_to_the_entropy(process, joint):
    """Levels and weights; of the free tokens, in half of the rows all, given the others, which are not scored.

    Each draw is held against the surprise of its own sequence. Control: scores that are half too large.
    """
    rows = 40_000
    x0, free = joint.draw(rows), np.random.default_rng(0).random((rows, 3)) < 0.6
    free = jnp.asarray(free | (np.arange(rows)[:, None] % 2 == 0))
    ends = {} if isinstance(process, Absorbing) else {"low": 1e-4, "high": 12.0}
    keys = draws.row_keys(jax.random.key(0), jnp.arange(rows))
    stats_fn = stats_from(process, joint.informed(process, ~free))

    @jax.jit
    def bound(factor):
        level = draws.uniform(draws.fold(keys, 2))
        return sum(sigma_bound(process, scaled(process, stats_fn, factor), keys, x0, level, free=free, **ends))

    surprise = joint.surprise(x0, free)
    assert abs(standard_errors(bound(1.0) - surprise)) < 4
    assert standard_errors(bound(1.5) - surprise) > 4


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
