"""Launching: every step, and injected failures, against a fake of Google's command line with two local workers."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading

import pytest
from launching import PYTHON, SAVES, STAND_IN, TWICE, Cloud, calls, eventually, python
from small import SETTINGS, small_corpus


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """The fake cloud, first on the PATH. The working directory has data to push."""
    monkeypatch.setenv("PATH", f"{STAND_IN}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    here = tmp_path / "here"
    (here / "data/mine").mkdir(parents=True)
    (here / "data/mine/meta.json").write_text("{}")
    monkeypatch.chdir(here)
    cloud = Cloud(tmp_path)
    cloud.python.parent.mkdir()
    cloud.python.write_text(PYTHON.format(python=sys.executable))
    cloud.python.chmod(0o755)
    yield cloud
    subprocess.run(["gcloud", "delete"], capture_output=True)


@pytest.fixture
def background(cloud):
    """Runs a step in a thread. Returns a list, to which the exit status is appended at the end."""
    threads = []

    def start(*words, command=()):
        statuses = []
        threads.append(threading.Thread(target=lambda: statuses.append(cloud(*words, command=command)), daemon=True))
        threads[-1].start()
        return statuses

    yield start
    for thread in threads:
        thread.join(60)


def test_up_creates_machines_and_reuses_them(cloud, capfd):
    """From no machines to a result; then once more on existing machines."""
    hello = python("print('hello from', me, os.environ['A'], os.environ['JAX_PLATFORMS'], os.getcwd())")
    for number in (1, 2):
        assert cloud("up", "--push=data/mine", "--env=A=b 'c", command=hello) == 0
        out, err = capfd.readouterr()
        assert out == f"hello from 0 b 'c tpu,cpu {cloud.folder(0)}\n"
        assert "WAITING_FOR_RESOURCES" in err or number == 2
        assert err.endswith(
            "tpu costs money until deleted: python tpu_launch/launch.py delete --name=tpu --zone=zone-a\n"
        )
        assert len(cloud.calls("create")) == 1 and cloud.num_calls("setup") == cloud.num_calls("run") == number
        assert sum("data/mine" in argv for argv in cloud.calls("scp")) == number
    for index in range(2):
        assert (cloud.folder(index) / "data/mine/meta.json").read_text() == "{}"
        assert f"hello from {index}" in (cloud.folder(index) / ".job/log").read_text()


@pytest.mark.slow
def test_steps_can_be_repeated(cloud, capfd):
    """Each step by itself, twice."""
    sleep = python("print('here', me, flush=True); time.sleep(60)")
    assert cloud("push") == 1 and cloud("stop") == 0
    err = capfd.readouterr().err
    assert "tpu is not created; create gets it ready" in err and "nothing runs: tpu is not created" in err
    assert cloud("create") == cloud("create") == 0 and len(cloud.calls("create")) == 1
    assert cloud("push", "--push=data/mine") == 0
    (cloud.folder(1) / "sedd/stale.py").touch()
    assert cloud("push") == 0
    assert not (cloud.folder(1) / "sedd/stale.py").exists() and (cloud.folder(1) / "data/mine/meta.json").exists()
    assert cloud("setup") == cloud("setup") == 0 and cloud("setup", "--python=/bin/false", "--retries=1") == 1
    assert cloud("run", command=sleep) == cloud("run", command=sleep) == 0
    assert "worker 1: is already running" in capfd.readouterr().err
    assert cloud("run", command=python("pass")) == 1 and cloud("push") == 1 and cloud("setup") == 1
    err = capfd.readouterr().err
    assert "is running; end it with stop first" in err and "retrying in" not in err
    eventually(lambda: cloud("logs") == 0 and "worker 1 | here 1\n" in capfd.readouterr().out)
    assert cloud("logs", "--worker=1") == 0 and capfd.readouterr().out == "here 1\n"
    assert cloud("status") == 0 and capfd.readouterr().out == "tpu: READY\n" + "".join(
        f"worker {index} running: here {index}\n" for index in range(2)
    )
    assert cloud("stop", "--grace=10") == cloud("stop") == 0
    assert cloud("status") == 0 and capfd.readouterr().out.count("halted") == 2
    assert cloud("run", command=sleep) == 0
    assert cloud("delete") == cloud("delete") == 0 and len(cloud.calls("delete")) == 1
    assert cloud("status") == 0 and capfd.readouterr().out == "tpu: not created\n"


def test_stop_sends_sigterm_once_and_kills_after_the_grace_period(cloud, background, capfd):
    handler = "lambda *_: print('SIGTERM', flush=True)"
    code = f"import signal; signal.signal(signal.SIGTERM, {handler}); print('up', flush=True)"
    ignores_sigterm = python(code + "\nfor _ in range(600): time.sleep(0.1)")
    assert cloud("create") == cloud("push") == cloud("setup") == cloud("run", command=ignores_sigterm) == 0
    logs = [cloud.folder(index) / ".job/log" for index in range(2)]
    eventually(lambda: all("up" in log.read_text() for log in logs))
    first = background("stop", "--grace=5")
    eventually(lambda: all("SIGTERM" in log.read_text() for log in logs))
    assert cloud("stop", "--grace=1") == 0 and "worker 1: killed after 1 s" in capfd.readouterr().err
    eventually(lambda: first == [0])
    assert [log.read_text() for log in logs] == ["up\nSIGTERM\n"] * 2
    assert cloud("status") == 0 and capfd.readouterr().out.count("halted") == 2


def test_failed_calls_are_retried_with_pauses_that_double(cloud, capfd, monkeypatch):
    pauses = []
    monkeypatch.setattr(calls.Calls, "sleep", lambda self, seconds: pauses.append(seconds))
    cloud.plan(create=1, list=1, ssh=3, scp=1, delete=1)
    assert cloud("create") == cloud("push") == cloud("delete") == 0
    assert [pause for pause in pauses if pause != 0.05] == [0.01, 0.01, 0.01, 0.02, 0.04, 0.01, 0.01]
    err = capfd.readouterr().err
    assert all(f"fake gcloud: {step} fails as planned" in err for step in ("list", "create", "ssh", "scp", "delete"))


def test_a_call_that_took_effect_but_failed_is_not_repeated(cloud, capfd):
    """A second one would always fail."""
    cloud.plan(**{"create late": 1, "delete late": 1})
    assert cloud("create") == cloud("delete") == 0
    assert len(cloud.calls("create")) == len(cloud.calls("delete")) == 1


@pytest.mark.parametrize("step", ["list", "create", "ssh", pytest.param("scp", marks=pytest.mark.slow), "delete"])
def test_retries_are_limited(cloud, capfd, step):
    """The exit status is then 1, and one line names the failed command."""
    cloud.plan(**{step: 1000})
    assert 1 in [cloud(name, "--retries=1") for name in ("create", "push", "delete")]
    assert "launch: error: exit status 1 of gcloud compute tpus" in capfd.readouterr().err
    assert step != "create" or len(cloud.calls("create")) == 2  # the call and one retry


@pytest.mark.parametrize("dead", ["FAILED", "SUSPENDED"])
def test_failed_and_preempted_machines_are_deleted_before_creation(cloud, dead):
    cloud.plan(states=["ACCEPTED", dead])
    subprocess.run(["gcloud", "create", "tpu"], check=True)
    cloud.plan()
    assert cloud("create") == 0
    assert len(cloud.calls("delete")) == 1 and len(cloud.calls("create")) == 2


def test_machines_that_cannot_be_created(cloud, capfd):
    cloud.plan(states=["FAILED"])
    assert cloud("up", "--retries=2", command=python("pass")) == 1
    assert "error: tpu could not be created; check its zone" in capfd.readouterr().err
    assert len(cloud.calls("create")) == 3


@pytest.mark.parametrize("number", [pytest.param("SIGKILL", marks=pytest.mark.slow), "SIGTERM"])
def test_a_preempted_job_is_launched_again(cloud, background, capfd, number):
    """With or without time to save. A preemption does not count as a failure; everything is set up again."""
    done = background("up", "--push=data/mine", "--retries=0", command=python(SAVES + TWICE))
    eventually(lambda: all((cloud.place / f"left{index}").exists() for index in range(2)))
    packed = cloud.place / "sedd-tpu.tar.gz"
    before = packed.stat().st_mtime_ns
    cloud.preempt(number)
    eventually(lambda: done)
    out, err = capfd.readouterr()
    assert done == [0] and out.endswith("again\n") and "tpu is SUSPENDED" in err
    assert len(cloud.calls("create")) == 2 and cloud.num_calls("setup") == cloud.num_calls("run") == 2
    assert sum("data/mine" in argv for argv in cloud.calls("scp")) == 2
    assert packed.stat().st_mtime_ns == before  # the code is packed once, even if it changes here


def test_a_worker_that_saves_and_ends_is_not_done(cloud, background, capfd):
    """One worker gets SIGTERM on a machine that stays; the other one waits for it."""
    done = background("up", command=python(SAVES + TWICE))
    eventually(lambda: all((cloud.place / f"left{index}").exists() for index in range(2)))
    os.killpg(int((cloud.folder(1) / ".job/pid").read_text()), 15)
    eventually(lambda: done)
    assert done == [0] and "worker 0 running, worker 1 stopped" in capfd.readouterr().err
    assert cloud.num_calls("run") == 2 and cloud.num_calls("setup") == 1 and len(cloud.calls("create")) == 1


@pytest.mark.slow
def test_a_failing_command_is_restarted_up_to_the_retries(cloud, capfd):
    """Its log is shown after each failure."""
    fails = python("print('line of the log'); sys.exit(5 if me == '1' else 0)")
    assert cloud("up", "--retries=2", command=fails) == 1
    out, err = capfd.readouterr()
    assert cloud.num_calls("run") == 3 and out == 3 * "line of the log\n"
    assert "error: worker 0 done, worker 1 failed (exit status 5)" in err and "costs money" in err


def test_a_command_with_invalid_arguments_is_not_restarted(cloud, capfd):
    """sedd exits with status 2. --then_delete deletes the machines."""
    assert cloud("up", "--then_delete", command=python("sys.exit(2)")) == 1
    assert cloud.num_calls("run") == 1 and len(cloud.calls("delete")) == 1
    assert "costs money" not in capfd.readouterr().err


def test_machines_that_do_not_answer_are_kept(cloud, capfd):
    """The job may run; the error may be on this side."""
    assert cloud("up", "--retries=1", command=python("pass")) == 0
    cloud.plan(ssh=1000)
    assert cloud("watch", "--then_delete", "--retries=1", command=python("pass")) == 1
    assert cloud.calls("delete") == [] and "tpu costs money until deleted" in capfd.readouterr().err


def test_a_watched_command_that_is_stopped_is_not_restarted(cloud, background, capfd):
    """Until `up` is called again."""
    done = background("up", command=python(SAVES + TWICE))
    eventually(lambda: all((cloud.place / f"left{index}").exists() for index in range(2)))
    assert cloud("stop") == 0
    eventually(lambda: done)
    err = capfd.readouterr().err
    assert done == [1] and "the command was stopped by `stop`" in err and "retrying in" not in err
    assert cloud.num_calls("run") == 1
    assert cloud("up", command=python(SAVES + TWICE)) == 0


@pytest.mark.slow
def test_stop_between_two_attempts_prevents_the_second(cloud, background, capfd):
    done = background("up", "--backoff=3", command=python("sys.exit(1)"))
    eventually(lambda: "retrying in 3 s" in capfd.readouterr().err)
    assert cloud("stop") == 0
    eventually(lambda: done)
    assert done == [1] and cloud.num_calls("run") == 1 and "the command was stopped by `stop`" in capfd.readouterr().err


def test_watched_machines_that_are_deleted_are_not_created_again(cloud, background, capfd):
    done = background("up", command=python("left.touch(); time.sleep(60)"))
    eventually(lambda: (cloud.place / "left0").exists())
    assert cloud("delete") == 0
    eventually(lambda: done)
    assert done == [1] and len(cloud.calls("create")) == 1 and "another command deleted tpu" in capfd.readouterr().err


def test_up_and_watch_watch_a_running_command(cloud, background, capfd):
    """Neither starts it again; another command is refused."""
    waits = python("left.touch()\nwhile not pathlib.Path('../../go').exists(): time.sleep(0.1)")
    assert cloud("create") == cloud("push") == cloud("setup") == cloud("run", command=waits) == 0
    assert cloud("up", command=python("pass")) == 1 and "is running; end it" in capfd.readouterr().err
    done = [background(step, command=waits) for step in ("up", "watch")]
    eventually(lambda: "2 of 2 run" in capfd.readouterr().err)
    (cloud.place / "go").touch()
    eventually(lambda: all(done))
    assert done == [[0], [0]] and cloud.num_calls("run") == cloud.num_calls("setup") == 1


@pytest.mark.slow
def test_training_survives_preemptions(cloud, background, capfd):
    """Two real processes get SIGTERM, later SIGKILL; then they evaluate. No step is lost or repeated."""
    shutil.move(small_corpus(cloud.place / "small").path, "data/tiny")
    cloud.python, run = sys.executable, cloud.place / "shared/run"
    flags = ["--push=data/tiny", "--env=JAX_PLATFORMS=cpu", "--env=XLA_FLAGS=--xla_backend_optimization_level=0"]
    settings = ("data.corpus=data/tiny", *SETTINGS, "training.steps=400", "checkpoint.every=5")
    train = ["sedd", "train", f"--workdir={run}", *(f"--config.{setting}" for setting in settings)]
    done = background("up", *flags, command=train)
    metrics = run / "metrics.jsonl"
    for number, steps in (("SIGTERM", 12), ("SIGKILL", 212)):
        eventually(lambda steps=steps: metrics.exists() and metrics.read_text().count("\n") >= steps, seconds=300)
        cloud.preempt(number)
    eventually(lambda: done, seconds=300)
    assert done == [0] and cloud.num_calls("run") == len(cloud.calls("create")) == 3
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 401))
    score = ["sedd", "eval", f"--model={run}", "--data=data/tiny", f"--out={run.parent}/scores"]
    assert cloud("up", *flags, command=score) == 0
    assert 0 < json.loads((run.parent / "scores/report.json").read_text())["bits_per_byte"] < 8
    assert "bits per byte" in capfd.readouterr().out  # of worker 0, who prints
    assert "process 1 of 2" in (cloud.folder(1) / ".job/log").read_text() and len(cloud.calls("create")) == 3
