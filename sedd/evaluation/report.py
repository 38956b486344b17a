"""Reports: a number with its errors, its terms, and all that it depends on; for people and for JSON files."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sedd.evaluation.statistics import (
    FEW,
    Estimate,
    exponential,
    profile,
    ratio,
    sampling_error,
    t_quantile,
    with_error,
)
from sedd.evaluation.text import ScoringRows


@dataclasses.dataclass(frozen=True)
class Report:
    """A bound on the negative log-likelihood, in nats per token and in other units; what falls under `protocol` is
    said by `sedd.evaluation.protocols`.

    standard_error: what another sample of documents would change; interval: 95 %, by Student's t; sampling_error: what
    other noise would change, of this very text, with so many degrees of freedom for Student's t. None where they cannot
    be told: from one cluster, from an odd number of draws.
    raw_nats_per_token: of a network that predicts free scores, the bound of the scores as they are; the other number
    is that of the tightened ones (or, as `sedd-paper` has it, the other way round).
    """

    nats_per_token: float
    standard_error: float | None
    interval: tuple[float, float] | None
    sampling_error: float | None
    sampling_freedom: float | None
    raw_nats_per_token: float | None
    tightened_nats_per_token: float | None
    prior: float
    diffusion: float
    reconstruction: float
    perplexity: float | None
    perplexity_interval: tuple[float | None, float | None] | None
    bits_per_byte: float | None
    bits_per_byte_error: float | None
    bits_per_character: float | None
    num_tokens: int
    num_bytes: int | None
    num_characters: int | None
    rows: int
    clusters: int
    draws: int
    seed: int
    protocol: str
    noise: str  # what touched tokens are: masked, or random
    likelihood_of: str  # whose likelihood is bounded
    lengths: str  # how text shorter than a block was scored
    notes: tuple[str, ...]
    about: dict[str, Any]  # data, tokenizer, model, versions
    profile: list[dict[str, float | None]]  # nats per token by the share masked, or random; its mean is `diffusion`

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        parts = f"prior {self.prior:.4f}, diffusion {self.diffusion:.4f}, reconstruction {self.reconstruction:.4f}"
        scatter = "unknown" if self.sampling_error is None else f"{self.sampling_error:.4f}"
        low, high = map(_number, self.perplexity_interval or (None, None))
        interval = f" (95 %: {low} to {high})" if self.perplexity_interval else ""
        lines = [
            f"bound         {with_error(self.nats_per_token, self.standard_error)} nats per token ({parts})",
            f"              the estimator's own error {scatter}; protocol {self.protocol}, {self.draws} draws a block",
            f"perplexity    {_number(self.perplexity)}{interval}",
        ]
        if self.bits_per_byte is not None:
            characters = "" if self.bits_per_character is None else f", {self.bits_per_character:.4f} per character"
            bits = with_error(self.bits_per_byte, self.bits_per_byte_error)
            lines.append(f"bits per byte {bits}{characters}")
        if self.raw_nats_per_token is not None:
            free = f"{self.raw_nats_per_token:.4f} as they are, {self.tightened_nats_per_token:.4f} tightened"
            lines.append(f"free scores   {free}, nats per token")
        size = "" if self.num_bytes is None else f", {self.num_bytes:,} bytes"
        lines.append(
            f"scored        {self.num_tokens:,} tokens{size}; ± is one standard error over {self.clusters} clusters"
        )
        return "\n".join(lines + [f"note          {note}" for note in self.notes])


def table(reports: Sequence[Report]) -> str:
    """One line for each protocol."""
    lines = [f"{'protocol':12} {'nats per token':>18} {'perplexity':>11} {'tokens':>12} {'draws':>6}  a bound"]
    for report in reports:
        value = with_error(report.nats_per_token, report.standard_error)
        sizes = f"{_number(report.perplexity):>11} {report.num_tokens:12,} {report.draws:6}"
        lines.append(f"{report.protocol:12} {value:>18} {sizes}  {report.likelihood_of}")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two models on the same text and noise. difference: of `first` minus `second`, nats per token."""

    first: Report
    second: Report
    difference: float
    standard_error: float | None
    interval: tuple[float, float] | None

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        low, high = self.interval or (math.nan, math.nan)
        interval = f" (95 %: {low:+.4f} to {high:+.4f})" if self.interval else ""
        return (
            f"--- the model\n{self.first}\n--- against\n{self.second}\n"
            f"--- the first minus the second, on the same noise\n"
            f"difference    {with_error(self.difference, self.standard_error)} nats per token{interval}"
        )


@dataclasses.dataclass(frozen=True)
class Terms:
    """What was scored, read from records: nats of each row. prior: a token's."""

    counts: np.ndarray  # Int[N]
    clusters: np.ndarray  # Int[N]
    level: np.ndarray  # Float64[N M]
    width: np.ndarray  # Float64[N M]
    diffusion: np.ndarray  # Float64[N M]
    reconstruction: np.ndarray  # Float64[N M]
    prior: np.ndarray  # Float64[N]

    @property
    def nats(self) -> np.ndarray:
        """Of each draw, Float64[N M]."""
        return self.prior[:, None] + self.diffusion + self.reconstruction

    @property
    def rows(self) -> np.ndarray:
        """The bound of each row, Float64[N]."""
        return self.nats.mean(axis=1)

    def estimate(self) -> Estimate:
        """Nats per token."""
        return ratio(self.rows, self.counts, self.clusters)

    def sampling_error(self) -> tuple[float | None, float | None]:
        """The estimator's own error in nats per token, and its degrees of freedom; None with an odd number of draws."""
        number, draws = self.nats.shape
        if draws % 2:
            return None, None
        return sampling_error(self.nats.reshape(number, 2, -1).mean(axis=2), int(self.counts.sum()))


def terms_from_draws(records: np.ndarray, scored: ScoringRows, prior: float, tightened: bool, start: int = 0) -> Terms:
    """The terms of the rows from `start` on that have records. tightened: of the two ways to read free scores.

    records: Float32[n M K], as `sedd.evaluation.scoring.num_values` has it; prior: nats a token.
    """
    records, at_rows = records.astype(np.float64), slice(start, start + len(records))
    ways = (records.shape[2] - 2) // 2
    way = 2 + (ways - 1 if tightened else 0)
    level, width, diffusion, reconstruction = (records[:, :, at] for at in (0, 1, way, way + ways))
    rows = (scored.counts[at_rows], scored.clusters[at_rows])
    return Terms(*rows, level, width, diffusion, reconstruction, prior * scored.lengths[at_rows].astype(np.float64))


def make_report(terms: Terms, other: Terms | None, scored: ScoringRows, tightened: bool, **about: Any) -> Report:
    """other: the same draws, the free scores read in the other way. about: the fields that are known already."""
    estimate, (scatter, freedom) = terms.estimate(), terms.sampling_error()
    total = int(scored.counts.sum())
    nats, error = estimate.value, estimate.standard_error
    per_byte = scored.num_bytes and total / scored.num_bytes / math.log(2)
    per_character = scored.num_characters and total / scored.num_characters / math.log(2)
    another = None if other is None else other.estimate().value
    free, tight = (another, nats) if tightened else (nats, another)
    means = (
        float(np.sum(term) / total) for term in (terms.prior, terms.diffusion.mean(1), terms.reconstruction.mean(1))
    )
    prior, diffusion, reconstruction = means
    return Report(
        nats_per_token=nats,
        standard_error=error,
        interval=estimate.interval,
        sampling_error=scatter,
        sampling_freedom=freedom,
        raw_nats_per_token=None if other is None else free,
        tightened_nats_per_token=None if other is None else tight,
        prior=prior,
        diffusion=diffusion,
        reconstruction=reconstruction,
        perplexity=exponential(nats),
        perplexity_interval=estimate.interval and tuple(map(exponential, estimate.interval)),
        bits_per_byte=per_byte and nats * per_byte,
        bits_per_byte_error=per_byte and error and error * per_byte,
        bits_per_character=per_character and nats * per_character,
        num_tokens=total,
        num_bytes=scored.num_bytes,
        num_characters=scored.num_characters,
        rows=len(scored.tokens),
        clusters=estimate.clusters,
        notes=_notes(estimate, scored),
        profile=profile(terms.level, terms.width, terms.diffusion, scored.counts, scored.tokens.shape[1]),
        **about,
    )


def make_comparison(first: tuple[Report, Terms], second: tuple[Report, Terms]) -> Comparison:
    """Of two models on the same rows. The error is that of the difference: what both find hard cancels."""
    a, b = first[1], second[1]
    found = ratio(a.rows - b.rows, a.counts, a.clusters)
    return Comparison(first[0], second[0], found.value, found.standard_error, found.interval)


def _number(value: float | None) -> str:
    return "beyond all numbers" if value is None else f"{value:.3f}"


def _notes(estimate: Estimate, scored: ScoringRows) -> tuple[str, ...]:
    if scored.documents < estimate.clusters:
        return (
            f"{scored.documents} document(s) in {estimate.clusters} clusters: ± is what other parts of them would "
            "change, and says little of other documents",
        )
    if estimate.clusters == 1:
        return ("one cluster only: nothing is known of what another sample of text would give",)
    if estimate.clusters < FEW:
        freedom = estimate.clusters - 1
        unsure, reach = 100 / math.sqrt(2 * freedom), t_quantile(freedom)
        return (
            f"{estimate.clusters} clusters only: the standard error is itself known to about ± {unsure:.0f} %, and the "
            f"95 % interval is ± {reach:.1f} of it; more documents would help",
        )
    return ()
