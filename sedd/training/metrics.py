"""What a run reports while it goes on: JSONL files for machines, a progress bar for people, a board for both."""

import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from sedd.errors import UserError
from sedd.training.board import Board


@dataclasses.dataclass(frozen=True)
class Summary:
    """What one call of `fit` did. None where there was nothing to measure."""

    steps: int  # taken by this call
    seconds: float  # of the clock, compilation and evaluation included
    tokens: int  # seen, those that count
    tokens_per_second: float | None  # without compilation and evaluation
    loss: float | None  # nats per token, the mean over the last steps
    validation_nats_per_token: float | None  # the last bound on the validation split

    def __str__(self) -> str:
        """A line for people."""
        if not self.steps:
            return "nothing was left to do"
        rate = "" if self.tokens_per_second is None else f" ({self.tokens_per_second:,.0f} tokens/s)"
        bound = self.validation_nats_per_token
        return (
            f"{self.steps:,} steps, {self.tokens:,} tokens in {self.seconds:,.0f} s{rate}; "
            f"loss {self.loss:.3f} nats/token" + ("" if bound is None else f", held-out bound {bound:.4f}")
        )


class Metrics:
    """One line of JSON a step, and a bar with the loss in nats per token, tokens per second and the time left.

    A context manager. A step's numbers are read after the next one is under way, so that the device never waits for
    them. The file has each step's own loss; the bar shows a running mean, and the rate without the compilation.
    """

    def __init__(self, workdir: Path, start: int, steps: int, board: Board | None = None):
        """Goes on in metrics.jsonl and samples.jsonl after step `start`, of `steps` in all."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            _forget_after(workdir / name, start)
        self._file = (workdir / "metrics.jsonl").open("a")
        self._samples, self._board = workdir / "samples.jsonl", board
        self._pending: tuple[int, dict[str, jax.Array], int] | None = None
        self._begin, self._clock = time.monotonic(), None
        self._loss = self._seconds_per_token = None  # running means
        self._taken = self._tokens = self._timed_tokens = 0
        self._timed, self._bound = 0.0, None
        interval = 0.1 if sys.stderr.isatty() else 10
        self._bar = tqdm(initial=start, total=steps, desc="compiling", unit="step", mininterval=interval)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.settle()
        self._bar.close()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def record(self, step: int, values: dict[str, jax.Array], tokens: int):
        """Takes the numbers of one step, over so many tokens that count, and writes those of the step before."""
        self.settle()
        self._pending = step, values, tokens

    def settle(self):
        """Writes what it was last given. UserError if the loss is not finite."""
        if self._pending is None:
            return
        step, values, tokens = self._pending
        values = {name: float(value) for name, value in values.items()}
        if not math.isfinite(values["loss"]):
            raise UserError(
                f"the loss of step {step} is not finite; the last checkpoint stays. Lower optimizer.learning_rate"
            )
        self._pending = None
        self._write(step, {**values, **self._rate(tokens)})
        self._taken, self._tokens = self._taken + 1, self._tokens + tokens
        self._loss = _running(self._loss, values["loss"])
        rate = "" if self._seconds_per_token is None else f", {1 / self._seconds_per_token:,.0f} tokens/s"
        self._bar.set_description("training", refresh=False)
        self._bar.set_postfix_str(f"loss {self._loss:.3f} nats/token{rate}", refresh=False)
        self._bar.update()

    def bound(self, step: int, values: dict[str, float]):
        """The bound on the validation split, as `validation_nats_per_token` and in other units."""
        self.settle()
        self._write(step, values)
        self._say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        self._bound = values["validation_nats_per_token"]
        self._clock = None  # what that took is not the next step's

    def samples(self, step: int, texts: list[str], tokens: list[np.ndarray]):
        """Texts drawn from the model as it is, and their tokens, Int[L] each."""
        self.settle()
        with self._samples.open("a") as file:
            for text, ids in zip(texts, tokens):
                file.write(json.dumps({"step": step, "text": text, "tokens": ids.tolist()}) + "\n")
        for number, text in enumerate(texts, start=1):
            self._say(f"step {step}, sample {number} of {len(texts)}\n{text}")
        if self._board is not None:
            self._board.texts(step, texts)
        self._clock = None

    def summary(self) -> Summary:
        """All of it, in short."""
        rate = self._timed_tokens / self._timed if self._timed else None
        seconds = time.monotonic() - self._begin
        return Summary(self._taken, seconds, self._tokens, rate, self._loss, self._bound)

    def _rate(self, tokens: int) -> dict[str, int]:
        """The tokens per second since the step before, where that is known."""
        before, self._clock = self._clock, time.monotonic()
        if before is None:
            return {}
        seconds = self._clock - before
        self._timed, self._timed_tokens = self._timed + seconds, self._timed_tokens + tokens
        self._seconds_per_token = _running(self._seconds_per_token, seconds / max(1, tokens))
        return {"tokens_per_second": round(tokens / seconds)}

    def _say(self, text: str):
        self._bar.write(text, file=sys.stderr)

    def _write(self, step: int, values: dict[str, float]):
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            self._board.numbers(step, values)


def _running(mean: float | None, value: float) -> float:
    return value if mean is None else 0.95 * mean + 0.05 * value


def _forget_after(path: Path, step: int):
    """Drops the records of steps that a resumed run is about to take again."""
    if path.is_file():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if len(kept) < len(lines):
            part = path.with_name(f"{path.name}.part")
            part.write_text("".join(kept))
            part.replace(path)
