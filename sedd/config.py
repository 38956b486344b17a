"""The default config, that of the quickstart, its validated overrides, and what a saved config.json holds.

`sedd.config_file` reads config files, which are Python.
"""

import ast
import difflib
import hashlib
import json
from collections.abc import Callable
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from sedd.codecs.decoder import TRANSFORMER, Decoder
from sedd.codecs.embeddings import Embeddings
from sedd.codecs.encoder import Encoder
from sedd.codecs.pretrained_encoder import read_module
from sedd.config_checks import OF_LATENTS, OF_MASKED, PROCESSES, SCHEDULES, validate
from sedd.diffusion.discrete.process import Absorbing, Process
from sedd.diffusion.gaussian.process import Gaussian
from sedd.diffusion.schedule import Schedule
from sedd.errors import UserError
from sedd.network.bert import Bert
from sedd.network.block_network import AutoregressiveNetwork, BlockNetwork
from sedd.network.latent_network import LatentNetwork
from sedd.network.masked_lm import ARCHITECTURES, DIT, MLP, SPECIAL, MaskedLanguageModel
from sedd.network.network import Network
from sedd.network.t5 import T5Encoder
from sedd.network.token_network import TokenNetwork
from sedd.network.trunk import Trunk
from sedd.recipes import DEFAULT, EMBEDDINGS, ENCODER, GAUSSIAN, OPTIONAL, resolved

FORMAT = 2  # of config.json of runs and exported models; version 0.1.0 wrote format 1 without the key
BEFORE = {"network.conditioning": "sigma", "training.loss": "bound"}  # of a config.json without these keys
# Settings of any network; with OF_LATENTS those that are not of the trunk.
_OF_NETWORK = ("prediction", "conditioning", "cond_dim", "embedding_std", "given_embedding")


def default() -> ConfigDict:
    """Returns a new copy of the default config, locked: setting an unknown key is an error."""
    return ConfigDict(DEFAULT).lock()


def start_from(config: ConfigDict) -> ConfigDict:
    """Returns the default config with the settings that the weights of a model of this config need."""
    new, old = default(), config.to_dict()
    for group in ("process", "codec", "schedule", "network"):
        new[group].update(old[group])
    new.data.block_length = config.data.block_length
    new.training.update(loss=config.training.loss, noise_sampling=config.training.noise_sampling)
    return new


def paper() -> ConfigDict:
    """Returns the config of the SEDD paper for its small network: unnormalised scores, noise sampled by time, AdamW,
    EMA, constant learning rate.

    Section 5.1 and appendix C of arXiv 2310.16834. The warm-up of 2,500 steps is that of the authors' code (the paper
    has 2,000); 400,000 steps are those of the published models according to RADD (arXiv 2406.03736). With another width
    also set `network.embedding_std` to 1 / sqrt(3 width).
    """
    config = default()
    config.network.update(
        prediction="score", conditioning="sigma", width=768, layers=12, heads=12, dropout=0.1, dtype="bfloat16"
    )
    config.network.embedding_std = 768**-0.5 / 3**0.5
    config.data.block_length = 1024
    config.training.update(steps=400_000, batch_size=512, ema_decay=0.9999, loss="bound", noise_sampling="time")
    config.optimizer.update(name="adamw", learning_rate=3e-4, b2=0.999, warmup_steps=2500, decay="constant")
    config.optimizer.clip_norm = 1.0
    config.checkpoint.every = 5000
    config.evaluation.every = 10_000
    return config


def fingerprint(config: ConfigDict) -> str:
    """Returns a hexadecimal hash of all settings but the corpus path; the corpus has a fingerprint of its own."""
    values = config.to_dict()
    values["data"] = {**values["data"], "corpus": None}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def from_dict(values: dict[str, Any]) -> ConfigDict:
    """Returns the default config with the given nested values. UserError for an unknown key or an invalid value.

    Settings that are None stay so, and follow the process: see `resolved`.
    """
    config = default()
    for group, members in values.items():
        if not isinstance(members, dict) or not (members or group in config):
            raise UserError(f"config: {group} is not a group of settings; there are {', '.join(config)}")
        for name, value in members.items():
            _set(config, f"{group}.{name}", value)
    validate(config)
    return config


def override(config: ConfigDict, settings: list[str]) -> ConfigDict:
    """Returns a copy of the config with overrides such as "optimizer.learning_rate=1e-3".

    UserError for an unknown key or an invalid value.
    """
    config = from_dict(config.to_dict())
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"config: {setting} has no value; write {setting}=VALUE")
        _set(config, key, _parsed(text))
    validate(config)
    return config


def _parsed(text: str) -> Any:
    constants = {"true": True, "false": False, "none": None}
    if text.lower() in constants:
        return constants[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _set(config: ConfigDict, key: str, value: Any):
    """Sets one key, converting between int and float where that is exact. UserError for another type."""
    flat = {f"{group}.{name}" for group, members in config.items() for name in members}
    if key not in flat:
        nearest = difflib.get_close_matches(key, flat, n=1, cutoff=0.0)[0]
        raise UserError(f"config: there is no {key}; the nearest is {nearest}")
    group, name = key.split(".")
    kind = OPTIONAL.get(key, type(config[group][name]))
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)  # 1e5
    if kind is str and value is None and key not in OPTIONAL:
        value = "none"  # a choice by that name, which `_parsed` reads as None
    if type(value) is not kind and not (value is None and key in OPTIONAL):
        raise UserError(f"config: {key} must be of type {kind.__name__}, not {value!r}")
    config[group][name] = value


def read_description(file: epath.Path) -> dict[str, Any]:
    """Returns the contents of the config.json of a run, an exported model or a published checkpoint.

    UserError if the file is not a JSON object, or if its format is that of another version of sedd.
    """
    try:
        about = json.loads(file.read_text())
    except ValueError:
        raise UserError(f"{file} is damaged: it is not JSON; restore it, or choose another folder") from None
    if not isinstance(about, dict):
        raise UserError(f"{file} does not describe a model; choose another folder")
    if "config" in about and about.get("format") != FORMAT:
        raise UserError(
            f"{file} has format {about.get('format', 1)}, and this version of sedd reads format {FORMAT}; use the "
            "version that wrote it, or train the model again"
        )
    for key, value in BEFORE.items() if "config" in about else ():
        group, name = key.split(".")
        about["config"].setdefault(group, {}).setdefault(name, value)
    return about


def _embeddings(config: ConfigDict, vocab_size: int, encoder: Bert | T5Encoder | None) -> Embeddings:
    codec = config.codec
    return Embeddings(vocab_size, codec.width, codec.table, codec.normalised, codec.rounding)


def _encoder(config: ConfigDict, vocab_size: int, encoder: Bert | T5Encoder | None) -> Encoder:
    codec, network = config.codec, config.network
    layers = codec.decoder_layers if codec.decoder == TRANSFORMER else 0
    decoder = Decoder(vocab_size, network.width, layers, network.heads, network.dtype)
    encoder = encoder or read_module(codec.encoder)
    if codec.width > encoder.width:
        raise UserError(
            f"config: codec.width={codec.width} is more than the encoder's {encoder.width} coordinates; choose less"
        )
    return Encoder(encoder, vocab_size, codec.width or encoder.width, decoder, codec.static)


CODECS: dict[str, Callable[..., Embeddings | Encoder]] = {EMBEDDINGS: _embeddings, ENCODER: _encoder}


# The networks by network.block_size; of any other size BlockNetwork.
_KINDS_OF_BLOCKS: dict[int, type[TokenNetwork]] = {0: TokenNetwork, 1: AutoregressiveNetwork}


def _masked_lm(
    process: Absorbing, of_network: dict, of_trunk: dict, architecture: str, mask_token: int, start_token: int
) -> MaskedLanguageModel:
    sizes = {name: of_trunk[name] for name in ("width", "layers", "heads", "dropout", "dtype", "remat", "attention")}
    trunk = Bert(process.vocab_size, mlp_width=MLP * sizes["width"], **sizes, **ARCHITECTURES[architecture])
    mask, start = SPECIAL[architecture]
    return MaskedLanguageModel(
        process=process,
        prediction=of_network["prediction"],
        trunk=trunk,
        sigma_range=of_network["sigma_range"],
        mask_token=mask if mask_token < 0 else mask_token,
        start_token=start if start_token < 0 else start_token,
    )


def build(
    config: ConfigDict, vocab_size: int, encoder: Bert | T5Encoder | None = None
) -> tuple[Process | Gaussian, Schedule, Network]:
    """Returns the process, schedule and network of a config, for a vocabulary of V tokens.

    encoder: that of codec.encoder, if it has been read.
    """
    config = resolved(config)
    schedule, of_trunk = SCHEDULES[config.schedule.name](config.schedule), config.network.to_dict()
    of_network = {name: of_trunk.pop(name) for name in _OF_NETWORK}
    of_latents = {name: of_trunk.pop(name) for name in OF_LATENTS}
    of_masked = {name: of_trunk.pop(name) for name in OF_MASKED}
    block_size = of_trunk.pop("block_size")
    of_network["trunk"] = Trunk(**of_trunk)
    of_network["sigma_range"] = (float(schedule.sigma(config.training.min_time)), float(schedule.sigma(1.0)))
    network: Network
    if config.process.name == GAUSSIAN:
        codec = CODECS[config.codec.name](config, vocab_size, encoder)
        of_latents["bound_low"] = config.evaluation.low
        network = LatentNetwork(process=codec.process, codec=codec, **of_network, **of_latents)
    elif config.network.architecture != DIT:
        network = _masked_lm(Absorbing(vocab_size), of_network, of_trunk, **of_masked)
    else:
        of_blocks = {"block_size": block_size} if block_size else {}
        kind = _KINDS_OF_BLOCKS.get(block_size, BlockNetwork)
        network = kind(process=PROCESSES[config.process.name](vocab_size), **of_network, **of_blocks)
    return network.process, schedule, network
