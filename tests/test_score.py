"""The statistics of a score, the exact Denoisers of the tests, and the modifications of a Denoiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import MarkovChain, states

from sedd.diffusion.denoiser import clamped, condition_on_mask_ratio, edited, in_block, nucleus, temperature
from sedd.diffusion.discrete.process import Absorbing
from sedd.diffusion.discrete.samplers import leap
from sedd.diffusion.discrete.score import score_stats, stats_from


def test_statistics_of_a_denoiser_are_those_of_the_dense_scores(process, joint, float64):
    """Against the enumerated ratios: a sum that includes y = x or the mask, or a target off by one, differs."""
    x, sigma = states(process.num_states, 3), 0.4
    x0 = np.random.default_rng(0).integers(0, 3, x.shape)
    stats = stats_from(process, joint.denoiser(process))(x, jnp.full(len(x), sigma), x0)
    score = joint.score(process, sigma)[..., :3]
    others = np.arange(3) != x[..., None]
    target = np.where(x == x0, 0.0, np.log(np.take_along_axis(score, x0[..., None], -1)[..., 0]))
    specified = (x == process.mask_id) if isinstance(process, Absorbing) else np.ones(x.shape, bool)
    np.testing.assert_allclose(stats.log_sum[specified], np.log(np.sum(score * others, -1))[specified], atol=1e-12)
    np.testing.assert_allclose(stats.sum_log[specified], np.sum(np.log(score) * others, -1)[specified], atol=1e-12)
    np.testing.assert_allclose(stats.target[specified], target[specified], atol=1e-12)
    ones = score_stats(jnp.ones((*x.shape, 3)), x, x0)
    assert np.array_equal(ones.target, x != x0)  # 0 where x = x0, for any score of the current token


def test_the_chain_agrees_with_enumeration(float64):
    """Two independent computations of the exact Denoiser, at noise 0 and infinity too, and at chosen positions."""
    chain, x = MarkovChain.random(), states(4, 3)
    masked = x == 3
    for sigma in (0.0, 0.7, np.inf):
        at = jnp.full(len(x), sigma)
        exact = chain.joint(3).denoiser(Absorbing(3))(x, at)
        np.testing.assert_allclose(chain.denoiser(x, at)[masked], exact[masked], atol=1e-12)
    positions = np.random.default_rng(0).integers(0, 3, (len(x), 2))
    some = chain.denoiser(x, at, positions)
    np.testing.assert_array_equal(some, np.take_along_axis(chain.denoiser(x, at), positions[..., None], 1))


def test_exact_denoiser_is_a_distribution_at_every_noise_level(process, joint):
    """In float32, at noise 0 and infinity too, and the same at chosen positions as at all."""
    x = states(process.num_states, 3)
    positions = np.random.default_rng(0).integers(0, 3, (len(x), 2))
    for sigma in (0.0, 1e-6, 0.7, 20.0, np.inf):
        log_clean = joint.denoiser(process)(x, jnp.full(len(x), sigma, jnp.float32))
        assert log_clean.dtype == jnp.float32
        np.testing.assert_allclose(jnp.exp(log_clean).sum(-1), 1.0, rtol=1e-5)
        some = joint.denoiser(process)(x, jnp.full(len(x), sigma, jnp.float32), positions)
        np.testing.assert_array_equal(some, np.take_along_axis(np.asarray(log_clean), positions[..., None], 1))


def test_in_block_gives_the_exact_marginal(float64):
    """Four tokens in a block of nine whose other positions stay masked; if they did not, the marginal would change."""
    chain, x = MarkovChain.random(), states(4, 4)
    sigma = jnp.zeros(len(x))
    inside = in_block(chain.denoiser, 9, 3)
    np.testing.assert_allclose(inside(x, sigma), chain.denoiser(x, sigma), atol=1e-12)
    positions = np.tile([2, 0], (len(x), 1))
    np.testing.assert_allclose(inside(x, sigma, positions), chain.denoiser(x, sigma)[:, [2, 0]], atol=1e-12)


def test_condition_on_mask_ratio_uses_the_ratio_of_its_input(float64):
    """For any sigma of the caller: that of the full block below `in_block`, of the valid length if there is one."""
    process, x = Absorbing(3), np.array([[3, 0, 3, 1], [2, 0, 1, 1], [3, 3, 3, 3]])

    def denoiser(x, sigma, positions):  # returns its sigma
        return jnp.broadcast_to(sigma[:, None, None], (*(x if positions is None else positions).shape, 3))

    def sigma_of(denoiser, positions=None):
        return np.asarray(denoiser(x, jnp.full(3, 0.123), positions))[:, 0, 0]

    def due(masks, length):  # a row without masks counts as one mask
        return -np.log1p(-(np.maximum(masks, 1) - 0.5) / length)

    masks, lengths = np.array([2, 0, 4]), np.array([2, 4, 4])
    conditioned = condition_on_mask_ratio(process, denoiser)
    np.testing.assert_allclose(sigma_of(conditioned), due(masks, 4), rtol=1e-12)
    with_lengths = condition_on_mask_ratio(process, denoiser, lengths)
    np.testing.assert_allclose(sigma_of(with_lengths), due([1, 0, 4], lengths), rtol=1e-12)
    below, above = in_block(conditioned, 9, 3), condition_on_mask_ratio(process, in_block(denoiser, 9, 3))
    np.testing.assert_allclose(sigma_of(below), due(masks + 5, 9), rtol=1e-12)
    np.testing.assert_allclose(sigma_of(below, np.array([[2], [0], [3]])), due(masks + 5, 9), rtol=1e-12)
    np.testing.assert_allclose(sigma_of(above), due(masks, 4), rtol=1e-12)


def test_clamped_denoiser_sees_the_given_tokens_in_any_state(process, joint):
    """The intermediate states of a sampler may not contain them."""
    x, tokens, free = np.array([[0, 1, 2], [2, 2, 2]]), np.array([[1, 1, 1], [0, 0, 0]]), np.eye(2, 3, dtype=bool)
    sigma = jnp.ones(2)
    log_clean = clamped(joint.denoiser(process), tokens, free)(x, sigma)
    assert np.array_equal(log_clean, joint.denoiser(process)(np.array([[0, 1, 1], [0, 2, 0]]), sigma))


def test_temperature_one_and_top_p_one_change_nothing():
    """Not even for tokens whose probability underflows in float32."""
    log_clean = jax.nn.log_softmax(jnp.array([[0.0, -1.0, -90.0, -jnp.inf], [0.0, -40.0, -2.0, -17.0]]))
    assert np.array_equal(temperature(log_clean, 1.0), log_clean)
    assert np.array_equal(nucleus(log_clean, 1.0), log_clean)
    assert np.array_equal(jax.jit(nucleus)(log_clean, 1.0), log_clean)


@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_nucleus_is_the_smallest_set_of_most_likely_tokens(top_p):
    """Against a sort in float64: one token more or fewer, or a remaining tail, fails."""
    log_clean = jax.nn.log_softmax(3 * jax.random.normal(jax.random.key(0), (20, 3000)))
    p = np.exp(np.asarray(log_clean, np.float64))
    order = np.argsort(-p, axis=-1)
    before = np.cumsum(np.take_along_axis(p, order, -1), -1) - np.take_along_axis(p, order, -1)
    needed = (before < top_p) | (np.arange(3000) == 0)
    kept = np.take_along_axis(np.asarray(nucleus(log_clean, top_p)), order, -1)
    ranked = np.take_along_axis(np.asarray(log_clean), order, -1)
    np.testing.assert_array_equal(kept, np.where(needed, ranked, -np.inf))


def test_an_edit_does_not_change_the_rate_of_unmasking(joint):
    """Absorbing: temperature and nucleus change the tokens, not the times; unnormalised, Euler is too fast."""
    process, x, sigma = Absorbing(3), states(4, 3), 0.7
    denoiser = joint.denoiser(process)
    plain = denoiser(x, jnp.full(len(x), sigma))

    def p_moves(log_clean):
        held = leap(process.reverse_rate(log_clean, x, sigma), 0.1)
        return np.stack([held.p_move, process.tweedie(log_clean, x, sigma, 0.5).p_move])

    for edit in (lambda log_clean: temperature(log_clean, 0.3), lambda log_clean: nucleus(log_clean, 0.5)):
        other = edited(denoiser, edit)(x, jnp.full(len(x), sigma))
        assert np.abs(np.exp(plain) - np.exp(other)).max() > 0.1
        np.testing.assert_allclose(p_moves(other), p_moves(plain), rtol=1e-5)
