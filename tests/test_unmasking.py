"""Adaptive samplers: the positions they pick, their distributions, and their exact likelihoods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import completions, index, p_value, random_tables, table_denoiser, table_log_clean

from sedd.diffusion.denoiser import condition_on_mask_ratio, edited, in_block, nucleus
from sedd.diffusion.discrete.pickers import Entropy, EntropyBounded, Margin
from sedd.diffusion.discrete.process import Absorbing, Uniform
from sedd.diffusion.discrete.unmasking import Adaptive
from sedd.diffusion.sampling import sample

V, L = 3, 3
PROCESS, MASK = Absorbing(V), V
TABLE = random_tables(1, L, seed=3)[0]  # with a seed for which all pickers differ
UNTRAINED = table_denoiser(TABLE)
PICKERS = [Margin(1), Margin(2), Entropy(1), Entropy(2), EntropyBounded(0.6)]
all_pickers = pytest.mark.parametrize("picker", PICKERS, ids=str)

# The given positions differ by row: none, one, two, one of them a mask that stays.
TOKENS = np.array([[0, 1, 2], [2, 0, 1], [1, 1, 0], [0, 2, 2], [MASK, 0, 2]])
FREE = np.array([[1, 1, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0], [0, 1, 1]], bool)

run = jax.jit(sample, static_argnames=("denoiser", "sampler"))
likelihood = jax.jit(Adaptive.log_likelihood, static_argnames=("self", "denoiser"))


ROWS = np.concatenate([completions(*row, V) for row in zip(TOKENS, FREE, strict=True)])
ROWS_FREE = np.repeat(FREE, V ** FREE.sum(-1), axis=0)
GROUPS = np.repeat(np.arange(len(FREE)), V ** FREE.sum(-1))


def log_likelihoods(picker, denoiser=UNTRAINED):
    """The log-likelihood of every completion of each row."""
    return np.asarray(likelihood(Adaptive(PROCESS, picker), denoiser, ROWS, ROWS_FREE))


@all_pickers
def test_the_likelihood_sums_to_one(picker, float64):
    """Over the free tokens, for any network, and whichever tokens are given or stay masked."""
    sums = np.bincount(GROUPS, np.exp(log_likelihoods(picker)))
    np.testing.assert_allclose(sums, 1, rtol=1e-12)


def certainty(picker, log_r):
    """The certainty of one position, written out."""
    p = np.sort(np.exp(log_r))
    return p[-1] - p[-2] if isinstance(picker, Margin) else np.sum(p * np.log(p))


def picked(picker, order, log_clean):
    """The positions that a picker picks, written out. order: positions, the most certain first."""
    count = picker.count
    if isinstance(picker, EntropyBounded):
        entropies = -np.sum(np.exp(log_clean) * log_clean, axis=-1)[order]
        sizes = range(count + 1, len(order) + 1)
        count = max([count, *(n for n in sizes if sum(entropies[:n]) - max(entropies[:n]) <= picker.gamma)])
    return order[:count]


def stepwise(picker, x0, free):
    """The log-likelihood, one call after the other, written out."""
    masked, total = set(np.flatnonzero(free)), 0.0
    while masked:
        x = np.where(np.isin(np.arange(L), list(masked)), MASK, x0)
        log_clean = table_log_clean(TABLE, x)
        chosen = picked(picker, sorted(masked, key=lambda i: -certainty(picker, log_clean[i])), log_clean)
        total += sum(log_clean[i, x0[i]] for i in chosen)
        masked -= set(chosen)
    return total


@all_pickers
def test_the_likelihood_is_that_of_the_picked_positions(picker, float64):
    """Against the likelihood written out, for every row. Control: that of the other pickers."""
    exact = [np.array([stepwise(kind, *row) for row in zip(ROWS, ROWS_FREE, strict=True)]) for kind in PICKERS]
    gaps = [np.abs(log_likelihoods(picker) - of_kind).max() for of_kind in exact]
    assert gaps.pop(PICKERS.index(picker)) < 1e-12
    assert min(gaps) > 1e-2


SLOW_PICKERS = [pytest.param(picker, marks=pytest.mark.slow) for picker in PICKERS[1:-1]]


@pytest.mark.parametrize("picker", [PICKERS[0], *SLOW_PICKERS, PICKERS[-1]], ids=str)
def test_the_jitted_loop_samples_the_distribution_of_the_likelihood(picker):
    """The float32 production path, with different given tokens in each row. Control: the other pickers."""
    repeats = 20_000
    tokens, free = np.tile(TOKENS, (repeats, 1)), np.tile(FREE, (repeats, 1))
    drawn, calls, _ = run(jax.random.key(0), UNTRAINED, Adaptive(PROCESS, picker), tokens, free)
    assert (calls <= L) if isinstance(picker, EntropyBounded) else (calls == -(-L // picker.count))
    assert np.array_equal(np.where(free, tokens, drawn), tokens) and np.all(drawn[free] < MASK)
    size = (V + 1) ** L
    cells = index(drawn, V + 1).reshape(repeats, -1) + size * np.arange(len(TOKENS))

    def fits(picker):
        p = np.zeros(size * len(TOKENS))
        p[index(ROWS, V + 1) + size * GROUPS] = np.exp(log_likelihoods(picker)) / len(TOKENS)
        return p_value(cells, p)

    assert fits(picker) > 1e-3
    assert max(fits(other) for other in PICKERS if other != picker) < 1e-6


@pytest.mark.smoke
def test_an_exact_denoiser_one_position_a_call_gives_the_exact_distribution(joint, float64):
    """In any order. Control: two tokens a call, which are drawn independently."""
    rows = GROUPS < 4  # the last has a mask that stays

    def gap(picker):
        return np.abs(log_likelihoods(picker, joint.denoiser(PROCESS)) + joint.nll(ROWS % V, ROWS_FREE))[rows].max()

    assert gap(Margin(1)) < 1e-12 and gap(Entropy(1)) < 1e-12
    assert gap(EntropyBounded(0.0)) < 1e-12
    assert min(gap(picker) for picker in (Margin(2), Entropy(2), EntropyBounded(1.0))) > 1e-2


def test_pickers_choose_the_most_certain():
    """By hand: the two orders differ, ties go to the first position, and unmasked positions do not count."""
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


def test_an_entropy_bounded_picker_takes_the_longest_prefix():
    """By hand: in order of entropy, all but the largest within gamma; at least `count`, and only masked positions."""
    p = jnp.array([[0.5, 0.5, 0.0, 0.0], [0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])
    log_clean = jnp.log(jnp.stack([p, p])).at[1, 2].set(jnp.nan)
    masked = jnp.array([[1, 1, 1, 1], [1, 1, 0, 1]], bool)  # entropies log 2 of 1, 2, 0 and 1
    bit = float(np.log(2))

    def chosen(picker):
        return [list(np.flatnonzero(row)) for row in jax.jit(picker)(log_clean, masked)]

    assert chosen(EntropyBounded(0.0)) == [
        [0, 2],
        [0],
    ]  # a certain position adds 0, and the largest entropy is not counted
    assert chosen(EntropyBounded(0.9 * bit)) == [[0, 2], [0]]
    assert chosen(EntropyBounded(1.1 * bit)) == [[0, 2, 3], [0, 3]]
    assert chosen(EntropyBounded(2.1 * bit)) == [[0, 1, 2, 3], [0, 1, 3]]
    assert chosen(EntropyBounded(0.0, 2)) == [[0, 2], [0, 3]] and chosen(EntropyBounded(0.0, 3))[0] == [0, 2, 3]
    assert not np.any(jax.jit(EntropyBounded(9.0))(log_clean, jnp.zeros_like(masked)))


def test_nan_from_the_network_ends_the_loop_and_is_returned():
    """An invalid network output shows in the likelihood; the loop does not hang."""

    def wrong(x, *_):
        return jnp.full((*x.shape, V), jnp.nan)

    for picker in (Margin(1), EntropyBounded(0.6)):
        assert np.all(np.isnan(likelihood(Adaptive(PROCESS, picker), wrong, TOKENS, FREE)))


def test_an_edited_denoiser_has_a_likelihood_that_sums_to_one(float64):
    """Tokens that top-p excludes have probability 0, and give NaN neither in a choice nor in the sum."""
    kept = edited(UNTRAINED, lambda log_clean: nucleus(log_clean, 0.6))
    for picker in (Margin(1), Entropy(2), EntropyBounded(0.6)):
        values = log_likelihoods(picker, kept)
        np.testing.assert_allclose(np.bincount(GROUPS, np.exp(values)), 1, rtol=1e-12)
        assert np.any(values == -np.inf) and not np.any(np.isnan(values))


def test_in_block_and_a_block_with_given_masks_draw_the_same(float64):
    """The same draws, likelihood and calls, for a network that does not depend on the noise.

    (The sampler conditions on the mask ratio of its own rows, which differ in length.)
    """
    table = random_tables(1, L + 1)[0]

    def ignores_noise(x, sigma, positions=None):
        return table_denoiser(table)(x, jnp.ones_like(sigma), positions)

    sampler, padded = Adaptive(PROCESS, Entropy(1)), in_block(ignores_noise, L + 1, MASK)
    short = np.tile(TOKENS, (80, 1)), np.tile(FREE, (80, 1))
    full = np.pad(short[0], ((0, 0), (0, 1)), constant_values=MASK), np.pad(short[1], ((0, 0), (0, 1)))
    drawn = run(jax.random.key(0), padded, sampler, *short)
    in_full = run(jax.random.key(0), ignores_noise, sampler, *full)
    assert np.array_equal(drawn.tokens, in_full.tokens[:, :L]) and np.all(in_full.tokens[:, L] == MASK)
    assert drawn.calls == in_full.calls == L
    log_likelihood = likelihood(sampler, padded, drawn.tokens, short[1])
    np.testing.assert_allclose(log_likelihood, likelihood(sampler, ignores_noise, in_full.tokens, full[1]), atol=1e-12)


def test_conditioned_on_the_mask_ratio_of_the_block_the_distribution_is_that_of_the_block():
    """Short rows inside `in_block`, scored in the full block. Control: the mask ratio of the short rows."""
    network, repeats = table_denoiser(random_tables(1, L + 1)[0]), 20_000
    sampler, padded = Adaptive(PROCESS, Entropy(1)), in_block(condition_on_mask_ratio(PROCESS, network), L + 1, MASK)
    short, free = completions(np.zeros(L, int), np.ones(L, bool), V), np.ones((V**L, L), bool)
    full = np.pad(short, ((0, 0), (0, 1)), constant_values=MASK), np.pad(free, ((0, 0), (0, 1)))
    drawn = run(jax.random.key(0), padded, sampler, np.zeros((repeats, L), int), np.ones((repeats, L), bool)).tokens
    due = np.exp(np.asarray(likelihood(sampler, network, *full)))
    other = np.exp(np.asarray(likelihood(sampler, in_block(network, L + 1, MASK), short, free)))
    assert p_value(index(drawn, V), due) > 1e-3 and p_value(index(drawn, V), other) < 1e-6


def test_the_likelihood_takes_as_many_calls_as_sampling():
    """As many as the row with the most free positions needs; none if nothing is free."""
    calls = []

    @jax.jit
    def counted(free):
        def denoiser(x, sigma, positions):
            jax.debug.callback(lambda: calls.append(x.shape))
            return UNTRAINED(x, sigma, positions)

        return Adaptive(PROCESS, Margin(2)).log_likelihood(denoiser, TOKENS, free)

    def num_calls(free):
        calls.clear()
        log_likelihood = counted(free).block_until_ready()
        jax.effects_barrier()
        return len(calls), log_likelihood

    assert num_calls(FREE)[0] == 2 and num_calls(FREE & (np.arange(L) < 2))[0] == 1
    none, log_likelihood = num_calls(np.zeros_like(FREE))
    assert none == 0 and np.all(log_likelihood == 0)


def test_positions_after_the_valid_length_do_not_count():
    """They do not count in the mask ratio."""
    padded, free = np.pad(ROWS[:27], ((0, 0), (0, 2))), np.pad(ROWS_FREE[:27], ((0, 0), (0, 2)))
    picker = Margin(1)

    def denoiser(x, sigma, positions):
        return jnp.pad(UNTRAINED(x[:, :L], sigma, positions), ((0, 0), (0, 2), (0, 0)))

    with_lengths = jax.jit(lambda n: Adaptive(PROCESS, picker).log_likelihood(denoiser, padded, free, n))(
        np.full(27, L)
    )
    np.testing.assert_allclose(with_lengths, log_likelihoods(picker)[:27], rtol=1e-5)


def test_equal_samplers_are_compiled_once():
    """They are static arguments of jit. Control: a sampler with another count compiles again."""
    traced = []

    def denoiser(x, sigma, positions):
        traced.append(x.shape)
        return UNTRAINED(x, sigma, positions)

    def num_traces(picker):
        traced.clear()
        run(jax.random.key(0), denoiser, Adaptive(Absorbing(V), picker), TOKENS, FREE)
        return len(traced)

    assert num_traces(Margin(1)) > 0 and num_traces(Margin(1)) == 0 and num_traces(Margin(2)) > 0
    assert Adaptive(PROCESS, Margin()) == Adaptive(Absorbing(3), Margin(1)) != Adaptive(PROCESS, Entropy(1))
    assert len({Adaptive(PROCESS, picker) for picker in PICKERS * 2}) == len(PICKERS)


def test_invalid_samplers_and_pickers_are_refused():
    """The uniform process has no masks; with a picker that picks nothing the loop would not end."""
    with pytest.raises(ValueError, match="needs the absorbing process"):
        Adaptive(Uniform(V), Margin(1))
    for refused in (lambda: Entropy(0), lambda: EntropyBounded(0.1, 0)):
        with pytest.raises(ValueError, match="count must be at least 1"):
            refused()
    for gamma in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="gamma must be at least 0"):
            EntropyBounded(gamma)
