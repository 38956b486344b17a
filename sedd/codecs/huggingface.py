"""Folders in the format of Hugging Face: config.json, model.safetensors and tokenizer.json, without their libraries."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import load_file

from sedd.codecs import torch_files
from sedd.errors import UserError

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
TORCH_WEIGHTS = "pytorch_model.bin"  # read where there is no WEIGHTS
INDEX = f"{WEIGHTS}.index.json"  # of weights in several files


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


def read_tensors(place: Path) -> tuple[dict[str, np.ndarray], Path]:
    """Returns the tensors of a checkpoint by name, and the file that they are in.

    place: a folder with model.safetensors, or in its absence pytorch_model.bin; or a file of PyTorch.
    UserError if it is missing, damaged or split into several files, or if NumPy does not have the type of a tensor.
    """
    if place.is_file():
        return torch_files.read(place), place
    file = place / WEIGHTS
    if not file.is_file():
        if (place / TORCH_WEIGHTS).is_file():
            return torch_files.read(place / TORCH_WEIGHTS), place / TORCH_WEIGHTS
        if (place / INDEX).is_file():
            raise UserError(f"{place}: its weights are split into several files; save them as one {WEIGHTS}")
    try:
        return _safetensors(_file(place, WEIGHTS)), file
    except SafetensorError as error:
        raise UserError(f"{file} is damaged ({error}); copy it again") from None
    except (KeyError, AttributeError, TypeError) as error:  # NumPy has no such type
        raise UserError(f"{file} has tensors of a type that NumPy has not ({error}); save them as float32") from None


def _safetensors(file: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a file, which need not be on a disk."""
    return load_arrays(file.read_bytes()) if "://" in os.fspath(file) else load_file(os.fspath(file))


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
