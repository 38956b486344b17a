"""Training: the objective's noise, the optimisers, the sharded step, checkpoints and exact resume."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import small_config, small_corpus

import sedd
from sedd import config as configs
from sedd import parallel
from sedd.data.batches import batch
from sedd.training.checkpoint import Checkpoints
from sedd.training.fit import fit
from sedd.training.metrics import Metrics
from sedd.training.objective import Objective, strata
from sedd.training.optimizer import learning_rate, make_optimizer
from sedd.training.step import averaged, make_step


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("small"))


def parts(config, corpus):
    """The objective, the optimiser and the mesh of a config."""
    _, schedule, network = configs.build(config, corpus.vocab_size)
    training = config.training
    objective = Objective(network, schedule, training.batch_size, training.levels, training.min_time)
    return objective, make_optimizer(config.optimizer, training.steps), parallel.make_mesh(config)


def losses(config, corpus, steps=3):
    """The losses of the first steps."""
    init, step, _ = make_step(config, *parts(config, corpus))
    state, found = init(), []
    for k in range(steps):
        tokens = batch(corpus, config.data.block_length, config.training.batch_size, config.training.seed, k)
        state, metrics = step(state, tokens)
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.parametrize("count", [2, 8, 12, 64])
def test_strata_are_spread_over_every_slice(count):
    """A permutation; each half, quarter, ... of the batch has one example in each of its own strata."""
    found = strata(count)
    assert sorted(found) == list(range(count))
    for size in (count // 2, count // 4):
        if size and count % size == 0:
            slices = found.reshape(-1, size) // (count // size)
            assert all(len(set(part)) >= min(size, 2) for part in slices)
    if count & (count - 1) == 0:
        assert all(sorted(part // 2) == list(range(count // 2)) for part in found.reshape(2, -1))


def test_levels(corpus):
    """Times: one in each stratum. Counts: antithetic mates that mask L + 1 of 2 L, first ones stratified."""
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


def test_noise_does_not_depend_on_the_batch_around_a_row(corpus):
    """Any slice of the batch, told its global rows, has the losses that it has in the whole."""
    for levels in ("counts", "times"):
        config = small_config(corpus, f"training.levels={levels}", "network.dropout=0.3")
        objective, _, _ = parts(config, corpus)
        params = jax.jit(objective.network.init)(jax.random.key(1))
        tokens, key = batch(corpus, 16, 8, 0, 0), jax.random.key(5)
        loss = jax.jit(objective)
        whole = loss(params, tokens, jnp.arange(8), key)
        part = loss(params, tokens[4:6], jnp.arange(4, 6), key)
        np.testing.assert_allclose(part, whole[4:6], rtol=1e-5)


@pytest.mark.parametrize("levels", ["counts", "times"])
def test_devices_meshes_and_accumulation_change_nothing(corpus, levels):
    """The eight virtual devices as data, fsdp and model parallel, or with accumulation: the same losses."""
    settings = (f"training.levels={levels}", "network.dropout=0.1", "training.batch_size=32", "optimizer.name=adamw")
    settings += ("optimizer.learning_rate=0.001",)
    wanted = losses(small_config(corpus, *settings), corpus)
    for other in (("mesh.fsdp=2", "mesh.model=2"), ("training.accumulation=2",)):
        np.testing.assert_allclose(losses(small_config(corpus, *settings, *other), corpus), wanted, rtol=1e-5)
    assert len(set(wanted)) == 3


def test_large_arrays_are_split_by_their_path(corpus):
    """fsdp splits the width, model the padded vocabulary; the optimiser's copies follow; what is small stays whole."""
    config = small_config(corpus, "network.width=512", "network.heads=4", "mesh.fsdp=2", "mesh.model=2")
    _, _, places = make_step(config, *parts(config, corpus))
    specs = {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(where.spec)
        for path, where in jax.tree.leaves_with_path(places)
    }
    assert specs["params/trunk/block_0/up/kernel"] == ("fsdp", "model")
    assert specs["params/trunk/block_1/down/kernel"] == ("model", "fsdp")
    assert specs["params/head/norm/scale"] == ()
    moments = [spec for name, spec in specs.items() if name.startswith("optimizer") and name.endswith("up/kernel")]
    assert moments and all(spec == ("fsdp", "model") for spec in moments)


def test_the_pure_loss_under_pmap(corpus):
    """jax.pmap over the pure objective gives the gradient of the sharded step."""
    config = small_config(corpus, "network.dropout=0.1")
    objective, _, _ = parts(config, corpus)
    params = jax.jit(objective.network.init)(jax.random.key(1))
    tokens, rows, key = batch(corpus, 16, 8, 0, 0), jnp.arange(8), jax.random.key(7)

    def loss(params, tokens, rows):
        return jnp.sum(objective(params, tokens, rows, key)) / 8

    mesh = parallel.make_mesh(config)
    put = jax.device_put((tokens, rows), parallel.batch_sharding(mesh))
    sharded = jax.jit(jax.grad(loss))(params, *put)

    def summed(params, tokens, rows):
        return jax.lax.psum(jax.grad(loss)(params, tokens, rows), "devices")

    each = jax.pmap(summed, axis_name="devices", in_axes=(None, 0, 0), devices=jax.devices()[:4])
    mapped = jax.tree.map(lambda leaf: leaf[0], each(params, tokens.reshape(4, 2, 16), rows.reshape(4, 2)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), mapped, sharded)
    assert optax.tree.norm(mapped) > 0.1


@pytest.mark.parametrize("scan", [False, True])
def test_muon_takes_the_matrices_of_the_trunk(corpus, scan):
    """Scanned or not: orthogonal updates for trunk kernels, Adam for embedding, head, norms and biases."""
    config = small_config(corpus, f"network.scan={scan}", "optimizer.warmup_steps=1", "optimizer.decay=constant")
    objective, optimizer, _ = parts(config, corpus)
    params = jax.jit(objective.network.init)(jax.random.key(0))
    gradient = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(1), leaf.shape), params)
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    trunk = updates["trunk"]
    kernel = trunk["blocks"]["out"]["kernel"][1] if scan else trunk["block_1"]["out"]["kernel"]
    singular = np.linalg.svd(kernel, compute_uv=False) / config.optimizer.learning_rate
    assert singular.min() > 0.5 and singular.max() < 1.5
    for leaf in (trunk["embedding"], updates["head"]["out"]["kernel"], updates["head"]["norm"]["scale"]):
        np.testing.assert_allclose(np.abs(leaf), np.abs(leaf).mean(), rtol=1e-2)  # of one size, as Adam's first are
        assert np.abs(leaf).mean() > config.optimizer.adam_learning_rate


def test_learning_rate():
    """The first update takes 1/warmup of the peak; the decay ends above 0 at the last update."""
    config = configs.default().optimizer
    rate = learning_rate(config, 1.0, 100)
    np.testing.assert_allclose([rate(0), rate(1), rate(29)], [1 / 30, 2 / 30, 1], rtol=1e-6)
    np.testing.assert_allclose([rate(30), rate(65), rate(99), rate(100)], [1, 0.5, 1 / 70, 0], atol=1e-6)
    config.decay = "constant"
    assert learning_rate(config, 1.0, 100)(99) == 1


def test_average_of_parameters():
    """The reference's warm-up: min(decay, (1 + n) / (10 + n)) at update n."""
    ema = averaged({"w": jnp.float32(1.0)}, {"w": jnp.float32(0.0)}, 1, 0.9999)
    np.testing.assert_allclose(ema["w"], 2 / 11, rtol=1e-6)
    ema = averaged({"w": jnp.float32(1.0)}, {"w": jnp.float32(0.0)}, 10**6, 0.9999)
    np.testing.assert_allclose(ema["w"], 0.9999, rtol=1e-6)


def test_training_learns_and_reports(corpus, tmp_path):
    """The loss falls, every step is in the metrics, the held-out bound too, and the model is the average."""
    config = small_config(corpus, "training.steps=60", "training.ema_decay=0.9", "evaluation.every=30")
    model = sedd.train(config, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 61))
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    assert abs(steps[0]["loss"] - np.log(corpus.vocab_size)) < 0.3  # nats per token
    bounds = [record["validation_nats_per_token"] for record in records if "loss" not in record]
    assert len(bounds) == 2 and bounds[1] < bounds[0]
    again = sedd.train(config, tmp_path / "run")  # finished: nothing is left to do
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == len(records)


def saved(workdir, corpus):
    """All arrays of the newest checkpoint, by their paths."""
    config = configs.from_dict(json.loads((workdir / "config.json").read_text())["config"])
    init, _, where = make_step(config, *parts(config, corpus))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        state = checkpoints.restore(parallel.placed(jax.eval_shape(init), where))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(state)}


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_interrupted_and_started_again_is_uninterrupted(corpus, tmp_path, stop):
    """Through the command line, bit for bit: state, losses, and the exit status 0."""
    settings = [f"--config.{setting}" for setting in small_settings(corpus, "training.ema_decay=0.9")]

    def command(workdir):
        return [sys.executable, "-m", "sedd.cli", "train", f"--workdir={workdir}", *settings]

    environment = {**os.environ, "XLA_FLAGS": ""}
    subprocess.run(command(tmp_path / "whole"), env=environment, check=True, capture_output=True)
    broken = subprocess.Popen(command(tmp_path / "broken"), env=environment, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "broken/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    broken.send_signal(stop)
    assert "the same command continues" in broken.communicate(timeout=120)[1]
    assert broken.returncode == 0
    stopped = int(max(path.name for path in (tmp_path / "broken/checkpoints").iterdir()))
    assert 3 <= stopped < 400
    subprocess.run(command(tmp_path / "broken"), env=environment, check=True, capture_output=True)
    wanted, found = saved(tmp_path / "whole", corpus), saved(tmp_path / "broken", corpus)
    assert wanted.keys() == found.keys() and wanted[".step"] == found[".step"] == 400
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    of = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("whole", "broken")
    ]
    assert of[0] == of[1] and len(of[0]) == 400


def small_settings(corpus, *settings):
    from small import SETTINGS

    return (f"data.corpus={corpus.path}", *SETTINGS, "training.steps=400", *settings)


def test_restore_walks_back_to_the_newest_that_verifies(corpus, tmp_path, capsys):
    """A changed byte is noticed; without any whole checkpoint there is one clear line, and nothing starts anew."""
    config = small_config(corpus, "checkpoint.every=3")
    wanted = sedd.train(config, tmp_path / "run").params
    damage(tmp_path / "run/checkpoints/6")
    older = sedd.load(tmp_path / "run").params
    assert "step 6 is damaged; going back to step 3" in capsys.readouterr().err
    assert not np.array_equal(older["trunk"]["embedding"], wanted["trunk"]["embedding"])
    damage(tmp_path / "run/checkpoints/3")
    with pytest.raises(sedd.UserError, match="damaged, all of them"):
        sedd.load(tmp_path / "run")
    with pytest.raises(sedd.UserError, match="damaged, all of them"):
        fit(config, tmp_path / "run")


def damage(checkpoint):
    """Changes one byte in the middle of each file of arrays."""
    for file in [*checkpoint.glob("*/d/*"), *checkpoint.glob("*/ocdbt.process_0/d/*")]:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize(
    "change, named",
    [("training.seed=1", "training.seed"), ("data.block_length=8", "data.block_length"), ("network.width=32", "width")],
)
def test_another_run_in_the_folder_is_refused(corpus, tmp_path, change, named):
    fit(small_config(corpus), tmp_path / "run")
    before = (tmp_path / "run/config.json").read_text()
    with pytest.raises(sedd.UserError, match=f"another run.*{named}"):
        fit(small_config(corpus, change), tmp_path / "run")
    assert (tmp_path / "run/config.json").read_text() == before
    (tmp_path / "run/config.json").write_text(before[:-9])
    with pytest.raises(sedd.UserError, match="is damaged"):
        fit(small_config(corpus, change), tmp_path / "run")


def test_more_steps_continue_a_run(corpus, tmp_path):
    fit(small_config(corpus), tmp_path / "run")
    fit(small_config(corpus, "training.steps=9"), tmp_path / "run")
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 9


def test_a_folder_with_something_else_is_left_alone(corpus, tmp_path):
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(sedd.UserError, match="holds no run"):
        fit(small_config(corpus), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(sedd.UserError, match="step 7 is not finite"), Metrics(tmp_path / "m.jsonl", 0, 9, 8) as log:
        log.record(7, {"loss": jnp.float32(np.nan)})


def test_records_of_steps_to_be_taken_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 6)) + '{"step": 6, "lo')
    with Metrics(path, 3, 9, 8):
        pass
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
