"""Unmasking schedules: numbers of tokens per call for `unmasking.FixedCounts` (absorbing process). NumPy.

The loss of unmasking several tokens in one call follows from one curve. Let h_j be the mean cross-entropy, in nats, of
one more token, drawn uniformly at random, once j are unmasked. Decoding one token a call costs sum_j h_j on average; a
call that unmasks n tokens when j are unmasked costs n h_j, so that counts n_1, n_2, ... lose

    sum_b n_b h_{j_b} - sum_j h_j,    j_b = n_1 + ... + n_(b-1),

the error of a left Riemann sum. With an exact Denoiser that is the divergence KL(p || the sampler's distribution given
which positions each call unmasks), averaged over these: an upper bound on the KL of the sampler. With a learned one it
is the increase of the bound on its negative log-likelihood.

    FixedCounts(process, plan_unmasking(report.profile, calls=64, length=1024).counts)      # the optimal schedule
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

# h_j, Float[L]; or the bins of an evaluation's information profile
Profile = Sequence[float] | np.ndarray | Sequence[Mapping[str, Any]]


class UnmaskingPlan(NamedTuple):
    """An optimal schedule and its predicted loss."""

    counts: tuple[int, ...]  # tokens unmasked by each call; their sum is L
    excess: float  # predicted loss in nats per token, compared with one token a call


def plan_unmasking(profile: Profile, calls: int, length: int | None = None) -> UnmaskingPlan:
    """The counts, of at most `calls` calls, that lose least, by dynamic programming: L^2 work for each call.

    profile: Float[L], h_j for j = 0 .. L - 1; or the information profile of an evaluation's report, as `information`
    takes it, with `length` L. For rows with k free tokens take the last k entries of an array if the others are given,
    the first k if they stay masked. ValueError for a profile that is empty or not finite, and for calls outside 1 .. L.
    Hoogeboom et al., arXiv 2110.02037, after Watson et al., arXiv 2106.03802.
    """
    h = _curve(profile, length)
    if not 1 <= calls <= len(h):
        raise ValueError(f"calls must lie in 1 .. {len(h)}, the number of tokens, not {calls}")
    total = np.arange(len(h) + 1)
    # step[m, j]: the cost of a call from j to m unmasked tokens, (m - j) h_j; 0 for m = j, no call.
    step = np.where(total[:, None] < total, np.inf, (total[:, None] - total) * np.append(h, 0.0))
    cost, before, candidates = step[:, 0], [], np.empty_like(step)
    for _ in range(calls - 1):
        before.append(np.argmin(np.add(cost, step, out=candidates), axis=1))
        cost = candidates[total, before[-1]]
    ends = [len(h)]
    for best in reversed(before):
        ends.append(int(best[ends[-1]]))
    counts = tuple(int(count) for count in np.diff([0, *reversed(ends)]) if count)
    return UnmaskingPlan(counts, excess(h, counts))


def excess(profile: Profile, counts: Sequence[int], length: int | None = None) -> float:
    """The loss of `counts` in nats per token, compared with one token a call. profile, length: as of `plan_unmasking`.

    ValueError if the counts are negative or do not sum to L.
    """
    h, n = _curve(profile, length), np.asarray(counts)
    if n.sum() != len(h) or np.any(n < 0):
        raise ValueError(f"the counts must be at least 0 and sum to the {len(h)} tokens of the profile, not {n}")
    start = np.minimum(np.cumsum(n) - n, len(h) - 1)
    return float((n @ h[start] - h.sum()) / len(h))


def cosine_unmasking(calls: int) -> tuple[float, ...]:
    """Weights for `FixedCounts`: after call k of K the mask ratio is cos(pi k / 2K). Sum 1; the first are the smallest.

    MaskGIT (Chang et al., arXiv 2202.04200, section 3.3). ValueError for calls < 1.
    """
    if calls < 1:
        raise ValueError(f"calls must be at least 1, not {calls}")
    masked = [math.cos(math.pi * call / (2 * calls)) for call in range(calls)] + [0.0]
    return tuple(before - after for before, after in zip(masked, masked[1:]))


def information(profile: Sequence[Mapping[str, Any]], length: int) -> np.ndarray:
    """h_j of a text of `length` tokens from the information profile of an evaluation's report. Float64[length].

    profile: dicts of low, high, nats_per_token over the corruption probability; bins whose value is None are ignored.
    With j unmasked, k = length - j tokens are masked, at corruption probability (k - 1/2) / length. Linear between the
    middles of the bins, and extrapolated along the outermost two: with a flat end a plan would unmask it in one call
    at no predicted loss. ValueError for length < 1 and for a profile without values.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, not {length}")
    bins = [entry for entry in profile if entry["nats_per_token"] is not None]
    if not bins:
        raise ValueError("the profile holds no measurement to plan from")
    middle, nats = np.array([((entry["low"] + entry["high"]) / 2, entry["nats_per_token"]) for entry in bins], float).T
    corruption = (length - np.arange(length) - 0.5) / length
    if len(bins) == 1:
        return np.full(length, nats[0])
    right = np.clip(np.searchsorted(middle, corruption), 1, len(middle) - 1)
    slope = (nats[right] - nats[right - 1]) / (middle[right] - middle[right - 1])
    return np.maximum(nats[right] + slope * (corruption - middle[right]), 0.0)


def _curve(profile: Profile, length: int | None) -> np.ndarray:
    """h_j of either kind of profile. Float64[L]. ValueError if it is not finite, or does not fit the length."""
    if len(profile) and isinstance(profile[0], Mapping):
        if length is None:
            raise ValueError("an evaluation's profile is over corruption probabilities: give the length too")
        profile = information(cast(Sequence[Mapping[str, Any]], profile), length)
    h = np.asarray(profile, np.float64)
    if h.ndim != 1 or not len(h) or not np.all(np.isfinite(h)):
        raise ValueError("a profile is a nonempty list of finite nats, one for each number of unmasked tokens")
    if length not in (None, len(h)):
        raise ValueError(f"the profile has {len(h)} entries, one a token, but length is {length}; leave length out")
    return h
