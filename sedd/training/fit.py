"""The training loop, from a config and a folder to a trained run; it resumes after any interruption."""

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
from sedd.data.batches import batches, check_block_length
from sedd.data.corpus import Corpus, open_corpus
from sedd.data.layout import Layout
from sedd.diffusion.keyed_random import root_key
from sedd.diffusion.schedule import Schedule
from sedd.errors import UserError
from sedd.network.attention import check_platform
from sedd.network.network import Network
from sedd.runtime import disk, folders, parallel, processes, storage, trees
from sedd.runtime.accelerators import peak_flops
from sedd.runtime.settings import jax_defaults
from sedd.training.checkpoint import Checkpoints, steps_saved
from sedd.training.estimate import step_flops
from sedd.training.guard import NONFINITE, NonFiniteGuard
from sedd.training.metrics import BOUND, Metrics, Summary, has_bound
from sedd.training.optimizer import make_optimizer
from sedd.training.profile import Profiler
from sedd.training.score_entropy import score_entropy
from sedd.training.step import TrainState, make_step
from sedd.training.tensorboard import TensorBoardWriter, check_installed
from sedd.training.validation import Validator, check_split, layout_of
from sedd.training.workdir import prepare_workdir


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C or SIGTERM; all is saved, and the same command continues."""

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step}; all is saved, and the same command continues")
        self.step = step


@jax_defaults()
def fit(config: ConfigDict, workdir: str | Path, weights: dict | None = None, init_from: str | None = None) -> Summary:
    """Trains to `config.training.steps`; resumes from the newest checkpoint if the folder holds this run.

    workdir: a folder that all processes share, or gs://BUCKET/FOLDER. weights: initial parameters, with a new optimiser
    at step 0; ignored by a run that resumes. init_from: their origin, which is recorded. Writes config.json, the
    tokenizer, metrics.jsonl, samples.jsonl and checkpoints to `workdir`. UserError before anything is compiled if the
    config, the corpus, the weights or the folder do not fit; Interrupted if training was stopped. All processes must
    call it.
    """
    processes.initialize()
    folder = storage.folder_of(workdir)
    config = configs.validate(config)
    data = config.data
    corpus = open_corpus(data.corpus)
    check_block_length(corpus, "train", data.block_length)
    _, schedule, network = configs.build(config, _vocab_size(config, corpus))
    check_platform(config.network.attention, jax.devices()[0].platform)
    mesh = parallel.make_mesh(config)
    if weights is not None and not steps_saved(folder / "checkpoints"):
        like = jax.eval_shape(network.init, root_key(0))
        weights = trees.fitted(weights, like, f"{init_from or 'the weights to start from'} cannot start this run")
    if config.evaluation.every:
        check_split(corpus, data.block_length)
    if config.metrics.tensorboard:
        check_installed()
    layout = layout_of(corpus, data.block_length)
    with contextlib.ExitStack() as stack:
        _acquire_workdir(stack, folder, config, corpus, layout, init_from)
        run = _Run(folder, config, corpus, layout, schedule, network, mesh)
        return run(weights)


def _acquire_workdir(stack: contextlib.ExitStack, workdir: epath.Path, config: ConfigDict, corpus: Corpus, *about):
    """Locks and prepares the run directory; stack: holds the lock; about: of `prepare_workdir`.

    UserError if the processes do not share the folder, or differ in corpus or config.
    """
    if processes.are_many() or storage.is_bucket(workdir):
        storage.check_shared(workdir)
    if processes.are_many():
        processes.check_same("corpus (by its hash)", corpus.hash)
        processes.check_same("config", configs.fingerprint(config))
    with processes.together():
        if processes.is_first():
            stack.enter_context(folders.locked(workdir))
            prepare_workdir(workdir, config, corpus, *about)


@dataclasses.dataclass
class _Run:
    """The training loop of a run that holds the lock of its folder."""

    workdir: epath.Path
    config: ConfigDict
    corpus: Corpus
    layout: Layout
    schedule: Schedule
    network: Network
    mesh: Mesh

    def __call__(self, weights: dict | None) -> Summary:
        """Trains from the newest checkpoint, the weights or initial parameters, to the last step."""
        config, training = self.config, self.config.training
        objective = score_entropy(config, self.network, self.schedule)
        optimizer = make_optimizer(config.optimizer, training.steps)
        init, step, shardings = make_step(config, objective, optimizer, self.mesh)
        with (
            Checkpoints(self.workdir / "checkpoints", config.checkpoint) as checkpoints,
            _stop_signals() as stopping,
            disk.user_errors(self.workdir, "; the last checkpoint is kept"),
            storage.Mirror(self.workdir, ("metrics.jsonl", "samples.jsonl", NONFINITE)) as mirror,
        ):
            state = checkpoints.restore(parallel.abstract_arrays(jax.eval_shape(init), shardings))
            if state is None:
                state = init() if weights is None else init(parallel.put(weights, shardings.params))
            return self._loop(state, step, checkpoints, mirror, stopping)

    def _loop(self, state, step, checkpoints, mirror, stopping) -> Summary:
        training, data = self.config.training, self.config.data
        start, rows = int(state.step), parallel.local_rows(self.mesh, training.batch_size)
        source = batches(self.corpus, data.block_length, training.batch_size, training.seed, start, rows)
        profiler = Profiler(mirror.local / "profile", start, self.config.metrics.profile)
        stop = False
        requested: jax.Array | bool = False  # any process received a signal
        with contextlib.closing(source), profiler, self._metrics(mirror.local, start) as log:
            if (
                start
                and self._is_evaluated(start)
                and not processes.broadcast_from_first(has_bound(mirror.local, start))
            ):
                bound, stop = self._evaluate(state, log, stopping)  # a signal interrupted it before
                mirror.sync()
                checkpoints.add_bound(start, bound)
            for number in range(start + 1, 1 + (start if stop else training.steps)):
                with profiler.step(number):
                    batch = parallel.shard_batch(self.mesh, next(source), rows, training.batch_size)
                    state, metrics = step(state, batch)
                # All processes read it one step later, so that the host does not wait for this step.
                stop, requested = bool(requested), processes.any_of(stopping.is_set())
                log.record(number, metrics)
                bound = None
                if self._is_evaluated(number) and not stop:
                    bound, stop = self._evaluate(state, log, stopping)
                if number % self.config.checkpoint.every == 0 or stop or number == training.steps or bound is not None:
                    log.flush()
                    mirror.sync()  # before the checkpoint: else a crash in between would lose its records
                    checkpoints.save(state, bound)
                if stop:
                    break
        number = int(state.step)
        if stop and (number < training.steps or self._is_evaluated(number)):
            checkpoints.finish()
            raise Interrupted(number)
        return log.summary()

    def _metrics(self, folder: Path, start: int) -> Metrics:
        """Returns the metrics of process 0, which writes and prints; those of the others only check for NaNs."""
        config, training = self.config, self.config.training
        if not processes.is_first():
            return Metrics(None, start, training.steps, NonFiniteGuard(training.max_skipped_steps, None))
        board = TensorBoardWriter(folder / "tensorboard", start) if config.metrics.tensorboard else None
        guard, ideal_step_seconds = NonFiniteGuard(training.max_skipped_steps, folder), None
        rate, objective = peak_flops(jax.devices()[0].device_kind), score_entropy(config, self.network, self.schedule)
        if rate is not None:
            flops = step_flops(objective, training.batch_size, config.data.block_length, recomputed=False)
            ideal_step_seconds = flops / (rate * jax.device_count())
        return Metrics(folder, start, training.steps, guard, board, ideal_step_seconds)

    def _is_evaluated(self, number: int) -> bool:
        """True if the model is evaluated after this step."""
        every = self.config.evaluation.every
        return bool(every) and (number % every == 0 or number == self.config.training.steps)

    def _evaluate(self, state: TrainState, log: Metrics, stopping: threading.Event) -> tuple[float | None, bool]:
        """Records the bound and samples of a step. Returns the bound (None without `checkpoint.keep_best`), False.

        A signal to any process ends it between two batches, or two steps of sampling: nothing is recorded, and the
        result is (None, True). A resumed run evaluates that step first.
        """
        validator = Validator(self.config, self.corpus, self.layout, self.schedule, self.network, self.mesh)

        def check():
            if bool(processes.any_of(stopping.is_set())):
                raise _Stopped

        try:
            bound, samples = validator.bound(state.eval_params, check), validator.samples(state.eval_params, check)
        except _Stopped:
            return None, True
        log.bound(int(state.step), bound)
        log.samples(int(state.step), *samples)
        return bound[BOUND] if self.config.checkpoint.keep_best else None, False


class _Stopped(Exception):
    """A signal was received during an evaluation."""


def _vocab_size(config: ConfigDict, corpus: Corpus) -> int:
    configured = config.data.vocab_size
    if configured is not None and configured != corpus.vocab_size:
        raise UserError(f"config: data.vocab_size is {configured}, but {corpus.path} has {corpus.vocab_size} tokens")
    return corpus.vocab_size


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set instead of ending the process; a second signal ends it."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
        yield stopping
        return

    def stop(number, _):
        stopping.set()
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
