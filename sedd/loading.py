"""`load` reads a model from a run, an export or a published SEDD checkpoint; `train` trains or resumes a run."""

import dataclasses
from pathlib import Path

import jax
from etils import epath
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays

from sedd import config as configs
from sedd import pretrained
from sedd.data.layout import Layout
from sedd.data.tokenizers import load_tokenizer, pretrained_tokenizer
from sedd.diffusion.keyed_random import root_key
from sedd.errors import UserError
from sedd.model import Model
from sedd.runtime import parallel, storage
from sedd.runtime.parallel import abstract_arrays
from sedd.runtime.trees import fitted
from sedd.training.checkpoint import restore_params
from sedd.training.fit import fit


def load(path: str | Path, tokenizer: str | None = None) -> Model:
    """Loads a model from a run directory, an exported model or a published SEDD checkpoint.

    path: a folder or gs://BUCKET/FOLDER. A run loads its newest checkpoint, RUN/checkpoints/STEP that of a step.
    tokenizer: for a model without one, such as a published checkpoint, in the form of `sedd prepare`: "gpt2:FOLDER".
    The parameters are replicated on each device. With several processes all of them call it.
    UserError if there is no model, if a file is damaged, or if the tokenizer does not fit the model.
    """
    model = _load(path)
    return model if tokenizer is None else with_tokenizer(model, tokenizer)


def _load(path: str | Path) -> Model:
    directory, step = _run_and_step(storage.folder_of(path))
    if not directory.is_dir():
        raise UserError(f"there is no folder {path}; train a model there, or choose another folder")
    if not (directory / "config.json").is_file():
        raise UserError(f"{path} is not a model: it has no config.json")
    about = configs.read_description(directory / "config.json")
    published = pretrained.is_published(about)
    if published:
        config, params = pretrained.load(directory)
        vocab_size, tokenizer = config.data.vocab_size, None
    elif "config" in about:
        config, vocab_size = configs.from_dict(about["config"]), about["vocab_size"]
        config.network.attention = "xla"  # computes the same function, at any length and on any device
        tokenizer = load_tokenizer(directory / "tokenizer") if (directory / "tokenizer").is_dir() else None
        params = None  # read below, in the shapes of the network
    else:
        raise UserError(f"{directory} is not a model of sedd: its config.json has no config; choose another folder")
    _, schedule, network = configs.build(config, vocab_size)
    if params is None:
        params = _params(directory, step, config, jax.eval_shape(network.init, root_key(0)))
    return Model(
        config=config,
        network=network,
        params=_replicated(params),
        schedule=schedule,
        tokenizer=tokenizer,
        layout=Layout() if published else Layout.from_json(about["layout"]),
        block_length=config.data.block_length,
    )


def _params(directory: epath.Path, step: int | None, config: ConfigDict, like: dict) -> dict:
    """Reads the parameters of an exported model, or of a run. like: their shapes and types."""
    weights = directory / "weights.safetensors"
    return _exported(weights, like) if weights.is_file() else _trained(directory, step, config, like)


def _run_and_step(directory: epath.Path) -> tuple[epath.Path, int | None]:
    """Splits RUN/checkpoints/STEP into RUN and STEP; the step of any other folder is None."""
    if directory.parent.name == "checkpoints" and directory.name.isdigit() and directory.is_dir():
        return directory.parent.parent, int(directory.name)
    return directory, None


def _replicated(params: dict) -> dict:
    """Replicates the parameters on each device: evaluation and sampling are data-parallel."""
    mesh = parallel.data_mesh()
    return parallel.put(params, parallel.shardings(mesh, params))


def train(config: ConfigDict, workdir: str | Path, init_from: str | Path | None = None) -> Model:
    """Trains a model, or resumes the run in `workdir`. Returns the trained model. See `sedd.training.fit.fit`.

    init_from: a path of `load`, from whose weights a new run is initialised; nothing else of that model is used.
    UserError for an invalid config, or if `workdir` holds another run.
    """
    weights = None if init_from is None else load(init_from).params
    fit(config, workdir, weights, None if init_from is None else str(init_from))
    return load(workdir)


def with_tokenizer(model: Model, spec: str) -> Model:
    """Adds a tokenizer to a model without one. UserError if it has one, or if the vocabulary sizes differ."""
    if model.tokenizer is not None:
        raise UserError(f"this model has a tokenizer of its own; leave out tokenizer={spec}")
    tokenizer = pretrained_tokenizer(spec)
    if tokenizer.vocab_size != model.vocab_size:
        raise UserError(
            f"the tokenizer {spec} has {tokenizer.vocab_size} tokens, the model {model.vocab_size}; give the "
            "tokenizer it was trained with"
        )
    return dataclasses.replace(model, tokenizer=tokenizer)


def _trained(directory: epath.Path, step: int | None, config: ConfigDict, like: dict) -> dict:
    if not (directory / "checkpoints").is_dir():
        raise UserError(f"{directory} holds no checkpoint yet; train a little longer")
    like = abstract_arrays(like, parallel.shardings(parallel.data_mesh(), like))
    return restore_params(directory / "checkpoints", like, bool(config.training.ema_decay), step)


def _exported(file: epath.Path, like: dict) -> dict:
    try:
        arrays = load_arrays(file.read_bytes())
    except SafetensorError as error:
        raise UserError(f"{file} is damaged ({error}); export the model again") from None
    return fitted(arrays, like, f"{file} does not fit its config.json")
