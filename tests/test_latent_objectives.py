"""The objectives of Gaussian diffusion over embeddings: their rows, their terms, and that they learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import small_config, small_corpus

from sedd import config as configs
from sedd.data.batches import Batch
from sedd.diffusion import keyed_random
from sedd.diffusion.gaussian.loss import noised, regression
from sedd.diffusion.gaussian.process import Gaussian
from sedd.diffusion.schedule import LogSNR, Power, Sqrt
from sedd.runtime import parallel
from sedd.training.objectives import make_objective
from sedd.training.optimizer import make_optimizer
from sedd.training.step import make_step

B, L = 8, 16
KINDS = {
    "cross_entropy": (),
    "memory": ("network.self_conditioning=true", "network.given_embedding=true"),
    "bound": ("training.loss=bound", "schedule.name=log_snr", "network.evidence_snr=1"),
    "regression": (
        *("training.loss=regression", "network.prediction=x0", "codec.normalised=false", "codec.rounding=head"),
        "network.self_conditioning=true",
    ),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("small"))


def config_of(corpus, *settings):
    settings = ("network.layers=1", "network.self_conditioning=false", *settings)
    return small_config(corpus, "process.name=gaussian", "codec.width=4", *settings)


def objective_of(corpus, kind, *settings):
    config = config_of(corpus, *KINDS[kind], *settings)
    _, schedule, network = configs.build(config, corpus.vocab_size)
    return make_objective(config, network, schedule), config


def random_params(objective):
    """No array of them is 0."""
    random, shapes = np.random.default_rng(0), jax.eval_shape(objective.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.3, leaf.shape), leaf.dtype), shapes)


def losses_of(objective, rows=slice(None), step=0):
    tokens = jax.random.randint(jax.random.key(9), (B, L), 0, objective.network.vocab_size)
    number = jnp.arange(B)[rows]
    return jax.jit(objective)(random_params(objective), Batch(tokens[rows], None), number, jax.random.key(step))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_losses_of_a_row_are_the_same_in_any_microbatch(corpus, kind):
    """Noise, given tokens and memory of a row follow from its global index and the step's key."""
    objective, _ = objective_of(corpus, kind)
    for step in (0, 1, 2):  # with and without memory
        whole = losses_of(objective, step=step)
        parts = [losses_of(objective, slice(start, start + 4), step) for start in (0, 4)]
        found = np.concatenate([part.loss for part in parts])
        np.testing.assert_allclose(found, whole.loss, rtol=2e-4, atol=1e-6)
        assert np.all(np.isfinite(found)) and len(set(np.asarray(whole.sigma).round(4))) == B


def test_half_of_the_steps_train_with_memory(corpus):
    """One coin for the whole batch. Control: without self-conditioning all steps have none."""
    objective, _ = objective_of(corpus, "memory")
    params = random_params(objective)
    z0 = jax.jit(objective.network.clean)(params, jnp.zeros((B, L), int))
    inputs = {"keys": None, "lengths": None, "given": None}

    @jax.jit
    def drawn(z0):
        keys = keyed_random.row_keys(jax.random.key(1), jnp.arange(B))
        return noised(objective.network.process, keys, z0, jnp.full(B, 1.0))

    x = drawn(z0)
    remembered = jax.jit(lambda key: objective.with_memory(params, x, jnp.full(B, 1.0), inputs, key).estimate)
    has = np.array([np.any(remembered(jax.random.key(step)) != 0, axis=(1, 2)) for step in range(40)])
    assert np.all(has == has[:, :1]) and 10 < has[:, 0].sum() < 30
    plain, _ = objective_of(corpus, "cross_entropy")
    assert plain.with_memory(params, x, jnp.full(B, 1.0), inputs, jax.random.key(0)) is x


def test_terms_are_named_and_add_up(corpus):
    for kind, names in {
        "bound": {"diffusion", "reconstruction"},
        "regression": {"squares", "rounding", "prior"},
    }.items():
        losses = losses_of(objective_of(corpus, kind)[0])
        assert losses.terms.keys() == names
        np.testing.assert_allclose(sum(losses.terms.values()), losses.loss, rtol=1e-5)
    objective, _ = objective_of(corpus, "cross_entropy")
    assert jax.eval_shape(lambda: losses_of(objective)).terms == {}


def test_given_tokens_are_not_scored(corpus):
    objective, _ = objective_of(corpus, "memory")
    losses = losses_of(objective)
    free, given = objective.free_and_given(jnp.arange(B), jax.random.key(0), L)
    assert np.array_equal(losses.count, free.sum(-1)) and np.any(losses.count < L) and np.all(free == ~given)


def test_regression_draws_what_the_published_code_draws():
    """z has the moments of the process around E[w]; the target is the start, at the first step the embedding."""
    process, schedule = Gaussian(2), Sqrt()
    z0 = jnp.broadcast_to(jnp.array([1.0, -0.5]), (4000, 1, 2))
    keys = keyed_random.row_keys(jax.random.key(0), jnp.arange(4000))
    drawn = regression(process, schedule, keys, z0, jnp.full(4000, 0.3), 2000)
    sigma, low = schedule.sigma(0.3), schedule.sigma(0.0)
    for found, at in ((drawn.x.z, sigma), (drawn.start, low)):
        np.testing.assert_allclose(found.mean((0, 1)), np.exp(-at / 2) * z0[0, 0], atol=0.05)
        np.testing.assert_allclose(found.var((0, 1)), -np.expm1(-at), rtol=0.1)
    assert np.array_equal(drawn.target, drawn.start)
    correlation = np.corrcoef(drawn.x.z[:, 0, 0], drawn.start[:, 0, 0])[0, 1]
    due = np.sqrt(np.exp(low - sigma) * np.expm1(-low) / np.expm1(-sigma))
    assert correlation == pytest.approx(due, abs=0.05)
    assert np.array_equal(regression(process, schedule, keys, z0, jnp.full(4000, 1e-4), 2000).target, z0)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS])
def test_training_lowers_the_loss(corpus, kind):
    """On one batch, sixty updates."""
    objective, config = objective_of(corpus, kind, "network.layers=2", "optimizer.learning_rate=0.01")
    mesh = parallel.make_mesh(config, jax.devices()[:1])
    init, step, _ = make_step(config, objective, make_optimizer(config.optimizer, 60), mesh)
    tokens = np.asarray(jax.random.randint(jax.random.key(9), (B, L), 0, 4))
    state, losses = init(), []
    for _ in range(60):
        state, metrics = step(state, Batch(tokens, None), {})
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5]), losses


def test_the_schedules_of_the_settings(corpus):
    assert isinstance(objective_of(corpus, "bound")[0].schedule, LogSNR)
    assert objective_of(corpus, "cross_entropy")[0].schedule == Power()
