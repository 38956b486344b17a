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
from sedd.network.adapters import CONDITIONING
from sedd.network.attention import ATTENTION, check_sizes
from sedd.network.network import Network
from sedd.network.predictions import PREDICTIONS
from sedd.network.trunk import REMAT, Trunk
from sedd.recipes import DEFAULT, RECIPES
from sedd.seeds import check_seed

FORMAT = 2  # of config.json of runs and exported models; version 0.1.0 wrote format 1 without the key
BEFORE = {"network.conditioning": "sigma", "training.loss": "bound"}  # of a config.json without these keys
PROCESSES: dict[str, type[Process]] = {"absorbing": Absorbing, "uniform": Uniform}
SCHEDULES = {
    "loglinear": lambda config: LogLinear(config.eps),
    "geometric": lambda config: Geometric(config.sigma_min, config.sigma_max),
}
_CHOICES = {
    "process.name": tuple(PROCESSES),
    "schedule.name": tuple(SCHEDULES),
    "network.prediction": tuple(PREDICTIONS),
    "network.conditioning": tuple(CONDITIONING),
    "network.dtype": ("float32", "bfloat16"),
    "network.remat": tuple(REMAT),
    "network.attention": tuple(ATTENTION),
    "training.loss": ("bound", "cross_entropy"),
    "training.noise_sampling": ("time", "mask_count"),
    "optimizer.name": ("adamw", "muon"),
    "optimizer.decay": ("constant", "linear"),
}
_OF_NETWORK = ("prediction", "conditioning", "cond_dim", "embedding_std", "given_embedding")  # the rest: of the trunk
_OPTIONAL = {"data.vocab_size": int, **dict.fromkeys(RECIPES["absorbing"], str)}
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
    return ConfigDict(DEFAULT).lock()


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


def resolved(config: ConfigDict) -> ConfigDict:
    """Returns a copy in which the settings that are None have the values of the process' recipe."""
    config = ConfigDict(config.to_dict()).lock()
    for key, value in RECIPES[config.process.name].items():
        group, name = key.split(".")
        if config[group][name] is None:
            config[group][name] = value
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
    kind = _OPTIONAL.get(key, type(config[group][name]))
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)  # 1e5
    if kind is str and value is None and key not in _OPTIONAL:
        value = "none"  # a choice by that name, which `_parsed` reads as None
    if type(value) is not kind and not (value is None and key in _OPTIONAL):
        raise UserError(f"config: {key} must be of type {kind.__name__}, not {value!r}")
    config[group][name] = value


def validate(config: ConfigDict) -> ConfigDict:
    """Returns the config, `resolved`. UserError for an invalid value or combination of values."""
    if config.process.name in RECIPES:
        config = resolved(config)

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
    prediction = PREDICTIONS[network.prediction]
    if config.process.name != "uniform" and not prediction.with_mask:
        raise UserError(
            f"config: network.prediction={network.prediction} is for process.name=uniform; of a masked token the "
            "denoiser is the posterior"
        )
    if training.loss == "cross_entropy":
        if prediction.unnormalised:
            raise UserError(
                f"config: training.loss=cross_entropy needs normalised predictions, which {network.prediction} has "
                "not; choose training.loss=bound"
            )
        if training.noise_sampling != "time":
            raise UserError("config: training.loss=cross_entropy needs training.noise_sampling=time")
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
    for key, value in BEFORE.items() if "config" in about else ():
        group, name = key.split(".")
        about["config"].setdefault(group, {}).setdefault(name, value)
    return about


def build(config: ConfigDict, vocab_size: int) -> tuple[Process, Schedule, Network]:
    """Returns the process, schedule and network of a config, for a vocabulary of V tokens."""
    config = resolved(config)
    process = PROCESSES[config.process.name](vocab_size)
    schedule = SCHEDULES[config.schedule.name](config.schedule)
    of_trunk = config.network.to_dict()
    of_network = {name: of_trunk.pop(name) for name in _OF_NETWORK}
    sigma_range = (float(schedule.sigma(config.training.min_time)), float(schedule.sigma(1.0)))
    network = Network(process=process, trunk=Trunk(**of_trunk), sigma_range=sigma_range, **of_network)
    return process, schedule, network
