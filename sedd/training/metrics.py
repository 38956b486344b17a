"""What a run reports while it goes on: JSONL files for machines, a progress bar for people, a board for both."""

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from sedd.training.guard import NonFiniteGuard
from sedd.training.tensorboard import TensorBoardWriter

BOUND = "validation_nats_per_token"  # the name of the bound on the validation split in metrics.jsonl


@dataclasses.dataclass(frozen=True)
class Summary:
    """What one call of `fit` did. None where there was nothing to measure."""

    steps: int  # taken by this call
    seconds: float  # of the clock, compilation and evaluation included
    tokens: int  # seen, those that count
    tokens_per_second: float | None  # without compilation and evaluation
    mfu: float | None  # of the devices' dense bfloat16 rate; None where that is not known
    loss: float | None  # nats per token, the mean over the last steps
    validation_nats_per_token: float | None  # the last bound on the validation split

    def __str__(self) -> str:
        """A line for people."""
        if not self.steps:
            return "nothing was left to do"
        rate = "" if self.tokens_per_second is None else f" ({_rate(self.tokens_per_second, self.mfu)})"
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

    def __init__(
        self,
        folder: Path | None,
        start: int,
        steps: int,
        guard: NonFiniteGuard,
        board: TensorBoardWriter | None = None,
        ideal_step_seconds: float | None = None,
    ):
        """Goes on in metrics.jsonl and samples.jsonl of the folder after step `start`, of `steps` in all.

        folder: None in processes that write and show nothing. least_seconds: of a step, if the devices did nothing but
        the multiplications of the algorithm, at their full rate.
        """
        self._file = self._samples = None
        if folder is not None:
            for name in ("metrics.jsonl", "samples.jsonl"):
                _truncate_after(folder / name, start)
            self._file, self._samples = (folder / "metrics.jsonl").open("a"), folder / "samples.jsonl"
        self._guard, self._board, self._ideal = guard, board, ideal_step_seconds
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._begin, self._clock = time.monotonic(), None
        self._loss = self._seconds = self._seconds_per_token = None  # running means
        self._taken = self._tokens = self._timed_steps = self._timed_tokens = 0
        self._timed, self._bound = 0.0, None
        shown = dict(disable=folder is None, mininterval=0.1 if sys.stderr.isatty() else 10)
        self._bar = tqdm(initial=start, total=steps, desc="compiling", unit="step", **shown)

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
        """Takes the metrics of one step, as `make_step` has them, and writes those of the step before."""
        self.flush()
        self._pending = step, metrics

    def flush(self):
        """Writes what it was last given. UserError if the guard lets it not pass."""
        if self._pending is None:
            return
        (step, metrics), self._pending = jax.device_get(self._pending), None
        finite, tokens = self._guard.check(step, metrics), int(metrics["tokens"])
        values = {name: float(metrics[name]) for name in ("loss", "gradient_norm", "learning_rate")}
        self._taken, self._tokens = self._taken + 1, self._tokens + tokens
        self._write(step, {**(values if finite else {"skipped": True}), **self._speed(tokens)})
        self._loss = _running(self._loss, values["loss"]) if finite else self._loss
        loss = "" if self._loss is None else f"loss {self._loss:.3f} nats/token"
        rate = "" if self._seconds is None else f", {_rate(1 / self._seconds_per_token, self._share(self._seconds))}"
        self._bar.set_description("training", refresh=False)
        self._bar.set_postfix_str(loss + rate, refresh=False)
        self._bar.update()

    def bound(self, step: int, values: dict[str, float]):
        """The bound on the validation split, as `validation_nats_per_token` and in other units."""
        self.flush()
        self._write(step, values)
        self._say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        self._bound = values[BOUND]
        self._clock = None  # what that took is not the next step's

    def samples(self, step: int, texts: list[str], tokens: list[np.ndarray]):
        """Texts drawn from the model as it is, and their tokens, Int[L] each."""
        self.flush()
        if self._samples is None:
            return
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
        seconds, timed = time.monotonic() - self._begin, self._timed or None
        rate, share = timed and self._timed_tokens / timed, timed and self._share(timed / self._timed_steps)
        return Summary(self._taken, seconds, self._tokens, rate, share, self._loss, self._bound)

    def _speed(self, tokens: int) -> dict[str, float]:
        """The tokens per second since the step before, and the share of the devices' rate, where these are known."""
        before, self._clock = self._clock, time.monotonic()
        if before is None:
            return {}
        seconds = self._clock - before
        self._timed, self._timed_tokens = self._timed + seconds, self._timed_tokens + tokens
        self._timed_steps += 1
        self._seconds = _running(self._seconds, seconds)
        self._seconds_per_token = _running(self._seconds_per_token, seconds / max(1, tokens))
        share = self._share(seconds)
        return {"tokens_per_second": round(tokens / seconds)} | ({} if share is None else {"mfu": share})

    def _share(self, seconds: float) -> float | None:
        """The utilisation of the devices in a step of so many seconds."""
        return self._ideal and round(self._ideal / seconds, 4)

    def _say(self, text: str):
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
    """True where metrics.jsonl of the folder holds the bound of a step."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return any(json.loads(line)["step"] == step for line in lines if BOUND in line and line.endswith("\n"))


def _rate(tokens_per_second: float, mfu: float | None) -> str:
    share = "" if mfu is None else f", {mfu:.1%} utilisation"
    return f"{tokens_per_second:,.0f} tokens/s{share}"


def _running(mean: float | None, value: float) -> float:
    return value if mean is None else 0.95 * mean + 0.05 * value


def _truncate_after(path: Path, step: int):
    """Drops the records of steps that a resumed run is about to take again."""
    if path.is_file():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if len(kept) < len(lines):
            part = path.with_name(f"{path.name}.part")
            part.write_text("".join(kept))
            part.replace(path)
