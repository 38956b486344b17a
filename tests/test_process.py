"""The closed forms of both processes against their definitions: matrix exponentials, enumerated ratios, dense sums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.special
from oracle import channel, index, p_value, states

from sedd.diffusion import keyed_random
from sedd.diffusion.discrete.process import Absorbing, Uniform
from sedd.diffusion.discrete.score import score_stats

SIGMAS = [1e-4, 1e-2, 0.3, 1.0, 5.0, 20.0]


def evaluable(process, x):
    """True where a Denoiser's output is specified: at masks (Absorbing), or everywhere (Uniform)."""
    return x == process.mask_id if isinstance(process, Absorbing) else np.ones(x.shape, bool)


@pytest.mark.smoke
def test_forward_distribution_is_the_matrix_exponential(process, float64):
    """SEDD's Q has columns that sum to 0; the closed forms are exp(sigma Q), entry by entry."""
    x, x0 = np.arange(process.num_states)[:, None], np.arange(process.vocab_size)
    rate = process.rate_matrix()
    np.testing.assert_allclose(rate.sum(0), 0.0, atol=1e-15)
    np.testing.assert_allclose(rate @ process.stationary(), 0.0, atol=1e-15)
    for sigma in SIGMAS:
        np.testing.assert_allclose(process.transition_matrix(sigma), scipy.linalg.expm(sigma * rate), atol=1e-12)
        exact = channel(process, sigma).T
        np.testing.assert_allclose(np.exp(process.log_transition(x, x0, sigma)), exact, atol=1e-12)


def test_corrupt_and_prior_sample_the_forward_distribution(process):
    """With a different noise at each position, as `sigma` broadcasts. Control: noise a twentieth off."""
    x0, sigma, rows = np.array([2, 0, 1]), np.array([0.2, 0.7, 1.5]), 100_000
    keys = keyed_random.row_keys(jax.random.key(0), jnp.arange(rows))

    def p(x, sigma):
        exact = functools.reduce(np.kron, [channel(process, s)[v] for s, v in zip(sigma, x0, strict=True)])
        return p_value(index(x, process.num_states), exact)

    x = jax.jit(process.corrupt)(keys, jnp.tile(x0, (rows, 1)), sigma)
    prior = jax.jit(process.prior, static_argnums=1)(keys, 3)
    assert x.dtype == prior.dtype == jnp.int32
    assert p(x, sigma) > 1e-3 and p(prior, 3 * [40.0]) > 1e-3
    assert p(x, 1.05 * sigma) < 1e-6 and p(prior, 3 * [4.0]) < 1e-6


@pytest.mark.smoke
def test_equal_logits_are_the_score_of_the_uniform_distribution(process, float64):
    """At every noise level, where a token can move. Logits are shifts of log scores, but for the current token's 0."""
    x, v = np.arange(process.num_states), process.vocab_size
    movable = np.asarray(process.movable(x))
    uniform = np.full((len(x), v), -np.log(v))
    for sigma in np.array(SIGMAS):
        score = process.score_from_logits(np.zeros((len(x), process.num_states)), x, np.full(len(x), sigma))
        expected = process.log_score(uniform, uniform[:, 0], sigma)
        np.testing.assert_allclose(score[movable, :v], expected[movable], atol=1e-12)
        logits = np.arange(process.num_states) / 7 + np.zeros_like(score)
        shifted = process.score_from_logits(logits, x, np.full(len(x), sigma))
        np.testing.assert_array_equal(shifted[x, x], 0.0)
        np.testing.assert_allclose(shifted - score, np.where(np.eye(len(x)), 0.0, logits), atol=1e-12)


@pytest.mark.smoke
def test_scores_are_ratios_of_the_noisy_distribution(process, joint, float64):
    """log_score of the exact r, log m, the reverse rates, r from the score: a wrong constant gives errors of O(1)."""
    x, denoiser = states(process.num_states, 3), joint.denoiser(process)
    specified, current = evaluable(process, x), np.eye(process.num_states, dtype=bool)[x][..., :3]

    @jax.jit
    def forms(sigma):
        log_clean = denoiser(x, jnp.full(len(x), sigma))
        here = jnp.take_along_axis(log_clean, jnp.minimum(x, 2)[..., None], axis=-1)[..., 0]
        log_score = process.log_score(log_clean, here, sigma)
        back = process.clean_from_score(log_score, sigma) - log_clean
        return log_score, process.log_noised(log_clean, sigma), process.reverse_rate(log_clean, x, sigma), back

    for sigma in SIGMAS[:-1]:
        score = joint.score(process, sigma)
        log_score, log_noised, rate, back = map(np.asarray, forms(sigma))
        np.testing.assert_allclose(log_score[specified], np.log(score[..., :3])[specified], atol=1e-10)
        np.testing.assert_allclose(np.exp(log_noised), score / score.sum(-1, keepdims=True), atol=1e-12)
        exact = np.where(current, 0.0, process.stationary()[x][..., None] * score[..., :3])
        np.testing.assert_allclose(rate, exact, rtol=1e-10)
        np.testing.assert_allclose(back[specified], 0.0, atol=1e-10)


@pytest.mark.smoke
def test_tweedie_is_the_mixture_of_posteriors(process, joint, float64):
    """p(y | x) = sum_v p(x0_i = v | x) q(y | v) q(x_i | y) / q(x_i | v), the posterior of x0_i by enumeration."""
    x = states(process.num_states, 3)
    for sigma, sigma_next in [(5.0, 1.0), (1.0, 0.99), (0.5, 1e-3), (0.1, 0.0)]:
        first, both = channel(process, sigma_next), channel(process, sigma)  # q(y | v) and q(x | v), in row v
        step = np.asarray(process.transition_matrix(sigma - sigma_next))  # q(x | y), in row x
        posterior = joint.posterior(process, sigma)
        ratio = np.where(both.T[x] > 0, posterior / np.maximum(both.T[x], 1e-300), 0.0)
        exact = np.einsum("xiv,vy,xiy->xiy", ratio, first, step[x])
        log_clean = joint.denoiser(process)(x, jnp.full(len(x), sigma), None)
        p_move, log_dest = jax.jit(process.tweedie)(log_clean, x, sigma, sigma_next)
        stays = np.eye(process.num_states)[x]
        moves = p_move[..., None] * scipy.special.softmax(log_dest, axis=-1)
        moves = np.pad(moves, [(0, 0), (0, 0), (0, process.num_states - 3)])
        np.testing.assert_allclose((1 - p_move)[..., None] * stays + moves, exact, atol=1e-12)


@pytest.fixture(scope="module")
def many_tokens():
    """The process, log r and x at 50257 tokens in float32: x the likeliest token, some token, the least likely one."""
    log_r = jax.nn.log_softmax(4 * jax.random.normal(jax.random.key(0), (3, 50257)))
    return Uniform(50257), log_r, jnp.array([int(jnp.argmax(log_r[0])), 7, int(jnp.argmin(log_r[2]))])


def test_uniform_tweedie_is_accurate_in_float32(many_tokens):
    """A ratio computed as 1 - (something near 1), at low noise or at high, would be wrong by a percent or more."""
    process, log_r, x = many_tokens
    tweedie = jax.jit(process.tweedie)
    steps = [(1e-4, 0.0), (1e-3, 1e-4), (0.1, 0.05), (1.0, 0.9), (7.0, 3.0), (20.0, 12.0), (20.0, 0.0)]
    for step in np.float32(steps):
        jump = tweedie(log_r, x, *step)
        with jax.enable_x64(True):
            exact = jax.tree.map(np.asarray, tweedie(jnp.asarray(log_r, jnp.float64), x, *np.float64(step)))
        assert jump.p_move.dtype == jump.log_dest.dtype == jnp.float32
        np.testing.assert_allclose(jump.p_move, exact.p_move, rtol=1e-5)
        dest, exact_dest = (scipy.special.softmax(np.asarray(jump.log_dest), axis=-1) for jump in (jump, exact))
        assert np.abs(dest - exact_dest).sum(-1).max() / 2 < 1e-6


def test_uniform_scores_are_accurate_in_float32(many_tokens):
    """At high noise all scores are near 1. Control: the plain difference of two log m is inaccurate there."""
    process, log_r, x = many_tokens
    here = jnp.take_along_axis(log_r, x[:, None], -1)[:, 0]
    for sigma in np.float32([1e-4, 0.1, 1.0, 7.0, 12.0, 20.0]):
        with jax.enable_x64(True):
            m = np.exp(process.log_noised(jnp.asarray(log_r, jnp.float64), np.float64(sigma)))
        exact = np.log1p((m - m[[0, 1, 2], x][:, None]) / m[[0, 1, 2], x][:, None])
        log_score = process.log_score(log_r, here, sigma)
        plain = process.log_noised(log_r, sigma) - process.log_noised(log_r, sigma)[[0, 1, 2], x][:, None]
        errors = [np.abs(value - exact).max() / np.abs(exact).max() for value in (np.float64(log_score), plain)]
        assert log_score.dtype == jnp.float32 and errors[0] < 1e-5
        back = process.clean_from_score(log_score, sigma)
        assert np.abs(np.exp(back) - np.exp(log_r)).sum(-1).max() / 2 < (1e-6 if sigma < 1e-3 else 1e-3)
    assert errors[1] > 1e-3  # at the last noise, the highest


def dense_score_entropy(process, log_score, x, x0, sigma):
    """SEDD's definition: sum_{y != x} Q(x, y) (s_y - rho_y log s_y + K(rho_y)), rho_y = q(y | x0) / q(x | x0)."""
    q = channel(process, sigma)[x0]
    here = np.take_along_axis(q, x[..., None], -1)
    rho = q / np.where(here > 0, here, 1.0)
    terms = np.exp(log_score) - rho * log_score + scipy.special.xlogy(rho, rho) - rho
    rates = process.stationary()[x][..., None]  # Q(x, y) = pi_x off the diagonal
    return np.sum(np.where(np.arange(process.num_states) != x[..., None], rates * terms, 0.0), axis=-1)


@pytest.mark.parametrize("columns", ["clean", "all"])
@pytest.mark.smoke
def test_three_statistics_determine_the_score_entropy(process, columns, float64):
    """For any unnormalised score, at x0 and off it; for the absorbing process with a mask column and without."""
    x, x0 = (np.tile(v.ravel(), (20, 1)) for v in np.meshgrid(np.arange(process.num_states), np.arange(3)))
    log_score = np.random.default_rng(0).normal(size=(*x.shape, process.num_states))
    stats = jax.jit(score_stats)(log_score[..., :3] if columns == "clean" else log_score, x, x0)
    score_entropy = jax.jit(process.score_entropy)
    for sigma in SIGMAS[:-1]:
        exact = dense_score_entropy(process, log_score, x, x0, sigma)
        np.testing.assert_allclose(score_entropy(stats, x, x0, sigma), exact, rtol=1e-10)


def naive_uniform_score_entropy(log_score, x, x0, sigma):
    """The control: the true ratio as one minus something near one, and the three terms computed separately."""
    V = log_score.shape[-1]
    ratio = 1 - V / (jnp.exp(sigma) - 1 + V)
    at_x0 = jnp.take_along_axis(log_score, x0[..., None], -1)[..., 0]
    mean = jnp.sum(log_score, -1) / V
    cross = jnp.where(x == x0, ratio * mean, at_x0 / (jnp.exp(sigma) - 1) + mean)
    off = ((-jnp.log(ratio) - 1) / ratio - (V - 2)) / V
    constant = jnp.where(x == x0, (V - 1) / V * ratio * (jnp.log(ratio) - 1), off)
    return jnp.mean(jnp.exp(log_score), -1) - 1 / V - cross + constant


@pytest.mark.parametrize("vocab_size", [27, 30522, 50257])
def test_uniform_score_entropy_is_accurate_in_float32(vocab_size):
    """For scores off by a tenth or more, value and gradient are accurate at every noise. Control: the naive form."""
    process, rng = Uniform(vocab_size), np.random.default_rng(0)
    x, x0 = np.array([1, 1, 1, 1]), np.array([1, 2, 1, 2])  # at x0, and off it
    others = np.arange(vocab_size) != x[:, None]
    away = rng.uniform(0.1, 1.0, others.shape) * rng.choice([-1, 1], others.shape)
    away[:2], errors = 0.1, []

    def form(log_score, sigma):
        return process.score_entropy(score_stats(log_score, x, x0), x, x0, sigma)

    entropy, gradient = jax.jit(form), jax.jit(jax.grad(lambda log_score, sigma: form(log_score, sigma).sum()))
    naive = jax.jit(lambda log_score, sigma: naive_uniform_score_entropy(log_score, x, x0, sigma))
    for sigma in np.geomspace(1e-6, 20, 12, dtype=np.float32):
        log_rho = np.log1p(vocab_size / np.expm1(np.float64(sigma))) * (np.arange(vocab_size) == x0[:, None])
        log_rho -= log_rho[:, x[:1]]
        log_score = np.where(others, log_rho + away, 0.0).astype(np.float32)
        rho, error = np.exp(log_rho) * others / vocab_size, log_score - log_rho  # in float64
        exact, slope = np.sum(rho * (np.expm1(error) - error), -1), rho * np.expm1(error)
        relative = [np.max(np.abs(np.float64(f(log_score, sigma)) / exact - 1)) for f in (entropy, naive)]
        errors.append([*relative, np.max(np.abs(gradient(log_score, sigma) - slope).sum(-1) / np.abs(slope).sum(-1))])
    ours, naives, gradients = np.max(errors, axis=0)
    assert ours < 1e-3 and gradients < 1e-3
    assert not naives < 1e-3


def test_tightening_never_increases_the_score_entropy(process, float64):
    """For any unnormalised score, at every x and x0, from low noise to high. For Absorbing the decrease is known.

    Control for Uniform: the score rebuilt from `clean_from_score` can have a larger entropy.
    """
    current = [process.mask_id] if isinstance(process, Absorbing) else np.arange(3)
    x, x0 = (v.reshape(1, -1) for v in np.meshgrid(current, np.arange(3)))
    rng, rows = np.random.default_rng(0), (10_000, 1, 1)
    raw = rng.normal(size=rows) + rng.exponential(4, rows) * rng.normal(size=(*rows[:2], 3))
    raw, ratios = np.where(np.arange(3) == x[..., None], 0.0, raw), []  # Float[N x V]

    @jax.jit
    def forms(sigma):
        log_clean = process.clean_from_score(raw, sigma)
        here = jnp.take_along_axis(log_clean, jnp.minimum(x, 2)[..., None], axis=-1)[..., 0]
        rebuilt = process.log_score(log_clean, here, sigma)
        scores = (raw, process.tightened(raw, sigma), rebuilt)
        entropies = [process.score_entropy(score_stats(score, x, x0), x, x0, sigma) for score in scores]
        return *entropies, scores[1], jnp.abs(process.tightened(rebuilt, sigma) - rebuilt).max()

    for sigma in np.geomspace(1e-4, 12, 8):
        before, after, of_rebuilt, tight, changed = map(np.asarray, forms(sigma))
        assert np.all(after <= before * (1 + 1e-9)) and np.any(after < 0.9 * before)
        assert changed < 1e-9  # the score of a distribution is left unchanged
        if isinstance(process, Absorbing):
            log_z = np.log(np.expm1(sigma)) + scipy.special.logsumexp(raw, axis=-1)
            decrease = (np.expm1(log_z) - log_z) / np.expm1(sigma)
            assert np.all(np.abs(before - after - decrease) <= 1e-10 * before)
        else:
            limit = np.log1p(3 / np.expm1(sigma))  # q(x | x) / q(y | x)
            np.testing.assert_allclose(tight, np.clip(raw, -limit, limit), rtol=1e-10)
        ratios.append(np.max(of_rebuilt / before))
    assert (max(ratios) > 1.5) == isinstance(process, Uniform)


def test_tightened_scores_are_accurate_in_float32(process):
    """With 50257 tokens, from low noise to high. Control: e^sigma - 1 computed literally."""
    process, x, x0 = type(process)(50257), np.array([3, 7]), np.array([7, 7])
    x = np.full(2, process.mask_id) if isinstance(process, Absorbing) else x
    raw = 4 * jax.random.normal(jax.random.key(0), (2, 50257)).at[1, 7].set(0.0) - 5
    tightened, errors = jax.jit(process.tightened), []

    @jax.jit
    def entropy(log_score, sigma):
        return process.score_entropy(score_stats(log_score, x, x0), x, x0, sigma)

    for sigma in np.geomspace(1e-4, 20, 8, dtype=np.float32):
        tight = tightened(raw, sigma)
        with jax.enable_x64(True):
            exact = np.asarray(tightened(jnp.asarray(raw, jnp.float64), np.float64(sigma)))
        naive = np.log(np.exp(sigma) - np.float32(1))
        errors.append([np.abs(tight - exact).max(), abs(naive - np.log(np.expm1(np.float64(sigma))))])
        assert tight.dtype == jnp.float32 and np.all(entropy(tight, sigma) <= entropy(raw, sigma) * (1 + 1e-5))
    ours, naives = np.max(errors, axis=0)
    assert ours < 1e-5 and naives > 1e-4
