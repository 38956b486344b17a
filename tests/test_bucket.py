"""Runs, exports and reports in a bucket: a local fake of Google Cloud Storage."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import jobs
import numpy as np
import pytest
from etils import epath
from small import SETTINGS, name_of, parts, small_config, small_corpus
from stand_in.bucket import Bucket, Object

import sedd
from sedd import cli
from sedd import config as configs
from sedd.evaluation import perplexity, resumable_draws
from sedd.runtime import folders, lease, parallel, storage
from sedd.training.checkpoint import Checkpoints, restore_params, steps_saved
from sedd.training.fit import fit
from sedd.training.step import TrainState, make_step

pytest.importorskip("gcsfs", reason="buckets need gcsfs: pip install 'sedd[gcs]'")


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    """The fake storage, which gcsfs and tensorstore use here and in subprocesses, without credentials."""
    with Bucket() as cloud, pytest.MonkeyPatch.context() as patch:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, cloud.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # so that tensorstore looks for no credentials
        patch.setenv("CLOUDSDK_CONFIG", str(tmp_path_factory.mktemp("none")))
        patch.setenv("NO_GCE_CHECK", "true")
        patch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
        yield cloud


@pytest.fixture
def bucket(cloud, request):
    """A new bucket, as gs://NAME. Settings of the fake are reset after the test."""
    name = f"bucket{len(cloud.objects)}"
    cloud.objects[name] = {}
    yield f"gs://{name}"
    cloud.page, cloud.refuse, cloud.on_write = 1000, lambda method, path: None, lambda bucket, name: None
    storage._ask.cache_clear()


def objects(cloud, bucket):
    return cloud.objects[bucket.removeprefix("gs://")]


def copied(cloud, bucket, name):
    """Returns another bucket with the same objects."""
    cloud.objects[name] = dict(objects(cloud, bucket))
    return f"gs://{name}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("small"))


def refusal(call, *args):
    """Returns the one line of a UserError."""
    with pytest.raises(sedd.UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_fake_storage_serves_both_clients(cloud, bucket):
    """Each reads what the other wrote; generations, conditions, ranges, pages and multipart uploads work."""
    import tensorstore

    store = tensorstore.KvStore.open(f"{bucket}/folder/").result()
    first = store.write("a/x", b"first").result()
    second = store.write("a/x", b"second").result()
    assert int(objects(cloud, bucket)["folder/a/x"].generation) > 0 and first.generation != second.generation
    assert store.write("a/x", b"late", if_equal=first.generation).result().generation != second.generation
    result = store.read("a/x").result()
    assert result.value == b"second" and result.stamp.generation == second.generation
    assert store.read("a/x", if_not_equal=second.generation).result().state == "unspecified"
    assert store["a/x"] == b"second"
    folder = storage.folder_of(f"{bucket}/folder")
    assert (folder / "a/x").read_bytes() == b"second" and (folder / "a").is_dir() and not (folder / "b").exists()
    large = np.random.default_rng(0).bytes(11 * 2**20)  # gcsfs sends 5 MiB at a time
    (folder / "large").write_bytes(large)
    assert store.read("large").result().value == large == (folder / "large").read_bytes()
    cloud.page = 2
    for name in "bcdef":
        (folder / f"{name}/x").write_text(name)
    assert sorted(path.name for path in folder.iterdir()) == [*"abcdef", "large"]
    assert len(store.list().result()) == 7
    (folder / "a").rename(folder / "z")
    (folder / "b").rmtree()
    assert cloud.names(f"{bucket}/folder") == ["c/x", "d/x", "e/x", "f/x", "large", "z/x"]
    assert store.read("nothing").result().state == "missing"


def test_listings_are_not_cached(cloud, bucket):
    folder = storage.folder_of(f"{bucket}/run")
    (folder / "1/x").write_text("mine")
    assert [path.name for path in folder.iterdir()] == ["1"] and not (folder / "2").is_dir()
    objects(cloud, bucket)["run/2/x"] = Object(b"another's", 1)
    del objects(cloud, bucket)["run/1/x"]
    assert [path.name for path in folder.iterdir()] == ["2"]
    assert (folder / "2").is_dir() and not (folder / "1/x").exists()


def enter(context):
    with context:
        pass


def forbidden(method, path, of=("GET", "POST", "DELETE"), end=""):
    return 403 if method in of and path.split("?")[0].endswith(end) else None


def test_a_bucket_that_cannot_be_used_is_refused(cloud, bucket, corpus, capfd, caplog, monkeypatch):
    """In one line, before compilation; nothing else is printed, and no bucket is created."""
    config, name = small_config(corpus), bucket.removeprefix("gs://")
    monkeypatch.setattr("sedd.training.fit._Loop", None)
    for call in (lambda: fit(config, "gs://other/run"), lambda: sedd.load("gs://other/run")):
        assert "there is no bucket gs://other; choose another, or make it" in refusal(call)
    assert "other" not in cloud.objects
    assert "names no bucket" in refusal(storage.folder_of, "gs://")
    assert "s3://a/b: results go to a folder, or to a bucket as gs://" in refusal(fit, config, "s3://a/b")
    cloud.refuse = lambda *_: 401
    assert "Anonymous caller" in refusal(sedd.load, f"{bucket}/run")
    assert "there are no credentials; gcloud auth application-default login" in refusal(fit, config, f"{bucket}/run")
    cloud.refuse = forbidden
    assert "(refused): the roles storage.objectUser and" in refusal(fit, config, f"{bucket}/run")
    cloud.refuse = lambda *request: forbidden(*request, end=f"/b/{name}")  # needed to remove a checkpoint
    assert "storage.legacyBucketReader are needed" in refusal(fit, config, f"{bucket}/run")
    cloud.refuse = lambda *request: forbidden(*request, of=("POST",))
    for call in (fit, lambda _, path: enter(folders.locked(storage.folder_of(path)))):
        assert f"{bucket}/run cannot be written to (refused); choose another" in refusal(call, config, f"{bucket}/run")
    cloud.refuse = lambda *request: forbidden(*request, of=("DELETE",))
    assert f"nothing can be removed from {bucket}/run (refused)" in refusal(fit, config, f"{bucket}/run")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gcsfs", None)
        assert "gs:// needs gcsfs; pip install 'sedd[gcs]'" in refusal(fit, config, f"{bucket}/run")
    assert capfd.readouterr().err in ("", "sedd: 8 device(s) (cpu)\n") and caplog.records == []


def test_a_bucket_that_does_not_answer_is_an_error_after_the_timeout(bucket, monkeypatch):
    with socket.create_server(("localhost", 0)) as silent:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{silent.getsockname()[1]}")
        monkeypatch.setattr(storage, "_TIMEOUT_SECONDS", 1)
        assert "no answer in 1 seconds): there are no credentials" in refusal(storage.folder_of, f"{bucket}/run")


@pytest.fixture
def quick(monkeypatch):
    """Leases with short times between renewals and until expiry."""
    monkeypatch.setattr(lease, "_RENEWAL_SECONDS", 0.1)
    monkeypatch.setattr(lease, "_EXPIRY_SECONDS", 1.0)


def lock_by_other(cloud, bucket, **changes):
    """Writes the lock of another job. By default its process runs on this machine."""
    about = {"token": "another", "pid": os.getppid(), "machine": lease.machine(), "who": "process 1 on another"}
    generation = next(cloud.generations)
    objects(cloud, bucket)["run/.lock"] = Object(json.dumps(about | changes).encode(), generation)


def test_a_folder_in_a_bucket_has_one_owner(cloud, bucket, quick, capfd):
    """A second job is refused once the first renews its lock; the lock is removed at the end of the first."""
    folder = storage.folder_of(f"{bucket}/run")
    with folders.locked(folder):
        (mine,) = lease._held.values()
        first = mine._generation
        jobs.wait_for(lambda: mine._generation != first)
        with pytest.raises(sedd.UserError, match="is at work in gs://.*/run \\(process .*; wait for it"):
            enter(folders.locked(folder))
    assert cloud.names(f"{bucket}/run") == [] and "waiting up to 1 s" in capfd.readouterr().err


def test_the_lock_of_a_killed_job_is_taken_over(cloud, bucket, quick, capfd):
    """At once if its process is known to have ended, else after it expires."""
    folder = storage.folder_of(f"{bucket}/run")
    gone = subprocess.Popen(["true"])
    gone.wait()
    for known in ({"pid": gone.pid}, {"pid": os.getpid()}):
        lock_by_other(cloud, bucket, **known)
        enter(folders.locked(folder))
    assert capfd.readouterr().err == ""
    for unknown in ({}, {"machine": "another", "pid": gone.pid}, {"pid": None}):
        lock_by_other(cloud, bucket, **unknown)
        start = time.monotonic()
        with folders.locked(folder):
            assert time.monotonic() - start > 1
    assert capfd.readouterr().err.count("waiting up to 1 s for a renewal") == 3


def test_a_job_whose_lock_was_taken_over_ends(cloud, bucket, quick):
    """Before it writes again. It does not remove the lock of the other job."""
    folder = storage.folder_of(f"{bucket}/run")
    with pytest.raises(sedd.UserError, match="another job took gs://.*/run over"):
        with folders.locked(folder), storage.Mirror(folder, ()) as mirror:
            (mirror.local / "mine").write_text("mine")
            (mine,) = lease._held.values()
            lock_by_other(cloud, bucket)
            jobs.wait_for(lambda: mine._lost)
            mirror.sync()
    assert cloud.names(f"{bucket}/run") == [".lock"]


def state_of(value, step):
    """Returns a training state with small arrays."""
    params = {"kernel": jnp.full((4, 3), value), "bias": jnp.arange(3.0)}
    return TrainState(jnp.int32(step), params, None, {"count": jnp.int32(step)})


LIKE = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state_of(0.0, 0))


def checkpoints(folder, **settings):
    config = configs.default().checkpoint
    config.update(settings)
    return Checkpoints(storage.folder_of(folder), config)


def first_number(folder):
    return float(restore_params(storage.folder_of(folder), LIKE.params, ema=False)["kernel"][0, 0])


@pytest.mark.slow
def test_older_checkpoints_are_removed(cloud, bucket):
    with checkpoints(f"{bucket}/run", keep=2, keep_every=3) as saved:
        for step in range(1, 7):
            saved.save(state_of(float(step), step))
    assert steps_saved(storage.folder_of(f"{bucket}/run")) == [3, 5, 6] and first_number(f"{bucket}/run") == 6.0
    assert {name.split("/")[0] for name in cloud.names(f"{bucket}/run")} == {"3", "5", "6"}


def no_marker(objects):
    del objects["run/2/commit_success.txt"]


def cut_off(objects):
    """The objects after the writer was killed in the middle."""
    no_marker(objects)
    for name in [name for name in objects if name.startswith("run/2/optimizer/")]:
        del objects[name]


def no_arrays(objects):
    for name in [name for name in objects if name.startswith("run/2/params/") and "/d/" in name]:
        del objects[name]


def changed_byte(objects):
    for name, item in list(objects.items()):
        if name.startswith("run/2/params/") and "/d/" in name:
            middle = len(item.data) // 2
            data = item.data[:middle] + bytes([item.data[middle] ^ 1]) + item.data[middle + 1 :]
            objects[name] = Object(data, item.generation + 1)


@pytest.fixture(scope="module")
def two_steps(cloud):
    """A bucket with checkpoints of steps 1 and 2, to be copied and damaged."""
    cloud.objects["steps"] = {}
    with checkpoints("gs://steps/run") as saved:
        saved.save(state_of(1.0, 1))
        saved.save(state_of(2.0, 2))
    return "gs://steps"


@pytest.mark.parametrize("fault", [no_marker, cut_off], ids=name_of)
def test_an_incomplete_checkpoint_is_skipped(cloud, two_steps, bucket, capfd, fault):
    """Silently by a reader, with a line by a resumed run; the next checkpoint replaces it."""
    bucket = copied(cloud, two_steps, bucket.removeprefix("gs://"))
    fault(objects(cloud, bucket))
    assert first_number(f"{bucket}/run") == 1.0 and capfd.readouterr().err == ""
    with pytest.raises(sedd.UserError, match="step 2 is incomplete \\(its write was interrupted, or is in progress\\)"):
        restore_params(storage.folder_of(f"{bucket}/run"), LIKE.params, ema=False, step=2)
    with checkpoints(f"{bucket}/run") as saved:
        assert int(saved.restore(LIKE).step) == 1
        saved.save(state_of(3.0, 3))
    assert capfd.readouterr().err == "sedd: the checkpoint of step 2 is incomplete: its write was interrupted\n"
    assert {name.split("/")[0] for name in cloud.names(f"{bucket}/run")} == {"1", "3"}


def test_a_run_restarts_if_its_first_checkpoint_is_incomplete(cloud, two_steps, bucket):
    bucket = copied(cloud, two_steps, bucket.removeprefix("gs://"))
    remaining = objects(cloud, bucket)
    for name in [name for name in remaining if name.startswith("run/1/")]:
        del remaining[name]
    cut_off(remaining)
    assert checkpoints(f"{bucket}/run").restore(LIKE) is None
    with pytest.raises(sedd.UserError, match="holds no checkpoint yet; train a little longer"):
        first_number(f"{bucket}/run")


@pytest.mark.parametrize("fault", [no_arrays, changed_byte], ids=name_of)
def test_restore_skips_an_unusable_checkpoint_and_keeps_it_renamed(cloud, two_steps, bucket, capfd, fault):
    """The step before is found; a run puts aside what it passes over, and keeps it when it writes that step again."""
    bucket = copied(cloud, two_steps, bucket.removeprefix("gs://"))
    fault(objects(cloud, bucket))
    before = cloud.names(f"{bucket}/run")
    assert first_number(f"{bucket}/run") == 1.0 and cloud.names(f"{bucket}/run") == before
    assert "sedd: the checkpoint of step 2 is damaged" in capfd.readouterr().err
    damaged = cloud.names(f"{bucket}/run/2")
    with checkpoints(f"{bucket}/run") as saved:
        assert int(saved.restore(LIKE).step) == 1
        saved.save(state_of(3.0, 2))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].endswith("going back to step 1") and lines[1] == "sedd: it is kept as damaged-2"
    assert cloud.names(f"{bucket}/run/damaged-2") == damaged
    assert first_number(f"{bucket}/run") == 3.0 and steps_saved(storage.folder_of(f"{bucket}/run")) == [1, 2]


def test_restore_uses_the_newest_checkpoint_without_a_fault(cloud, two_steps, bucket, capfd):
    bucket = copied(cloud, two_steps, bucket.removeprefix("gs://"))
    with checkpoints(f"{bucket}/run") as saved:
        assert int(saved.restore(LIKE).step) == 2
        saved.save(state_of(3.0, 3))
    assert "sedd:" not in capfd.readouterr().err and first_number(f"{bucket}/run") == 3.0


def test_a_checkpoint_that_cannot_be_written_is_an_error(cloud, two_steps, bucket, capfd):
    """In one line. Earlier checkpoints are kept, and later ones can be written."""
    bucket = copied(cloud, two_steps, bucket.removeprefix("gs://"))

    def save(step):
        with checkpoints(f"{bucket}/run") as saved:
            saved.save(state_of(float(step), step))

    cloud.refuse = lambda *request: forbidden(*request, of=("POST",))
    assert f"a checkpoint could not be written to {bucket}/run (refused); earlier ones" in refusal(save, 3)
    cloud.refuse = lambda *_: None
    assert first_number(f"{bucket}/run") == 2.0
    save(4)
    assert first_number(f"{bucket}/run") == 4.0


def records(workdir, name="metrics.jsonl"):
    return [json.loads(line) for line in (epath.Path(workdir) / name).read_text().splitlines()]


def arrays(workdir, corpus):
    """Returns the arrays of the newest checkpoint by their paths."""
    workdir = storage.folder_of(workdir)
    config = configs.from_dict(json.loads((workdir / "config.json").read_text())["config"])
    init, _, shardings = make_step(config, *parts(config, corpus))
    with Checkpoints(workdir / "checkpoints", config.checkpoint) as saved:
        state = saved.restore(parallel.abstract_arrays(jax.eval_shape(init), shardings))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(state)}


def check_same(workdir, other, corpus):
    """Asserts that the states are equal bit for bit, and the same losses are recorded once."""
    expected, actual = arrays(workdir, corpus), arrays(other, corpus)
    assert expected.keys() == actual.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)
    losses = [[(r["step"], r["loss"]) for r in records(run) if "loss" in r] for run in (workdir, other)]
    assert losses[0] == losses[1]
    bounds = [[r for r in records(run) if "loss" not in r] for run in (workdir, other)]
    assert bounds[0] == bounds[1]


def newest(cloud, bucket):
    """Returns the last step with a commit marker."""
    names = [name.split("/") for name in list(objects(cloud, bucket)) if name.endswith("/commit_success.txt")]
    return max([int(parts[2]) for parts in names if len(parts) == 4 and parts[2].isdigit()], default=0)


SHORT = ("checkpoint.every=2", "network.layers=1", "optimizer.decay=constant")


@pytest.fixture(scope="module")
def on_disk(corpus, tmp_path_factory):
    """A run of six steps on a disk."""
    workdir = tmp_path_factory.mktemp("on_disk") / "run"
    fit(small_config(corpus, *SHORT), workdir)
    return workdir


@pytest.fixture(scope="module")
def trained(cloud, corpus):
    """The same run in a bucket. Returns the objects of the bucket before each write, by the name of the written one."""
    cloud.objects["trained"], moments = {}, {}

    def note(bucket, name):
        moments[name] = dict(cloud.objects[bucket])  # the state if the process were killed now
        if name.endswith("metrics.jsonl"):
            time.sleep(1)  # so that writes that do not wait for this one come first

    cloud.on_write = note
    fit(small_config(corpus, *SHORT), "gs://trained/run")
    cloud.on_write = lambda *_: None
    return moments


@pytest.mark.slow
def test_a_run_in_a_bucket_is_that_on_a_disk(cloud, corpus, on_disk, trained):
    """No other files are left. It can be loaded, also at an earlier step."""
    check_same(on_disk, "gs://trained/run", corpus)
    tops = {"checkpoints", "config.json", "metrics.jsonl", "tokenizer"}
    assert {name.split("/")[0] for name in cloud.names("gs://trained/run")} == tops
    model, older = sedd.load("gs://trained/run"), sedd.load("gs://trained/run/checkpoints/4")
    jax.tree.map(np.testing.assert_array_equal, model.params, sedd.load(on_disk).params)
    jax.tree.map(np.testing.assert_array_equal, older.params, sedd.load(on_disk / "checkpoints/4").params)


MOMENTS = [
    "config.json",  # which is moved to its place
    "tokenizer/tokenizer.json",
    "checkpoints/2/manifest/metadata",
    "checkpoints/4/commit_success.txt",
    "checkpoints/6/params/manifest.ocdbt",
    "metrics.jsonl",  # the last time
]


@pytest.mark.slow
@pytest.mark.parametrize("name", MOMENTS)
def test_a_run_killed_at_any_moment_resumes(cloud, corpus, on_disk, trained, bucket, name, capfd):
    """With the same result: no record is lost or repeated."""
    cloud.objects[bucket.removeprefix("gs://")].update(trained[f"run/{name}"])
    saved = newest(cloud, bucket)
    assert fit(small_config(corpus, *SHORT), f"{bucket}/run").steps == 6 - saved
    check_same(on_disk, f"{bucket}/run", corpus)
    problem = f"step {saved + 2} is incomplete: its write was interrupted"
    assert name[:11] != "checkpoints" or problem in capfd.readouterr().err


@pytest.mark.slow
def test_records_are_uploaded_before_a_checkpoint_is_committed(cloud, corpus, trained):
    for step in (2, 4, 6):
        uploaded = trained[f"run/checkpoints/{step}/commit_success.txt"]
        steps = [json.loads(line)["step"] for line in uploaded["run/metrics.jsonl"].data.splitlines()]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) >= step  # it may be committed later


@pytest.mark.slow
def test_records_that_cannot_be_written_are_an_error(cloud, corpus, bucket):
    """In one line. The same command resumes the run."""

    def fail(bucket, name):
        if name.endswith("metrics.jsonl"):
            cloud.refuse = lambda *request: forbidden(*request, of=("POST",))

    cloud.on_write = fail
    config = small_config(corpus, *SHORT, "training.steps=4")
    assert "cannot be written to" in refusal(fit, config, f"{bucket}/run")
    cloud.refuse, cloud.on_write = lambda *_: None, lambda *_: None
    fit(config, f"{bucket}/run")
    assert [record["step"] for record in records(f"{bucket}/run")] == [1, 2, 3, 4]


def command(corpus, workdir, *settings):
    settings = (f"data.corpus={corpus.path}", *SETTINGS, "network.layers=1", *settings)
    return ["train", f"--workdir={workdir}", *(f"--config.{setting}" for setting in settings)]


LONG = ("training.steps=60", "training.ema_decay=0.9", "checkpoint.every=10", "checkpoint.keep=2")
LONG = (*LONG, "evaluation.every=25")


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(cloud, corpus, bucket, tmp_path):
    """On the command line, after SIGTERM; with samples, bounds and files for TensorBoard."""
    tensorboard = ("metrics.tensorboard=true",) if importlib.util.find_spec("tensorboardX") else ()
    (run,) = jobs.start(command(corpus, f"{bucket}/run", *LONG, *tensorboard), processes=1)
    jobs.wait_for(lambda: newest(cloud, bucket) >= 10)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 0 and "the same command continues" in err, err
    stopped = newest(cloud, bucket)
    assert 10 <= stopped < 60 and records(f"{bucket}/run")[-1]["step"] == stopped
    jobs.run(command(corpus, f"{bucket}/run", *LONG, *tensorboard), processes=1)
    jobs.run(command(corpus, tmp_path / "run", *LONG), processes=1)
    check_same(tmp_path / "run", f"{bucket}/run", corpus)
    assert len(records(f"{bucket}/run")) == 60 + 3
    samples = records(f"{bucket}/run", "samples.jsonl")
    assert samples == records(tmp_path / "run", "samples.jsonl")
    assert [sample["step"] for sample in samples] == [25, 25, 50, 50, 60, 60]
    assert steps_saved(storage.folder_of(f"{bucket}/run/checkpoints")) == [50, 60]
    events = [name for name in cloud.names(f"{bucket}/run") if name.startswith("tensorboard/")]
    assert len(events) == 2 * len(tensorboard)


@pytest.mark.slow
def test_a_model_can_be_loaded_while_a_run_writes(cloud, corpus, bucket):
    """At any moment; later calls load later checkpoints."""
    settings = ("training.steps=160", "checkpoint.every=10", "checkpoint.keep=2")
    (run,) = jobs.start(command(corpus, f"{bucket}/run", *settings), processes=1)
    jobs.wait_for(lambda: newest(cloud, bucket))
    loaded = []
    while run.poll() is None:
        loaded.append(np.asarray(sedd.load(f"{bucket}/run").params["trunk"]["embedding"]).tobytes())
    assert run.wait() == 0 and len(set(loaded)) >= 3


@pytest.mark.slow
def test_two_processes_train_into_one_bucket(cloud, corpus, bucket, on_disk, tmp_path):
    """With the losses of one process; a second call resumes."""
    settings = ("training.steps=4", "checkpoint.every=2", "checkpoint.keep=1", "optimizer.decay=constant")
    jobs.run(command(corpus, f"{bucket}/run", *settings), processes=2, devices=2, folder=tmp_path)
    assert cloud.names(f"{bucket}/run/checkpoints/4") and not cloud.names(f"{bucket}/run/checkpoints/2")
    more = (*settings, "training.steps=6")
    jobs.run(command(corpus, f"{bucket}/run", *more), processes=2, devices=2, folder=tmp_path)
    losses = [[record["loss"] for record in records(run)] for run in (f"{bucket}/run", on_disk)]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(*losses, rtol=2e-5)
    sedd.load(f"{bucket}/run")


@pytest.mark.slow
def test_an_export_to_a_bucket_loads_as_the_same_model(cloud, bucket, on_disk):
    """Nothing is overwritten; a missing file is an error of one line."""
    model = sedd.load(on_disk)
    model.save(f"{bucket}/exported")
    again = sedd.load(f"{bucket}/exported")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert again.tokenizer.fingerprint == model.tokenizer.fingerprint and again.config == model.config
    assert "is not empty; choose another folder" in refusal(model.save, f"{bucket}/exported")
    cloud.refuse = lambda *request: forbidden(*request, of=("POST",))
    assert f"{bucket}/other cannot be written to (refused)" in refusal(model.save, f"{bucket}/other")
    cloud.refuse = lambda *_: None
    assert "there is no folder" in refusal(sedd.load, f"{bucket}/nothing")
    del objects(cloud, bucket)["exported/tokenizer/tokenizer.model"]
    assert "tokenizer.model is missing" in refusal(sedd.load, f"{bucket}/exported")


@pytest.mark.slow
def test_an_interrupted_evaluation_resumes(cloud, corpus, bucket, on_disk, monkeypatch, capfd):
    """Interrupted in the middle of a record, it gives the same report; another evaluation is refused."""
    monkeypatch.setattr(resumable_draws, "_SYNC", 0)
    flags, starts, moments = ["eval", f"--model={on_disk}", "--batch_size=8", "--draws=2", "--json"], [], []
    cloud.on_write = lambda bucket, name: moments.append((name, dict(cloud.objects[bucket])))
    assert cli.main([*flags, f"--out={bucket}/report"]) == 0
    cloud.on_write = lambda *_: None
    half = [copy for name, copy in moments if name == "report/draws.f32"][1]
    record = half["report/draws.f32"]
    half["report/draws.f32"] = Object(record.data[:-7], record.generation)
    cloud.objects["half"] = half
    monkeypatch.setattr(resumable_draws, "_SYNC", 60)
    score = perplexity.score
    monkeypatch.setattr(perplexity, "score", lambda *args, start: starts.append(start) or score(*args, start=start))
    assert cli.main([*flags, "--out=gs://half/report"]) == 0
    out = capfd.readouterr().out
    assert out[: len(out) // 2] * 2 == out and json.loads(out[: len(out) // 2])
    assert starts == [7] and "report/report.json" in half
    record, resumed = (cloud.objects[name]["report/draws.f32"].data for name in (bucket[5:], "half"))
    assert record == resumed
    assert cli.main([*flags, "--out=gs://half/report", "--seed=1"]) == 2
    assert "gs://half/report holds another evaluation: its seed differs" in capfd.readouterr().err
