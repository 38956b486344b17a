"""The run directory: a run resumes where its own config.json is, and never writes into that of another run."""

import json
import os
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from sedd import config as configs
from sedd.codecs.hub import absolute_spec
from sedd.data.corpus import Corpus
from sedd.data.layout import Layout
from sedd.errors import UserError
from sedd.recipes import ENCODER, kind_of
from sedd.runtime import disk, storage
from sedd.runtime.folders import existing_description
from sedd.training.checkpoint import steps_saved
from sedd.version import __version__

# Keys that may change when a run is resumed.
_MUTABLE_KEYS = {
    "training.steps",
    "training.accumulation",
    "training.max_skipped_steps",
    "data.corpus",
    "codec.encoder",  # its digest may not
    "network.remat",
    "network.attention",
}
_MUTABLE_GROUPS = {"mesh", "checkpoint", "evaluation", "metrics"}
_FIXED_KEYS = {"evaluation.low"}  # of these groups: bounds of one run are compared with each other


def prepare_workdir(
    workdir: epath.Path, config: ConfigDict, corpus: Corpus, layout: Layout, init_from: str | None = None
):
    """Creates the run directory, or checks that it is that of this run.

    UserError if it holds another run or other files. Writes config.json: the config with the absolute path of the
    corpus, its vocabulary size and hash, its layout, the origin of the initial parameters, and the version of sedd that
    started or last resumed the run. Called by process 0, which holds the lock of the folder (`folders.locked`); the
    others read the result.
    """
    path = workdir / "config.json"
    values = config.to_dict()
    values["data"]["corpus"] = os.fspath(corpus.path)
    if kind_of(config) == ENCODER:
        values["codec"]["encoder"] = absolute_spec(config.codec.encoder)
    description = {
        "format": configs.FORMAT,
        "sedd": __version__,
        "config": values,
        "vocab_size": corpus.vocab_size,
        "corpus": corpus.hash,
        "layout": layout.to_json(),
        "init_from": init_from and absolute_spec(init_from),
    }
    existing = existing_description(path, "run", "--workdir", _read, lambda old: _differences(old, description))
    if existing and steps_saved(workdir / "checkpoints"):
        description["init_from"] = existing.get("init_from")
    with storage.user_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        disk.write_text_atomic(path, json.dumps(description, indent=2) + "\n")
        corpus.tokenizer.save(
            workdir / "tokenizer"
        )  # after config.json, which identifies the run if this is interrupted


def _read(path: epath.Path) -> dict[str, Any]:
    description = configs.read_description(path)
    if "config" not in description:
        raise UserError(f"{path} is not the config.json of a run; choose another --workdir")
    return description


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns what makes it another run, each as KEY (VALUE there, VALUE here). The corpus: by its hash."""
    values = {key: (old.get(key), new[key]) for key in ("vocab_size", "corpus")}
    default = configs.default()  # of keys that are newer than the run
    for group, members in new["config"].items():
        for name, value in members.items():
            key = f"{group}.{name}"
            if key in _FIXED_KEYS or (group not in _MUTABLE_GROUPS and key not in _MUTABLE_KEYS):
                values[key] = old["config"].get(group, {}).get(name, default[group][name]), value
    if old.get("init_from") is not None and new["init_from"] is not None:
        values["init_from"] = absolute_spec(old["init_from"]), new["init_from"]
    return [f"{key} ({before!r} there, {now!r} here)" for key, (before, now) in values.items() if before != now]
