"""Samplers that choose what to reveal as they go: their choices, their laws, and their own exact likelihoods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import answers, index, p_value, random_tables, states, untrained

from sedd.diffusion.pickers import Entropy, EntropyBounded, Margin
from sedd.diffusion.process import Absorbing, Uniform
from sedd.diffusion.samplers import sample
from sedd.diffusion.score import condition_on_mask_ratio, edited, in_block, nucleus
from sedd.diffusion.unmasking import Adaptive

V, L = 3, 3
PROCESS, MASK = Absorbing(V), V
TABLE = random_tables(1, L, seed=3)[0]  # of one in which all pickers differ
UNTRAINED = untrained(TABLE)
PICKERS = [Margin(1), Margin(2), Entropy(1), Entropy(2), EntropyBounded(0.6)]
all_pickers = pytest.mark.parametrize("picker", PICKERS, ids=str)

# Other given positions in each row of a batch: none, one, two, one of them a mask that stays.
TOKENS = np.array([[0, 1, 2], [2, 0, 1], [1, 1, 0], [0, 2, 2], [MASK, 0, 2]])
FREE = np.array([[1, 1, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0], [0, 1, 1]], bool)

run = jax.jit(sample, static_argnames=("denoiser", "sampler"))
likelihood = jax.jit(Adaptive.log_likelihood, static_argnames=("self", "denoiser"))


def completions(tokens, free):
    """Every way to fill in the free positions. Int[V^free L]."""
    x0 = np.tile(tokens, (V ** free.sum(), 1))
    x0[:, free] = states(V, free.sum())
    return x0


ROWS = np.concatenate([completions(*row) for row in zip(TOKENS, FREE, strict=True)])
ROWS_FREE = np.repeat(FREE, V ** FREE.sum(-1), axis=0)
GROUPS = np.repeat(np.arange(len(FREE)), V ** FREE.sum(-1))


def log_laws(picker, denoiser=UNTRAINED):
    """The log-likelihood of every completion of each row."""
    return np.asarray(likelihood(Adaptive(PROCESS, picker), denoiser, ROWS, ROWS_FREE))


@all_pickers
def test_the_likelihood_is_a_law(picker, float64):
    """It sums to one over what is free, whatever the network, and whatever else is given or stays masked."""
    sums = np.bincount(GROUPS, np.exp(log_laws(picker)))
    np.testing.assert_allclose(sums, 1, rtol=1e-12)


def certainty(picker, log_r):
    """How certain one position is, written out."""
    p = np.sort(np.exp(log_r))
    return p[-1] - p[-2] if isinstance(picker, Margin) else np.sum(p * np.log(p))


def first_of(picker, order, log_clean):
    """How many of the most certain positions are taken, written out."""
    count = picker.count
    if isinstance(picker, EntropyBounded):
        entropies = -np.sum(np.exp(log_clean) * log_clean, axis=-1)[order]
        sizes = range(count + 1, len(order) + 1)
        count = max([count, *(n for n in sizes if sum(entropies[:n]) - max(entropies[:n]) <= picker.gamma)])
    return order[:count]


def walked(picker, x0, free):
    """The log-likelihood by hand: ask, choose, be told, one call after the other."""
    hidden, total = set(np.flatnonzero(free)), 0.0
    while hidden:
        x = np.where(np.isin(np.arange(L), list(hidden)), MASK, x0)
        log_clean = answers(TABLE, x)
        chosen = first_of(picker, sorted(hidden, key=lambda i: -certainty(picker, log_clean[i])), log_clean)
        total += sum(log_clean[i, x0[i]] for i in chosen)
        hidden -= set(chosen)
    return total


@all_pickers
def test_the_likelihood_is_that_of_its_choices(picker, float64):
    """Every row walked by hand. Control: the walks of the other pickers."""
    laws = [np.array([walked(kind, *row) for row in zip(ROWS, ROWS_FREE, strict=True)]) for kind in PICKERS]
    gaps = [np.abs(log_laws(picker) - law).max() for law in laws]
    assert gaps.pop(PICKERS.index(picker)) < 1e-12
    assert min(gaps) > 1e-2


@all_pickers
def test_the_jitted_loop_draws_the_law_of_the_likelihood(picker):
    """The float32 production path, given other tokens in each row. Control: the laws of the other pickers."""
    repeats = 20_000
    tokens, free = np.tile(TOKENS, (repeats, 1)), np.tile(FREE, (repeats, 1))
    drawn, calls, _ = run(jax.random.key(0), UNTRAINED, Adaptive(PROCESS, picker), tokens, free)
    assert (calls <= L) if isinstance(picker, EntropyBounded) else (calls == -(-L // picker.count))
    assert np.array_equal(np.where(free, tokens, drawn), tokens) and np.all(drawn[free] < MASK)
    size = (V + 1) ** L
    cells = index(drawn, V + 1).reshape(repeats, -1) + size * np.arange(len(TOKENS))

    def fits(picker):
        law = np.zeros(size * len(TOKENS))
        law[index(ROWS, V + 1) + size * GROUPS] = np.exp(log_laws(picker)) / len(TOKENS)
        return p_value(cells, law)

    assert fits(picker) > 1e-3
    assert max(fits(other) for other in PICKERS if other != picker) < 1e-6


def test_an_exact_denoiser_one_position_a_call_gives_the_law(joint, float64):
    """Whatever the order. Control: two tokens a call are drawn as if they did not depend on each other."""
    rows = GROUPS < 4  # the last holds a mask that stays

    def gap(picker):
        return np.abs(log_laws(picker, joint.denoiser(PROCESS)) + joint.surprise(ROWS % V, ROWS_FREE))[rows].max()

    assert gap(Margin(1)) < 1e-12 and gap(Entropy(1)) < 1e-12
    assert gap(EntropyBounded(0.0)) < 1e-12
    assert min(gap(picker) for picker in (Margin(2), Entropy(2), EntropyBounded(1.0))) > 1e-2


def test_pickers_choose_the_most_certain():
    """By hand: the two orders differ, ties go to the first position, and what is not masked does not count."""
    p = jnp.array([[0.5, 0.5, 0.0], [0.62, 0.37, 0.01], [0.46, 0.27, 0.27], [0.46, 0.27, 0.27], [0.0, 1.0, 0.0]])
    log_clean = jnp.log(jnp.stack([p, p, p, p[::-1], p[::-1]])).at[1, 4].set(jnp.nan)
    masked = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0, 0, 1, 1, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool)

    def chosen(picker):
        return [list(np.flatnonzero(row)) for row in jax.jit(picker)(log_clean, masked)]

    # Differences 0, .25, .19, .19, 1 (ratios would rank them otherwise); entropies .69, .71, 1.06, 1.06, 0.
    assert chosen(Margin(1)) == [[4], [1], [2], [0], []]
    assert chosen(Margin(2)) == [[1, 4], [1, 2], [2, 3], [0, 1], []]
    assert chosen(Margin(3)) == [[1, 2, 4], [1, 2, 3], [2, 3], [0, 1, 2], []]
    assert chosen(Entropy(1)) == [[4], [0], [2], [0], []]
    assert chosen(Entropy(2)) == [[0, 4], [0, 1], [2, 3], [0, 1], []]
    assert chosen(Entropy(9)) == [[0, 1, 2, 3, 4], [0, 1, 2, 3], [2, 3], [0, 1, 2], []]


def test_a_bounded_picker_takes_the_largest_prefix():
    """By hand: in order of entropy, all but the largest within gamma; at least `count`, and only what is masked."""
    halves = jnp.array([[0.5, 0.5, 0.0, 0.0], [0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])
    log_clean = jnp.log(jnp.stack([halves, halves])).at[1, 2].set(jnp.nan)
    masked = jnp.array([[1, 1, 1, 1], [1, 1, 0, 1]], bool)  # entropies log 2 of 1, 2, 0 and 1
    bit = float(np.log(2))

    def chosen(picker):
        return [list(np.flatnonzero(row)) for row in jax.jit(picker)(log_clean, masked)]

    assert chosen(EntropyBounded(0.0)) == [[0, 2], [0]]  # one that is certain costs nothing, nor does the largest
    assert chosen(EntropyBounded(0.9 * bit)) == [[0, 2], [0]]
    assert chosen(EntropyBounded(1.1 * bit)) == [[0, 2, 3], [0, 3]]
    assert chosen(EntropyBounded(2.1 * bit)) == [[0, 1, 2, 3], [0, 1, 3]]
    assert chosen(EntropyBounded(0.0, 2)) == [[0, 2], [0, 3]] and chosen(EntropyBounded(0.0, 3))[0] == [0, 2, 3]
    assert not np.any(jax.jit(EntropyBounded(9.0))(log_clean, jnp.zeros_like(masked)))


def test_what_is_no_number_ends_the_loop():
    """A network gone wrong is to be seen in the likelihood, not to hang."""

    def wrong(x, *_):
        return jnp.full((*x.shape, V), jnp.nan)

    for picker in (Margin(1), EntropyBounded(0.6)):
        assert np.all(np.isnan(likelihood(Adaptive(PROCESS, picker), wrong, TOKENS, FREE)))


def test_a_reshaped_opinion_keeps_its_likelihood(float64):
    """What top-p rules out has no chance, and spoils neither a choice nor the sum."""
    kept = edited(UNTRAINED, lambda log_clean: nucleus(log_clean, 0.6))
    for picker in (Margin(1), Entropy(2), EntropyBounded(0.6)):
        found = log_laws(picker, kept)
        np.testing.assert_allclose(np.bincount(GROUPS, np.exp(found)), 1, rtol=1e-12)
        assert np.any(found == -np.inf) and not np.any(np.isnan(found))


def test_work_in_a_longer_block(float64):
    """Cut to what is free, or with the block's masks given: the same draws, likelihood and calls.

    For a network that is not told the noise; what is told is the share of masks in the row as the sampler has it.
    """
    table = random_tables(1, L + 1)[0]

    def blind(x, sigma, positions=None):
        return untrained(table)(x, jnp.ones_like(sigma), positions)

    sampler, cut = Adaptive(PROCESS, Entropy(1)), in_block(blind, L + 1, MASK)
    short = np.tile(TOKENS, (80, 1)), np.tile(FREE, (80, 1))
    whole = np.pad(short[0], ((0, 0), (0, 1)), constant_values=MASK), np.pad(short[1], ((0, 0), (0, 1)))
    drawn = run(jax.random.key(0), cut, sampler, *short)
    in_whole = run(jax.random.key(0), blind, sampler, *whole)
    assert np.array_equal(drawn.tokens, in_whole.tokens[:, :L]) and np.all(in_whole.tokens[:, L] == MASK)
    assert drawn.calls == in_whole.calls == L
    found = likelihood(sampler, cut, drawn.tokens, short[1])
    np.testing.assert_allclose(found, likelihood(sampler, blind, in_whole.tokens, whole[1]), atol=1e-12)


def test_a_network_told_the_share_of_its_block_draws_the_law_of_the_whole_block():
    """Work cut to what is free, scored in the block that holds it. Control: told the share of the short text."""
    network, repeats = untrained(random_tables(1, L + 1)[0]), 20_000
    sampler, cut = Adaptive(PROCESS, Entropy(1)), in_block(condition_on_mask_ratio(PROCESS, network), L + 1, MASK)
    short, free = completions(np.zeros(L, int), np.ones(L, bool)), np.ones((V**L, L), bool)
    whole = np.pad(short, ((0, 0), (0, 1)), constant_values=MASK), np.pad(free, ((0, 0), (0, 1)))
    drawn = run(jax.random.key(0), cut, sampler, np.zeros((repeats, L), int), np.ones((repeats, L), bool)).tokens
    law = np.exp(np.asarray(likelihood(sampler, network, *whole)))
    other = np.exp(np.asarray(likelihood(sampler, in_block(network, L + 1, MASK), short, free)))
    assert p_value(index(drawn, V), law) > 1e-3 and p_value(index(drawn, V), other) < 1e-6


def test_the_likelihood_takes_a_call_a_round():
    """As many as the row with the most to reveal; none where nothing is free."""
    calls = []

    @jax.jit
    def counted(free):
        def denoiser(x, sigma, positions):
            jax.debug.callback(lambda: calls.append(x.shape))
            return UNTRAINED(x, sigma, positions)

        return Adaptive(PROCESS, Margin(2)).log_likelihood(denoiser, TOKENS, free)

    def taken(free):
        calls.clear()
        found = counted(free).block_until_ready()
        jax.effects_barrier()
        return len(calls), found

    assert taken(FREE)[0] == 2 and taken(FREE & (np.arange(L) < 2))[0] == 1
    none, found = taken(np.zeros_like(FREE))
    assert none == 0 and np.all(found == 0)


def test_a_valid_length_is_told():
    """What follows it is not counted into the share of masked tokens."""
    padded, free = np.pad(ROWS[:27], ((0, 0), (0, 2))), np.pad(ROWS_FREE[:27], ((0, 0), (0, 2)))
    picker = Margin(1)

    def denoiser(x, sigma, positions):
        return jnp.pad(UNTRAINED(x[:, :L], sigma, positions), ((0, 0), (0, 2), (0, 0)))

    told = jax.jit(lambda n: Adaptive(PROCESS, picker).log_likelihood(denoiser, padded, free, n))(np.full(27, L))
    np.testing.assert_allclose(told, log_laws(picker)[:27], rtol=1e-5)


def test_equal_samplers_are_compiled_once():
    """They are static arguments of jit. Control: another count is another sampler."""
    traced = []

    def denoiser(x, sigma, positions):
        traced.append(x.shape)
        return UNTRAINED(x, sigma, positions)

    def times(picker):
        traced.clear()
        run(jax.random.key(0), denoiser, Adaptive(Absorbing(V), picker), TOKENS, FREE)
        return len(traced)

    assert times(Margin(1)) > 0 and times(Margin(1)) == 0 and times(Margin(2)) > 0
    assert Adaptive(PROCESS, Margin()) == Adaptive(Absorbing(3), Margin(1)) != Adaptive(PROCESS, Entropy(1))
    assert len({Adaptive(PROCESS, picker) for picker in PICKERS * 2}) == len(PICKERS)


def test_what_cannot_work_is_refused():
    """A uniform process has no masks to reveal; a picker that picks nothing would never end."""
    with pytest.raises(ValueError, match="needs the absorbing process"):
        Adaptive(Uniform(V), Margin(1))
    for refused in (lambda: Entropy(0), lambda: EntropyBounded(0.1, 0)):
        with pytest.raises(ValueError, match="count must be at least 1"):
            refused()
    for gamma in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="gamma must be at least 0"):
            EntropyBounded(gamma)
