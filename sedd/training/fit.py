"""The training loop, from a config and a folder to a trained run; it resumes after any interruption."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from sedd.data.batches import batches
from sedd.data.tokenizers import Tokenizer
from sedd.runtime import disk, parallel, processes, storage
from sedd.runtime.accelerators import peak_flops
from sedd.runtime.settings import jax_defaults
from sedd.runtime.signals import stop_signals
from sedd.training.checkpoint import Checkpoints
from sedd.training.estimate import step_flops
from sedd.training.guard import NONFINITE, NonFiniteGuard
from sedd.training.metrics import BOUND, Metrics, Summary, has_bound
from sedd.training.optimizer import make_optimizer
from sedd.training.profile import Profiler
from sedd.training.run import Run, acquired, resolve
from sedd.training.step import TrainState, make_step
from sedd.training.tensorboard import TensorBoardWriter
from sedd.training.validation import validation_bound, validation_samples


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C or SIGTERM; all is saved, and the same command continues."""

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step}; all is saved, and the same command continues")
        self.step = step


@jax_defaults()
def fit(
    config: ConfigDict,
    workdir: str | Path,
    weights: dict | None = None,
    init_from: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> Summary:
    """Trains to `config.training.steps`; resumes from the newest checkpoint if the folder holds this run.

    workdir: a folder that all processes share, or gs://BUCKET/FOLDER. weights: initial parameters, with a new optimiser
    at step 0; ignored by a run that resumes. init_from: their origin, which is recorded; tokenizer: theirs, by which
    the rows of common tokens are found if the corpus has another. Writes config.json, the tokenizer, metrics.jsonl,
    samples.jsonl and checkpoints to `workdir`. UserError before anything is compiled if the config, the corpus, the
    weights or the folder do not fit; Interrupted if training was stopped. All processes must call it.
    """
    processes.initialize()
    run = resolve(config, workdir, weights, init_from, tokenizer)
    with (
        acquired(run),
        Checkpoints(run.workdir / "checkpoints", run.config.checkpoint) as checkpoints,
        stop_signals() as stopping,
        disk.user_errors(run.workdir, "; the last checkpoint is kept"),
        storage.Mirror(run.workdir, ("metrics.jsonl", "samples.jsonl", NONFINITE)) as mirror,
    ):
        run = run.placed()
        optimizer = make_optimizer(run.config.optimizer, run.config.training.steps, run.config.training.loss)
        init, step, shardings = make_step(run.config, run.objective, optimizer, run.mesh)
        state = checkpoints.restore(parallel.abstract_arrays(jax.eval_shape(init), shardings))
        if state is None:
            state = init() if run.weights is None else init(parallel.put(run.weights, shardings.params))
        with _metrics(run, mirror.local, int(state.step)) as log:
            state, stopped = _Loop(run, step, checkpoints, mirror, log, stopping)(state)
        number = int(state.step)
        if stopped and (number < run.config.training.steps or run.is_evaluated(number)):
            checkpoints.finish()
            raise Interrupted(number)
        return log.summary()


def _metrics(run: Run, folder: Path, start: int) -> Metrics:
    """Returns the metrics of process 0, which writes and prints; those of the others only check for NaNs."""
    config, training = run.config, run.config.training
    if not processes.is_first():
        return Metrics(None, start, training.steps, NonFiniteGuard(training.max_skipped_steps, None))
    board = TensorBoardWriter(folder / "tensorboard", start) if config.metrics.tensorboard else None
    guard, ideal_step_seconds = NonFiniteGuard(training.max_skipped_steps, folder), None
    rate = peak_flops(jax.devices()[0].device_kind)
    if rate is not None:
        flops = step_flops(run.objective, training.batch_size, config.data.block_length, recomputed=False)
        ideal_step_seconds = flops / (rate * jax.device_count())
    return Metrics(folder, start, training.steps, guard, board, ideal_step_seconds)


@dataclasses.dataclass(frozen=True)
class _Loop:
    """The steps of a run, with its records, evaluations and checkpoints."""

    run: Run
    step: Callable
    checkpoints: Checkpoints
    mirror: storage.Mirror
    log: Metrics
    stopping: threading.Event

    def __call__(self, state: TrainState) -> tuple[TrainState, bool]:
        """Trains to the last step, or until a signal. Returns the last state, and True if it was a signal."""
        config, start = self.run.config, int(state.step)
        batch_size, seed = config.training.batch_size, config.training.seed
        rows = parallel.local_rows(self.run.mesh, batch_size)
        source = batches(self.run.corpus, config.data.block_length, batch_size, seed, start, rows)
        profiler = Profiler(self.mirror.local / "profile", start, config.metrics.profile)
        stop = self._evaluate_again(state)
        requested: jax.Array | bool = False  # any process received a signal
        with contextlib.closing(source), profiler:
            for number in range(start + 1, 1 + (start if stop else config.training.steps)):
                with profiler.step(number):
                    batch = parallel.shard_batch(self.run.mesh, next(source), rows, batch_size)
                    state, metrics = self.step(state, batch, self.run.frozen)
                # All processes read it one step later, so that the host does not wait for this step.
                stop, requested = bool(requested), processes.any_of(self.stopping.is_set())
                self.log.record(number, metrics)
                bound = None
                if self.run.is_evaluated(number) and not stop:
                    bound, stop = self._evaluate(state)
                if stop or self._is_saved(number) or bound is not None:
                    self.log.flush()
                    self.mirror.sync()  # before the checkpoint: else a crash in between would lose its records
                    self.checkpoints.save(state, bound)
                if stop:
                    break
        return state, stop

    def _is_saved(self, number: int) -> bool:
        """True if a checkpoint is due at this step."""
        return number % self.run.config.checkpoint.every == 0 or number == self.run.config.training.steps

    def _evaluate_again(self, state: TrainState) -> bool:
        """Evaluates the state that the run resumes from, if a signal interrupted that before. True if one does now."""
        start, folder = int(state.step), self.mirror.local
        if not start or not self.run.is_evaluated(start):
            return False
        if processes.broadcast_from_first(has_bound(folder, start)):
            return False
        bound, stop = self._evaluate(state)
        self.mirror.sync()
        self.checkpoints.add_bound(start, bound)
        return stop

    def _evaluate(self, state: TrainState) -> tuple[float | None, bool]:
        """Records the bound and samples of a step. Returns the bound (None without `checkpoint.keep_best`), False.

        A signal to any process ends it between two batches, or two steps of sampling: nothing is recorded, and the
        result is (None, True). A resumed run evaluates that step first.
        """
        run, config = self.run, self.run.config
        trained = run.trained(state.eval_params)

        def check():
            if bool(processes.any_of(self.stopping.is_set())):
                raise _Stopped

        try:
            bound = validation_bound(trained, run.corpus, config.evaluation.draws, run.mesh, check)
            samples = validation_samples(trained, config.evaluation.samples, config.training.seed, check)
        except _Stopped:
            return None, True
        self.log.bound(int(state.step), bound)
        self.log.samples(int(state.step), *samples)
        return bound[BOUND] if config.checkpoint.keep_best else None, False


class _Stopped(Exception):
    """A signal was received during an evaluation."""
