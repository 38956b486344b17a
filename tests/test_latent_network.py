"""The network of noisy latents and the embeddings: what goes in, what comes out, and what is bound."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import unusual_jax_settings

from sedd.codecs.embeddings import Embeddings
from sedd.diffusion.denoiser import Latent
from sedd.diffusion.schedule import Sqrt
from sedd.network.latent_network import LatentNetwork, with_memory
from sedd.network.latent_predictions import MEANS
from sedd.network.network import apply
from sedd.network.trunk import Trunk

V, D, B, L = 7, 4, 3, 5
CODEC = Embeddings(V, D)
TOKENS = jnp.arange(B * L).reshape(B, L) % V
SIGMA = jnp.array([0.05, 0.7, 6.0])


def network_of(codec=CODEC, **settings):
    sizes = {"prediction": "denoiser", "trunk": Trunk(16, 2, 2), "sigma_range": (0.01, 9.0), "cond_dim": 8}
    return LatentNetwork(process=codec.process, codec=codec, **sizes | settings)


def params_of(network, seed=0):
    """Random parameters, no array of them 0."""
    random, shapes = np.random.default_rng(seed), jax.eval_shape(network.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.5, leaf.shape), leaf.dtype), shapes)


def state(seed=0):
    z, estimate = jax.random.normal(jax.random.key(seed), (2, B, L, D))
    return Latent(z, estimate)


@pytest.mark.slow
def test_a_denoiser_is_a_distribution_at_any_positions():
    """Normalised over V tokens; at some positions the same as there of all; jitted as not."""
    network = network_of()
    denoiser = network.denoiser(params_of(network))
    log_clean = denoiser(state(), SIGMA, None)
    assert log_clean.shape == (B, L, V) and log_clean.dtype == jnp.float32
    np.testing.assert_allclose(jnp.exp(log_clean).sum(-1), 1, rtol=1e-5)
    positions = jnp.array([[0, 3], [4, 4], [2, 1]])
    some = jnp.take_along_axis(log_clean, positions[..., None], axis=1)
    np.testing.assert_allclose(denoiser(state(), SIGMA, positions), some)
    np.testing.assert_allclose(jax.jit(denoiser)(state(), SIGMA, None), log_clean, atol=1e-4)


def test_predictions_of_the_same_mean_are_equivalent():
    """x0, eps and v of a draw give its clean latent back, at every noise."""
    z0, eps = jax.random.normal(jax.random.key(0), (2, B, L, D))
    sigma = SIGMA[:, None, None]
    signal, noise = jnp.exp(-sigma / 2), jnp.sqrt(-jnp.expm1(-sigma))
    z = signal * z0 + noise * eps
    for name, output in {"x0": z0, "eps": eps, "v": signal * eps - noise * z0}.items():
        np.testing.assert_allclose(MEANS[name](output, z, sigma), z0, atol=1e-4)
    assert MEANS.keys() == {"x0", "eps", "v"}


@pytest.mark.parametrize("prediction", ["denoiser", "x0"])
@pytest.mark.slow
def test_statistics_are_those_of_the_mean_and_of_the_tokens(prediction):
    """The error is that of the MeanDenoiser; a network that predicts latents rounds each by itself."""
    network = network_of(prediction=prediction)
    params, z0 = params_of(network), CODEC.encode(params_of(network)["codec"], TOKENS)
    x = state()
    stats = network.stats(params, TOKENS)(x, SIGMA, z0)
    mean = network.for_sampler(params, network.denoiser(params))
    np.testing.assert_allclose(stats.error, jnp.sum((z0 - mean(x, SIGMA)) ** 2, -1), rtol=1e-4)
    if prediction == "denoiser":
        log_clean = network.denoiser(params)(x, SIGMA, None)
    else:
        log_clean = CODEC.log_tokens(params["codec"], x.z, SIGMA[:, None])
    due = jnp.take_along_axis(log_clean, TOKENS[..., None], -1)[..., 0]
    np.testing.assert_allclose(stats.log_clean, due, rtol=1e-5)


def test_soft_tokens_are_the_tokens_themselves_where_given_and_without_noise():
    """The network's input is then the embedding of the token, as of a network of tokens, and the latent's."""
    network = network_of(given_embedding=True)
    params = params_of(network)
    clean = CODEC.encode(params["codec"], TOKENS)
    given = jnp.ones((B, L), bool)
    trunk = params["trunk"]
    tokens = trunk["embedding"][TOKENS] + clean @ trunk["latent"]["kernel"] + trunk["latent"]["bias"] + trunk["given"]
    soft = jax.nn.one_hot(TOKENS, V)
    np.testing.assert_allclose(apply(network.embedding, trunk, clean, soft, None, given), tokens, atol=1e-5)
    # With all given, the noise changes the condition only.
    same = dataclasses.replace(network, sigma_range=(0.5, 0.5))
    outputs = [same.denoiser(params, given=given)(Latent(clean, clean), sigma, None) for sigma in (SIGMA, SIGMA[::-1])]
    np.testing.assert_allclose(*outputs, atol=1e-5)
    with pytest.raises(ValueError, match="no embedding of given tokens"):
        network_of().denoiser(params, given=given)(state(), SIGMA, None)


def test_self_conditioning_takes_the_last_answer():
    """A bound calls twice: the statistics are those with the memory of the first answer. Control: without memory."""
    network = network_of(self_conditioning=True, given_embedding=True)
    params = params_of(network)
    z0 = CODEC.encode(params["codec"], TOKENS)
    given = jnp.arange(L)[None] < jnp.array([0, 2, 5])[:, None]
    x = Latent(jnp.where(given[..., None], z0, state().z), jnp.where(given[..., None], z0, 0.0))
    answer = network.mean_denoiser(params, given=given)(x, SIGMA)
    stats = network.stats(params, TOKENS, given=given)
    found = network.bound_stats(params, TOKENS, given=given)(x, SIGMA, z0)
    due = stats(with_memory(x, answer, given), SIGMA, z0)
    np.testing.assert_allclose(found.error, due.error, rtol=1e-5)
    assert np.abs(found.error - stats(x, SIGMA, z0).error).max() > 0.01
    np.testing.assert_array_equal(with_memory(x, answer, given).estimate[2], z0[2])
    assert "estimate" not in params_of(network_of())["trunk"]


def test_the_share_of_the_own_evidence_grows_with_the_signal():
    """With a head of 0: half of it at SNR = evidence_snr, nearly all at little noise, nearly none at much."""
    network = network_of(evidence_snr=1.0)
    params = jax.jit(network.init)(jax.random.key(0))
    table, x = CODEC.rows(params["codec"]), state()
    sigma = jnp.array([0.01, np.log(2.0), 9.0])  # SNR 100, 1 and .0001
    share = jnp.array([100 / 101, 0.5, 1e-4])
    evidence = CODEC.process.log_evidence(x.z, table, sigma[:, None])
    due = jax.nn.log_softmax(share[:, None, None] * evidence)
    np.testing.assert_allclose(network.denoiser(params)(x, sigma, None), due, rtol=0.01, atol=0.01)
    none = network_of().denoiser(params)(x, sigma, None)
    np.testing.assert_allclose(none, -np.log(V), rtol=1e-5)


def test_padding_after_the_end_of_a_row_changes_nothing():
    network = network_of()
    params, lengths, x = params_of(network), jnp.array([5, 3, 1]), state()
    valid = jnp.arange(L)[None] < lengths[:, None]
    other = jax.tree.map(lambda leaf: jnp.where(valid[..., None], leaf, 7.0), x)
    a, b = (network.denoiser(params, lengths)(one, SIGMA, None) for one in (x, other))
    np.testing.assert_allclose(jnp.where(valid[..., None], a - b, 0.0), 0.0, atol=1e-5)


@pytest.mark.parametrize("rounding", ["evidence", "head"])
def test_embeddings_round_to_their_tokens(rounding):
    """Rows have one norm; at little noise a latent's token is certain."""
    codec = Embeddings(V, D, rounding=rounding)
    params = codec.init(jax.random.key(0))
    rows = codec.rows(params)
    assert rows.shape == (V, D) and codec.num_padding == (128 - V) * (D + (rounding == "head"))
    np.testing.assert_allclose(jnp.sum(rows**2, -1), 16, rtol=1e-5)
    np.testing.assert_array_equal(codec.tokens(params, codec.encode(params, TOKENS)), TOKENS)
    log_tokens = codec.log_tokens(params, codec.encode(params, TOKENS) * 0.995, jnp.full((B, L), 0.01))
    np.testing.assert_allclose(jnp.exp(log_tokens).sum(-1), 1, rtol=1e-5)
    assert np.all(jnp.argmax(log_tokens, -1) == TOKENS)


def test_free_rows_are_as_they_are_and_a_random_table_has_no_gradient():
    """Control: a learned one has."""
    free = Embeddings(V, D, normalised=False)
    params = free.init(jax.random.key(0))
    np.testing.assert_array_equal(free.rows(params), params["table"][:V])
    for table, moves in (("random", False), ("learned", True)):
        codec = Embeddings(V, D, table=table)
        gradient = jax.grad(lambda params, codec=codec: jnp.sum(codec.encode(params, TOKENS)[..., 0] ** 3))(params)
        assert np.any(gradient["table"] != 0) == moves
    with pytest.raises(ValueError, match="codec.rounding must be one of"):
        Embeddings(V, D, rounding="nearest")


def test_parameters_are_counted_without_padding():
    for settings in ({}, {"soft_tokens": False}, {"prediction": "v"}):
        network = network_of(**settings)
        params = jax.eval_shape(network.init, jax.random.key(0))
        stored = sum(leaf.size for leaf in jax.tree.leaves(params))
        rows = 128 - V
        padding = rows * (D + 16 * network.soft_tokens + 17 * network.has_logits)
        assert network.num_parameters() == stored - padding


@pytest.mark.slow
def test_settings_of_jax_do_not_change_the_outputs():
    network = network_of(self_conditioning=True, evidence_snr=1.0)
    params, x = params_of(network), state()

    def outputs():
        z0 = network.clean(params, TOKENS)
        return network.bound_stats(params, TOKENS)(x, SIGMA, z0)

    due = outputs()
    with unusual_jax_settings("strict dtypes", "strict ranks", "x64"):
        found = outputs()
    assert found.error.dtype == jnp.float32
    np.testing.assert_allclose(found.error, due.error, rtol=1e-4)


def test_unknown_predictions_are_refused():
    with pytest.raises(ValueError, match="must be one of denoiser, x0, eps, v"):
        network_of(prediction="score")


def test_the_noise_of_the_network_is_that_of_training():
    """Outside of its range the condition is that of the nearest level. Control: within, it differs."""
    network = network_of(sigma_range=(0.1, 5.0), soft_tokens=False)
    params, x = params_of(network), state()
    a, b, c = (network.denoiser(params)(x, jnp.full(B, s), None) for s in (0.1, 0.02, 0.5))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.01
    assert Sqrt().sigma(0.0) > 0
