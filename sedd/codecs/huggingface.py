"""Folders in the format of Hugging Face: config.json, model.safetensors and tokenizer.json, without their libraries."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays

from sedd.errors import UserError
from sedd.runtime.disk import absolute

CONFIG, WEIGHTS, TOKENIZER = FILES = ("config.json", "model.safetensors", "tokenizer.json")


def folder_of_encoder(spec: str | Path) -> Path:
    """Returns the folder that `spec` names: a local one, or "ORGANISATION/NAME" of the Hugging Face Hub.

    The files of the latter are downloaded once, to the cache of the package huggingface_hub. UserError if there is no
    such folder, or if the package is missing.
    """
    folder = Path(absolute(spec))
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(spec)):
        raise UserError(f"there is no folder {spec}; give a folder, or ORGANISATION/NAME of the Hugging Face Hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"there is no folder {spec}; to download it from the Hugging Face Hub: pip install 'sedd[hub]'"
        ) from None
    try:
        return Path(snapshot_download(str(spec), allow_patterns=list(FILES)))
    except Exception as error:  # the library raises errors of several packages
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{spec} cannot be downloaded from the Hugging Face Hub ({reason}); give a folder") from None


def absolute_spec(spec: str | Path) -> str:
    """Returns `spec`, a local folder by its absolute path, to be saved."""
    folder = absolute(spec)
    return folder if Path(folder).is_dir() else str(spec)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Returns the contents of a file. UserError if it is missing, or not a JSON object."""
    data = _file(folder, name).read_bytes()
    try:
        contents = json.loads(data)
    except ValueError:
        contents = None
    if not isinstance(contents, dict):
        raise UserError(f"{folder / name} is damaged: it is not a JSON object; copy it again")
    return contents


def read_tensors(folder: Path) -> tuple[dict[str, np.ndarray], bytes]:
    """Returns the tensors of model.safetensors by name, and the bytes of the file.

    UserError if it is missing, damaged or split into several files, or if NumPy does not have the type of a tensor.
    """
    if not (folder / WEIGHTS).is_file() and (folder / f"{WEIGHTS}.index.json").is_file():
        raise UserError(f"{folder}: its weights are split into several files; save them as one {WEIGHTS}")
    data = _file(folder, WEIGHTS).read_bytes()
    try:
        return load_arrays(data), data
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS} is damaged ({error}); copy it again") from None
    except KeyError as error:
        raise UserError(f"{folder / WEIGHTS} has tensors of type {error.args[0]}; save them as float32") from None


def read_vocabulary(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the ids of all tokens of tokenizer.json by their text, and those of its special tokens.

    UserError if the file is missing, or if it has no vocabulary.
    """
    contents = read_json(folder, TOKENIZER)
    try:
        tokens = contents["model"]["vocab"]
        if isinstance(tokens, list):  # Unigram: pairs of a text and its log probability
            tokens = {text: number for number, (text, _) in enumerate(tokens)}
        added = {token["content"]: token for token in contents.get("added_tokens", ())}
        vocabulary = {text: token["id"] for text, token in added.items()} | dict(tokens)
        special = {text: vocabulary[text] for text, token in added.items() if token["special"]}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder / TOKENIZER} is not a tokenizer of WordPiece, BPE or Unigram; give another") from None
    return vocabulary, special


def _file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise UserError(f"there is no {folder / name}; copy it to the folder")
    return folder / name
