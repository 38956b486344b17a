"""Several processes: they connect or name the missing ones, compute the same, and end together within seconds."""

import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jobs
import numpy as np
import pytest
from small import SETTINGS, small_corpus

import sedd
from sedd.runtime import processes
from sedd.runtime.rendezvous import meet


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("small"))


def train(corpus, workdir, *settings):
    """Returns the arguments of a command that trains a small model of one layer."""
    settings = (f"data.corpus={corpus.path}", *SETTINGS, "network.layers=1", *settings)
    return ["train", f"--workdir={workdir}", *(f"--config.{setting}" for setting in settings)]


def losses(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return np.array([record["loss"] for record in records if "loss" in record])


def meet_in_threads(indices, count, timeout, port=None):
    """Returns the error message of each process, or None."""
    port = port or jobs.free_port()

    def one(index):
        try:
            meet(f"localhost:{port}", count, index, timeout, hint="wait")
        except sedd.UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(indices)) as pool:
        return list(pool.map(one, indices))


def test_meet_returns_when_all_processes_are_present():
    assert meet_in_threads(range(5), 5, 20) == [None] * 5


def test_missing_processes_are_named_in_all_others():
    messages = meet_in_threads([0, 2, 4], 5, 1.5)
    assert len(set(messages)) == 1 and "processes 1, 3 of 5 did not come" in messages[0] and "\n" not in messages[0]
    (message,) = meet_in_threads([1], 2, 1)
    assert "process 0 at localhost" in message and "did not answer" in message


def test_inconsistent_processes_are_refused():
    """Two with the same id; and one that expects another number of processes."""
    messages = meet_in_threads([0, 1, 1], 3, 3)
    assert any("two processes 1" in message for message in messages)
    port = jobs.free_port()

    def one(index, count):
        with pytest.raises(sedd.UserError) as caught:
            meet(f"localhost:{port}", count, index, 5, hint="wait")
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        messages = list(pool.map(one, (0, 1), (3, 2)))
    assert all("expects 2 processes, process 0 expects 3" in message for message in messages)


def test_other_programs_at_the_port():
    """Connections of other programs are ignored; a port in use is an error of one line."""
    port = jobs.free_port()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(meet, f"localhost:{port}", 2, 0, 30, "wait")
        jobs.wait_for(lambda: connects(port), 10)
        meet(f"localhost:{port}", 2, 1, 30, hint="wait")
        assert first.result() is None
    with socket.create_server(("", port)):
        (message,) = meet_in_threads([0], 2, 1, port)
        assert f"port {port} of this host cannot be used" in message


def connects(port):
    """Connects and sends an HTTP request. True if a process listens at the port."""
    try:
        with socket.create_connection(("localhost", port)) as caller:
            caller.sendall(b"GET / HTTP/1.1\r\n\r\n")
            return True
    except OSError:
        return False


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"SEDD_COORDINATOR": "localhost:1"}, "go together; SEDD_NUM_PROCESSES is not set"),
        ({"SEDD_COORDINATOR": "host", "SEDD_NUM_PROCESSES": "2", "SEDD_PROCESS_ID": "0"}, "must be HOST:PORT"),
        ({"SEDD_COORDINATOR": "h:1", "SEDD_NUM_PROCESSES": "2", "SEDD_PROCESS_ID": "2"}, "must be 0 .. 1"),
        ({"SEDD_COORDINATOR": "h:1", "SEDD_NUM_PROCESSES": "two", "SEDD_PROCESS_ID": "0"}, "must be a whole number"),
    ],
)
def test_invalid_environment_variables_are_refused(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(sedd.UserError, match=message) as caught:
        processes._job_from_env()
    assert "\n" not in str(caught.value)


def hardware(root, *files):
    """Creates the files below a root of a file system; returns the root."""
    for file, text in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    return root


def test_an_accelerator_that_jax_does_not_see_is_an_error(tmp_path, monkeypatch):
    """A GPU, a TPU; not Google's network card. With JAX_PLATFORMS=cpu it is no error."""
    at = "sys/bus/pci/devices/0000:00:04.0"
    card = hardware(tmp_path / "card", (f"{at}/vendor", "0x1ae0\n"), (f"{at}/device", "0x0042\n"))
    tpu = hardware(tmp_path / "tpu", (f"{at}/vendor", "0x1ae0\n"), (f"{at}/device", "0x0063\n"))
    gpu = hardware(tmp_path / "gpu", ("dev/nvidia0", ""))
    assert processes.unused_accelerator(card) is None
    assert processes.unused_accelerator(tpu) == ("a TPU", "tpu")
    assert processes.unused_accelerator(gpu)[0] == "an NVIDIA GPU"
    monkeypatch.setattr(processes, "unused_accelerator", lambda: ("a TPU", "tpu"))
    processes._check_devices()  # the tests set JAX_PLATFORMS=cpu
    monkeypatch.setattr(processes, "_platforms", lambda: "")
    with pytest.raises(sedd.UserError, match="has a TPU, but JAX sees only the CPU; pip install 'sedd\\[tpu\\]'"):
        processes._check_devices()


@pytest.mark.parametrize(
    "platform, cache, expected",
    [("gpu", None, str(Path.home() / ".cache/sedd/compiled")), ("gpu", "here", "here"), ("cpu", None, None)],
)
def test_the_compilation_cache_is_enabled_for_accelerators(monkeypatch, platform, cache, expected):
    """Unless the user has set another one; not for CPUs, whose programs run on one kind of machine only."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(processes.jax, "default_backend", lambda: platform)
    try:
        jax.config.update("jax_compilation_cache_dir", cache)
        processes._enable_compilation_cache()
        folder = jax.config.jax_compilation_cache_dir
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert folder == expected


@pytest.fixture(scope="module")
def pair(corpus, tmp_path_factory):
    """A run of two processes with four devices each, and the same with one process and eight."""
    folder = tmp_path_factory.mktemp("pair")
    settings = ("training.ema_decay=0.9", "evaluation.every=6", "evaluation.draws=4", "checkpoint.every=3")
    for name, count, devices in (("two", 2, 4), ("one", 1, 8)):
        command = train(corpus, folder / name, *settings)
        jobs.run(command, processes=count, devices=devices, folder=folder / f"at-{name}")
    return folder


@pytest.mark.slow
def test_two_processes_train_as_one(pair):
    """Losses agree to 1e-6; one record a step; the same samples during training."""
    two, one = losses(pair / "two"), losses(pair / "one")
    assert len(two) == len(one) == 6
    np.testing.assert_allclose(two, one, rtol=1e-6)
    texts = [(pair / name / "samples.jsonl").read_text() for name in ("two", "one")]
    assert texts[0] == texts[1] and texts[0].count("\n") == 2


@pytest.mark.slow
def test_evaluation_and_sampling_in_two_processes(pair):
    """The same number and texts as with one process; only process 0 prints; an interrupted evaluation resumes."""
    evaluate = ["eval", f"--model={pair}/one", "--json", f"--out={pair}/scores"]
    infill = ["infill", f"--model={pair}/one", "the <blank:4> times", "--num_samples=5", "--steps=4", "--json"]
    expected, texts = (jobs.run(command, processes=1, devices=1)[0] for command in (evaluate, infill))
    draws = pair / "scores/draws.f32"
    draws.write_bytes(draws.read_bytes()[: draws.stat().st_size // 2 - 3])
    first, second = jobs.run(evaluate, processes=2, devices=2)
    report, expected = json.loads(first), json.loads(expected)
    np.testing.assert_allclose(report["nats_per_token"], expected["nats_per_token"], rtol=1e-6)
    assert second == "" and jobs.run(infill, processes=2, devices=2) == [texts, ""]


@pytest.mark.slow
def test_each_example_is_read_once_with_any_processes_and_mesh(corpus, tmp_path):
    """Two processes, then four, then one with another mesh: each example of each batch once, in order."""
    watched = Path(__file__).parent / "watched.py"

    def train_to(steps, count, *settings):
        settings = (f"training.steps={steps}", "optimizer.decay=constant", *settings)
        command = [str(watched), str(tmp_path / "seen"), *train(corpus, tmp_path / "run", *settings)]
        jobs.run(command, processes=count, devices=8 // count)

    train_to(3, 2)
    train_to(5, 4, "mesh.model=2")
    train_to(8, 1, "mesh.fsdp=4")
    records = [json.loads(line) for file in tmp_path.glob("seen.*") for line in file.read_text().splitlines()]
    examples = sorted((record["k"], example) for record in records for example in record["examples"])
    read = [example for k, example in examples if k < 8]  # a few more batches are prefetched
    prefetched = [record["k"] for record in records if record["k"] in (3, 5)]
    assert prefetched, "control: a resumed run reads again the batches that were only prefetched"
    assert sorted(set(read)) == list(range(8 * 8))
    jobs.run(train(corpus, tmp_path / "once", "training.steps=8", "optimizer.decay=constant"), processes=1)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "once"), rtol=1e-5)


@pytest.mark.slow
def test_a_missing_process_is_named_after_the_timeout(corpus, tmp_path):
    """The others end with one line."""
    begin = time.monotonic()
    ended = jobs.finish(jobs.start(train(corpus, tmp_path / "run"), processes=3, only=[0, 2], timeout=5))
    assert time.monotonic() - begin < 60
    for status, _, err in ended:
        assert status == 2 and "process 1 of 3 did not come" in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_exception_in_one_ends_the_other_in_seconds(corpus, tmp_path):
    """A corpus that only worker 1 lacks; and one that differs there. Neither waits for a timeout."""
    folder = tmp_path / "workers"
    for index in (0, 1):
        (folder / f"worker{index}").mkdir(parents=True)
    (folder / "worker0/corpus").symlink_to(corpus.path)
    command = train(corpus, tmp_path / "run", "data.corpus=corpus")
    began = time.monotonic()
    first, second = jobs.finish(jobs.start(command, folder=folder))
    assert time.monotonic() - began < 60 and (first[0], second[0]) == (1, 2)
    assert "sedd: error: there is no folder" in second[2]
    assert "stopped, because another process failed: process 1" in first[2] and "there is no folder" in first[2]
    other = small_corpus(tmp_path / "other", "bytes")
    (folder / "worker1/corpus").symlink_to(other.path)
    first, second = jobs.finish(jobs.start(command, folder=folder))
    assert "process 1 has another " in first[2] + second[2] and 0 not in (first[0], second[0])


@pytest.mark.slow
def test_processes_end_while_they_look_for_failures(tmp_path):
    """A thread that was inside the client when the interpreter ended aborted the process, five times of six here."""
    script = tmp_path / "short.py"
    script.write_text(
        "from sedd.runtime import processes\n"
        "processes._POLL_SECONDS = 0\n"
        "processes.initialize()\n"
        "import time; time.sleep(0.3)\n"
    )
    for _ in range(3):
        jobs.run([str(script)], processes=2)


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_refused(corpus, tmp_path):
    """Each worker has its own; the error comes before compilation."""
    ended = jobs.finish(jobs.start(train(corpus, "run"), folder=tmp_path))
    assert all(status in (1, 2) for status, _, _ in ended)
    assert any("process 1" in err and "is not the folder that process 0 writes to" in err for _, _, err in ended)
    assert not (tmp_path / "worker0/run/config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_sigterm_to_one_of_two_saves_in_both(corpus, tmp_path, victim):
    """Both stop at the same step and exit with 0."""
    command = train(corpus, tmp_path / "run", "training.steps=400", "checkpoint.every=1000")
    started = jobs.start(command)
    metrics = tmp_path / "run/metrics.jsonl"
    jobs.wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 5)
    started[victim].send_signal(signal.SIGTERM)
    ended = jobs.finish(started)
    steps = [err.partition("sedd: stopped at step ")[2].partition(";")[0] for _, _, err in ended]
    assert [status for status, _, _ in ended] == [0, 0] and steps[0] == steps[1] != ""
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == steps[:1]
    assert len(losses(tmp_path / "run")) == int(steps[0])


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other(corpus, tmp_path):
    """Its heartbeat stops."""
    command = train(corpus, tmp_path / "run", "training.steps=100000", "checkpoint.every=100000")
    started = jobs.start(command)
    metrics = tmp_path / "run/metrics.jsonl"
    jobs.wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 5)
    started[1].kill()
    began = time.monotonic()
    ended = jobs.finish(started, 120)
    assert ended[0][0] != 0 and time.monotonic() - began < 90
