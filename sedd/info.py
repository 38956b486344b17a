"""`sedd info`: what a folder is, from its files alone. No network runs; corpus and frozen encoder need not be there."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sedd import config as configs
from sedd.codecs import huggingface
from sedd.codecs.frozen import FILE, Normalisation, load_npz
from sedd.codecs.hub import folder_of
from sedd.data.corpus import open_corpus
from sedd.data.tokenizers import Tokenizer
from sedd.data.writer import hash_of_splits
from sedd.diffusion.keyed_random import root_key
from sedd.diffusion.schedule import Schedule
from sedd.errors import UserError
from sedd.loading import Found, exported_params, find, run_and_step, saved_config, saved_tokenizer
from sedd.model import WEIGHTS
from sedd.network.adapters import CONSTANT
from sedd.network.bert import Bert
from sedd.network.network import Network
from sedd.pretrained.format import config_of, read
from sedd.recipes import ENCODER, GAUSSIAN, kind_of, resolved
from sedd.runtime import parallel, storage
from sedd.runtime.settings import jax_defaults
from sedd.runtime.trees import named
from sedd.training.checkpoint import items_of, steps_saved, try_read
from sedd.training.metrics import bounds_of
from sedd.training.objectives import make_objective
from sedd.training.optimizer import make_optimizer
from sedd.training.step import TrainState, init_state

RUN, EXPORT, PUBLISHED, CORPUS = "run", "exported model", "published checkpoint", "corpus"
_MISSING = {"mask_id": "none", "end_of_text": "none", "ema_decay": "none", "tokenizer": "none: give --tokenizer"}


@jax_defaults()
def describe(path: str | Path) -> dict[str, Any]:
    """Describes a run directory, an exported model, a published checkpoint or a corpus, as a dict for a JSON file.

    path: as of `sedd.load`, or of a corpus. Of a model there are the groups "model", "network", "vocabulary" and
    "training", which is None of a published checkpoint; of a corpus "corpus", "splits" and "vocabulary". A fact that is
    not recorded is None. "verified": True if all arrays are as they were written, or fit the config's network and are
    finite; None of a run without a checkpoint. "problem": one line, if they are not. UserError for any other folder.
    """
    folder = folder_of(path)
    if not folder.is_dir() or (run_and_step(folder)[0] / "config.json").is_file():
        return _describe_model(find(path))
    if (folder / "meta.json").is_file():
        return _describe_corpus(folder)
    raise UserError(
        f"{path} is no run, exported model, published checkpoint or corpus: it has neither config.json nor meta.json"
    )


class _Model(NamedTuple):
    """A model without its parameters. step: of the checkpoint that is described, None if there is none."""

    found: Found
    kind: str
    step: int | None
    config: ConfigDict
    schedule: Schedule
    network: Network

    @property
    def checkpoint(self) -> epath.Path:
        """The folder of the checkpoint that is described."""
        return self.found.directory / "checkpoints" / str(self.step)


def _describe_model(found: Found) -> dict[str, Any]:
    model = _opened(found)
    tokenizer, problem = _tokenizer(found)
    problem = _problem_of_arrays(model) or problem
    has_arrays = model.kind != RUN or model.step is not None
    return {
        "model": _of_model(model),
        "network": _of_network(model),
        "vocabulary": {"vocab_size": model.network.vocab_size, "mask_id": model.network.process.mask_id, **tokenizer},
        "training": None if found.form else _of_training(model),
        "verified": problem is None if has_arrays or problem else None,
        "problem": problem,
    }


def _opened(found: Found) -> _Model:
    """Builds the network of a model, without parameters."""
    kind = PUBLISHED if found.form else RUN if "corpus" in found.about else EXPORT
    config = resolved(_config(found))
    vocab_size = config.data.vocab_size if found.form else found.about["vocab_size"]
    steps = steps_saved(found.directory / "checkpoints") if kind == RUN else []
    step = found.step if found.step is not None else max(steps, default=None)
    return _Model(found, kind, step, config, *configs.build(config, vocab_size, _encoder(found, config))[1:])


def _config(found: Found) -> ConfigDict:
    """Returns the config of a model. UserError if it cannot be read."""
    return saved_config(found.about) if found.form is None else config_of(found.form, found.about, _folder(found))


def _folder(found: Found) -> epath.Path:
    """Returns the folder of a model; of a checkpoint that is a file, the one that it is in."""
    return found.directory.parent if found.directory.is_file() else found.directory


def _encoder(found: Found, config: ConfigDict) -> Bert | None:
    """Returns an encoder in the place of the frozen one, which is not read: trained parameters depend on its width."""
    if kind_of(config) != ENCODER:
        return None
    file = found.directory / FILE
    width = len(load_npz(file, Normalisation).mean) if file.is_file() else max(1, config.codec.width)
    return Bert(vocab_size=1, width=width, layers=1, heads=1, mlp_width=1)


def _tokenizer(found: Found) -> tuple[dict[str, Any], str | None]:
    """Returns the facts of the tokenizer of a model, and why it cannot be read, None if it can or if there is none."""
    folder, about, form = _folder(found), found.about, found.form
    try:
        return _of_tokenizer(saved_tokenizer(folder) if form is None else form.tokenizer(about, folder)), None
    except UserError as error:
        return {"tokenizer": "unreadable", "end_of_text": None}, str(error)


def _of_tokenizer(tokenizer: Tokenizer | None) -> dict[str, Any]:
    return {"tokenizer": tokenizer and tokenizer.kind, "end_of_text": tokenizer and tokenizer.end_of_text}


def _of_model(model: _Model) -> dict[str, Any]:
    (directory, _, _, form), config, network = model.found, model.config, model.network
    of_encoder = kind_of(config) == ENCODER
    return {
        "kind": model.kind,
        "path": os.fspath(directory),
        "format": form and form.name,
        "title": form and form.title,
        "process": config.process.name,
        "schedule": config.schedule.name,
        "prediction": network.prediction,
        "conditioning": network.conditioning if network.cond_dim else CONSTANT,
        "codec": config.codec.name if config.process.name == GAUSSIAN else None,
        "encoder": config.codec.encoder if of_encoder else None,
        "encoder_digest": config.codec.digest if of_encoder else None,
        "block_length": config.data.block_length,
        "layout": model.found.layout.name,
    }


def _of_network(model: _Model) -> dict[str, Any]:
    sizes = {name: model.config.network[name] for name in ("architecture", "block_size", "width", "layers", "heads")}
    return {**sizes, "parameters": model.network.num_parameters(), "weight_bytes": _size(_weights(model))}


def _weights(model: _Model) -> epath.Path:
    """Returns the file or folder of the parameters that `sedd.load` reads."""
    directory = model.found.directory
    if model.kind == RUN:
        return model.checkpoint / ("ema" if model.config.training.ema_decay else "params")
    if model.kind == EXPORT:
        return directory / WEIGHTS
    places = (directory, directory / huggingface.WEIGHTS, directory / huggingface.TORCH_WEIGHTS)
    return next((place for place in places if place.is_file()), places[1])


def _size(path: epath.Path) -> int | None:
    """Returns the number of bytes of a file or folder, None if there is none."""
    if path.is_dir():
        return sum(_size(part) or 0 for part in path.iterdir())
    return path.stat().length if path.is_file() else None


def _of_training(model: _Model) -> dict[str, Any]:
    """How a run or an exported model was made; of a run also how far it is."""
    directory, about, training = model.found.directory, model.found.about, model.config.training
    rows, length, is_run = training.batch_size, model.config.data.block_length, model.kind == RUN
    bounds = bounds_of(directory) if is_run else {}
    return {
        "step": model.step,
        "saved_steps": steps_saved(directory / "checkpoints") if is_run else None,
        "steps": training.steps,
        "batch_size": rows,
        "tokens_seen": None if model.step is None else model.step * rows * length,
        "best_bound": _bound(bounds, min(bounds, key=lambda step: bounds[step], default=None)),
        "latest_bound": _bound(bounds, max(bounds, default=None)),
        "ema_decay": training.ema_decay or None,
        "loss": training.loss,
        "optimizer": model.config.optimizer.name,
        "seed": training.seed,
        "init_from": about.get("init_from"),
        "corpus": model.config.data.corpus,
        "corpus_hash": about.get("corpus"),
        "sedd": about.get("sedd"),
    }


def _bound(bounds: dict[int, float], step: int | None) -> dict[str, Any] | None:
    return None if step is None else {"nats_per_token": bounds[step], "step": step}


def _problem_of_arrays(model: _Model) -> str | None:
    """Returns why the arrays of a model cannot be used, None if all verify or none is saved."""
    try:
        if model.found.form is not None:
            _, params, _ = read(model.found.form, model.found.about, model.found.directory)
            return _not_finite(named(params))
        if kind_of(model.config) == ENCODER:
            arrays = load_npz(model.found.directory / FILE, Normalisation)._asdict()
            if problem := _not_finite({f"{name} of {FILE}": array for name, array in arrays.items()}):
                return problem
        return _problem_of_run(model) if model.kind == RUN else _problem_of_export(model)
    except UserError as error:
        return str(error)


def _problem_of_export(model: _Model) -> str | None:
    file = _weights(model)
    if not file.is_file():
        return f"{file} is missing; export the model again"
    return _not_finite(named(exported_params(file, jax.eval_shape(model.network.init, root_key(0)))))


def _not_finite(arrays: dict[str, np.ndarray]) -> str | None:
    """Returns a line that names the first array, of those by name, with an infinity or a NaN."""
    return next((f"{name} has numbers that are not finite" for name, one in arrays.items() if not _finite(one)), None)


def _finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(np.asarray(array)).all())


def _problem_of_run(model: _Model) -> str | None:
    """Compares the arrays of a checkpoint with their digests, one part of the state after the other, on the CPU."""
    if model.step is None:
        return None
    mesh, like = parallel.data_mesh(jax.devices("cpu")[:1]), _state(model)
    for name, tree in items_of(parallel.abstract_arrays(like, parallel.shardings(mesh, like))).items():
        problem = try_read(model.checkpoint, model.step, {name: tree})[1]
        if problem is not None and not model.checkpoint.is_dir():  # the job that trains the run keeps the newest only
            problem = "was removed while it was read; repeat the command"
        if problem is not None:
            return f"the checkpoint of step {model.step} {problem}"
    return None


def _state(model: _Model) -> TrainState:
    """Returns the shapes and types of the training state of a run."""
    config = model.config
    objective = make_objective(config, model.network, model.schedule)
    optimizer = make_optimizer(config.optimizer, config.training.steps, config.training.loss)
    return jax.eval_shape(lambda: init_state(config, objective, optimizer))


def _describe_corpus(directory: epath.Path) -> dict[str, Any]:
    """UserError if the corpus is in a bucket, where sedd does not read one, or if a file is incomplete."""
    if storage.is_bucket(directory):
        raise UserError(f"{directory} is a corpus in a bucket; copy it to a disk, from which sedd reads it")
    corpus = open_corpus(Path(directory))
    verified = hash_of_splits(corpus.path, corpus.splits, corpus.tokenizer, corpus.layout) == corpus.hash
    about = {name: corpus.meta[name] for name in ("source", "split", "seed", "hash")}
    counts = ("documents", "tokens", "bytes", "characters")
    return {
        "corpus": {"kind": CORPUS, "path": os.fspath(corpus.path), "layout": corpus.layout.name, **about},
        "splits": {split: {name: corpus.meta["splits"][split][name] for name in counts} for split in corpus.splits},
        "vocabulary": {"vocab_size": corpus.vocab_size, **_of_tokenizer(corpus.tokenizer)},
        "verified": verified,
        "problem": None if verified else "its files are not those that were prepared: they have another hash",
    }


def to_text(facts: dict[str, Any]) -> str:
    """Returns the facts of `describe` for people: a line each, in groups, without those that are not recorded."""
    lines: list[tuple[str, str]] = []
    for group, members in facts.items():
        if isinstance(members, dict):
            shown = {name: _MISSING.get(name) if value is None else _text(value) for name, value in members.items()}
            lines += [(group, ""), *((f"  {name.replace('_', ' ')}", text) for name, text in shown.items() if text)]
    verified = {True: "yes", False: f"no: {facts['problem']}", None: "no checkpoint is saved yet"}
    lines.append(("verified", verified[facts["verified"]]))
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:{width}}{text}".rstrip() for name, text in lines)


def _text(value: Any) -> str:
    if isinstance(value, dict) and "step" in value:
        return f"{value['nats_per_token']:.4f} nats per token at step {value['step']:,}"
    if isinstance(value, dict):  # counts, or the sources of splits
        return ", ".join(f"{_text(one)} {name}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
