"""Models by path or by name: a folder, a file, or a model of the Hugging Face Hub, cached or downloaded."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from etils import epath

from sedd.codecs.huggingface import CONFIG, INDEX, TOKENIZER, TORCH_WEIGHTS, WEIGHTS
from sedd.codecs.torch_files import SUFFIXES
from sedd.errors import UserError
from sedd.runtime import storage
from sedd.runtime.disk import absolute

FILES = (
    CONFIG,
    WEIGHTS,
    INDEX,
    TOKENIZER,
    *("vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer_config.json", "special_tokens_map.json"),  # a scoring model has its BOS and EOS from these
    "tokenizer/*",  # of a model that this project wrote
)
_FORM = "ORGANISATION/NAME[@REVISION] of the Hugging Face Hub"
_UNREACHABLE = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "TransportError", "Timeout"}


class HubName(NamedTuple):
    """A model of the Hugging Face Hub. revision: a branch, a tag or a commit."""

    repo: str
    revision: str


def hub_name(spec: str | os.PathLike) -> HubName | None:
    """Returns the name in "ORGANISATION/NAME" or "ORGANISATION/NAME@REVISION"; None for any other text."""
    found = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", os.fspath(spec), re.ASCII)
    if found is None or ".." in found[0]:
        return None
    return HubName(found[1], found[2] or "main")


def folder_of(spec: str | os.PathLike) -> epath.Path:
    """Returns the folder, or the file, that `spec` names.

    spec: a path, gs://BUCKET/FOLDER, or "ORGANISATION/NAME[@REVISION]" of the Hugging Face Hub. What exists at the path
    comes first, then the hub's local cache, which needs neither network nor the package huggingface_hub, then a
    download to that cache. UserError if there is nothing of this name, or if it cannot be downloaded.
    """
    path = storage.folder_of(spec)
    if path.is_dir() or path.is_file():
        return path
    name = hub_name(spec)
    if path.suffix in SUFFIXES:
        raise UserError(f"there is no file {os.fspath(spec)}; correct the path")
    if name is None:
        raise UserError(f"there is no folder {os.fspath(spec)}; choose another folder, or {_FORM}")
    return storage.folder_of(cached(cache_folder(os.environ), name) or _downloaded(os.fspath(spec), name))


def absolute_spec(spec: str | os.PathLike) -> str:
    """Returns `spec`, to be saved: the name of a model of the hub as it is, a path as an absolute one."""
    path = absolute(spec)
    return os.fspath(spec) if hub_name(spec) and not Path(path).exists() else path


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Returns the hub's local cache, by the rules of the package huggingface_hub. environment: as `os.environ`."""
    caches = environment.get("XDG_CACHE_HOME", "~/.cache")
    home = environment.get("HF_HOME", f"{caches}/huggingface")
    folder = environment.get("HF_HUB_CACHE", environment.get("HUGGINGFACE_HUB_CACHE", f"{home}/hub"))
    return Path(os.path.expandvars(os.path.expanduser(folder)))


def cached(cache: Path, name: HubName) -> Path | None:
    """Returns the folder of a model in a cache, None if the config or the weights are not there."""
    folder = cache / f"models--{name.repo.replace('/', '--')}"
    reference = folder / "refs" / name.revision
    commit = reference.read_text().strip() if reference.is_file() else name.revision
    snapshot = folder / "snapshots" / commit
    has_weights = any((snapshot / file).is_file() for file in (WEIGHTS, TORCH_WEIGHTS))
    return snapshot if has_weights and (snapshot / CONFIG).is_file() else None


def cached_file(cache: Path, repo: str, file: str) -> Path | None:
    """Returns a file of the branch `main` of a repository in a cache, None if it is not there."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    reference = folder / "refs" / "main"
    path = folder / "snapshots" / reference.read_text().strip() / file if reference.is_file() else None
    return path if path is not None and path.is_file() else None


def _downloaded(spec: str, name: HubName) -> Path:
    """Downloads what is read of a model, and returns its folder. The PyTorch file only if there is no other."""
    missing = f"there is no folder {spec}, and it is not in the local cache of the Hugging Face Hub"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{missing}; to download a model of this name: pip install 'sedd[hub]'") from None
    try:
        folder = Path(snapshot_download(name.repo, revision=name.revision, allow_patterns=list(FILES)))
        if not any((folder / file).is_file() for file in (WEIGHTS, INDEX)):
            snapshot_download(name.repo, revision=name.revision, allow_patterns=[TORCH_WEIGHTS])
    except Exception as error:  # the library raises errors of several packages
        raise UserError(_reason(error, missing, spec, name)) from None
    return folder


def _reason(error: Exception, missing: str, spec: str, name: HubName) -> str:
    """Returns the message for an error of the library, whose types are known by name, whatever its version."""
    types = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in types:
        return f"{name.repo} is gated: accept its terms on its page of the hub, and log in with hf auth login"
    if "RepositoryNotFoundError" in types:
        advice = "correct the name, or for a private model log in with hf auth login"
        return f"there is no folder {spec}, and no public model {name.repo} on the Hugging Face Hub; {advice}"
    if "RevisionNotFoundError" in types:
        return f"{name.repo} has no revision {name.revision} on the Hugging Face Hub; name a branch, a tag or a commit"
    if types & _UNREACHABLE:
        cause = type(error.__cause__ or error).__name__
        return f"{missing}, which cannot be reached ({cause}); connect to the network, or choose another folder"
    first = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"{spec} cannot be downloaded from the Hugging Face Hub ({first}); give a folder with its files"
