"""The command line: all commands on a small corpus, and one line for each error."""

import ast
import html
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import types

import jax
import pytest
from small import OPTIMISED, SETTINGS, small_corpus

import sedd
from sedd.cli import main, parse

COMPILED = []  # one entry per compilation in this process
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: COMPILED.append(seconds) if event.endswith("backend_compile_duration") else None
)
FLAGS = [f"--config.{setting}" for setting in (*SETTINGS, "network.layers=1")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with texts, a corpus and a run."""
    folder = tmp_path_factory.mktemp("place")
    small_corpus(folder)
    small_corpus(folder / "other", "bytes")
    assert main(["train", f"--workdir={folder}/run", f"--config.data.corpus={folder}/corpus", *FLAGS]) == 0
    (folder / "latin.txt").write_bytes("na\xefve".encode("latin-1"))
    (folder / "tiny.txt").write_text("twenty characters or so, no more")
    (folder / "empty.txt").write_text("")
    return folder


def test_prepare_writes_a_corpus(place, capsys):
    assert main(["prepare", f"--source=text:{place}/texts/*.txt", "--tokenizer=bytes", f"--out={place}/prepared"]) == 0
    assert re.search(r"train +54 documents", capsys.readouterr().out)
    assert sedd.open_corpus(place / "prepared").vocab_size == 257


def test_prepare_accepts_a_source_for_each_split(place, capsys):
    sources = [f"--train=text:{place}/texts/00*.txt", f"--test=text:{place}/texts/01*.txt"]
    flags = ["--tokenizer=bytes", "--mode=padded", "--padding=scored", "--workers=1", f"--out={place}/padded"]
    assert main(["prepare", *sources, *flags]) == 0
    assert "packed" not in (out := capsys.readouterr().out) and "padded, its padding scored" in out
    assert [line.partition("; ")[2] for line in out.splitlines()[:2]] == ["", "0 documents also in train"]
    assert sedd.open_corpus(place / "padded").splits == ("train", "test")


def test_interrupted_prepare_prints_that_the_same_command_continues(place, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(sedd.prepare.__globals__, "hash_of_splits", interrupt)
    command = ["prepare", f"--source=text:{place}/texts/*.txt", "--tokenizer=bytes", f"--out={place}/stopped"]
    assert main(command) == 130
    assert capsys.readouterr().err == "sedd: stopped; finished parts are kept, and the same command continues\n"
    monkeypatch.undo()
    assert main(command) == 0


def test_dry_run_writes_nothing(place, capsys):
    """It needs no run directory, and no corpus if the vocabulary size is given."""
    before = set(place.iterdir())
    assert main(["train", "--dry_run", "--config.data.vocab_size=50257", f"--workdir={place}/dry"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("parameters", "FLOPs", "mesh", "GiB" if "GiB" in out else "MiB"))
    assert main(["train", "--dry_run", f"--config.data.corpus={place}/corpus"]) == 0
    assert set(place.iterdir()) == before


def test_train_starts_from_weights_and_prints_a_summary(place, capsys):
    """Without --config the network is that of the weights."""
    flags = [f"--config.data.corpus={place}/corpus", "--config.training.steps=2", "--config.training.batch_size=8"]
    assert main(["train", f"--workdir={place}/more", f"--init_from={place}/run", *flags]) == 0
    out = capsys.readouterr().out
    assert "tokens" in out and f"sedd eval   --model={place}/more" in out
    assert json.loads((place / "more/config.json").read_text())["init_from"] == f"{place}/run"


def test_eval_prints_text_or_json(place, capsys):
    """The default corpus is that of the run."""
    assert main(["eval", f"--model={place}/run", "--draws=2"]) == 0
    assert "nats per token" in capsys.readouterr().out
    assert main(["eval", f"--model={place}/run", f"--data={place}/corpus", "--split=train", "--draws=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["draws"] == 2


def test_eval_writes_a_report_and_resumes(place, capsys, monkeypatch):
    """The folder has report, plot and records. A second evaluation prints the same without scoring."""
    command = ["eval", f"--model={place}/run", "--draws=2", f"--out={place}/result"]
    assert main(command) == 0
    first = capsys.readouterr().out
    files = {file.name for file in (place / "result").iterdir()}
    assert files == {"report.json", "profile.png", "draws.f32", "job.json"}
    monkeypatch.setattr("sedd.evaluation.scoring._records", lambda *_: pytest.fail("the text is scored again"))
    assert main(command) == 0
    assert capsys.readouterr().out == first


def test_eval_compares_models_and_accepts_several_protocols(place, capsys):
    both = f"--against={place}/run"
    assert (
        main(["eval", f"--model={place}/run", both, "--draws=2", "--json", "--split=train", f"--out={place}/pair"]) == 0
    )
    comparison = json.loads(capsys.readouterr().out)
    assert comparison["difference"] == 0
    assert json.loads((place / "pair/comparison.json").read_text()) == comparison
    assert main(["eval", f"--model={place}/run", "--protocol=clean,mdlm", "--draws=2", "--split=train"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["protocol", "clean", "mdlm"]


def test_eval_accepts_a_source_without_preparation(place, capsys):
    (place / "line.txt").write_text("the 7 times table: 7, 14, 21, 28\n")
    assert main(["eval", f"--model={place}/run", f"--source=text:{place}/line.txt", "--draws=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_bytes"] == 33


@pytest.mark.slow
def test_eval_of_samples_and_sweep_measure_quality(place, capsys):
    assert main(["sample", f"--model={place}/run", "--num_samples=3", "--steps=3", "--json"]) == 0
    (place / "samples.jsonl").write_text(capsys.readouterr().out)
    assert main(["eval", f"--samples={place}/samples.jsonl", f"--judge={place}/run"]) == 0
    out = capsys.readouterr().out
    assert "generative perplexity" in out and "unigram entropy" in out and "a bound" in out
    flags = ["--samplers=tweedie, margin", "--steps=2", "--num_samples=2", f"--out={place}/sweep"]
    assert main(["sweep", f"--model={place}/run", *flags]) == 0
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()[1:3]] == ["tweedie", "margin"]
    assert {file.name for file in (place / "sweep").iterdir()} == {"sweep.json", "sweep.png"}


def test_sample_prints_texts_or_json(place, capsys):
    assert main(["sample", f"--model={place}/run", "--num_samples=2", "--steps=3", "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(records) == 2 and all(len(record["tokens"]) == 16 for record in records)
    assert main(["sample", f"--model={place}/run", "--num_samples=2", "--steps=3"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("--- 1 of 2\n") and re.search(r"^\d+ network calls; unigram entropy \d\.\d+ nats", err, re.M)


def test_infill_accepts_templates_or_a_prefix(place, capsys):
    assert main(["infill", "the <blank:2> times", f"--model={place}/run", "--steps=3", "a <blank:2>"]) == 0
    assert re.search(r"^--- 1 of 2\nthe .*times\n--- 2 of 2\na ", capsys.readouterr().out, re.S)
    assert main(["infill", f"--model={place}/run", "--prefix=the ", "--length=6", "--steps=3"]) == 0
    assert capsys.readouterr().out.startswith("---\nthe ")


def test_html_page_has_the_printed_text(place, capsys):
    command = ["infill", f"--model={place}/run", "the <blank:2> times", "--steps=3", f"--html={place}/page.html"]
    assert main(command) == 0
    text = capsys.readouterr().out.removeprefix("---\n").removesuffix("\n")
    page = (place / "page.html").read_text()
    assert html.escape(text) in page and "network calls" in page


@pytest.mark.parametrize(
    "command, message",
    [
        ("train --workdir={0}/new --config.optimizer.lerning_rate=1", "nearest is optimizer.learning_rate"),
        ("train --workdir={0}/new --config={0}/absent.py", "no such file"),
        ("train --workdir={0}/new --config.data.corpus={0}/absent", "no folder"),
        ("train --workdir={0}/new --config.data.corpus={0}/corpus --config.data.block_length=9999999", "shorter than"),
        ("train --workdir={0}/run --config.data.corpus={0}/corpus", "another run"),
        ("train --workdir={0}/texts --config.data.corpus={0}/corpus", "holds no run"),
        ("train --workdir={0}/new --config.data.corpus={0}/corpus --config.data.vocab_size=5", "data.vocab_size is 5"),
        ("train --workdir={0}/new --config.data.corpus={0}/corpus --config.mesh.data=3", "does not fit the 8"),
        ("train", "--workdir"),
        ("train --workdir={0}/new --config.data.corpus={0}/corpus --init_from={0}/absent", "no folder"),
        (
            "train --workdir={0}/new --config.data.corpus={0}/corpus --init_from={0}/run --config.network.width=32",
            "cannot start this run",
        ),
        ("train --dry_run --config.data.corpus={0}/absent", "no folder"),
        ("train --dry_run --config.data.vocab_size=9 --config.mesh.data=3", "does not fit the 8"),
        ("train --workdir={0}/new --worksdir=x", "does not accept --worksdir=x; the nearest is --workdir"),
        ("train --workdir={0}/new --steps=5", "the nearest is --config.training.steps; see sedd train --help"),
        ("train --workdir={0}/new --config.training.steps 5", "write --config.training.steps=5"),
        ("train --workdir={0}/new --config.data.corpus 'my data'", "write --config.data.corpus='my data'"),
        ("train --workdir={0}/new --config.network.scan", "write --config.network.scan=VALUE"),
        ("train --workdir={0}/new 5", "does not accept 5; see sedd train --help"),
        ("prepare --source=text:{0}/absent*.txt --out={0}/new", "no file"),
        ("prepare --source=text:{0}/empty.txt --out={0}/new", "no text"),
        ("prepare --source=text:{0}/latin.txt --out={0}/new", "UTF-8"),
        ("prepare --source=text:{0}/tiny.txt --out={0}/new --tokenizer=sentencepiece:8000", "8000"),
        ("prepare --source=tables:x --out={0}/new", "unknown source"),
        ("prepare --source=text:{0}/tiny.txt --tokenizer=words --out={0}/new", "unknown tokenizer"),
        ("prepare --source=jsonl:{0}/tiny.txt:text --tokenizer=bytes --out={0}/new", "tiny.txt, line 1 is not JSON"),
        ("prepare --source=text:{0}/tiny.txt --split=half --out={0}/new", "there is no split 'half'"),
        ("prepare --source=text:{0}/tiny.txt --padding=scored --out={0}/new", "leave --padding out"),
        ("prepare --source=text:{0}/tiny.txt --train=text:{0}/tiny.txt --out={0}/new", "give either --source"),
        ("prepare --out={0}/new", "give either --source"),
        ("prepare --source=text:a --source=text:b --out={0}/new", "--source: given twice, as text:a and text:b"),
        ("prepare --test=text:{0}/tiny.txt --out={0}/new", "needs one for train"),
        ("prepare --source=text:{0}/tiny.txt --tokenizer=bytes --out={0}/corpus", "choose another --out"),
        ("eval --model={0}/absent", "no folder"),
        ("eval --model={0}/run --data={0}/other/corpus", "another tokenizer"),
        ("eval --model={0}/run --split=tset", "there are train, validation, test"),
        ("eval --model={0}/run --draws=0", "draws must be at least 1"),
        ("eval --model={0}/run --draws=1e12", "at most 1,048,576, not 1000000000000"),
        ("eval --model={0}/run --config.training.steps=1", "does not accept --config"),
        ("eval", "either --model or --samples"),
        ("eval --model={0}/run --protocol=paper", "there are clean, sedd-paper, mdlm, duo"),
        ("eval --model={0}/run --data={0}/corpus --source=text:{0}/tiny.txt", "either --data or --source"),
        ("eval --model={0}/run --source=text:{0}/absent", "no file matches"),
        ("eval --model={0}/run --source=text:{0}/empty.txt", "holds no text"),
        ("eval --model={0}/run --against={0}/run --protocol=clean,duo", "--against takes one protocol"),
        ("eval --model={0}/run --judge={0}/run", "goes with --samples"),
        ("eval --model={0}/run --out={0}/texts", "holds no evaluation"),
        ("eval --model={0}/run --out={0}/tiny.txt", "something else is in the way"),
        ("eval --model={0}/run --split=test --source=text:{0}/tiny.txt", "a corpus has splits"),
        ("eval --model={0}/run --tokenizer=bytes", "has a tokenizer of its own"),
        ("eval --samples={0}/absent", "cannot be read as samples"),
        ("eval --samples={0}/tiny.txt --out={0}/new", "--out goes with --model"),
        ("eval --samples={0}/tiny.txt --protocol=mdlm", "--protocol goes with --model"),
        ("eval --samples={0}/tiny.txt --seed=1", "--seed goes with --model"),
        ("eval --model={0}/run --model={0}/other", "--model: given twice"),
        ("eval --model={0}/run --protocol=", "there are clean, sedd-paper, mdlm, duo"),
        ("train --config=a.py --config=b.py --workdir={0}/new", "--config: given twice, as a.py and b.py"),
        ("eval --samples={0}/tiny.txt --tokenizer=characters", "is trained on text; name a pretrained one"),
        ("eval --samples={0}/tiny.txt", "is cut off"),
        ("sweep --model={0}/run --steps=8,many", "--steps takes numbers"),
        ("sweep --model={0}/run --samplers=best", "there are euler, tweedie"),
        ("sample --model={0}/run --steps=0", "steps must be at least 1"),
        ("sample --model={0}/run --num_samples=0", "number of samples must be at least 1"),
        ("sample --model={0}/run --sampler=best", "there are euler, tweedie"),
        ("sample --model={0}/run --length=0", "at least 1"),
        ("sample --model={0}/run --top_p=0", "top_p must lie in (0, 1]"),
        ("sample --model={0}/run --sampler=barker", "use one of euler, tweedie"),
        ("sample --model={0}/run --sampler=planned:{0}/tiny.txt", "there is no profile in"),
        ("sample --model={0}/run --watch", "needs a terminal; leave it out, or write a page with --html"),
        ("sample --model={0}/run --html={0}/absent/page.html", "cannot be written"),
        ("sample --model={0}/run --steps=many", "'many' is not an integer"),
        ("sample --model={0}/run --steps=1.5", "'1.5' is not an integer"),
        ("sample --model={0}/run --steps=1e12", "at most 1,048,576"),
        ("sample --model={0}/run --num_samples=1e12", "tokens are more than the 268,435,456 of one call"),
        ("sample --model={0}/run --length=1000000000000", "of one call; sample fewer at a time"),
        (
            "sample --model={0}/run --num_samples=999 --steps=99999 --html={0}/new.html",
            "of one call; sample fewer at a time",
        ),
        ("sample --model={0}/run --top-p=0.9", "the nearest is --top_p"),
        ("--model={0}/run sample", "the command comes first, as in sedd sample --model"),
        ("infill --model={0}/run the", "no blank"),
        ("infill --model={0}/run '<blank: 3> of <blank:2>'", "'<blank: 3>' is not a blank; write <blank:8>"),
        ("infill --model={0}/run '<blank:999999999999>'", "of one call; sample fewer at a time"),
        ("infill --model={0}/run '<blank:2>' --num_samples=1e12", "of one call; sample fewer at a time"),
        ("infill --model={0}/run --prefix=the --length=1e12", "of one call; sample fewer at a time"),
        ("infill --model={0}/run '-<blank:2>'", "a template that begins with - comes after --"),
        ("infill --model={0}/run --prefix -x", "is written --prefix=-..."),
        ("infill --model={0}/run the<blank:0>", "blank of 0"),
        ("infill --model={0}/run", "takes a template"),
        ("infill --model={0}/run --prefix=thetimestablethetable", "leaves none"),
        ("quickstart --source=builtin:poems", "invalid choice"),
        ("", "COMMAND"),
        ("dance", "invalid choice"),
    ],
)
def test_errors_are_one_line(place, command, message, capsys, monkeypatch):
    """The status is 2; there is no traceback, no compilation and no new file."""
    monkeypatch.chdir(place)
    compiled = len(COMPILED)
    status = main(shlex.split(command.format(place)))
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and message in error, error
    assert not (place / "new").exists() and len(COMPILED) == compiled > 0


@pytest.mark.smoke
def test_flags_come_in_any_order_and_form():
    """Flags and templates in any order, values after = or a space, integers such as 1e3, `help`."""
    words = ["infill", "a <blank:1>", "--model", "m", "- b <blank:2>", "--steps=1e3", "--seed", "-1", "--", "-c", "--d"]
    args, settings = parse(words)
    assert args.template == ["a <blank:1>", "- b <blank:2>", "-c", "--d"] and not settings
    assert (args.command, args.model, args.steps, args.seed) == ("infill", "m", 1000, -1)
    args, settings = parse(["train", "--config.training.steps=5", "--workdir", "r", "--config.data.corpus=a=b c"])
    assert (args.workdir, settings) == ("r", ["training.steps=5", "data.corpus=a=b c"])
    assert main(["help"]) == main(["help", "train"]) == main(["--help"]) == 0


def test_command_line_is_decoded_as_utf_8_in_any_locale(capsys):
    """Python itself decodes it as ASCII under LC_ALL=C."""
    words = ["infill", "--model=m", "café <blank:1>", "--prefix=Grüße"]
    args, _ = parse([os.fsencode(word).decode("ascii", "surrogateescape") for word in words])
    assert (args.template, args.prefix) == (["café <blank:1>"], "Grüße")
    with pytest.raises(SystemExit):
        parse([*words, b"caf\xe9".decode("utf-8", "surrogateescape")])
    assert "is not UTF-8" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_results_are_saved_if_stdout_is_full(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["sample", f"--model={place}/run", "--num_samples=2", "--steps=3", "--json"]) == 2
    (file,) = tmp_path.iterdir()
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 2
    assert f"stdout cannot be written (No space left on device); the results are in {file}" in capsys.readouterr().err


def test_ascii_stdout_gets_replacement_characters(place, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["eval", f"--model={place}/run", "--draws=2"]) == 0
    assert re.search(rb"bound +\d\.\d+ \? ", stdout.buffer.getvalue())


def test_commands_printed_by_train_parse(place, capsys, monkeypatch):
    """Also with spaces in the name of a folder."""
    workdir = str(place / "my runs/a")
    monkeypatch.setattr("sedd.training.fit.fit", lambda *_: "summary")
    assert main(["train", f"--workdir={workdir}", f"--config.data.corpus={place}/corpus"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  sedd")]
    for line in lines:
        args, _ = parse(shlex.split(line)[1:])
        assert args.model == workdir
    assert len(lines) == 3


def test_commands_printed_by_the_quickstart_parse(capsys, monkeypatch):
    module = importlib.import_module("sedd.quickstart")
    report = types.SimpleNamespace(num_bytes=1, bits_per_byte=1.0, bits_per_byte_error=0.1)
    samples = types.SimpleNamespace(texts=["text"])
    model = types.SimpleNamespace(block_length=32, perplexity=lambda _: report, sample=lambda **_: samples)
    model.infill = lambda *_, **__: samples
    for name, value in (("prepare", None), ("train", model), ("baselines", {})):
        monkeypatch.setattr(module, name, lambda *_, value=value: value)
    assert main(["quickstart", "--workdir=my runs/a's"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  sedd")]
    commands = [parse(shlex.split(line)[1:])[0] for line in lines]
    assert [args.model for args in commands[:3]] == ["my runs/a's"] * 3 and len(commands) == 5
    assert commands[1].template == ["GREEK SMALL LETTER<blank:1> WITH TONOS"]


@pytest.mark.smoke
def test_process_prints_its_version_and_exits_with_2_for_an_error():
    def run(*args):
        return subprocess.run([sys.executable, "-m", "sedd", *args], capture_output=True, text=True)

    assert run("--version").stdout.strip() == f"sedd {sedd.__version__}"
    wrong = run("sample", "--model=nowhere")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and not wrong.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name, steps, share", [("names", 400, 0.68), ("functions", 100, 0.95)])
def test_quickstart_trains_samples_and_infills(tmp_path, name, steps, share):
    """The bound is at most a share of the unigram entropy; the given text of the template is unchanged."""
    command = [sys.executable, "-m", "sedd", "quickstart", f"--source=builtin:{name}", "--workdir=runs/quickstart"]
    command += [f"--config.training.steps={steps}"]
    done = subprocess.run(command, cwd=tmp_path, env=OPTIMISED, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    numbers = dict(re.findall(r"^  (\w[\w, ]*?) {2,}(\d+\.\d+)", done.stdout, re.M))
    assert float(numbers["this model, a bound"]) <= share * float(numbers["unigram"]), done.stdout
    assert {"bigram", "zlib", "xz, given train"} <= numbers.keys() and "±" in done.stdout
    assert "sample 2" in done.stdout and "nats/token" in done.stderr
    template, infilled = re.search(r"infilled from (.*)\n([\s\S]*)\n\nnext:", done.stdout).groups()
    given = re.split("<blank:.>", ast.literal_eval(template))
    assert re.fullmatch("(.*)".join(map(re.escape, given)), infilled, re.S), done.stdout
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["quickstart"]
