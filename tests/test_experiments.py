"""Each experiment builds and takes a step, on paper; its header says what people look for; its commands are right."""

import ast
import math
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from launching import launch

from sedd import cli, parallel
from sedd import config as configs
from sedd.config_file import load_config
from sedd.data.batches import Batch
from sedd.data.layout import make_layout
from sedd.data.sources import SOURCES
from sedd.data.splits import SPLITS, make_rule
from sedd.data.tokenizers import PRETRAINED, TRAINED
from sedd.errors import UserError
from sedd.training.objective import Objective
from sedd.training.optimizer import make_optimizer
from sedd.training.step import make_step

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "experiments").glob("*.py"))
LABELS = ["Data", "Commands", "Launch", "Hardware", "Time", "Result"]
COLUMN = 11  # where the text of each part begins
SPECS = ("source", *SPLITS)

each_experiment = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def parts(file):
    """The header's text under each label, in the order of the labels."""
    found = {}
    _, *lines = ast.get_docstring(ast.parse(file.read_text()), clean=False).splitlines()
    for line in filter(None, lines):
        label, text = line[:COLUMN].strip(), line[COLUMN:]
        if label:
            found[label] = []
        found[list(found)[-1]].append(text)
    return {label: "\n".join(text) for label, text in found.items()}


def commands(file, label="Commands"):
    """The header's commands, a line each, whatever stands in brackets left out."""
    lines = parts(file)[label].replace("\\\n", " ").splitlines()
    return [line for line in lines if not line.startswith("(")]


def parsed(command):
    """What the command line makes of a command; SystemExit or UserError where it is wrong."""
    program, *words = shlex.split(command)
    if program != "sedd":
        raise UserError(f"no command of sedd's: {command}")
    args, settings = cli.parse(words)
    configs.override(configs.default(), settings)
    return args


def check_prepare(args):
    """The specs are of kinds that exist, with what such kinds need."""
    specs = {name: getattr(args, name) for name in SPECS if getattr(args, name)}
    if ("source" in specs) == ("train" in specs) or (args.split and "source" not in specs):
        raise UserError("either a source that is split, or a source for each split")
    for spec in specs.values():
        form = SOURCES.get(spec, SOURCES.get(spec.partition(":")[0], (None, "")))[1]
        if not form or spec.count(":") != form.count(":"):
            raise UserError(f"no source: {spec}")
    kind, _, option = args.tokenizer.partition(":")
    if TRAINED.get(kind) != args.tokenizer and not (kind in PRETRAINED and option):
        raise UserError(f"no tokenizer: {args.tokenizer}")
    if args.split:
        make_rule(args.split)
    make_layout(args.mode, args.padding)


def splits_made(prepare):
    """The splits of a corpus."""
    if prepare.train:
        return [split for split in SPLITS if getattr(prepare, split)]
    rule = make_rule(prepare.split or "documents:0.9,0.05,0.05")
    return SPLITS[: len(rule.numbers) + (rule.name == "last")]


def by_name(file):
    """The parsed commands of a file by their names."""
    found = [parsed(command) for command in commands(file)]
    return {args.command: args for args in found}


@each_experiment
def test_header(file):
    """The same parts in the same order, none of them empty."""
    found = parts(file)
    assert list(found) == LABELS and all(found.values())
    assert "not run here" in found["Time"] or "measured" in found["Time"]


@each_experiment
def test_commands(file):
    """They parse, and go together: corpus, config and run are the same in all of them."""
    config, found = load_config(file), by_name(file)
    assert list(found)[:3] == ["prepare", "train", "eval"]
    prepare, train = found["prepare"], found["train"]
    check_prepare(prepare)
    assert (ROOT / train.config).samefile(file)
    assert prepare.out == config.data.corpus
    assert all(args.model == train.workdir for name, args in found.items() if name not in ("prepare", "train"))
    assert (found["eval"].split or "test") in splits_made(prepare)
    for key, value in re.findall(r"--config\.([\w.]+)=(\w+)", "".join(parts(file).values())):
        configs.override(config, [f"{key}={value}"])


@each_experiment
def test_launch(file):
    """It trains as the command does, on the corpus that it copies, into a bucket."""
    (command,), train = commands(file, "Launch"), by_name(file)["train"]
    python, program, *words = shlex.split(command)
    options = launch.parse(words)
    launched = parsed(shlex.join(options.command))
    assert (python, program, options.step) == ("python", "tpu_launch/launch.py", "up")
    assert launched.command == "train" and launched.config == train.config
    assert launched.workdir == f"gs://BUCKET/{train.workdir}"
    assert [source.there for source in options.push] == [load_config(file).data.corpus]
    assert re.fullmatch(r"[a-z][a-z0-9-]*[a-z0-9]", options.name)


@pytest.mark.parametrize(
    "command",
    [
        "sedd prepare --tokenizer=bytes",
        "sedd train --config=x.py --workdir=runs/x --config.training.step=3",
        "sedd train --config=x.py --workdirs=runs/x",
        "sedd eval --model=runs/x --steps=3",
        "sed train --workdir=runs/x",
    ],
)
def test_a_broken_command_is_noticed(command):
    with pytest.raises((SystemExit, UserError)):
        parsed(command)


@pytest.mark.parametrize(
    "change",
    [
        "--source=book:a.txt",
        "--source=csv:a.csv",
        "--train=text:b.txt",
        "--tokenizer=words:3",
        "--tokenizer=gpt2",
        "--split=lines:3",
        "--mode=packed --padding=ignored",
    ],
)
def test_a_broken_preparation_is_noticed(change):
    """Control: without the change nothing is."""
    right = "sedd prepare --source=text:a.txt --tokenizer=bytes --out=data/a"
    check_prepare(parsed(right))
    with pytest.raises((SystemExit, UserError)):
        check_prepare(parsed(f"{right} {change}"))


@each_experiment
def test_vocabulary(file):
    """It is set, so that the experiment builds without its corpus, and is what the tokenizer will have."""
    size, prepare = load_config(file).data.vocab_size, by_name(file)["prepare"]
    if file.stem == "quickstart":
        assert size is None  # people put their own text into it
    elif prepare.tokenizer.partition(":")[2].isdecimal():
        end_of_text = prepare.mode == "padded"  # whose rows it fills up
        assert size == int(prepare.tokenizer.partition(":")[2]) + end_of_text
    else:
        assert size in (27, 30522, 50257)


@each_experiment
def test_a_step_traces(file):
    """The real step on the mesh, for the whole batch; its layers are scanned, since they are traced once so."""
    config = load_config(file)
    config.network.scan = True
    training, data = config.training, config.data
    _, schedule, network = configs.build(config, data.vocab_size or 1280)
    objective = Objective(network, schedule, training.batch_size, training.noise_sampling, training.min_time)
    optimizer = make_optimizer(config.optimizer, training.steps)
    init, step, _ = make_step(config, objective, optimizer, parallel.make_mesh(config))
    padded = by_name(file)["prepare"].mode == "padded"
    batch = Batch(
        jax.ShapeDtypeStruct((training.batch_size, data.block_length), jnp.int32),
        jax.ShapeDtypeStruct((training.batch_size,), jnp.int32) if padded else None,
    )
    state = jax.eval_shape(init)
    after, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32


@pytest.mark.parametrize(
    "name, count",
    [
        ("openwebtext_small_absorb", 169_627_218),
        ("openwebtext_medium_absorb", 424_477_010),
    ],
)
def test_parameters_of_the_papers_models(name, count):
    """To the last one, and with its initial embedding."""
    config = load_config(ROOT / "experiments" / f"{name}.py")
    assert configs.build(config, config.data.vocab_size)[2].num_parameters() == count
    assert math.isclose(config.network.embedding_std, (3 * config.network.width) ** -0.5)
