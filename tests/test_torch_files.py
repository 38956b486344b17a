"""Files of PyTorch: training checkpoints of the authors' code, pytorch_model.bin, damaged ones, and those with code."""

import argparse
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from small import ENCODERS

import sedd
from sedd.codecs import torch_files
from sedd.codecs.huggingface import read_tensors
from sedd.codecs.pretrained_encoder import read_encoder
from sedd.errors import UserError
from sedd.pretrained.hydra import description, read_yaml

HERE = Path(__file__).parent
FOLDERS = {"sedd": HERE / "parity" / "absorb", **{name: HERE / "published" / name for name in ("mdlm", "duo", "radd")}}
LIGHTNING = """
defaults: none
diffusion: absorbing_state
backbone: dit
parameterization: subs
time_conditioning: false
block_size: 64
loader: {global_batch_size: 512, num_workers: '${eval:"len(__import__(''os'').sched_getaffinity(0))"}'}
model: {name: tiny, type: ddit, length: '${block_size}', scale_by_sigma: true}
data: {train: openwebtext, tokenizer_name_or_path: gpt2}
noise: {type: loglinear, sigma_min: 1e-4, sigma_max: 20}
training: {ema: 0.9999}
wandb: {id: '${.name}_${seed}', tags: ['${noise.type}']}
"""
DUO = {"name": "duo_base", "backbone": "dit", "parameterization": "mean", "time_conditioning": True}


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="needs torch")


def refusal(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def about(name):
    return json.loads((FOLDERS[name] / "config.json").read_text())


def module(torch, tensors):
    """A module with these tensors, in the tree and with the buffer of the authors' networks."""
    root = torch.nn.Module()
    for name, array in tensors.items():
        *path, last = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, torch.nn.Module())
            node = node._modules[part]
        tensor = torch.from_numpy(array.copy())
        if last == "inv_freq":
            node.register_buffer(last, tensor)
        else:
            node.register_parameter(last, torch.nn.Parameter(tensor))
    return root


def trained(torch, name, **extra):
    """The weights of a published checkpoint, and its averages, as the authors' training code saves them."""
    averages, raw = (module(torch, load_file(FOLDERS[name] / "model.safetensors")) for _ in range(2))
    with torch.no_grad():
        for parameter in raw.parameters():
            parameter.add_(1)
    shadow = [parameter.clone().detach() for parameter in averages.parameters()]
    state, ema = {**raw.state_dict(), **extra}, {"decay": 0.9999, "num_updates": 7, "shadow_params": shadow}
    return state, ema


def save_run(torch, folder, name, **settings):
    """Writes the run of the authors' training code; returns its checkpoint."""
    (folder / ".hydra").mkdir(parents=True)
    is_lightning = name in ("mdlm", "duo")
    file = folder / ("checkpoints/last.ckpt" if is_lightning else "checkpoints-meta/checkpoint.pth")
    file.parent.mkdir()
    if is_lightning:
        config = lightning_config(name)
        state, ema = trained(torch, name, **{"metrics.weight": torch.ones(2)})
        saved = {"state_dict": state, "ema": ema, "epoch": 1, "hyper_parameters": {"rate": 0.1}, "loops": {"a": [1]}}
    else:
        config = about(name)
        state, ema = trained(torch, name)
        saved = {"optimizer": {"state": {}, "param_groups": [{"lr": 3e-4}]}, "model": state, "ema": ema, "step": 9}
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    torch.save({**saved, **settings}, file)
    return file


def lightning_config(name):
    """The config of a run of MDLM or Duo, with the sizes of a published checkpoint."""
    config, sizes = yaml.safe_load(LIGHTNING), about(name)
    ours = {"hidden_size": "hidden_dim", **{key: key for key in ("cond_dim", "n_blocks", "n_heads", "dropout")}}
    config["model"] |= {key: sizes[published] for key, published in ours.items()}
    config["block_size"] = sizes["model_length"]
    if name == "duo":
        for key in ("diffusion", "backbone", "parameterization", "time_conditioning"):
            del config[key]
        config |= {"algo": dict(DUO), "noise": {"type": "log-linear", "eps": 1e-3}}
    return config


def same_model(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert found.config.network == expected.config.network and found.vocab_size == expected.vocab_size
    assert found.block_length == expected.block_length and found.config.process == expected.config.process


# --- what is read


@pytest.mark.parametrize("name", FOLDERS)
def test_a_training_checkpoint_is_the_published_model_of_its_averages(torch, tmp_path, name):
    same_model(sedd.load(save_run(torch, tmp_path / "run", name)), sedd.load(FOLDERS[name]))


def test_weights_are_read_where_the_training_has_no_averages(torch, tmp_path):
    file = save_run(torch, tmp_path / "run", "sedd", ema=None)
    found, expected = sedd.load(file).params, sedd.load(FOLDERS["sedd"]).params
    difference = found["trunk"]["block_0"]["up"]["bias"] - expected["trunk"]["block_0"]["up"]["bias"]
    np.testing.assert_allclose(difference, 1, rtol=1e-5)


def test_the_config_may_be_a_config_json_beside_the_file(torch, tmp_path):
    """It comes before that of the run; the file may be of tensors alone."""
    file = save_run(torch, tmp_path / "run", "mdlm")
    shutil.rmtree(tmp_path / "run" / ".hydra")
    missing = refusal(sedd.load, file)
    assert missing.startswith(f"there is no config beside {file}; copy that of its run to") and "config.json" in missing
    shutil.copy(FOLDERS["mdlm"] / "config.json", file.parent)
    same_model(sedd.load(file), sedd.load(FOLDERS["mdlm"]))
    alone = file.with_name("weights.pt")
    torch.save({name: torch.from_numpy(array) for name, array in read_tensors(file)[0].items()}, alone)
    same_model(sedd.load(alone), sedd.load(FOLDERS["mdlm"]))


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "older"])
def test_a_folder_may_have_a_pytorch_file(torch, tmp_path, archive):
    for source, read in ((FOLDERS["sedd"], sedd.load), (ENCODERS / "bert", read_encoder)):
        folder = tmp_path / source.name
        shutil.copytree(source, folder)
        (folder / "model.safetensors").unlink()
        tensors = {name: torch.from_numpy(array) for name, array in load_file(source / "model.safetensors").items()}
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
        jax.tree.map(np.testing.assert_array_equal, read(folder).params, read(source).params)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_short_floating_point_numbers_become_float32(torch, tmp_path, kind):
    numbers = torch.tensor([1.5, -0.25], dtype=getattr(torch, kind))
    torch.save({"a": numbers, "b": torch.tensor([1, 2])}, tmp_path / "a.pt")
    found = torch_files.read(tmp_path / "a.pt")
    assert found["a"].dtype == np.float32 and found["a"].tolist() == [1.5, -0.25] and found["b"].dtype == np.int64


def test_arrays_do_not_change_with_the_file(torch, tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "a.pt")
    found = torch_files.read(tmp_path / "a.pt")["a"]
    with (tmp_path / "a.pt").open("r+b") as file:
        file.write(b"\x01" * (tmp_path / "a.pt").stat().st_size)
    assert not found.any()


# --- configs


def test_references_of_a_hydra_config_are_resolved_and_calls_are_not(tmp_path):
    (tmp_path / "config.yaml").write_text(LIGHTNING)
    found = read_yaml(tmp_path / "config.yaml")
    assert found["model"]["length"] == 64 and found["wandb"]["id"] == "${.name}_${seed}"
    assert found["loader"]["num_workers"].startswith("${eval:")


@pytest.mark.parametrize("content", [b"[1, 2]", b"a: [", b"\xff\xfe\xff", b"a: !!python/object/apply:os.system ['x']"])
def test_a_damaged_hydra_config_is_one_line(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    assert "is damaged: it is no YAML" in refusal(read_yaml, tmp_path / "config.yaml")


def set_in(config, key, value):
    *groups, last = key.split(".")
    for group in groups:
        config = config[group]
    config.pop(last) if value is None else config.update({last: value})


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("mdlm", {"backbone": "dimamba"}, "config.yaml: backbone=dimamba is not supported, only dit"),
        ("mdlm", {"noise.type": "cosine"}, "noise.type=cosine is not supported, only loglinear"),
        (
            "mdlm",
            {"data.tokenizer_name_or_path": "bert-base-uncased"},
            "the mask is a token of bert-base-uncased's own",
        ),
        ("mdlm", {"model.n_heads": None}, "is no config of MDLM, Duo or UDLM: it lacks 'n_heads'"),
        ("mdlm", {"model": "tiny"}, "is no config of MDLM, Duo or UDLM"),
        ("mdlm", {"parameterization": "ar"}, "is of no format that sedd reads, by its config: sedd, mdlm"),
        ("duo", {"algo.name": "bd3lm-like"}, "is of no format that sedd reads"),
        ("duo", {"algo.causal_attention": True}, "causal=True of duo is not supported, only False"),
    ],
)
def test_training_of_another_kind_is_refused(tmp_path, monkeypatch, name, changes, message):
    """Before the weights are read."""
    monkeypatch.setattr(torch_files, "shapes", lambda file: {"backbone.vocab_embed.embedding": (20, 32)})
    config, file = lightning_config(name), tmp_path / "checkpoints" / "last.ckpt"
    for key, value in changes.items():
        set_in(config, key, value)
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    file.parent.mkdir()
    file.touch()
    assert message in refusal(sedd.load, file)


def test_the_published_config_of_a_run_is_that_of_its_repository(tmp_path, monkeypatch):
    """UDLM has MDLM's keys; a class embedding is refused by the format."""
    monkeypatch.setattr(torch_files, "shapes", lambda file: {"backbone.vocab_embed.embedding": (30522, 32)})
    config = lightning_config("mdlm") | {"diffusion": "uniform", "parameterization": "d3pm", "time_conditioning": True}
    config["training"]["guidance"] = None
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    found = description(tmp_path / "last.ckpt")
    assert (found["model_type"], found["vocab_size"], found["cfg"]) == ("udlm", 30522, False)
    config["training"]["guidance"] = {"cond_dropout": 0.1}
    (tmp_path / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "last.ckpt").touch()
    assert "cfg=True of udlm is not supported" in refusal(sedd.load, tmp_path / "last.ckpt")


# --- what is refused


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    shutil.copy(FOLDERS["sedd"] / "config.json", tmp_path)
    for name in ("checkpoint.pth", "pytorch_model.bin"):
        (tmp_path / name).touch()
    for path in (tmp_path / "checkpoint.pth", tmp_path):
        assert refusal(sedd.load, path).endswith("is a file of PyTorch; to read it: pip install 'sedd[torch]'")


def test_another_file_is_refused(tmp_path):
    (tmp_path / "a.txt").touch()
    assert "a.txt is a file; give its folder, or a checkpoint of PyTorch (.pth, .pt" in refusal(
        sedd.load, tmp_path / "a.txt"
    )


class Harmful:
    """Its pickle creates a file when it is read."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("protocol", range(5))
def test_no_code_of_a_pickle_is_run(torch, tmp_path, protocol):
    mark, file = tmp_path / "mark", tmp_path / "a.pth"
    saved = {"model": {"a": torch.ones(2)}, "step": Harmful(mark)}
    file.write_bytes(pickle.dumps(saved, protocol))
    pickle.loads(file.read_bytes())
    assert mark.exists()  # as a control
    mark.unlink()
    refusal(torch_files.read, file)
    for archive in (True, False):
        torch.save(saved, file, _use_new_zipfile_serialization=archive)
        assert "holds objects of posix.system, and reading these would run code" in refusal(torch_files.read, file)
    assert not mark.exists()


def test_the_command_in_the_message_saves_the_tensors_alone(torch, tmp_path):
    file = save_run(torch, tmp_path / "a run", "mdlm", hyper_parameters={"config": argparse.Namespace(rate=1)})
    message = refusal(sedd.load, file)
    assert message.startswith(f"{file} holds objects of argparse.Namespace")
    program, *arguments = shlex.split(message[message.index("python -c") :])
    assert program == "python"
    subprocess.run([sys.executable, *arguments], check=True)
    same_model(sedd.load(file.with_name("last-tensors.ckpt")), sedd.load(FOLDERS["mdlm"]))


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "older"])
def test_a_truncated_file_is_one_line(torch, tmp_path, archive):
    file = tmp_path / "a.pt"
    torch.save({"a": torch.ones(1000)}, file, _use_new_zipfile_serialization=archive)
    whole = file.read_bytes()
    for size in (0, 3, 10, 200, len(whole) // 2, len(whole) - 10):
        file.write_bytes(whole[:size])
        assert refusal(torch_files.read, file) == f"{file} is damaged, or no checkpoint of PyTorch; copy it again"


@pytest.mark.parametrize("content", [b"some text", b"PK\x03\x04 but no archive", b"\x80\x02}q\x00X", b"\0" * 1000])
def test_a_file_of_another_kind_is_one_line(torch, tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    assert "is damaged, or no checkpoint of PyTorch" in refusal(torch_files.read, tmp_path / "a.pt")


def test_other_contents_are_one_line(torch, tmp_path):
    two, three = torch.ones(2), torch.ones(3)
    for contents, message in (
        ([two], "holds a list, and no weights by name"),
        (two, "holds a Tensor, and no weights by name"),
        ({}, "its keys are none"),
        ({"model": {}, "step": 3}, "holds no weights by name, nor under model or state_dict; its keys are model, step"),
        ({"model": {"a": two}, "ema": [two]}, "its averages (ema) are no list of tensors"),
        ({"model": {"a": two}, "ema": {"shadow_params": {"a": two}}}, "its averages (ema) are no list of tensors"),
        ({"model": {"a": two}, "ema": {"shadow_params": [two, two]}}, "2 averages (ema) of 1 parameters"),
        ({"model": {"a": two}, "ema": {"shadow_params": [three]}}, "has the shape [3], and a [2]"),
        ({"a": two.to_sparse()}, "a is a tensor of torch.float32 that NumPy has not"),
    ):
        torch.save(contents, tmp_path / "a.pt")
        assert message in refusal(torch_files.read, tmp_path / "a.pt")


def test_weights_that_do_not_fit_the_config_are_one_line(torch, tmp_path):
    file = save_run(torch, tmp_path / "run", "sedd")
    config = tmp_path / "run" / ".hydra" / "config.yaml"
    changed = about("sedd")
    changed["model"]["cond_dim"] = 64
    config.write_text(yaml.safe_dump(changed))
    assert "does not fit its config" in refusal(sedd.load, file)
    changed["model"]["n_blocks"] = 1
    config.write_text(yaml.safe_dump(changed))
    assert "tensors that the network does not have" in refusal(sedd.load, file)
