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


def _grid(kind):
    """Goes down a grid of noises, and resamples on its way where the network is unaware of what is given."""

    def make(wanted):
        sampler = kind(wanted.process, wanted.schedule, wanted.steps)
        return _gibbs(sampler, wanted) if wanted.unaware else sampler

    return make


def _gibbs(sampler, wanted):
    return Corrected(sampler, Gibbs(max(1, wanted.tokens // _REDRAWN)))


def _adaptive(picker):
    """Reveals as many tokens a call as it takes to be done after so many steps."""
    return lambda wanted: Adaptive(wanted.process, picker(max(1, -(-wanted.tokens // wanted.steps))))


def _tweedie(wanted):
    return Tweedie(wanted.process, wanted.schedule, wanted.steps)


_GAMMA = 0.1  # nats that entropy_bounded may lose in a call, roughly
_REDRAWN = 8  # a round of Gibbs redraws one position of so many: neighbours redrawn together are worse than none

SAMPLERS: dict[str, Callable[[Wanted], Sampler]] = {
    "euler": _grid(Euler),
    "tweedie": _grid(Tweedie),
    "trapezoidal": _grid(Trapezoidal),
    "first_hitting": lambda wanted: FirstHitting(wanted.process),
    "counts": lambda wanted: Counts(wanted.process, wanted.schedule, wanted.steps),
    "even": lambda wanted: FixedCounts(wanted.process, (1.0,) * wanted.steps),
    "cosine": lambda wanted: FixedCounts(wanted.process, cosine(wanted.steps)),
    "margin": _adaptive(Margin),
    "entropy": _adaptive(Entropy),
    "entropy_bounded": _adaptive(lambda count: EntropyBounded(_GAMMA, count)),
    "gibbs": lambda wanted: _gibbs(_tweedie(wanted), wanted),
    "renoise": lambda wanted: Corrected(_tweedie(wanted), Renoise()),
    "barker": lambda wanted: Corrected(_tweedie(wanted), Barker()),
}
PLANNED = "planned:REPORT"  # and this one, from the information profile in a report of `sedd eval --out`


def named_sampler(name: str, wanted: Wanted) -> Sampler:
    """The sampler of a name. UserError if there is none, or it is not for this process."""
    if wanted.steps < 1:
        raise UserError(f"steps must be at least 1, not {wanted.steps}")
    planned = name == "planned" or name.startswith("planned:")
    if name not in SAMPLERS and not planned:
        raise UserError(f"there is no sampler {name!r}; there are {', '.join(SAMPLERS)} and {PLANNED}")
    weights = _planned(wanted, name.partition(":")[2]) if planned else None
    try:
        return FixedCounts(wanted.process, weights) if planned else SAMPLERS[name](wanted)
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
        profile = json.loads(Path(report).read_text(encoding="utf-8"))["profile"]
        costs = information(profile, max(1, wanted.length))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"there is no profile in {report!r}; write {PLANNED}, the report.json that `sedd eval --out` leaves"
        ) from None
    costs = costs[wanted.known : wanted.known + max(1, wanted.tokens)]
    return reveal_counts(costs, min(wanted.steps, len(costs))).counts
