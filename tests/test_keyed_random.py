"""The draws: rare events get their share, and noise belongs to a row and a position."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from oracle import p_value

from sedd.diffusion import keyed_random
from sedd.diffusion.process import Absorbing, Jump
from sedd.diffusion.samplers import Tweedie, move
from sedd.diffusion.schedule import LogLinear

FAST = {"xla_backend_optimization_level": 3}  # other tests compile fast rather than run fast


def changes(draw, rows, here):
    """How many of so many draws, each with its own key, are not `here`."""
    keys = keyed_random.row_keys(jax.random.key(0), jnp.arange(rows))
    run = jax.jit(lambda keys: jax.lax.map(draw, keys, batch_size=16), compiler_options=FAST)
    return int(jnp.sum(run(keys) != here))


@pytest.mark.slow
def test_a_rare_move_to_one_of_many_states_gets_its_share():
    """Two stages, in the accurate mode, draw it. Control: one float32 categorical of JAX's default mode does not."""
    states, mass, here = 50257, 1.25e-3, 300
    flat = jnp.zeros(states).at[here].set(-jnp.inf)
    whole = jnp.full(states, jnp.log(mass / (states - 1))).at[here].set(jnp.log1p(-mass))

    def staged(key):
        return move(key[None], jnp.array([[here]]), Jump(jnp.array([[mass]]), flat[None, None]))[0, 0]

    def p(draw, rows):
        return scipy.stats.binomtest(changes(draw, rows, here), rows, mass).pvalue

    assert p(staged, 2**15) > 1e-3
    assert p(lambda key: keyed_random.categorical(key, whole), 2**15) > 1e-3
    assert p(lambda key: jax.random.categorical(key, whole), 2**13) < 1e-3


@pytest.mark.slow
def test_one_step_of_many_among_zipfs_words():
    """The first of 1024 steps of Tweedie: how many of 1e6 masks move, and where 2e4 go that do.

    Controls: a chance to move 1.15 times as large, and a law whose weights are raised to the power of 1.03.
    """
    process, x = Absorbing(50257), jnp.full((1, 1), 50257)
    log_r = jax.nn.log_softmax(-jnp.log(jnp.arange(1.0, process.vocab_size + 1)))
    sampler = Tweedie(process, LogLinear(), 1024)
    interval = jax.tree.map(lambda leaf: leaf[0], sampler.plan(None, None))
    jump = sampler.jump(log_r[None, None], x, interval)
    kept = -np.expm1(-np.asarray(LogLinear().sigma(np.array([1.0, 1023 / 1024])), np.float64))
    due = 2**20 * (1 - kept[1] / kept[0])

    def moved(rows, jump):
        """The words at masks that moved, of so many; the jump is an argument, for many draws one."""
        keys = keyed_random.row_keys(jax.random.key(0), jnp.arange(rows))
        run = jax.jit(
            lambda keys, jump: jax.lax.map(lambda key: move(key[None], x, jump)[0, 0], keys, batch_size=512),
            compiler_options=FAST,
        )
        words = np.asarray(run(keys, jump))
        return words[words != process.mask]

    def surprise(jump):
        """The mean of -log p over 2e4 destinations, in standard errors from the entropy."""
        log_p = np.asarray(log_r, np.float64)
        mean, square = (np.exp(log_p) @ (-log_p) ** power for power in (1, 2))
        found = -log_p[moved(20_000, jump._replace(p_move=jnp.ones((1, 1))))]
        return abs(found.mean() - mean) / ((square - mean**2) / 20_000) ** 0.5

    few = jump._replace(log_dest=jump.log_dest[..., :2])  # whether a token moves is drawn apart from where to
    assert abs(len(moved(2**20, few)) - due) < 4 * due**0.5
    assert abs(len(moved(2**20, few._replace(p_move=1.15 * few.p_move))) - due) > 4 * due**0.5
    assert surprise(jump) < 4
    assert surprise(jump._replace(log_dest=1.03 * jump.log_dest)) > 4


@pytest.mark.slow
def test_the_rarest_events_get_their_share():
    """JAX's default modes know no probability between 0 and 2^-23: 32 in place of 4, and none in place of 15."""
    keys = keyed_random.row_keys(jax.random.key(0), jnp.arange(2**20))
    happened = sum(int(keyed_random.bernoulli(keyed_random.fold(keys, k), 2.0**-26).sum()) for k in range(256))
    assert scipy.stats.binomtest(happened, 2**28, 2.0**-26).pvalue > 1e-3
    states, mass, rows = 128 * 40_000, 1e-3, 15_000  # a block holds 2.5e-8
    whole = jnp.full(states, jnp.log(mass / (states - 1))).at[7].set(jnp.log1p(-mass))
    moved = changes(lambda key: keyed_random.categorical(key, whole), rows, 7)
    assert scipy.stats.binomtest(moved, rows, mass).pvalue > 1e-3


@pytest.mark.slow
def test_rare_words_get_their_share():
    """Of 4e6 draws from softmax(3.5 N(0, 1)) over 50257 words, in each decade of p from 1e-9 to 1e-6.

    Control: JAX's default mode over the words of one such decade and the rest, taken together.
    """
    logits = 3.5 * np.random.default_rng(0).standard_normal(50257)
    p = np.exp(logits - np.logaddexp.reduce(logits))
    decade = np.floor(np.log10(p)).astype(int)
    p_decade = np.array([p[decade == power].sum() for power in (-9, -8, -7)])

    def drawn(draw, log_weights, rows, at_once):
        """The log weights are an argument, so that what depends on them alone is worked out once for many draws."""
        keys = keyed_random.row_keys(jax.random.key(0), jnp.arange(rows))
        run = jax.jit(
            lambda keys, weights: jax.lax.map(lambda key: draw(key, weights), keys, batch_size=at_once),
            compiler_options=FAST,
        )
        return np.asarray(run(keys, jnp.asarray(log_weights, jnp.float32)))

    words, rows = drawn(keyed_random.categorical, logits, 4_000_000, 512), 4_000_000
    seen = np.array([(decade[words] == power).sum() for power in (-9, -8, -7)])
    assert np.all(np.abs(seen - rows * p_decade) < 4 * (rows * p_decade) ** 0.5)
    condensed, rows = np.append(p[decade == -8], 1 - p_decade[1]), 2**16
    rare = (drawn(jax.random.categorical, np.log(condensed), rows, 64) < len(condensed) - 1).sum()
    assert scipy.stats.binomtest(int(rare), rows, p_decade[1], "less").pvalue < 1e-3  # 14 of 33


def test_categorical_follows_the_law():
    """Over three blocks of states, some of them impossible. Control: a law a tenth off."""
    rng = np.random.default_rng(0)
    log_weights = np.where(rng.random(300) < 0.2, -np.inf, 7 + rng.normal(size=300))  # not normalised
    law = np.exp(log_weights - np.logaddexp.reduce(log_weights))
    keys = keyed_random.row_keys(jax.random.key(0), jnp.arange(100_000))
    drawn = jax.jit(jax.vmap(keyed_random.categorical, in_axes=(0, None)))(keys, jnp.asarray(log_weights, jnp.float32))
    assert drawn.dtype == jnp.int32
    other = law * (1 + 0.1 * (-1) ** np.arange(300))
    assert p_value(drawn, law) > 1e-3
    assert p_value(drawn, other / other.sum()) < 1e-6


def test_bernoulli_keeps_the_ends():
    """What is certain always happens and what is impossible never does, however often it is tried."""
    keys = keyed_random.row_keys(jax.random.key(0), jnp.arange(300_000)).reshape(-1, 3)
    happens = np.asarray(keyed_random.bernoulli(keys, jnp.array([0.0, 1e-3, 1.0]))).sum(0)
    assert happens[0] == 0 and happens[2] == len(keys)
    assert scipy.stats.binomtest(int(happens[1]), len(keys), 1e-3).pvalue > 1e-3
    assert scipy.stats.binomtest(int(happens[1]), len(keys), 2e-3).pvalue < 1e-6


@pytest.mark.parametrize("bits", [32, 64])
def test_uniform_is_fine_near_zero(bits):
    """What JAX's grid of 2^-23, or 2^-52, leaves out of the draws near 0. Control: JAX's own."""
    with jax.enable_x64(bits == 64):
        dtype = jnp.dtype(f"float{bits}")
        keys = keyed_random.row_keys(jax.random.key(0), jnp.arange(2**18))
        fine = np.asarray(keyed_random.uniform(keys, dtype))
        coarse = np.asarray(jax.vmap(lambda key: jax.random.uniform(key, dtype=dtype))(keys))
        grid = 2.0 ** -jnp.finfo(dtype).nmant
    assert fine.dtype == dtype and fine.max() < 1
    assert scipy.stats.kstest(fine, "uniform").pvalue > 1e-3
    assert np.all(np.abs(fine - coarse) <= grid)  # the same draws, further on
    near = fine < 2.0**-8
    within = [np.float64(draw[near] / grid) % 1 for draw in (fine, coarse)]
    assert scipy.stats.kstest(within[0], "uniform").pvalue > 1e-3
    assert not np.any(within[1])


def test_noise_belongs_to_row_and_position():
    """Keyed by slot in the batch, or among the positions asked for, a sample would depend on how it was computed."""
    rows, positions = jnp.array([7, 3, 11, 4]), jnp.array([5, 0, 2, 9])

    @jax.jit
    def noise(rows, positions):
        return keyed_random.uniform(
            keyed_random.fold(keyed_random.position_keys(keyed_random.row_keys(jax.random.key(0), rows), positions), 1)
        )

    whole = noise(rows, positions)
    assert len(np.unique(whole)) == whole.size
    assert np.array_equal(noise(rows[1:], positions[2:]), whole[1:, 2:])


def test_ranks_are_a_uniformly_random_order():
    """Every order of the free positions is as likely, and given ones come last. Control: a law a tenth off."""
    free = jnp.tile(jnp.array([True, False, True, True]), (20_000, 1))
    ranks = np.asarray(keyed_random.ranks(keyed_random.row_keys(jax.random.key(0), jnp.arange(len(free))), free))
    assert np.all(ranks[:, 1] == 3)
    orders = np.array(list(itertools.permutations(range(3))))
    seen = np.argmax(np.all(ranks[:, None, [0, 2, 3]] == orders, axis=-1), axis=-1)
    assert np.array_equal(orders[seen], ranks[:, [0, 2, 3]])
    assert p_value(seen, np.full(6, 1 / 6)) > 1e-3
    assert p_value(seen, np.array([1.1, 0.9] * 3) / 6) < 1e-6
