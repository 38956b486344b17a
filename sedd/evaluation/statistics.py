"""What draws of a bound say of a text, and how well: estimates in nats per token, with two errors."""

import dataclasses
import math

import numpy as np

CONFIDENCE = 0.95
FEW = 20  # clusters below which an error says little of itself
BINS = 20  # of an information profile, at most


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A ratio of sums over clusters, as nats to tokens.

    standard_error: what another sample of clusters would change, None where there is one only; interval: 95 %, by
    Student's t with one degree of freedom less than there are clusters.
    """

    value: float
    standard_error: float | None
    interval: tuple[float, float] | None
    clusters: int

    def __str__(self) -> str:
        return with_error(self.value, self.standard_error)


def ratio(nats: np.ndarray, counts: np.ndarray, clusters: np.ndarray) -> Estimate:
    """sum(nats) / sum(counts) over rows, its error that of the ratio over clusters of rows (Cochran 1977, 6.4).

    nats: Float[N]; counts: Int[N]; clusters: Int[N], from 0 on.
    """
    total = counts.sum()
    value = float(nats.sum() / total)
    number = int(clusters.max()) + 1
    if number < 2:
        return Estimate(value, None, None, number)
    residual = np.bincount(clusters, nats - value * counts)
    error = math.sqrt(number / (number - 1) * np.sum(residual**2)) / float(total)
    reach = t_quantile(number - 1) * error
    return Estimate(value, error, (value - reach, value + reach), number)


def sampling_error(halves: np.ndarray, total: int) -> tuple[float, float]:
    """The noise of the estimator alone, from two replicates of each row: its standard error, and degrees of freedom.

    halves: Float[N 2], nats a row, whose mean is the estimate; total: tokens. With d the differences of the replicates
    the variance of the sum is sum d^2 / 4; its degrees of freedom, as Satterthwaite has them, 3 (sum d^2)^2 / sum d^4.
    """
    squares = (halves[:, 0] - halves[:, 1]) ** 2
    if not squares.any():
        return 0.0, float(len(squares))
    freedom = 3 * squares.sum() ** 2 / (squares**2).sum()
    return float(math.sqrt(squares.sum()) / 2 / total), float(min(freedom, len(squares)))


def profile(
    level: np.ndarray, width: np.ndarray, nats: np.ndarray, counts: np.ndarray, block_length: int
) -> list[dict[str, float | None]]:
    """The information profile: nats per token against the share of tokens that are touched, masked or random.

    The mean over the shares is the diffusion term. Each of the draws stands for `width` of the share, as Draws has it.
    level, width, nats: Float[N M], nats a row; counts: Int[N]; block_length: there are no more bins than that. Returns
    for each bin low, high, nats_per_token (None where nothing was drawn) and error (None where nothing is known of it).
    """
    count = min(BINS, block_length)
    due = width * counts[:, None]
    bins = np.minimum((level * count).astype(int), count - 1)
    drawn = np.bincount(bins.ravel(), minlength=count)
    weight, total = (np.bincount(bins.ravel(), values.ravel(), count) for values in (due, nats))
    mean = np.divide(total, weight, out=np.zeros(count), where=weight > 0)
    residual = np.bincount(bins.ravel(), ((nats - mean[bins] * due) ** 2).ravel(), count)
    found = []
    for number in range(count):
        known = weight[number] > 0
        found.append(
            {
                "low": number / count,
                "high": (number + 1) / count,
                "nats_per_token": float(mean[number]) if known else None,
                "error": float(math.sqrt(residual[number]) / weight[number]) if drawn[number] > 1 else None,
            }
        )
    return found


def exponential(nats: float) -> float | None:
    """A perplexity; None where it is beyond all numbers."""
    try:
        return math.exp(nats)
    except OverflowError:
        return None


def t_quantile(freedom: float) -> float:
    """The quantile of Student's t that leaves 2.5 % above it."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def with_error(value: float, error: float | None, digits: int = 4) -> str:
    """A number and its error, as people read it."""
    return f"{value:.{digits}f} ± " + ("unknown" if error is None else f"{error:.{digits}f}")
