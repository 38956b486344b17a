"""The fit loop: from a config and a folder to a trained run, whatever happens in between."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from sedd import config as configs
from sedd import parallel
from sedd.data.batches import Batch, batches, check_block_length
from sedd.data.corpus import Corpus, open_corpus
from sedd.errors import UserError
from sedd.network.network import Network
from sedd.training.board import Board, check_installed
from sedd.training.checkpoint import Checkpoints, any_saved
from sedd.training.claim import claim
from sedd.training.held_out import HeldOut, check_split, layout_of
from sedd.training.metrics import Metrics, Summary
from sedd.training.objective import Objective
from sedd.training.optimizer import make_optimizer
from sedd.training.step import make_step


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop (Ctrl-C or SIGTERM); all is saved, and the same command continues."""

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step}; all is saved, and the same command continues")
        self.step = step


def fit(config: ConfigDict, workdir: str | Path, weights: dict | None = None, init_from: str | None = None) -> Summary:
    """Trains to `config.training.steps`, from the newest checkpoint where the folder holds this run.

    weights: parameters to start from instead of fresh ones, at step 0 with a new optimiser; a run that goes on has
    its own. init_from: where they came from, for the record. Leaves config.json, the tokenizer, metrics.jsonl,
    samples.jsonl and checkpoints in `workdir`. Raises UserError before anything is compiled if the config, the corpus,
    the weights or the folder do not fit, and Interrupted when it was stopped.
    """
    workdir = Path(workdir)
    config = configs.validate(config)
    training, data, every = config.training, config.data, config.evaluation.every
    corpus = open_corpus(data.corpus)
    check_block_length(corpus, "train", data.block_length)
    _, schedule, network = configs.build(config, _vocab_size(config, corpus))
    mesh = parallel.make_mesh(config)
    if weights is not None and not any_saved(workdir / "checkpoints"):
        weights = _fitting(weights, network, init_from or "the weights to start from")
    if every:
        check_split(corpus, data.block_length)
    if config.metrics.tensorboard:
        check_installed()
    layout = layout_of(corpus, data.block_length)
    claim(workdir, config, corpus, layout, init_from)

    objective = Objective(network, schedule, training.batch_size, training.levels, training.min_time)
    init, step, where = make_step(config, objective, make_optimizer(config.optimizer, training.steps), mesh)
    held_out = HeldOut(config, corpus, layout, schedule, network, mesh)
    rows = parallel.batch_sharding(mesh)
    with Checkpoints(workdir / "checkpoints", config.checkpoint.keep) as checkpoints, _stop_signals() as stopping:
        state = checkpoints.restore(parallel.placed(jax.eval_shape(init), where))
        if state is None:
            state = init() if weights is None else init(jax.device_put(weights, where.params))
        start = int(state.step)
        source = batches(corpus, data.block_length, training.batch_size, training.seed, start)
        board = Board(workdir / "tensorboard", start) if config.metrics.tensorboard else None
        log = Metrics(workdir, start, training.steps, board)
        with contextlib.closing(source), log:
            for number in range(start + 1, training.steps + 1):
                batch, last = next(source), number == training.steps
                state, metrics = step(state, jax.device_put(batch, rows))
                log.record(number, metrics, _num_tokens(batch))
                if every and (number % every == 0 or last):
                    log.bound(number, held_out.bound(state.best))
                    log.samples(number, *held_out.samples(state.best))
                if number % config.checkpoint.every == 0 or stopping.is_set() or last:
                    log.settle()  # nothing is saved whose loss is not finite
                    checkpoints.save(state)
                if stopping.is_set():
                    break
    if int(state.step) < training.steps:
        raise Interrupted(int(state.step))
    return log.summary()


def _fitting(weights: dict, network: Network, what: str) -> dict:
    """The weights, laid out as the network's parameters are. UserError, naming the first leaf that does not fit."""
    like = jax.eval_shape(network.init, jax.random.key(0))
    given, expected = parallel.named(weights), parallel.named(like)

    def shown(leaf):
        return "missing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"

    for name in (*expected, *given):
        found, wanted = shown(given.get(name)), shown(expected.get(name))
        if found != wanted:
            raise UserError(f"{what} cannot start this run: {name} is {found} there, {wanted} in the config's network")
    return jax.tree.unflatten(jax.tree.structure(like), [given[name] for name in expected])


def _num_tokens(batch: Batch) -> int:
    """The tokens of a batch that count."""
    return batch.tokens.size if batch.lengths is None else int(batch.lengths.sum())


def _vocab_size(config: ConfigDict, corpus: Corpus) -> int:
    told = config.data.vocab_size
    if told is not None and told != corpus.vocab_size:
        raise UserError(f"config: data.vocab_size is {told}, but {corpus.path} has {corpus.vocab_size} tokens")
    return corpus.vocab_size


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set instead of ending the process; a second signal does end it."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where Python takes no signals
        yield stopping
        return

    def stop(number, _):
        stopping.set()
        signal.signal(number, before[number])

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
