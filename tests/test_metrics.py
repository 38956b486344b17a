"""What a run reports: its records, and TensorBoard's files."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest
from small import small_config, small_corpus

import sedd
from sedd import config as configs
from sedd.training.estimate import step_flops
from sedd.training.fit import fit
from sedd.training.guard import NonFiniteGuard
from sedd.training.metrics import Metrics
from sedd.training.tensorboard import TensorBoardWriter


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("small"))


@pytest.mark.slow
def test_tensorboard(corpus, tmp_path, monkeypatch):
    """Numbers and texts, of a resumed run too, whose later events are purged. Needs tensorboardX."""
    pytest.importorskip("tensorboardX")
    config = small_config(corpus, "evaluation.every=3", "metrics.tensorboard=true", "optimizer.decay=constant")
    fit(config, tmp_path / "run")
    config.training.steps = 8
    fit(config, tmp_path / "run")
    found, starts = {}, []
    for event in events(tmp_path / "run/tensorboard"):
        starts += [event.step] if event.HasField("session_log") else []
        for value in event.summary.value:
            found.setdefault(value.tag, []).append(event.step)
    assert starts == [1, 7]
    for name in ("loss", "gradient_norm", "learning_rate"):
        assert found[name] == list(range(1, 9))
    assert found["validation_nats_per_token"] == found["samples/2/text_summary"] == [3, 6, 8]
    assert len(found["tokens_per_second"]) >= 3
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(sedd.UserError, match="needs tensorboardX; pip install"):
        fit(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def events(folder):
    """All events, file by file: a length, its checksum, so many bytes, their checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.iterdir(), key=lambda file: int(file.suffix[1:])):
        content, at = file.read_bytes(), 0
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            yield Event.FromString(content[at + 12 : at + 12 + size])
            at += 16 + size


def test_a_tracker_that_fails_stops_nothing(tmp_path, capsys):
    """A folder that cannot be made, and a disk that is full: one line each."""
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
def test_records_of_steps_to_be_taken_again_are_dropped(tmp_path, name):
    path = tmp_path / name
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 6)) + '{"step": 6, "lo')
    with Metrics(tmp_path, 3, 9, NonFiniteGuard(0, None)):
        pass
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.slow
def test_utilisation_and_a_trace(corpus, tmp_path, monkeypatch, capsys):
    """The share of a chip's rate that the algorithm's multiplications take; some steps traced, and no others."""
    monkeypatch.setattr("sedd.training.fit.peak_flops", lambda kind: 1e9)
    config = small_config(corpus, "training.steps=14", "metrics.profile=2", "network.remat=full")
    summary = fit(config, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    _, _, network = configs.build(config, corpus.vocab_size)
    flops = step_flops(network, 8, 16, paired=True, recomputed=False)
    assert flops < step_flops(network, 8, 16, paired=True)
    for record in records[1:]:
        seconds = 8 * 16 / record["tokens_per_second"]
        assert record["mfu"] == pytest.approx(flops / (seconds * 1e9 * 8), rel=0.05, abs=1e-4)
    assert summary.mfu > 0 and "% MFU)" in str(summary)
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))
    assert "% MFU" in capsys.readouterr().err


def test_nothing_is_said_of_a_chip_that_is_not_known(tmp_path):
    with Metrics(tmp_path, 0, 2, NonFiniteGuard(0, None)) as log:
        for step in (1, 2):
            numbers = {"loss": 1.0, "gradient_norm": 1.0, "learning_rate": 1.0, "tokens": 8}
            log.record(step, jax.tree.map(jnp.float32, numbers))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "tokens_per_second" in records[1] and "mfu" not in records[1]
    assert log.summary().mfu is None
