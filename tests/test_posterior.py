"""The posterior of a clean token given all noisy ones, its own included: exact, inverted, and a training target."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from oracle import Joint, index, standard_errors, states
from test_network import random_params

from sedd.data.batches import Batch
from sedd.diffusion import keyed_random
from sedd.diffusion.discrete.loss import cross_entropy_loss
from sedd.diffusion.discrete.process import Absorbing, Uniform
from sedd.diffusion.discrete.score import ArrayColumns, posterior_from, stats_from
from sedd.diffusion.schedule import LogLinear
from sedd.network.adapters import NoiseEmbedding
from sedd.network.predictions import ODDS_DISCOUNT, DenoiserPrediction, PosteriorPrediction
from sedd.network.token_network import TokenNetwork
from sedd.network.trunk import Trunk
from sedd.training.cross_entropy import MAX_WEIGHT, CrossEntropy
from sedd.training.token_objective import _NOISE

SIGMAS = [1e-4, 1e-2, 0.3, 1.0, 5.0, 20.0]
ROWS = 30_000
NETWORK = TokenNetwork(
    Uniform(37), "posterior", Trunk(width=16, layers=1, heads=2), sigma_range=(1e-3, 2.0), cond_dim=8
)


@pytest.mark.smoke
def test_posterior_is_bayes_rule_and_is_inverted(process, joint, float64):
    """Of the exact r; where a token can move, r comes back. Control: r itself is not the posterior (uniform)."""
    x = states(process.num_states, 3)
    movable = np.asarray(process.movable(x))
    prediction = PosteriorPrediction(process) if isinstance(process, Uniform) else DenoiserPrediction(process)
    for sigma in SIGMAS:
        log_clean = joint.denoiser(process)(x, jnp.full(len(x), sigma))
        log_posterior = jax.jit(process.log_posterior)(log_clean, x, sigma)
        exact = joint.posterior(process, sigma)
        np.testing.assert_allclose(np.exp(log_posterior), exact, atol=1e-12)
        added = process.log_evidence(x, sigma, ODDS_DISCOUNT) if isinstance(process, Uniform) else 0.0
        logits = log_posterior - added
        np.testing.assert_allclose(np.exp(prediction.log_posterior(logits, x, sigma)), exact, atol=1e-12)
        back = jax.jit(prediction.log_clean)(logits, x, sigma)
        np.testing.assert_allclose(back[movable], log_clean[movable], atol=1e-10)
        if isinstance(process, Uniform) and sigma < 2:
            assert np.abs(np.exp(log_clean) - exact).max() > 0.1


@pytest.mark.parametrize("sigma", [1e-6, 1e-4, 1e-2, 1.0, 7.0, 20.0])
def test_r_from_the_posterior_is_accurate_in_float32(sigma):
    """Of 50257 tokens, at the likeliest, another and the least likely token. Control: the odds left out of r."""
    process = Uniform(50257)
    log_r = jax.nn.log_softmax(4 * jax.random.normal(jax.random.key(0), (3, 50257)))
    x = jnp.array([int(jnp.argmax(log_r[0])), 7, int(jnp.argmin(log_r[2]))])
    with jax.enable_x64(True):
        exact = np.asarray(process.log_posterior(jnp.asarray(log_r, jnp.float64), x, np.float64(sigma)))
    log_posterior = process.log_posterior(log_r, x, jnp.float32(sigma))
    logits = jnp.asarray(exact, jnp.float32) - process.log_evidence(x, jnp.float32(sigma), ODDS_DISCOUNT)
    back = PosteriorPrediction(process).log_clean(logits, x, jnp.float32(sigma))
    assert log_posterior.dtype == back.dtype == jnp.float32

    def distance(one, other):
        return np.abs(np.exp(np.float64(one)) - np.exp(np.float64(other))).sum(-1).max() / 2

    assert distance(log_posterior, exact) < 1e-5 and distance(back, log_r) < 1e-5
    assert sigma > 5 or distance(exact, log_r) > 0.01


def meaning_of(prediction, logits):
    """The StatsFn of a prediction with these logits: (Int[B L], Float[B]) -> Float[B L V]."""
    return lambda x, sigma, x0: prediction.stats(ArrayColumns(logits(x, sigma)), x, x0, sigma[:, None], sigma[:, None])


def logits_of_posterior(process, log_clean, x, sigma):
    """What a network with PosteriorPrediction has to output for its posterior to be exact."""
    return log_clean + process.lost_evidence(x, sigma, ODDS_DISCOUNT)


@pytest.mark.parametrize("sigma", [0.0, 1e-30, 1e-6, 0.3, 7.0, 40.0, np.inf])
def test_lost_evidence_is_what_a_discount_takes(sigma, float64):
    """Up to log of the discount where a token's state says much, 0 where it says nothing; finite at every noise."""
    process, x = Uniform(50257), np.array([7])
    lost = np.asarray(process.lost_evidence(x, np.float64(sigma), 4.0))
    if 0 < sigma:
        taken = process.log_evidence(x, np.float64(sigma)) - process.log_evidence(x, np.float64(sigma), 4.0)
        np.testing.assert_allclose(lost, taken, atol=1e-12)
    assert lost[0, 7] == pytest.approx({0.0: np.log(4), np.inf: 0}.get(sigma, lost[0, 7]), abs=1e-12)
    assert np.count_nonzero(np.delete(lost, 7)) == 0 and np.all(np.isfinite(lost))


def test_the_bound_of_a_posterior_is_the_likelihood_of_each_sequence(joint, float64):
    """As of a denoiser, with the same terms. Control: the logits of a posterior read as r give another bound."""
    process = Uniform(3)
    clean = joint.denoiser(process)

    def posterior(x, sigma):
        return logits_of_posterior(process, clean(x, sigma), x, sigma[:, None]) + 3.0  # any constant may be added

    def gap(prediction, logits):
        return joint.bound_gap(process, meaning_of(prediction, logits), 1e-3, 12.0)

    of_posterior = gap(PosteriorPrediction(process), posterior)
    assert np.abs(of_posterior).max() < 1e-6
    np.testing.assert_allclose(of_posterior, gap(DenoiserPrediction(process), clean), atol=1e-10)
    assert np.abs(gap(DenoiserPrediction(process), posterior)).max() > 1e-2


def test_statistics_of_both_predictions_are_equal_jitted_or_not(joint, float64):
    process, x = Uniform(3), states(3, 3)
    x0 = np.roll(x, 5, axis=0)
    for sigma in SIGMAS:
        log_clean = joint.denoiser(process)(x, jnp.full(len(x), sigma))
        at = (x, x0, jnp.full(x.shape, sigma), jnp.full(x.shape, sigma))
        one = DenoiserPrediction(process).stats(ArrayColumns(log_clean), *at)
        logits = logits_of_posterior(process, log_clean, x, sigma)

        def other(logits, *at):
            return PosteriorPrediction(process).stats(ArrayColumns(logits), *at)

        for stats in (other(logits, *at), jax.jit(other)(logits, *at)):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), stats, one)


def test_cross_entropy_averages_to_the_entropy_of_the_posterior(process, joint):
    """The least that it can be: r read as the posterior, and the posterior of another distribution, have more."""
    x0, sigma = joint.draw(ROWS), 0.7
    keys = keyed_random.row_keys(jax.random.key(0), jnp.arange(ROWS))
    with jax.enable_x64(True):
        posterior = joint.posterior(process, sigma)
    weights = joint.noisy_distribution(process, sigma)
    entropy = -(weights[:, None, None] * scipy.special.xlogy(posterior, posterior)).sum((0, 2))

    def loss(table):
        def looked_up(x, _, x0):
            return jnp.log(np.take_along_axis(table[index(x, process.num_states)], x0[..., None], -1)[..., 0])

        return cross_entropy_loss(process, looked_up, keys, x0, jnp.full(ROWS, sigma))

    exact = loss(np.float32(posterior))
    assert np.abs(standard_errors(exact - np.float32(entropy))).max() < 4
    through_r = cross_entropy_loss(
        process, posterior_from(process, joint.denoiser(process)), keys, x0, jnp.full(ROWS, sigma)
    )
    np.testing.assert_allclose(through_r, exact, rtol=1e-4, atol=1e-4)
    others = [Joint.random(seed=1).posterior(process, sigma)]
    if isinstance(process, Uniform):
        others.append(np.exp(joint.denoiser(process)(states(3, 3), jnp.full(27, sigma))))
    for other in others:
        assert standard_errors((loss(np.float32(other)) - exact).sum(-1)) > 4


def test_weight_of_the_cross_entropy_is_bounded_at_every_noise_level():
    """1 / sqrt(corruption probability), at most the given weight; the plain cross-entropy by default."""
    x0, keys = jnp.zeros((6, 3), jnp.int32), keyed_random.row_keys(jax.random.key(0), jnp.arange(6))
    corrupted = jnp.array([0.0, 1e-6, 1 / 16, 0.25, 0.5, 1.0])
    arguments = (Uniform(3), lambda x, *_: jnp.full(x.shape, -2.0), keys, x0, -jnp.log1p(-corrupted))
    weights = cross_entropy_loss(*arguments, max_weight=4.0)[:, 0] / 2
    np.testing.assert_allclose(weights, [4, 4, 4, 2, 2**0.5, 1], rtol=1e-6)
    np.testing.assert_array_equal(cross_entropy_loss(*arguments), 2.0)


def test_cross_entropy_scores_free_tokens_only(process):
    """Given tokens are seen clean; a posterior that were not looked at there would make the loss infinite."""
    x0 = jnp.array([[0, 1, 2, 1]] * 50)
    free = jnp.array([[True, False, True, False]] * 50)
    keys, seen = keyed_random.row_keys(jax.random.key(1), jnp.arange(50)), []

    def posterior(x, sigma, x0):
        seen.append(x)
        return jnp.where(free, -1.0, -jnp.inf)

    loss = cross_entropy_loss(process, posterior, keys, x0, jnp.full(50, 2.0), free)
    np.testing.assert_array_equal(loss, jnp.where(free, 1.0, 0.0))
    assert np.array_equal(seen[0][~free], x0[~free]) and not np.array_equal(seen[0][free], x0[free])


@pytest.mark.slow
def test_a_network_is_one_model_at_every_noise_level():
    """Its Denoiser, StatsFn, PosteriorFn and log score agree, within the range of training and outside of it.

    Outside, the network is asked at the nearest level, to which its posterior belongs. Control: the posterior taken for
    that of the level outside differs.
    """
    process, params = NETWORK.process, random_params(NETWORK)
    x0 = jax.random.randint(jax.random.key(2), (5, 12), 0, 37)
    sigma = jnp.array([1e-5, 1e-3, 0.5, 2.0, 4.0])
    x = process.corrupt(keyed_random.row_keys(jax.random.key(3), jnp.arange(5)), x0, jnp.full((5, 1), 0.7))
    denoiser = NETWORK.denoiser(params)
    expected, actual = (stats(x, sigma, x0) for stats in (stats_from(process, denoiser), NETWORK.stats(params)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, expected)
    inside = jnp.clip(sigma, 1e-3, 2.0)
    posterior = posterior_from(process, denoiser)(x, inside, x0)
    np.testing.assert_allclose(NETWORK.posterior(params)(x, sigma, x0), posterior, rtol=1e-4, atol=1e-4)
    log_noised = process.log_noised(denoiser(x, sigma, None), sigma[:, None])
    score = log_noised - jnp.take_along_axis(log_noised, x[..., None], axis=-1)
    np.testing.assert_allclose(
        NETWORK.log_score(params, x, sigma)[1:4], score[1:4], rtol=1e-4, atol=1e-3
    )  # not clipped: within the range only
    outside = posterior_from(process, denoiser)(x, sigma, x0)
    assert np.abs(outside - posterior)[0].max() > 0.1
    for level in (0.0, np.inf):
        assert np.all(np.isfinite(denoiser(x, jnp.full(5, level), None)))


@pytest.mark.slow
def test_objective_sums_the_weighted_loss_of_the_free_tokens():
    """At stratified times, given the given tokens. Controls: without the weights; other tokens after the end."""
    network, rows, key = dataclasses.replace(NETWORK, given_embedding=True), jnp.arange(8), keyed_random.root_key(5)
    objective, params = CrossEntropy(network, LogLinear(), 8), random_params(network)
    tokens = jax.random.randint(jax.random.key(2), (8, 12), 0, 37)
    lengths = jnp.array([12, 3, 7, 12, 1, 9, 12, 5])
    losses = jax.jit(objective)(params, Batch(tokens, lengths), rows, key)
    free, given = objective.free_and_given(rows, key, 12, lengths)
    sigma = objective.schedule.sigma(objective.times(rows, key))
    np.testing.assert_allclose(losses.sigma, sigma, rtol=1e-6)
    np.testing.assert_array_equal(losses.count, free.sum(-1))
    noise = keyed_random.fold(keyed_random.row_keys(key, rows), _NOISE)
    posterior = network.posterior(params, lengths=lengths, given=given)

    def by_hand(weight):
        return cross_entropy_loss(network.process, posterior, noise, tokens, sigma, free, weight).sum(-1)

    np.testing.assert_allclose(losses.loss, by_hand(MAX_WEIGHT), rtol=1e-4)
    assert np.abs(losses.loss - by_hand(1.0)).max() > 1
    changed = jnp.where(jnp.arange(12) < lengths[:, None], tokens, 36 - tokens)
    again = jax.jit(objective)(params, Batch(changed, lengths), rows, key)
    np.testing.assert_allclose(again.loss, losses.loss, rtol=1e-5)


def test_log_snr_tells_low_noise_levels_apart():
    """At 0 and infinity it is finite. Control: two low levels have nearly the same embedding of sigma."""
    sigma, params = jnp.array([0.0, 1e-3, 1e-2, 7.0, jnp.inf]), None
    far = {}
    for conditioning in ("sigma", "log_snr"):
        embedding = NoiseEmbedding(8, conditioning)
        params = params or embedding.init(jax.random.key(0), sigma)  # of the same shapes
        embedded = embedding.apply(params, sigma[:4] if conditioning == "sigma" else sigma)
        assert np.all(np.isfinite(embedded))
        far[conditioning] = np.abs(embedded[1] - embedded[2]).max()
    assert far["log_snr"] > 50 * far["sigma"]


def test_predictions_of_a_posterior_are_refused_where_they_are_none():
    with pytest.raises(ValueError, match="posterior is for the uniform process"):
        dataclasses.replace(NETWORK, process=Absorbing(37))
    with pytest.raises(ValueError, match="network.conditioning must be one of sigma, log_snr, constant, not 'time'"):
        dataclasses.replace(NETWORK, conditioning="time")
