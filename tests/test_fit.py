"""Runs: their files, exact resumption, the run directory, weights to start from, and evaluation during training."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jobs
import numpy as np
import pytest
from etils import epath
from small import SETTINGS, parts, small_config, small_corpus, unusual_jax_settings, write_files

import sedd
from sedd import config as configs
from sedd.data.corpus import open_corpus
from sedd.data.prepare import prepare
from sedd.diffusion.keyed_random import root_key
from sedd.network.token_network import TokenNetwork
from sedd.runtime import parallel
from sedd.training import validation
from sedd.training.checkpoint import Checkpoints, _manifest, steps_saved
from sedd.training.fit import Interrupted, fit
from sedd.training.run import resolve
from sedd.training.step import make_step
from sedd.training.workdir import prepare_workdir


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("small"))


def test_training_lowers_the_loss_and_records_every_step(corpus, tmp_path, capsys, caplog):
    """Every step is in metrics.jsonl, with the bound and samples of the evaluated steps and of the last step.

    The step is compiled once.
    """
    settings = ("network.layers=1", "training.steps=60", "training.ema_decay=0.9", "evaluation.every=25")
    config = small_config(corpus, *settings)
    with jax.log_compiles():
        model = sedd.train(config, tmp_path / "run")
    assert caplog.text.count("Finished XLA compilation of jit(step)") == 1
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 61))
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    assert abs(steps[0]["loss"] - np.log(corpus.vocab_size)) < 0.3  # nats per token
    bounds = [record["validation_nats_per_token"] for record in records if "loss" not in record]
    assert len(bounds) == 3 and bounds[2] < bounds[0]
    assert [record["step"] for record in records if "loss" not in record] == [25, 50, 60]
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [25, 25, 50, 50, 60, 60]
    assert all(corpus.tokenizer.decode(np.array(sample["tokens"])) == sample["text"] for sample in samples)
    err = capsys.readouterr().err
    assert "step 60, sample 2 of 2\n" + samples[-1]["text"] in err and "step 50: validation_nats_per_token" in err
    with unusual_jax_settings():  # the run is finished, and only read
        again = sedd.train(config, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == len(records)


def saved(workdir, corpus):
    """Returns all arrays of the newest checkpoint, by their paths."""
    config = configs.from_dict(json.loads((workdir / "config.json").read_text())["config"])
    init, _, shardings = make_step(config, *parts(config, corpus))
    with Checkpoints(epath.Path(workdir) / "checkpoints", config.checkpoint) as checkpoints:
        state = checkpoints.restore(parallel.abstract_arrays(jax.eval_shape(init), shardings))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(state)}


ENVIRONMENT = jobs.environment(devices=1)


def command(corpus, workdir):
    """The command that trains 300 steps."""
    settings = (f"data.corpus={corpus.path}", *SETTINGS, "training.steps=300", "training.ema_decay=0.9")
    flags = [f"--config.{setting}" for setting in settings]
    return [sys.executable, "-m", "sedd.cli", "train", f"--workdir={workdir}", *flags]


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    """A run that was not interrupted."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    subprocess.run(command(corpus, workdir), env=ENVIRONMENT, check=True, capture_output=True)
    return workdir


@pytest.mark.slow
def test_interrupted_and_resumed_run_equals_uninterrupted_run(corpus, uninterrupted, tmp_path):
    """By Ctrl-C, then by SIGTERM; exit status 0 each time. State and losses are equal bit for bit in the end."""
    workdir = tmp_path / "interrupted"
    metrics, stopped = workdir / "metrics.jsonl", 0
    for stop in (signal.SIGINT, signal.SIGTERM):
        interrupted = subprocess.Popen(command(corpus, workdir), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") >= stopped + 3) and time.monotonic() < deadline:
            time.sleep(0.02)
        interrupted.send_signal(stop)
        assert "the same command continues" in interrupted.communicate(timeout=120)[1]
        assert interrupted.returncode == 0
        before, stopped = stopped, max(int(path.name) for path in (workdir / "checkpoints").iterdir())
        assert before + 3 <= stopped < 300
    subprocess.run(command(corpus, workdir), env=ENVIRONMENT, check=True, capture_output=True)
    expected, actual = saved(uninterrupted, corpus), saved(workdir, corpus)
    assert expected.keys() == actual.keys() and expected[".step"] == actual[".step"] == 300
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)
    losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()] for run in (uninterrupted, workdir)]
    assert losses[0] == losses[1] and len(losses[0]) == 300


EVALUATED = ("evaluation.every=2", "training.ema_decay=0.9", "checkpoint.keep_best=true")


def test_attention_that_does_not_run_here_is_refused_before_the_folder_is_made(corpus, tmp_path, monkeypatch):
    """In one line, which names the setting. Control: the same run with another attention makes the folder and comes to
    the step that it would compile."""

    class Reached(Exception):
        pass

    def reached(*_):
        raise Reached

    monkeypatch.setattr("sedd.training.fit.make_step", reached)
    settings = ("network.dtype=bfloat16", "network.heads=1", "training.steps=1")
    with pytest.raises(sedd.UserError, match="attention=cudnn does not run on cpu devices; set network.attention=xla"):
        fit(small_config(corpus, *settings, "network.attention=cudnn"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(Reached):
        fit(small_config(corpus, *settings), tmp_path / "run")
    assert (tmp_path / "run/config.json").is_file()


@pytest.fixture(scope="module")
def evaluated(corpus, tmp_path_factory):
    """An uninterrupted run of four steps, evaluated at steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    fit(small_config(corpus, "training.steps=4", *EVALUATED), workdir)
    return workdir


@pytest.mark.parametrize("at, before", [("bound", 2), ("samples", 2), ("bound", 4)])
@pytest.mark.slow
def test_signal_interrupts_an_evaluation(corpus, evaluated, tmp_path, monkeypatch, at, before):
    """Between two batches of the bound, or two steps of the sampler. The state is saved, and the resumed run evaluates
    that step first: no record is lost or repeated. Control: without a signal the evaluation is completed."""
    config, workdir, calls = small_config(corpus, "training.steps=4", *EVALUATED), tmp_path / "run", []
    monkeypatch.setattr(TokenNetwork, "rows_at_once", lambda *_: 1)  # several batches on eight devices
    original = getattr(validation, f"validation_{at}")

    def interrupted(*args):
        *others, check = args

        def counted():
            calls[-1] += 1
            check()

        calls.append(0)
        if 2 * len(calls) == before:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*others, counted)

    monkeypatch.setattr(f"sedd.training.fit.validation_{at}", interrupted)
    with pytest.raises(Interrupted, match=f"stopped at step {before}; all is saved"):
        fit(config, workdir)
    assert calls[-1] == 1 and all(number > 1 for number in calls[:-1])
    assert max(steps_saved(epath.Path(workdir / "checkpoints"))) == before
    monkeypatch.undo()
    fit(config, workdir)
    for name in ("metrics.jsonl", "samples.jsonl"):
        runs = [[json.loads(line) for line in (run / name).open()] for run in (evaluated, workdir)]
        for record in (*runs[0], *runs[1]):
            record.pop("tokens_per_second", None)
        assert runs[0] == runs[1]
    manifests = [_manifest(epath.Path(run / f"checkpoints/{before}")) for run in (evaluated, workdir)]
    assert manifests[0] == manifests[1] and manifests[0]["bound"] > 0


def test_restore_falls_back_to_the_newest_checkpoint_that_verifies(corpus, tmp_path, capsys):
    """A changed byte is detected. If no checkpoint is intact there is one error line, and no new run starts."""
    config = small_config(corpus, "network.layers=1", "checkpoint.every=3")
    with unusual_jax_settings():
        newest = sedd.train(config, tmp_path / "run").params
    damage(tmp_path / "run/checkpoints/6")
    older = sedd.load(tmp_path / "run").params
    assert re.search(r"step 6 is damaged \(.*\); going back to step 3\n", capsys.readouterr().err)
    assert not np.array_equal(older["trunk"]["embedding"], newest["trunk"]["embedding"])
    damage(tmp_path / "run/checkpoints/3")
    with pytest.raises(sedd.UserError, match="no checkpoint in .* can be used: that of step 6 is damaged"):
        sedd.load(tmp_path / "run")
    with pytest.raises(sedd.UserError, match="no checkpoint in .* can be used: that of step 6 is damaged"):
        fit(config, tmp_path / "run")


def damage(checkpoint):
    """Changes one byte in the middle of each file of arrays."""
    for file in [*checkpoint.glob("*/d/*"), *checkpoint.glob("*/ocdbt.process_0/d/*")]:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


CONSTANT = ("optimizer.decay=constant",)  # so that the step is compiled once for any number of steps
IMMUTABLE = [
    "training.seed=1",
    "training.batch_size=16",
    "training.noise_sampling=time",
    "training.ema_decay=0.5",
    "data.block_length=8",
    "network.width=32",
    "network.layers=1",
    "network.scan=true",
    "network.prediction=score",
    "network.dropout=0.1",
    "network.dtype=bfloat16",
    "schedule.eps=0.01",
    "schedule.name=geometric",
    "process.name=uniform",
    "optimizer.name=muon",
    "optimizer.learning_rate=0.1",
    "optimizer.clip_norm=1.0",
]
MUTABLE = [
    "training.steps=9",
    "training.accumulation=2",
    "mesh.model=2",
    "evaluation.every=3",
    "evaluation.samples=0",
    "checkpoint.every=2",
    "metrics.tensorboard=true",
    "network.remat=full",
]


@pytest.mark.parametrize("change", IMMUTABLE)
def test_folder_of_another_run_is_refused(corpus, tmp_path, change):
    """In one line that names the setting; the files of the run are unchanged."""
    prepare_workdir(tmp_path, small_config(corpus), corpus, corpus.layout)
    before = (tmp_path / "config.json").read_text()
    settings = [change, "training.noise_sampling=time"] if change == "process.name=uniform" else [change]
    with pytest.raises(sedd.UserError, match=f"another run: .*{change.split('=')[0]} ") as caught:
        prepare_workdir(tmp_path, small_config(corpus, *settings), corpus, corpus.layout)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "config.json").read_text() == before


@pytest.mark.parametrize("change", MUTABLE)
def test_mutable_settings_may_change_when_a_run_resumes(corpus, tmp_path, change):
    prepare_workdir(tmp_path, small_config(corpus), corpus, corpus.layout)
    prepare_workdir(tmp_path, small_config(corpus, change), corpus, corpus.layout)
    group, name = change.partition("=")[0].split(".")
    stored = json.loads((tmp_path / "config.json").read_text())["config"]
    assert stored[group][name] == small_config(corpus, change)[group][name]


def test_config_keys_newer_than_the_run_have_their_default(corpus, tmp_path):
    prepare_workdir(tmp_path, small_config(corpus), corpus, corpus.layout)
    description = json.loads((tmp_path / "config.json").read_text())
    assert description["config"]["network"].pop("given_embedding") is False
    (tmp_path / "config.json").write_text(json.dumps(description))
    prepare_workdir(tmp_path, small_config(corpus), corpus, corpus.layout)


def test_corpus_of_a_run_is_identified_by_its_hash(corpus, tmp_path):
    """It may be moved; another text or layout is refused. Its layout is recorded."""
    prepare_workdir(tmp_path / "run", small_config(corpus), corpus, corpus.layout)
    assert json.loads((tmp_path / "run/config.json").read_text())["layout"] == corpus.layout.to_json()
    shutil.copytree(corpus.path, tmp_path / "moved")
    moved = open_corpus(tmp_path / "moved")
    prepare_workdir(tmp_path / "run", small_config(moved), moved, moved.layout)
    text = str(corpus.path.parent / "texts/01*.txt")
    for other in (
        prepare(f"text:{text}", "characters", tmp_path / "other"),
        prepare(f"text:{corpus.path.parent}/texts/*.txt", "characters", tmp_path / "padded", mode="padded"),
    ):
        with pytest.raises(sedd.UserError, match="another run: .*corpus"):
            prepare_workdir(tmp_path / "run", small_config(other), other, other.layout)


def test_damaged_config_of_a_run_is_refused(corpus, tmp_path):
    prepare_workdir(tmp_path, small_config(corpus), corpus, corpus.layout)
    file = tmp_path / "config.json"
    for damaged in (file.read_text()[:-9], "[]"):
        file.write_text(damaged)
        with pytest.raises(sedd.UserError, match="config.json (is damaged|does not describe a model)"):
            fit(small_config(corpus), tmp_path)


@pytest.mark.slow
def test_run_resumes_with_more_steps(corpus, tmp_path):
    """The summary of a call is that of its own steps; another seed is refused."""
    first = fit(small_config(corpus, *CONSTANT), tmp_path / "run")
    second = fit(small_config(corpus, *CONSTANT, "training.steps=9"), tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(records) == 9
    assert (first.steps, second.steps, first.tokens, second.tokens) == (6, 3, 6 * 8 * 16, 3 * 8 * 16)
    assert min(r["loss"] for r in records[6:]) <= second.loss <= max(r["loss"] for r in records[6:])
    assert second.tokens_per_second > 0 and second.validation_nats_per_token is None
    assert "3 steps, 384 tokens in" in str(second)
    assert str(fit(small_config(corpus, *CONSTANT, "training.steps=9"), tmp_path / "run")) == "nothing was left to do"
    with pytest.raises(sedd.UserError, match="another run: training.seed"):
        fit(small_config(corpus, *CONSTANT, "training.seed=1"), tmp_path / "run")


def shifted_params(config, corpus):
    """Parameters that differ from those of any seed."""
    random, network = np.random.default_rng(9), parts(config, corpus)[0].network
    shapes = jax.eval_shape(network.init, jax.random.key(9))
    return jax.tree.map(lambda leaf: random.normal(0, 0.1, leaf.shape).astype(leaf.dtype), shapes)


@pytest.mark.slow
def test_training_starts_from_given_weights(corpus, tmp_path):
    """Parameters and EMA start from them; a resumed run ignores them; their origin is recorded once."""
    config = small_config(corpus, "training.ema_decay=0.9", "optimizer.learning_rate=1e-30", *CONSTANT)
    config.training.steps = 2
    weights = shifted_params(config, corpus)
    fit(config, tmp_path / "run", weights, "my/runs/base")
    description = json.loads((tmp_path / "run/config.json").read_text())
    assert description["init_from"] == os.path.abspath("my/runs/base")
    for name in ("params", "ema"):
        arrays = saved(tmp_path / "run", corpus)
        np.testing.assert_allclose(arrays[f".{name}['trunk']['embedding']"], weights["trunk"]["embedding"], rtol=1e-6)
    config.training.steps = 4
    del weights["head"]  # ignored, since the run resumes
    fit(config, tmp_path / "run", weights, None)
    assert json.loads((tmp_path / "run/config.json").read_text())["init_from"] == os.path.abspath("my/runs/base")
    with pytest.raises(sedd.UserError, match="another run: init_from"):
        fit(config, tmp_path / "run", weights, "my/runs/other")


def test_weights_that_do_not_fit_are_refused(corpus, tmp_path):
    """In one line that names the first leaf; the folder is not created."""
    config = small_config(corpus)
    wide, good = shifted_params(small_config(corpus, "network.width=32"), corpus), shifted_params(config, corpus)
    half = {**good, "head": jax.tree.map(lambda leaf: leaf.astype(np.float16), good["head"])}
    for weights, message in (
        (wide, r"head/modulation/bias is float32\[64\] there, float32\[32\]"),
        ({"trunk": good["trunk"]}, "head/modulation/bias is missing there"),
        ({**good, "more": np.zeros(2)}, r"more is float64\[2\] there, missing"),
        (half, "head/modulation/bias is float16"),
    ):
        with pytest.raises(sedd.UserError, match=f"runs/base cannot start this run: {message}") as caught:
            fit(config, tmp_path / "run", weights, "runs/base")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_weights_of_another_vocabulary_keep_the_rows_of_common_tokens(corpus, tmp_path, capsys):
    """By their texts; the mask and the end of a text too. Tokens of the new corpus alone start at random."""
    shuffled = write_files(tmp_path / "texts", ["the ABC able"] * 40)
    other = prepare(shuffled, "characters", tmp_path / "other")
    config = small_config(other, "network.scan=true")
    weights = shifted_params(small_config(corpus), corpus)
    run = resolve(config, tmp_path / "run", weights, "runs/base", corpus.tokenizer)
    old, new = corpus.tokenizer, other.tokenizer
    assert new.vocab_size != old.vocab_size and "blocks" in run.weights["trunk"]
    random = jax.jit(run.objective.init)(root_key(0))
    head, table = run.weights["head"]["out"], run.weights["trunk"]["embedding"]
    pairs = {(new.end_of_text, old.end_of_text), (new.vocab_size, old.vocab_size)}
    pairs |= {(new.vocabulary[text], old.vocabulary[text]) for text in "theabl "}
    for ours, theirs in pairs:
        np.testing.assert_array_equal(table[ours], weights["trunk"]["embedding"][theirs])
        np.testing.assert_array_equal(head["kernel"][:, ours], weights["head"]["out"]["kernel"][:, theirs])
        assert head["bias"][ours] == weights["head"]["out"]["bias"][theirs]
    fresh = new.vocabulary["A"]
    assert "A" not in old.vocabulary
    np.testing.assert_allclose(table[fresh], random["trunk"]["embedding"][fresh], rtol=1e-6)
    assert "tokens of the corpus start as in runs/base" in capsys.readouterr().err
    strange = prepare(write_files(tmp_path / "greek", ["αβγ" * 20] * 20), "characters", tmp_path / "alone")
    nothing = dataclasses.replace(corpus.tokenizer, has_end_of_text=False)
    with pytest.raises(sedd.UserError, match="has no token in common"):
        resolve(small_config(strange), tmp_path / "run", weights, "runs/base", nothing)


def test_evaluation_without_a_validation_split_is_refused(corpus, tmp_path):
    other = prepare({"train": f"text:{corpus.path.parent}/texts/*.txt"}, "characters", tmp_path / "other")
    with pytest.raises(sedd.UserError, match="needs a validation split, .* has none; set evaluation.every=0"):
        fit(small_config(other, "evaluation.every=3"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_folder_with_other_files_is_refused(corpus, tmp_path):
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(sedd.UserError, match="holds no run"):
        fit(small_config(corpus), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]
