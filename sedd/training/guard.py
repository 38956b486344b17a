"""Steps whose loss or gradient is not finite: they are skipped and recorded, or stop the run."""

import json
import math
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sedd.errors import UserError

NONFINITE = "nonfinite.jsonl"


class NonFiniteGuard:
    """Checks the loss and the gradient of each step, identically in every process.

    A step whose loss or gradient is not finite changes only the step number (see `make_step`). Up to
    `max_skipped_steps` such steps are skipped; the next one stops the run.
    """

    def __init__(self, max_skipped_steps: int, folder: Path | None):
        """folder: of nonfinite.jsonl, one line per skipped step; None: nothing is written or printed."""
        self._remaining, self._folder = max_skipped_steps, folder

    def check(self, step: int, metrics: dict) -> bool:
        """True if loss and gradient are finite. UserError if they are not and no more steps may be skipped.

        metrics: of `make_step`, on the host.
        """
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"]):
            return True
        record = _record(step, metrics)
        self._remaining -= 1
        if self._folder is not None:
            with (self._folder / NONFINITE).open("a") as file:
                file.write(json.dumps(record) + "\n")
        problem = f"{record['quantity']} of step {step} is not finite (rows, noise: {NONFINITE})"
        if self._remaining < 0:
            raise UserError(
                f"{problem}; the last checkpoint is kept. Lower optimizer.learning_rate, or raise "
                "training.max_skipped_steps"
            )
        if self._folder is not None:
            tqdm.write(f"sedd: {problem}; the step is skipped, {self._remaining} more may be", sys.stderr)
        return False


def _record(step: int, metrics: dict) -> dict:
    """Returns the step, the quantity that is not finite, and the noise and loss of its examples.

    Only the examples whose loss is not finite; all if there is none.
    """
    loss, sigma = np.asarray(metrics["losses"].loss), np.asarray(metrics["losses"].sigma)
    gradients = [name for name, norm in metrics["gradients"].items() if not math.isfinite(norm)]
    nonfinite, first = np.flatnonzero(~np.isfinite(loss)), (step - 1) * len(loss)
    return {
        "step": step,
        "quantity": "the loss" if len(nonfinite) else f"the gradient of {', '.join(gradients[:3]) or 'all parameters'}",
        "gradients": gradients,
        "examples": [first, first + len(loss) - 1],
        "rows": [
            {"example": first + int(row), "sigma": _json_number(sigma[row]), "loss": _json_number(loss[row])}
            for row in (nonfinite if len(nonfinite) else range(len(loss)))
        ],
    }


def _json_number(number: float) -> float | str:
    """The number, as text if it is not finite: JSON has finite numbers only."""
    return float(number) if math.isfinite(number) else str(float(number))
