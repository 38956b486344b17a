"""Correctors: what they leave as it is, what they do to samplers, and what they do for infilling."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import MarkovChain, index, kernel, p_value, sampler_law, states, total_variation

from sedd.diffusion import keyed_random
from sedd.diffusion.correctors import Barker, Corrected, Gibbs, Renoise
from sedd.diffusion.pickers import Margin
from sedd.diffusion.process import Absorbing, Jump, Uniform
from sedd.diffusion.samplers import Trapezoidal, Tweedie, leap, sample
from sedd.diffusion.schedule import Geometric, LogLinear
from sedd.diffusion.score import clamped
from sedd.diffusion.unmasking import Adaptive

run = jax.jit(sample, static_argnames=("denoiser", "sampler"))

# Different given positions in each row of a batch: one, two, and none.
TOKENS = np.array([[0, 1, 2], [2, 0, 1], [1, 1, 0], [0, 2, 2], [1, 0, 2]])
FREE = np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
NONE_GIVEN = TOKENS[-1], FREE[-1]


@functools.partial(jax.jit, static_argnames=("kind", "process", "denoiser"))
def round_law(kind, size, process, denoiser, sigma, tokens, free):
    """Where one round of a corrector takes each sequence. Float[S^L S^L], rows sum to 1."""
    x, length = jnp.asarray(states(process.num_states, len(tokens))), len(tokens)
    seen = clamped(denoiser, tokens, free)

    def moved(jump, x=x):
        return kernel(jump._replace(p_move=jnp.where(free, jump.p_move, 0.0)), x, process.num_states)

    def believed(x, sigma):
        return seen(x, jnp.full(len(x), sigma), None)

    if kind is Gibbs:

        def redrawn(i):
            hidden = process.mask_tokens(x, jnp.arange(length) == i)
            jump = process.gibbs(believed(hidden, sigma), sigma)
            return moved(jump._replace(p_move=jnp.where(jnp.arange(length) == i, jump.p_move, 0.0)), hidden)

        return sum(free[i] * redrawn(i) for i in range(length)) / free.sum()
    if kind is Barker:
        return moved(leap(process.barker(believed(x, sigma), x, sigma), -size * jnp.expm1(-sigma)))
    above, pi = (1 + size) * sigma, jnp.log(process.stationary())
    up = Jump(jnp.full(x.shape, -jnp.expm1(sigma - above)), jnp.broadcast_to(pi, (*x.shape, len(pi))))
    return moved(up) @ moved(process.tweedie(believed(x, above), x, above, sigma))


def correcting(corrector, process, denoiser, row=NONE_GIVEN, rounds=1):
    """What `sampler_law` applies after each step."""

    def correct(law, sigma):
        once = round_law(type(corrector), getattr(corrector, "size", 0.0), process, denoiser, sigma, *row)
        for _ in range(rounds):
            law = law @ once
        return law

    return correct


def drift(corrector, process, joint, sigma, asked=None):
    """How far one round takes p_sigma from itself."""
    law = joint.law(process, sigma)
    return total_variation(correcting(corrector, process, joint.denoiser(process))(law, asked or sigma), law)


def test_gibbs_leaves_the_law_of_the_noise_as_it_is(process, joint, float64):
    """Controls: a token redrawn from r instead of m, and at another noise, drifts."""

    @dataclasses.dataclass(frozen=True)
    class Clean(type(process)):
        def gibbs(self, log_clean, sigma):
            return Jump(jnp.ones(log_clean.shape[:-1]), log_clean)

    for sigma in (0.05, 1.0, 4.0):
        assert drift(Gibbs(), process, joint, sigma) < 1e-10
        assert drift(Gibbs(), process, joint, sigma, asked=1.5 * sigma) > 1e-3
    assert drift(Gibbs(), Clean(3), joint, 1.0) > 0.03


def test_renoising_drifts_at_second_order_in_its_size(process, joint, float64):
    """As its docstring says. Control: without the noise, the step back drifts at first order."""
    drifts = np.array([drift(Renoise(size), process, joint, 0.5) for size in (0.2, 0.1, 0.05)])
    assert np.all((3.3 < drifts[:-1] / drifts[1:]) & (drifts[:-1] / drifts[1:] < 4.2))
    np.testing.assert_allclose(drifts[1], 0.0011 if process == Uniform(3) else 0.0004, atol=6e-5)

    def unbalanced(size):
        law, x = joint.law(process, 0.5), states(process.num_states, 3)
        log_clean = joint.denoiser(process)(x, jnp.full(len(x), (1 + size) / 2))
        jump = process.tweedie(log_clean, x, (1 + size) / 2, 0.5)
        return total_variation(law @ kernel(jump, x, process.num_states), law)

    assert unbalanced(0.1) < 2.2 * unbalanced(0.05)


def test_barkers_rates_are_in_balance_and_their_leaps_drift_at_second_order(joint, float64):
    """p(x) times the rate to y is p(y) times the rate to x. Control: for the reverse rates it is not."""
    process, sigma = Uniform(3), 0.5
    x, law = states(3, 3), joint.law(process, sigma)
    log_clean = joint.denoiser(process)(x, jnp.full(len(x), sigma))

    def flow(rates):  # from each sequence to that with its first token changed, [first token, the others, new token]
        return (law[:, None] * rates[:, 0]).reshape(3, 9, 3)

    rates = process.barker(log_clean, x, sigma)
    assert rates.sum(-1).max() < 1
    there = flow(rates)
    np.testing.assert_allclose(there, np.swapaxes(there, 0, 2), rtol=1e-10)
    there = flow(process.reverse_rate(log_clean, x, sigma))
    assert np.abs(there - np.swapaxes(there, 0, 2)).max() > 1e-3
    drifts = np.array([drift(Barker(size), process, joint, sigma) for size in (0.5, 0.25, 0.125)])
    assert np.all((3.5 < drifts[:-1] / drifts[1:]) & (drifts[:-1] / drifts[1:] < 4.2))
    np.testing.assert_allclose(drifts[1], 0.0003, atol=5e-5)


def test_correctors_bring_few_steps_closer(process, joint):
    """As their docstrings say, at six steps. Control: a large re-noising, close to the law, does harm."""
    denoiser, truth = joint.denoiser(process), joint.law(process, 0.0)

    def distance(corrector=None, steps=6, schedule=Geometric(1e-3, 12.0)):
        sampler = Tweedie(process, schedule, steps)
        extra = () if corrector is None else (correcting(corrector, process, denoiser),)
        return total_variation(sampler_law(sampler, denoiser, NONE_GIVEN[0], True, *extra), truth)

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
def test_a_round_draws_its_law(process, corrector, joint):
    """From one sequence, partly masked for Absorbing, at much noise. Control: the law at other noise."""
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
            law = correcting(corrector, process, denoiser)(
                np.eye(process.num_states**3)[index(x, process.num_states)], sigma
            )
        return p_value(drawn, np.asarray(law))

    assert fits(1.0) > 1e-3 and fits(0.5) < 1e-6


@pytest.mark.parametrize("process, corrector", [CASES[1], pytest.param(*CASES[2], marks=pytest.mark.slow)], ids=str)
def test_the_jitted_loop_draws_the_law(process, corrector, joint):
    """The float32 production path, with other given positions in each row. Control: the law without a corrector."""
    rows, denoiser, sampler = 10_000, joint.denoiser(process), Tweedie(process, Geometric(0.03, 6.0), 2)
    tokens, free = np.tile(TOKENS, (rows, 1)), np.tile(FREE, (rows, 1))
    drawn, calls, _ = run(jax.random.key(1), denoiser, Corrected(sampler, corrector, 2), tokens, free)
    assert calls == 2 + 2 and drawn.dtype == jnp.int32
    assert np.array_equal(np.where(free, tokens, drawn), tokens)

    def fits(rounds):
        laws = [
            sampler_law(sampler, denoiser, *row, correcting(corrector, process, denoiser, row, rounds))
            for row in zip(TOKENS, FREE, strict=True)
        ]
        cells = index(drawn, process.num_states).reshape(rows, -1) + len(laws[0]) * np.arange(len(laws))
        return p_value(cells, np.concatenate(laws) / len(laws))

    assert fits(2) > 1e-3 and fits(0) < 1e-6


@pytest.mark.slow
def test_a_row_draws_the_same_in_any_batch(joint):
    """Bit for bit, two calls a step and what a corrector draws beforehand included. Control: other global indices."""
    process = Absorbing(3)
    tokens, free = np.tile(TOKENS, (2, 1)), np.tile(FREE, (2, 1))
    sampler = Corrected(Trapezoidal(process, LogLinear(), 4), Gibbs(), 2)
    args = jax.random.key(0), joint.denoiser(process), sampler
    whole = run(*args, tokens, free, rows=np.arange(10))
    assert whole.calls == 7 + 2 * 3
    part = np.array([6, 3, 7, 0, 9])
    np.testing.assert_array_equal(run(*args, tokens[part], free[part], rows=part).tokens, whole.tokens[part])
    assert np.any(run(*args, tokens[part], free[part], rows=np.arange(5)).tokens != whole.tokens[part])


def test_every_round_asks_once_but_after_the_last_step(joint):
    """What is counted is what was asked, a finished row or not: a corrector can take its tokens back."""
    process, asked = Absorbing(3), []

    def counting(x, sigma, positions=None):
        jax.debug.callback(lambda _: asked.append(1), sigma)
        return joint.denoiser(process)(x, sigma, positions)

    free = np.array([[True, False, False]])
    sampler = Corrected(Tweedie(process, LogLinear(), 5), Renoise(), 3)
    calls = run(jax.random.key(0), counting, sampler, np.zeros_like(free, int), free).calls
    jax.effects_barrier()
    assert calls == len(asked) == 5 + 4 * 3


def test_gibbs_takes_free_positions_evenly(float64):
    """Each free position as often as another, and never two of a row closer than four."""
    free = np.random.default_rng(0).random((4, 40)) < [[0.9], [0.5], [0.1], [0.05]]
    sampler = Corrected(Tweedie(Uniform(3), LogLinear(), 200), Gibbs(width=5), 20)
    keys = jax.random.split(jax.random.key(0), 4)
    _, positions = jax.jit(sampler.plan)(keys, free)
    assert positions.shape == (200, 20, 4, 5)
    for row, taken in zip(free, np.moveaxis(positions, 2, 0), strict=True):
        places, count = np.flatnonzero(row), row.sum()
        ranks = np.sort(np.searchsorted(places, taken), axis=-1).reshape(-1, 5)
        assert np.all(row[taken]) and len(set(ranks[0])) == min(5, max(count // 4, 1))
        gaps = np.diff(np.concatenate([ranks, ranks[:, :1] + count], axis=-1))
        assert np.min(gaps[gaps > 0], initial=count) >= min(4, count)
        starts = np.searchsorted(places, taken[..., 0])
        assert p_value(starts, np.full(count, 1 / count)) > 1e-3
        assert p_value(starts, np.arange(1, count + 1) / (count * (count + 1) / 2)) < 1e-6 or count == 1


def test_redrawing_neighbours_together_drifts(float64):
    """What the distance between redrawn positions is for, on a chain of six tokens, with Gibbs' docstring's figures."""
    process, chain = Uniform(2), MarkovChain.random(2).joint(6)
    x, denoiser = states(2, 6), chain.denoiser(process)

    @jax.jit
    def together(sigma, where):
        jump = process.gibbs(denoiser(x, jnp.full(len(x), sigma)), sigma)
        return kernel(jump._replace(p_move=jnp.where(where, jump.p_move, 0.0)), x, 2)

    def drifts(apart, sigma):
        law, pairs = chain.law(process, sigma), [np.isin(np.arange(6), (i, i + apart)) for i in range(6 - apart)]
        return np.mean([total_variation(law @ together(sigma, where), law) for where in pairs])

    for sigma in (0.05, 0.3):
        assert 0.1 < drifts(1, sigma) < 0.13 and 0.01 < drifts(2, sigma) < 0.033 and 0.0008 < drifts(3, sigma) < 0.011


def infilling_distances(denoisers, steps, corrector=None, rounds=0):
    """How far from Bayes' conditional, for each row with given tokens."""
    process, rows = Uniform(3), list(zip(TOKENS[:4], FREE[:4], strict=True))
    sampler = Tweedie(process, Geometric(1e-3, 12.0), steps)
    corrects = [
        () if corrector is None else (correcting(corrector, process, denoiser, row, rounds),)
        for denoiser, row in zip(denoisers, rows, strict=True)
    ]
    return np.array(
        [
            sampler_law(sampler, denoiser, *row, *correct)
            for denoiser, row, correct in zip(denoisers, rows, corrects, strict=True)
        ]
    )


def test_correctors_are_the_resampling_loops_of_uniform_infilling(joint):
    """The figures of the module. A Denoiser that is told what is given needs none; clamped alone no steps help."""
    process = Uniform(3)
    ignores_given, told = [joint.denoiser(process)] * 4, [joint.informed(process, ~free) for free in FREE[:4]]
    conditional = joint.conditional(TOKENS[:4], FREE[:4])

    def distances(*args):
        return np.abs(infilling_distances(*args) - conditional).sum(-1) / 2

    alone, gibbs = distances(ignores_given, 64), distances(ignores_given, 64, Gibbs(), 1)
    renoised = [distances(ignores_given, 64, Renoise(1.0), rounds) for rounds in (1, 4, 10)]
    assert 0.03 < alone.min() and 0.15 < alone.max() < 0.17
    assert gibbs.max() < 0.0015
    np.testing.assert_allclose([r.max() for r in renoised], [0.079, 0.033, 0.016], atol=0.001)
    np.testing.assert_allclose([r.min() for r in renoised], [0.013, 0.004, 0.002], atol=0.001)
    assert distances(told, 64).max() < 0.01 < 0.03 < distances(ignores_given, 256).max()


def test_what_cannot_be_corrected_is_said_in_one_line():
    """Reveal samplers have no noise to correct at; Barker needs tokens that move into each other."""
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
