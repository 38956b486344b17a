"""Quality against network calls: the samples of one model, by each sampler and number of steps."""

import dataclasses
import json
import time
from collections.abc import Sequence

from tqdm import tqdm

from sedd.errors import UserError
from sedd.evaluation.quality import Quality, quality
from sedd.evaluation.scorers import Scorer
from sedd.generation.generate import Generator


@dataclasses.dataclass(frozen=True)
class Point:
    """The quality and cost of one sampler at one number of steps."""

    sampler: str
    steps: int
    network_calls: int  # for each row; a sampler may finish early
    seconds: float  # per sample, at the batch size of the sweep, without compilation
    quality: Quality


def sweep(
    generator: Generator,
    samplers: Sequence[str],
    steps: Sequence[int],
    num_samples: int,
    scorer: Scorer | None = None,
    seed: int = 0,
    progress: bool = True,
    **settings,
) -> list[Point]:
    """Samples and measures `num_samples` texts by each sampler at each number of steps, all from the same seed.

    settings: other arguments of `Generator.sample`, such as length, temperature, top_p and batch_size. UserError,
    before any sampling, for no samplers or steps, for an unknown sampler, and for a scorer where the model has no
    tokenizer.
    """
    if not samplers or not steps:
        raise UserError("a sweep needs at least one sampler and one number of steps")
    if scorer is not None and generator.tokenizer is None:
        raise UserError("a scoring model reads texts, and this model has no tokenizer; leave the scoring model out")
    requested = list(dict.fromkeys((name, count) for name in samplers for count in steps))
    for name, count in requested:
        generator.sampler(name, count)  # raises for an unknown sampler or an invalid number of steps
    points = []
    for name, count in tqdm(requested, desc="sweep", unit="point", delay=2, disable=not progress):
        drawn, seconds = _timed(generator, num_samples, sampler=name, steps=count, seed=seed, **settings)
        tokens = [row[:length] for row, length in zip(drawn.tokens, drawn.lengths)]
        measured = quality(drawn.texts, tokens, scorer)
        points.append(Point(name, count, drawn.network_calls, seconds / num_samples, measured))
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


def _timed(generator: Generator, num_samples: int, **settings):
    """Returns the samples and the seconds they took. A group sampled before compiles the program."""
    max_rows = generator.network.rows_at_once(generator.block_length)
    group = min(num_samples, settings.get("batch_size") or max_rows)
    # Where lengths are sampled, the longest of all samples is part of the compiled shape.
    generator.sample(num_samples if generator.layout.masks_padding else group, **settings)
    start = time.perf_counter()
    drawn = generator.sample(num_samples, **settings)
    return drawn, time.perf_counter() - start


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
