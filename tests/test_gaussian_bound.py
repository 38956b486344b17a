"""The bound of Gaussian diffusion: equal to -log p(w) for the exact denoiser, for each w; above it for others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from latent_oracle import LINE, PLANE, Embedded, Encoded, density, grid
from oracle import Joint, MarkovChain, index, standard_errors

from sedd.diffusion.denoiser import Latent
from sedd.diffusion.gaussian.likelihood import LatentBound, noise_at
from sedd.diffusion.gaussian.loss import cross_entropy_loss, denoising_loss, statistics, stats_from
from sedd.diffusion.keyed_random import row_keys
from sedd.diffusion.schedule import LogSNR, Sqrt

LOW, HIGH = 0.2, 9.0  # at less noise the posterior is sharper than the grid


@pytest.fixture(scope="module")
def exact():
    return Embedded(MarkovChain.random().joint(2), LINE)


@pytest.fixture(scope="module")
def independent(exact):
    """The model of independent tokens with the same marginals, for controls."""
    return Embedded(exact.joint.independent(), LINE)


@functools.partial(jax.jit, static_argnames="model")
def squared_errors(model, sigma):
    """The mean over z of |z0 - E[z0 | z]|^2, summed over positions, for each w. Float[W]."""
    z, area = grid()
    mean = model.mean()(Latent(z[..., None], jnp.zeros_like(z)[..., None]), jnp.full(len(z), sigma))[..., 0]
    square = jnp.sum((model.codes[:, None, :, 0] - mean) ** 2, axis=-1)
    return jnp.sum(density(model, sigma) * square, axis=-1) * area


def diffusion(model, nodes=96):
    """The diffusion term of each w, by quadrature over the levels of the bound. Float[W]."""
    at, weights = np.polynomial.legendre.leggauss(nodes)
    sigma, slope = noise_at(jnp.asarray((at + 1) / 2), LOW, HIGH)
    terms = [model.process.squared_error(squared_errors(model, s), s) for s in sigma]
    return sum(weight / 2 * d * term for weight, d, term in zip(weights, slope, terms, strict=True))


def ends(model):
    """The exact prior term, against the distribution of z at HIGH, and the reconstruction by the joint posterior."""
    _, area = grid()
    p, at_high, at_low = model.joint.p.ravel(), density(model, HIGH), density(model, LOW)
    prior = jnp.sum(at_high * (jnp.log(at_high) - jnp.log(p @ at_high)), axis=-1) * area
    log_posterior = jnp.log(p)[:, None] + jnp.log(at_low + 1e-300) - jnp.log(p @ at_low + 1e-300)
    return prior, -jnp.sum(at_low * log_posterior, axis=-1) * area


def test_the_bound_of_encodings_is_the_likelihood_of_each_text(exact):
    """By quadrature, where the latents of a text depend on all of its tokens: a mixture of Gaussians."""
    with jax.enable_x64(True):
        encoded = Encoded.of(exact.joint, LINE)
        prior, reconstruction = ends(encoded)
        total = prior + diffusion(encoded) + reconstruction
        np.testing.assert_allclose(total, -np.log(exact.joint.p.ravel()), atol=1e-7)


def test_draws_of_the_bound_of_encodings_are_no_less_than_the_likelihood(exact):
    """With an exact decoder of each token by itself, the excess is what the tokens share given the latents at `low`.

    Controls: the denoiser and decoder of independent tokens, and half of the diffusion term, which is no bound.
    """
    encoded = Encoded.of(exact.joint, LINE)
    other = Encoded(exact.joint.independent(), encoded.codes)
    tokens = exact.joint.draw(4000)
    z0 = jnp.asarray(encoded.codes, jnp.float32)[index(tokens, 3)]

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def draws(model, low):
        def stats(x, sigma, z0):
            return statistics(model.mean()(x, sigma), model.log_tokens(x.z, sigma), z0, jnp.asarray(tokens))

        return LatentBound(model.process, low, HIGH).draws(stats, row_keys(jax.random.key(4), jnp.arange(4000)), z0, 8)

    def excess(model, low, share=1.0):
        out = draws(model, low)
        return np.asarray((out.prior + share * out.diffusion + out.reconstruction).mean(0)) - exact.joint.nll(tokens)

    def shared(low):
        z, area = grid()
        of_words, of_tokens = (
            f(z[..., None], jnp.full(len(z), low)) for f in (encoded.log_posterior, encoded.log_tokens)
        )
        apart = of_tokens[:, 0][:, encoded.words[:, 0]] + of_tokens[:, 1][:, encoded.words[:, 1]]
        at_low = density(encoded, low) * exact.joint.p.ravel()[:, None]
        return jnp.sum(at_low * jnp.where(at_low > 0, (of_words - apart).T, 0.0)) * area

    with jax.enable_x64(True):
        due = float(shared(0.4))
    assert due > 0.05 and abs(standard_errors(excess(encoded, 0.4) - due)) < 3
    assert abs(standard_errors(excess(encoded, 0.02))) < 3
    assert standard_errors(excess(other, 0.02)) > 4.5 and standard_errors(excess(encoded, 0.02, 0.5)) < -4.5


def test_the_bound_of_the_exact_denoiser_is_the_likelihood_of_each_text(exact, independent):
    """By quadrature. Control: the denoiser of independent tokens misses by their mutual information on average."""
    with jax.enable_x64(True):
        prior, reconstruction = ends(exact)
        nll = -np.log(exact.joint.p.ravel())
        np.testing.assert_allclose(prior + diffusion(exact) + reconstruction, nll, atol=1e-7)
        # q(z | w) is the same for both models, so their means over w have one measure.
        p = exact.joint.p.ravel()
        prior, reconstruction = ends(independent)
        excess = prior + diffusion(independent) + reconstruction - nll
        mutual_information = np.sum(p * np.log(p / independent.joint.p.ravel()))
        np.testing.assert_allclose(np.sum(p * excess), mutual_information, atol=1e-7)
        assert mutual_information > 0.02


def test_a_bound_of_steps_lies_above_and_converges_at_first_order(exact):
    """On a grid even in log SNR. Control: half the weight is no bound."""
    with jax.enable_x64(True):
        prior, reconstruction = ends(exact)
        p, excess = exact.joint.p.ravel(), []
        for steps in (16, 32, 64):
            sigma = noise_at(jnp.linspace(0.0, 1.0, steps + 1), LOW, HIGH)[0]
            pairs = zip(sigma[1:], sigma[:-1], strict=True)
            total = sum(exact.process.step_divergence(squared_errors(exact, s), s, before) for s, before in pairs)
            excess.append(float(np.sum(p * (prior + total + reconstruction + np.log(p)))))
            assert np.sum(p * (prior + total / 2 + reconstruction + np.log(p))) < 0
        assert excess[-1] > 0.01 and all(1.9 < a / b < 2.5 for a, b in zip(excess, excess[1:], strict=False))


def test_draws_of_the_bound_average_to_its_terms(exact, independent):
    """The jitted path, float32. Control: the draws of another model do not."""
    bound, tokens = LatentBound(exact.process, LOW, HIGH), exact.joint.draw(4000)
    with jax.enable_x64(True):
        due = np.asarray(diffusion(exact))[index(tokens, 3)]
    table = jnp.asarray(LINE, jnp.float32)
    z0 = table[tokens]

    @functools.partial(jax.jit, static_argnums=0)
    def draws(other):
        stats = stats_from(other.denoiser(), table, jnp.asarray(tokens))
        return bound.draws(stats, row_keys(jax.random.key(0), jnp.arange(len(tokens))), z0, 8)

    out, wrong = draws(exact), draws(independent)
    gaps = [np.asarray(d.diffusion.mean(0), np.float64) - due for d in (out, wrong)]
    assert abs(standard_errors(gaps[0])) < 4.5 < standard_errors(gaps[1] - gaps[0])
    prior = np.sum(np.asarray(exact.process.prior_divergence(z0, HIGH)), axis=-1)
    np.testing.assert_allclose(out.prior, np.broadcast_to(prior, out.prior.shape), rtol=1e-5)
    assert np.all(bound.nats(out) == out.prior + out.diffusion + out.reconstruction)
    # The levels cover 1 - alpha once: the widths of M draws add up to it.
    span = np.exp(-LOW) - np.exp(-HIGH)
    assert np.mean(np.asarray(out.width)) == pytest.approx(span, rel=0.01)


def test_given_latents_are_clean_and_not_scored(exact):
    """The bound of one token given the other is its conditional likelihood. Control: a denoiser that is not
    conditioned on which latent is given has a larger one."""
    tokens, free = exact.joint.draw(6000), np.array([True, False])
    table, bound = jnp.asarray(LINE, jnp.float32), LatentBound(exact.process, LOW, HIGH)

    @functools.partial(jax.jit, static_argnums=0)
    def nats(conditioned):
        stats = stats_from(exact.denoiser(~free if conditioned else False), table, jnp.asarray(tokens))
        keys = row_keys(jax.random.key(1), jnp.arange(len(tokens)))
        return bound.nats(bound.draws(stats, keys, table[tokens], 8, jnp.broadcast_to(free, tokens.shape))).mean(0)

    gaps = [np.asarray(nats(conditioned)) - exact.joint.nll(tokens, free) for conditioned in (True, False)]
    assert abs(standard_errors(gaps[0])) < 4.5 < standard_errors(gaps[1] - gaps[0])


def test_losses_average_to_the_bound_and_to_the_cross_entropy(exact, independent):
    """The loss at even times is the diffusion term of its schedule. The cross-entropy is least for the posterior."""
    tokens = exact.joint.draw(8000)
    table, keys = jnp.asarray(LINE, jnp.float32), row_keys(jax.random.key(2), jnp.arange(len(tokens)))
    t = (jnp.arange(len(tokens)) * 0.618) % 1

    @functools.partial(jax.jit, static_argnums=0)
    def losses(model):
        stats = stats_from(model.denoiser(), table, jnp.asarray(tokens))
        bound = denoising_loss(model.process, LogSNR(LOW, HIGH), stats, keys, table[tokens], t)
        entropy = cross_entropy_loss(model.process, stats, keys, table[tokens], Sqrt().sigma(t), jnp.arange(2) == 0)
        return bound.sum(-1), entropy

    bound, entropy = losses(exact)
    with jax.enable_x64(True):
        due = np.asarray(diffusion(exact))[index(tokens, 3)]
    assert abs(standard_errors(np.asarray(bound) - due)) < 4.5
    assert np.all(entropy[:, 1] == 0) and standard_errors((losses(independent)[1] - entropy)[:, 0]) > 4.5


@pytest.mark.slow
def test_the_bound_is_the_same_jitted_and_not(exact):
    """At 16,384 positions, each with its own noise: more than XLA's threshold for merging functions of alpha."""
    model = Embedded(Joint.random(4, 4), PLANE)
    tokens = jnp.asarray(model.joint.draw(4096))
    table = jnp.asarray(model.table, jnp.float32)
    stats = stats_from(model.denoiser(), table, tokens)
    keys = row_keys(jax.random.key(0), jnp.arange(4096))

    def total():
        draws = LatentBound(model.process, 1e-2, HIGH).draws(stats, keys, table[tokens], 1)
        return jnp.stack([jnp.sum(draws.prior), jnp.sum(draws.diffusion), jnp.sum(draws.reconstruction)])

    with jax.disable_jit():
        eager = total()
    np.testing.assert_allclose(jax.jit(total)(), eager, rtol=1e-4)


@pytest.mark.parametrize("low, high", [(0.0, 9.0), (1.0, 0.5), (0.1, np.inf)])
def test_a_bound_needs_noise_at_both_ends(exact, low, high):
    with pytest.raises(ValueError, match="needs 0 < low < high"):
        LatentBound(exact.process, low, high)
