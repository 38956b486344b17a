"""Statistics of the draws of a bound: estimates in nats per token, standard errors, the information profile."""

import dataclasses
import math

import numpy as np

CONFIDENCE = 0.95
FEW_CLUSTERS = 20  # with fewer, the standard error is itself uncertain, and a report notes it
MAX_BINS = 20  # of an information profile


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A ratio of sums over clusters, such as nats per token.

    standard_error: of the ratio under resampling of the clusters, None for a single cluster; interval: 95 %, by
    Student's t with clusters - 1 degrees of freedom.
    """

    value: float
    standard_error: float | None
    interval: tuple[float, float] | None
    clusters: int

    def __str__(self) -> str:
        return with_error(self.value, self.standard_error)


def ratio(nats: np.ndarray, counts: np.ndarray, clusters: np.ndarray) -> Estimate:
    """sum(nats) / sum(counts) over rows, with the error of a ratio over clusters of rows (Cochran 1977, 6.4).

    nats: Float[N]; counts: Int[N]; clusters: Int[N], numbered from 0.
    """
    total = counts.sum()
    value = float(nats.sum() / total)
    num_clusters = int(clusters.max()) + 1
    if num_clusters < 2:
        return Estimate(value, None, None, num_clusters)
    residual = np.bincount(clusters, nats - value * counts)
    error = math.sqrt(num_clusters / (num_clusters - 1) * np.sum(residual**2)) / float(total)
    reach = t_quantile(num_clusters - 1) * error
    return Estimate(value, error, (value - reach, value + reach), num_clusters)


def sampling_error(halves: np.ndarray, total: int) -> tuple[float, float]:
    """Standard error of the estimator for this text, and its degrees of freedom, from two replicates of each row.

    halves: Float[N 2], nats a row, whose mean is the estimate; total: tokens. With d the differences of the replicates
    the variance of the sum is sum d^2 / 4; its degrees of freedom, by Satterthwaite, 3 (sum d^2)^2 / sum d^4.
    """
    squares = (halves[:, 0] - halves[:, 1]) ** 2
    if not squares.any():
        return 0.0, float(len(squares))
    freedom = 3 * squares.sum() ** 2 / (squares**2).sum()
    return float(math.sqrt(squares.sum()) / 2 / total), float(min(freedom, len(squares)))


def profile(
    level: np.ndarray, width: np.ndarray, nats: np.ndarray, counts: np.ndarray, block_length: int
) -> list[dict[str, float | None]]:
    """The information profile: nats per token against the corruption probability; its mean is the diffusion term.

    level, width, nats: Float[N M], as in `sedd.diffusion.discrete.likelihood.Draws`, nats a row; counts: Int[N];
    block_length: an upper limit of the number of bins. Returns for each bin low, high, nats_per_token (None without
    draws) and error (None with fewer than two draws).
    """
    num_bins = min(MAX_BINS, block_length)
    token_width = width * counts[:, None]
    bins = np.minimum((level * num_bins).astype(int), num_bins - 1)
    num_draws = np.bincount(bins.ravel(), minlength=num_bins)
    weight, total = (np.bincount(bins.ravel(), values.ravel(), num_bins) for values in (token_width, nats))
    mean = np.divide(total, weight, out=np.zeros(num_bins), where=weight > 0)
    residual = np.bincount(bins.ravel(), ((nats - mean[bins] * token_width) ** 2).ravel(), num_bins)
    return [
        {
            "low": index / num_bins,
            "high": (index + 1) / num_bins,
            "nats_per_token": float(mean[index]) if weight[index] > 0 else None,
            "error": float(math.sqrt(residual[index]) / weight[index]) if num_draws[index] > 1 else None,
        }
        for index in range(num_bins)
    ]


def exponential(nats: float) -> float | None:
    """exp(nats), a perplexity; None where it overflows."""
    try:
        return math.exp(nats)
    except OverflowError:
        return None


def t_quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def with_error(value: float, error: float | None, digits: int = 4) -> str:
    """Formats a number with its standard error, as in "1.2345 ± 0.0067"."""
    return f"{value:.{digits}f} ± " + ("unknown" if error is None else f"{error:.{digits}f}")
