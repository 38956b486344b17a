"""Quality against network calls: the samples of one model, by each sampler and number of steps."""

import dataclasses
import json
import time
from collections.abc import Sequence

from tqdm import tqdm

from sedd.errors import UserError
from sedd.evaluation.quality import Quality, quality
from sedd.evaluation.scorers import Scorer
from sedd.generation.generate import Samples, sample, sampler_for
from sedd.generation.options import SamplingOptions
from sedd.trained import Trained


@dataclasses.dataclass(frozen=True)
class Point:
    """The quality and cost of one sampler at one number of steps."""

    sampler: str
    steps: int
    network_calls: int  # for each row; a sampler may finish early
    seconds: float  # per sample, at the batch size of the sweep, without compilation
    quality: Quality


def sweep(
    trained: Trained,
    samplers: Sequence[str],
    steps: Sequence[int],
    num_samples: int,
    scorer: Scorer | None = None,
    length: int | None = None,
    options: SamplingOptions = SamplingOptions(),
    progress: bool = True,
) -> list[Point]:
    """Samples and measures `num_samples` texts by each sampler at each number of steps, all from the same seed.

    length: of the texts, as in `sample`; options: those that all points have in common. UserError, before any sampling,
    for no samplers or steps, for an unknown sampler, and for a scorer where the model has no tokenizer.
    """
    if not samplers or not steps:
        raise UserError("a sweep needs at least one sampler and one number of steps")
    if scorer is not None and trained.tokenizer is None:
        raise UserError("a scoring model reads texts, and this model has no tokenizer; leave the scoring model out")
    requested = [dataclasses.replace(options, sampler=name, steps=count) for name in samplers for count in steps]
    requested = list(dict.fromkeys(requested))
    for one in requested:
        sampler_for(trained, one)  # raises for an unknown sampler
    points = []
    for one in tqdm(requested, desc="sweep", unit="point", delay=2, disable=not progress):
        drawn, seconds = _timed(trained, num_samples, length, one)
        tokens = [row[:length] for row, length in zip(drawn.tokens, drawn.lengths)]
        measured = quality(drawn.texts, tokens, scorer)
        points.append(Point(str(one.sampler), one.steps, drawn.network_calls, seconds / num_samples, measured))
    return points


def to_json(points: Sequence[Point]) -> str:
    """A JSON list with one object for each point."""
    return json.dumps([dataclasses.asdict(point) for point in points], indent=2)


def table(points: Sequence[Point]) -> str:
    """Formats the points of a sweep as aligned text."""
    scored = any(point.quality.scorer for point in points)
    head = ["sampler", "steps", "calls", "s/sample"]
    head += ["perplexity", "nats/token", "±"] if scored else []
    rows = [[*head, "entropy", "±", "distinct-1", "-2", "-3"]]
    for point in points:
        row = [point.sampler, str(point.steps), str(point.network_calls), f"{point.seconds:.3g}"]
        measured = point.quality
        if scored:
            perplexity = measured.generative_perplexity
            row += ["inf" if perplexity is None else f"{perplexity:.2f}", _number(measured.nats_per_token, 4)]
            row += [_number(measured.standard_error, 4)]
        row += [f"{measured.unigram_entropy:.4f}", _number(measured.unigram_entropy_error, 4)]
        rows.append(row + [_number(share, 3) for share in measured.distinct])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for name, *numbers in rows:
        cells = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(numbers, widths[1:]))]
        lines.append("  ".join(cells))
    number, scorer = points[0].quality.num_samples, points[0].quality.scorer
    under = f"; perplexity under {scorer}" if scored else ""
    return "\n".join([*lines, f"{number:,} samples a line, ± is one standard error over them{under}"])


def _timed(trained: Trained, num_samples: int, length: int | None, options: SamplingOptions) -> tuple[Samples, float]:
    """Returns the samples and the seconds they took. A group sampled before compiles the program."""
    group = min(num_samples, options.batch_size or trained.rows_at_once)
    # Where lengths are sampled, the longest of all samples is part of the compiled shape.
    sample(trained, num_samples if trained.layout.masks_padding else group, length, options)
    start = time.perf_counter()
    drawn = sample(trained, num_samples, length, options)
    return drawn, time.perf_counter() - start


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
