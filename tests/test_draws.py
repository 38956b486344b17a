"""The draws: rare events get their share, and noise belongs to a row and a position."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from oracle import p_value

from sedd.diffusion import draws
from sedd.diffusion.process import Jump
from sedd.diffusion.samplers import move

FAST = {"xla_backend_optimization_level": 3}  # other tests compile fast rather than run fast


def changes(draw, rows, here):
    """How many of so many draws, each with its own key, are not `here`."""
    keys = draws.row_keys(jax.random.key(0), jnp.arange(rows))
    run = jax.jit(lambda keys: jax.lax.map(draw, keys, batch_size=16), compiler_options=FAST)
    return int(jnp.sum(run(keys) != here))


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
    assert p(lambda key: draws.categorical(key, whole), 2**15) > 1e-3
    assert p(lambda key: jax.random.categorical(key, whole), 2**13) < 1e-3


@pytest.mark.slow
def test_the_rarest_events_get_their_share():
    """JAX's default modes know no probability between 0 and 2^-23: 32 in place of 4, and none in place of 15."""
    keys = draws.row_keys(jax.random.key(0), jnp.arange(2**20))
    happened = sum(int(draws.bernoulli(draws.fold(keys, k), 2.0**-26).sum()) for k in range(256))
    assert scipy.stats.binomtest(happened, 2**28, 2.0**-26).pvalue > 1e-3
    states, mass, rows = 128 * 40_000, 1e-3, 15_000  # a block holds 2.5e-8
    whole = jnp.full(states, jnp.log(mass / (states - 1))).at[7].set(jnp.log1p(-mass))
    moved = changes(lambda key: draws.categorical(key, whole), rows, 7)
    assert scipy.stats.binomtest(moved, rows, mass).pvalue > 1e-3


def test_categorical_follows_the_law():
    """Over three blocks of states, some of them impossible. Control: a law a tenth off."""
    rng = np.random.default_rng(0)
    log_weights = np.where(rng.random(300) < 0.2, -np.inf, 7 + rng.normal(size=300))  # not normalised
    law = np.exp(log_weights - np.logaddexp.reduce(log_weights))
    keys = draws.row_keys(jax.random.key(0), jnp.arange(100_000))
    drawn = jax.jit(jax.vmap(draws.categorical, in_axes=(0, None)))(keys, jnp.asarray(log_weights, jnp.float32))
    assert drawn.dtype == jnp.int32
    other = law * (1 + 0.1 * (-1) ** np.arange(300))
    assert p_value(drawn, law) > 1e-3
    assert p_value(drawn, other / other.sum()) < 1e-6


def test_bernoulli_keeps_the_ends():
    """What is certain always happens and what is impossible never does, however often it is tried."""
    keys = draws.row_keys(jax.random.key(0), jnp.arange(300_000)).reshape(-1, 3)
    happens = np.asarray(draws.bernoulli(keys, jnp.array([0.0, 1e-3, 1.0]))).sum(0)
    assert happens[0] == 0 and happens[2] == len(keys)
    assert scipy.stats.binomtest(int(happens[1]), len(keys), 1e-3).pvalue > 1e-3
    assert scipy.stats.binomtest(int(happens[1]), len(keys), 2e-3).pvalue < 1e-6


def test_noise_belongs_to_row_and_position():
    """Keyed by slot in the batch, or among the positions asked for, a sample would depend on how it was computed."""
    rows, positions = jnp.array([7, 3, 11, 4]), jnp.array([5, 0, 2, 9])

    @jax.jit
    def noise(rows, positions):
        return draws.uniform(draws.fold(draws.sites(draws.row_keys(jax.random.key(0), rows), positions), 1))

    whole = noise(rows, positions)
    assert len(np.unique(whole)) == whole.size
    assert np.array_equal(noise(rows[1:], positions[2:]), whole[1:, 2:])


def test_ranks_are_a_uniformly_random_order():
    """Every order of the free positions is as likely, and given ones come last. Control: a law a tenth off."""
    free = jnp.tile(jnp.array([True, False, True, True]), (20_000, 1))
    ranks = np.asarray(draws.ranks(draws.row_keys(jax.random.key(0), jnp.arange(len(free))), free))
    assert np.all(ranks[:, 1] == 3)
    orders = np.array(list(itertools.permutations(range(3))))
    seen = np.argmax(np.all(ranks[:, None, [0, 2, 3]] == orders, axis=-1), axis=-1)
    assert np.array_equal(orders[seen], ranks[:, [0, 2, 3]])
    assert p_value(seen, np.full(6, 1 / 6)) > 1e-3
    assert p_value(seen, np.array([1.1, 0.9] * 3) / 6) < 1e-6
