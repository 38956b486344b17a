"""`sedd info`: the facts of runs, exports, published checkpoints and corpora, and whether their arrays verify."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file
from small import encoder_config, encoder_corpus, model_of, parts, small_config, small_corpus

import sedd
from sedd import config as configs
from sedd.cli import main
from sedd.codecs.frozen import FILE, Normalisation, save_npz
from sedd.diffusion.keyed_random import root_key
from sedd.info import describe
from sedd.pretrained import FORMATS
from sedd.training.checkpoint import Checkpoints
from sedd.training.encoder import read_for
from sedd.training.guard import NonFiniteGuard
from sedd.training.metrics import BOUND, Metrics
from sedd.training.step import make_step
from sedd.training.workdir import prepare_workdir

HERE = Path(__file__).parent
PUBLISHED = {"mdlm": "published/mdlm", "sedd": "parity/absorb", "masked_lm": "encoders/bert"}
MDLM = str(HERE / PUBLISHED["mdlm"])
UNCHANGED = ("training", "splits")  # the groups of facts that no damage of an array changes


def filled(shapes):
    """Returns arrays of these shapes and types, which need no compilation."""
    return jax.tree.map(lambda leaf: np.arange(leaf.size).reshape(leaf.shape).astype(leaf.dtype), shapes)


def begun(folder, config, corpus):
    """Begins a run in a folder, with two checkpoints of a state, and the records of two bounds."""
    prepare_workdir(epath.Path(folder), config, corpus, corpus.layout)
    objective, optimizer, mesh = parts(config, corpus, 1)
    state = jax.device_put(filled(jax.eval_shape(make_step(config, objective, optimizer, mesh)[0])))
    with Checkpoints(epath.Path(folder / "checkpoints"), config.checkpoint) as saved:
        for step in (3, 6):
            saved.save(state.replace(step=jnp.int32(step)))
    with Metrics(folder, 0, 6, NonFiniteGuard(0, folder)) as log:
        log.bound(3, {BOUND: 3.25})
        log.bound(6, {BOUND: 3.5})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a corpus, a run and an export."""
    folder = tmp_path_factory.mktemp("place")
    corpus = small_corpus(folder)
    begun(folder / "run", configs.validate(small_config(corpus, "training.ema_decay=0.9")), corpus)
    export = model_of(small_config(corpus), corpus.tokenizer, lambda init: filled(jax.eval_shape(init, root_key(0))))
    export.save(folder / "export")
    return folder


@pytest.fixture(scope="module")
def intact(place):
    """The facts of folders before they are damaged, by name."""
    return {name: describe(place / name) for name in ("run", "export", "corpus", MDLM)}


@pytest.fixture
def copy(place, tmp_path):
    """Returns a function that copies a folder of `place`, or of any path, to be damaged."""
    return lambda name: Path(shutil.copytree(place / name, tmp_path / Path(name).name))


def size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_a_run_is_described(place):
    facts, corpus = describe(place / "run"), sedd.open_corpus(place / "corpus")
    stored = sum(leaf.size for leaf in jax.tree.leaves(sedd.load(place / "run").params))
    padding = (128 - 26) * (2 * 16 + 1)  # rows of the embedding; columns and biases of the head
    assert facts["model"] == {
        "kind": "run",
        "path": str(place / "run"),
        **dict.fromkeys(("format", "title", "codec", "encoder", "encoder_digest")),
        "process": "absorbing",
        "schedule": "loglinear",
        "prediction": "denoiser",
        "conditioning": "sigma",
        "block_length": 16,
        "layout": "packed",
    }
    assert facts["network"] == {
        "architecture": "dit",
        "block_size": 0,
        "width": 16,
        "layers": 2,
        "heads": 2,
        "parameters": stored - padding,
        "weight_bytes": size(place / "run/checkpoints/6/ema"),
    }
    assert facts["vocabulary"] == {"vocab_size": 25, "mask_id": 25, "tokenizer": "characters", "end_of_text": 24}
    assert facts["training"] == {
        "step": 6,
        "saved_steps": [3, 6],
        "steps": 6,
        "batch_size": 8,
        "tokens_seen": 6 * 8 * 16,
        "best_bound": {"nats_per_token": 3.25, "step": 3},
        "latest_bound": {"nats_per_token": 3.5, "step": 6},
        "ema_decay": 0.9,
        "loss": "bound",
        "optimizer": "adamw",
        "seed": 0,
        "init_from": None,
        "corpus": str(place / "corpus"),
        "corpus_hash": corpus.hash,
        "sedd": sedd.__version__,
    }
    assert facts["verified"] is True and facts["problem"] is None


def test_a_path_of_a_checkpoint_describes_that_checkpoint(place):
    facts = describe(place / "run/checkpoints/3")
    assert (facts["model"]["kind"], facts["training"]["step"], facts["verified"]) == ("run", 3, True)
    assert facts["training"]["tokens_seen"] == 3 * 8 * 16


def test_a_run_without_checkpoint_is_not_verified(copy, capsys):
    """This is no error."""
    run = copy("run")
    shutil.rmtree(run / "checkpoints")
    facts = describe(run)
    assert facts["training"]["step"] is None and facts["training"]["saved_steps"] == []
    assert facts["network"]["weight_bytes"] is None and facts["verified"] is None
    assert main(["info", str(run)]) == 0
    assert re.search(r"^verified +no checkpoint is saved yet$", capsys.readouterr().out, re.M)


def test_corpus_and_frozen_encoder_need_not_be_there(tmp_path, monkeypatch):
    """Control: such a model cannot be loaded."""
    corpus = encoder_corpus(tmp_path)
    config = configs.validate(encoder_config(corpus, "network.layers=1"))
    width = read_for(config, corpus).module.width
    begun(tmp_path / "run", config, corpus)
    save_npz(epath.Path(tmp_path / "run" / FILE), Normalisation(np.zeros(width), np.eye(width)))
    about = json.loads((tmp_path / "run/config.json").read_text())
    about["config"]["codec"]["encoder"] = "/absent"
    (tmp_path / "run/config.json").write_text(json.dumps(about))
    shutil.rmtree(corpus.path)
    facts = describe(tmp_path / "run")
    assert [facts["model"][name] for name in ("codec", "encoder")] == ["encoder", "/absent"] and facts["verified"]
    assert facts["model"]["encoder_digest"] == config.codec.digest and facts["vocabulary"]["mask_id"] is None
    assert facts["network"]["parameters"] == configs.build(config, corpus.vocab_size)[2].num_parameters()
    with pytest.raises(sedd.UserError, match="needs the encoder"):
        sedd.load(tmp_path / "run")
    (tmp_path / "run" / FILE).unlink()
    assert "encoder.npz is missing" in describe(tmp_path / "run")["problem"]


def test_an_export_is_described(place):
    facts = describe(place / "export")
    assert facts["model"]["kind"] == "exported model" and facts["verified"] is True
    assert facts["network"]["weight_bytes"] == (place / "export/weights.safetensors").stat().st_size
    assert facts["network"]["parameters"] == describe(place / "run")["network"]["parameters"]
    of_run = ("step", "saved_steps", "tokens_seen", "best_bound", "latest_bound", "corpus_hash")
    assert [facts["training"][name] for name in of_run] == [None] * 6
    assert (facts["training"]["steps"], facts["training"]["sedd"]) == (6, sedd.__version__)


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "mdlm",
            {"parameters": 39_461, "vocab_size": 36, "mask_id": 36, "tokenizer": None, "conditioning": "constant"},
        ),
        ("sedd", {"parameters": 75_510, "vocab_size": 37, "mask_id": 37, "tokenizer": None, "conditioning": "sigma"}),
        ("masked_lm", {"vocab_size": 25, "tokenizer": "huggingface", "end_of_text": 3, "conditioning": "constant"}),
    ],
)
def test_published_checkpoints_are_described(name, expected):
    facts = describe(HERE / PUBLISHED[name])
    found = {**facts["model"], **facts["network"], **facts["vocabulary"]}
    expected |= {"kind": "published checkpoint", "format": name, "title": FORMATS[name].title, "process": "absorbing"}
    assert found | expected == found and facts["training"] is None and facts["verified"] is True
    assert facts["network"]["weight_bytes"] == (HERE / PUBLISHED[name] / "model.safetensors").stat().st_size


def test_a_corpus_is_described(place):
    corpus, facts = sedd.open_corpus(place / "corpus"), describe(place / "corpus")
    counts = {"documents": 54, "tokens": corpus.num_tokens("train"), "bytes": corpus.num_bytes("train")}
    assert facts["splits"]["train"] == {**counts, "characters": corpus.num_characters("train")}
    assert list(facts["splits"]) == ["train", "validation", "test"]
    assert facts["corpus"] | {"kind": "corpus", "hash": corpus.hash, "layout": "packed"} == facts["corpus"]
    assert facts["vocabulary"] == {"vocab_size": 25, "tokenizer": "characters", "end_of_text": 24}
    assert facts["verified"] is True


def changed(item):
    """Returns a function that changes a byte of each array of a part of the newest checkpoint of a run."""

    def change(run):
        files = [file for file in (run / f"checkpoints/6/{item}").rglob("d/*") if file.is_file()]
        for file in files:
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        assert files

    return change


def other_digest(run):
    """Changes the digest of an array of the newest checkpoint."""
    file = run / "checkpoints/6/manifest/metadata"
    manifest = json.loads(file.read_text())
    manifest["arrays"]["ema/trunk/embedding"]["digest"] = 16 * "0"
    file.write_text(json.dumps(manifest))


def truncated(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-10])


def not_finite(name):
    """Returns a function that makes the last number of the first tensor NaN."""

    def change(folder):
        tensors = load_file(folder / name)
        next(iter(tensors.values())).reshape(-1)[-1] = np.nan
        save_file(tensors, folder / name)

    return change


def wider(export):
    about = json.loads((export / "config.json").read_text())
    about["config"]["network"]["width"] = 32
    (export / "config.json").write_text(json.dumps(about))


def swapped(corpus):
    """Exchanges two different tokens of the text."""
    tokens = np.fromfile(corpus / "train.tokens", "<u2")
    other = np.flatnonzero(tokens != tokens[0])[0]
    tokens[[0, other]] = tokens[[other, 0]]
    tokens.tofile(corpus / "train.tokens")


@pytest.mark.parametrize(
    "name, damage, problem",
    [
        ("run", changed("params"), r"the checkpoint of step 6 is damaged \(.*\)"),
        ("run", changed("ema"), r"the checkpoint of step 6 is damaged \(.*\)"),
        ("run", changed("optimizer"), r"the checkpoint of step 6 is damaged \(.*\)"),
        ("run", other_digest, r"step 6 is damaged \(ema/trunk/embedding is not what was written\)"),
        ("run", truncated("tokenizer/tokenizer.model"), "the tokenizer in .* is damaged"),
        ("export", truncated("weights.safetensors"), "weights.safetensors is damaged"),
        ("export", not_finite("weights.safetensors"), "has numbers that are not finite"),
        ("export", wider, "weights.safetensors does not fit its config.json"),
        ("export", lambda export: (export / "weights.safetensors").unlink(), "weights.safetensors is missing"),
        (MDLM, truncated("model.safetensors"), "model.safetensors is damaged"),
        (MDLM, not_finite("model.safetensors"), "has numbers that are not finite"),
        ("corpus", swapped, "they have another hash"),
    ],
)
def test_damage_is_described_and_has_a_status(copy, intact, capsys, name, damage, problem):
    """In one line, after the other facts, which are those of the folder before. Control: it verifies before."""
    folder, before = copy(name), intact[name]
    assert before["verified"] is True and before["problem"] is None
    damage(folder)
    assert main(["info", str(folder), "--json"]) == 2
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert facts["verified"] is False and re.search(problem, facts["problem"])
    assert err == f"sedd: error: {folder} does not verify: {facts['problem']}\n"
    assert [facts.get(group) for group in UNCHANGED] == [before.get(group) for group in UNCHANGED]
    assert facts.get("model") == (before["model"] | {"path": str(folder)} if "model" in before else None)


@pytest.mark.parametrize(
    "name, problem",
    [
        ("corpus/tokenizer", "is no run, exported model, published checkpoint or corpus"),
        (HERE / "encoders/t5", "is not a model of sedd: its config.json has no config"),
        ("absent", "there is no folder"),
    ],
)
def test_any_other_folder_is_an_error_of_one_line(place, capsys, name, problem):
    assert main(["info", str(place / name)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and problem in err


@pytest.mark.parametrize("name", ["run", "corpus", MDLM])
def test_text_and_json_have_the_same_facts(place, capsys, name):
    """In the same groups and order; the text leaves out what is not recorded, but for those of which it says "none"."""
    assert main(["info", str(place / name)]) == main(["info", str(place / name), "--json"]) == 0
    text, start, rest = capsys.readouterr().out.partition("\n{\n")
    facts = json.loads(start + rest)
    assert [line for line in text.splitlines() if line[0] != " "][:-1] == [group for group in facts if facts[group]][
        :-1
    ]
    lines = iter(re.findall(r"^  (\S.*?)  +(.+)$", text, re.M))
    for members in (members for members in facts.values() if isinstance(members, dict)):
        for key, value in members.items():
            if value is None and key not in ("mask_id", "end_of_text", "ema_decay", "tokenizer"):
                continue
            shown, line = next(lines)
            assert shown == key.replace("_", " ") and same(line, value), (shown, line, value)
    assert next(lines, None) is None and re.search(r"^verified +yes$", text, re.M) and facts["verified"] is True


def same(line, value):
    """True if a line of text shows a value: of numbers all, of other values the text."""
    if value is None:
        return line.startswith("none")
    if isinstance(value, str):
        return line == value
    numbers = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", line)] == list(numbers)


def test_a_run_of_another_version_of_sedd_resumes(copy, place):
    """Also one that recorded none. Then it records this version."""
    run, corpus = copy("run"), sedd.open_corpus(place / "corpus")
    about = json.loads((run / "config.json").read_text())
    for other in (about | {"sedd": "0.1.9"}, {key: value for key, value in about.items() if key != "sedd"}):
        (run / "config.json").write_text(json.dumps(other))
        assert describe(run)["training"]["sedd"] == other.get("sedd")
        config = configs.validate(small_config(corpus, "training.ema_decay=0.9"))
        prepare_workdir(epath.Path(run), config, corpus, corpus.layout)
        assert json.loads((run / "config.json").read_text()) == about
