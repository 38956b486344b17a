"""Samplers by name, as people ask for them: on the command line, in a sweep, in `model.sample`.

A new one is a line in `SAMPLERS`; one of your own is passed as an object.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sedd.diffusion.correctors import Barker, Corrected, Gibbs, Renoise
from sedd.diffusion.pickers import Entropy, EntropyBounded, Margin
from sedd.diffusion.process import Process
from sedd.diffusion.samplers import Euler, Sampler, Trapezoidal, Tweedie
from sedd.diffusion.schedule import Schedule
from sedd.diffusion.unmasking import Adaptive, Counts, FirstHitting, FixedCounts
from sedd.diffusion.unmasking_schedules import cosine_unmasking, information, plan_unmasking
from sedd.errors import UserError
from sedd.runtime.disk import absolute


class SamplerContext(NamedTuple):
    """What a sampler is made for."""

    process: Process
    schedule: Schedule
    steps: int
    tokens: int  # how many are to be filled in, where most are
    known: int = 0  # how many are known there
    length: int = 0  # of the text that the network is told of there; the others of it stay masked
    ignores_given: bool = False  # tokens are given, and the network takes them for noisy ones


def _on_grid(kind):
    """Goes down the grid of noises of the schedule in so many steps."""
    return lambda context: kind(context.process, context.schedule, context.steps)


def _with_gibbs_if_needed(make):
    """Resamples on its way where the network is unaware of what is given."""
    return lambda context: _gibbs(make)(context) if context.ignores_given else make(context)


def _gibbs(make):
    return lambda context: Corrected(make(context), Gibbs(max(1, context.tokens // GIBBS_STRIDE)))


def _corrected(corrector):
    return lambda context: Corrected(_on_grid(Tweedie)(context), corrector)


def _adaptive(picker):
    """Reveals as many tokens a call as it takes to be done after so many steps."""
    return lambda context: Adaptive(context.process, picker(max(1, -(-context.tokens // context.steps))))


_GAMMA = 0.1  # nats that entropy_bounded may lose in a call, roughly
GIBBS_STRIDE = 8  # a round of Gibbs redraws one position of so many: neighbours redrawn together are worse than none

SAMPLERS: dict[str, Callable[[SamplerContext], Sampler]] = {
    "euler": _with_gibbs_if_needed(_on_grid(Euler)),
    "tweedie": _with_gibbs_if_needed(_on_grid(Tweedie)),
    "trapezoidal": _with_gibbs_if_needed(_on_grid(Trapezoidal)),
    "first_hitting": lambda context: FirstHitting(context.process),
    "counts": _on_grid(Counts),
    "even": lambda context: FixedCounts(context.process, (1.0,) * context.steps),
    "cosine": lambda context: FixedCounts(context.process, cosine_unmasking(context.steps)),
    "margin": _adaptive(Margin),
    "entropy": _adaptive(Entropy),
    "entropy_bounded": _adaptive(lambda count: EntropyBounded(_GAMMA, count)),
    "gibbs": _gibbs(_on_grid(Tweedie)),
    "renoise": _corrected(Renoise()),
    "barker": _corrected(Barker()),
}
MOST_STEPS = 2**20
PLANNED = "planned:REPORT"  # and this one, from the information profile in a report of `sedd eval --out`


def named_sampler(name: str, context: SamplerContext) -> Sampler:
    """The sampler of a name. UserError if there is none, or it is not for this process."""
    if not 1 <= context.steps <= MOST_STEPS:
        raise UserError(f"steps must be at least 1 and at most {MOST_STEPS:,}, not {context.steps}")
    kind, _, report = name.partition(":")
    if kind == "planned":
        counts = _planned(context, report)
        make = lambda context: FixedCounts(context.process, counts)  # noqa: E731
    elif name in SAMPLERS:
        make = SAMPLERS[name]
    else:
        raise UserError(f"there is no sampler {name!r}; there are {', '.join(SAMPLERS)} and {PLANNED}")
    try:
        return make(context)
    except ValueError as error:
        usable = ", ".join(other for other in SAMPLERS if _makes(other, context))
        raise UserError(f"the sampler {name} is not for this model; use one of {usable} ({error})") from None


def _makes(name: str, context: SamplerContext) -> bool:
    try:
        return bool(SAMPLERS[name](context))
    except ValueError:
        return False


def _planned(context: SamplerContext, report: str) -> tuple[int, ...]:
    """The counts that cost least by the information profile that an evaluation measured."""
    try:
        profile = json.loads(Path(absolute(report)).read_text(encoding="utf-8"))["profile"]
        costs = information(profile, max(1, context.length))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"there is no profile in {report!r}; write {PLANNED}, the report.json that `sedd eval --out` leaves"
        ) from None
    costs = costs[context.known : context.known + max(1, context.tokens)]
    return plan_unmasking(costs, min(context.steps, len(costs))).counts
