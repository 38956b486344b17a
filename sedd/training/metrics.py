"""The records of a run: metrics.jsonl and samples.jsonl, a progress bar, and optionally TensorBoard files."""

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from sedd.runtime.disk import write_text_atomic
from sedd.training.guard import NonFiniteGuard
from sedd.training.tensorboard import TensorBoardWriter

BOUND = "validation_nats_per_token"  # the name of the bound on the validation split in metrics.jsonl


@dataclasses.dataclass(frozen=True)
class Summary:
    """The result of one call of `fit`. None: nothing was measured."""

    steps: int  # of this call
    seconds: float  # wall time, with compilation and evaluation
    tokens: int  # valid tokens seen
    tokens_per_second: float | None  # without compilation and evaluation
    mfu: float | None  # model FLOPs utilisation; None if the peak rate of the devices is not known
    loss: float | None  # nats per token, exponential moving average
    validation_nats_per_token: float | None  # the last bound on the validation split

    def __str__(self) -> str:
        """One line."""
        if not self.steps:
            return "nothing was left to do"
        rate = "" if self.tokens_per_second is None else f" ({_rate(self.tokens_per_second, self.mfu)})"
        bound = self.validation_nats_per_token
        return (
            f"{self.steps:,} steps, {self.tokens:,} tokens in {self.seconds:,.0f} s{rate}; "
            f"loss {self.loss:.3f} nats/token" + ("" if bound is None else f", held-out bound {bound:.4f}")
        )


class Metrics:
    """Writes one line of JSON per step, and shows the loss in nats per token, tokens per second and the time left.

    A context manager. The metrics of a step are read once the next step is dispatched, so that the device never waits
    for the host. The file has the loss of each step; the progress bar shows a moving average, and the rate without
    compilation.
    """

    def __init__(
        self,
        folder: Path | None,
        start: int,
        steps: int,
        guard: NonFiniteGuard,
        board: TensorBoardWriter | None = None,
        ideal_step_seconds: float | None = None,
    ):
        """Appends to metrics.jsonl and samples.jsonl of the folder, after the records of step `start` of `steps`.

        folder: None: nothing is written or shown. ideal_step_seconds: time of a step at the peak rate of the devices,
        without recomputation; None: unknown.
        """
        self._file = self._samples = None
        if folder is not None:
            for name in ("metrics.jsonl", "samples.jsonl"):
                _truncate_after(folder / name, start)
            self._file, self._samples = (folder / "metrics.jsonl").open("a"), folder / "samples.jsonl"
        self._guard, self._board, self._ideal = guard, board, ideal_step_seconds
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._begin = time.monotonic()
        self._clock: float | None = None  # when the step before was recorded; None: the next step is not timed
        self._loss: float | None = None  # this and the next two: moving averages
        self._seconds: float | None = None
        self._seconds_per_token: float | None = None
        self._num_steps = self._tokens = self._timed_steps = self._timed_tokens = 0
        self._timed = 0.0
        self._bound: float | None = None
        options = dict(disable=folder is None, mininterval=0.1 if sys.stderr.isatty() else 10)
        self._bar = tqdm(initial=start, total=steps, desc="compiling", unit="step", **options)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.flush()
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def record(self, step: int, metrics: dict[str, jax.Array]):
        """Takes the metrics of one step, as of `make_step`, and writes those of the step before."""
        self.flush()
        self._pending = step, metrics

    def flush(self):
        """Writes the metrics of the last recorded step. UserError of `NonFiniteGuard.check`."""
        if self._pending is None:
            return
        (step, metrics), self._pending = jax.device_get(self._pending), None
        finite, tokens = self._guard.check(step, metrics), int(metrics["tokens"])
        values = {name: float(metrics[name]) for name in ("loss", "gradient_norm", "learning_rate")}
        values |= {name: float(term) for name, term in metrics["terms"].items()}
        self._num_steps, self._tokens = self._num_steps + 1, self._tokens + tokens
        self._write(step, {**(values if finite else {"skipped": True}), **self._speed(tokens)})
        self._loss = _moving_average(self._loss, values["loss"]) if finite else self._loss
        loss = "" if self._loss is None else f"loss {self._loss:.3f} nats/token"
        rate = "" if self._seconds is None else f", {_rate(1 / self._seconds_per_token, self._mfu(self._seconds))}"
        self._bar.set_description("training", refresh=False)
        self._bar.set_postfix_str(loss + rate, refresh=False)
        self._bar.update()

    def bound(self, step: int, values: dict[str, float]):
        """Records the bound on the validation split: `validation_nats_per_token`, and other units."""
        self.flush()
        self._write(step, values)
        self._print(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        self._bound = values[BOUND]
        self._clock = None  # the time of the evaluation is not part of the next step

    def samples(self, step: int, texts: list[str], tokens: list[np.ndarray]):
        """Records samples of the model. tokens: those of each text, Int[L]."""
        self.flush()
        if self._samples is None:
            return
        with self._samples.open("a") as file:
            for text, ids in zip(texts, tokens):
                file.write(json.dumps({"step": step, "text": text, "tokens": ids.tolist()}) + "\n")
        for number, text in enumerate(texts, start=1):
            self._print(f"step {step}, sample {number} of {len(texts)}\n{text}")
        if self._board is not None:
            self._board.texts(step, texts)
        self._clock = None

    def summary(self) -> Summary:
        """Returns the summary of all recorded steps."""
        seconds, timed = time.monotonic() - self._begin, self._timed or None
        rate, mfu = timed and self._timed_tokens / timed, timed and self._mfu(timed / self._timed_steps)
        return Summary(self._num_steps, seconds, self._tokens, rate, mfu, self._loss, self._bound)

    def _speed(self, tokens: int) -> dict[str, float]:
        """Returns tokens per second since the step before, and the MFU; without an entry if unknown."""
        before, self._clock = self._clock, time.monotonic()
        if before is None:
            return {}
        seconds = self._clock - before
        self._timed, self._timed_tokens = self._timed + seconds, self._timed_tokens + tokens
        self._timed_steps += 1
        self._seconds = _moving_average(self._seconds, seconds)
        self._seconds_per_token = _moving_average(self._seconds_per_token, seconds / max(1, tokens))
        mfu = self._mfu(seconds)
        return {"tokens_per_second": round(tokens / seconds)} | ({} if mfu is None else {"mfu": mfu})

    def _mfu(self, seconds: float) -> float | None:
        """Model FLOPs utilisation of a step that takes `seconds`."""
        return self._ideal and round(self._ideal / seconds, 4)

    def _print(self, text: str):
        if self._file is not None:
            self._bar.write(text, file=sys.stderr)

    def _write(self, step: int, values: dict[str, float]):
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            self._board.numbers(step, values)


def has_bound(folder: Path, step: int) -> bool:
    """True if metrics.jsonl of the folder has the bound of the step."""
    return step in bounds_of(folder)


def bounds_of(folder: Path) -> dict[int, float]:
    """Returns the bounds on the validation split in metrics.jsonl of the folder by step, in nats per token."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    records = [json.loads(line) for line in lines if BOUND in line and line.endswith("\n")]
    return {record["step"]: record[BOUND] for record in records}


def _rate(tokens_per_second: float, mfu: float | None) -> str:
    utilisation = "" if mfu is None else f", {mfu:.1%} MFU"
    return f"{tokens_per_second:,.0f} tokens/s{utilisation}"


def _moving_average(mean: float | None, value: float) -> float:
    return value if mean is None else 0.95 * mean + 0.05 * value


def _truncate_after(path: Path, step: int):
    """Removes the records after the step, and incomplete lines: a resumed run repeats those steps."""
    if path.is_file():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if len(kept) < len(lines):
            write_text_atomic(path, "".join(kept))
