"""The fit loop: from a config and a folder to a trained run, whatever happens in between."""

import contextlib
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from sedd import config as configs
from sedd import parallel
from sedd.data.batches import batches, check_block_length
from sedd.data.corpus import Corpus, open_corpus
from sedd.errors import UserError
from sedd.evaluation.perplexity import from_corpus, perplexity
from sedd.training.checkpoint import Checkpoints
from sedd.training.metrics import Metrics
from sedd.training.objective import Objective
from sedd.training.optimizer import make_optimizer
from sedd.training.step import TrainState, make_step

# What may change between the start of a run and its continuation without making it another run.
_FREE = {"training.steps", "training.accumulation", "data.corpus", "network.scan", "network.remat"}
_FREE_GROUPS = {"mesh", "checkpoint", "evaluation"}


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop (Ctrl-C or SIGTERM); all is saved, and the same command continues."""

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step}; all is saved, and the same command continues")
        self.step = step


def fit(config: ConfigDict, workdir: str | Path):
    """Trains to `config.training.steps`, from the newest checkpoint where the folder holds this run.

    Leaves config.json, the tokenizer, metrics.jsonl and checkpoints in `workdir`. Raises UserError before anything is
    compiled if the config, the corpus or the folder do not fit, and Interrupted when it was stopped.
    """
    workdir = Path(workdir)
    config = configs.validate(config)
    training, data = config.training, config.data
    corpus = open_corpus(data.corpus)
    check_block_length(corpus, "train", data.block_length)
    _, schedule, network = configs.build(config, _vocab_size(config, corpus))
    mesh = parallel.make_mesh(config)
    claim(workdir, config, corpus)

    objective = Objective(network, schedule, training.batch_size, training.levels, training.min_time)
    init, step, where = make_step(config, objective, make_optimizer(config.optimizer, training.steps), mesh)
    rows = parallel.batch_sharding(mesh)
    with Checkpoints(workdir / "checkpoints", config.checkpoint.keep) as checkpoints, _stop_signals() as stopping:
        state = checkpoints.restore(parallel.placed(jax.eval_shape(init), where))
        state = init() if state is None else state
        start = int(state.step)
        source = batches(corpus, data.block_length, training.batch_size, training.seed, start)
        tokens_per_step = training.batch_size * data.block_length
        log = Metrics(workdir / "metrics.jsonl", start, training.steps, tokens_per_step)
        with contextlib.closing(source), log:
            for number in range(start + 1, training.steps + 1):
                state, metrics = step(state, jax.device_put(next(source), rows))
                log.record(number, metrics)
                if config.evaluation.every and number % config.evaluation.every == 0:
                    log.note(number, _held_out(config, corpus, schedule, network, state))
                if number % config.checkpoint.every == 0 or stopping.is_set() or number == training.steps:
                    log.settle()  # nothing is saved whose loss is not finite
                    checkpoints.save(state)
                if stopping.is_set():
                    break
    if int(state.step) < training.steps:
        raise Interrupted(int(state.step))


def _held_out(config, corpus, schedule, network, state: TrainState) -> dict[str, float]:
    """The bound on the validation split, as a record of the metrics."""
    scored = from_corpus(corpus, "validation", config.data.block_length)
    report = perplexity(network, schedule, state.best, scored, num_draws=config.evaluation.draws, progress=False)
    return {"validation_nats_per_token": report.nats_per_token, "validation_bits_per_byte": report.bits_per_byte}


def _vocab_size(config: ConfigDict, corpus: Corpus) -> int:
    told = config.data.vocab_size
    if told is not None and told != corpus.vocab_size:
        raise UserError(f"config: data.vocab_size is {told}, but {corpus.path} has {corpus.vocab_size} tokens")
    return corpus.vocab_size


def claim(workdir: Path, config: ConfigDict, corpus: Corpus):
    """Makes the folder this run's, or makes sure that it is. UserError if it holds another run, or something else."""
    mine = {"config": config.to_dict(), "vocab_size": corpus.vocab_size, "corpus": corpus.hash}
    path = workdir / "config.json"
    if path.is_file():
        try:
            theirs = json.loads(path.read_text())
        except ValueError:
            raise UserError(f"{path} is damaged: it is no JSON; restore it, or choose another --workdir") from None
        changed = [
            f"{key} ({old!r} there, {new!r} here)"
            for key, old, new in _differences(theirs, mine)
            if key not in _FREE and key.split(".")[0] not in _FREE_GROUPS
        ]
        if changed:
            raise UserError(f"{workdir} holds another run: {', '.join(changed)}; choose another --workdir")
    elif workdir.exists() and any(workdir.iterdir()):
        raise UserError(f"{workdir} is not empty and holds no run; choose another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    corpus.tokenizer.save(workdir / "tokenizer")
    path.write_text(json.dumps(mine, indent=2) + "\n")


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The settings that differ, by their keys in the config; the corpus by its hash, wherever it lies."""
    for key in ("vocab_size", "corpus"):
        if old.get(key) != new[key]:
            yield key, old.get(key), new[key]
    for group, members in new["config"].items():
        for name, value in members.items():
            before = old["config"].get(group, {}).get(name)
            if before != value:
                yield f"{group}.{name}", before, value


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
