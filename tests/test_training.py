"""The noise levels and the loss of the objective, the optimisers and the EMA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from small import MUON, parts, small_config, small_corpus

import sedd
from sedd import config as configs
from sedd.data.batches import Batch, batch
from sedd.diffusion.discrete.score import stats_from
from sedd.runtime import parallel
from sedd.training.optimizer import learning_rate, make_optimizer
from sedd.training.score_entropy import ScoreEntropy
from sedd.training.step import update_ema


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("small"))


def test_noise_levels_are_stratified_and_mask_counts_antithetic(corpus):
    """Times: one in each stratum. Mask counts: the rows of a pair mask L + 1 of 2 L, the even rows stratified."""
    config = small_config(corpus)
    objective, _, _ = parts(config, corpus)
    rows, length = jnp.arange(64), 16
    objective = dataclasses.replace(objective, batch_size=64)
    times = np.sort((np.asarray(objective.times(rows, jax.random.key(0))) - 1e-3) / (1 - 1e-3) * 64)
    np.testing.assert_array_equal(np.floor(times), np.arange(64))
    counts = np.concatenate([objective.counts(rows, jax.random.key(seed), length) for seed in range(50)])
    pairs = counts.reshape(-1, 2)
    assert (pairs.sum(1) == length + 1).all() and counts.min() == 1 and counts.max() == length
    np.testing.assert_array_equal(np.bincount(pairs[:, 0], minlength=length + 1)[1:], 100)


def loss_of(objective):
    """The loss of each row, as a function of (parameters, tokens, rows, key) and the lengths."""
    return jax.jit(
        lambda params, tokens, rows, key, lengths=None: objective(params, Batch(tokens, lengths), rows, key).loss
    )


@pytest.mark.slow
def test_loss_of_a_row_is_independent_of_the_batch(corpus):
    """Any slice of the batch, with its global row indices, has the losses that it has in the full batch."""
    for noise_sampling in ("mask_count", "time"):
        config = small_config(corpus, f"training.noise_sampling={noise_sampling}", "network.dropout=0.3")
        objective, _, _ = parts(config, corpus)
        params = jax.jit(objective.network.init)(jax.random.key(1))
        tokens, key = batch(corpus, 16, 8, 0, 0).tokens, jax.random.key(5)
        loss = loss_of(objective)
        full = loss(params, tokens, jnp.arange(8), key)
        part = loss(params, tokens[4:6], jnp.arange(4, 6), key)
        np.testing.assert_allclose(part, full[4:6], rtol=1e-5)


@pytest.mark.parametrize("rows", [32, 4])
@pytest.mark.parametrize("schedule", [sedd.LogLinear(), sedd.Geometric()], ids=["log-linear", "geometric"])
def test_capacity_holds_the_masks_of_the_rows_of_a_device(schedule, rows):
    """Over 2,000 batches, with little to spare. Control: the mean and two standard deviations do not hold them."""
    count, length = 32, 64
    objective = dataclasses.replace(ScoreEntropy(Same(), schedule, count), min_time=1e-3)
    keys = jax.random.split(jax.random.key(0), 2000)
    times = jax.jit(jax.vmap(lambda key: objective.times(jnp.arange(count), key)))(keys)
    masked = np.random.default_rng(0).binomial(length, 1 - np.asarray(schedule.alpha(times)))
    of_devices = masked.reshape(len(keys), -1, rows).sum(-1)
    highest = of_devices[:, of_devices.mean(0).argmax()]
    mean, deviation = highest.mean(), highest.std()
    assert of_devices.max() <= objective.capacity(rows, length) <= min(mean + 7 * deviation + 2, rows * length)
    assert of_devices.max() > mean + 2 * deviation


@pytest.mark.parametrize("rows", [3, 4, 1])
def test_noise_by_times_on_devices_that_share_the_rows_evenly_or_not(corpus, rows):
    """The losses are those of one device; two devices take two rows each of four."""
    config = small_config(corpus, "network.layers=1", "training.noise_sampling=time")
    objective = dataclasses.replace(parts(config, corpus)[0], batch_size=rows)
    params = jax.jit(objective.network.init)(jax.random.key(1))
    tokens, mesh = batch(corpus, 16, 4, 0, 0).tokens[:rows], parallel.make_mesh(config, jax.devices()[:2])

    def loss(params):
        return objective(params, Batch(tokens, None), jnp.arange(rows), jax.random.key(0)).loss

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        on_two = jax.jit(lambda params: loss(params), out_shardings=NamedSharding(mesh, P()))(params)
    np.testing.assert_allclose(on_two, jax.jit(loss)(params), rtol=1e-5)


class Same:
    """A stand-in for a network that knows that the tokens of a row are equal, 0 or 1. Its bound is log 2."""

    process, given_embedding, block_of_generation = sedd.Absorbing(2), False, None

    def stats(self, params, keys, lengths, given, masked_pairs):
        assert given is None

        def denoiser(x, sigma, positions):
            unmasked = (jnp.arange(x.shape[1]) < lengths[:, None]) & (x != self.process.mask_id)
            ones = jnp.sum(unmasked & (x == 1), axis=1) + 1e-9
            zeros = jnp.sum(unmasked & (x == 0), axis=1) + 1e-9
            posterior = jnp.stack([zeros, ones], axis=-1) / (zeros + ones)[:, None]
            return jnp.broadcast_to(jnp.log(posterior)[:, None], (*x.shape, 2))

        return stats_from(self.process, denoiser)


def test_loss_of_ragged_rows_is_unbiased_for_each_length():
    """Pairs of rows of 5 and of 3 tokens in a block of 8: the mean over the noise levels is log 2 for each. Control:
    with mask counts for 8 tokens it is not, since most of them mask every token of a row."""
    count, length = 30, 8
    objective = ScoreEntropy(Same(), None, count, noise_sampling="mask_count")
    lengths = jnp.tile(jnp.array([5, 3]), count // 2)
    tokens, rows, key = jnp.ones((count, length), jnp.int32), jnp.arange(count), jax.random.key(0)
    loss = jax.jit(objective)({}, Batch(tokens, lengths), rows, key).loss
    np.testing.assert_allclose([loss[::2].mean(), loss[1::2].mean()], np.log(2), rtol=1e-4)
    naive = dataclasses.replace(objective)
    object.__setattr__(naive, "counts", lambda rows, key, *_: objective.counts(rows, key, length))
    wrong = jax.jit(lambda *args: naive(*args))({}, Batch(tokens, lengths), rows, key).loss
    assert wrong[::2].mean() > 1.3 * np.log(2) and wrong[1::2].mean() > 1.3 * np.log(2)


def test_pair_of_ragged_rows_masks_at_most_one_more_than_the_block_length():
    """Each row masks at least one and at most all of its tokens; full rows have the counts of a batch without lengths.
    Control: independent counts mask more than L + 1 tokens of a pair."""
    length, count = 37, 4096
    objective = ScoreEntropy(Same(), None, count, noise_sampling="mask_count")
    random, rows, key = np.random.default_rng(0), jnp.arange(count), jax.random.key(1)
    lengths = random.integers(1, length + 1, count)
    counts = np.asarray(objective.counts(rows, key, jnp.asarray(lengths)))
    assert (counts >= 1).all() and (counts <= lengths).all()
    assert counts.reshape(-1, 2).sum(1).max() <= length + 1
    independent = 1 + np.floor(random.random(count) * lengths).astype(int)
    assert independent.reshape(-1, 2).sum(1).max() > length + 1
    full = objective.counts(rows, key, jnp.full(count, length))
    np.testing.assert_array_equal(full, objective.counts(rows, key, length))
    assert (np.asarray(full).reshape(-1, 2).sum(1) == length + 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("noise_sampling", ["time", "mask_count"])
def test_padding_does_not_affect_the_loss(corpus, noise_sampling):
    """Other padding gives the same loss, as does the row without its padding. Control: without lengths it differs."""
    objective, _, _ = parts(small_config(corpus, f"training.noise_sampling={noise_sampling}"), corpus)
    params = jax.jit(objective.network.init)(jax.random.key(1))
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape), params)
    tokens, rows, key = batch(corpus, 16, 8, 0, 0).tokens, jnp.arange(8), jax.random.key(5)
    lengths = jnp.array([9, 9, 4, 9, 1, 9, 9, 2])
    other = jnp.where(jnp.arange(16) < lengths[:, None], tokens, (tokens + 1) % corpus.vocab_size)
    loss = loss_of(objective)
    expected = loss(params, tokens, rows, key, lengths)
    np.testing.assert_array_equal(loss(params, other, rows, key, lengths), expected)
    assert np.sum(expected) > 0
    if noise_sampling == "mask_count":
        np.testing.assert_allclose(loss(params, tokens[:, :9], rows, key, lengths), expected, rtol=1e-4)
        difference = loss(params, other, rows, key) - loss(params, tokens, rows, key)
        assert np.abs(difference).max() > 0.01


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_muon_updates_the_matrices_of_the_trunk(corpus, scan):
    """Scanned or unrolled: orthogonal updates of the trunk's kernels; Adam for embedding, head, norms and biases."""
    constant = ("optimizer.warmup_steps=1", "optimizer.decay=constant")
    config = small_config(corpus, *MUON, *constant, f"network.scan={scan}")
    objective, optimizer, _ = parts(config, corpus)
    params = jax.jit(objective.network.init)(jax.random.key(0))
    gradient = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(1), leaf.shape), params)
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    trunk = updates["trunk"]
    kernel = trunk["blocks"]["out"]["kernel"][1] if scan else trunk["block_1"]["out"]["kernel"]
    singular = np.linalg.svd(kernel, compute_uv=False) / config.optimizer.learning_rate
    assert singular.min() > 0.5 and singular.max() < 1.5
    for leaf in (trunk["embedding"], updates["head"]["out"]["kernel"], updates["head"]["norm"]["scale"]):
        np.testing.assert_allclose(
            np.abs(leaf), np.abs(leaf).mean(), rtol=1e-2
        )  # the first updates of Adam have equal magnitudes
        assert np.abs(leaf).mean() > config.optimizer.adam_learning_rate


@pytest.mark.parametrize("layers", [(), (2,)], ids=["unrolled", "scanned"])
def test_muon_updates_the_qkv_kernel_as_one_matrix(layers):
    """Stored as [W, 3, W], it gets the update of the same numbers stored as [W, 3 W]."""
    optimizer = make_optimizer(configs.default().optimizer, 100)

    def update(name, shape):
        kernel, gradient = jax.random.normal(jax.random.key(0), (2, *layers, *shape))
        params, gradient = ({"block": {name: {"kernel": array}}} for array in (kernel, gradient))
        return optimizer.update(gradient, optimizer.init(params), params)[0]["block"][name]["kernel"]

    qkv, matrix = update("qkv", (8, 3, 8)), update("up", (8, 24))
    np.testing.assert_array_equal(qkv.reshape(matrix.shape), matrix)


def test_learning_rate_warms_up_and_decays():
    """The first update has 1/warmup of the peak; the decay is above 0 at the last update."""
    config = configs.default().optimizer
    rate = learning_rate(config, 1.0, 100)
    np.testing.assert_allclose([rate(0), rate(1), rate(29)], [1 / 30, 2 / 30, 1], rtol=1e-6)
    np.testing.assert_allclose([rate(30), rate(65), rate(99), rate(100)], [1, 0.5, 1 / 70, 0], atol=1e-6)
    config.decay = "constant"
    assert learning_rate(config, 1.0, 100)(99) == 1


def test_ema_has_the_warmup_of_the_reference():
    """Decay min(decay, (1 + n) / (10 + n)) at update n."""
    ema = update_ema({"w": jnp.float32(1.0)}, {"w": jnp.float32(0.0)}, 1, 0.9999)
    np.testing.assert_allclose(ema["w"], 2 / 11, rtol=1e-6)
    ema = update_ema({"w": jnp.float32(1.0)}, {"w": jnp.float32(0.0)}, 10**6, 0.9999)
    np.testing.assert_allclose(ema["w"], 0.9999, rtol=1e-6)
