"""`load` reads a model from a run, an export or a published checkpoint; `train` trains or resumes a run."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays

from sedd import config as configs
from sedd import pretrained
from sedd.codecs.frozen import FILE, Normalisation, encoder_arrays, load_npz, normalised
from sedd.codecs.hub import absolute_spec, folder_of
from sedd.codecs.pretrained_encoder import PretrainedEncoder, read_encoder
from sedd.data.layout import Layout
from sedd.data.tokenizers import Tokenizer, load_tokenizer, pretrained_tokenizer, vocabulary_of
from sedd.diffusion.keyed_random import root_key
from sedd.errors import UserError
from sedd.model import WEIGHTS, Model
from sedd.network.network import Network
from sedd.pretrained.format import Format, read
from sedd.recipes import ENCODER, kind_of
from sedd.runtime import parallel
from sedd.runtime.parallel import abstract_arrays
from sedd.runtime.trees import fitted
from sedd.training.checkpoint import restore_params
from sedd.training.encoder import check_digest
from sedd.training.fit import fit


def load(path: str | Path, tokenizer: str | None = None, encoder: str | None = None) -> Model:
    """Loads a model from a run directory, an exported model or a published checkpoint: `sedd.pretrained.FORMATS`.

    path: a folder, gs://BUCKET/FOLDER, "ORGANISATION/NAME[@REVISION]" of the Hugging Face Hub, or a training checkpoint
    of PyTorch, such as checkpoint.pth. A run loads its newest checkpoint, RUN/checkpoints/STEP that of a step.
    tokenizer: for a model without one, such as a published SEDD, in the form of `sedd prepare`: "gpt2:FOLDER"; by
    default that of the published models, if it is in the local cache of the hub.
    encoder: the folder of a frozen encoder that is no longer where the model was trained.
    The parameters are replicated on each device. With several processes all of them call it.
    UserError if there is no model, if a file is damaged, or if the tokenizer does not fit the model.
    """
    return load_all([path], tokenizer, encoder)[0]


def load_all(
    paths: Sequence[str | Path], tokenizer: str | None = None, encoder: str | None = None
) -> tuple[Model, ...]:
    """Loads several models, as `load`. The tokenizer is for those without one, the encoder for the first."""
    found = [find(path) for path in paths]
    encoders = [encoder, *[None] * len(paths)]
    models = [_load(*arguments) for arguments in zip(found, paths, encoders)]
    if tokenizer is None:
        return tuple(_with_cached_tokenizer(model, one.form) for model, one in zip(models, found))
    without = [model for model in models if model.tokenizer is None] or models
    return tuple(with_tokenizer(model, tokenizer) if model in without else model for model in models)


class Found(NamedTuple):
    """A model of which config.json alone has been read.

    directory: its folder, or the file of a training checkpoint of PyTorch; step: of the checkpoint that the path names,
    None if it names none; about: the contents of config.json; form: the format of a published checkpoint, None of a run
    or an exported model.
    """

    directory: epath.Path
    step: int | None
    about: dict[str, Any]
    form: Format | None

    @property
    def layout(self) -> Layout:
        """The layout of the training corpus; packed, if it is not recorded."""
        return Layout() if self.form is not None else Layout.from_json(self.about["layout"])


def find(path: str | Path) -> Found:
    """Finds the model of a path of `load`. UserError if there is none, or if its config.json is damaged."""
    directory, step = run_and_step(folder_of(path))
    if directory.is_file():
        return Found(directory, None, *pretrained.described(directory))
    if not (directory / "config.json").is_file():
        raise UserError(f"{path} is not a model: it has no config.json")
    about = configs.read_description(directory / "config.json")
    form = pretrained.format_of(about)
    if form is None and "config" not in about:
        raise UserError(f"{directory} is not a model of sedd: its config.json has no config; choose another folder")
    return Found(directory, step, about, form)


def _load(found: Found, path: str | Path, encoder: str | None) -> Model:
    directory, step, about, form = found
    if form is not None:
        config, params, tokenizer = read(form, about, directory)
        vocab_size = config.data.vocab_size
    else:
        config, vocab_size, tokenizer = saved_config(about), about["vocab_size"], saved_tokenizer(directory)
        params = None  # read below, in the shapes of the network
    needed = _encoder(config, path, encoder)
    _, schedule, network = configs.build(config, vocab_size, None if needed is None else needed.module)
    if params is None:
        params = _params(directory, step, config, jax.eval_shape(network.init, root_key(0)))
    if tokenizer is not None:
        tokenizer = _fitting(tokenizer, network, f"{directory}: its tokenizer")
    frozen = {}
    if needed is not None:
        frozen = _frozen(directory, needed, tokenizer)
    return Model(
        config=config,
        network=network,
        params=_replicated(params),
        frozen=_replicated(frozen),
        schedule=schedule,
        tokenizer=tokenizer,
        layout=found.layout,
        block_length=config.data.block_length,
    )


def _encoder(config: ConfigDict, path: str | Path, encoder: str | None) -> PretrainedEncoder | None:
    """Reads the encoder of a model that has one. encoder: its folder, by default that of the config.

    UserError that says what is needed if it cannot be read, or is another one.
    """
    if kind_of(config) != ENCODER:
        if encoder is not None:
            raise UserError(f"{path} has no encoder; leave out encoder={encoder}")
        return None
    config.codec.encoder = absolute_spec(encoder or config.codec.encoder)
    try:
        pretrained = read_encoder(config.codec.encoder)
    except UserError as error:
        raise UserError(
            f"{path} needs the encoder that it was trained with ({error}); copy it there, or say where it is: "
            "sedd.load(..., encoder=FOLDER), or --encoder=FOLDER beside --model"
        ) from None
    check_digest(pretrained, config.codec)
    return pretrained


def _frozen(directory: epath.Path, pretrained: PretrainedEncoder, tokenizer: Tokenizer | None) -> dict:
    """The parameters beside those that were trained, of a model with an encoder."""
    if tokenizer is None:
        raise UserError(f"{directory} has no tokenizer, which a model with an encoder needs; restore its folder")
    arrays = encoder_arrays(pretrained, vocabulary_of(tokenizer), tokenizer.end_of_text)
    return {"codec": normalised(pretrained, arrays, load_npz(directory / FILE, Normalisation))}


def saved_config(about: dict[str, Any]) -> ConfigDict:
    """Returns the config in the config.json of a run or an exported model."""
    config = configs.from_dict(about["config"])
    config.network.attention = "xla"  # computes the same function, at any length and on any device
    return config


def saved_tokenizer(directory: epath.Path) -> Tokenizer | None:
    """Returns the tokenizer of a run or an exported model, None if it has none. UserError if it is damaged."""
    return load_tokenizer(directory / "tokenizer") if (directory / "tokenizer").is_dir() else None


def _params(directory: epath.Path, step: int | None, config: ConfigDict, like: dict) -> dict:
    """Reads the parameters of an exported model, or of a run. like: their shapes and types."""
    weights = directory / WEIGHTS
    return exported_params(weights, like) if weights.is_file() else _trained(directory, step, config, like)


def run_and_step(directory: epath.Path) -> tuple[epath.Path, int | None]:
    """Splits RUN/checkpoints/STEP into RUN and STEP; the step of any other folder is None."""
    if directory.parent.name == "checkpoints" and directory.name.isdigit() and directory.is_dir():
        return directory.parent.parent, int(directory.name)
    return directory, None


def _replicated(params: dict) -> dict:
    """Replicates the parameters on each device: evaluation and sampling are data-parallel.

    Empties the tree that it is given, one array after the other, so that they are not in memory twice.
    """
    mesh = parallel.data_mesh()

    def moved(tree, shardings):
        if not isinstance(tree, dict):
            return parallel.put(tree, shardings)
        return {name: moved(tree.pop(name), shardings[name]) for name in list(tree)}

    return moved(params, parallel.shardings(mesh, params))


def train(config: ConfigDict, workdir: str | Path, init_from: str | Path | None = None) -> Model:
    """Trains a model, or resumes the run in `workdir`. Returns the trained model. See `sedd.training.fit.fit`.

    init_from: a path of `load`, from whose weights a new run is initialised; of a model with another tokenizer the rows
    of common tokens are used. UserError for an invalid config, or if `workdir` holds another run.
    """
    model = None if init_from is None else load(init_from)
    fit(config, workdir, *(() if model is None else (model.params, str(init_from), model.tokenizer)))
    return load(workdir)


def with_tokenizer(model: Model, spec: str) -> Model:
    """Adds a tokenizer to a model without one. UserError if it has one, or if the vocabulary sizes differ."""
    if model.tokenizer is not None:
        raise UserError(f"this model has a tokenizer of its own; leave out tokenizer={spec}")
    tokenizer = _fitting(pretrained_tokenizer(spec), model.network, f"the tokenizer {spec}")
    return dataclasses.replace(model, tokenizer=tokenizer)


def _with_cached_tokenizer(model: Model, form: Format | None) -> Model:
    """Adds the tokenizer of the published models to one without, if it is in the local cache of the hub and fits."""
    tokenizer = form.cached_tokenizer() if form is not None and model.tokenizer is None else None
    if tokenizer is None:
        return model
    try:
        return dataclasses.replace(model, tokenizer=_fitting(tokenizer, model.network, ""))
    except UserError:
        return model


def _fitting(tokenizer: Tokenizer, network: Network, name: str) -> Tokenizer:
    """Returns the tokenizer of a network; Duo adds the token [PAD] to GPT-2's. UserError if the sizes differ."""
    if network.process.mask_id is None and tokenizer.vocab_size + 1 == network.vocab_size:
        tokenizer = tokenizer.with_padding()
    if tokenizer.vocab_size != network.vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens, the model {network.vocab_size}"
        raise UserError(f"{name} has {sizes}; give the tokenizer it was trained with")
    return tokenizer


def _trained(directory: epath.Path, step: int | None, config: ConfigDict, like: dict) -> dict:
    if not (directory / "checkpoints").is_dir():
        raise UserError(f"{directory} holds no checkpoint yet; train a little longer")
    like = abstract_arrays(like, parallel.shardings(parallel.data_mesh(), like))
    return restore_params(directory / "checkpoints", like, bool(config.training.ema_decay), step)


def exported_params(file: epath.Path, like: dict) -> dict:
    """Reads the parameters of an exported model. like: their shapes and types. UserError if they do not fit it."""
    try:
        arrays = load_arrays(file.read_bytes())
    except SafetensorError as error:
        raise UserError(f"{file} is damaged ({error}); export the model again") from None
    return fitted(arrays, like, f"{file} does not fit its config.json")
