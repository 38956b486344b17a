"""Quality against network calls: the same model, by each sampler, in each number of steps."""

import dataclasses
import json
import time
from collections.abc import Sequence

from tqdm import tqdm

from sedd.errors import UserError
from sedd.evaluation.quality import Quality, quality
from sedd.evaluation.scorers import Scorer
from sedd.generation import Generator


@dataclasses.dataclass(frozen=True)
class Point:
    """What one sampler does in one number of steps."""

    sampler: str
    steps: int
    network_calls: int  # of each row; a sampler may end early
    seconds: float  # per sample, at the batch size of the sweep, without compilation
    quality: Quality


def sweep(
    generator: Generator,
    samplers: Sequence[str],
    steps: Sequence[int],
    num_samples: int,
    judge: Scorer | None = None,
    seed: int = 0,
    progress: bool = True,
    **settings,
) -> list[Point]:
    """Draws and measures `num_samples` texts by each sampler in each number of steps, all from the same seed.

    settings: what else Generator.sample takes, such as length, temperature, top_p and batch_size.

    Raises:
      UserError: a sampler is not to be had, or there is nothing to draw or to judge; before anything is drawn.
    """
    if not samplers or not steps:
        raise UserError("a sweep needs at least one sampler and one number of steps")
    if judge is not None and generator.tokenizer is None:
        raise UserError("a judge reads texts, and this model has no tokenizer; leave the judge out")
    wanted = list(dict.fromkeys((name, count) for name in samplers for count in steps))
    for name, count in wanted:
        generator.sampler(name, count)  # raises for one that is not to be had
    points = []
    for name, count in tqdm(wanted, desc="sweep", unit="point", delay=2, disable=not progress):
        drawn, seconds = _timed(generator, num_samples, sampler=name, steps=count, seed=seed, **settings)
        tokens = [row[:length] for row, length in zip(drawn.tokens, drawn.lengths)]
        measured = quality(drawn.texts, tokens, judge)
        points.append(Point(name, count, drawn.network_calls, seconds / num_samples, measured))
    return points


def to_json(points: Sequence[Point]) -> str:
    """A JSON list with one object a point."""
    return json.dumps([dataclasses.asdict(point) for point in points], indent=2)


def table(points: Sequence[Point]) -> str:
    """The points of a sweep as aligned text."""
    judged = any(point.quality.judge for point in points)
    head = ["sampler", "steps", "calls", "s/sample"]
    head += ["perplexity", "nats/token", "±"] if judged else []
    rows = [[*head, "entropy", "±", "distinct-1", "-2", "-3"]]
    for point in points:
        row = [point.sampler, str(point.steps), str(point.network_calls), f"{point.seconds:.3g}"]
        measured = point.quality
        if judged:
            row += [f"{measured.generative_perplexity:.2f}", f"{measured.nats_per_token:.4f}"]
            row += [_number(measured.standard_error, 4)]
        row += [f"{measured.unigram_entropy:.4f}", _number(measured.unigram_entropy_error, 4)]
        rows.append(row + [_number(share, 3) for share in measured.distinct])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for name, *numbers in rows:
        cells = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(numbers, widths[1:]))]
        lines.append("  ".join(cells))
    number, judge = points[0].quality.num_samples, points[0].quality.judge
    said = f"; perplexity by {judge}" if judged else ""
    return "\n".join([*lines, f"{number:,} samples a line, ± is one standard error over them{said}"])


def _timed(generator: Generator, num_samples: int, **settings):
    """The samples, and the seconds that they took. A group is drawn before, so that its program is compiled."""
    fits = generator.network.rows_at_once(generator.block_length)
    group = min(num_samples, settings.get("batch_size") or fits)
    # Where lengths are drawn, the longest of all samples is part of the program's shape.
    generator.sample(num_samples if generator.layout.masks_padding else group, **settings)
    start = time.perf_counter()
    drawn = generator.sample(num_samples, **settings)
    return drawn, time.perf_counter() - start


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
