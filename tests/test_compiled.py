"""Compiled sums of the closed forms equal those of the operations one by one, at thousands of noise levels.

XLA on CPUs (jaxlib 0.10.2 and 0.12.0.1, at every optimisation level) computes wrong numbers in a reduction of 4,096
entries or more over an expression with f(s) and f(c s), where c is a constant other than 1 and f is expm1, log1p or
log: it merges the two. Computed operation by operation the numbers are right.
"""

import jax
import jax.numpy as jnp
import pytest

from sedd.diffusion import keyed_random
from sedd.diffusion.discrete.likelihood import MaskCountBound, NoiseLevelBound, TimeLoss
from sedd.diffusion.discrete.loss import count_loss, denoising_loss
from sedd.diffusion.discrete.process import Absorbing, Uniform
from sedd.diffusion.discrete.samplers import halves, leap
from sedd.diffusion.discrete.score import ArrayColumns, clean_stats, score_stats
from sedd.diffusion.sampling import Interval
from sedd.diffusion.schedule import Geometric, LogLinear, log_snr
from sedd.network.predictions import PosteriorPrediction

V, NUM_INPUTS = 3, 12_288
PROCESSES = {"absorbing": Absorbing(V), "uniform": Uniform(V)}
SCHEDULES = (LogLinear(), Geometric(1e-3, 12.0))


def error(function, *arguments):
    """The largest error of the compiled sums of a function's outputs, against its operations one by one.

    Relative to the sums of absolute values. Each sum is compiled separately: several sums of one array hide the fault.
    """
    with jax.disable_jit():
        due = jax.tree.leaves(function(*arguments))
    sums = (lambda *arguments, i=i: jnp.sum(jax.tree.leaves(function(*arguments))[i]) for i in range(len(due)))
    sizes = (max(float(jnp.sum(jnp.abs(leaf))), 1e-30) for leaf in due)
    compiled = (float(jax.jit(total)(*arguments)) for total in sums)
    return max(abs(one - float(jnp.sum(leaf))) / size for one, leaf, size in zip(compiled, due, sizes))


def test_the_comparison_detects_the_xla_fault():
    """The control: it tests whether the installed XLA has the fault; without it the other tests show little."""
    u = jnp.linspace(0.01, 0.9, 5000)
    has_fault = float(jax.jit(lambda u: jnp.sum(jnp.log1p(u) - jnp.log1p(-u)))(u)) == 0
    assert (error(lambda u: jnp.log1p(u) - jnp.log1p(-u), u) > 0.1) == has_fault
    assert (error(lambda u: jnp.expm1(u) * jnp.exp(log_snr(u)), u) > 0.1) == has_fault
    assert error(jnp.log1p, u) < 1e-5


def inputs(process):
    """(s, t, r, f, x, x0), each token at its own noise level: two noises s > t, log r, a log score, tokens and x0."""
    s = jnp.exp(jnp.linspace(jnp.log(1e-3), jnp.log(12.0), NUM_INPUTS))
    r = jax.nn.log_softmax(2 * jnp.sin(jnp.arange(1.0, NUM_INPUTS * V + 1) ** 2).reshape(NUM_INPUTS, V))
    f = jnp.cos(jnp.arange(NUM_INPUTS * V) * 0.7).reshape(NUM_INPUTS, V)
    x = jnp.full(NUM_INPUTS, V) if isinstance(process, Absorbing) else jnp.arange(NUM_INPUTS) % V
    return s, s * (0.5 + 0.4 * jnp.sin(s)), r, f, x, jnp.arange(NUM_INPUTS) // V % V


def entropies(p):
    """The terms of losses and bounds."""

    def entropy(s, t, r, f, x, x0):
        return p.score_entropy(score_stats(f, x, x0), x, x0, s)

    functions = {
        "score_entropy": entropy,
        "score_entropy of log r": lambda s, t, r, f, x, x0: p.score_entropy(clean_stats(p, r, x, x0, s), x, x0, s),
        "its gradient": jax.grad(lambda s, t, r, f, x, x0: jnp.sum(entropy(s, t, r, f, x, x0)), 3),
        "reconstruction": lambda s, t, r, f, x, x0: p.reconstruction(score_stats(f, x, x0), x, x0, s),
    }
    if isinstance(p, Absorbing):
        functions["cross_entropy"] = lambda s, t, r, f, x, x0: p.cross_entropy(score_stats(f, x, x0), x, s)
    return functions


def others(p):
    """All other methods of a process, and the jumps of samplers. Outputs that can be -inf are exponentiated."""

    def here(r, x):
        return jnp.take_along_axis(r, jnp.minimum(x, V - 1)[:, None], axis=-1)[:, 0]

    def weights(jump):
        return jump.p_move, jnp.exp(jump.log_dest)

    functions = {
        "log_noised": lambda s, t, r, *_: p.log_noised(r, s),
        "log_transition": lambda s, t, r, f, x, x0: jnp.exp(p.log_transition(x, x0, s)),
        "log_score": lambda s, t, r, f, x, x0: p.log_score(r, here(r, x), s),
        "clean_from_score": lambda s, t, r, f, *_: jnp.exp(p.clean_from_score(f, s)),
        "log_posterior": lambda s, t, r, f, x, x0: jnp.exp(p.log_posterior(r, x, s)),
        "tightened": lambda s, t, r, f, *_: p.tightened(f, s),
        "reverse_rate": lambda s, t, r, f, x, x0: p.reverse_rate(r, x, s),
        "leap": lambda s, t, r, f, x, x0: weights(leap(p.reverse_rate(r, x, s), t)),
        "gibbs": lambda s, t, r, *_: weights(p.gibbs(r, s)),
        "tweedie": lambda s, t, r, f, x, x0: weights(p.tweedie(r, x, s, t)),
        "tweedie to half the noise": lambda s, t, r, f, x, x0: weights(p.tweedie(r, x, s, 0.5 * s)),
        "halves": lambda s, t, *_: halves(Interval(s, 0.5 * s, t)),
    }
    if isinstance(p, Uniform):
        functions["barker"] = lambda s, t, r, f, x, x0: p.barker(r, x, s)
        functions["log_evidence"] = lambda s, t, r, f, x, x0: p.log_evidence(x, s, 4.0)
        functions["lost_evidence"] = lambda s, t, r, f, x, x0: p.lost_evidence(x, s, 4.0)
        functions["posterior"] = lambda s, t, r, f, x, x0: PosteriorPrediction(p).log_posterior(f, x, s)
        functions["its statistics"] = lambda s, t, r, f, x, x0: PosteriorPrediction(p).stats(
            ArrayColumns(f), x, x0, s, s
        )
        functions["posterior to r"] = lambda s, t, r, f, x, x0: PosteriorPrediction(p).log_clean(f, x, s)
    return functions


def bounds(p):
    """Losses and bounds of rows at a noise level each, for a score scaled by a factor."""
    rows, x0 = jnp.arange(NUM_INPUTS), jnp.zeros((NUM_INPUTS, 2), int)
    keys, t, k = keyed_random.row_keys(keyed_random.root_key(0), rows), (rows + 0.5) / NUM_INPUTS, 1 + rows % 2
    place = jnp.arange(2 * V).reshape(1, 2, V)

    def stats(factor):
        return lambda x, sigma, x0: score_stats(factor * jnp.sin(sigma[:, None, None] + x[..., None] + place), x, x0)

    losses = {
        f"denoising_loss, {schedule}": lambda factor, schedule=schedule: denoising_loss(
            p, schedule, stats(factor), keys, x0, t
        )
        for schedule in SCHEDULES
    }
    functions = {
        "NoiseLevelBound": lambda factor: NoiseLevelBound(p, 1e-3, 12.0).draws(stats(factor), keys, x0, 2),
        "TimeLoss": lambda factor: TimeLoss(p, LogLinear(), 1e-3, NUM_INPUTS).draws(
            stats(factor), keys, x0, 2, rows=rows
        ),
    }
    if isinstance(p, Absorbing):
        losses["count_loss"] = lambda factor: count_loss(p, stats(factor), keys, x0, k)
        for n in (3, 4):
            functions[f"MaskCountBound, {n}"] = lambda factor, n=n: MaskCountBound(p).draws(stats(factor), keys, x0, n)
    for name, loss in losses.items():
        functions[f"{name}, gradient"] = jax.grad(lambda factor, loss=loss: jnp.sum(loss(factor)))
    return functions | losses


def check(functions, arguments, tolerance):
    for name, function in functions.items():
        assert error(function, *arguments) < tolerance, name


@pytest.mark.parametrize("name", PROCESSES)
def test_entropies(name):
    check(entropies(PROCESSES[name]), inputs(PROCESSES[name]), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
def test_entropies_in_float64(name, float64):
    check(entropies(PROCESSES[name]), inputs(PROCESSES[name]), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("name", PROCESSES)
def test_every_other_method_of_a_process(name, x64):
    with jax.enable_x64(x64):
        check(others(PROCESSES[name]), inputs(PROCESSES[name]), 1e-12 if x64 else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("name", PROCESSES)
def test_every_loss_and_bound(name, x64):
    with jax.enable_x64(x64):
        check(bounds(PROCESSES[name]), (jnp.asarray(0.7),), 1e-10 if x64 else 1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule(schedule):
    functions = {
        "sigma": schedule.sigma,
        "rate": schedule.rate,
        "alpha": schedule.alpha,
        "time": lambda t: schedule.time(schedule.sigma(t)),
    }
    check(functions, (jnp.linspace(1e-3, 1.0, NUM_INPUTS),), 1e-5)
