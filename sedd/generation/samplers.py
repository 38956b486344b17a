"""Samplers by name, for the command line, sweeps and `Model.sample`.

To add a named sampler, add a line to `SAMPLERS`; a custom Sampler can also be passed as an object.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

from sedd.diffusion.discrete.correctors import Barker, Gibbs, Renoise
from sedd.diffusion.discrete.pickers import Entropy, EntropyBounded, Margin
from sedd.diffusion.discrete.process import Absorbing, Process
from sedd.diffusion.discrete.samplers import Euler, Trapezoidal, Tweedie
from sedd.diffusion.discrete.unmasking import Adaptive, Counts, FirstHitting, FixedCounts
from sedd.diffusion.discrete.unmasking_schedules import cosine_unmasking, information, plan_unmasking
from sedd.diffusion.gaussian.process import Gaussian
from sedd.diffusion.gaussian.samplers import DDIM, EulerMaruyama, Renoised
from sedd.diffusion.sampling import Corrected, Sampler
from sedd.diffusion.schedule import Schedule
from sedd.errors import UserError
from sedd.runtime.disk import absolute


class SamplerContext(NamedTuple):
    """The arguments of a named sampler. The sizes are those of the block with the most free tokens."""

    process: Process | Gaussian
    schedule: Schedule
    steps: int
    num_free: int  # tokens to fill in
    num_given: int = 0  # tokens that are given
    length: int = 0  # positions that the network sees; those past the text stay masked
    ignores_given: bool = False  # True if there are given tokens that the network treats as noisy
    block: int | None = None  # tokens of a block, if the model generates block after block; the sizes are then its own


def _on_grid(kind):
    """A sampler over a grid of `steps` noise levels of the schedule."""
    return lambda context: kind(context.process, context.schedule, context.steps)


def _tweedie(context: SamplerContext) -> Sampler:
    """Tweedie; of blocks the sampler of its distribution, since a grid of noise levels knows no blocks."""
    return _on_grid(Tweedie if context.block is None else Counts)(context)


def _absorbing(context: SamplerContext) -> Absorbing:
    """The process, for samplers that need Absorbing; they raise ValueError for another."""
    return cast(Absorbing, context.process)


def _by_state(of_tokens, of_latents):
    """The sampler of the same name of tokens, or of latents."""
    return lambda context: (of_latents if context.process.over_latents else of_tokens)(context)


def _with_gibbs_if_needed(make):
    """Adds Gibbs corrector steps if the network treats given tokens as noisy."""
    return lambda context: _gibbs(make)(context) if context.ignores_given else make(context)


def _gibbs(make):
    return lambda context: Corrected(make(context), Gibbs(max(1, context.num_free // GIBBS_STRIDE)))


def _corrected(corrector):
    return lambda context: Corrected(_on_grid(Tweedie)(context), corrector)


def _adaptive(picker):
    """Unmasks the same number of tokens in each call, so that all are unmasked after `steps` calls."""
    return lambda context: Adaptive(context.process, picker(max(1, -(-context.num_free // context.steps))))


_GAMMA = 0.1  # nats that entropy_bounded may lose in a call, approximately
GIBBS_STRIDE = 8  # a Gibbs round redraws one position in 8: redrawing neighbours together is worse than none

SAMPLERS: dict[str, Callable[[SamplerContext], Sampler]] = {
    "euler": _by_state(_with_gibbs_if_needed(_on_grid(Euler)), _on_grid(EulerMaruyama)),
    "tweedie": _by_state(_with_gibbs_if_needed(_tweedie), _on_grid(DDIM)),
    "trapezoidal": _with_gibbs_if_needed(_on_grid(Trapezoidal)),
    "first_hitting": lambda context: FirstHitting(_absorbing(context)),
    "counts": _on_grid(Counts),
    "even": lambda context: FixedCounts(_absorbing(context), (1.0,) * context.steps),
    "cosine": lambda context: FixedCounts(_absorbing(context), cosine_unmasking(context.steps)),
    "margin": _adaptive(Margin),
    "entropy": _adaptive(Entropy),
    "entropy_bounded": _adaptive(lambda count: EntropyBounded(_GAMMA, count)),
    "gibbs": _gibbs(_on_grid(Tweedie)),
    "renoise": _corrected(Renoise()),
    "barker": _corrected(Barker()),
    "ddim": _on_grid(functools.partial(DDIM, eta=0.0)),
    "flow": _on_grid(functools.partial(EulerMaruyama, stochastic=False)),
    "renoised": _on_grid(Renoised),
    "tencdm": _on_grid(functools.partial(EulerMaruyama, max_rate=40.2, last=0.01)),  # as published
}
PLANNED = "planned:REPORT"  # planned from the information profile in a report of `sedd eval --out`


def default_sampler(process: Process | Gaussian) -> str:
    """Returns the name of the sampler with the distribution of Tweedie in the fewest network calls."""
    return "tweedie" if process.mask_id is None else "counts"


def named_sampler(name: str, context: SamplerContext) -> Sampler:
    """Returns the sampler of a name. UserError if there is none, or if it is not for this process."""
    kind, _, report = name.partition(":")
    counts = _planned(context, report) if kind == "planned" else None
    if counts is None and name not in SAMPLERS:
        raise UserError(f"there is no sampler {name!r}; there are {', '.join(SAMPLERS)} and {PLANNED}")
    try:
        make = SAMPLERS[name] if counts is None else lambda of: FixedCounts(_absorbing(of), counts)
        return _made(make, context)
    except ValueError as error:
        usable = ", ".join(other for other in SAMPLERS if _makes(other, context))
        raise UserError(f"the sampler {name} is not for this model; use one of {usable} ({error})") from None


def _made(make: Callable[[SamplerContext], Sampler], context: SamplerContext) -> Sampler:
    """ValueError if the sampler is not for the process, or for a model of blocks."""
    sampler = make(context)
    return sampler if context.block is None else sampler.in_blocks(context.block)


def _makes(name: str, context: SamplerContext) -> bool:
    try:
        return bool(_made(SAMPLERS[name], context))
    except ValueError:
        return False


def _planned(context: SamplerContext, report: str) -> tuple[int, ...]:
    """Returns the number of tokens per call with the least predicted loss, from the profile of an evaluation."""
    try:
        profile = json.loads(Path(absolute(report)).read_text(encoding="utf-8"))["profile"]
        costs = information(profile, max(1, context.length))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"there is no profile in {report!r}; write {PLANNED}, a report.json of `sedd eval --out`"
        ) from None
    costs = costs[context.num_given : context.num_given + max(1, context.num_free)]
    return plan_unmasking(costs, min(context.steps, len(costs))).counts
