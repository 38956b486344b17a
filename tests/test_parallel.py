"""Losses are independent of the devices: runs on 1, 2, 4 and 8 of them, with and without accumulation."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from small import MUON, SETTINGS, name_of, parts, small_config, small_corpus

from sedd import config as configs
from sedd.data.batches import Batch, batch
from sedd.errors import UserError
from sedd.runtime import parallel, trees
from sedd.training.step import init_state, make_step
from sedd.training.token_objective import strata

ROWS = 32
DROPOUT = ("network.dropout=0.1", "network.scan=true", f"training.batch_size={ROWS}")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("small"))


def paper_config(corpus):
    """The paper's recipe on a network of width 16: unnormalised scores, times, AdamW, an EMA, dropout 0.1."""
    settings = (f"data.corpus={corpus.path}", *SETTINGS, *DROPOUT, "network.dtype=float32", "evaluation.every=0")
    return configs.override(configs.paper(), [*settings, "training.steps=10", "optimizer.learning_rate=1e-3"])


def default_config(corpus):
    """The default recipe on one layer: log r, mask counts, Muon at its full learning rate; with dropout."""
    return small_config(corpus, *MUON, *DROPOUT, "network.layers=1", "network.scan=false", "training.steps=100")


def gaussian_config(corpus):
    """Gaussian diffusion with all that its network can take, under AdamW; with dropout."""
    settings = ("network.self_conditioning=true", "network.given_embedding=true", "codec.width=4")
    return small_config(corpus, "process.name=gaussian", *settings, *DROPOUT, "training.steps=100")


def compiled(config, corpus, devices):
    """Returns the step compiled for a number of devices, its mesh and its shardings."""
    objective, optimizer, mesh = parts(config, corpus, devices)
    init, step, shardings = make_step(config, objective, optimizer, mesh)
    tokens = jax.ShapeDtypeStruct((ROWS, config.data.block_length), jnp.int32)
    return step.lower(jax.eval_shape(init), Batch(tokens, None), {}).compile(), mesh, shardings


STARTS, PROGRAMS = {}, {}  # by recipe; and by its devices and microbatches, without a mesh


def start(recipe, corpus):
    """Returns the initial state on the host. It does not depend on the devices, and is created once."""
    if recipe not in STARTS:
        config = recipe(corpus)
        objective, optimizer, _ = parts(config, corpus, 1)
        STARTS[recipe] = jax.device_get(jax.jit(lambda: init_state(config, objective, optimizer))())
    return STARTS[recipe]


def losses(recipe, corpus, devices, accumulation=1, mesh=None, steps=10, order=slice(None)):
    """Returns the losses of the first steps and the token ids of their batches."""
    config = recipe(corpus)
    config.training.accumulation = accumulation
    config.mesh.update(mesh or {})
    key = recipe, devices, accumulation
    program = PROGRAMS[key] if mesh is None and key in PROGRAMS else compiled(config, corpus, devices)
    if mesh is None:
        PROGRAMS[key] = program
    step, mesh, shardings = program
    state, values, ids = jax.device_put(start(recipe, corpus), shardings), [], []
    for k in range(steps):
        rows = batch(corpus, config.data.block_length, ROWS, config.training.seed, k)
        put = jax.device_put(Batch(rows.tokens[order], rows.lengths), parallel.batch_sharding(mesh))
        assert len(put.tokens.sharding.device_set) == devices
        ids.append(np.asarray(put.tokens))
        state, metrics = step(state, put, {})
        values.append(float(metrics["loss"]))
    return np.array(values), np.array(ids)


@pytest.fixture(scope="module")
def on_one_device(corpus):
    """Returns the losses and ids of a recipe on one device."""
    return functools.cache(lambda recipe: losses(recipe, corpus, 1))


@pytest.mark.parametrize(
    "recipe, tolerance, devices, accumulation",
    [
        pytest.param(default_config, 1e-4, 4, 2, marks=pytest.mark.smoke),
        pytest.param(default_config, 1e-4, 8, 1, marks=pytest.mark.slow),
        pytest.param(gaussian_config, 1e-5, 4, 2, marks=pytest.mark.slow),
        pytest.param(paper_config, 1e-5, 4, 2, marks=pytest.mark.slow),
    ],
    ids=["default on 4", "default on 8", "gaussian on 4", "paper on 4"],
)
def test_losses_are_independent_of_devices_and_microbatches(
    corpus, on_one_device, recipe, tolerance, devices, accumulation
):
    """Ten steps, with dropout, on the same ids; in one microbatch and in two."""
    values, ids = losses(recipe, corpus, devices, accumulation)
    expected, expected_ids = on_one_device(recipe)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(values, expected, rtol=tolerance)


@pytest.mark.parametrize("recipe", [default_config, pytest.param(paper_config, marks=pytest.mark.slow)], ids=name_of)
def test_other_noise_gives_other_losses(corpus, on_one_device, recipe):
    """Control: if each row has the noise of another row, the losses differ by much more than the tolerance."""
    values, _ = losses(recipe, corpus, 1, order=slice(None, None, -1))
    assert np.abs(values / on_one_device(recipe)[0] - 1).max() > 1e-3


def eight_heads(corpus):
    """The paper's recipe with eight heads, one for each device."""
    return configs.override(paper_config(corpus), ["network.heads=8"])


@pytest.fixture(scope="module")
def eight_heads_on_one_device(corpus):
    return losses(eight_heads, corpus, 1)[0]


@pytest.fixture
def all_split(monkeypatch):
    """Lowers MIN_SHARD_BYTES, so that all parameters of the table are split."""
    monkeypatch.setattr(parallel, "MIN_SHARD_BYTES", 64)


MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (1, 4, 2), (2, 2, 2)]  # each axis alone, two of different sizes, all


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_gives_the_same_losses(corpus, all_split, eight_heads_on_one_device, sizes):
    """Ten steps of the paper's recipe; the parameters, their EMA and both moments are split."""
    values, _ = losses(eight_heads, corpus, math.prod(sizes), mesh=dict(zip(parallel.AXES, sizes)))
    np.testing.assert_allclose(values, eight_heads_on_one_device, rtol=1e-5)
    state = start(eight_heads, corpus)
    shardings = parallel.shardings(AbstractMesh(sizes, parallel.AXES), state)
    split = jax.tree.map(lambda leaf, sharding: sharding.shard_shape(leaf.shape) != leaf.shape, state, shardings)
    # Eight matrices; model splits all but the two of the modulation, which have no axis of that kind.
    kernels = 8 if sizes[1] > 1 else 6 if sizes[2] > 1 else 0
    assert sum(jax.tree.leaves(split.params)) == sum(jax.tree.leaves(split.ema)) == kernels
    assert sum(jax.tree.leaves(split.optimizer)) == 2 * kernels


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, tolerance, sizes",
    [
        (("network.remat=full",), 1e-5, (1, 8, 1)),
        (("network.remat=dots", "network.scan=false"), 1e-5, (2, 2, 2)),
        (("network.remat=dots", "training.accumulation=2"), 1e-5, (1, 8, 1)),
        (("network.remat=full", "training.accumulation=2", "network.dtype=bfloat16"), 1e-3, (2, 2, 2)),
    ],
    ids=["full", "unrolled dots", "accumulated dots", "accumulated full in bfloat16"],
)
def test_recomputation_and_accumulation_on_a_mesh_give_the_same_losses(
    corpus, all_split, eight_heads_on_one_device, settings, tolerance, sizes
):
    """Compared with one device, without recomputation or accumulation, in float32."""

    def recipe(corpus):
        return configs.override(eight_heads(corpus), list(settings))

    def unrolled(corpus):  # its initial parameters differ
        return configs.override(eight_heads(corpus), ["network.scan=false"])

    expected = eight_heads_on_one_device if recipe(corpus).network.scan else losses(unrolled, corpus, 1)[0]
    values, _ = losses(recipe, corpus, 8, recipe(corpus).training.accumulation, dict(zip(parallel.AXES, sizes)))
    np.testing.assert_allclose(values, expected, rtol=tolerance)


@pytest.mark.slow
def test_padded_rows_on_devices_and_in_microbatches(corpus):
    """The loss is a mean over valid tokens: log V for an untrained network."""
    config = default_config(corpus)
    config.training.accumulation = 2
    objective, optimizer, mesh = parts(config, corpus, 8)
    _, step, shardings = make_step(config, objective, optimizer, mesh)
    lengths = np.random.default_rng(0).integers(1, 17, ROWS).astype(np.int32)
    rows = Batch(batch(corpus, 16, ROWS, 0, 0).tokens, lengths)
    state = jax.device_put(start(default_config, corpus), shardings)
    rows = jax.device_put(rows, parallel.batch_sharding(mesh))
    _, metrics = step(state, rows, {})
    np.testing.assert_allclose(metrics["loss"], np.log(corpus.vocab_size), rtol=1e-4)


def is_stratified(levels, slices):
    """True if each contiguous slice of n rows has one level in each of n equal parts of [0, 1)."""
    parts = np.floor(np.sort(levels.reshape(slices, -1)) * (levels.size // slices)).astype(int)
    return (parts == np.arange(levels.size // slices)).all()


@pytest.mark.parametrize("slices", [1, 2, 4, 8])
def test_noise_levels_are_stratified_in_every_slice_of_a_batch(corpus, slices):
    """On every device and in every microbatch: strata, times, mask counts. Controls: strata in order, random levels."""
    count, length, key = 64, 64, jax.random.key(3)
    assert is_stratified(strata(count) / count, slices)
    config = default_config(corpus)
    objective = dataclasses.replace(parts(config, corpus, 1)[0], batch_size=count)
    times = (np.asarray(objective.times(jnp.arange(count), key)) - 1e-3) / (1 - 1e-3)
    assert is_stratified(times, slices)
    counts = np.asarray(objective.counts(jnp.arange(count), key, length))
    assert is_stratified((counts[::2] - 1) / length, slices)  # k - 1 of L, of the first rows of the pairs
    assert is_stratified((length - counts[1::2]) / length, slices)
    assert slices == 1 or not is_stratified(np.arange(count) / count, slices)
    assert not is_stratified(np.random.default_rng(0).random(count), slices)


@pytest.mark.parametrize("count", [2, 6, 12, 20, 64])
def test_strata_are_a_balanced_permutation(count):
    """The means of the two halves of a batch agree, also if its size is not a power of two."""
    order = strata(count)
    assert sorted(order) == list(range(count))
    if count % 4 == 0:
        halves = order.reshape(2, -1)
        assert (np.abs(halves.mean(1) - (count - 1) / 2) <= 1).all()
        assert abs(np.arange(count).reshape(2, -1).mean(1) - (count - 1) / 2).min() > 1  # control: in order


def test_large_arrays_are_split_by_their_path(corpus):
    """fsdp splits the width, model the padded vocabulary; optimiser state likewise; small arrays are replicated."""
    config = small_config(corpus, "network.width=512", "network.heads=4", "mesh.fsdp=2", "mesh.model=2")
    _, _, shardings = make_step(config, *parts(config, corpus, 8))
    specs = {name: tuple(sharding.spec) for name, sharding in trees.named(shardings).items()}
    assert specs["params/trunk/block_0/qkv/kernel"] == ("fsdp", None, "model")
    assert specs["params/trunk/block_0/up/kernel"] == ("fsdp", "model")
    assert specs["params/trunk/block_1/down/kernel"] == ("model", "fsdp")
    assert specs["params/head/norm/scale"] == ()
    moments = [spec for name, spec in specs.items() if name.startswith("optimizer") and name.endswith("up/kernel")]
    assert moments and all(spec == ("fsdp", "model") for spec in moments)


@pytest.mark.parametrize(
    "setting, message",
    [
        ("mesh.model=3", "does not fit the 8 available devices"),
        ("mesh.data=4", "does not fit the 8 available devices"),
        ("mesh.data=0", "does not fit the 8 available devices"),
        ("mesh.model=8", "mesh.model=8 does not divide network.heads=2"),
        ("training.batch_size=12", "12 rows .* cannot be split over 8 devices"),
        ("training.accumulation=2", "4 rows .* cannot be split over 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(corpus, setting, message):
    with pytest.raises(UserError, match=message) as caught:
        parallel.make_mesh(small_config(corpus, setting))
    assert "\n" not in str(caught.value)
    assert parallel.make_mesh(small_config(corpus), jax.devices()[2:4]).devices.tolist() == [
        [[jax.devices()[2]]],
        [[jax.devices()[3]]],
    ]
