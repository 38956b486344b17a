"""The records of a run and its TensorBoard files."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest
from small import parts, small_config, small_corpus

import sedd
from sedd.training.estimate import step_flops
from sedd.training.fit import fit
from sedd.training.guard import NonFiniteGuard
from sedd.training.metrics import Metrics
from sedd.training.tensorboard import TensorBoardWriter


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("small"))


@pytest.mark.slow
def test_tensorboard_has_numbers_and_texts_of_a_resumed_run(corpus, tmp_path, monkeypatch):
    """Events after the step of resumption are purged. Needs tensorboardX."""
    pytest.importorskip("tensorboardX")
    config = small_config(corpus, "evaluation.every=3", "metrics.tensorboard=true", "optimizer.decay=constant")
    fit(config, tmp_path / "run")
    config.training.steps = 8
    fit(config, tmp_path / "run")
    steps, starts = {}, []
    for event in events(tmp_path / "run/tensorboard"):
        starts += [event.step] if event.HasField("session_log") else []
        for value in event.summary.value:
            steps.setdefault(value.tag, []).append(event.step)
    assert starts == [1, 7]
    for name in ("loss", "gradient_norm", "learning_rate"):
        assert steps[name] == list(range(1, 9))
    assert steps["validation_nats_per_token"] == steps["samples/2/text_summary"] == [3, 6, 8]
    assert len(steps["tokens_per_second"]) >= 3
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(sedd.UserError, match="needs tensorboardX; pip install"):
        fit(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def events(folder):
    """Yields all events, file by file. A record is a length, its checksum, the event and its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.iterdir(), key=lambda file: int(file.suffix[1:])):
        content, offset = file.read_bytes(), 0
        while offset < len(content):
            size = int.from_bytes(content[offset : offset + 8], "little")
            yield Event.FromString(content[offset + 12 : offset + 12 + size])
            offset += 16 + size


def test_failure_of_tensorboard_does_not_stop_training(tmp_path, capsys):
    """A folder that cannot be created, and a full disk: one line each."""
    pytest.importorskip("tensorboardX")
    (tmp_path / "file").write_text("")
    board = TensorBoardWriter(tmp_path / "file/tensorboard", 0)
    board.numbers(1, {"loss": 1.0})
    board.close()
    board = TensorBoardWriter(tmp_path / "board", 0)
    board._events.write_event = lambda event: (_ for _ in ()).throw(OSError("disk full"))
    for step in (1, 2):
        board.numbers(step, {"loss": 1.0})
        board.texts(step, ["a"])
    board.close()
    assert capsys.readouterr().err.count("training continues") == 2


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_records_after_the_resumed_step_are_removed(tmp_path, name):
    path = tmp_path / name
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 6)) + '{"step": 6, "lo')
    with Metrics(tmp_path, 3, 9, NonFiniteGuard(0, None)):
        pass
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.slow
def test_mfu_and_profiler_trace_are_recorded(corpus, tmp_path, monkeypatch, capsys):
    """MFU counts the FLOPs without recomputation; the trace is written."""
    monkeypatch.setattr("sedd.training.fit.peak_flops", lambda kind: 1e9)
    config = small_config(corpus, "training.steps=14", "metrics.profile=2", "network.remat=full")
    summary = fit(config, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    objective, _, _ = parts(config, corpus)
    flops = step_flops(objective, 8, 16, recomputed=False)
    assert flops < step_flops(objective, 8, 16)
    for record in records[1:]:
        seconds = 8 * 16 / record["tokens_per_second"]
        assert record["mfu"] == pytest.approx(flops / (seconds * 1e9 * 8), rel=0.05, abs=1e-4)
    assert summary.mfu > 0 and "% MFU)" in str(summary)
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))
    assert "% MFU" in capsys.readouterr().err


def test_mfu_of_an_unknown_chip_is_not_recorded(tmp_path):
    with Metrics(tmp_path, 0, 2, NonFiniteGuard(0, None)) as log:
        for step in (1, 2):
            numbers = {"loss": 1.0, "gradient_norm": 1.0, "learning_rate": 1.0, "tokens": 8, "terms": {"part": 0.25}}
            log.record(step, jax.tree.map(jnp.float32, numbers))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "tokens_per_second" in records[1] and "mfu" not in records[1]
    assert [record["part"] for record in records] == [0.25, 0.25]  # the terms of the objective
    assert log.summary().mfu is None
