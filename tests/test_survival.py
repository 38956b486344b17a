"""Fault tolerance of a run: kills at any moment, damaged checkpoints, a full disk, losses that are not finite."""

import contextlib
import dataclasses
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import jobs
import numpy as np
import pytest
from etils import epath
from small import encoder_config, encoder_corpus, name_of, parts, small_config, small_corpus

import sedd
from sedd.data.batches import batch
from sedd.runtime import folders, parallel
from sedd.training.checkpoint import Checkpoints, restore_params, steps_saved
from sedd.training.fit import fit
from sedd.training.guard import NONFINITE
from sedd.training.score_entropy import ScoreEntropy
from sedd.training.step import TrainState, make_step


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("small"))


def state_of(value, step, width=4, dtype=jnp.float32):
    """A small state on one device."""
    params = {"layer": {"kernel": jnp.full((width, 3), value, dtype), "bias": jnp.arange(3.0)}}
    return TrainState(jnp.int32(step), params, jax.tree.map(lambda leaf: leaf + 1, params), {"count": jnp.int32(step)})


def like(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def checkpoints(folder, corpus=None, **settings):
    config = sedd.config.default().checkpoint
    config.update(settings)
    return Checkpoints(epath.Path(folder), config)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """Checkpoints of steps 1 and 2, to copy and damage."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with checkpoints(folder) as saved:
        saved.save(state_of(1.0, 1))
        saved.save(state_of(2.0, 2))
    return folder


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(folder):
    file = largest(folder / "2/params")
    os.truncate(file, file.stat().st_size // 2)


def flip(folder):
    """Flips one bit in each file of the arrays of the parameters."""
    for file in (folder / "2/params").rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def empty(folder):
    shutil.rmtree(folder / "2")
    (folder / "2").mkdir()


def no_manifest(folder):
    shutil.rmtree(folder / "2/manifest")


def half_manifest(folder):
    file = largest(folder / "2/manifest")
    file.write_text(file.read_text()[:-20])


def no_arrays(folder):
    shutil.rmtree(folder / "2/params")


def another(folder, **other):
    """Replaces the checkpoint by that of another model."""
    shutil.rmtree(folder / "2")
    with checkpoints(folder.parent / "other") as saved:
        saved.save(state_of(2.0, 2, **other))
    shutil.copytree(folder.parent / "other/2", folder / "2")


def narrower(folder):
    another(folder, dtype=jnp.bfloat16)


def wider(folder):
    another(folder, width=5)


def renamed(folder):
    shutil.move(folder / "2", folder / "7")


def swapped_arrays(folder):
    """Replaces the arrays by those of another step: all can be read, and none is the one that was written."""
    for name in ("params", "ema"):
        shutil.rmtree(folder / "2" / name)
        shutil.copytree(folder / "1" / name, folder / "2" / name)


FAULTS = {
    truncate: "is damaged",
    flip: "is damaged",
    empty: "is incomplete \\(it has no manifest\\)",
    no_manifest: "is incomplete \\(it has no manifest\\)",
    half_manifest: "is damaged",
    no_arrays: "is damaged",
    narrower: "is another model's \\(ema/layer/kernel is bfloat16\\[4, 3\\] there, float32\\[4, 3\\] here\\)",
    wider: "is another model's \\(ema/layer/kernel is float32\\[5, 3\\] there, float32\\[4, 3\\] here\\)",
    renamed: "is that of step 2, renamed",
    swapped_arrays: "is damaged \\(ema/layer/kernel is not what was written\\)",
}


@pytest.mark.parametrize("fault", FAULTS, ids=name_of)
def test_restore_skips_an_unusable_checkpoint_and_keeps_it_renamed(two_steps, tmp_path, capfd, monkeypatch, fault):
    """The previous step is restored, with one line; the renamed checkpoint's step can be saved again. No other thread
    prints an error."""
    unraisable_errors = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: unraisable_errors.append(str(unraisable.exc_value)))
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps, folder)
    fault(folder)
    unusable = max(steps_saved(epath.Path(folder)))
    params = restore_params(epath.Path(folder), like(state_of(0.0, 0).params), ema=False)
    assert params["layer"]["kernel"][0, 0] == 1.0 and sorted(os.listdir(folder)) == ["1", str(unusable)]
    capfd.readouterr()
    with checkpoints(folder) as saved:
        restored = saved.restore(like(state_of(0.0, 0)))
        assert int(restored.step) == 1 and restored.params["layer"]["kernel"][0, 0] == 1.0
        saved.save(state_of(3.0, unusable))
    err = capfd.readouterr().err
    assert [line for line in err.splitlines() if line] == [
        line for line in err.splitlines() if line.startswith("sedd: ")
    ]
    assert sorted(os.listdir(folder)) == ["1", str(unusable), f"damaged-{unusable}"]
    pattern = f"the checkpoint of step {unusable} {FAULTS[fault]}.*; going back to step 1\\n"
    assert re.search(pattern, err)
    ema = restore_params(epath.Path(folder), like(state_of(0.0, 0).params), ema=True)
    assert ema["layer"]["kernel"][0, 0] == 4.0
    gc.collect()
    assert unraisable_errors == []


def test_reader_retries_when_a_run_removes_the_checkpoint_it_reads(two_steps, tmp_path, monkeypatch):
    """The listed steps are gone, and there is a newer one. Control: without a newer one it is an error."""
    folder = epath.Path(tmp_path / "checkpoints")
    shutil.copytree(two_steps, folder)
    (folder / "1").rmtree()
    listed = [[1], [2]]
    monkeypatch.setattr("sedd.training.checkpoint.steps_saved", lambda _: listed.pop(0) if len(listed) > 1 else [2])
    assert restore_params(folder, like(state_of(0.0, 0).params), ema=False)["layer"]["kernel"][0, 0] == 2.0
    monkeypatch.setattr("sedd.training.checkpoint.steps_saved", lambda _: [1])
    with pytest.raises(sedd.UserError, match="no checkpoint in .* can be used: that of step 1"):
        restore_params(folder, like(state_of(0.0, 0).params), ema=False)


@pytest.mark.smoke
def test_restore_uses_the_newest_checkpoint_without_a_fault(two_steps, tmp_path, capfd):
    """The control. Files of an interrupted save are removed by the next save, not by a reader."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps, folder)
    leftover = folder / "3.orbax-checkpoint-tmp"
    shutil.copytree(folder / "2", leftover)
    assert restore_params(epath.Path(folder), like(state_of(0.0, 0).params), ema=False)["layer"]["kernel"][0, 0] == 2.0
    assert leftover.exists()
    with checkpoints(folder) as saved:
        assert int(saved.restore(like(state_of(0.0, 0))).step) == 2
        saved.save(state_of(3.0, 3))
    assert sorted(os.listdir(folder)) == ["2", "3"] and "sedd:" not in capfd.readouterr().err


def test_restore_raises_if_all_checkpoints_are_damaged(two_steps, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps, folder)
    for step in ("1", "2"):
        shutil.rmtree(folder / step / "manifest")
    with pytest.raises(sedd.UserError, match="can be used: that of step 2 is incomplete .*; that of step 1") as caught:
        checkpoints(folder).restore(like(state_of(0.0, 0)))
    assert "\n" not in str(caught.value) and sorted(os.listdir(folder)) == ["1", "2"]


def test_newest_periodic_and_best_checkpoints_are_kept(tmp_path):
    """The newest `keep`, those of every `keep_every` steps, and the one with the lowest bound."""
    bounds = {2: 3.0, 3: 2.5, 4: 1.0, 5: 2.0, 6: 1.5, 7: 1.2, 8: 1.1}
    with checkpoints(tmp_path / "checkpoints", keep=2, keep_every=3, keep_best=True) as saved:
        for step, bound in bounds.items():
            saved.save(state_of(float(step), step), bound)
    assert steps_saved(epath.Path(tmp_path / "checkpoints")) == [3, 4, 6, 7, 8]
    with checkpoints(tmp_path / "checkpoints", keep=1, keep_best=True) as saved:  # another process resumes
        saved.save(state_of(9.0, 9), 1.4)
    assert steps_saved(epath.Path(tmp_path / "checkpoints")) == [4, 9]


def on_a_small_disk(tmp_path, size):
    """Mounts a file system of `size` KiB, or skips the test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a tmpfs needs root")
    return folder


def fill_up(file):
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as out:
        while True:
            out.write(bytes(4096))


@pytest.mark.slow
def test_run_resumes_after_a_full_disk(corpus, tmp_path, capfd):
    """One error line; once there is space the same command resumes from the last checkpoint."""
    folder = on_a_small_disk(tmp_path, 8192)
    try:
        config = small_config(corpus, "checkpoint.every=2", "network.width=32", "training.steps=8")
        ballast = folder / "ballast"
        real = Checkpoints.save

        def fill(self, state, *bound):
            if int(state.step) == 4:
                self._manager.wait_until_finished()
                fill_up(ballast)
            real(self, state, *bound)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Checkpoints, "save", fill)
            with pytest.raises(sedd.UserError, match="could not be written .*; earlier ones are kept") as caught:
                fit(config, folder / "run")
        assert "No space left" in str(caught.value) and "\n" not in str(caught.value)
        assert os.listdir(folder / "run/checkpoints") == ["2"]
        ballast.unlink()
        assert fit(config, folder / "run").steps == 6
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def poisoned(at, times=1):
    """An objective whose loss of row 5 is NaN at steps `at`, ..., `at + times - 1`."""

    class Poisoned(ScoreEntropy):
        def __call__(self, params, batch, rows, key):
            losses = super().__call__(params, batch, rows, key)
            keys = [jax.random.fold_in(jax.random.key(0), step - 1) for step in range(at, at + times)]
            now = jnp.any(jnp.stack([jnp.all(jax.random.key_data(key) == jax.random.key_data(k)) for k in keys]))
            return dataclasses.replace(losses, loss=jnp.where(now & (rows == 5), jnp.nan, losses.loss))

    def poisoned_objective(config, network, schedule):
        training = config.training
        return Poisoned(network, schedule, training.batch_size, training.min_time, training.noise_sampling)

    return poisoned_objective


@pytest.mark.slow
def test_nonfinite_loss_stops_the_run(corpus, tmp_path, monkeypatch):
    """Step, quantity, example and sigma are recorded. The checkpoints are finite, and the run resumes."""
    config = small_config(corpus, "checkpoint.every=2", "training.noise_sampling=time", "training.steps=7")
    with monkeypatch.context() as patch:
        patch.setattr("sedd.training.run.make_objective", poisoned(6))
        with pytest.raises(sedd.UserError, match="the loss of step 6 is not finite .*nonfinite.jsonl") as caught:
            fit(config, tmp_path / "run")
    assert "\n" not in str(caught.value)
    (record,) = map(json.loads, (tmp_path / "run" / NONFINITE).read_text().splitlines())
    assert record["step"] == 6 and record["quantity"] == "the loss" and record["examples"] == [40, 47]
    (row,) = record["rows"]
    objective = parts(config, corpus)[0]
    key = jax.random.fold_in(jax.random.key(0), 5)
    assert row["example"] == 45 and row["loss"] == "nan"
    sigma = objective.schedule.sigma(objective.times(jnp.arange(8), key))[5]
    np.testing.assert_allclose(row["sigma"], sigma, rtol=1e-5)
    assert steps_saved(epath.Path(tmp_path / "run/checkpoints")) == [2, 4]
    assert fit(config, tmp_path / "run").steps == 3


@pytest.mark.slow
def test_nonfinite_steps_are_skipped_up_to_the_limit(corpus, tmp_path, monkeypatch, capsys):
    """A skipped step has a record that says so; one more than the limit stops the run."""
    settings = (
        "training.noise_sampling=time",
        "training.steps=6",
        "training.ema_decay=0.9",
        "optimizer.decay=constant",
    )
    monkeypatch.setattr("sedd.training.run.make_objective", poisoned(3, times=2))
    with pytest.raises(sedd.UserError, match="step 4 is not finite"):
        fit(small_config(corpus, *settings, "training.max_skipped_steps=1"), tmp_path / "one")
    fit(small_config(corpus, *settings, "training.max_skipped_steps=2"), tmp_path / "two")
    assert "step 3 is not finite" in capsys.readouterr().err
    records = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    assert [record.get("skipped", False) for record in records] == [False, False, True, True, False, False]
    assert all(np.isfinite(record["loss"]) for record in records if "loss" in record)


@pytest.mark.slow
def test_nonfinite_step_changes_only_the_step_number(corpus):
    """Parameters, EMA and optimiser state are equal bit for bit. Control: a finite step changes them."""
    config = small_config(corpus, "training.ema_decay=0.9", "training.noise_sampling=time")
    objective, optimizer, mesh = parts(config, corpus, 1)
    bad = poisoned(2)(config, objective.network, objective.schedule)
    init, step, _ = make_step(config, bad, optimizer, mesh)
    tokens = batch(corpus, 16, 8, 0, 0)
    first, metrics = step(init(), tokens, {})
    before = jax.device_get(first)
    assert np.isfinite(metrics["loss"])
    second, metrics = step(first, tokens, {})
    assert not np.isfinite(metrics["loss"]) and int(second.step) == 2
    for name in ("params", "ema", "optimizer"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(jax.device_get(second), name))
    third, _ = step(second, tokens, {})
    assert not np.array_equal(third.params["trunk"]["embedding"], before.params["trunk"]["embedding"])


def test_second_job_in_a_folder_is_refused(corpus, tmp_path):
    """The lock can be acquired again once it is released."""
    (tmp_path / "run").mkdir()
    with folders.locked(epath.Path(tmp_path / "run")):
        with pytest.raises(sedd.UserError, match="another process is at work in"):
            with folders.locked(epath.Path(tmp_path / "run")):
                pass
    with folders.locked(epath.Path(tmp_path / "run")):
        pass


@pytest.mark.slow
def test_checkpoint_of_a_step_is_loaded(corpus, tmp_path):
    """RUN loads the newest step, RUN/checkpoints/STEP that step."""
    config = small_config(corpus, "checkpoint.every=3", "training.steps=6")
    newest = sedd.train(config, tmp_path / "run").params
    older, same = (sedd.load(tmp_path / f"run/checkpoints/{step}").params for step in (3, 6))
    jax.tree.map(np.testing.assert_array_equal, newest, same)
    assert not np.array_equal(older["trunk"]["embedding"], newest["trunk"]["embedding"])


@pytest.mark.slow
def test_run_killed_six_times_equals_uninterrupted_run(tmp_path):
    """Each time it resumes from a complete checkpoint; state and losses are equal bit for bit in the end.

    Gaussian diffusion with memory over a frozen encoder, whose normalisation the run keeps too.
    """
    corpus = encoder_corpus(tmp_path)
    settings = ("training.steps=80", "training.ema_decay=0.9", "checkpoint.every=1", "network.layers=1")
    config = encoder_config(corpus, *settings)
    keys = [f"{group}.{name}={value}" for group, members in config.items() for name, value in members.items()]

    def start(name):
        flags = [f"--config.{key}" for key in keys]
        return jobs.start(["train", f"--workdir={tmp_path / name}", *flags], processes=1)[0]

    def saved():
        return max(steps_saved(epath.Path(tmp_path / "killed/checkpoints")), default=0)

    jobs.finish([start("uninterrupted")])
    moments, reached = random.Random(0), [0]
    for _ in range(6):
        process, newest = start("killed"), reached[-1]
        jobs.wait_for(lambda: process.poll() is not None or saved() > newest)
        time.sleep(moments.uniform(0, 0.4))
        assert process.poll() is None, "it is killed while it trains"
        process.send_signal(signal.SIGKILL)
        err = process.communicate()[1]
        assert "damaged" not in err and "Traceback" not in err
        reached.append(saved())
    ((status, _, _),) = jobs.finish([start("killed")])
    assert status == 0 and reached == sorted(set(reached)) and reached[-1] < 80
    states = [restored_state(tmp_path / name, config, corpus) for name in ("uninterrupted", "killed")]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert int(states[0].step) == 80
    runs = [(tmp_path / name / "metrics.jsonl").open() for name in ("uninterrupted", "killed")]
    losses = [[json.loads(line)["loss"] for line in run] for run in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 80


def restored_state(workdir, config, corpus):
    """Returns the newest state of a run, on the host."""
    init, _, shardings = make_step(config, *parts(config, corpus, 1))
    with Checkpoints(epath.Path(workdir) / "checkpoints", config.checkpoint) as saved:
        return jax.device_get(saved.restore(parallel.abstract_arrays(jax.eval_shape(init), shardings)))
