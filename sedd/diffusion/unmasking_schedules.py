"""How many tokens to reveal when: the counts of `reveal.FixedCounts` (absorbing process). NumPy, beforehand.

What is lost by revealing several tokens in one call is read from one curve. Let h_j be the mean cross-entropy, in
nats, of one more token drawn uniformly at random once j are revealed. Decoding one token a call costs sum_j h_j in the
mean; a call that reveals n tokens when j are revealed costs n h_j, so that counts n_1, n_2, ... lose

    sum_b n_b h_{j_b} - sum_j h_j,    j_b = n_1 + ... + n_(b-1),

the error of a left Riemann sum. With an exact Denoiser that is the divergence KL(p || law of the sampler given which
positions each call reveals) averaged over these, an upper bound on the KL of the sampler; with a learned one it is what
the bound on its likelihood loses.

    FixedCounts(process, plan_unmasking(report.profile, calls=64, length=1024).counts)      # the planned schedule
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class UnmaskingPlan(NamedTuple):
    """A planned schedule, and what it costs."""

    counts: tuple[int, ...]  # tokens revealed by each call, in all those of the profile
    excess: float  # predicted nats per token above one token a call


def plan_unmasking(profile: Sequence, calls: int, length: int | None = None) -> UnmaskingPlan:
    """The counts of at most so many calls that lose least, by dynamic programming: L^2 work for each call.

    profile: Float[L], h_j for j = 0 .. L - 1; or the information profile of an evaluation's report, as `information`
    takes it, with `length` L. For rows with k free tokens take the last k of an array if the others are given, the
    first k if they stay masked. ValueError for a profile that is empty or not finite, and for calls outside 1 .. L.
    Hoogeboom et al., arXiv 2110.02037, after Watson et al., arXiv 2106.03802.
    """
    h = _curve(profile, length)
    if not 1 <= calls <= len(h):
        raise ValueError(f"calls must lie in 1 .. {len(h)}, the number of tokens, not {calls}")
    total = np.arange(len(h) + 1)
    # Going to m revealed from j costs (m - j) h_j, and nothing where no call is made: step[m, j].
    step = np.where(total[:, None] < total, np.inf, (total[:, None] - total) * np.append(h, 0.0))
    least, before, through = step[:, 0], [], np.empty_like(step)
    for _ in range(calls - 1):
        before.append(np.argmin(np.add(least, step, out=through), axis=1))
        least = through[total, before[-1]]
    ends = [len(h)]
    for best in reversed(before):
        ends.append(int(best[ends[-1]]))
    counts = tuple(int(count) for count in np.diff([0, *reversed(ends)]) if count)
    return UnmaskingPlan(counts, excess(h, counts))


def excess(profile: Sequence, counts: Sequence[int], length: int | None = None) -> float:
    """What counts lose, in nats per token above one token a call. profile, length: as of `plan_unmasking`."""
    h, counts = _curve(profile, length), np.asarray(counts)
    if counts.sum() != len(h) or np.any(counts < 0):
        raise ValueError(f"the counts must be at least 0 and sum to the {len(h)} tokens of the profile, not {counts}")
    start = np.minimum(np.cumsum(counts) - counts, len(h) - 1)
    return float((counts @ h[start] - h.sum()) / len(h))


def cosine_unmasking(calls: int) -> tuple[float, ...]:
    """Shares for `FixedCounts`: after call k of K the share cos(pi k / 2K) is masked. Sum to 1, few tokens first.

    MaskGIT (Chang et al., arXiv 2202.04200, section 3.3). ValueError for calls < 1.
    """
    if calls < 1:
        raise ValueError(f"calls must be at least 1, not {calls}")
    masked = [math.cos(math.pi * call / (2 * calls)) for call in range(calls)] + [0.0]
    return tuple(before - after for before, after in zip(masked, masked[1:]))


def information(profile: Sequence[Mapping], length: int) -> np.ndarray:
    """h_j of a text of `length` tokens from the information profile of an evaluation's report. Float64[length].

    profile: dicts of low, high, nats_per_token over the share of masked tokens; a bin of None is passed over. With j
    revealed, k = length - j are masked: the middle (k - 1/2) / length of the share that stands for k. Linear between
    the middles of the bins, and on along the outermost two: a flat end would be revealed in one call for nothing.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, not {length}")
    known = [part for part in profile if part["nats_per_token"] is not None]
    if not known:
        raise ValueError("the profile holds no measurement, so there is nothing to plan from")
    middle, nats = np.array([((part["low"] + part["high"]) / 2, part["nats_per_token"]) for part in known], float).T
    share = (length - np.arange(length) - 0.5) / length
    if len(known) == 1:
        return np.full(length, nats[0])
    part = np.clip(np.searchsorted(middle, share), 1, len(middle) - 1)
    slope = (nats[part] - nats[part - 1]) / (middle[part] - middle[part - 1])
    return np.maximum(nats[part] + slope * (share - middle[part]), 0.0)


def _curve(profile: Sequence, length: int | None) -> np.ndarray:
    """h_j of either kind of profile. Float64[L]."""
    if len(profile) and isinstance(profile[0], Mapping):
        if length is None:
            raise ValueError("an evaluation's profile is over shares of tokens: give the length too")
        profile = information(profile, length)
    h = np.asarray(profile, np.float64)
    if h.ndim != 1 or not len(h) or not np.all(np.isfinite(h)):
        raise ValueError("a profile is a list of finite nats, one for each number of tokens revealed, not empty")
    if length not in (None, len(h)):
        raise ValueError(f"the profile has {len(h)} entries, one a token, and length is {length}; leave it out")
    return h
