"""Reports: a bound with its errors, its terms and all that it depends on, as text and as JSON."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sedd.evaluation.statistics import (
    FEW_CLUSTERS,
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
    """A bound on the negative log-likelihood, in nats per token and in other units, under a protocol.

    standard_error: over the sampling of documents, None for a single cluster; interval: 95 %, by Student's t;
    sampling_error: over the noise, for this text, with sampling_freedom degrees of freedom for Student's t; both None
    for an odd number of draws. raw_nats_per_token, tightened_nats_per_token: of a network that predicts unnormalised
    scores, the bounds of the unnormalised and of the tightened scores; nats_per_token is the one that the protocol
    takes.
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
    noise: str  # what corrupted tokens are: masked, or random; of latents: noisy
    likelihood_of: str  # the generative distribution whose likelihood is bounded
    lengths: str  # how text shorter than a block was scored
    notes: tuple[str, ...]
    about: dict[str, Any]  # data, tokenizer, model, versions
    profile: list[dict[str, float | None]]  # nats per token by corruption probability; its mean is `diffusion`

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        parts = f"prior {self.prior:.4f}, diffusion {self.diffusion:.4f}, reconstruction {self.reconstruction:.4f}"
        noise_error = "unknown" if self.sampling_error is None else f"{self.sampling_error:.4f}"
        low, high = map(_number, self.perplexity_interval or (None, None))
        interval = f" (95 %: {low} to {high})" if self.perplexity_interval else ""
        lines = [
            f"bound         {with_error(self.nats_per_token, self.standard_error)} nats per token ({parts})",
            f"              sampling error {noise_error}; protocol {self.protocol}, {self.draws} draws a block",
            f"perplexity    {_number(self.perplexity)}{interval}",
        ]
        if self.bits_per_byte is not None:
            characters = "" if self.bits_per_character is None else f", {self.bits_per_character:.4f} per character"
            bits = with_error(self.bits_per_byte, self.bits_per_byte_error)
            lines.append(f"bits per byte {bits}{characters}")
        if self.raw_nats_per_token is not None:
            both = f"{self.raw_nats_per_token:.4f} unnormalised, {self.tightened_nats_per_token:.4f} tightened"
            lines.append(f"scores        {both}, nats per token")
        size = "" if self.num_bytes is None else f", {self.num_bytes:,} bytes"
        lines.append(
            f"scored        {self.num_tokens:,} tokens{size}; ± is one standard error over {self.clusters} clusters"
        )
        return "\n".join(lines + [f"note          {note}" for note in self.notes])


def table(reports: Sequence[Report]) -> str:
    """Formats reports as aligned text, one line for each."""
    lines = [f"{'protocol':12} {'nats per token':>18} {'perplexity':>11} {'tokens':>12} {'draws':>6}  likelihood of"]
    for report in reports:
        value = with_error(report.nats_per_token, report.standard_error)
        sizes = f"{_number(report.perplexity):>11} {report.num_tokens:12,} {report.draws:6}"
        lines.append(f"{report.protocol:12} {value:>18} {sizes}  {report.likelihood_of}")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two models on the same text with the same noise. difference: first minus second, nats per token."""

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
            f"--- the first minus the second, with the same noise\n"
            f"difference    {with_error(self.difference, self.standard_error)} nats per token{interval}"
        )


@dataclasses.dataclass(frozen=True)
class Terms:
    """The terms of the bound of N rows and M draws, in nats a row."""

    counts: np.ndarray  # Int[N]
    clusters: np.ndarray  # Int[N]
    level: np.ndarray  # Float64[N M]
    width: np.ndarray  # Float64[N M]
    diffusion: np.ndarray  # Float64[N M]
    reconstruction: np.ndarray  # Float64[N M]
    prior: np.ndarray  # Float64[N]

    @property
    def nats(self) -> np.ndarray:
        """The bound of each draw, nats a row: Float64[N M]."""
        return self.prior[:, None] + self.diffusion + self.reconstruction

    @property
    def rows(self) -> np.ndarray:
        """The mean bound of each row, nats: Float64[N]."""
        return self.nats.mean(axis=1)

    def estimate(self) -> Estimate:
        """Returns the estimate of nats per token."""
        return ratio(self.rows, self.counts, self.clusters)

    def sampling_error(self) -> tuple[float | None, float | None]:
        """Standard error over the noise in nats per token, and its degrees of freedom; None if M is odd."""
        num_rows, num_draws = self.nats.shape
        if num_draws % 2:
            return None, None
        return sampling_error(self.nats.reshape(num_rows, 2, -1).mean(axis=2), int(self.counts.sum()))


def terms_from_draws(records: np.ndarray, scored: ScoringRows, tightened: bool, start: int = 0) -> Terms:
    """Returns the terms of n rows, from row `start` on, from their records.

    records: Float32[n M K], with K as in `sedd.evaluation.scoring.record_shape`; tightened: take the tightened scores
    where records hold both.
    """
    records, at_rows = records.astype(np.float64), slice(start, start + len(records))
    variants = (records.shape[2] - 3) // 2  # 2 where scores are unnormalised: as predicted, and tightened
    column = 3 + (variants - 1 if tightened else 0)
    level, width, prior, diffusion, reconstruction = (records[:, :, at] for at in (0, 1, 2, column, column + variants))
    rows = (scored.counts[at_rows], scored.clusters[at_rows])
    return Terms(*rows, level, width, diffusion, reconstruction, prior[:, 0])


def make_report(terms: Terms, other: Terms | None, scored: ScoringRows, tightened: bool, **about: Any) -> Report:
    """Returns the report of the terms.

    other: the terms of the same draws with the other kind of scores, unnormalised if `tightened`, else tightened; None
    for a network that predicts the denoiser. about: the remaining fields of the report.
    """
    estimate, (noise_error, freedom) = terms.estimate(), terms.sampling_error()
    total = int(scored.counts.sum())
    nats, error = estimate.value, estimate.standard_error
    per_byte = scored.num_bytes and total / scored.num_bytes / math.log(2)
    per_character = scored.num_characters and total / scored.num_characters / math.log(2)
    other_nats = None if other is None else other.estimate().value
    raw, tight = (other_nats, nats) if tightened else (nats, other_nats)
    row_terms = (terms.prior, terms.diffusion.mean(1), terms.reconstruction.mean(1))
    prior, diffusion, reconstruction = (float(np.sum(term) / total) for term in row_terms)
    low, high = estimate.interval or (nats, nats)
    return Report(
        nats_per_token=nats,
        standard_error=error,
        interval=estimate.interval,
        sampling_error=noise_error,
        sampling_freedom=freedom,
        raw_nats_per_token=None if other is None else raw,
        tightened_nats_per_token=None if other is None else tight,
        prior=prior,
        diffusion=diffusion,
        reconstruction=reconstruction,
        perplexity=exponential(nats),
        perplexity_interval=estimate.interval and (exponential(low), exponential(high)),
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
    """Compares two models on the same rows. The error is that of the paired difference."""
    a, b = first[1], second[1]
    difference = ratio(a.rows - b.rows, a.counts, a.clusters)
    return Comparison(first[0], second[0], difference.value, difference.standard_error, difference.interval)


def _number(value: float | None) -> str:
    return "inf" if value is None else f"{value:.3f}"


def _notes(estimate: Estimate, scored: ScoringRows) -> tuple[str, ...]:
    if scored.documents < estimate.clusters:
        return (
            f"{scored.documents} document(s) in {estimate.clusters} clusters: ± is the variation between parts of "
            "these documents, and may be too small for other documents",
        )
    if estimate.clusters == 1:
        return ("one cluster only: the standard error is unknown",)
    if estimate.clusters < FEW_CLUSTERS:
        freedom = estimate.clusters - 1
        unsure, reach = 100 / math.sqrt(2 * freedom), t_quantile(freedom)
        return (
            f"{estimate.clusters} clusters only: the standard error is itself known to about ± {unsure:.0f} %, and the "
            f"95 % interval is ± {reach:.1f} of it; more documents would help",
        )
    return ()
