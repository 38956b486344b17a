"""Results do not depend on the global settings of JAX, which users change for their own programs."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import JAX_SETTINGS, MUON, small_config, small_corpus, trained_of, unusual_jax_settings

import sedd
from sedd import config as configs
from sedd.data.batches import Batch
from sedd.diffusion import keyed_random
from sedd.diffusion.denoiser import condition_on_mask_ratio, edited, in_block, nucleus, temperature
from sedd.diffusion.discrete.exact_likelihood import order_log_likelihoods, subset_log_likelihood
from sedd.diffusion.discrete.likelihood import MaskCountBound, NoiseLevelBound, TimeLoss
from sedd.diffusion.discrete.loss import denoising_loss
from sedd.diffusion.discrete.score import stats_from
from sedd.evaluation.conditional import log_likelihoods
from sedd.evaluation.perplexity import perplexity
from sedd.evaluation.text import from_corpus
from sedd.generation.generate import sample
from sedd.generation.options import SamplingOptions
from sedd.generation.rows import Rows
from sedd.generation.samplers import SAMPLERS, SamplerContext, named_sampler
from sedd.network.token_network import TokenNetwork
from sedd.network.trunk import Trunk
from sedd.runtime.parallel import data_mesh
from sedd.training.objectives import make_objective
from sedd.training.score_entropy import ScoreEntropy


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def trained(corpus):
    """An untrained model with fixed, nonzero parameters."""
    config = small_config(corpus, "network.layers=1")
    _, schedule, network = configs.build(config, corpus.vocab_size)
    params = jax.tree.map(
        lambda leaf: 0.3 * np.cos(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape),
        jax.eval_shape(network.init, keyed_random.root_key(0)),
    )
    return trained_of(network, schedule, params, config.data.block_length, corpus.tokenizer, corpus.layout)


def numbers(trained, corpus):
    """Returns a bound in batches of two sizes, samples, and the log-likelihood of an answer."""
    rows, mesh, results = from_corpus(corpus, "train", 16), data_mesh(jax.devices()[:1]), {}
    for batch_size in (8, 32):
        settings = dict(num_draws=2, batch_size=batch_size, mesh=mesh, progress=False)
        results[f"bound, {batch_size} rows"] = perplexity(trained, rows, **settings)[0].nats_per_token
    options = SamplingOptions(steps=3, sampler="counts", batch_size=8)
    results["samples"] = sample(trained, 32, 12, options).tokens
    answer = Rows(np.zeros((1, 16), np.int32), np.arange(16)[None] == 3, np.array([16]))
    results["answer"] = log_likelihoods(trained, answer, "exact")[0].nats
    return results


@pytest.fixture(scope="module")
def by_default(trained, corpus):
    """The numbers under the default settings."""
    return numbers(trained, corpus)


@pytest.mark.parametrize("name", JAX_SETTINGS)
@pytest.mark.slow
def test_evaluation_and_sampling_do_not_depend_on_a_setting(trained, corpus, by_default, name):
    """Bit for bit. A bound depends on the batch size only by the rounding of its sums."""
    with unusual_jax_settings(name):
        results = numbers(trained, corpus)
    for key, value in by_default.items():
        np.testing.assert_array_equal(results[key], value, err_msg=key)
    assert results["bound, 8 rows"] == pytest.approx(results["bound, 32 rows"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [(), MUON], ids=["adamw", "muon"])
def test_training_does_not_depend_on_settings(corpus, tmp_path, optimizer):
    """Parameters and losses, bit for bit; a trained model loads under other settings. Parameters are float32."""
    config = small_config(corpus, "training.ema_decay=0.9", "evaluation.every=3", *optimizer)
    expected = sedd.train(config, tmp_path / "usual")
    with unusual_jax_settings():
        trained = sedd.train(config, tmp_path / "unusual")
        loaded = sedd.load(tmp_path / "usual")
        loaded.save(tmp_path / "exported")
        exported = sedd.load(tmp_path / "exported")
    for params in (trained.params, loaded.params, exported.params, sedd.load(tmp_path / "unusual").params):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
        jax.tree.map(np.testing.assert_array_equal, params, expected.params)
    usual, unusual = (read_records(tmp_path / run / "metrics.jsonl") for run in ("usual", "unusual"))
    for name in ("loss", "gradient_norm", "validation_nats_per_token"):
        assert [record.get(name) for record in usual] == [record.get(name) for record in unusual]


def read_records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg", "untyped"])
def test_noise_of_a_row_is_independent_of_the_batch_for_keys_of_any_kind(impl):
    """Keys of the caller are converted to threefry, whose noise is the same in a slice of the batch."""
    key = jax.random.PRNGKey(7) if impl == "untyped" else jax.random.key(7, impl=impl)
    keys = jax.random.split(key, 8)
    for make in (lambda rows: keyed_random.row_keys(key, rows), lambda rows: keyed_random.fold(keys[rows], 3)):
        noise = keyed_random.uniform(make(jnp.arange(8)))
        assert len(np.unique(noise)) == 8
        np.testing.assert_array_equal(keyed_random.uniform(make(jnp.arange(2, 5))), noise[2:5])
    if impl != "unsafe_rbg":  # the same seed gives the same noise
        expected, noise = (
            keyed_random.uniform(keyed_random.row_keys(root, jnp.arange(8))) for root in (keyed_random.root_key(7), key)
        )
        np.testing.assert_array_equal(noise, expected)


def test_an_invalid_key_is_refused():
    for invalid in (0, None, np.zeros(2), jnp.zeros((), jnp.uint32)):
        with pytest.raises(sedd.UserError, match="a key is made by jax.random.key"):
            keyed_random.row_keys(invalid, jnp.arange(3))


# Functions that run inside a caller's program, under its settings. They are only traced: promotions fail in tracing.

STRICT = ("strict dtypes", "strict ranks")
V, L, B = 5, 8, 4
PROCESSES = {"absorbing": sedd.Absorbing(V), "uniform": sedd.Uniform(V)}


@pytest.mark.parametrize(
    "name, noise_sampling, settings, jax_settings",
    [
        ("absorbing", "mask_count", dict(prediction="denoiser", trunk=Trunk(16, 2, 2, dropout=0.1, scan=True)), STRICT),
        ("uniform", "time", dict(prediction="score", trunk=Trunk(16, 2, 2), given_embedding=True), STRICT),
        ("uniform", "time", dict(prediction="score", trunk=Trunk(16, 2, 2), given_embedding=True), ("x64", "prng rbg")),
    ],
)
def test_a_network_is_float32_under_any_settings(name, noise_sampling, settings, jax_settings):
    """Parameters, gradients, scores and log r."""
    network = TokenNetwork(PROCESSES[name], sigma_range=(1e-3, 7.0), **settings)
    objective = ScoreEntropy(network, sedd.LogLinear(), B, noise_sampling=noise_sampling)
    tokens, lengths = jnp.ones((B, L), jnp.int32), jnp.array([3, 8, 5, 8])

    def step(key, sigma):
        params = network.init(key)
        batch = Batch(tokens, lengths)
        gradient = jax.grad(lambda params: jnp.sum(objective(params, batch, jnp.arange(B), key).loss))(params)
        log_clean = network.denoiser(params)(tokens, sigma, tokens[:, :2])
        return params, gradient, log_clean, network.log_score(params, tokens, sigma)

    with unusual_jax_settings(*jax_settings):
        shapes = jax.eval_shape(step, jax.random.key(0), jnp.ones(B))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"float32"}


def make_denoiser():
    """Returns a Denoiser that depends on tokens and noise, without parameters."""

    def denoiser(x, sigma, positions=None):
        features = jax.nn.one_hot(x, V, dtype=sigma.dtype) * sigma[:, None, None]
        log_clean = jax.nn.log_softmax(features + jnp.sum(features, axis=1, keepdims=True), axis=-1)
        return log_clean if positions is None else jnp.take_along_axis(log_clean, positions[..., None], axis=1)

    return denoiser


def sampled_and_scored(process, sampler, key, tokens, free):
    """Returns samples with every wrapper of a Denoiser, and their log-likelihood if the sampler has one."""
    denoiser = edited(make_denoiser(), lambda log_r: nucleus(temperature(log_r, 0.9), 0.8))
    if process is PROCESSES["absorbing"]:
        denoiser = in_block(condition_on_mask_ratio(process, denoiser), L + 2, V)
    sampled = sedd.sample(key, denoiser, sampler, tokens, free, trace=True)
    likelihood = getattr(sampler, "log_likelihood", lambda *_: jnp.zeros(B))
    return sampled, likelihood(denoiser, tokens, free)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_run_under_strict_promotion(name):
    for process in PROCESSES.values():
        context = SamplerContext(process, sedd.LogLinear(), 3, L, ignores_given=process is PROCESSES["uniform"])
        try:
            sampler = named_sampler(name, context)
        except sedd.UserError:
            continue  # the sampler needs the other process
        rows = jnp.zeros((B, L), jnp.int32), jnp.tile(np.arange(L) % 3 > 0, (B, 1))
        run = functools.partial(sampled_and_scored, process, sampler)
        with unusual_jax_settings(*STRICT):
            sampled, _ = jax.eval_shape(run, jax.random.key(0), *rows)
        assert sampled.tokens.dtype == sampled.trace.dtype == jnp.int32


@pytest.mark.parametrize("name", PROCESSES)
def test_likelihoods_run_under_strict_promotion(name):
    process, lengths = PROCESSES[name], jnp.array([3, 8, 5, 8])
    stats, tokens = stats_from(process, make_denoiser()), jnp.ones((B, L), jnp.int32)
    free = jnp.arange(L)[None] < lengths[:, None]

    def run(key):
        keys = keyed_random.row_keys(key, jnp.arange(B))
        results = [
            denoising_loss(process, sedd.Geometric(), stats, keys, tokens, jnp.full(B, 0.5), free),
            NoiseLevelBound(process, 1e-3, 12.0).draws(stats, keys, tokens, 4, free),
            TimeLoss(process, sedd.LogLinear(), 1e-3, B).draws(stats, keys, tokens, 2, rows=jnp.arange(B)),
            process.transition_matrix(jnp.float32(0.5)),
            process.rate_matrix(),
        ]
        if name == "absorbing":
            results += [MaskCountBound(process).draws(stats, keys, tokens, number, free, lengths) for number in (3, 4)]
            results.append(order_log_likelihoods(process, make_denoiser(), keys, tokens, free, lengths))
            results.append(subset_log_likelihood(process, make_denoiser(), tokens[0], jnp.arange(3), 4, lengths[0]))
        return results

    with unusual_jax_settings(*STRICT):
        jax.eval_shape(run, jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("jax_settings", [STRICT, ("x64", "prng rbg")], ids=["strict", "x64"])
@pytest.mark.parametrize("loss", ["bound", "cross_entropy", "regression"])
def test_latents_are_float32_under_any_settings(corpus, loss, jax_settings):
    """Parameters, gradients of each objective, draws of the bound; samplers, with rounding."""
    settings = ["process.name=gaussian", f"training.loss={loss}", "network.self_conditioning=true"]
    if loss == "regression":
        settings += ["network.prediction=v", "codec.normalised=false", "codec.rounding=head"]
    config = small_config(corpus, *settings, "network.given_embedding=true")
    _, schedule, network = configs.build(config, V)
    objective, bound = make_objective(config, network, schedule), network.bound(schedule)
    context = SamplerContext(network.process, schedule, 3, L)
    samplers = [named_sampler(name, context) for name in ("tweedie", "euler", "ddim", "flow", "renoised", "tencdm")]
    tokens, lengths = jnp.ones((B, L), jnp.int32), jnp.array([3, 8, 5, 8])
    free = jnp.arange(L)[None] < lengths[:, None]

    def learn(key):
        params, batch = network.init(key), Batch(tokens, lengths)
        gradient = jax.grad(lambda params: jnp.sum(objective(params, batch, jnp.arange(B), key).loss))(params)
        stats, keys = network.bound_stats(params, tokens, lengths), keyed_random.row_keys(key, jnp.arange(B))
        return params, gradient, bound.draws(stats, keys, network.clean(params, tokens), 4, free)

    def draw(key):
        params = network.init(key)
        mean = network.for_sampler(params, network.denoiser(params), round_below=0.5)
        shown = functools.partial(network.shown, params)
        clean = network.clean(params, tokens)
        return [sedd.sample(key, mean, sampler, clean, free, shown=shown).tokens for sampler in samplers]

    with unusual_jax_settings(*jax_settings):
        learnt, tokens_drawn = (jax.eval_shape(run, jax.random.key(0)) for run in (learn, draw))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(learnt)} == {"float32"}
    assert {leaf.dtype.name for leaf in tokens_drawn} == {"int32"}
