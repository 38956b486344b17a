"""Checkpoints of PyTorch: pytorch_model.bin, and what the authors' training code saves. No code in a file is run.

A training checkpoint is a dict: the tensors by name under "model" (SEDD, RADD) or "state_dict" (Lightning: MDLM, Duo,
UDLM), and under "ema" their averages, a list in the order of the network's parameters.
"""

import json
import os
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from sedd.errors import UserError

SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
_NETWORK, _NOISE = "backbone.", "noise."  # prefixes of Lightning; the averages are those of the network, then the noise
_BUFFER = "rotary_emb.inv_freq"  # ends the name of the only tensor in these networks that is no parameter
_SAVE = (
    'import torch; saved = torch.load({file}, "cpu", weights_only=False); '
    'torch.save({{key: saved[key] for key in ("model", "state_dict", "ema") if key in saved}}, {new})'
)


def read(file: Path) -> dict[str, np.ndarray]:
    """Returns the weights in a file by name: their averages (EMA) where the file has them. 16-bit ones become float32.

    UserError if torch is missing, if the file is damaged or holds anything but data, or if it has no weights.
    """
    return {name: _array(tensor, name, file) for name, tensor in _weights(file).items()}


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the weights in a file by name, without reading them. UserError as of `read`."""
    return {name: tuple(tensor.shape) for name, tensor in _weights(file).items()}


def _weights(file: Path) -> dict[str, Any]:
    """Returns the weights in a file, as torch tensors by name."""
    contents = _load(file)
    if not isinstance(contents, dict):
        raise UserError(f"{file} holds a {type(contents).__name__}, and no weights by name; give another file")
    found = next((contents[key] for key in ("model", "state_dict") if isinstance(contents.get(key), dict)), contents)
    tensors = {str(name).replace("_orig_mod.", ""): tensor for name, tensor in found.items() if _is_tensor(tensor)}
    if not tensors:
        keys = ", ".join(map(str, contents)) or "none"
        raise UserError(f"{file} holds no weights by name, nor under model or state_dict; its keys are {keys}")
    network = {name: tensor for name, tensor in tensors.items() if name.startswith(_NETWORK)} or tensors
    if contents.get("ema") is None:
        return network
    noise = {name: tensor for name, tensor in tensors.items() if name.startswith(_NOISE)}
    averages = _averages(contents["ema"], network | noise, file)
    return {name: averages.get(name, tensor) for name, tensor in network.items()}


def _averages(ema: Any, tensors: dict[str, Any], file: Path) -> dict[str, Any]:
    """Returns the averages by the names of the parameters, which `tensors` has in their order, buffers between them."""
    averages = ema.get("shadow_params") if isinstance(ema, dict) else None
    names = [name for name in tensors if not name.endswith(_BUFFER)]
    if not isinstance(averages, list) or not all(map(_is_tensor, averages)):
        raise UserError(f"{file}: its averages (ema) are no list of tensors, shadow_params; give another file")
    if len(averages) != len(names):
        raise UserError(f"{file}: it has {len(averages)} averages (ema) of {len(names)} parameters; give another file")
    for name, average in zip(names, averages):
        if average.shape != tensors[name].shape:
            sizes = f"{list(average.shape)}, and {name} {list(tensors[name].shape)}"
            raise UserError(f"{file}: an average (ema) has the shape {sizes}; give another file")
    return dict(zip(names, averages))


def _load(file: Path) -> Any:
    """Returns the contents of a file, read as data alone; large tensors stay on the disk until they are used."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{file} is a file of PyTorch; to read it: pip install 'sedd[torch]'") from None
    if "://" in os.fspath(file):
        raise UserError(f"{file} is a file of PyTorch, which is read from a disk only; copy its folder to one")
    with file.open("rb") as start:
        is_archive = start.read(4) == b"PK\x03\x04"  # else of the older kind, which cannot be mapped to memory
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(os.fspath(file), map_location="cpu", weights_only=True, mmap=is_archive)
    except MemoryError:
        raise
    except Exception as error:  # of many types, OSError too, for a file that is damaged or of another kind
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise UserError(f"{file} is damaged, or no checkpoint of PyTorch; copy it again") from None
        new = file.with_name(f"{file.stem}-tensors{file.suffix}")
        code = _SAVE.format(file=json.dumps(os.fspath(file)), new=json.dumps(os.fspath(new)))
        raise UserError(
            f"{file} holds objects of {refused[1]}, and reading these would run code, so it is not read; only if you "
            f"trust it, save its tensors alone, where it was trained: python -c {shlex.quote(code)}"
        ) from None


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _array(tensor: Any, name: str, file: Path) -> np.ndarray:
    """Returns a tensor as an array that no longer depends on the file."""
    try:
        if tensor.is_floating_point() and tensor.element_size() < 4:
            tensor = tensor.float()
        return tensor.detach().numpy().copy()
    except (TypeError, RuntimeError):  # sparse or quantised
        raise UserError(
            f"{file}: {name} is a tensor of {tensor.dtype} that NumPy has not; save it as float32"
        ) from None
