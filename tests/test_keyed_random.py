"""Random numbers: rare events have their probability, and noise depends on row and position only."""

import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from oracle import p_value

from sedd.diffusion import keyed_random
from sedd.diffusion.discrete.process import Absorbing, Jump
from sedd.diffusion.discrete.samplers import Tweedie, move
from sedd.diffusion.schedule import LogLinear

FAST = {"xla_backend_optimization_level": 3}  # other tests compile fast rather than run fast
if "xla_cpu_use_fusion_emitters" in os.environ["XLA_FLAGS"]:
    FAST["xla_cpu_use_fusion_emitters"] = True


def changes(draw, rows, here):
    """Number of draws, out of `rows` with a key each, that differ from `here`."""
    keys = keyed_random.row_keys(jax.random.key(0), jnp.arange(rows))
    run = jax.jit(lambda keys: jax.lax.map(draw, keys, batch_size=16), compiler_options=FAST)
    return int(jnp.sum(run(keys) != here))


@pytest.mark.slow
def test_a_rare_move_to_one_of_many_states_has_its_probability():
    """In two stages, in the accurate mode. Control: one float32 categorical of JAX's default mode does not have it."""
    states, mass, here = 50257, 1.25e-3, 300
    flat = jnp.zeros(states).at[here].set(-jnp.inf)
    log_p = jnp.full(states, jnp.log(mass / (states - 1))).at[here].set(jnp.log1p(-mass))

    def staged(key):
        return move(key[None], jnp.array([[here]]), Jump(jnp.array([[mass]]), flat[None, None]))[0, 0]

    def p(draw, rows):
        return scipy.stats.binomtest(changes(draw, rows, here), rows, mass).pvalue

    assert p(staged, 2**15) > 1e-3
    assert p(lambda key: keyed_random.categorical(key, log_p), 2**15) > 1e-3
    assert p(lambda key: jax.random.categorical(key, log_p), 2**13) < 1e-3


@pytest.mark.slow
def test_one_of_1024_steps_over_zipfian_words_has_its_probabilities():
    """The first of 1024 steps of Tweedie: the number of 1e6 masks that move, and the destinations of 2e4 moves.

    Controls: a probability to move 1.15 times as large, and weights raised to the power of 1.03.
    """
    process, x = Absorbing(50257), jnp.full((1, 1), 50257)
    log_r = jax.nn.log_softmax(-jnp.log(jnp.arange(1.0, process.vocab_size + 1)))
    sampler = Tweedie(process, LogLinear(), 1024)
    interval = jax.tree.map(lambda leaf: leaf[0], sampler.plan(None, None))
    jump = sampler.jump(log_r[None, None], x, interval)
    masked = -np.expm1(-np.asarray(LogLinear().sigma(np.array([1.0, 1023 / 1024])), np.float64))
    due = 2**20 * (1 - masked[1] / masked[0])

    def moved(rows, jump):
        """The words drawn at those of `rows` masks that move; the jump is an argument, shared by all draws."""
        keys = keyed_random.row_keys(jax.random.key(0), jnp.arange(rows))
        run = jax.jit(
            lambda keys, jump: jax.lax.map(lambda key: move(key[None], x, jump)[0, 0], keys, batch_size=512),
            compiler_options=FAST,
        )
        words = np.asarray(run(keys, jump))
        return words[words != process.mask_id]

    def entropy_error(jump):
        """The mean of -log p over 2e4 destinations minus the entropy, in standard errors."""
        log_p = np.asarray(log_r, np.float64)
        mean, square = (np.exp(log_p) @ (-log_p) ** power for power in (1, 2))
        nll = -log_p[moved(20_000, jump._replace(p_move=jnp.ones((1, 1))))]
        return abs(nll.mean() - mean) / ((square - mean**2) / 20_000) ** 0.5

    two_words = jump._replace(log_dest=jump.log_dest[..., :2])  # moves are drawn separately from destinations
    assert abs(len(moved(2**20, two_words)) - due) < 4 * due**0.5
    assert abs(len(moved(2**20, two_words._replace(p_move=1.15 * two_words.p_move))) - due) > 4 * due**0.5
    assert entropy_error(jump) < 4
    assert entropy_error(jump._replace(log_dest=1.03 * jump.log_dest)) > 4


@pytest.mark.slow
def test_the_rarest_events_have_their_probability():
    """JAX's default modes have no probability between 0 and 2^-23: 16 events instead of 2, and none instead of 10."""
    keys = keyed_random.row_keys(jax.random.key(0), jnp.arange(2**20))
    events = jax.jit(
        lambda keys, k: keyed_random.bernoulli(keyed_random.fold(keys, k), 2.0**-26).sum(), compiler_options=FAST
    )
    happened = sum(int(events(keys, k)) for k in range(128))
    assert scipy.stats.binomtest(happened, 2**27, 2.0**-26).pvalue > 1e-3
    states, mass, rows = 128 * 40_000, 1e-3, 10_000  # a block holds 2.5e-8
    log_p = jnp.full(states, jnp.log(mass / (states - 1))).at[7].set(jnp.log1p(-mass))
    moved = changes(lambda key: keyed_random.categorical(key, log_p), rows, 7)
    assert scipy.stats.binomtest(moved, rows, mass).pvalue > 1e-3


@pytest.mark.slow
def test_rare_words_have_their_probability():
    """1e6 draws from softmax(3.5 N(0, 1)) over 50257 words, in each decade of p from 1e-9 to 1e-6.

    Control: JAX's default mode over the words of one such decade and one state for all others.
    """
    logits = 3.5 * np.random.default_rng(0).standard_normal(50257)
    p = np.exp(logits - np.logaddexp.reduce(logits))
    decade = np.floor(np.log10(p)).astype(int)
    p_decade = np.array([p[decade == power].sum() for power in (-9, -8, -7)])

    def drawn(draw, log_weights, rows, at_once):
        """The log weights are an argument, so that terms that depend on them alone are computed once for all draws."""
        keys = keyed_random.row_keys(jax.random.key(0), jnp.arange(rows))
        run = jax.jit(
            lambda keys, weights: jax.lax.map(lambda key: draw(key, weights), keys, batch_size=at_once),
            compiler_options=FAST,
        )
        return np.asarray(run(keys, jnp.asarray(log_weights, jnp.float32)))

    words, rows = drawn(keyed_random.categorical, logits, 1_000_000, 512), 1_000_000
    seen = np.array([(decade[words] == power).sum() for power in (-9, -8, -7)])
    assert np.all(np.abs(seen - rows * p_decade) < 4 * (rows * p_decade) ** 0.5)
    condensed, rows = np.append(p[decade == -8], 1 - p_decade[1]), 2**16
    rare = (drawn(jax.random.categorical, np.log(condensed), rows, 64) < len(condensed) - 1).sum()
    assert scipy.stats.binomtest(int(rare), rows, p_decade[1], "less").pvalue < 1e-3  # 14 of 33


@pytest.mark.smoke
def test_categorical_samples_its_distribution():
    """Over three blocks of states, some of them impossible. Control: probabilities a tenth off."""
    rng = np.random.default_rng(0)
    log_weights = np.where(rng.random(300) < 0.2, -np.inf, 7 + rng.normal(size=300))  # not normalised
    p = np.exp(log_weights - np.logaddexp.reduce(log_weights))
    keys = keyed_random.row_keys(jax.random.key(0), jnp.arange(100_000))
    drawn = jax.jit(jax.vmap(keyed_random.categorical, in_axes=(0, None)))(keys, jnp.asarray(log_weights, jnp.float32))
    assert drawn.dtype == jnp.int32
    other = p * (1 + 0.1 * (-1) ** np.arange(300))
    assert p_value(drawn, p) > 1e-3
    assert p_value(drawn, other / other.sum()) < 1e-6


def test_bernoulli_is_exact_at_probabilities_zero_and_one():
    """An event of probability 1 always happens, one of probability 0 never, in any number of draws."""
    keys = keyed_random.row_keys(jax.random.key(0), jnp.arange(300_000)).reshape(-1, 3)
    happens = np.asarray(keyed_random.bernoulli(keys, jnp.array([0.0, 1e-3, 1.0]))).sum(0)
    assert happens[0] == 0 and happens[2] == len(keys)
    assert scipy.stats.binomtest(int(happens[1]), len(keys), 1e-3).pvalue > 1e-3
    assert scipy.stats.binomtest(int(happens[1]), len(keys), 2e-3).pvalue < 1e-6


@pytest.mark.parametrize("bits", [32, 64])
def test_uniform_has_full_precision_near_zero(bits):
    """Between the points of JAX's grid of 2^-23, or 2^-52. Control: JAX's own."""
    with jax.enable_x64(bits == 64):
        dtype = jnp.dtype(f"float{bits}")
        keys = keyed_random.row_keys(jax.random.key(0), jnp.arange(2**18))
        fine = np.asarray(keyed_random.uniform(keys, dtype))
        coarse = np.asarray(jax.vmap(lambda key: jax.random.uniform(key, dtype=dtype))(keys))
        grid = 2.0 ** -jnp.finfo(dtype).nmant
    assert fine.dtype == dtype and fine.max() < 1
    assert scipy.stats.kstest(fine, "uniform").pvalue > 1e-3
    assert np.all(np.abs(fine - coarse) <= grid)  # the same numbers, with more digits
    near = fine < 2.0**-8
    within = [np.float64(draw[near] / grid) % 1 for draw in (fine, coarse)]
    assert scipy.stats.kstest(within[0], "uniform").pvalue > 1e-3
    assert not np.any(within[1])


@pytest.mark.smoke
def test_noise_depends_on_row_and_position_only():
    """Keyed by the place in the batch, or among the chosen positions, a sample would depend on how it is computed."""
    rows, positions = jnp.array([7, 3, 11, 4]), jnp.array([5, 0, 2, 9])

    @jax.jit
    def noise(rows, positions):
        keys = keyed_random.position_keys(keyed_random.row_keys(jax.random.key(0), rows), positions)
        return keyed_random.uniform(keyed_random.fold(keys, 1))

    values = noise(rows, positions)
    assert len(np.unique(values)) == values.size
    assert np.array_equal(noise(rows[1:], positions[2:]), values[1:, 2:])


def test_ranks_are_a_uniformly_random_order():
    """All orders of the free positions are equally likely; given ones are last. Control: probabilities a tenth off."""
    free = jnp.tile(jnp.array([True, False, True, True]), (20_000, 1))
    ranks = np.asarray(keyed_random.ranks(keyed_random.row_keys(jax.random.key(0), jnp.arange(len(free))), free))
    assert np.all(ranks[:, 1] == 3)
    orders = np.array(list(itertools.permutations(range(3))))
    seen = np.argmax(np.all(ranks[:, None, [0, 2, 3]] == orders, axis=-1), axis=-1)
    assert np.array_equal(orders[seen], ranks[:, [0, 2, 3]])
    assert p_value(seen, np.full(6, 1 / 6)) > 1e-3
    assert p_value(seen, np.array([1.1, 0.9] * 3) / 6) < 1e-6


def test_kept_drops_each_entry_at_the_rate_independently():
    """No column has another rate, and no two columns are related; the share is exact. Control: another rate."""
    keys, rate = keyed_random.row_keys(jax.random.key(0), jnp.arange(64)), 0.1
    kept, share = keyed_random.kept(keys, rate, (41, 21))
    dropped = ~np.asarray(kept)
    assert dropped.shape == (64, 41, 21) and share == pytest.approx(1 - rate, abs=2**-17)
    error = np.sqrt(rate * (1 - rate) / (64 * 41))
    columns = dropped.mean((0, 1))
    assert np.abs(columns - (1 - share)).max() < 4.5 * error < np.abs(columns - 2 * rate).max()
    drawn = (dropped - (1 - share)).reshape(-1, 21) / np.sqrt(rate * (1 - rate))
    related = np.abs(drawn.T @ drawn)[np.triu_indices(21, 1)] / np.sqrt(len(drawn))
    assert related.max() < 4.5
    rows = (dropped - (1 - share)).reshape(64, -1) / np.sqrt(rate * (1 - rate))
    assert np.abs(rows @ rows.T)[np.triu_indices(64, 1)].max() < 5 * np.sqrt(rows.shape[1])
    assert keyed_random.kept(keys, 0.0, (3,))[0].all()
