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
    tokens: int  # the most that a row has to be filled with
    block: int  # the model's block length
    unaware: bool = False  # tokens are given, and the network takes them for noisy ones


def _grid(kind):
    """Goes down a grid of noises, and resamples on its way where the network is unaware of what is given."""

    def make(wanted):
        sampler = kind(wanted.process, wanted.schedule, wanted.steps)
        return _gibbs(sampler, wanted) if wanted.unaware else sampler

    return make


def _gibbs(sampler, wanted):
    return Corrected(sampler, Gibbs(max(1, wanted.tokens // _APART)))


def _adaptive(picker):
    """Reveals as many tokens a call as it takes to be done after so many steps."""
    return lambda wanted: Adaptive(wanted.process, picker(-(-wanted.tokens // wanted.steps)))


def _tweedie(wanted):
    return Tweedie(wanted.process, wanted.schedule, wanted.steps)


_GAMMA = 0.1  # nats that entropy_bounded may lose in a call, roughly
_APART = 8  # one position of so many is redrawn in a round of Gibbs: neighbours redrawn together are worse than none

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
    kind, _, report = name.partition(":")
    if kind not in SAMPLERS and kind != "planned":
        raise UserError(f"there is no sampler {name!r}; there are {', '.join(SAMPLERS)} and {PLANNED}")
    try:
        return _planned(wanted, report) if kind == "planned" else SAMPLERS[kind](wanted)
    except UserError:
        raise
    except UserError:
        raise
    except ValueError as error:
        usable = ", ".join(other for other in SAMPLERS if _makes(other, wanted))
        raise UserError(f"the sampler {name} is not for this model; use one of {usable} ({error})") from None


def _makes(name: str, wanted: Wanted) -> bool:
    try:
        return bool(SAMPLERS[name](wanted))
    except ValueError:
        return False


def _planned(wanted: Wanted, report: str) -> Sampler:
    """Reveals what costs least by the information profile that an evaluation measured."""
    try:
        profile = json.loads(Path(report).read_text(encoding="utf-8"))["profile"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"there is no profile in {report!r}; write {PLANNED}, the report.json that `sedd eval --out` leaves"
        ) from None
    left = information(profile, wanted.block)[wanted.block - wanted.tokens :]
    return FixedCounts(wanted.process, reveal_counts(left, min(wanted.steps, wanted.tokens)).counts)
