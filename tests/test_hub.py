"""Models by their names on the Hugging Face Hub, in a local cache that the tests write; nothing is downloaded."""

import json
import os
import shutil
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from small import ENCODERS, small_corpus

import sedd
from sedd import commands
from sedd import config as configs
from sedd.codecs.hub import HubName, absolute_spec, cache_folder, cached, folder_of, hub_name
from sedd.codecs.pretrained_encoder import read_encoder, read_module
from sedd.errors import UserError
from sedd.evaluation import scorers
from sedd.training.workdir import prepare_workdir

HERE = Path(__file__).parent
MDLM, SEDD = HERE / "published" / "mdlm", HERE / "parity" / "absorb"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty local cache, without the package huggingface_hub."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    return tmp_path / "hub"


def put(cache, repo, source, commit=COMMIT, **references):
    """Writes the files of a folder into a cache as the package does: names of revisions in refs, files by commit."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    shutil.copytree(source, folder / "snapshots" / commit, ignore=shutil.ignore_patterns("*.npz"))
    (folder / "refs").mkdir(exist_ok=True)
    for name, target in (references or {"main": commit}).items():
        (folder / "refs" / name).write_text(target)
    return folder / "snapshots" / commit


def stub(monkeypatch, snapshot_download):
    """Replaces the package."""
    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)


def refusal(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- names and the cache


@pytest.mark.parametrize(
    "spec, name",
    [
        ("kuleshov-group/mdlm-owt", HubName("kuleshov-group/mdlm-owt", "main")),
        ("org/name-1.0@v2", HubName("org/name-1.0", "v2")),
        ("org/name@refs/pr/1", HubName("org/name", "refs/pr/1")),
        (f"org/name@{COMMIT}", HubName("org/name", COMMIT)),
        *((text, None) for text in ("runs", "/org/name", "./org/name", "../name", "a/b/c", "gs://org/name", "~/name")),
        *((text, None) for text in ("org/name@", "@main", "org/name@../../x", "org/na me", "org/name\n", "örg/name")),
    ],
)
def test_a_name_of_the_hub_has_an_organisation_and_an_optional_revision(spec, name):
    assert hub_name(spec) == name


def test_the_cache_is_where_the_package_has_it():
    home = Path.home()
    for environment, folder in (
        ({}, home / ".cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, Path("/x/huggingface/hub")),
        ({"HF_HOME": "~/h", "XDG_CACHE_HOME": "/x"}, home / "h/hub"),
        ({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/h"}, Path("/old")),
        ({"HF_HUB_CACHE": "/c", "HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/h"}, Path("/c")),
    ):
        assert cache_folder(environment) == folder


def test_the_package_has_the_cache_at_the_same_place():
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs the package huggingface_hub")
    assert cache_folder(os.environ) == Path(constants.HF_HUB_CACHE)


def test_a_revision_is_a_branch_a_tag_or_a_commit(tmp_path):
    first, second = "1" * 40, "2" * 40
    put(tmp_path, "org/name", SEDD, first, main=second, v1=first)
    snapshot = put(tmp_path, "org/name", MDLM, second)
    assert cached(tmp_path, HubName("org/name", "main")) == snapshot
    assert cached(tmp_path, HubName("org/name", "v1")) == snapshot.with_name(first)
    assert cached(tmp_path, HubName("org/name", first)) == snapshot.with_name(first)
    assert cached(tmp_path, HubName("org/name", "v2")) is None
    assert cached(tmp_path, HubName("org/other", "main")) is None


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_cache_without_config_or_weights_is_not_read(cache, missing):
    (put(cache, "org/name", SEDD) / missing).unlink()
    assert "pip install 'sedd[hub]'" in refusal(folder_of, "org/name")


def test_a_pytorch_file_in_the_cache_is_enough(cache):
    snapshot = put(cache, "org/name", SEDD)
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    assert folder_of("org/name") == snapshot


# --- where names are taken


def test_a_model_is_loaded_from_the_cache_without_package_and_network(cache):
    put(cache, "kuleshov-group/mdlm-owt", MDLM, main=COMMIT, v1=COMMIT)
    for spec in ("kuleshov-group/mdlm-owt", "kuleshov-group/mdlm-owt@v1"):
        found, expected = sedd.load(spec), sedd.load(MDLM)
        assert found.config == expected.config
        jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def test_a_local_folder_comes_before_the_cache(cache, tmp_path, monkeypatch):
    put(cache, "org/name", MDLM)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SEDD, tmp_path / "org" / "name")
    assert folder_of("org/name") == tmp_path / "org" / "name"
    assert sedd.load("org/name").network.prediction == "score"


def test_an_encoder_is_read_from_the_cache(cache):
    put(cache, "org/bert", ENCODERS / "bert")
    assert read_module("org/bert") == read_module(ENCODERS / "bert")
    assert read_encoder("org/bert@main").digest == read_encoder(ENCODERS / "bert").digest


def test_a_scoring_model_has_its_name_on_the_hub(cache, tmp_path, monkeypatch):
    """Not that of its folder in the cache, which is a hash."""
    monkeypatch.setattr(scorers, "open_scorer", lambda folder, name: (folder, name))
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "lm" / "model.safetensors").touch()
    snapshot = put(cache, "org/gpt2", tmp_path / "lm")
    assert commands._scorer("org/gpt2") == (snapshot, "org/gpt2")
    assert commands._scorer(str(tmp_path / "lm")) == (tmp_path / "lm", None)
    assert "there is no folder nothing" in refusal(commands._scorer, "nothing")


def test_what_is_saved_is_the_name_or_an_absolute_path(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_spec("org/name") == "org/name" and absolute_spec("org/name@v1") == "org/name@v1"
    assert absolute_spec("run") == str(tmp_path / "run") and absolute_spec("gs://b/run") == "gs://b/run"
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").touch()
    assert absolute_spec("org/name") == str(tmp_path / "org/name")


def test_a_run_records_the_name_of_its_origin(cache, tmp_path):
    corpus = small_corpus(tmp_path)
    config = configs.from_dict({"data": {"corpus": str(corpus.path)}})
    run = epath.Path(tmp_path / "run")
    for _ in range(2):
        prepare_workdir(run, config, corpus, corpus.layout, "org/name@v1")
    assert json.loads((run / "config.json").read_text())["init_from"] == "org/name@v1"
    assert "init_from" in refusal(prepare_workdir, run, config, corpus, corpus.layout, "org/name")


# --- downloads and errors


def test_what_is_read_is_downloaded(cache, monkeypatch):
    """The PyTorch file only where there are no other weights."""
    asked = []

    def snapshot_download(repo, revision, allow_patterns):
        asked.append((repo, revision, allow_patterns))
        source = cache.parent / "source" / COMMIT
        source.mkdir(parents=True, exist_ok=True)
        for name in {"org/safe": ("config.json", "model.safetensors")}.get(repo, ("pytorch_model.bin", "config.json")):
            if name in allow_patterns:
                (source / name).touch()
        return str(source)

    stub(monkeypatch, snapshot_download)
    assert folder_of("org/torch@v1") == cache.parent / "source" / COMMIT
    (first, second) = asked
    assert first[:2] == second[:2] == ("org/torch", "v1")
    assert {"config.json", "model.safetensors", "tokenizer.json", "vocab.json", "merges.txt"} <= {*first[2]}
    assert "pytorch_model.bin" not in first[2] and second[2] == ["pytorch_model.bin"]
    del asked[:]
    folder_of("org/safe")
    assert [repo for repo, _, _ in asked] == ["org/safe"]
    del asked[:]
    put(cache, "org/cached", SEDD)
    folder_of("org/cached")
    assert not asked


class RepositoryNotFoundError(OSError): ...


class GatedRepoError(RepositoryNotFoundError): ...


class RevisionNotFoundError(OSError): ...


class LocalEntryNotFoundError(FileNotFoundError): ...


@pytest.mark.parametrize(
    "error, message",
    [
        (RepositoryNotFoundError("401"), "there is no folder org/name@v1, and no public model org/name on the Hugging"),
        (GatedRepoError("403"), "org/name is gated: accept its terms on its page of the hub, and log in"),
        (RevisionNotFoundError("404"), "org/name has no revision v1 on the Hugging Face Hub; name a branch"),
        (LocalEntryNotFoundError("Cannot find"), "local cache of the Hugging Face Hub, which cannot be reached"),
        (ConnectionError("refused"), "which cannot be reached (ConnectionError); connect to the network"),
        (OSError("404\nnot found"), "org/name@v1 cannot be downloaded from the Hugging Face Hub (404); give a folder"),
        (ValueError(), "cannot be downloaded from the Hugging Face Hub (ValueError)"),
    ],
)
def test_a_failed_download_is_one_line(cache, monkeypatch, error, message):
    def snapshot_download(*args, **settings):
        raise error

    stub(monkeypatch, snapshot_download)
    assert message in refusal(sedd.load, "org/name@v1")


def test_the_package_without_a_network_is_one_line(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs the package huggingface_hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "which cannot be reached" in refusal(folder_of, "org/no-such-name-of-the-tests")


def test_a_missing_path_is_one_line(cache):
    """It names the hub where the text could be a name, and the package that downloads."""
    assert refusal(sedd.load, "/none/such").startswith("there is no folder /none/such; choose another folder, or ORG")
    assert refusal(sedd.load, "runs").startswith("there is no folder runs; choose another folder, or ORGANISATION/NAME")
    missing = refusal(sedd.load, "runs/mine")
    assert missing.startswith("there is no folder runs/mine, and it is not in the local cache of the Hugging Face Hub")
    assert missing.endswith("pip install 'sedd[hub]'")
    assert refusal(read_encoder, "runs/mine") == missing
    assert refusal(sedd.load, "runs/last.ckpt") == "there is no file runs/last.ckpt; correct the path"
