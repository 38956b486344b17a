"""Samplers against their exactly enumerated laws, and those against the law they are to draw from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from oracle import channel, index, kernel, p_value, sampler_law, states, total_variation

from sedd.diffusion import draws
from sedd.diffusion.process import Absorbing, Jump, Uniform
from sedd.diffusion.samplers import Euler, Tweedie, move, sample
from sedd.diffusion.schedule import Geometric, LogLinear

run = jax.jit(sample, static_argnames=("denoiser", "sampler", "trace"))
both_samplers = pytest.mark.parametrize("kind", [Euler, Tweedie])

# Different given positions in each row of a batch: one, two, and none.
TOKENS = np.array([[0, 1, 2], [2, 0, 1], [1, 1, 0], [0, 2, 2], [1, 0, 2]])
FREE = np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)


def test_tweedie_is_exact_in_one_step_where_tokens_are_independent(process, joint, float64):
    """Any error in the posterior step shows. Control: one step over tokens that depend on each other is not exact."""
    x = states(process.num_states, 3)

    def error(law, sigma, sigma_next):
        log_clean = law.denoiser(process)(x, jnp.full(len(x), sigma), None)
        step = kernel(process.tweedie(log_clean, x, sigma, sigma_next), x, process.num_states)
        return total_variation(law.law(process, sigma) @ step, law.law(process, sigma_next))

    for sigma, sigma_next in [(7.0, 0.0), (2.0, 0.3), (1e-2, 1e-3)]:
        assert error(joint.independent(), sigma, sigma_next) < 1e-12
    assert error(joint, 7.0, 0.0) > 0.1


@both_samplers
def test_samplers_converge_at_first_order(process, kind, joint):
    """The distance to the law halves with each doubling: a wrong rate or grid, or noise left over, breaks the ratio."""
    denoiser, truth = joint.denoiser(process), joint.law(process, 0.0)
    laws = [sampler_law(kind(process, Geometric(1e-2, 12.0), steps), denoiser, [0, 0, 0]) for steps in (16, 32, 64, 128)]
    distances = np.array([total_variation(law, truth) for law in laws])
    ratios = distances[:-1] / distances[1:]
    print(distances, ratios)
    assert np.all((ratios > 1.7) & (ratios < 2.3))


@both_samplers
def test_the_jitted_loop_draws_the_law(process, kind, joint):
    """The float32 production path, with other given positions in each row. Control: the law of one step more."""
    rows, denoiser, schedule = 30_000, joint.denoiser(process), Geometric(1e-2, 12.0)
    tokens, free = np.tile(TOKENS, (rows, 1)), np.tile(FREE, (rows, 1))
    drawn = run(jax.random.key(0), denoiser, kind(process, schedule, 4), tokens, free).tokens
    assert drawn.dtype == jnp.int32 and np.array_equal(np.where(free, tokens, drawn), tokens)

    def fits(steps):
        laws = [sampler_law(kind(process, schedule, steps), denoiser, *row) for row in zip(TOKENS, FREE, strict=True)]
        seen = index(drawn, process.num_states).reshape(rows, -1).T
        return [p_value(*pair) for pair in zip(seen, laws, strict=True)]

    print(*[["%.2g" % p for p in f] for f in (fits(4), fits(5), fits(6), fits(8))])
    assert min(fits(4)) > 1e-3
    assert fits(5)[-1] < 1e-6


def test_infilling_absorbing_draws_the_conditional(joint):
    """Given tokens that were lost, moved or re-noised would leave a distance that more steps do not cure."""
    process = Absorbing(3)
    denoiser = joint.denoiser(process)
    for tokens, free in zip(TOKENS, FREE, strict=True):
        truth = joint.conditional(tokens, free) @ channel(process, 0.0, 3)
        laws = [sampler_law(Tweedie(process, LogLinear(), steps), denoiser, tokens, free) for steps in (64, 128, 256)]
        distances = np.array([total_variation(law, truth) for law in laws])
        print(distances)
        assert distances[-1] < 0.005
        if free.sum() > 1:  # else it is exact
            assert np.all(np.abs(distances[:-1] / distances[1:] - 2) < 0.1)
