"""Each experiment traces a training step; its header has all parts; the commands in the header parse and agree."""

import ast
import math
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from launching import launch
from small import ENCODERS

from sedd import cli
from sedd import config as configs
from sedd.codecs.encoder import Encoder
from sedd.codecs.hub import hub_name
from sedd.config_file import load_config
from sedd.data.batches import Batch
from sedd.data.layout import make_layout
from sedd.data.sources import SOURCES
from sedd.data.splits import SPLITS, make_rule
from sedd.data.tokenizers import PRETRAINED, TRAINED
from sedd.errors import UserError
from sedd.evaluation.protocols import get_protocol
from sedd.runtime import parallel
from sedd.training.objectives import make_objective
from sedd.training.optimizer import make_optimizer
from sedd.training.step import make_step

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "experiments").glob("*.py"))
LABELS = ["Data", "Commands", "Launch", "Hardware", "Time", "Result"]
OPTIONAL_LABELS = {"Published", "Differs"}  # commands on a published checkpoint; what the settings cannot express
COLUMN = 11  # the column where the text of each part begins
SPECS = ("source", *SPLITS)

each_experiment = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def parts(file):
    """Returns the header's text by label, in the order of the labels."""
    texts = {}
    _, *lines = ast.get_docstring(ast.parse(file.read_text()), clean=False).splitlines()
    for line in filter(None, lines):
        label, text = line[:COLUMN].strip(), line[COLUMN:]
        if label:
            texts[label] = []
        texts[list(texts)[-1]].append(text)
    return {label: "\n".join(text) for label, text in texts.items()}


def commands(file, label="Commands"):
    """Returns the header's commands, one a line, without lines in brackets."""
    lines = parts(file)[label].replace("\\\n", " ").splitlines()
    return [line for line in lines if not line.startswith("(")]


def parsed(command):
    """Returns the parsed arguments of a command. SystemExit or UserError if it is invalid."""
    program, *words = shlex.split(command)
    if program != "sedd":
        raise UserError(f"not a command of sedd: {command}")
    args, settings = cli.parse(words)
    configs.override(configs.default(), settings)
    return args


def check_prepare(args):
    """UserError unless the kinds of sources and tokenizer exist and have their options."""
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


def splits_of(prepare):
    """Returns the splits that a `sedd prepare` command makes."""
    if prepare.train:
        return [split for split in SPLITS if getattr(prepare, split)]
    rule = make_rule(prepare.split or "documents:0.9,0.05,0.05")
    return SPLITS[: len(rule.numbers) + (rule.name == "last")]


def by_name(file):
    """Returns the parsed commands of a file by their names."""
    return {args.command: args for args in map(parsed, commands(file))}


@each_experiment
def test_a_header_has_all_parts_in_order(file):
    header = parts(file)
    assert [label for label in header if label not in OPTIONAL_LABELS] == LABELS and all(header.values())
    assert "not run here" in header["Time"] or "measured" in header["Time"]


@each_experiment
def test_commands_parse_and_agree(file):
    """Corpus, config and run are the same in all of them."""
    config, by_command = load_config(file), by_name(file)
    assert list(by_command)[:3] == ["prepare", "train", "eval"]
    prepare, train = by_command["prepare"], by_command["train"]
    check_prepare(prepare)
    assert (ROOT / train.config).samefile(file)
    assert prepare.out == config.data.corpus
    assert all(args.model == train.workdir for name, args in by_command.items() if name not in ("prepare", "train"))
    assert (by_command["eval"].split or "test") in splits_of(prepare)
    for key, value in re.findall(r"--config\.([\w.]+)=(\w+)", "".join(parts(file).values())):
        configs.override(config, [f"{key}={value}"])


@each_experiment
def test_the_launch_command_trains_the_same_config_into_a_bucket(file):
    """On the corpus and the encoder that it copies."""
    (command,), train = commands(file, "Launch"), by_name(file)["train"]
    python, program, *words = shlex.split(command)
    options = launch.parse(words)
    launched = parsed(shlex.join(options.command))
    assert (python, program, options.step) == ("python", "tpu_launch/launch.py", "up")
    assert launched.command == "train" and launched.config == train.config
    assert launched.workdir == f"gs://BUCKET/{train.workdir}"
    codec, folders = load_config(file).codec, [load_config(file).data.corpus]
    if codec.name == "encoder":  # workers do not have the package
        folders.append("data/minilm" if file.stem == "tencdm_e2e" else codec.encoder)
    assert [source.target for source in options.push] == folders
    assert re.fullmatch(r"[a-z][a-z0-9-]*[a-z0-9]", options.name)


@pytest.mark.parametrize("name", ["mdlm_openwebtext", "duo_openwebtext"])
def test_commands_on_published_checkpoints_parse_and_agree(name):
    """They score the corpus of the experiment, with its tokenizer, and sources and protocols that exist."""
    file = ROOT / "experiments" / f"{name}.py"
    prepare = by_name(file)["prepare"]
    for args in map(parsed, commands(file, "Published")):
        assert args.command == "eval" and hub_name(args.model) and args.tokenizer == prepare.tokenizer
        assert all(get_protocol(protocol) for protocol in args.protocol.split(","))
        assert args.data == prepare.out if args.source is None else args.source.partition(":")[0] in SOURCES


@pytest.mark.parametrize(
    "command",
    [
        "sedd prepare --tokenizer=bytes",
        "sedd train --config=x.py --workdir=runs/x --config.training.step=3",
        "sedd train --config=x.py --workdirs=runs/x",
        "sedd eval --model=runs/x --temperature=3",
        "sed train --workdir=runs/x",
    ],
)
def test_an_invalid_command_is_rejected(command):
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
def test_an_invalid_preparation_is_rejected(change):
    """Control: the command without the change is valid."""
    right = "sedd prepare --source=text:a.txt --tokenizer=bytes --out=data/a"
    check_prepare(parsed(right))
    with pytest.raises((SystemExit, UserError)):
        check_prepare(parsed(f"{right} {change}"))


@each_experiment
def test_vocab_size_is_that_of_the_tokenizer(file):
    """It is set, so that the experiment builds without its corpus."""
    size, prepare = load_config(file).data.vocab_size, by_name(file)["prepare"]
    if file.stem == "quickstart" or prepare.tokenizer.startswith("wordpieces:"):
        assert size is None  # users train it on their own text; it depends on the text
    elif prepare.tokenizer.partition(":")[2].isdecimal():
        end_of_text = prepare.mode == "padded"  # which fills padded rows
        assert size == int(prepare.tokenizer.partition(":")[2]) + end_of_text
    else:
        assert size in (27, 28996, 30522, 50257, 50258)


def frozen_shapes(network):
    """The shapes of the parameters of a network that nothing trains."""
    codec = getattr(network, "codec", None)
    if not isinstance(codec, Encoder):
        return {}
    module, tokens = codec.encoder, jnp.zeros((1, 2), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), tokens, jnp.ones((1, 2), bool))["params"]
    integers = {"ids": (codec.vocab_size,), "end": (), "start": (), "special_ids": (5,)}
    floats = {"mean": (module.width,), "basis": (module.width, codec.width), "special": (5, codec.width)}
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in integers.items()}
    shapes |= {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in floats.items()}
    return {"codec": {"encoder": params, **shapes}}


@each_experiment
def test_a_training_step_traces(file):
    """The full step on the mesh and batch; layers are scanned, which traces them once. A small encoder stands in."""
    config = load_config(file)
    config.network.scan = not config.network.long_skips
    if config.codec.name == "encoder":
        config.codec.update(encoder=str(ENCODERS / "bert"), width=0)
        config.network.layers = min(2, config.network.layers)
    training, data = config.training, config.data
    _, schedule, network = configs.build(config, data.vocab_size or 1280)
    objective = make_objective(config, network, schedule)
    optimizer = make_optimizer(config.optimizer, training.steps)
    init, step, _ = make_step(config, objective, optimizer, parallel.make_mesh(config))
    padded = by_name(file)["prepare"].mode == "padded"
    batch = Batch(
        jax.ShapeDtypeStruct((training.batch_size, data.block_length), jnp.int32),
        jax.ShapeDtypeStruct((training.batch_size,), jnp.int32) if padded else None,
    )
    state = jax.eval_shape(init)
    after, metrics = jax.eval_shape(step, state, batch, frozen_shapes(network))
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32


@pytest.mark.parametrize(
    "name, count",
    [
        ("openwebtext_small_absorb", 169_627_218),
        ("openwebtext_medium_absorb", 424_477_010),
        ("duo_openwebtext", 169_627_218),
        ("udlm_lm1b", 139_292_986),
    ],
)
def test_models_of_papers_have_their_numbers_of_parameters(name, count):
    """Exactly; and its initial scale of the embedding."""
    config = load_config(ROOT / "experiments" / f"{name}.py")
    assert configs.build(config, config.data.vocab_size)[2].num_parameters() == count
    assert math.isclose(config.network.embedding_std, (3 * config.network.width) ** -0.5)
