"""Schedules of Gaussian noise, and the closed forms of the Gaussian process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from latent_oracle import PLANE

from sedd.diffusion import keyed_random
from sedd.diffusion.gaussian.process import Gaussian
from sedd.diffusion.schedule import Cosine, Geometric, LinearBeta, LogLinear, LogSNR, Power, Sqrt, Tan, log_snr

SCHEDULES = [Power(), Sqrt(), Tan(), Cosine(), LinearBeta(), LogSNR(), LogLinear(), Geometric(1e-2, 9.0)]
SIGMAS = np.array([1e-3, 0.01, 0.3, 1.0, 4.0, 12.0])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_time_inverts_sigma_and_rate_is_its_derivative(schedule):
    """In float64, and in float32 to its precision."""
    with jax.enable_x64(True):
        t = jnp.linspace(1e-3, 1 - 1e-3, 101)
        np.testing.assert_allclose(schedule.time(schedule.sigma(t)), t, atol=1e-12)
        np.testing.assert_allclose(schedule.rate(t), jax.vmap(jax.grad(schedule.sigma))(t), rtol=1e-9)
        sigma = schedule.sigma(t)
        assert np.all(np.diff(sigma) > 0) and schedule.sigma(1.0) <= 40
    single = schedule.sigma(t.astype(jnp.float32))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, sigma, rtol=2e-4)
    np.testing.assert_allclose(schedule.time(single), t, atol=1e-5)


def test_noise_of_the_published_schedules():
    """power and sqrt: 1 - alpha from low to high. tan: its log SNR is the cosine's less 2 log d. LogSNR: even in it."""
    with jax.enable_x64(True):
        t = jnp.linspace(0.0, 1.0, 11)
        np.testing.assert_allclose(-jnp.expm1(-Sqrt(0.1, 0.9).sigma(t)), np.sqrt(0.01 + 0.8 * t))
        np.testing.assert_allclose((-jnp.expm1(-Power(0.1, 0.9, 3.0).sigma(t))) ** 3, 0.001 + 0.728 * t)
        np.testing.assert_allclose(log_snr(Tan(9.0).sigma(t)), log_snr(Cosine().sigma(t)) - 2 * np.log(9.0))
        np.testing.assert_allclose(Cosine().alpha(t), np.cos(np.pi / 2 * (1e-3 + 0.998 * t)) ** 2)
        ratios = log_snr(LogSNR(0.02, 8.0).sigma(t))
        np.testing.assert_allclose(np.diff(ratios), ratios[1] - ratios[0])
        np.testing.assert_allclose(LogSNR(0.02, 8.0).sigma(t)[jnp.array([0, -1])], [0.02, 8.0])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Sqrt(0.0),
        lambda: Sqrt(0.5, 0.4),
        lambda: Power(power=0.0),
        lambda: Tan(end=0.0),
        lambda: LinearBeta(2, 1),
        lambda: LogSNR(0),
    ],
)
def test_schedules_without_noise_or_order_are_refused(wrong):
    with pytest.raises(ValueError, match="needs"):
        wrong()


@pytest.fixture
def draws():
    """Draws of z from q(z | z0) at two noise levels, 20,000 rows of two positions."""
    z0 = jnp.asarray(PLANE[[1, 2]], jnp.float32)
    keys = keyed_random.row_keys(jax.random.key(0), jnp.arange(20_000))
    sigma = jnp.where(jnp.arange(20_000) % 2, 2.0, 0.1)
    return z0, sigma, Gaussian(2).perturb(keys, jnp.broadcast_to(z0, (20_000, 2, 2)), sigma)


def test_perturbed_latents_have_the_moments_of_the_process(draws):
    """Means, variances and independence of rows, positions and coordinates. Control: moments of another noise level."""
    z0, sigma, z = draws
    for at, other in ((0.1, 2.0), (2.0, 0.1)):
        noisy = np.asarray(z[sigma == at], np.float64)
        scores = [(noisy - np.exp(-s / 2) * z0) / np.sqrt(-np.expm1(-s)) for s in (at, other)]
        p = [scipy.stats.kstest(score.ravel(), "norm").pvalue for score in scores]
        assert p[0] > 1e-3 and p[1] < 1e-12
        corr = np.corrcoef(scores[0].reshape(len(noisy), -1).T) - np.eye(4)
        assert np.abs(corr).max() < 4.5 / np.sqrt(len(noisy))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_posterior_step_keeps_the_marginal(eta):
    """From q(z | z0) at sigma to q(z | z0) at sigma_next, for every eta: mean and variance of the linear map."""
    with jax.enable_x64(True):
        process, sigma, sigma_next = Gaussian(1), jnp.array(1.3), jnp.array(0.2)
        z0 = jnp.array([0.7])

        def mean(z):
            return process.posterior(z0, z, sigma, sigma_next, eta)[0]

        slope, std = jax.jacobian(mean)(z0)[0, 0], process.posterior(z0, z0, sigma, sigma_next, eta)[1][0]
        np.testing.assert_allclose(mean(jnp.exp(-sigma / 2) * z0), jnp.exp(-sigma_next / 2) * z0)
        np.testing.assert_allclose(slope**2 * -jnp.expm1(-sigma) + std**2, -jnp.expm1(-sigma_next))
        assert (std == 0) == (eta == 0)


def test_the_ancestral_step_is_bayes_posterior():
    """Conditions the joint Gaussian of (z_next, z) given z0 on z."""
    with jax.enable_x64(True):
        sigma, sigma_next, z0, z = 1.3, 0.2, 0.7, -0.4
        kept = np.exp(sigma_next - sigma)
        var_next, var = -np.expm1(-sigma_next), -np.expm1(-sigma)
        gain = np.sqrt(kept) * var_next / var
        due = np.exp(-sigma_next / 2) * z0 + gain * (z - np.exp(-sigma / 2) * z0), np.sqrt(var_next - gain**2 * var)
        got = Gaussian(1).posterior(*(jnp.array([value]) for value in (z0, z)), jnp.array(sigma), jnp.array(sigma_next))
        np.testing.assert_allclose([leaf[0] for leaf in got], due)


def test_the_last_step_ends_at_the_mean():
    """At any noise, without noise of its own; from alpha = 0 it is finite."""
    z0, z = jnp.array([0.5, -0.2]), jnp.array([3.0, 1.0])
    for sigma in (0.01, 1.0, 40.0, 200.0):
        mean, std = Gaussian(2).posterior(z0, z, jnp.float32(sigma), jnp.float32(0))
        assert np.array_equal(mean, z0) and std == 0


def test_divergences_are_those_of_the_distributions():
    """Of the prior and of one step, against the KL divergence of Gaussians; the step's limit is the integrand."""
    with jax.enable_x64(True):
        process, z0, other = Gaussian(2), jnp.array([0.7, -1.1]), jnp.array([0.2, 0.3])

        def kl(mean, var, mean_2, var_2):
            return np.sum((mean - mean_2) ** 2 / var_2 + var / var_2 - 1 - np.log(var / var_2)) / 2

        for sigma in SIGMAS:
            due = kl(np.exp(-sigma / 2) * z0, -np.expm1(-sigma) * np.ones(2), 0.0, 1.0)
            np.testing.assert_allclose(process.prior_divergence(z0, sigma), due, rtol=1e-6)
        error = jnp.sum((z0 - other) ** 2)
        sigma, sigma_next = jnp.array(1.3), jnp.array(0.2)
        steps = [process.posterior(mean, z0, sigma, sigma_next) for mean in (z0, other)]
        due = kl(steps[0][0], steps[0][1] ** 2, steps[1][0], steps[1][1] ** 2)
        np.testing.assert_allclose(process.step_divergence(error, sigma, sigma_next), due)
        small = process.step_divergence(error, sigma, sigma - 1e-6) / 1e-6
        np.testing.assert_allclose(process.squared_error(error, sigma), small, rtol=1e-4)


def test_the_score_is_the_gradient_of_the_log_density():
    """Of a mixture of two points; Tweedie's formula for the mean."""
    with jax.enable_x64(True):
        process, table, sigma = Gaussian(2), jnp.asarray(PLANE[:2]), jnp.array(0.8)

        def log_density(z):
            return jax.nn.logsumexp(-jnp.sum((z - jnp.exp(-sigma / 2) * table) ** 2, -1) / (2 * -jnp.expm1(-sigma)))

        z = jnp.array([0.3, -0.5])
        mean = jax.nn.softmax(process.log_evidence(z, table, sigma)) @ table
        np.testing.assert_allclose(process.score(mean, z, sigma), jax.grad(log_density)(z))


def test_the_evidence_is_the_log_density_up_to_a_constant():
    with jax.enable_x64(True):
        z, table = jnp.array([[0.3, -0.5], [2.0, 1.0]]), jnp.asarray(PLANE)
        sigma = jnp.array([0.05, 3.0])
        square = jnp.sum((z[:, None] - jnp.exp(-sigma / 2)[:, None, None] * table) ** 2, -1)
        due = -square / (2 * -jnp.expm1(-sigma))[:, None]
        got = Gaussian(2).log_evidence(z, table, sigma)
        np.testing.assert_allclose(got - got[:, :1], due - due[:, :1])


def test_closed_forms_are_accurate_in_float32():
    """Steps of a thousandth of the noise, down to 1e-4. Control: differences of alphas lose all digits there."""
    process, sigma = Gaussian(2), np.logspace(-4, 1.5, 200)
    z0, z = np.array([0.7, -1.1]), np.array([0.1, 0.4])

    def terms(dtype):
        s = jnp.asarray(sigma, dtype)
        last, one = s * jnp.asarray(0.999, dtype), jnp.ones_like(s)
        mean, std = process.posterior(jnp.asarray(z0, dtype), jnp.asarray(z, dtype), s, last)
        kinds = (process.squared_error(one, s), process.step_divergence(one, s, last))
        naive = jnp.sqrt((jnp.exp(-last) - jnp.exp(-s)) * (1 - jnp.exp(-last)))
        return jax.tree.map(np.asarray, ([mean.T, std[:, 0], *kinds], naive))

    single, naive = terms(jnp.float32)
    with jax.enable_x64(True):
        double, exact = terms(jnp.float64)
    for a, b in zip(single[1:], double[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4)
    np.testing.assert_allclose(single[0], double[0], rtol=2e-4, atol=1e-5)
    assert np.abs(naive / exact - 1).max() > 0.01
