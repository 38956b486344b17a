"""What a run reports while it goes on: a JSONL file for machines, a progress bar for people."""

import json
import sys
import time
from pathlib import Path

from tqdm import tqdm


class Metrics:
    """One line of JSON a step, and a bar with the loss in nats per token, tokens per second and the time left.

    A context manager. The loss on the bar is a running mean; the file has each step's own.
    """

    def __init__(self, path: Path, start: int, steps: int, tokens_per_step: int):
        _forget_after(path, start)
        self._file = path.open("a")
        self._tokens = tokens_per_step
        self._seconds = time.monotonic()
        self._mean = None
        interval = 0.1 if sys.stderr.isatty() else 10
        self._bar = tqdm(initial=start, total=steps, desc="training", unit="step", mininterval=interval)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._bar.close()
        self._file.close()

    def record(self, step: int, values: dict[str, float]):
        """The numbers of one step; the rate is that since the step before."""
        now = time.monotonic()
        rate = self._tokens / (now - self._seconds)
        self._seconds = now
        record = {"step": step, **values, "tokens_per_second": round(rate)}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        loss = values["loss"]
        self._mean = loss if self._mean is None else 0.95 * self._mean + 0.05 * loss
        shown = self._bar.format_dict["rate"] or 0
        self._bar.set_postfix_str(f"loss {self._mean:.3f} nats/token, {shown * self._tokens:,.0f} tokens/s", refresh=False)
        self._bar.update()

    def note(self, step: int, values: dict[str, float], text: str):
        """Numbers that belong to a step but are not its own, such as a bound on held-out text."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._bar.write(text, file=sys.stderr)


def _forget_after(path: Path, step: int):
    """Drops the records of steps that a resumed run is about to take again."""
    if path.is_file():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        path.write_text("".join(kept))
