"""What is done about numbers that are not finite: the step is left out, and what was seen is written down."""

import json
import math
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sedd.errors import UserError

NONFINITE = "nonfinite.jsonl"


class NonFiniteGuard:
    """Looks at the loss and the gradient of each step, in every process alike.

    The step itself changes nothing where they are not finite, so that the state is good whatever comes. Up to `skips`
    such steps are left out, as if their batches had not been; the next one stops the run.
    """

    def __init__(self, max_skipped_steps: int, folder: Path | None):
        """folder: where nonfinite.jsonl goes, a line for each such step; None: nowhere."""
        self._left, self._folder = max_skipped_steps, folder

    def check(self, step: int, metrics: dict) -> bool:
        """Whether all is finite; UserError where it is not, and no more steps may be left out.

        metrics: of `make_step`, on the host.
        """
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"]):
            return True
        record = _record(step, metrics)
        self._left -= 1
        if self._folder is not None:
            with (self._folder / NONFINITE).open("a") as file:
                file.write(json.dumps(record) + "\n")
        what = f"{record['quantity']} of step {step} is not finite (rows, noise: {NONFINITE})"
        if self._left < 0:
            raise UserError(
                f"{what}; the last checkpoint stays. Lower optimizer.learning_rate, or raise training.max_skipped_steps"
            )
        if self._folder is not None:
            tqdm.write(f"sedd: {what}; the step is left out, {self._left} more may be", sys.stderr)
        return False


def _record(step: int, metrics: dict) -> dict:
    """The step, the offending quantity, and its examples with their noise: those at fault, or else all."""
    rows, sigma = (np.asarray(metrics["parts"][name]) for name in ("rows", "sigma"))
    gradients = [name for name, norm in metrics["parts"]["gradients"].items() if not math.isfinite(norm)]
    wrong, first = np.flatnonzero(~np.isfinite(rows)), (step - 1) * len(rows)
    return {
        "step": step,
        "quantity": "the loss" if len(wrong) else f"the gradient of {', '.join(gradients[:3]) or 'all parameters'}",
        "gradients": gradients,
        "examples": [first, first + len(rows) - 1],
        "rows": [
            {"example": first + int(row), "sigma": _plain(sigma[row]), "loss": _plain(rows[row])}
            for row in (wrong if len(wrong) else range(len(rows)))
        ],
    }


def _plain(number: float) -> float | str:
    """As JSON has it, which knows finite numbers only."""
    return float(number) if math.isfinite(number) else str(float(number))
