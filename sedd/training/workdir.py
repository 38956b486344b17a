"""Whose folder it is: a run goes on where its own config.json lies, and never writes into another's."""

import json
import os
from collections.abc import Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from sedd import config as configs
from sedd.data.corpus import Corpus
from sedd.data.layout import Layout
from sedd.errors import UserError
from sedd.runtime import disk, storage
from sedd.training.checkpoint import steps_saved

# What may change between the start of a run and its continuation without making it another run.
_MUTABLE_KEYS = {
    "training.steps",
    "training.accumulation",
    "training.max_skipped_steps",
    "data.corpus",
    "network.remat",
    "network.attention",
}
_MUTABLE_GROUPS = {"mesh", "checkpoint", "evaluation", "metrics"}


def prepare_workdir(
    workdir: epath.Path, config: ConfigDict, corpus: Corpus, layout: Layout, init_from: str | None = None
):
    """Makes the folder this run's, or makes sure that it is. UserError if it holds another run, or something else.

    Leaves config.json: the config with the absolute path of the corpus, its vocabulary and hash, its layout as
    `layout_of` has it, and where the parameters came from that the run started with. For process 0, which holds the
    folder (`storage.locked`); the others see what it leaves.
    """
    path = workdir / "config.json"
    values = config.to_dict()
    values["data"]["corpus"] = os.fspath(corpus.path)
    mine = {
        "format": configs.FORMAT,
        "config": values,
        "vocab_size": corpus.vocab_size,
        "corpus": corpus.hash,
        "layout": layout.to_json(),
        "init_from": init_from and disk.absolute(init_from),
    }
    if path.is_file():
        theirs = _read(path)
        changed = [f"{key} ({old!r} there, {new!r} here)" for key, old, new in _differences(theirs, mine)]
        if changed:
            raise UserError(f"{workdir} holds another run: {', '.join(changed)}; choose another --workdir")
        if steps_saved(workdir / "checkpoints"):
            mine["init_from"] = theirs.get("init_from")
    elif not storage.is_empty(workdir):
        raise UserError(f"{workdir} is not empty and holds no run; choose another --workdir")
    with storage.user_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        disk.write_json_atomic(path, json.dumps(mine, indent=2) + "\n")
        corpus.tokenizer.save(workdir / "tokenizer")  # after what tells whose it is, for who is interrupted here


def _read(path: epath.Path) -> dict[str, Any]:
    about = configs.read_description(path)
    if "config" not in about:
        raise UserError(f"{path} is not the config.json of a run; choose another --workdir")
    return about


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What makes it another run, by keys of the config; the corpus goes by its hash, wherever it lies."""
    for key in ("vocab_size", "corpus"):
        if old.get(key) != new[key]:
            yield key, old.get(key), new[key]
    default = configs.default()  # for keys that are newer than the run
    for group, members in new["config"].items():
        for name, value in members.items():
            before, key = old["config"].get(group, {}).get(name, default[group][name]), f"{group}.{name}"
            if before != value and group not in _MUTABLE_GROUPS and key not in _MUTABLE_KEYS:
                yield key, before, value
    before, now = old.get("init_from"), new["init_from"]
    if None not in (before, now) and disk.absolute(before) != now:
        yield "init_from", before, now
