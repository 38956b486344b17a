"""The options of sampling: of `Model.sample`, of the flags of the command line, of the harness and of sweeps."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from sedd.diffusion.sampling import Sampler
from sedd.errors import UserError
from sedd.seeds import check_seed

MAX_STEPS = 2**20

# Called after each step. rows: Int[B], row numbers; tokens: Int[B L], -1 where there is none; given: Bool[B L];
# steps: int, the number of steps done in this block.
Watch = Callable[[np.ndarray, np.ndarray, np.ndarray, int], None]


def _flag(default: Any, kind: type, text: str) -> Any:
    """A field that is a flag too. kind: the type of the flag; text: its help."""
    return dataclasses.field(default=default, metadata={"kind": kind, "help": text})


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """The options of sampling. UserError for a value that is out of range, when the object is made.

    stride: of text longer than a block, the tokens by which each further block begins later, the others being given;
    None: half a block. round_below: as of `sedd.diffusion.gaussian.guidance.rounded`; sampler: a name in
    `sedd.generation.samplers`, for which `steps` is the number of steps, or a Sampler; batch_size: None: by size of the
    network; trace: return the state after each step; watch: called after each step.
    """

    steps: int = _flag(128, int, "steps of the sampler")
    sampler: str | Sampler = _flag("tweedie", str, "the sampler")
    temperature: float = _flag(1.0, float, "temperature of the distribution over clean tokens")
    top_p: float = _flag(1.0, float, "nucleus sampling: keep the most probable tokens of this total probability")
    round_below: float = _flag(
        0.0, float, "Gaussian noise: round to the nearest embedding up to this sigma; inf: always"
    )
    stride: int | None = _flag(
        None, int, "text longer than a block: new tokens of each further block, the others given (half a block)"
    )
    seed: int = _flag(0, int, "random seed")
    batch_size: int | None = _flag(None, int, "rows per batch; does not change the samples")
    trace: bool = False
    watch: Watch | None = None

    def __post_init__(self):
        check_seed(self.seed)
        if not isinstance(self.sampler, str | Sampler):
            raise UserError(f"a sampler is a name, or an object such as sedd.Tweedie(...), not {self.sampler!r}")
        if isinstance(self.sampler, str) and not 1 <= self.steps <= MAX_STEPS:
            raise UserError(f"steps must be at least 1 and at most {MAX_STEPS:,}, not {self.steps}")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature must be positive, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1], not {self.top_p}")
        if self.stride is not None and self.stride < 1:
            raise UserError(f"stride must be at least 1, not {self.stride}")
        if not self.round_below >= 0:
            raise UserError(f"round_below must be a noise level, at least 0, not {self.round_below}")
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {self.batch_size}")

    @property
    def adjusts_logits(self) -> bool:
        """True if temperature or top_p changes the distribution over clean tokens."""
        return (self.temperature, self.top_p) != (1.0, 1.0)


# The options that are flags too, by name: the fields of SamplingOptions with "kind" and "help" in their metadata.
FLAGS = {field.name: field for field in dataclasses.fields(SamplingOptions) if field.metadata}
