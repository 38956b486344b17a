"""The default config, that of the quickstart, its validated overrides, and what a saved config.json holds.

`sedd.config_file` reads config files, which are Python.
"""

import ast
import difflib
import hashlib
import json
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from sedd.diffusion.discrete.process import Absorbing, Process, Uniform
from sedd.diffusion.schedule import Geometric, LogLinear, Schedule
from sedd.errors import UserError
from sedd.network.attention import ATTENTION, check_sizes
from sedd.network.network import Network
from sedd.network.predictions import PREDICTIONS
from sedd.network.trunk import REMAT, Trunk
from sedd.seeds import check_seed

FORMAT = 2  # of config.json of runs and exported models; version 0.1.0 wrote format 1 without the key
PROCESSES: dict[str, type[Process]] = {"absorbing": Absorbing, "uniform": Uniform}
SCHEDULES = {
    "loglinear": lambda config: LogLinear(config.eps),
    "geometric": lambda config: Geometric(config.sigma_min, config.sigma_max),
}
_DEFAULT = {
    "process": {"name": "absorbing"},
    "schedule": {
        "name": "loglinear",
        "eps": 1e-3,  # loglinear: the probability that a token is clean at t = 1
        "sigma_min": 1e-4,  # geometric
        "sigma_max": 20.0,  # geometric
    },
    "network": {
        "prediction": "denoiser",  # or "score", as in the paper
        "width": 128,
        "layers": 4,
        "heads": 4,
        "cond_dim": 128,  # width of the embedding of sigma
        "embedding_std": 0.5,  # at initialisation; in the paper 1 / sqrt(3 width)
        "dropout": 0.0,
        "dtype": "float32",  # of the linear layers and attention of the trunk; the rest is float32
        "scan": False,  # compile one layer and scan over the layers
        "remat": "none",  # rematerialise nothing, "full" layers, or all of a layer but its "dots"
        "attention": "xla",  # or "cudnn" on GPUs, "splash" on TPUs
        "given_embedding": False,  # uniform: embed which tokens are given, so that infilling is exact
    },
    "data": {
        "corpus": "data/names",
        "block_length": 32,
        "vocab_size": None,  # None: that of the corpus; else it must equal that
    },
    "training": {
        "steps": 800,
        "batch_size": 64,  # rows per update, over all devices and microbatches
        "accumulation": 1,  # microbatches per update
        "seed": 0,
        "ema_decay": 0.0,  # 0: no EMA of the parameters
        "noise_sampling": "mask_count",  # mask counts in antithetic pairs; or "time", as in the paper
        "min_time": 1e-3,  # noise_sampling=time: the smallest time
        "max_skipped_steps": 0,  # skipped updates with a non-finite loss or gradient; one more stops the run
    },
    "optimizer": {
        "name": "muon",  # for the matrices of the trunk, with Adam for the rest; or "adamw", as in the paper
        "learning_rate": 0.02,
        "adam_learning_rate": 0.03,  # muon: of the parameters that Adam updates
        "b1": 0.9,  # Adam
        "b2": 0.98,  # Adam
        "weight_decay": 0.0,
        "warmup_steps": 30,
        "decay": "linear",  # to 0 at the last step, or "constant"
        "clip_norm": 32.0,  # largest gradient norm, of the loss summed over positions and averaged over rows
    },
    "mesh": {"data": -1, "fsdp": 1, "model": 1},  # devices along each axis; -1: all remaining devices
    "checkpoint": {
        "every": 500,  # steps between checkpoints
        "keep": 2,  # number of newest checkpoints to keep
        "keep_every": 0,  # also keep those at multiples of this step; 0: none
        "keep_best": False,  # also keep the one with the best bound; a new best bound writes a checkpoint
    },
    "evaluation": {
        "every": 0,  # steps between validation bounds and samples during training; 0: none
        "draws": 16,  # noise levels per block
        "samples": 2,  # texts sampled each time during training
    },
    "metrics": {
        "tensorboard": False,  # also write TensorBoard event files (pip install 'sedd[tensorboard]')
        "profile": 0,  # steps to trace with the JAX profiler, after the first ten; 0: none
    },
}
_CHOICES = {
    "process.name": tuple(PROCESSES),
    "schedule.name": tuple(SCHEDULES),
    "network.prediction": tuple(PREDICTIONS),
    "network.dtype": ("float32", "bfloat16"),
    "network.remat": tuple(REMAT),
    "network.attention": tuple(ATTENTION),
    "training.noise_sampling": ("time", "mask_count"),
    "optimizer.name": ("adamw", "muon"),
    "optimizer.decay": ("constant", "linear"),
}
_OPTIONAL = {"data.vocab_size": int}
_POSITIVE = {
    "network": ("width", "layers", "heads", "cond_dim", "embedding_std"),
    "data": ("block_length",),
    "training": ("steps", "batch_size", "accumulation"),
    "optimizer": ("learning_rate", "adam_learning_rate", "warmup_steps", "clip_norm"),
    "checkpoint": ("every", "keep"),
    "evaluation": ("draws",),
}
_NOT_NEGATIVE = (
    "training.max_skipped_steps",
    "optimizer.weight_decay",
    "checkpoint.keep_every",
    "evaluation.every",
    "evaluation.samples",
    "metrics.profile",
)


def default() -> ConfigDict:
    """Returns a new copy of the default config, locked: setting an unknown key is an error."""
    return ConfigDict(_DEFAULT).lock()


def paper() -> ConfigDict:
    """Returns the config of the SEDD paper for its small network: unnormalised scores, noise sampled by time, AdamW,
    EMA, constant learning rate.

    Section 5.1 and appendix C of arXiv 2310.16834. The warm-up of 2,500 steps is that of the authors' code (the paper
    has 2,000); 400,000 steps are those of the published models according to RADD (arXiv 2406.03736). With another width
    also set `network.embedding_std` to 1 / sqrt(3 width).
    """
    config = default()
    config.network.update(prediction="score", width=768, layers=12, heads=12, dropout=0.1, dtype="bfloat16")
    config.network.embedding_std = 768**-0.5 / 3**0.5
    config.data.block_length = 1024
    config.training.update(steps=400_000, batch_size=512, ema_decay=0.9999, noise_sampling="time")
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
    """Returns the default config with the given nested values. UserError for an unknown key or an invalid value."""
    config = default()
    for group, members in values.items():
        if not isinstance(members, dict) or not (members or group in config):
            raise UserError(f"config: {group} is not a group of settings; there are {', '.join(config)}")
        for name, value in members.items():
            _set(config, f"{group}.{name}", value)
    return validate(config)


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
    return validate(config)


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
    kind = _OPTIONAL.get(key, type(config[group][name]))
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)  # 1e5
    if kind is str and value is None:
        value = "none"  # a choice by that name, which `_parsed` reads as None
    if type(value) is not kind and not (value is None and key in _OPTIONAL):
        raise UserError(f"config: {key} must be of type {kind.__name__}, not {value!r}")
    config[group][name] = value


def validate(config: ConfigDict) -> ConfigDict:
    """Returns the config unchanged. UserError for an invalid value or combination of values."""

    def get(key):
        group, name = key.split(".")
        return config[group][name]

    for key, choices in _CHOICES.items():
        if get(key) not in choices:
            raise UserError(f"config: {key} must be one of {', '.join(choices)}, not {get(key)}")
    for group, members in config.items():
        for name, value in members.items():
            if type(value) in (int, float) and name != "seed" and not abs(value) < 2**31:
                raise UserError(f"config: {group}.{name} must be less than 2**31, not {value}")
    for group, names in _POSITIVE.items():
        for name in names:
            if config[group][name] <= 0:
                raise UserError(f"config: {group}.{name} must be positive, not {config[group][name]}")
    for key in _NOT_NEGATIVE:
        if get(key) < 0:
            raise UserError(f"config: {key} must not be negative, and is {get(key)}")
    for key in ("network.dropout", "training.ema_decay"):
        if not 0 <= get(key) < 1:
            raise UserError(f"config: {key} must lie in [0, 1), not {get(key)}")
    try:
        SCHEDULES[config.schedule.name](config.schedule)
    except ValueError as error:
        raise UserError(f"config: {error}") from None
    training, network = config.training, config.network
    check_seed(training.seed, "config: training.seed")
    if not 0 < training.min_time < 1:
        raise UserError(f"config: training.min_time must lie in (0, 1), not {training.min_time}")
    if config.checkpoint.keep_best and not config.evaluation.every:
        raise UserError("config: checkpoint.keep_best needs validation bounds; set evaluation.every")
    if training.batch_size % training.accumulation:
        raise UserError("config: training.batch_size must be a multiple of training.accumulation")
    if network.width % (2 * network.heads):
        raise UserError("config: network.width must be a multiple of twice network.heads")
    try:
        check_sizes(network.attention, network.dtype, network.width // network.heads, config.data.block_length)
    except ValueError as error:
        raise UserError(f"config: {error}, or choose xla") from None
    if network.given_embedding and config.process.name != "uniform":
        raise UserError(
            "config: network.given_embedding is for process.name=uniform; the absorbing process needs none, since a "
            "given token is one that is not masked"
        )
    if training.noise_sampling == "mask_count":
        if config.process.name != "absorbing":
            raise UserError("config: training.noise_sampling=mask_count is for process.name=absorbing; choose time")
        if training.batch_size // training.accumulation % 2:
            raise UserError(
                "config: training.noise_sampling=mask_count needs an even number of rows in each microbatch"
            )
    return config


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
    return about


def build(config: ConfigDict, vocab_size: int) -> tuple[Process, Schedule, Network]:
    """Returns the process, schedule and network of a config, for a vocabulary of V tokens."""
    process = PROCESSES[config.process.name](vocab_size)
    schedule = SCHEDULES[config.schedule.name](config.schedule)
    of_trunk = config.network.to_dict()
    of_network = {name: of_trunk.pop(name) for name in ("prediction", "cond_dim", "embedding_std", "given_embedding")}
    sigma_range = (float(schedule.sigma(config.training.min_time)), float(schedule.sigma(1.0)))
    network = Network(process=process, trunk=Trunk(**of_trunk), sigma_range=sigma_range, **of_network)
    return process, schedule, network
