"""What a run reports while it goes on: a JSONL file for machines, a progress bar for people."""

import json
import math
import sys
import time
from pathlib import Path

import jax
from tqdm import tqdm

from sedd.errors import UserError


class Metrics:
    """One line of JSON a step, and a bar with the loss in nats per token, tokens per second and the time left.

    A context manager. A step's numbers are read after the next one is under way, so that the device never waits for
    them. The file has each step's own loss; the bar shows a running mean, and the rate without the compilation.
    """

    def __init__(self, path: Path, start: int, steps: int, tokens_per_step: int):
        _forget_after(path, start)
        self._file = path.open("a")
        self._tokens = tokens_per_step
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._clock: float | None = None
        self._loss = self._seconds = None  # running means
        interval = 0.1 if sys.stderr.isatty() else 10
        self._bar = tqdm(initial=start, total=steps, desc="compiling", unit="step", mininterval=interval)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.settle()
        self._bar.close()
        self._file.close()

    def record(self, step: int, values: dict[str, jax.Array]):
        """Takes the numbers of one step, and writes those of the step before."""
        self.settle()
        self._pending = step, values

    def settle(self):
        """Writes what it was last given. UserError if the loss is not finite."""
        if self._pending is None:
            return
        step, values = self._pending
        values = {name: float(value) for name, value in values.items()}
        if not math.isfinite(values["loss"]):
            raise UserError(
                f"the loss of step {step} is not finite; the last checkpoint stays. Lower optimizer.learning_rate"
            )
        self._pending = None
        self._write({"step": step, **values, **self._rate()})
        self._loss = _running(self._loss, values["loss"])
        rate = "" if self._seconds is None else f", {self._tokens / self._seconds:,.0f} tokens/s"
        self._bar.set_description("training", refresh=False)
        self._bar.set_postfix_str(f"loss {self._loss:.3f} nats/token{rate}", refresh=False)
        self._bar.update()

    def note(self, step: int, values: dict[str, float]):
        """Numbers that belong to a step but are not its own, such as a bound on held-out text."""
        self.settle()
        self._write({"step": step, **values})
        shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        self._bar.write(f"step {step}: {shown}", file=sys.stderr)
        self._clock = None  # what that took is not the next step's

    def _rate(self) -> dict[str, int]:
        """The tokens per second since the step before, where that is known."""
        before, self._clock = self._clock, time.monotonic()
        if before is None:
            return {}
        seconds = self._clock - before
        self._seconds = _running(self._seconds, seconds)
        return {"tokens_per_second": round(self._tokens / seconds)}

    def _write(self, record: dict):
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


def _running(mean: float | None, value: float) -> float:
    return value if mean is None else 0.95 * mean + 0.05 * value


def _forget_after(path: Path, step: int):
    """Drops the records of steps that a resumed run is about to take again."""
    if path.is_file():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        path.write_text("".join(kept))
