"""A run with everything that can be wrong resolved: in one place, before the first array is made."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from sedd import config as configs
from sedd.codecs.encoder import Encoder
from sedd.codecs.frozen import FILE, save_normalisation
from sedd.data.batches import check_block_length, row_lengths
from sedd.data.corpus import Corpus, open_corpus
from sedd.data.layout import Layout
from sedd.data.tokenizers import Tokenizer
from sedd.diffusion.keyed_random import root_key
from sedd.diffusion.schedule import Schedule
from sedd.errors import UserError
from sedd.network.attention import check_platform
from sedd.network.latent_network import LatentNetwork
from sedd.network.trunk import scanned, unrolled
from sedd.recipes import ENCODER, kind_of
from sedd.runtime import disk, folders, parallel, processes, storage, trees
from sedd.trained import Trained
from sedd.training import encoder
from sedd.training.checkpoint import steps_saved
from sedd.training.objective import Objective
from sedd.training.objectives import make_objective
from sedd.training.tensorboard import check_installed
from sedd.training.vocabulary import translated
from sedd.training.workdir import prepare_workdir


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run consists of, but for its state.

    weights: the initial parameters, None for random ones; init_from: their origin; frozen: the parameters that nothing
    trains.
    """

    workdir: epath.Path
    config: ConfigDict
    corpus: Corpus
    layout: Layout
    schedule: Schedule
    objective: Objective
    mesh: Mesh
    weights: dict | None
    init_from: str | None
    frozen: dict

    def placed(self) -> "Run":
        """Returns the run with its frozen parameters on all devices."""
        whole = NamedSharding(self.mesh, PartitionSpec())
        return dataclasses.replace(self, frozen=parallel.put(self.frozen, jax.tree.map(lambda _: whole, self.frozen)))

    def trained(self, params: dict) -> Trained:
        """Returns the model with these parameters, to be evaluated."""
        return Trained(
            network=self.objective.network,
            params=params,
            frozen=self.frozen,
            schedule=self.schedule,
            tokenizer=self.corpus.tokenizer,
            layout=self.layout,
            block_length=self.config.data.block_length,
        )

    def is_evaluated(self, step: int) -> bool:
        """True if the model is evaluated after this step."""
        every = self.config.evaluation.every
        return bool(every) and (step % every == 0 or step == self.config.training.steps)


def resolve(
    config: ConfigDict,
    workdir: str | Path,
    weights: dict | None = None,
    init_from: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> Run:
    """Resolves the arguments of `fit`. UserError if config, corpus, mesh or weights do not fit each other."""
    folder, config = storage.folder_of(workdir), configs.validate(config)
    corpus, layout = _corpus_and_layout(config)
    pretrained = encoder.read_for(config, corpus) if kind_of(config) == ENCODER else None
    _, schedule, network = configs.build(config, corpus.vocab_size, None if pretrained is None else pretrained.module)
    check_platform(config.network.attention, jax.devices()[0].platform)
    mesh, objective = parallel.make_mesh(config), make_objective(config, network, schedule)
    begun = bool(steps_saved(folder / "checkpoints"))
    if weights is None and not begun and config.codec.table.endswith(".npy"):
        weights, init_from = _with_table(config, objective, corpus.vocab_size), config.codec.table
    if weights is None and not begun and config.training.loss == "denoising":
        raise UserError(
            "config: training.loss=denoising keeps the decoder of an earlier run; give that as --init_from=RUN, or "
            "choose regression, which trains both"
        )
    if weights is not None and not begun:
        weights = _fitted(weights, objective, corpus.tokenizer, tokenizer, init_from or "the weights to start from")
    if config.metrics.tensorboard:
        check_installed()
    frozen = {}
    if pretrained is not None:
        codec = cast(Encoder, cast(LatentNetwork, network).codec)
        frozen = encoder.frozen_params(config, corpus, codec, pretrained, folder)
    return Run(folder, config, corpus, layout, schedule, objective, mesh, weights, init_from, frozen)


def _fitted(weights: dict, objective: Objective, ours: Tokenizer, theirs: Tokenizer | None, origin: str) -> dict:
    """Returns weights for the layers and the tokens of a run. theirs: their tokenizer, if it is known.

    UserError if they do not fit the network.
    """
    like = jax.eval_shape(objective.init, root_key(0))
    weights = scanned(weights) if "blocks" in like["trunk"] else unrolled(weights)
    if theirs is not None and theirs.fingerprint != ours.fingerprint and objective.network.token_axes:
        initial = jax.device_get(jax.jit(objective.init)(root_key(0)))
        weights = translated(weights, initial, objective.network, theirs, ours, origin)
    return trees.fitted(weights, like, f"{origin} cannot start this run")


def _with_table(config: ConfigDict, objective: Objective, vocab_size: int) -> dict:
    """Returns initial parameters with the table of `codec.table`. UserError unless it has a row for each token."""
    file, due = config.codec.table, (vocab_size, config.codec.width)
    try:
        table = np.load(disk.absolute(file))
    except (OSError, ValueError) as error:
        raise UserError(f"config: codec.table={file} is no array that can be read ({error})") from None
    if table.shape != due:
        raise UserError(f"config: codec.table={file} has the shape {table.shape}; rows for all tokens have {due}")
    if config.codec.normalised and not np.all(np.any(table, axis=-1)):
        row = np.flatnonzero(~np.any(table, axis=-1))[0]
        raise UserError(f"config: row {row} of codec.table={file} is 0, which cannot be normalised; give it another")
    params = jax.device_get(jax.jit(objective.init)(root_key(config.training.seed)))
    rows = np.array(params["codec"]["table"])
    rows[:vocab_size] = table
    params["codec"]["table"] = rows
    return params


def _corpus_and_layout(config: ConfigDict) -> tuple[Corpus, Layout]:
    """Opens the corpus. Returns it, and its layout as it is saved: with its row lengths if padding is masked."""
    data, corpus = config.data, open_corpus(config.data.corpus)
    if data.vocab_size not in (None, corpus.vocab_size):
        raise UserError(
            f"config: data.vocab_size is {data.vocab_size}, but {corpus.path} has {corpus.vocab_size} tokens"
        )
    check_block_length(corpus, "train", data.block_length)
    if config.evaluation.every:
        if "validation" not in corpus.splits:
            raise UserError(
                f"config: evaluation.every needs a validation split, and {corpus.path} has none; "
                "set evaluation.every=0, or prepare a corpus with one"
            )
        check_block_length(corpus, "validation", data.block_length)
    if not corpus.layout.masks_padding:
        return corpus, corpus.layout
    return corpus, dataclasses.replace(corpus.layout, row_lengths=row_lengths(corpus, data.block_length))


@contextlib.contextmanager
def acquired(run: Run) -> Iterator[None]:
    """A block in which the run holds the lock of its folder, whose config.json is written.

    All processes have to call it. UserError if they do not share the folder, if they differ in corpus or config, or if
    the folder is that of another run.
    """
    if processes.are_many() or storage.is_bucket(run.workdir):
        storage.check_shared(run.workdir)
    if processes.are_many():
        processes.check_same("corpus (by its hash)", run.corpus.hash)
        processes.check_same("config", configs.fingerprint(run.config))
    with contextlib.ExitStack() as stack:
        with processes.together():
            if processes.is_first():
                stack.enter_context(folders.locked(run.workdir))
                prepare_workdir(run.workdir, run.config, run.corpus, run.layout, run.init_from)
                if run.frozen:
                    with storage.user_errors(run.workdir):
                        save_normalisation(run.workdir / FILE, run.frozen)
        yield
