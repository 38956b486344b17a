"""Correctors: the distributions that they leave invariant, and their effect on samplers and on infilling."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import MarkovChain, index, kernel, p_value, sampler_distribution, states, total_variation

from sedd.diffusion import keyed_random
from sedd.diffusion.denoiser import clamped
from sedd.diffusion.discrete.correctors import Barker, Gibbs, Renoise
from sedd.diffusion.discrete.pickers import Margin
from sedd.diffusion.discrete.process import Absorbing, Jump, Uniform
from sedd.diffusion.discrete.samplers import Trapezoidal, Tweedie, leap
from sedd.diffusion.discrete.unmasking import Adaptive
from sedd.diffusion.sampling import Corrected, sample
from sedd.diffusion.schedule import Geometric, LogLinear

run = jax.jit(sample, static_argnames=("denoiser", "sampler"))

# The given positions differ by row: one, two, and none.
TOKENS = np.array([[0, 1, 2], [2, 0, 1], [1, 1, 0], [0, 2, 2], [1, 0, 2]])
FREE = np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
NONE_GIVEN = TOKENS[-1], FREE[-1]


@functools.partial(jax.jit, static_argnames=("kind", "process", "denoiser"))
def round_matrix(kind, size, process, denoiser, sigma, tokens, free):
    """The transition matrix of one round of a corrector. Float[S^L S^L], rows sum to 1."""
    x, length = jnp.asarray(states(process.num_states, len(tokens))), len(tokens)
    clamped_denoiser = clamped(denoiser, tokens, free)

    def matrix(jump, x=x):
        return kernel(jump._replace(p_move=jnp.where(free, jump.p_move, 0.0)), x, process.num_states)

    def log_clean(x, sigma):
        return clamped_denoiser(x, jnp.full(len(x), sigma), None)

    if kind is Gibbs:

        def redraw(i):
            masked = process.mask_tokens(x, jnp.arange(length) == i)
            jump = process.gibbs(log_clean(masked, sigma), sigma)
            return matrix(jump._replace(p_move=jnp.where(jnp.arange(length) == i, jump.p_move, 0.0)), masked)

        return sum(free[i] * redraw(i) for i in range(length)) / free.sum()
    if kind is Barker:
        return matrix(leap(process.barker(log_clean(x, sigma), x, sigma), -size * jnp.expm1(-sigma)))
    above, pi = (1 + size) * sigma, jnp.log(process.stationary())
    up = Jump(jnp.full(x.shape, -jnp.expm1(sigma - above)), jnp.broadcast_to(pi, (*x.shape, len(pi))))
    return matrix(up) @ matrix(process.tweedie(log_clean(x, above), x, above, sigma))


def correcting(corrector, process, denoiser, row=NONE_GIVEN, rounds=1):
    """The `correct` of `sampler_distribution`: `rounds` rounds after each step."""

    def correct(p, sigma):
        once = round_matrix(type(corrector), getattr(corrector, "size", 0.0), process, denoiser, sigma, *row)
        for _ in range(rounds):
            p = p @ once
        return p

    return correct


def drift(corrector, process, joint, sigma, conditioned_on=None):
    """The distance of p_sigma from itself after one round, with the Denoiser conditioned on another sigma if given."""
    p = joint.noisy_distribution(process, sigma)
    correct = correcting(corrector, process, joint.denoiser(process))
    return total_variation(correct(p, conditioned_on or sigma), p)


def test_gibbs_leaves_the_noisy_distribution_invariant(process, joint, float64):
    """Controls: redrawing from r instead of m, and at another noise level, drifts."""

    @dataclasses.dataclass(frozen=True)
    class Clean(type(process)):
        def gibbs(self, log_clean, sigma):
            return Jump(jnp.ones(log_clean.shape[:-1]), log_clean)

    for sigma in (0.05, 1.0, 4.0):
        assert drift(Gibbs(), process, joint, sigma) < 1e-10
        assert drift(Gibbs(), process, joint, sigma, conditioned_on=1.5 * sigma) > 1e-3
    assert drift(Gibbs(), Clean(3), joint, 1.0) > 0.03


def test_renoising_drifts_at_second_order_in_its_size(process, joint, float64):
    """With the figures of its docstring. Control: without corruption, the step back drifts at first order."""
    drifts = np.array([drift(Renoise(size), process, joint, 0.5) for size in (0.2, 0.1, 0.05)])
    assert np.all((3.3 < drifts[:-1] / drifts[1:]) & (drifts[:-1] / drifts[1:] < 4.2))
    np.testing.assert_allclose(drifts[1], 0.0011 if process == Uniform(3) else 0.0004, atol=6e-5)

    def unbalanced(size):
        p, x = joint.noisy_distribution(process, 0.5), states(process.num_states, 3)
        log_clean = joint.denoiser(process)(x, jnp.full(len(x), (1 + size) / 2))
        jump = process.tweedie(log_clean, x, (1 + size) / 2, 0.5)
        return total_variation(p @ kernel(jump, x, process.num_states), p)

    assert unbalanced(0.1) < 2.2 * unbalanced(0.05)


def test_barkers_rates_are_in_balance_and_their_leaps_drift_at_second_order(joint, float64):
    """p(x) times the rate to y equals p(y) times the rate to x. Control: for the reverse rates it does not."""
    process, sigma = Uniform(3), 0.5
    x, p = states(3, 3), joint.noisy_distribution(process, sigma)
    log_clean = joint.denoiser(process)(x, jnp.full(len(x), sigma))

    def flow(rates):  # from each sequence to that with its first token changed, [first token, the others, new token]
        return (p[:, None] * rates[:, 0]).reshape(3, 9, 3)

    rates = process.barker(log_clean, x, sigma)
    assert rates.sum(-1).max() < 1
    flows = flow(rates)
    np.testing.assert_allclose(flows, np.swapaxes(flows, 0, 2), rtol=1e-10)
    flows = flow(process.reverse_rate(log_clean, x, sigma))
    assert np.abs(flows - np.swapaxes(flows, 0, 2)).max() > 1e-3
    drifts = np.array([drift(Barker(size), process, joint, sigma) for size in (0.5, 0.25, 0.125)])
    assert np.all((3.5 < drifts[:-1] / drifts[1:]) & (drifts[:-1] / drifts[1:] < 4.2))
    np.testing.assert_allclose(drifts[1], 0.0003, atol=5e-5)


def test_correctors_reduce_the_distance_at_six_steps(process, joint):
    """With the figures of their docstrings. Control: close to the distribution, large re-noising increases it."""
    denoiser, truth = joint.denoiser(process), joint.noisy_distribution(process, 0.0)

    def distance(corrector=None, steps=6, schedule=Geometric(1e-3, 12.0)):
        sampler = Tweedie(process, schedule, steps)
        extra = () if corrector is None else (correcting(corrector, process, denoiser),)
        return total_variation(sampler_distribution(sampler, denoiser, NONE_GIVEN[0], True, *extra), truth)

    alone = distance()
    assert 0.085 < alone < 0.1 and distance(Gibbs()) < 0.004
    renoised = [distance(Renoise(size)) for size in (0.1, 0.3, 1.0)]
    np.testing.assert_allclose(renoised, [0.08, 0.07, 0.054], atol=0.008)
    if process == Uniform(3):
        assert distance(Barker(1.0)) < 0.85 * alone
    assert distance(Renoise(1.0), 16, LogLinear()) > distance(None, 16, LogLinear())


CASES = [
    (Absorbing(3), Gibbs()),
    (Uniform(3), Gibbs()),
    (Absorbing(3), Renoise(1.0)),
    (Uniform(3), Barker(2.0)),
]


@pytest.mark.parametrize("process, corrector", CASES, ids=str)
def test_a_round_samples_its_exact_distribution(process, corrector, joint):
    """From one sequence, partly masked for Absorbing, at high noise. Control: the distribution at other noise."""
    rows, x, free = 40_000, np.array([0, 1, process.num_states - 1]), np.ones(3, bool)
    denoiser = joint.denoiser(process)

    @jax.jit
    def draw(keys):
        entry = corrector.plan(keyed_random.fold(keys, 0), jnp.tile(free, (rows, 1)))
        start = jnp.tile(jnp.asarray(x, jnp.int32), (rows, 1))
        return corrector.correct(process, keyed_random.fold(keys, 1), denoiser, start, jnp.float32(1.0), entry)

    drawn = index(draw(keyed_random.row_keys(jax.random.key(0), jnp.arange(rows))), process.num_states)

    def fits(sigma):
        with jax.enable_x64(True):
            start = np.eye(process.num_states**3)[index(x, process.num_states)]
            exact = correcting(corrector, process, denoiser)(start, sigma)
        return p_value(drawn, np.asarray(exact))

    assert fits(1.0) > 1e-3 and fits(0.5) < 1e-6


@pytest.mark.parametrize("process, corrector", [CASES[1], pytest.param(*CASES[2], marks=pytest.mark.slow)], ids=str)
def test_the_jitted_loop_samples_the_exact_distribution(process, corrector, joint):
    """The float32 production path, with different given positions in each row. Control: without a corrector."""
    rows, denoiser, sampler = 10_000, joint.denoiser(process), Tweedie(process, Geometric(0.03, 6.0), 2)
    tokens, free = np.tile(TOKENS, (rows, 1)), np.tile(FREE, (rows, 1))
    drawn, calls, _ = run(jax.random.key(1), denoiser, Corrected(sampler, corrector, 2), tokens, free)
    assert calls == 2 + 2 and drawn.dtype == jnp.int32
    assert np.array_equal(np.where(free, tokens, drawn), tokens)

    def fits(rounds):
        exact = [
            sampler_distribution(sampler, denoiser, *row, correcting(corrector, process, denoiser, row, rounds))
            for row in zip(TOKENS, FREE, strict=True)
        ]
        cells = index(drawn, process.num_states).reshape(rows, -1) + len(exact[0]) * np.arange(len(exact))
        return p_value(cells, np.concatenate(exact) / len(exact))

    assert fits(2) > 1e-3 and fits(0) < 1e-6


@pytest.mark.slow
def test_a_row_draws_the_same_in_any_batch(joint):
    """Bit for bit, with two calls a step and the plan of a corrector. Control: other global indices."""
    process = Absorbing(3)
    tokens, free = np.tile(TOKENS, (2, 1)), np.tile(FREE, (2, 1))
    sampler = Corrected(Trapezoidal(process, LogLinear(), 4), Gibbs(), 2)
    args = jax.random.key(0), joint.denoiser(process), sampler
    batch = run(*args, tokens, free, rows=np.arange(10))
    assert batch.calls == 7 + 2 * 3
    part = np.array([6, 3, 7, 0, 9])
    np.testing.assert_array_equal(run(*args, tokens[part], free[part], rows=part).tokens, batch.tokens[part])
    assert np.any(run(*args, tokens[part], free[part], rows=np.arange(5)).tokens != batch.tokens[part])


def test_every_round_is_one_call_except_after_the_last_step(joint):
    """`calls` is the number of network calls; rows without masks are not finished, as a corrector can mask again."""
    process, network_calls = Absorbing(3), []

    def counting(x, sigma, positions=None):
        jax.debug.callback(lambda _: network_calls.append(1), sigma)
        return joint.denoiser(process)(x, sigma, positions)

    free = np.array([[True, False, False]])
    sampler = Corrected(Tweedie(process, LogLinear(), 5), Renoise(), 3)
    calls = run(jax.random.key(0), counting, sampler, np.zeros_like(free, int), free).calls
    jax.effects_barrier()
    assert calls == len(network_calls) == 5 + 4 * 3


def test_gibbs_redraws_free_positions_uniformly(float64):
    """All free positions equally often, and two of a row at least four free positions apart."""
    free = np.random.default_rng(0).random((4, 40)) < [[0.9], [0.5], [0.1], [0.05]]
    sampler = Corrected(Tweedie(Uniform(3), LogLinear(), 200), Gibbs(width=5), 20)
    keys = jax.random.split(jax.random.key(0), 4)
    _, positions = jax.jit(sampler.plan)(keys, free)
    assert positions.shape == (200, 20, 4, 5)
    for row, redrawn in zip(free, np.moveaxis(positions, 2, 0), strict=True):
        places, count = np.flatnonzero(row), row.sum()
        ranks = np.sort(np.searchsorted(places, redrawn), axis=-1).reshape(-1, 5)
        assert np.all(row[redrawn]) and len(set(ranks[0])) == min(5, max(count // 4, 1))
        gaps = np.diff(np.concatenate([ranks, ranks[:, :1] + count], axis=-1))
        assert np.min(gaps[gaps > 0], initial=count) >= min(4, count)
        starts = np.searchsorted(places, redrawn[..., 0])
        assert p_value(starts, np.full(count, 1 / count)) > 1e-3
        assert p_value(starts, np.arange(1, count + 1) / (count * (count + 1) / 2)) < 1e-6 or count == 1


def test_redrawing_neighbours_together_drifts(float64):
    """On a chain of six tokens, with the figures of the docstring of Gibbs: why redrawn positions have a distance."""
    process, chain = Uniform(2), MarkovChain.random(2).joint(6)
    x, denoiser = states(2, 6), chain.denoiser(process)

    @jax.jit
    def together(sigma, where):
        jump = process.gibbs(denoiser(x, jnp.full(len(x), sigma)), sigma)
        return kernel(jump._replace(p_move=jnp.where(where, jump.p_move, 0.0)), x, 2)

    def drifts(apart, sigma):
        p = chain.noisy_distribution(process, sigma)
        pairs = [np.isin(np.arange(6), (i, i + apart)) for i in range(6 - apart)]
        return np.mean([total_variation(p @ together(sigma, where), p) for where in pairs])

    for sigma in (0.05, 0.3):
        assert 0.1 < drifts(1, sigma) < 0.13 and 0.01 < drifts(2, sigma) < 0.033 and 0.0008 < drifts(3, sigma) < 0.011


def infilling_distributions(denoisers, steps, corrector=None, rounds=0):
    """The sampler's distribution for each row with given tokens."""
    process, rows = Uniform(3), list(zip(TOKENS[:4], FREE[:4], strict=True))
    sampler = Tweedie(process, Geometric(1e-3, 12.0), steps)
    corrects = [
        () if corrector is None else (correcting(corrector, process, denoiser, row, rounds),)
        for denoiser, row in zip(denoisers, rows, strict=True)
    ]
    return np.array(
        [
            sampler_distribution(sampler, denoiser, *row, *correct)
            for denoiser, row, correct in zip(denoisers, rows, corrects, strict=True)
        ]
    )


def test_correctors_are_the_resampling_loops_of_uniform_infilling(joint):
    """With the figures of the module. A Denoiser conditioned on what is given needs none; clamping alone is biased."""
    process = Uniform(3)
    ignores_given = [joint.denoiser(process)] * 4
    conditioned = [joint.denoiser_given(process, ~free) for free in FREE[:4]]
    conditional = joint.conditional(TOKENS[:4], FREE[:4])

    def distances(*args):
        return np.abs(infilling_distributions(*args) - conditional).sum(-1) / 2

    alone, gibbs = distances(ignores_given, 64), distances(ignores_given, 64, Gibbs(), 1)
    renoised = [distances(ignores_given, 64, Renoise(1.0), rounds) for rounds in (1, 4, 10)]
    assert 0.03 < alone.min() and 0.15 < alone.max() < 0.17
    assert gibbs.max() < 0.0015
    np.testing.assert_allclose([r.max() for r in renoised], [0.079, 0.033, 0.016], atol=0.001)
    np.testing.assert_allclose([r.min() for r in renoised], [0.013, 0.004, 0.002], atol=0.001)
    assert distances(conditioned, 64).max() < 0.01 < 0.03 < distances(ignores_given, 256).max()


def test_invalid_correctors_are_refused_in_one_line():
    """Adaptive samplers have no noise level; Barker needs the uniform process."""
    grid = Tweedie(Absorbing(3), LogLinear(), 4)
    with pytest.raises(ValueError, match="a corrector needs a sampler on a grid of noise levels, not Adaptive"):
        Corrected(Adaptive(Absorbing(3), Margin()), Gibbs())
    with pytest.raises(ValueError, match="it needs the uniform process, not Absorbing"):
        Corrected(grid, Barker())
    with pytest.raises(ValueError, match="at least one round, not 0"):
        Corrected(grid, Gibbs(), 0)
    for make in (Renoise, Barker):
        for size in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match=f"{make.__name__}: size must be positive, not {size}"):
                make(size)
    with pytest.raises(ValueError, match="width must be at least 1"):
        Gibbs(0)
