"""What a published format is: how its config.json and its tensors translate to a config and parameters, and back."""

import abc
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from safetensors.numpy import save

from sedd import config as configs
from sedd.codecs.hub import cache_folder, cached_file
from sedd.codecs.huggingface import CONFIG, TOKENIZER, WEIGHTS, read_tensors
from sedd.codecs.tensor_table import Table, params_from, tensors_from
from sedd.data.tokenizers import Tokenizer, load_tokenizer, pretrained_tokenizer
from sedd.diffusion.keyed_random import root_key
from sedd.errors import UserError
from sedd.network.network import Network
from sedd.network.trunk import unrolled
from sedd.recipes import resolved
from sedd.runtime.trees import fitted, named
from sedd.trained import Trained

GPT2 = ("openai-community/gpt2", "gpt2")
_FREE = ("dtype", "scan", "remat", "attention", "embedding_std")  # settings that do not change what a network computes


class Format(abc.ABC):
    """A published format, in a file of its own.

    name: that of `sedd convert --to`; title: what it holds; tokenizers: names on the hub of the tokenizer that its
    models are published with; the first that is in the local cache is used; unread: names of tensors with which nothing
    is computed, of any value.
    """

    name: str
    title: str
    tokenizers: tuple[str, ...] = GPT2
    unread: tuple[str, ...] = ()

    @abc.abstractmethod
    def is_mine(self, about: dict) -> bool:
        """True if the contents of a config.json are of this format."""

    @abc.abstractmethod
    def config(self, about: dict, folder: Path) -> ConfigDict:
        """Returns the config of a checkpoint, data.vocab_size included. about: the contents of its config.json.

        KeyError if a setting is missing; UserError if the checkpoint is of a kind that is not supported.
        """

    @abc.abstractmethod
    def about(self, config: ConfigDict, vocab_size: int) -> dict[str, Any]:
        """Returns the config.json of a config, the inverse of `config` as far as the format can hold it."""

    @abc.abstractmethod
    def table(self, network: Network) -> Table:
        """The tensors of the parameters of a network, with unrolled layers."""

    def constants(self, network: Network) -> dict[str, np.ndarray]:
        """Returns the tensors that are no parameters: those equal in all models of these sizes, and `unread`."""
        return {}

    def params(self, tensors: Mapping[str, np.ndarray], network: Network, folder: Path) -> dict:
        """Returns the parameters by path. UserError that names the tensor if one is missing or left over."""
        return params_from(tensors, self.table(network), folder, self.constants(network))

    def tokenizer(self, about: dict, folder: Path) -> Tokenizer | None:
        """Returns the tokenizer in the folder of a checkpoint, None if there is none."""
        if (folder / "tokenizer").is_dir():
            return load_tokenizer(folder / "tokenizer")
        return pretrained_tokenizer(f"huggingface:{folder / TOKENIZER}") if (folder / TOKENIZER).is_file() else None

    def save_tokenizer(self, tokenizer: Tokenizer, folder: epath.Path):
        """Writes a tokenizer to the folder of a checkpoint, from which `tokenizer` reads it."""
        tokenizer.save(folder / "tokenizer")

    def cached_tokenizer(self) -> Tokenizer | None:
        """Returns the tokenizer of `tokenizers` in the local cache of the hub; None if there is none."""
        cache = cache_folder(os.environ)
        file = next(filter(None, (cached_file(cache, repo, TOKENIZER) for repo in self.tokenizers)), None)
        if file is None or importlib.util.find_spec("tokenizers") is None:
            return None
        return pretrained_tokenizer(f"huggingface:{file}")


def read(form: Format, about: dict, place: Path) -> tuple[ConfigDict, dict, Tokenizer | None]:
    """Returns the config, the parameters and the tokenizer of a checkpoint of the format.

    place: its folder, or a file of PyTorch. UserError if the checkpoint is damaged, or is of a kind that is not
    supported.
    """
    folder = place.parent if place.is_file() else place
    config = config_of(form, about, folder)
    tensors, file = read_tensors(place)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in form.unread}
    layers = config.network.layers
    if layers > len(tensors):
        raise UserError(f"{folder}: {CONFIG} has {layers} layers, and {file.name} {len(tensors)} tensors")
    _, _, network = configs.build(config, config.data.vocab_size)
    tokenizer = form.tokenizer(about, folder)
    params = form.params(tensors, network, folder)
    like = jax.eval_shape(network.init, root_key(0))
    params = fitted(params, like, f"{place} does not fit its {CONFIG}")
    for name, value in form.constants(network).items():
        found = tensors.get(name, value)
        if found.shape != value.shape or not np.allclose(found, value, rtol=1e-3):
            raise UserError(f"{folder}: {name} is not that of {network.trunk.heads} heads and the base 10000")
    return config, params, tokenizer


def config_of(form: Format, about: dict, folder: Path) -> ConfigDict:
    """Returns the config of a checkpoint. UserError for a config.json that lacks a setting, or is not supported."""
    try:
        return form.config(about, folder)
    except KeyError as error:
        raise UserError(f"{folder}: {CONFIG} lacks {error.args[0]}, which the format {form.name} has") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}: {CONFIG} is not of the format {form.name} ({error})") from None


def writer(form: Format, model: Trained, config: ConfigDict) -> Callable[[epath.Path], None]:
    """Returns a function that writes config.json, model.safetensors and the tokenizer of a model to a folder.

    UserError that says what the format cannot hold.
    """
    if model.layout.masks_padding:
        raise UserError(f"the format {form.name} cannot hold a model of padded documents, conditioned on their lengths")
    about = form.about(config, model.vocab_size)
    check_holds(form, about, config, model.vocab_size)
    table, constants = form.table(model.network), form.constants(model.network)

    def write(folder: epath.Path):
        tensors = tensors_from(named(unrolled(jax.device_get(model.params))), table)
        (folder / WEIGHTS).write_bytes(save(tensors | constants, metadata={"format": "pt"}))
        if model.tokenizer is not None:
            form.save_tokenizer(model.tokenizer, folder)
        (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n")  # last: it marks a complete folder

    return write


def check_holds(form: Format, about: dict, config: ConfigDict, vocab_size: int):
    """UserError, which names the setting, if a model that is written and read again would be another one."""
    found, ours = resolved(form.config(about, Path())), resolved(config)
    expected = {
        "process.name": (found.process.name, ours.process.name),
        **{f"network.{name}": (found.network[name], ours.network[name]) for name in ours.network if name not in _FREE},
        "data.vocab_size": (found.data.vocab_size, vocab_size),
        "data.block_length": (found.data.block_length, ours.data.block_length),
        "schedule": tuple(configs.build(one, vocab_size)[1] for one in (found, ours)),
    }
    for name, (theirs, value) in expected.items():
        if theirs != value:
            raise UserError(f"the format {form.name} cannot hold {name}={value}; its models have {theirs}")
