"""The training losses average to the bound, and score free tokens only."""

import jax
import jax.numpy as jnp
import numpy as np
from oracle import index, scaled, standard_errors

from sedd.diffusion import keyed_random
from sedd.diffusion.discrete.loss import count_loss, denoising_loss
from sedd.diffusion.discrete.process import Absorbing
from sedd.diffusion.discrete.score import score_stats, stats_from
from sedd.diffusion.schedule import Geometric, LogLinear

ROWS = 30_000


def row_keys(rows):
    return keyed_random.row_keys(jax.random.key(0), jnp.arange(rows))


def stats_of(log_score):
    """The StatsFn that returns the statistics of a table of scores."""
    return lambda x, sigma, x0: score_stats(log_score, x, x0)


def test_denoising_loss_averages_to_the_integral(process, joint):
    """The integral of the score entropy over the noise, over uniform times. Control: scores that are half too large."""
    x0, keys, schedule = joint.draw(ROWS), row_keys(ROWS), LogLinear(0.01)
    t = keyed_random.uniform(keyed_random.fold(keys, 1))
    stats_fn = stats_from(process, joint.denoiser(process))
    with jax.enable_x64(True):
        integral = joint.integral(process, stats_fn, 1e-9, float(schedule.sigma(1.0)))

    @jax.jit
    def loss(factor):
        return denoising_loss(process, schedule, scaled(process, stats_fn, factor), keys, x0, t).sum(-1)

    assert abs(standard_errors(loss(1.0) - integral[index(x0, 3)])) < 4
    assert standard_errors(loss(1.5) - integral[index(x0, 3)]) > 4


def test_count_loss_averages_to_the_entropy(joint):
    """The entropy of the free tokens given the others, over uniform counts. Control: scores that are half too large."""
    process, rng = Absorbing(3), np.random.default_rng(0)
    x0, free = joint.draw(ROWS), rng.random((ROWS, 3)) < 0.6
    free |= (np.arange(ROWS)[:, None] % 2 == 0) | ~free.any(-1, keepdims=True)  # in half of the rows all are free
    k, keys = rng.integers(1, free.sum(-1) + 1), row_keys(ROWS)
    stats_fn = stats_from(process, joint.denoiser(process))

    @jax.jit
    def loss(factor):
        return count_loss(process, scaled(process, stats_fn, factor), keys, x0, k, jnp.asarray(free))

    assert np.array_equal((loss(1.0) > 0).sum(-1), k) and np.all(free | (loss(1.0) == 0))
    assert abs(standard_errors(loss(1.0).sum(-1) - joint.nll(x0, free))) < 4
    assert standard_errors(loss(1.5).sum(-1) - joint.nll(x0, free)) > 4


def test_antithetic_pairs_mask_every_free_token_and_one_twice():
    """Two rows of one key, with k and n + 1 - k masks. Control: without `mirrored` some token is masked in neither."""
    free = np.random.default_rng(0).random((400, 9)) < 0.7
    free[:, 0] |= ~free.any(-1)
    n = free.sum(-1)
    k = np.random.default_rng(1).integers(1, n + 1)
    keys, x0 = row_keys(400), np.zeros((400, 9), int)

    @jax.jit
    def masks(k, mirrored):
        stats_fn = stats_of(jnp.zeros((400, 9, 3)))
        return count_loss(Absorbing(3), stats_fn, keys, x0, k, jnp.asarray(free), mirrored=mirrored) > 0

    first, mirror = masks(k, np.zeros(400, bool)), np.asarray(masks(n + 1 - k, np.ones(400, bool)))
    both = np.add(first, mirror, dtype=int)
    assert np.array_equal(mirror.sum(-1), n + 1 - k) and np.array_equal(both > 0, free)
    assert np.array_equal((both == 2).sum(-1), np.ones(400))
    assert np.any(free & ~(first | masks(n + 1 - k, np.zeros(400, bool))))


def test_given_tokens_are_seen_clean_and_not_scored(process):
    """Otherwise the network would train on corrupted given tokens, or be rewarded for tokens that it sees."""
    x0, free = np.tile([[0, 1, 2, 1]], (64, 1)), np.arange(64)[:, None] % 4 != np.arange(4)

    @jax.jit
    def loss_and_input():
        inputs = []

        def stats_fn(x, sigma, x0):
            inputs.append(x)
            return score_stats(jnp.zeros((*x.shape, 3)), x, x0)

        t = jnp.full(64, 0.95)
        return denoising_loss(process, Geometric(), stats_fn, row_keys(64), x0, t, jnp.asarray(free)), inputs[0]

    loss, x = map(np.asarray, loss_and_input())
    assert np.array_equal(x[~free], x0[~free]) and np.any(x[free] != x0[free])
    assert np.all(loss[~free] == 0) and np.all(np.isfinite(loss)) and np.any(loss[free] > 0)


def test_loss_and_gradient_are_finite_at_the_ends_of_time(process):
    """A uniform time in float32 is exactly 0 once in eight million: such a row must not give NaN."""
    x0, t = np.tile([0, 1, 2], (3, 1)), jnp.array([0.0, 2.0**-23, 1.0])

    def loss(log_score):
        return denoising_loss(process, LogLinear(), stats_of(log_score), row_keys(3), x0, t).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.full((3, 3, 3), 0.1))
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_a_row_without_free_positions_has_loss_zero():
    """Neither the loss nor its gradient is NaN, for any count of such a row."""
    x0, k, free = np.tile([0, 1, 2], (3, 1)), np.array([1, 0, 1]), np.array([[True], [False], [False]]).repeat(3, 1)

    def loss(log_score):
        loss = count_loss(Absorbing(3), stats_of(log_score), row_keys(3), x0, k, jnp.asarray(free))
        return loss.sum(), loss

    gradient, value = jax.jit(jax.grad(loss, has_aux=True))(jnp.zeros((3, 3, 3)))
    assert np.all(value[1:] == 0) and np.all(np.isfinite(gradient))
    assert np.any(gradient[0] != 0) and np.all(gradient[1:] == 0)
