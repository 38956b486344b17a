"""The fit loop: from a config and a folder to a trained run, whatever happens in between."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sedd import config as configs
from sedd import parallel
from sedd.data.batches import batches, check_block_length
from sedd.data.corpus import Corpus, open_corpus
from sedd.data.layout import Layout
from sedd.diffusion.keyed_random import root_key
from sedd.diffusion.schedule import Schedule
from sedd.errors import UserError
from sedd.network.network import Network
from sedd.runtime import disk, processes, storage
from sedd.runtime.settings import jax_defaults
from sedd.training.checkpoint import Checkpoints, steps_saved
from sedd.training.chips import peak_flops
from sedd.training.estimate import step_flops
from sedd.training.guard import NONFINITE, NonFiniteGuard
from sedd.training.metrics import BOUND, Metrics, Summary, has_bound
from sedd.training.objective import Objective
from sedd.training.optimizer import make_optimizer
from sedd.training.profile import Profile
from sedd.training.step import TrainState, make_step
from sedd.training.tensorboard import TensorBoardWriter, check_installed
from sedd.training.validation import Validator, check_split, layout_of
from sedd.training.workdir import prepare_workdir


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop (Ctrl-C or SIGTERM); all is saved, and the same command continues."""

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step}; all is saved, and the same command continues")
        self.step = step


@jax_defaults()
def fit(config: ConfigDict, workdir: str | Path, weights: dict | None = None, init_from: str | None = None) -> Summary:
    """Trains to `config.training.steps`, from the newest checkpoint where the folder holds this run.

    workdir: a folder that all processes see, or gs://BUCKET/FOLDER. weights: parameters to start from instead of fresh
    ones, at step 0 with a new optimiser; a run that goes on has its own. init_from: where they came from, for the
    record. Leaves config.json, the tokenizer, metrics.jsonl, samples.jsonl and checkpoints in `workdir`. Raises
    UserError before anything is compiled if the config, the corpus, the weights or the folder do not fit, and
    Interrupted when it was stopped. With several processes, all of them call it.
    """
    processes.initialize()
    workdir = storage.folder_of(workdir)
    config = configs.validate(config)
    data = config.data
    corpus = open_corpus(data.corpus)
    check_block_length(corpus, "train", data.block_length)
    _, schedule, network = configs.build(config, _vocab_size(config, corpus))
    mesh = parallel.make_mesh(config)
    if weights is not None and not steps_saved(workdir / "checkpoints"):
        weights = _fitting(weights, network, init_from or "the weights to start from")
    if config.evaluation.every:
        check_split(corpus, data.block_length)
    if config.metrics.tensorboard:
        check_installed()
    layout = layout_of(corpus, data.block_length)
    with contextlib.ExitStack() as held:
        _acquire_workdir(held, workdir, config, corpus, layout, init_from)
        run = _Run(workdir, config, corpus, layout, schedule, network, mesh)
        return run(weights)


def _acquire_workdir(held: contextlib.ExitStack, workdir: epath.Path, config: ConfigDict, corpus: Corpus, *about):
    """The folder is this run's, and every process sees it, has the same corpus and was told the same."""
    if processes.are_many() or storage.is_bucket(workdir):
        storage.check_shared(workdir)
    if processes.are_many():
        processes.check_same("corpus (by its hash)", corpus.hash)
        processes.check_same("config", configs.fingerprint(config))
    with processes.together():
        if processes.is_first():
            held.enter_context(storage.locked(workdir))
            prepare_workdir(workdir, config, corpus, *about)


@dataclasses.dataclass
class _Run:
    """A run whose folder is its own: all that the loop takes."""

    workdir: epath.Path
    config: ConfigDict
    corpus: Corpus
    layout: Layout
    schedule: Schedule
    network: Network
    mesh: Mesh

    def __call__(self, weights: dict | None) -> Summary:
        """From the newest checkpoint, or the weights, or fresh parameters, to the last step."""
        config, training = self.config, self.config.training
        objective = Objective(
            self.network, self.schedule, training.batch_size, training.noise_sampling, training.min_time
        )
        optimizer = make_optimizer(config.optimizer, training.steps)
        init, step, where = make_step(config, objective, optimizer, self.mesh)
        with (
            Checkpoints(self.workdir / "checkpoints", config.checkpoint) as checkpoints,
            _stop_signals() as stopping,
            disk.user_errors(self.workdir, "; the last checkpoint stays"),
            storage.Mirror(self.workdir, ("metrics.jsonl", "samples.jsonl", NONFINITE)) as mirror,
        ):
            state = checkpoints.restore(parallel.abstract_arrays(jax.eval_shape(init), where))
            if state is None:
                state = init() if weights is None else init(parallel.put(weights, where.params))
            return self._loop(state, step, checkpoints, mirror, stopping)

    def _loop(self, state, step, checkpoints, mirror, stopping) -> Summary:
        training, data = self.config.training, self.config.data
        start, rows = int(state.step), parallel.local_rows(self.mesh, training.batch_size)
        source = batches(self.corpus, data.block_length, training.batch_size, training.seed, start, rows)
        profile = Profile(mirror.local / "profile", start, self.config.metrics.profile)
        stop = asked = False
        with contextlib.closing(source), profile, self._metrics(mirror.local, start) as log:
            if (
                start
                and self._is_evaluated(start)
                and not processes.broadcast_from_first(has_bound(mirror.local, start))
            ):
                bound, stop = self._evaluation(state, log, stopping)  # a signal ended it before
                mirror.sync()
                checkpoints.add_bound(start, bound)
            for number in range(start + 1, 1 + (start if stop else training.steps)):
                with profile.step(number):
                    batch = parallel.shard_batch(self.mesh, next(source), rows, training.batch_size)
                    state, metrics = step(state, batch)
                # True where a process received a signal; all processes read it one step later.
                stop, asked = bool(asked), processes.any_of(stopping.is_set())
                log.record(number, metrics)
                bound = None
                if self._is_evaluated(number) and not stop:
                    bound, stop = self._evaluation(state, log, stopping)
                if number % self.config.checkpoint.every == 0 or stop or number == training.steps or bound is not None:
                    log.flush()
                    mirror.sync()  # first: records that a checkpoint is ahead of would be lost with this process
                    checkpoints.save(state, bound)
                if stop:
                    break
        number = int(state.step)
        if stop and (number < training.steps or self._is_evaluated(number)):
            checkpoints.finish()
            raise Interrupted(number)
        return log.summary()

    def _metrics(self, folder: Path, start: int) -> Metrics:
        """What process 0 writes and shows; the others look at the numbers only."""
        config, training = self.config, self.config.training
        if not processes.is_first():
            return Metrics(None, start, training.steps, NonFiniteGuard(training.max_skipped_steps, None))
        board = TensorBoardWriter(folder / "tensorboard", start) if config.metrics.tensorboard else None
        guard, least = NonFiniteGuard(training.max_skipped_steps, folder), None
        rate, paired = peak_flops(jax.devices()[0].device_kind), training.noise_sampling == "mask_count"
        if rate is not None:
            flops = step_flops(self.network, training.batch_size, config.data.block_length, paired, recomputed=False)
            least = flops / (rate * jax.device_count())
        return Metrics(folder, start, training.steps, guard, board, least)

    def _is_evaluated(self, number: int) -> bool:
        """True for the steps after which the model is evaluated."""
        every = self.config.evaluation.every
        return bool(every) and (number % every == 0 or number == self.config.training.steps)

    def _evaluation(self, state: TrainState, log: Metrics, stopping: threading.Event) -> tuple[float | None, bool]:
        """Records the bound and samples of a step. Returns the bound, where a checkpoint is chosen by it, and False.

        A signal to any process ends it between two batches, or two steps of sampling: nothing is recorded, and the
        result is (None, True). A resumed run evaluates that step first.
        """
        validation = Validator(self.config, self.corpus, self.layout, self.schedule, self.network, self.mesh)

        def check():
            if bool(processes.any_of(stopping.is_set())):
                raise _Stopped

        try:
            bound, drawn = validation.bound(state.eval_params, check), validation.samples(state.eval_params, check)
        except _Stopped:
            return None, True
        log.bound(int(state.step), bound)
        log.samples(int(state.step), *drawn)
        return bound[BOUND] if self.config.checkpoint.keep_best else None, False


class _Stopped(Exception):
    """A signal came during an evaluation."""


def _fitting(weights: dict, network: Network, what: str) -> dict:
    """The weights, laid out as the network's parameters are. UserError, naming the first leaf that does not fit."""
    like = jax.eval_shape(network.init, root_key(0))
    given, expected = parallel.named(weights), parallel.named(like)

    def shown(leaf):
        return "missing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"

    for name in (*expected, *given):
        found, wanted = shown(given.get(name)), shown(expected.get(name))
        if found != wanted:
            raise UserError(f"{what} cannot start this run: {name} is {found} there, {wanted} in the config's network")
    return jax.tree.unflatten(jax.tree.structure(like), [given[name] for name in expected])


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
