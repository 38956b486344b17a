"""Samplers of Gaussian diffusion against the distribution over words: on a grid of latents in float64, and jitted."""

import functools

import jax
import jax.numpy as jnp
import latent_oracle
import numpy as np
import pytest
from latent_oracle import LINE, PLANE, Embedded, Encoded, sampler_distribution
from oracle import Joint, MarkovChain, index, p_value, total_variation

from sedd.diffusion.discrete.process import Absorbing
from sedd.diffusion.discrete.samplers import Tweedie
from sedd.diffusion.gaussian.guidance import GradientSteps, classifier_free, guided, nearest, rounded
from sedd.diffusion.gaussian.process import Gaussian
from sedd.diffusion.gaussian.samplers import DDIM, EulerMaruyama, Renoised
from sedd.diffusion.sampling import Corrected, sample
from sedd.diffusion.schedule import LogSNR, Sqrt

SAMPLERS = {
    "ancestral": lambda process, steps: DDIM(process, Sqrt(), steps),
    "half": lambda process, steps: DDIM(process, Sqrt(), steps, eta=0.5),
    "euler": lambda process, steps: EulerMaruyama(process, LogSNR(0.1, 9.0), steps),
    "renoised": lambda process, steps: Renoised(process, Sqrt(), steps),
}


@pytest.fixture(scope="module", autouse=True)
def narrow_grid():
    """The grid from -5 to 5 at the same spacing: no distance of this file changes by 1e-3."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_oracle, "AXIS", np.linspace(-5, 5, 121))
        yield


@pytest.fixture(scope="module")
def exact():
    return Embedded(MarkovChain.random().joint(2), LINE)


@pytest.fixture(scope="module")
def classified(exact):
    """The class of words whose two tokens differ: the log-likelihood of latents, and the distribution given it."""
    member = exact.words[:, 0] != exact.words[:, 1]

    def log_likelihood(z, sigma):
        return jax.nn.logsumexp(jnp.where(jnp.asarray(member), exact.log_posterior(z, sigma), -jnp.inf), axis=-1)

    p = exact.joint.p.ravel() * member
    return log_likelihood, p / p.sum()


def distances(embedded, name, mean, steps, target=None, **given):
    """The total variation distance to the target at each number of steps, by default to the distribution."""
    target = embedded.joint.p.ravel() if target is None else target
    with jax.enable_x64(True):
        runs = [sampler_distribution(SAMPLERS[name](embedded.process, n), mean, embedded, **given) for n in steps]
    return np.array([total_variation(np.asarray(p), target) for p in runs])


@functools.partial(jax.jit, static_argnames=("embedded", "mean", "sampler"))
def draw(embedded, mean, sampler, tokens, free, rows=None):
    """Draws words by the jitted loop. Int[B L], Bool[B L] -> Int[B L]."""
    table = jnp.asarray(embedded.table, jnp.float32)
    shown = functools.partial(lambda table, x: nearest(x.estimate, table), table)
    return sample(jax.random.key(0), mean, sampler, table[tokens], free, rows, shown=shown).tokens


def draw_free(embedded, mean, sampler, count):
    """Draws `count` words without given tokens; their indices."""
    shape = (count, embedded.joint.p.ndim)
    tokens = draw(embedded, mean, sampler, jnp.zeros(shape, int), jnp.ones(shape, bool))
    return index(tokens, len(embedded.table))


@pytest.mark.parametrize(
    "name", ["ancestral", *(pytest.param(name, marks=pytest.mark.slow) for name in ("half", "euler"))]
)
def test_samplers_converge_to_the_distribution_at_first_order(exact, name):
    """Each doubling of the steps at least about halves the distance. Control: the mean of independent tokens."""
    found = distances(exact, name, exact.mean(), (8, 16, 32))
    assert np.all(found[:-1] / found[1:] > 1.6) and found[-1] < 0.025, found
    assert distances(exact, name, Embedded(exact.joint.independent(), LINE).mean(), (32,)) > 0.1


def test_samples_of_encodings_converge_to_the_distribution_at_first_order(exact):
    """Of latents that depend on all tokens of a text. Control: the mean of independent tokens."""
    encoded = Encoded.of(exact.joint, LINE)
    found = distances(encoded, "ancestral", encoded.mean(), (8, 16, 32))
    assert np.all(found[:-1] / found[1:] > 1.5) and found[-1] < 0.03, found
    independent = Encoded(exact.joint.independent(), encoded.codes)
    assert distances(encoded, "ancestral", independent.mean(), (32,)) > 0.1


def test_drawing_all_noise_again_keeps_a_bias(exact):
    """The paper's form of the step, with any number of steps: .15 here."""
    assert np.all(np.abs(distances(exact, "renoised", exact.mean(), (8, 32)) - 0.155) < 0.02)


@pytest.mark.slow
def test_infilling_needs_a_denoiser_conditioned_on_the_given_tokens():
    """Then it converges to the conditional distribution. Clean embeddings written back, as published, stay .06 off."""
    embedded = Embedded(MarkovChain.random().joint(3), LINE)
    tokens, free = np.array([0, 2, 0]), np.array([True, False, True])
    task = dict(target=embedded.joint.conditional(tokens, free), given=jnp.asarray(tokens), free=jnp.asarray(free))
    right, unaware = (
        distances(embedded, "ancestral", embedded.mean(known), (16, 32), **task) for known in (~free, False)
    )
    assert right[0] / right[1] > 1.6 and right[1] < 0.03, right
    assert np.all(np.abs(unaware - 0.0625) < 0.003), unaware


@pytest.mark.slow
def test_rounding_biases_the_samples_but_at_little_noise(exact):
    """At 64 steps: without .010; from sigma .1 on .010, from .4 .024, always .043."""
    for below, bias in ((0.1, 0.0102), (0.4, 0.024), (np.inf, 0.0434)):
        mean = rounded(exact.mean(), jnp.asarray(LINE), below)
        assert distances(exact, "ancestral", mean, (64,)) == pytest.approx(bias, abs=0.002)


@pytest.mark.slow
def test_guidance_converges_to_the_distribution_given_the_class(exact, classified):
    """With the exact classifier, at scale 1. Controls: no guidance, and twice the scale."""
    log_likelihood, target = classified
    right, none, twice = (
        distances(exact, "ancestral", guided(exact.mean(), log_likelihood, scale), steps, target=target)
        for scale, steps in ((1.0, (16, 32)), (0.0, (16,)), (2.0, (16,)))
    )
    assert right[0] / right[1] > 1.6 and right[1] < 0.015, right
    assert none > 0.5 and twice > 0.15


def test_steps_along_the_sign_of_the_gradient_do_not_give_the_distribution_of_the_class(exact, classified):
    """The published control: nearly all samples are of the class, but with other frequencies than given the class."""
    log_likelihood, target = classified
    pushed = Corrected(DDIM(exact.process, Sqrt(), 32), GradientSteps(log_likelihood))
    found = np.bincount(draw_free(exact, exact.mean(), pushed, 8000), minlength=9) / 8000
    assert found[target > 0].sum() > 0.97
    assert total_variation(found, target) > 0.15
    right = DDIM(exact.process, Sqrt(), 32)
    guided_draws = np.bincount(draw_free(exact, guided(exact.mean(), log_likelihood), right, 8000), minlength=9) / 8000
    assert total_variation(guided_draws, target) < 0.04


def test_classifier_free_guidance_interpolates(exact):
    """Weight 1 is the conditional mean, 0 the unconditional one; 2 as far again beyond."""
    x = draw_state(exact)
    sigma = jnp.full(len(x.z), 0.7)
    a, b = exact.mean(np.array([True, False])), exact.mean()
    mixed = [classifier_free(a, b, weight)(x, sigma) for weight in (0.0, 1.0, 2.0)]
    np.testing.assert_allclose(mixed[0], b(x, sigma), atol=1e-6)
    np.testing.assert_allclose(mixed[1], a(x, sigma), atol=1e-6)
    np.testing.assert_allclose(mixed[2] - mixed[1], mixed[1] - mixed[0], atol=1e-5)


def draw_state(embedded):
    """Some states whose first latent is clean."""
    z = jax.random.normal(jax.random.key(3), (5, 2, 1)).at[:, 0].set(embedded.table[1])
    return DDIM(embedded.process, Sqrt(), 1).start(jax.random.split(jax.random.key(0), 5), z)._replace(z=z)


def test_guided_means_are_those_given_the_class(exact, classified):
    """E[z0 | z, c] by enumeration, to float32's precision."""
    log_likelihood, target = classified
    within = Embedded(Joint(target.reshape(3, 3) + 1e-30), LINE)
    x = draw_state(exact)
    for sigma in (0.2, 1.0, 5.0):
        at = jnp.full(5, sigma)
        np.testing.assert_allclose(guided(exact.mean(), log_likelihood)(x, at), within.mean()(x, at), atol=2e-5)


@pytest.mark.parametrize("eta", [1.0, 0.0])
def test_the_jitted_loop_samples_the_distribution(eta):
    """float32, three tokens of four with embeddings of size 2. Control: the mean of independent tokens."""
    embedded = Embedded(Joint.random(4, 3), PLANE)
    sampler = DDIM(embedded.process, Sqrt(), 48, eta)
    p = embedded.joint.p.ravel()
    assert p_value(draw_free(embedded, embedded.mean(), sampler, 4000), p) > 1e-3
    independent = Embedded(embedded.joint.independent(), PLANE)
    assert p_value(draw_free(embedded, independent.mean(), sampler, 4000), p) < 1e-6


def test_uneven_prompts_get_their_conditional_distributions():
    """Rows with different positions given, in one batch. Control: a mean not conditioned on what is given."""
    embedded = Embedded(MarkovChain.random().joint(3), LINE)
    tokens = np.array([[0, 2, 0], [1, 0, 1], [2, 2, 2]])
    free = np.array([[True, False, True], [False, True, False], [False, True, True]])
    rows = np.tile(np.arange(3), 2000)
    sampler = DDIM(embedded.process, Sqrt(), 64)
    drawn, unaware = (
        np.asarray(draw(embedded, embedded.mean(known), sampler, tokens[rows], free[rows]))
        for known in (jnp.asarray(~free[rows]), False)
    )
    assert np.array_equal(drawn[~free[rows]], tokens[rows][~free[rows]])
    p = [
        [p_value(index(x[rows == row], 3), embedded.joint.conditional(tokens[row], free[row])) for row in range(3)]
        for x in (drawn, unaware)
    ]
    assert min(p[0]) > 1e-3 and min(p[1]) < 1e-6


def test_samples_of_a_row_are_the_same_in_any_batch(exact):
    """By its global index. Control: the index within the batch gives others."""
    sampler, mean = DDIM(exact.process, Sqrt(), 8), exact.mean()
    tokens, free = np.zeros((64, 2), int), np.ones((64, 2), bool)
    batch = draw(exact, mean, sampler, tokens, free)
    half = slice(32, 64)
    assert np.array_equal(draw(exact, mean, sampler, tokens[half], free[half], np.arange(32, 64)), batch[half])
    assert not np.array_equal(draw(exact, mean, sampler, tokens[half], free[half]), batch[half])


def test_samplers_are_for_their_process():
    """Each names it."""
    with pytest.raises(ValueError, match="Gaussian noise of latents"):
        DDIM(Absorbing(5), Sqrt(), 4)
    with pytest.raises(ValueError, match="jump processes of tokens"):
        Tweedie(Gaussian(2), Sqrt(), 4)
    with pytest.raises(ValueError, match="GradientSteps moves latents: it needs Gaussian noise"):
        Corrected(Tweedie(Absorbing(5), Sqrt(), 4), GradientSteps(lambda z, sigma: z))
    with pytest.raises(ValueError, match="eta"):
        DDIM(Gaussian(2), Sqrt(), 4, eta=1.5)
    with pytest.raises(ValueError, match="at least one step"):
        Renoised(Gaussian(2), Sqrt(), 0)
