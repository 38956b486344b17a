"""Samplers against their exact distributions by enumeration, and those against the target distribution."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import channel, index, kernel, p_value, sampler_distribution, states, step_matrix, total_variation
from small import name_of

from sedd.diffusion.discrete.process import Absorbing, Uniform
from sedd.diffusion.discrete.samplers import Euler, Trapezoidal, Tweedie
from sedd.diffusion.sampling import sample
from sedd.diffusion.schedule import Geometric, LogLinear

run = jax.jit(sample, static_argnames=("denoiser", "sampler", "trace"))
both_tau_leaps = pytest.mark.parametrize("kind", [Euler, Tweedie])
every_sampler = pytest.mark.parametrize("kind", [Euler, Tweedie, Trapezoidal])

# The given positions differ by row: one, two, and none.
TOKENS = np.array([[0, 1, 2], [2, 0, 1], [1, 1, 0], [0, 2, 2], [1, 0, 2]])
FREE = np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)


@pytest.mark.smoke
def test_tweedie_is_exact_in_one_step_where_tokens_are_independent(process, joint, float64):
    """Any error in the posterior step shows. Control: one step over dependent tokens is not exact."""
    x = states(process.num_states, 3)
    tweedie = jax.jit(process.tweedie)

    def error(joint, sigma, sigma_next):
        log_clean = joint.denoiser(process)(x, jnp.full(len(x), sigma))
        step = kernel(tweedie(log_clean, x, sigma, sigma_next), x, process.num_states)
        due = joint.noisy_distribution(process, sigma_next)
        return total_variation(joint.noisy_distribution(process, sigma) @ step, due)

    for sigma, sigma_next in [(7.0, 0.0), (2.0, 0.3), (1e-2, 1e-3)]:
        assert error(joint.independent(), sigma, sigma_next) < 1e-12
    assert error(joint, 7.0, 0.0) > 0.1


@pytest.mark.parametrize("schedule", [LogLinear(), Geometric()], ids=str)
def test_the_grid_is_even_in_time_and_ends_without_noise(schedule, float64):
    """A last noise above 0 would leave noise in every sample; `linear` is the step of Euler."""
    plan, t = Tweedie(Uniform(3), schedule, 4).plan(None, None), np.array([1.0, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(plan.sigma, schedule.sigma(t), rtol=1e-12)
    assert np.array_equal(plan.sigma_next, [*plan.sigma[1:], 0.0])
    np.testing.assert_allclose(plan.linear, schedule.rate(t) / 4, rtol=1e-12)


@every_sampler
@pytest.mark.smoke
def test_rows_of_every_step_are_probabilities(process, kind, joint, float64):
    """Even where steps are long and extrapolations are clipped. Control: unclipped, a row sum exceeds 1."""

    class Unclipped(Trapezoidal):
        def second_jump(self, before, after, x, entry):
            old, new = self.jump(before, x, entry), self.jump(after, x, entry)
            return new._replace(p_move=2 * new.p_move - old.p_move)

    def matrices(kind):
        plan, free = kind(process, Geometric(0.1, 6.0), 4).plan(None, None), np.ones(3, bool)
        entries = [jax.tree.map(operator.itemgetter(k), plan) for k in range(4)]
        one = kind(process, Geometric(0.1, 6.0), 1)
        return np.array([step_matrix(one, joint.denoiser(process), entry, np.zeros(3, int), free) for entry in entries])

    assert matrices(kind).min() >= 0
    np.testing.assert_allclose(matrices(kind).sum(-1), 1, rtol=1e-12)
    if kind is Trapezoidal and process == Uniform(3):
        assert matrices(Unclipped).sum(-1).max() > 1.001


@both_tau_leaps
def test_tau_leaps_converge_at_first_order(process, kind, joint):
    """The distance halves with each doubling of the steps. A wrong rate or grid, or remaining noise, would show."""
    denoiser, truth = joint.denoiser(process), joint.noisy_distribution(process, 0.0)
    samplers = [kind(process, Geometric(1e-2, 12.0), steps) for steps in (16, 32, 64, 128)]
    distances = np.array(
        [total_variation(sampler_distribution(sampler, denoiser, [0, 0, 0]), truth) for sampler in samplers]
    )
    ratios = distances[:-1] / distances[1:]
    assert np.all((ratios > 1.7) & (ratios < 2.3))


def test_trapezoidal_is_closer_than_tweedie_at_equal_calls(process, joint):
    """From 7 calls on, and at 63 calls by a known factor; its distance falls faster than first order.

    Control: a second stage without extrapolation is Tweedie on the same grid, and no closer.
    """

    class NotExtrapolated(Trapezoidal):
        def second_jump(self, before, after, x, entry):
            return self.jump(after, x, entry)

    denoiser, truth, schedule = joint.denoiser(process), joint.noisy_distribution(process, 0.0), Geometric(1e-3, 12.0)

    def distance(kind, steps):
        return total_variation(sampler_distribution(kind(process, schedule, steps), denoiser, [0, 0, 0]), truth)

    tweedie, due = distance(Tweedie, 64), 2 if process == Uniform(3) else 1.3
    distances = np.array([distance(Trapezoidal, steps) for steps in (4, 8, 16, 32)])
    assert tweedie > 3 * due * distances[-1] and distance(Tweedie, 7) > 2.5 * distances[0]
    ratios = distances[:-1] / distances[1:]
    assert np.all((ratios > 1.7) & (ratios < 3.4)) and ratios[-1] > 2.1
    assert tweedie < 1.3 * distance(NotExtrapolated, 32)


PAIRS = [(Absorbing(3), Tweedie), (Uniform(3), Tweedie)]
SLOW_PAIRS = [(process, kind) for process in (Absorbing(3), Uniform(3)) for kind in (Euler, Trapezoidal)]


@pytest.mark.parametrize(
    "process, kind", [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW_PAIRS)], ids=name_of
)
def test_the_jitted_loop_samples_the_exact_distribution(process, kind, joint):
    """The float32 production path, with different given positions in each row.

    Controls: the distributions of half as many steps, and of another sampler.
    """
    rows, denoiser, schedule = 20_000, joint.denoiser(process), Geometric(0.1, 6.0)
    tokens, free = np.tile(TOKENS, (rows, 1)), np.tile(FREE, (rows, 1))
    drawn, calls, _ = run(jax.random.key(0), denoiser, kind(process, schedule, 4), tokens, free)
    assert calls == (7 if kind is Trapezoidal else 4) and drawn.dtype == jnp.int32
    assert np.array_equal(np.where(free, tokens, drawn), tokens)

    def fits(kind, steps):
        sampler = kind(process, schedule, steps)
        exact = [sampler_distribution(sampler, denoiser, *row) for row in zip(TOKENS, FREE, strict=True)]
        cells = index(drawn, process.num_states).reshape(rows, -1) + len(exact[0]) * np.arange(len(exact))
        return p_value(cells, np.concatenate(exact) / len(exact))

    other = Euler if kind is Tweedie else Tweedie
    assert fits(kind, 4) > 1e-3
    assert fits(kind, 2) < 1e-6 and fits(other, 4) < 1e-6


def infilling_distances(process, joint, denoisers, steps):
    """The total variation distance to the exact conditional, for each row of given tokens."""
    sampled = [
        sampler_distribution(Tweedie(process, Geometric(1e-3, 12.0), steps), *row)
        for row in zip(denoisers, TOKENS, FREE, strict=True)
    ]
    return np.abs(np.array(sampled) - joint.conditional(TOKENS, FREE) @ channel(process, 0.0, 3)).sum(-1) / 2


@pytest.mark.smoke
def test_infilling_absorbing_converges_to_the_conditional(joint):
    """Given tokens that are lost, moved or re-noised would leave a distance that does not shrink with the steps."""
    process = Absorbing(3)
    denoisers = [joint.denoiser(process)] * len(TOKENS)
    distances = np.array([infilling_distances(process, joint, denoisers, steps) for steps in (64, 128, 256)])
    assert np.all(distances[-1] < 0.005)
    one = FREE.sum(-1) == 1  # a single free token is exact at any number of steps
    assert np.all(distances[:, one] < 1e-12)
    ratios = distances[:-1, ~one] / distances[1:, ~one]
    assert np.all((ratios > 1.7) & (ratios < 2.3))


def test_infilling_uniform_needs_a_denoiser_conditioned_on_what_is_given(joint):
    """A clean token among noisy ones is weak evidence at high noise: clamped only, the sampler stays biased.

    With a Denoiser conditioned on which tokens are given, and so clean, it samples the conditional.
    """
    process, steps = Uniform(3), 256
    ignores_given = infilling_distances(process, joint, [joint.denoiser(process)] * len(TOKENS), steps)
    conditioned = infilling_distances(process, joint, [joint.denoiser_given(process, ~free) for free in FREE], steps)
    assert np.all(conditioned < 0.005)
    assert ignores_given.max() > 0.03 and ignores_given[-1] == conditioned[-1]  # nothing is given in the last row


def test_every_call_of_a_step_sees_the_given_tokens(joint):
    """Also in steps of several calls: clamped in the state only, the inner calls would not see them."""

    class IgnoresState(Tweedie):
        def step(self, keys, denoiser, x, entry):
            return jnp.argmax(denoiser(jnp.zeros_like(x), jnp.zeros(len(x)), None), axis=-1)

    def echo(x, sigma, positions):  # puts each token's mass on the sum of all tokens
        return jax.nn.one_hot(jnp.broadcast_to(x.sum(-1, keepdims=True), x.shape), 9)

    out = run(jax.random.key(0), echo, IgnoresState(Uniform(9), LogLinear(), 1), TOKENS, FREE)
    assert np.array_equal(out.tokens, np.where(FREE, np.where(FREE, 0, TOKENS).sum(-1, keepdims=True), TOKENS))


def test_the_loop_ends_when_every_row_is_finished(joint):
    """A given mask stays, and adds no calls; without free positions there is no call."""
    process, steps = Absorbing(3), 64
    sampler, tokens = Tweedie(process, LogLinear(), steps), np.where([[0], [1], [1], [1], [1]] | FREE, TOKENS, 3)
    out = run(jax.random.key(1), joint.denoiser(process), sampler, tokens, FREE, trace=True)
    assert out.trace.shape == (steps, *tokens.shape) and out.trace.dtype == out.tokens.dtype == jnp.int32
    assert np.all(FREE | (out.trace == tokens))
    unfinished = np.any(FREE & (out.trace == process.mask_id), axis=(1, 2))
    assert out.calls == unfinished.sum() + 1 < steps
    assert np.all(out.trace[out.calls - 1 :] == out.tokens) and np.all(FREE <= (out.tokens < 3))
    none = run(jax.random.key(1), joint.denoiser(process), sampler, tokens, np.zeros_like(FREE), trace=True)
    assert none.calls == 0 and np.all(none.tokens == tokens) and np.all(none.trace == tokens)


@pytest.mark.smoke
def test_a_row_draws_the_same_in_any_batch(process, joint):
    """Bit for bit, by its global index. Control: the index within the batch gives other samples."""
    tokens, free = np.tile(TOKENS, (4, 1)), np.tile(FREE, (4, 1))
    args = jax.random.key(0), joint.denoiser(process), Tweedie(process, LogLinear(), 6)
    batch = run(*args, tokens, free, rows=np.arange(20)).tokens
    for part in (np.arange(5), np.arange(5, 10), np.array([11, 3, 17, 0, 19])):
        np.testing.assert_array_equal(run(*args, tokens[part], free[part], rows=part).tokens, batch[part])
    assert np.any(run(*args, tokens[5:10], free[5:10], rows=np.arange(5)).tokens != batch[5:10])


def test_calls_is_the_number_of_network_calls(process, joint):
    """With two calls a step, run to the last step (Uniform), and finished earlier (Absorbing, one free token)."""
    network_calls = []

    def counting(x, sigma, positions=None):
        jax.debug.callback(lambda _: network_calls.append(1), sigma)
        return joint.denoiser(process)(x, sigma, positions)

    free = np.array([[True, False, False]])
    calls = run(
        jax.random.key(0), counting, Trapezoidal(process, LogLinear(), 16), np.zeros_like(free, int), free
    ).calls
    jax.effects_barrier()
    assert calls == len(network_calls) and (calls == 31 if process == Uniform(3) else calls < 31)


def test_a_sampler_without_steps_is_refused(process):
    """Zero steps would return a draw of the prior as a sample."""
    with pytest.raises(ValueError, match="at least one step"):
        Tweedie(process, LogLinear(), 0)
