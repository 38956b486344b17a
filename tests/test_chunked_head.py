"""The statistics of a head in chunks equal those of an array of all logits, and no such array is made."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small import small_config, small_corpus

from sedd import config as configs
from sedd.data.batches import Batch
from sedd.diffusion.discrete.process import Absorbing, Uniform
from sedd.diffusion.discrete.score import ArrayColumns
from sedd.network import chunked_head, masked_lm, token_network
from sedd.network.bert import Bert
from sedd.network.chunked_head import HeadColumns
from sedd.network.masked_lm import ARCHITECTURES, MaskedLanguageModel
from sedd.training.objectives import make_objective

V, W, STORED, SITES = 37, 5, 128, (8, 11)
KEY = jax.random.key(0)
PROCESSES = [Absorbing(V), Uniform(V)]
KINDS = ["denoiser", "posterior", "score", "tightened", "log_posterior"]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=["absorbing", "uniform"])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks that do not divide the vocabulary, and blocks of rows that do not divide the sites."""
    monkeypatch.setattr(chunked_head, "CHUNK", 20)
    monkeypatch.setattr(chunked_head, "MAX_LOGITS", 20 * 7)


def inputs(process, dtype=np.float64, scale=1.0):
    random = np.random.default_rng(0)
    arrays = [scale * random.normal(size=size).astype(dtype) for size in ((*SITES, W), (W, STORED), (STORED,))]
    x, x0 = random.integers(0, process.num_states, SITES), random.integers(0, V, SITES)
    return arrays, (x, x0, random.uniform(0.01, 6, SITES).astype(dtype))


def objective(process, kind, columns, x, x0, sigma):
    """A sum of the loss of each site with different weights, so that every site has a gradient of its own."""
    if kind == "log_posterior":
        terms = process.log_posterior_at(columns, x, x0, sigma, 4.0)
        terms = jnp.where(jnp.isfinite(terms), terms, 0.0)
    elif kind in ("denoiser", "posterior"):
        lost = 0.7 if kind == "posterior" else 0.0
        terms = process.score_entropy(process.stats_of_clean(columns, x, x0, sigma, lost), x, x0, sigma)
    else:
        stats = process.stats_of_score(columns, x, x0, sigma, kind == "tightened")
        terms = process.score_entropy(stats, x, x0, sigma) + 0.01 * stats.sum_log
    return jnp.sum(terms * jnp.cos(jnp.arange(terms.size)).reshape(terms.shape).astype(terms.dtype))


def dense(features, kernel, bias):
    return ArrayColumns((features @ kernel + bias)[..., :V])


def chunked(features, kernel, bias):
    return HeadColumns(features, kernel, bias, V)


def value_and_gradient(make, process, kind, arrays, at):
    return jax.jit(jax.value_and_grad(lambda *arrays: objective(process, kind, make(*arrays), *at), (0, 1, 2)))(*arrays)


@every_process
@pytest.mark.parametrize("kind", KINDS)
def test_chunked_statistics_and_gradients_equal_the_dense_ones(process, kind, float64):
    """To 1e-10. Control: one column less."""
    arrays, at = inputs(process)
    expected, expected_gradient = value_and_gradient(dense, process, kind, arrays, at)
    value, gradient = value_and_gradient(chunked, process, kind, arrays, at)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10 * np.abs(b).max()), gradient, expected_gradient
    )
    less, _ = value_and_gradient(lambda *head: HeadColumns(*head, V - 1), process, kind, arrays, at)
    assert abs(less - expected) > 1e-6 * abs(expected)


@every_process
@pytest.mark.parametrize("kind, scale", [("denoiser", 3.0), ("score", 1.0)])
def test_chunked_statistics_are_accurate_in_float32(process, kind, scale):
    """At logits of size 20, and log scores of size 2. To 1e-5, gradients to 1e-4 of the largest entry."""
    arrays, at = inputs(process, np.float32, scale)
    value, gradient = value_and_gradient(chunked, process, kind, arrays, at)
    with jax.enable_x64(True):
        exact = value_and_gradient(
            dense, process, kind, [leaf.astype(float) for leaf in arrays], (*at[:2], at[2] + 0.0)
        )
    np.testing.assert_allclose(value, exact[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max()), gradient, exact[1])


@every_process
@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((1, 1, 8), marks=pytest.mark.slow)], ids=str)
def test_devices_share_rows_and_columns(process, sizes, float64):
    """The same values and gradients on a mesh, where some devices have no token among their columns."""
    arrays, at = inputs(process)
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3)
    specs = (P(("data", "fsdp")), P(None, "model"), P("model"))
    for kind in ("denoiser", "tightened"):
        expected = value_and_gradient(dense, process, kind, arrays, at)
        with jax.set_mesh(mesh):
            placed = [jax.device_put(leaf, NamedSharding(mesh, spec)) for leaf, spec in zip(arrays, specs)]
            found = value_and_gradient(chunked, process, kind, placed, at)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10 * np.abs(b).max()), found, expected)


SETTINGS = {
    "absorbing denoiser": [],
    "absorbing score": ["network.prediction=score", "training.noise_sampling=time"],
    "uniform posterior": ["process.name=uniform"],
    "uniform denoiser": ["process.name=uniform", "network.prediction=denoiser", "training.loss=bound"],
    "blocks": ["network.block_size=4"],
}


@pytest.mark.parametrize("name", ["absorbing denoiser", "uniform posterior", "blocks"])
@pytest.mark.slow
def test_losses_of_a_network_are_the_same_in_chunks(name, tmp_path, monkeypatch):
    """With the head at masked positions where it is packed, and the gradients of all parameters."""
    corpus = small_corpus(tmp_path)
    config = small_config(corpus, *SETTINGS[name])
    _, schedule, network = configs.build(config, corpus.vocab_size)
    loss = make_objective(config, network, schedule)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), network.init(KEY)
    )
    tokens = np.random.default_rng(0).integers(0, corpus.vocab_size, (8, 16)).astype(np.int32)

    def total(params):
        return jnp.sum(loss(params, Batch(tokens, None), jnp.arange(8), KEY).loss)

    expected = jax.jit(jax.value_and_grad(total))(params)
    monkeypatch.setattr(token_network, "MAX_DENSE_LOGITS", 0)
    found = jax.jit(jax.value_and_grad(lambda params: total(params)))(params)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max() + 1e-6), found[1], expected[1]
    )


@pytest.mark.parametrize(
    "name", ["absorbing denoiser", *(pytest.param(name, marks=pytest.mark.slow) for name in list(SETTINGS)[1:4])]
)
def test_a_large_head_takes_no_memory(name, monkeypatch):
    """What its loss adds to the temporaries of a step is a tenth of what dense logits add, by the compiler's analysis.

    And no array of the compiled step has as many elements as half of the logits. Control: the dense one has.
    """
    rows, length, vocab_size = 8, 256, 32_000
    sizes = ("network.width=64", "network.layers=2", "network.heads=2", "network.scan=True", "network.remat=full")
    settings = [*sizes, f"data.block_length={length}", f"training.batch_size={rows}", *SETTINGS[name]]
    config = configs.override(configs.default(), settings)
    _, schedule, network = configs.build(config, vocab_size)
    loss, params = make_objective(config, network, schedule), jax.eval_shape(network.init, KEY)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def step(params, tokens):
        return jnp.sum(loss(params, Batch(tokens, None), jnp.arange(rows), KEY).loss)

    def trivial(params, tokens):
        return jnp.sum(network.hidden(params, tokens, jnp.ones(rows))[0] ** 2)

    def compiled(function):
        program = jax.jit(jax.value_and_grad(lambda *args: function(*args))).lower(params, tokens).compile()
        shapes = re.findall(r"\w+\[([\d,]+)\]", program.as_text())
        largest = max(np.prod([int(size) for size in shape.split(",")], dtype=np.int64) for shape in shapes)
        return program.memory_analysis().temp_size_in_bytes, largest

    monkeypatch.setattr(chunked_head, "CHUNK", 4096)
    monkeypatch.setattr(chunked_head, "MAX_LOGITS", 2**20)
    monkeypatch.setattr(token_network, "MAX_DENSE_LOGITS", 2**24)
    (least, _), (chunked, largest) = compiled(trivial), compiled(step)
    monkeypatch.setattr(token_network, "MAX_DENSE_LOGITS", 2**40)
    dense, largest_of_dense = compiled(step)
    half = rows * length * vocab_size // 2
    assert chunked - least < (dense - least) / 10
    assert largest < half <= largest_of_dense


def test_the_head_of_a_masked_language_model_is_taken_in_chunks_too(monkeypatch):
    """Its columns are the rows of the embedding table. Control: without the mask's logit, which is that of no token."""
    process, rows = Absorbing(V), (2, 6)
    trunk = Bert(V, width=8, layers=1, heads=2, mlp_width=16, **ARCHITECTURES["bert"])
    network = MaskedLanguageModel(process, "denoiser", trunk, (1e-3, 7.0), mask_token=3, start_token=4)
    params = jax.tree.map(
        lambda leaf: leaf + 0.3 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), network.init(KEY)
    )
    x, x0 = jnp.full(rows, V), jnp.arange(12).reshape(rows) + 5

    def total(params):
        return jnp.sum(network.stats(params)(x, jnp.ones(2), x0).target)

    expected = jax.value_and_grad(total)(params)
    monkeypatch.setattr(token_network, "MAX_DENSE_LOGITS", 0)
    found = jax.value_and_grad(total)(params)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found[1], expected[1])
    monkeypatch.setattr(masked_lm, "NEVER", 0.0)
    assert abs(total(params) - expected[0]) > 1e-2
