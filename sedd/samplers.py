"""Samplers by name, as people ask for them: on the command line, in a sweep, in `model.sample`.

A new one is a line in `SAMPLERS`; one of your own is passed as an object.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sedd.diffusion.correct import Barker, Corrected, Gibbs, Renoise
from sedd.diffusion.counts import cosine, information, reveal_counts
from sedd.diffusion.pickers import Entropy, EntropyBounded, Margin
from sedd.diffusion.process import Process
from sedd.diffusion.reveal import Adaptive, Counts, FirstHitting, FixedCounts
from sedd.diffusion.samplers import Euler, Sampler, Trapezoidal, Tweedie
from sedd.diffusion.schedule import Schedule
from sedd.disk import absolute
from sedd.errors import UserError


class Wanted(NamedTuple):
    """What a sampler is made for."""

    process: Process
    schedule: Schedule
    steps: int
    tokens: int  # how many are to be filled in, where most are
    known: int = 0  # how many are known there
    length: int = 0  # of the text that the network is told of there; the others of it stay masked
    unaware: bool = False  # tokens are given, and the network takes them for noisy ones


def _on_grid(kind):
    """Goes down the grid of noises of the schedule in so many steps."""
    return lambda wanted: kind(wanted.process, wanted.schedule, wanted.steps)


def _aware(make):
    """Resamples on its way where the network is unaware of what is given."""
    return lambda wanted: _gibbs(make)(wanted) if wanted.unaware else make(wanted)


def _gibbs(make):
    return lambda wanted: Corrected(make(wanted), Gibbs(max(1, wanted.tokens // _REDRAWN)))


def _corrected(corrector):
    return lambda wanted: Corrected(_on_grid(Tweedie)(wanted), corrector)


def _adaptive(picker):
    """Reveals as many tokens a call as it takes to be done after so many steps."""
    return lambda wanted: Adaptive(wanted.process, picker(max(1, -(-wanted.tokens // wanted.steps))))


_GAMMA = 0.1  # nats that entropy_bounded may lose in a call, roughly
_REDRAWN = 8  # a round of Gibbs redraws one position of so many: neighbours redrawn together are worse than none

SAMPLERS: dict[str, Callable[[Wanted], Sampler]] = {
    "euler": _aware(_on_grid(Euler)),
    "tweedie": _aware(_on_grid(Tweedie)),
    "trapezoidal": _aware(_on_grid(Trapezoidal)),
    "first_hitting": lambda wanted: FirstHitting(wanted.process),
    "counts": _on_grid(Counts),
    "even": lambda wanted: FixedCounts(wanted.process, (1.0,) * wanted.steps),
    "cosine": lambda wanted: FixedCounts(wanted.process, cosine(wanted.steps)),
    "margin": _adaptive(Margin),
    "entropy": _adaptive(Entropy),
    "entropy_bounded": _adaptive(lambda count: EntropyBounded(_GAMMA, count)),
    "gibbs": _gibbs(_on_grid(Tweedie)),
    "renoise": _corrected(Renoise()),
    "barker": _corrected(Barker()),
}
MOST_STEPS = 2**20
PLANNED = "planned:REPORT"  # and this one, from the information profile in a report of `sedd eval --out`


def named_sampler(name: str, wanted: Wanted) -> Sampler:
    """The sampler of a name. UserError if there is none, or it is not for this process."""
    if not 1 <= wanted.steps <= MOST_STEPS:
        raise UserError(f"steps must be at least 1 and at most {MOST_STEPS:,}, not {wanted.steps}")
    kind, _, report = name.partition(":")
    if kind == "planned":
        counts = _planned(wanted, report)
        make = lambda wanted: FixedCounts(wanted.process, counts)  # noqa: E731
    elif name in SAMPLERS:
        make = SAMPLERS[name]
    else:
        raise UserError(f"there is no sampler {name!r}; there are {', '.join(SAMPLERS)} and {PLANNED}")
    try:
        return make(wanted)
    except ValueError as error:
        usable = ", ".join(other for other in SAMPLERS if _makes(other, wanted))
        raise UserError(f"the sampler {name} is not for this model; use one of {usable} ({error})") from None


def _makes(name: str, wanted: Wanted) -> bool:
    try:
        return bool(SAMPLERS[name](wanted))
    except ValueError:
        return False


def _planned(wanted: Wanted, report: str) -> tuple[int, ...]:
    """The counts that cost least by the information profile that an evaluation measured."""
    try:
        profile = json.loads(Path(absolute(report)).read_text(encoding="utf-8"))["profile"]
        costs = information(profile, max(1, wanted.length))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"there is no profile in {report!r}; write {PLANNED}, the report.json that `sedd eval --out` leaves"
        ) from None
    costs = costs[wanted.known : wanted.known + max(1, wanted.tokens)]
    return reveal_counts(costs, min(wanted.steps, len(costs))).counts
