"""Samplers with planned calls: their exact distributions, their plans, and the schedules of their counts."""

import dataclasses
import functools
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import index, kernel, p_value, random_tables, sampler_distribution, states, table_denoiser, table_log_clean

from sedd.diffusion import keyed_random
from sedd.diffusion.denoiser import condition_on_mask_ratio
from sedd.diffusion.discrete import samplers, unmasking
from sedd.diffusion.discrete.exact_likelihood import subset_log_likelihood
from sedd.diffusion.discrete.pickers import EntropyBounded
from sedd.diffusion.discrete.process import Absorbing, Jump, Uniform
from sedd.diffusion.discrete.samplers import Euler, Tweedie
from sedd.diffusion.discrete.unmasking import Adaptive, Counts, FirstHitting, FixedCounts
from sedd.diffusion.discrete.unmasking_schedules import cosine_unmasking, excess, information, plan_unmasking
from sedd.diffusion.sampling import sample
from sedd.diffusion.schedule import Geometric, LogLinear
from sedd.evaluation.statistics import profile as measured

V, L = 3, 3
PROCESS, MASK = Absorbing(V), V
TABLE = random_tables(1, L, seed=3)[0]
UNTRAINED = table_denoiser(TABLE)  # its likelihoods depend on the order of decoding
SCHEDULE = Geometric(0.1, 2.0)  # many tokens are never corrupted

# The given positions differ by row: none, one, two, one of them a mask that stays.
TOKENS = np.array([[0, 1, 2], [2, 0, 1], [1, 1, 0], [0, 2, 2], [MASK, 0, 2]])
FREE = np.array([[1, 1, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0], [0, 1, 1]], bool)

run = jax.jit(sample, static_argnames=("denoiser", "sampler"))


def outcomes(sampler):
    """Uniform numbers of L positions that lead to each plan, and the probability of each. Float[N L], Float[N]."""
    if not isinstance(sampler, Counts):
        orders = np.array(list(itertools.permutations(range(L)))) / L
        return orders, np.full(len(orders), 1 / len(orders))
    edges = sampler.p_masked()
    intervals = states(sampler.steps, L)
    return ((edges[1:] + edges[:-1]) / 2)[intervals], -np.diff(edges)[intervals].prod(-1)


@functools.cache
def distributions_by_plan(sampler, denoiser=UNTRAINED):
    """The exact distribution of each row of TOKENS given each plan, in float64, and the plans' probabilities.

    Plan and steps are the production code. Only the random draws are replaced, by enumeration: the uniform number of
    each position by those of `outcomes`, the move by the probability of each sequence. Float[N rows S^L], Float[N].
    """
    x, rows = jnp.asarray(states(V + 1, L)), (V + 1) ** L

    def transitions(keys, x, jump, positions=None):
        at = jnp.broadcast_to(jnp.arange(L) if positions is None else positions, jump.p_move.shape)
        put = jax.vmap(lambda at, values: jnp.zeros((L, *values.shape[1:])).at[at].set(values))
        return kernel(Jump(put(at, jump.p_move), put(at, jump.log_dest)), x, V + 1)

    def distribution(u, tokens, free):
        def ranks(_, free):
            return jnp.argsort(jnp.argsort(jnp.where(free, u, 2.0)))

        def uniform(keys):
            return jnp.broadcast_to(u, keys.shape)

        keys = keyed_random.row_keys(jax.random.key(0), jnp.arange(rows))
        with mock.patch.multiple(keyed_random, ranks=ranks, uniform=uniform):
            plan = sampler.plan(keys, jnp.broadcast_to(free, (rows, L)))
        p = jnp.all(x == jnp.where(free, MASK, tokens), axis=-1).astype(u.dtype)
        with mock.patch.object(unmasking, "move", transitions), mock.patch.object(samplers, "move", transitions):
            for k in range(jax.tree.leaves(plan)[0].shape[0]):
                p = p @ sampler.step(keys, denoiser, x, jax.tree.map(lambda leaf: leaf[k], plan))
        return p

    with jax.enable_x64(True):
        numbers, probabilities = outcomes(sampler)
        over_rows = jax.jit(lambda u: jax.lax.map(lambda row: distribution(u, *row), (TOKENS, FREE)))
        return np.array([over_rows(u) for u in numbers]), probabilities


def distributions(sampler, denoiser=UNTRAINED):
    """The exact distribution of each row of TOKENS. Float[rows S^L]."""
    by_plan, probabilities = distributions_by_plan(sampler, denoiser)
    return np.einsum("n,nrs->rs", probabilities, by_plan)


def gap(left, right):
    return np.abs(left - right).max()


def completions(tokens, free):
    x0 = np.tile(tokens, (V ** free.sum(), 1))
    x0[:, free] = states(V, free.sum())
    return x0


def test_first_hitting_samples_decoding_in_random_order_exactly(float64):
    """For an inconsistent network, and any given tokens. Control: two tokens in one call."""
    likelihood = jax.jit(jax.vmap(functools.partial(subset_log_likelihood, PROCESS, UNTRAINED), (0, None)))
    due = np.zeros((len(TOKENS), (V + 1) ** L))
    for row, (tokens, free) in enumerate(zip(TOKENS, FREE, strict=True)):
        x0 = completions(tokens, free)
        due[row, index(x0, V + 1)] = np.exp(likelihood(x0, np.flatnonzero(free)))
    assert gap(distributions(FirstHitting(PROCESS)), due) < 1e-12
    assert gap(distributions(FixedCounts(PROCESS, (1, 2))), due) > 1e-2


def test_first_hitting_infills_exactly(joint):
    """With an exact Denoiser it samples the conditional given the tokens. Control: fewer calls do not."""
    rows, clean = FREE.any(-1) & (TOKENS < V).all(-1), index(states(V, L), V + 1)
    due = joint.conditional(TOKENS[rows], FREE[rows])
    denoiser = joint.denoiser(PROCESS)
    assert gap(distributions(FirstHitting(PROCESS), denoiser)[rows][:, clean], due) < 1e-12
    assert gap(distributions(FixedCounts(PROCESS, (1, 2)), denoiser)[rows][:, clean], due) > 1e-3


@pytest.mark.parametrize("steps", [2, 5])
def test_counts_has_the_distribution_of_tweedie(steps):
    """Exactly, with the network conditioned on the row's mask ratio in both. Control: Tweedie with one step more."""
    sampled, denoiser = distributions(Counts(PROCESS, SCHEDULE, steps)), condition_on_mask_ratio(PROCESS, UNTRAINED)

    def due(steps):
        tweedie = Tweedie(PROCESS, SCHEDULE, steps)
        return [sampler_distribution(tweedie, denoiser, *row) for row in zip(TOKENS, FREE, strict=True)]

    assert gap(sampled, due(steps)) < 1e-12 and gap(sampled, due(steps + 1)) > 1e-3


def by_hand(sizes):
    """The distribution of unmasking n free positions in calls of given sizes, mean over all orders. Float[rows S^L].

    sizes: for n = 0, 1, 2, ..., the number that each call unmasks.
    """
    p_rows = np.zeros((len(TOKENS), (V + 1) ** L))
    for row, (tokens, free) in enumerate(zip(TOKENS, FREE, strict=True)):
        orders = list(itertools.permutations(np.flatnonzero(free)))
        for x0, order in itertools.product(completions(tokens, free), orders):
            x, p, start = np.where(free, MASK, x0), 1.0, 0
            for size in sizes[len(order)]:
                at = list(order[start : start + size])
                p *= np.exp(table_log_clean(TABLE, x)[at, x0[at]].sum())
                x[at], start = x0[at], start + size
            p_rows[row, index(x0, V + 1)] += p / len(orders)
    return p_rows


def test_fixed_counts_has_the_distribution_of_its_counts():
    """Cumulative counts are round(fraction n), with n free positions in a row. Controls: other weights."""
    cuts = {
        (1, 2): [[], [1], [1, 1], [1, 2]],
        (3, 0, 1): [[], [1], [2], [2, 1]],  # 1.5 and 2.25 of the free
        (7,): [[], [1], [2], [3]],
    }
    due = {weights: by_hand(sizes) for weights, sizes in cuts.items()}
    for weights in cuts:
        gaps = {other: gap(distributions(FixedCounts(PROCESS, weights)), due[other]) for other in cuts}
        assert gaps.pop(weights) < 1e-12 and min(gaps.values()) > 1e-3


@pytest.mark.parametrize("kind", range(3))
def test_the_jitted_loop_samples_the_exact_distribution(kind):
    """The float32 production path, with different given tokens in each row. Control: the other samplers."""
    samplers = [FirstHitting(PROCESS), Counts(PROCESS, SCHEDULE, 2), FixedCounts(PROCESS, (1, 2))]
    repeats, sampler = 5_000, samplers[kind]
    tokens, free = np.tile(TOKENS, (repeats, 1)), np.tile(FREE, (repeats, 1))
    drawn, calls, _ = run(jax.random.key(0), UNTRAINED, sampler, tokens, free)
    assert calls == (3, 2, 2)[kind] and drawn.dtype == jnp.int32
    assert np.array_equal(np.where(free, tokens, drawn), tokens) and np.all(drawn[free] < MASK)
    cells = index(drawn, V + 1).reshape(repeats, -1) + (V + 1) ** L * np.arange(len(TOKENS))
    fits = [p_value(cells, distributions(other).ravel() / len(TOKENS)) for other in samplers]
    assert fits.pop(kind) > 1e-3 and max(fits) < 1e-6


# Plans, at a length at which calls evaluate fewer positions than all.

LENGTH = 24
LOGITS = np.random.default_rng(1).normal(size=(97, V))  # of a Denoiser that depends on all of a row, by hashing
PATTERNS = np.random.default_rng(0).random((40, LENGTH)) < np.linspace(0, 1, 40)[:, None]
PATTERNS[0], PATTERNS[-1] = False, True


@dataclasses.dataclass(frozen=True)
class Narrow(Counts):
    """Counts with a head of the given width, which must not change the tokens."""

    width: int = 1

    def head_width(self, length):
        return self.width


PLANNED = [
    FirstHitting(PROCESS),
    Counts(PROCESS, LogLinear(), 100),
    Narrow(PROCESS, Geometric(), 12, 2),
    FixedCounts(PROCESS, (1.0,) * 7),
    FixedCounts(PROCESS, (1.0,) * LENGTH),
    FixedCounts(PROCESS, cosine_unmasking(9)),
    FixedCounts(PROCESS, (0, 5, 0, 0, 1)),
]
KEYS = keyed_random.row_keys(jax.random.key(4), jnp.arange(len(PATTERNS)))


def where_chosen(call):
    """True where a call unmasks. Bool[K B L]."""
    chosen = np.asarray(call.chosen)
    if call.positions is None:
        return chosen
    assert np.all(np.diff(np.sort(call.positions)) > 0)  # distinct in a row
    everywhere = np.zeros((*chosen.shape[:2], LENGTH), bool)
    np.put_along_axis(everywhere, np.asarray(call.positions), chosen, axis=-1)
    return everywhere


@pytest.mark.parametrize("sampler", PLANNED, ids=lambda sampler: f"{type(sampler).__name__}")
def test_a_plan_unmasks_each_free_position_once(sampler):
    """In the order of the buckets, within the calls of `plan_shape`, without empty calls between others."""
    plan = jax.jit(lambda keys, free: (sampler.plan(keys, free), sampler.bucket(keys, free)))(KEYS, PATTERNS)
    plan, bucket = plan
    chosen = where_chosen(plan)
    assert np.array_equal(chosen.sum(0), PATTERNS)
    sizes = chosen.sum(-1)
    assert np.all((sizes[1:] == 0) | (sizes[:-1] > 0))
    calls, width = sampler.plan_shape(LENGTH)
    limits = {FirstHitting: LENGTH, FixedCounts: len(getattr(sampler, "weights", ()))}
    assert len(chosen) == calls <= min(limits.get(type(sampler), getattr(sampler, "steps", LENGTH)), LENGTH)
    assert sizes.max() <= width
    if isinstance(sampler, FixedCounts):
        assert sizes.max() == width and (sizes > 0).sum(0).max() == calls  # neither could be smaller
    for free, buckets, steps in zip(PATTERNS, np.asarray(bucket), chosen.swapaxes(0, 1), strict=True):
        numbers = np.unique(buckets[free], return_inverse=True)[1]
        assert np.array_equal(np.argmax(steps, axis=0)[free], numbers)


def test_buckets_have_the_probabilities_of_the_grid():
    """(alpha_{k+1} - alpha_k) / (1 - alpha_0) of an interval. Control: a grid even in the corruption probability."""
    steps, t = 9, np.linspace(1, 0, 10)
    sigma = np.array([*(0.1 * 20 ** t[:-1]), 0.0])
    due = np.diff(np.exp(-sigma)) / -np.expm1(-sigma[0])
    sampler, free = Counts(PROCESS, SCHEDULE, steps), jnp.ones((800, 10), bool)
    bucket = jax.jit(sampler.bucket)(keyed_random.row_keys(jax.random.key(0), jnp.arange(800)), free)
    np.testing.assert_allclose(-np.diff(sampler.p_masked()), due, rtol=1e-5)
    assert p_value(bucket, due) > 1e-3 and p_value(bucket, np.full(steps, 1 / steps)) < 1e-6
    fine = Counts(PROCESS, Geometric(1e-4, 20.0), 50)  # small probabilities near the end have full relative precision
    np.testing.assert_allclose(fine.p_masked()[-2], -np.expm1(-1e-4 * 2e5 ** (1 / 50)), rtol=1e-5)
    assert (
        Counts(PROCESS, LogLinear(), 7).head_width(4) == 4 and Counts(PROCESS, LogLinear(), 1024).head_width(1024) == 7
    )
    assert (
        Euler(PROCESS, Geometric(1e-3, 20.0), 2).head_width(1024)
        == 1024
        > Tweedie(PROCESS, Geometric(1e-3, 20.0), 2).head_width(1024)
    )


WIDTHS = []  # number of positions of each network call


def recording(x, sigma, positions=None):
    jax.debug.callback(lambda: WIDTHS.append(x.shape[1] if positions is None else positions.shape[1]))
    at = jnp.arange(LENGTH) if positions is None else positions
    hashes = (x @ jnp.arange(1, LENGTH + 1))[:, None] + 7 * at
    return jax.nn.log_softmax(jnp.asarray(LOGITS)[hashes % len(LOGITS)])


def drawn(sampler, rows, numbers=None):
    """Samples some rows of PATTERNS, with masks among the given tokens."""
    tokens = np.where(np.arange(LENGTH) % 3 == 2, MASK, 0) * np.ones((len(rows), 1), int)
    WIDTHS.clear()
    sampled = run(jax.random.key(0), recording, sampler, tokens, PATTERNS[rows], rows if numbers is None else numbers)
    jax.effects_barrier()
    assert np.array_equal(np.where(PATTERNS[rows], tokens, sampled.tokens), tokens)
    assert np.all(sampled.tokens[PATTERNS[rows]] < MASK)
    assert len(WIDTHS) == sampled.calls or (isinstance(sampler, Narrow) and len(WIDTHS) > sampled.calls)
    return np.asarray(sampled.tokens)


def test_a_row_draws_the_same_in_any_batch():
    """Bit for bit, by its global index. Control: the index within the batch gives other samples."""
    rows, mixed = np.arange(39, 24, -3), np.array([27, 36, 14, 3, 33])
    for sampler in (FixedCounts(PROCESS, cosine_unmasking(6)), Adaptive(PROCESS, EntropyBounded(0.5))):
        ordered, other = drawn(sampler, rows), drawn(sampler, mixed)
        assert np.array_equal(ordered[[4, 1, 2]], other[[0, 1, 4]])
        assert np.any(drawn(sampler, mixed, np.arange(5)) != other)


def test_counts_draws_the_same_tokens_at_any_head_width():
    """Where a row unmasks more than the width, the network is called again; the tokens are the same."""
    rows = np.arange(39, 24, -3)
    everywhere, narrow = (drawn(Narrow(PROCESS, SCHEDULE, 9, width), rows) for width in (LENGTH, 2))
    assert set(WIDTHS) == {2} and np.array_equal(narrow, everywhere)
    assert np.array_equal(drawn(Narrow(PROCESS, SCHEDULE, 9, 2), rows[::-1]), everywhere[::-1])


def test_no_more_calls_than_tokens_or_steps():
    """The row with the most free positions decides; without free positions there is no call."""
    free = PATTERNS.sum(-1)
    order, none = np.argsort(free, kind="stable")[[5, 4, 3, 2, 1]], np.zeros(5, int)
    for sampler in (FirstHitting(PROCESS), Counts(PROCESS, SCHEDULE, 9)):
        most_free = free[order].max()
        drawn(sampler, order)
        assert 0 < len(WIDTHS) <= most_free and (len(WIDTHS) == most_free or isinstance(sampler, Counts))
        drawn(sampler, none)
        assert not WIDTHS
        drawn(sampler, np.full(5, 39))
        assert len(WIDTHS) == LENGTH if isinstance(sampler, FirstHitting) else 2 < len(WIDTHS) <= 9


def test_invalid_samplers_are_refused():
    """A process without masks, invalid weights, no steps."""
    uniform = Uniform(V)
    refused = [
        (lambda: FirstHitting(uniform), "FirstHitting unmasks tokens: it needs the absorbing process"),
        (lambda: Counts(uniform, LogLinear(), 4), "needs the absorbing process"),
        (lambda: FixedCounts(uniform, (1,)), "needs the absorbing process"),
        (lambda: Counts(PROCESS, LogLinear(), 0), "at least one step"),
        *((functools.partial(FixedCounts, PROCESS, weights), "weights") for weights in ((), (0,), (2, -1), (np.nan,))),
    ]
    for make, message in refused:
        with pytest.raises(ValueError, match=message):
            make()


# Schedules


def parts(total, num_parts):
    """All compositions of a total into at most `num_parts` positive numbers."""
    if total == 0:
        yield ()
    elif num_parts:
        for first in range(1, total + 1):
            yield from ((first, *rest) for rest in parts(total - first, num_parts - 1))


@pytest.mark.parametrize("decreasing", [True, False])
def test_planned_counts_are_optimal(decreasing):
    """Among all compositions, for decreasing curves, as of exact models, and others; more calls never lose more."""
    for seed in range(5):
        h = np.random.default_rng(seed).exponential(size=7)
        h = -np.sort(-h) if decreasing else h
        plans = [plan_unmasking(h, calls) for calls in range(1, 8)]
        for calls, (counts, loss) in enumerate(plans, 1):
            assert sum(counts) == 7 and len(counts) <= calls and min(counts) > 0
            start = np.cumsum(counts) - counts
            np.testing.assert_allclose(loss, (np.dot(counts, h[start]) - h.sum()) / 7, atol=1e-12)
            np.testing.assert_allclose(loss, min(excess(h, other) for other in parts(7, calls)), atol=1e-12)
        losses = [loss for _, loss in plans]
        assert np.all(np.diff(losses) <= 1e-12)
        assert not decreasing or (plans[-1].counts == (1,) * 7 and abs(losses[-1]) < 1e-12 < 0.05 < losses[0])


def test_the_predicted_excess_is_the_divergence(joint, float64):
    """With an exact Denoiser: KL(p || the distribution given the order), mean over orders. Control: other counts."""
    denoiser, clean = joint.denoiser(PROCESS), states(V, L)
    h = np.zeros(L)
    for unmasked in itertools.product([False, True], repeat=L):
        masked, j = ~np.array(unmasked), sum(unmasked)
        log_r = np.asarray(denoiser(PROCESS.mask_tokens(clean, masked), jnp.ones(len(clean))))
        cost = -np.take_along_axis(log_r, clean[..., None], axis=-1)[..., 0]
        if j < L:
            h[j] += joint.p.ravel() @ cost @ masked / (L - j) / len(list(itertools.combinations(range(L), j)))

    def divergence(counts):
        by_plan, probabilities = distributions_by_plan(FixedCounts(PROCESS, counts), denoiser)
        ratio = np.log(joint.p.ravel() / by_plan[:, 0, index(clean, V + 1)])
        return probabilities @ (ratio @ joint.p.ravel()) / L

    choices = [(1, 2), (2, 1), (3,)]
    losses, exact = [excess(h, counts) for counts in choices], [divergence(counts) for counts in choices]
    np.testing.assert_allclose(losses, exact, atol=1e-12)
    assert min(losses) > 1e-3 and np.ptp(losses[:2]) > 1e-3
    assert plan_unmasking(h, 2).counts == choices[int(np.argmin(losses[:2]))]


def test_planned_counts_beat_even_and_cosine():
    """On a curve like a language model's; in a full block `FixedCounts` unmasks exactly the planned counts."""
    length, calls = 96, 12
    h = 1.6 + 6 * (1 - np.arange(length) / length) ** 4

    def loss(weights):
        after = np.round(np.cumsum(weights) / np.sum(weights) * length).astype(int)
        return excess(h, np.diff(after, prepend=0))

    planned = plan_unmasking(h, calls)
    assert 0 < 1.2 * planned.excess < min(loss((1,) * calls), loss(cosine_unmasking(calls)))
    sampler = FixedCounts(PROCESS, planned.counts)
    assert np.array_equal(sampler.num_unmasked(jnp.array(length)), np.cumsum(planned.counts)[:-1])
    assert sampler.plan_shape(length) == (calls, max(planned.counts))


def test_cosine_weights_follow_the_cosine():
    """The mask ratio after call k of K is cos(pi k / 2K); the first calls unmask the fewest tokens."""
    weights = cosine_unmasking(8)
    np.testing.assert_allclose(1 - np.cumsum(weights), np.cos(np.pi * np.arange(1, 9) / 16), atol=1e-12)
    assert weights[0] < weights[-1] / 5 and cosine_unmasking(1) == (1.0,)
    FixedCounts(PROCESS, weights)


def test_an_evaluations_profile_becomes_a_curve():
    """From the middles of its bins; bins without draws are ignored, and both ends are extrapolated."""

    def curve(corruption):
        return 2 + 5 * corruption

    level = ((np.arange(4000) + 0.5) / 4000)[None]
    bins = measured(level, np.ones_like(level), 40 * curve(level), np.array([40]), 40)
    due = curve((40 - np.arange(40) - 0.5) / 40)
    np.testing.assert_allclose(information(bins, 40), due, rtol=1e-3)
    bins[3]["nats_per_token"] = bins[-1]["nats_per_token"] = None
    np.testing.assert_allclose(information(bins, 40), due, rtol=1e-3)
    assert plan_unmasking(bins, 6, 40) == plan_unmasking(information(bins, 40), 6)
    assert np.array_equal(information(bins[:1], 4), [bins[0]["nats_per_token"]] * 4)


def test_invalid_profiles_and_calls_are_refused():
    """With a message of one line."""
    bins = [{"low": 0.0, "high": 1.0, "nats_per_token": None, "error": None}]
    refused = [
        (lambda: plan_unmasking([1.0, 0.5], 0), "calls must lie in 1 .. 2"),
        (lambda: plan_unmasking([1.0, 0.5], 3), "calls must lie in 1 .. 2"),
        (lambda: plan_unmasking([], 1), "nonempty"),
        (lambda: plan_unmasking([1.0, np.inf], 1), "finite"),
        (lambda: plan_unmasking([1.0, 0.5], 1, 3), "leave length out"),
        (lambda: plan_unmasking(bins, 1), "give the length"),
        (lambda: plan_unmasking(bins, 1, 4), "no measurement"),
        (lambda: excess([1.0, 0.5], (1, 2)), "sum to the 2 tokens"),
        (lambda: cosine_unmasking(0), "at least 1"),
    ]
    for make, message in refused:
        with pytest.raises(ValueError, match=message) as raised:
            make()
        assert "\n" not in str(raised.value)
