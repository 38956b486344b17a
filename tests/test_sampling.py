"""The loop over states with memory that are not tokens: a Gaussian sampler over noisy embeddings, defined here."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import states

from sedd.diffusion import keyed_random
from sedd.diffusion.denoiser import Latent
from sedd.diffusion.sampling import Corrected, Corrector, Grid, advance, begin, sample
from sedd.diffusion.schedule import Geometric, LogLinear

TABLE = np.array([[1.2, -0.5], [-0.7, -1.0], [0.1, 1.3]], np.float32)  # the embeddings of three tokens
WORDS = TABLE[states(3, 3)]  # Float[27 L D], the clean latents of every sequence of three tokens
FREE = np.array([[True, False, True], [True, True, True], [False, False, False]])


def normal(keys, shape):
    keys = keyed_random.position_keys(keys, jnp.arange(shape[0]))
    return jax.vmap(jax.vmap(lambda key: jax.random.normal(key, shape[1:])))(keys)


def denoised(keys, mean, x, sigma, sigma_next, eta=1.0):
    """A step from sigma to sigma_next: DDPM's posterior for eta 1, DDIM for eta 0."""
    estimate = mean(x, jnp.full(len(x.z), sigma))
    noise, noise_next, kept = -jnp.expm1(-sigma), -jnp.expm1(-sigma_next), jnp.exp(sigma_next - sigma)
    along = noise_next * (1 - eta**2 + eta**2 * kept * noise_next / noise)
    direction = (x.z - jnp.exp(-sigma / 2) * estimate) / jnp.sqrt(noise)
    std = eta * jnp.sqrt(noise_next * -jnp.expm1(sigma_next - sigma) / noise)
    z = jnp.exp(-sigma_next / 2) * estimate + jnp.sqrt(along) * direction + std * normal(keys, x.z.shape[1:])
    return Latent(z, estimate)


@dataclasses.dataclass(frozen=True)
class Gaussian(Grid):
    """Samples latents; the state's memory is the last estimate."""

    eta: float = 1.0

    def start(self, keys, given):
        z = normal(keys, given.shape[1:])
        return Latent(z, jnp.zeros_like(z))

    def step(self, keys, mean, x, entry):
        return denoised(keys, mean, x, entry.sigma, entry.sigma_next, self.eta)


class Renoise(Corrector):
    """Adds as much noise again, then takes the posterior's step back."""

    def correct(self, process, keys, mean, x, sigma, entry):
        added = normal(keyed_random.fold(keys, 0), x.z.shape[1:])
        z = jnp.exp(-sigma / 2) * x.z + jnp.sqrt(-jnp.expm1(-sigma)) * added
        return denoised(keyed_random.fold(keys, 1), mean, x._replace(z=z), 2 * sigma, sigma)


def sampler(steps, eta=1.0):
    return Gaussian(None, LogLinear(), steps, eta)


def exact_mean(joint):
    """The MeanDenoiser of the distribution, by enumeration of its sequences."""
    log_p = jnp.log(joint.p.ravel()).astype(jnp.float32)

    def mean(x, sigma):
        sigma = sigma[:, None]
        square = jnp.sum((x.z[:, None] - jnp.exp(-sigma / 2)[..., None, None] * WORDS) ** 2, axis=(-2, -1))
        weights = jax.nn.softmax(log_p + square / (2 * jnp.expm1(-sigma)), axis=-1)
        return jnp.einsum("bw,wld->bld", weights, WORDS)

    return mean


def nearest(x):
    """The tokens that a state shows. Latent -> Int32[B L]."""
    return jnp.argmin(jnp.sum((x.estimate[..., None, :] - TABLE) ** 2, axis=-1), axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("mean", "sampler"))
def run(mean, sampler, given, free, rows=None):
    task, progress = begin(jax.random.key(0), sampler, given, free, rows)
    return advance(task, progress, mean, sampler).x


def error(joint, mean, sampler, count=10_000):
    """The largest difference of the first two moments of samples from those of the distribution."""
    z = run(mean, sampler, jnp.zeros((count, 3, 2)), jnp.ones((count, 3), bool)).z

    def moments(z, weights):
        flat = np.asarray(z, np.float64).reshape(len(z), -1)
        return np.append(weights @ flat, flat.T @ (weights[:, None] * flat))

    return np.abs(moments(z, np.full(count, 1 / count)) - moments(WORDS, joint.p.ravel())).max()


@pytest.mark.parametrize("eta", [1.0, 0.0])
def test_latents_converge_to_the_moments_of_their_distribution(joint, eta):
    """Means and covariances of all positions. Control: with the mean of independent tokens the covariances differ."""
    few, many = (error(joint, exact_mean(joint), sampler(steps, eta)) for steps in (4, 32))
    assert few > 5 * many and many < 0.03
    assert error(joint, exact_mean(joint.independent()), sampler(8, eta)) > 0.1


def test_a_corrector_of_latents_reduces_the_error_of_a_grid(joint):
    """Control: a corrector that adds no noise takes the latents off their noise level."""

    class NoNoise(Renoise):
        def correct(self, process, keys, mean, x, sigma, entry):
            return denoised(keys, mean, x, 2 * sigma, sigma)

    grid, mean = Gaussian(None, Geometric(0.02, 8.0), 4), exact_mean(joint)
    alone = error(joint, mean, grid)
    assert (
        error(joint, mean, Corrected(grid, Renoise(), 2))
        < 0.75 * alone
        < error(joint, mean, Corrected(grid, NoNoise(), 2))
    )


def test_given_latents_are_clean_in_every_call_and_in_the_state():
    """Their memory too, whatever the sampler's state. Control: free positions have other values."""

    class IgnoresState(Gaussian):
        def step(self, keys, mean, x, entry):
            return Latent(mean(jax.tree.map(jnp.zeros_like, x), jnp.zeros(len(x.z))), x.estimate)

    def echo(x, sigma):  # the sum of all latents and of all memory, at every position
        return jnp.broadcast_to(jnp.sum(x.z + x.estimate, axis=1, keepdims=True), x.z.shape)

    given = WORDS[[5, 7, 11]]
    x = run(echo, IgnoresState(None, LogLinear(), 2), given, FREE)
    due = np.where(FREE[..., None], 2 * np.sum(~FREE[..., None] * given, axis=1, keepdims=True), given)
    np.testing.assert_allclose(x.z, due, rtol=1e-6)
    assert np.array_equal(np.all(x.estimate == given, axis=-1), ~FREE)


def test_memory_goes_from_step_to_step():
    """Also over a pause. Rows without free positions take no steps."""

    def counting(x, sigma):
        return x.estimate + 1

    given = jnp.full((3, 3, 2), 0.5)
    task, start = begin(jax.random.key(0), sampler(7), given, FREE)
    paused = advance(task, start, counting, sampler(7), until=3)
    end = advance(task, paused, counting, sampler(7))
    assert paused.steps == 3 and not paused.done and end.steps == 7 and end.done
    for progress in (paused, end):
        assert np.array_equal(progress.x.estimate, np.where(FREE[..., None], progress.steps, given))
    at_once = run(counting, sampler(7), given, FREE)
    assert all(jax.tree.map(np.array_equal, at_once, end.x))
    assert begin(jax.random.key(0), sampler(7), given, np.zeros_like(FREE))[1].done


def test_a_trace_shows_the_tokens_of_latents(joint):
    """Rounded to the nearest embedding; the last entry is the sample."""
    tokens = states(3, 3)[[5, 7, 11]]
    out = jax.jit(functools.partial(sample, trace=True, shown=nearest), static_argnums=(1, 2))(
        jax.random.key(0), exact_mean(joint), sampler(6), TABLE[tokens], FREE
    )
    assert out.trace.shape == (6, 3, 3) and out.trace.dtype == out.tokens.dtype == jnp.int32
    assert np.all(FREE | (out.trace == tokens)) and np.array_equal(out.trace[-1], out.tokens)
    assert out.calls == 6 and len(np.unique(out.trace[:, 1], axis=0)) > 1


def test_latents_of_a_row_are_the_same_in_any_batch(joint):
    """By its global index, to float32's precision. Control: the index within the batch gives other latents."""
    mean, given, free = exact_mean(joint), np.zeros((8, 3, 2)), np.ones((8, 3), bool)
    batch = run(mean, sampler(6), given, free).z
    np.testing.assert_allclose(run(mean, sampler(6), given[4:], free[4:], np.arange(4, 8)).z, batch[4:], atol=1e-4)
    assert np.all(np.abs(run(mean, sampler(6), given[4:], free[4:]).z - batch[4:]).max((1, 2)) > 0.1)
