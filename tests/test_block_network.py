"""Networks of blocks: what they see, their losses against enumerated ones, evaluation, windows, and the config."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from oracle import by_time, gap, row_keys, states
from small import model_of, name_of, parts, small_config, small_corpus

from sedd import config as configs
from sedd.data.batches import Batch, batch
from sedd.diffusion.discrete.likelihood import DiscreteTimeBound, MaskCountBound, TimeLoss
from sedd.diffusion.discrete.process import Absorbing, Uniform
from sedd.diffusion.schedule import LogLinear
from sedd.errors import UserError
from sedd.generation.rows import windows
from sedd.network.block_network import AutoregressiveNetwork, BlockNetwork
from sedd.network.token_network import TokenNetwork
from sedd.network.trunk import Trunk, scanned
from sedd.recipes import BLOCKS, RECIPES, kind_of
from sedd.runtime import parallel
from sedd.training.score_entropy import ScoreEntropy
from sedd.training.step import init_state, make_step


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


B, N_V, N_L = 28, 5, 6  # rows, tokens and length of the networks
TRUNK = Trunk(width=8, layers=2, heads=2)
SHALLOW = Trunk(width=8, layers=1, heads=2, dropout=0.2)  # dropout in losses only
SETTINGS = dict(prediction="denoiser", trunk=TRUNK, sigma_range=(1e-3, 7.0), cond_dim=4, conditioning="constant")
NETWORK = BlockNetwork(Absorbing(N_V), block_size=2, **SETTINGS)
THREES = dataclasses.replace(NETWORK, block_size=3)
CAUSAL = AutoregressiveNetwork(Absorbing(N_V), **SETTINGS)
NETWORKS = pytest.mark.parametrize("network", [NETWORK, CAUSAL, slow(THREES)], ids=["2", "1", "3"])


def with_trunk(network, trunk):
    return dataclasses.replace(network, trunk=trunk)


def random_params(init):
    """Random parameters, without the zeros of initialisation, so that every path affects the output."""
    rng, leaves = np.random.default_rng(0), jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(leaf.dtype), leaves)


@functools.cache
def params_of(network):
    return random_params(network.init)


@functools.partial(jax.jit, static_argnums=0)
def in_training(network, params, x, x0, lengths=None):
    """The hidden states of noisy tokens given the clean ones. Float[B L W]."""
    return network.hidden(params, x, jnp.ones(len(x)), lengths=lengths, context=x0)[0]


@functools.partial(jax.jit, static_argnums=0)
def in_sampling(network, params, x, lengths=None):
    """The hidden states of a Denoiser's input. Float[B L W]."""
    return network.hidden(params, x, jnp.ones(len(x)), lengths=lengths)[0]


def random_tokens(rows, seed=0):
    return np.random.default_rng(seed).integers(0, N_V, (rows, N_L))


def on_four_devices(rows):
    return jax.device_put(rows, NamedSharding(Mesh(np.array(jax.devices()[:4]), "data"), PartitionSpec("data")))


@NETWORKS
def test_noisy_tokens_see_their_own_block_and_the_clean_blocks_before_it(network):
    """Token by token: outputs depend on all of these, and on no others. Of blocks of one token, on clean ones only."""
    x, x0 = np.tile(random_tokens(1, 1), (B, 1)), np.tile(random_tokens(1), (B, 1))
    x[:, 1::4] = N_V
    for changed, tokens in enumerate((x, x0)):  # rows 1 .. L and L + 1 .. 2 L differ in one token from row 0
        tokens[1 + changed * N_L + np.arange(N_L), np.arange(N_L)] = (tokens[0] + 1) % N_V
    hidden = np.asarray(in_training(network, params_of(network), x, x0, np.full(B, N_L)))
    depends = np.abs(hidden - hidden[:1]).max(-1) > 1e-5
    block = np.arange(N_L) // network.block_size
    own = (block[:, None] == block) & (network.block_size > 1)
    assert np.array_equal(depends[1 : N_L + 1].T, own)
    assert np.array_equal(depends[N_L + 1 : 2 * N_L + 1].T, block[:, None] > block)
    assert network.block_of_generation == network.block_size
    assert network.trunk_length(N_L) == (2 * N_L if network.block_size > 1 else N_L)


def half_written(network, length=N_L):
    """Rows whose first masked block is any of them, in part or all masked, and any tokens or masks after it."""
    x0, size, rng = random_tokens(B)[:, :length], network.block_size, np.random.default_rng(5)
    first = np.arange(B)[:, None] % -(-length // size)
    block = np.arange(length)[None] // size
    at = np.minimum(first * size + rng.integers(0, size, (B, 1)), length - 1)  # one that is masked for certain
    masked = (block == first) & ((rng.random(x0.shape) < 0.5) | (np.arange(length) == at))
    x = np.where(masked | ((block > first) & (rng.random(x0.shape) < 0.7)), N_V, x0)
    return x, x0, masked, block > first


def test_the_first_block_with_a_mask_is_the_noisy_one_of_training():
    """In rows of five tokens, in blocks of two. Control: the blocks after it."""
    x, x0, masked, later = half_written(NETWORK, 5)
    lengths, params = np.full(B, 5), params_of(NETWORK)
    padded = [np.pad(tokens, ((0, 0), (0, 1))) for tokens in (x, x0)]
    trained = np.asarray(in_training(NETWORK, params, *padded, lengths))[:, :5]
    sampled = np.asarray(in_sampling(NETWORK, params, x, lengths))
    np.testing.assert_allclose(sampled[masked], trained[masked], rtol=1e-4, atol=1e-5)
    assert gap(sampled[later & (x == N_V)], trained[later & (x == N_V)]) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    "network, length",
    [(NETWORK, 5), (CAUSAL, 6), (NETWORK, 6), (CAUSAL, 5), (THREES, 6), (THREES, 5), (THREES, 2)],
    ids=lambda value: str(getattr(value, "block_size", value)),
)
def test_the_denoiser_is_the_form_of_training_at_the_first_block_with_a_mask(network, length):
    """Of rows whose length is no multiple of a block too: the form of training then has padding. At any positions.

    Control: the blocks after it, which have other tokens in the two forms.
    """
    x, x0, masked, later = half_written(network, length)
    positions = np.argsort(~masked, axis=1, kind="stable")

    @jax.jit
    def losses(params, x, x0, full, full0):
        sigma, lengths = jnp.ones(B), jnp.full(B, length)
        in_training = network.stats(params, lengths=lengths)(full, sigma, full0)
        log_clean, everywhere = (network.denoiser(params)(x, sigma, at) for at in (positions, None))
        log_r = jnp.take_along_axis(log_clean, jnp.take_along_axis(x0, positions, 1)[..., None], axis=-1)[..., 0]
        return -log_r, (in_training.log_sum - in_training.target)[:, :length], log_clean, everywhere

    full = [np.pad(tokens, ((0, 0), (0, N_L - length))) for tokens in (x, x0)]
    of_denoiser, trained, log_clean, everywhere = map(np.asarray, losses(params_of(network), x, x0, *full))
    trained, masked, later = (
        np.take_along_axis(of_all, positions, 1) for of_all in (trained, masked, later & (x == N_V))
    )
    np.testing.assert_allclose(of_denoiser[masked], trained[masked], rtol=1e-4, atol=1e-5)
    assert length == 2 or gap(of_denoiser[later], trained[later]) > 1e-2
    everywhere = np.take_along_axis(everywhere, positions[..., None], 1)
    np.testing.assert_allclose(log_clean, everywhere, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.exp(log_clean).sum(-1), 1, rtol=1e-4)


@pytest.mark.parametrize("network", [NETWORK, slow(CAUSAL), slow(THREES)], ids=["2", "1", "3"])
def test_tokens_beyond_the_end_of_a_row_have_no_effect(network):
    """Noisy or clean, in both forms. Control: in longer rows they do (of a causal network, never)."""
    x0 = random_tokens(B)
    x = np.where(np.random.default_rng(5).random(x0.shape) < 0.5, N_V, x0)

    def change(form, ends, at, lengths, *tokens):
        """Of the hidden states, if the tokens beyond the ends change."""
        changed = [np.where(np.arange(row.shape[1]) < ends, row, (row + 1) % N_V) for row in tokens]
        hidden, other = (np.asarray(form(network, params_of(network), *rows, lengths)) for rows in (tokens, changed))
        return gap(hidden[at], other[at])

    place, ends = np.arange(N_L), 1 + np.arange(B)[:, None] % N_L
    assert change(in_training, ends, place < ends, ends[:, 0], x, x0) == 0
    assert (change(in_training, ends, place < ends, np.full(B, N_L), x, x0) > 1e-2) == (network.block_size > 1)
    place, ends = np.arange(5), 1 + np.arange(B)[:, None] % 5
    last_masked = np.where(place < ends - 1, x0[:, :5], N_V)
    assert change(in_sampling, ends, place == ends - 1, ends[:, 0], last_masked) == 0


@pytest.mark.parametrize("network", [NETWORK, slow(CAUSAL)], ids=["2", "1"])
def test_devices_sample_blocks_without_the_rows_of_others(network):
    """The program of rows on four devices has no communication."""
    network = with_trunk(network, SHALLOW)
    program = in_sampling.lower(network, params_of(network), on_four_devices(half_written(network)[0]))
    assert not re.search("all-gather|all-reduce|all-to-all|collective", program.compile().as_text())


@pytest.mark.slow
@pytest.mark.parametrize("network", [NETWORK, CAUSAL], ids=["2", "1"])
def test_scanned_layers_of_a_network_of_blocks_are_the_same_function(network):
    """In both forms, with recomputation in training."""
    params, (x, x0, _, _) = params_of(network), half_written(network)
    other = dataclasses.replace(network, trunk=network.trunk.clone(scan=True, remat="full"))
    for form, rows in ((in_training, (x, x0)), (in_sampling, (x,))):
        expected = form(network, params, *rows)
        np.testing.assert_allclose(form(other, scanned(params), *rows), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_draws_with_the_head_at_masked_positions_equal_those_with_the_head_everywhere():
    """Of pairs, the L + N masked ones, with padding, given tokens and masks that stay. Control: other lengths."""
    x0, lengths = random_tokens(8), np.array([6, 5, 4, 3, 2, 1, 6, 6])
    x0[7, 4:] = N_V
    free = (np.arange(N_L) < lengths[:, None]) & (x0 != N_V)
    free[6, 1] = False
    network, bound = with_trunk(NETWORK, SHALLOW), NETWORK.bound(LogLinear())
    assert bound == MaskCountBound(NETWORK.process, 2) and bound.takes_pairs(4)

    @functools.partial(jax.jit, static_argnums=0)
    def draws(masked_pairs, lengths, params):
        repeated = jnp.repeat(lengths, 2)
        stats = network.bound_stats(params, x0, repeated, masked_pairs=masked_pairs)
        return bound.draws(stats, row_keys(8), x0, 4, free, lengths).diffusion

    params = params_of(network)
    at_masks, everywhere = draws(True, lengths, params), draws(False, lengths, params)
    np.testing.assert_allclose(at_masks, everywhere, rtol=1e-5)
    assert np.all(everywhere > 0) and gap(draws(True, np.full(8, N_L), params), everywhere) > 1e-3


def test_networks_of_blocks_refuse_what_they_cannot_be():
    """Each with a message of one line. They have the parameters of a network of tokens of the same sizes."""
    plain, schedule = TokenNetwork(Absorbing(N_V), **SETTINGS), LogLinear()
    for network in (NETWORK, CAUSAL):
        assert jax.tree.map(np.shape, params_of(network)) == jax.tree.map(np.shape, params_of(plain))
    assert CAUSAL.loss_at_times(schedule, 1e-3, 4) == CAUSAL.bound(schedule) == MaskCountBound(CAUSAL.process, 1)
    assert NETWORK.loss_at_times(schedule, 1e-3, 4) == TimeLoss(NETWORK.process, schedule, 1e-3, 4, 2)
    assert dataclasses.replace(NETWORK, bound_steps=7).bound(schedule) == DiscreteTimeBound(NETWORK.process, 7, 2)
    needs = "is for the absorbing process, network.prediction=denoiser and network.conditioning=constant"
    refused = [
        *((dict(process=Uniform(N_V)), needs), (dict(prediction="score"), needs), (dict(conditioning="sigma"), needs)),
        (dict(given_embedding=True), "given_embedding is for the uniform process"),
    ]
    for network in (NETWORK, CAUSAL):
        for changes, message in refused:
            with pytest.raises(ValueError, match=message) as raised:
                dataclasses.replace(network, **changes)
            assert "\n" not in str(raised.value)
        with pytest.raises(ValueError, match="no embedding of given tokens"):
            network.denoiser({}, given=np.zeros((1, N_L), bool))(np.zeros((1, N_L), int), np.ones(1, np.float32))
    with pytest.raises(ValueError, match="an autoregressive network has blocks of one token, not 2"):
        dataclasses.replace(CAUSAL, block_size=2)
    with pytest.raises(ValueError, match="bound_steps is for the absorbing process"):
        TokenNetwork(Uniform(N_V), **SETTINGS, bound_steps=4)
    with pytest.raises(TypeError, match="block_size"):
        BlockNetwork(Absorbing(N_V), **SETTINGS)


# Training.

LENGTHS = np.array([6, 6, 5, 4, 2, 1, 3, 6], np.int32)
PADDED = pytest.mark.parametrize("lengths", [LENGTHS, slow(None)], ids=["padded", "full"])
TRAINED = random_tokens(8, seed=3)


def objective_of(network, noise_sampling, batch_size=8):
    return ScoreEntropy(network, LogLinear(0.01), batch_size, 0.05, noise_sampling)


STEP = jax.random.key(5)


@functools.partial(jax.jit, static_argnums=0)
def losses_of(objective, params, key, tokens, lengths, numbers):
    """Of rows with these numbers."""
    return objective(params, Batch(tokens, lengths), numbers, key).loss


@functools.partial(jax.jit, static_argnums=0)
def cross_entropies(network, params, x0, lengths, masked):
    """Those of masked tokens, with these positions of every block masked. Float[B L]."""
    x, sigma = network.process.mask_tokens(x0, masked & (jnp.arange(N_L) < lengths[:, None])), jnp.ones(len(x0))
    return network.process.cross_entropy(network.stats(params, lengths=lengths)(x, sigma, x0), x, sigma[:, None])


def by_count(k, n):
    """The weight of `by_time` at one of n counts: of one of the sets of that size, n / k."""
    return 1 / (math.comb(n, k) * k)


def expected_losses(network, weight, lengths=LENGTHS):
    """The exact mean of each row's loss. weight(k, n): of each set of k masked tokens of a block of n."""
    size, sets = network.block_size, states(2, network.block_size) == 1
    rows = np.tile(TRAINED, (len(sets), 1)), np.tile(lengths, len(sets))
    masked = np.repeat(np.tile(sets, N_L // size), len(lengths), axis=0)
    of_sets = np.asarray(cross_entropies(network, params_of(network), *rows, masked), np.float64)
    of_sets = of_sets.reshape(len(sets), len(lengths), N_L)
    means = np.zeros(len(lengths))
    for row, start in itertools.product(range(len(lengths)), range(0, N_L, size)):
        n = min(max(lengths[row] - start, 0), size)
        for where, losses in zip(sets, of_sets, strict=True):
            if where.any() and not where[n:].any():
                means[row] += weight(int(where.sum()), n) * losses[row, start : start + n].sum()
    return means


@pytest.mark.parametrize("noise_sampling", ["mask_count", slow("time")])
def test_the_loss_of_blocks_averages_to_the_bound(noise_sampling):
    """Over the rows of a large batch, in random order, for each text, whose length may be no multiple of a block.

    Against the enumerated sets of masks. Controls: the weights of another schedule; the lengths of other texts.
    """
    network, size = with_trunk(THREES, SHALLOW.clone(dropout=0.0)), 2**12
    text = np.random.default_rng(0).permutation(size) % 8
    objective = objective_of(network, noise_sampling, size)
    rows = (TRAINED[text], LENGTHS[text], np.arange(size))
    losses = np.asarray(losses_of(objective, params_of(network), STEP, *rows), np.float64)
    drawn = np.array([losses[text == number] for number in range(8)])
    weight = {"mask_count": by_count, "time": by_time}[noise_sampling]

    def largest_error(weight, lengths=LENGTHS):
        due, error = expected_losses(network, weight, lengths), drawn.std(1) / drawn.shape[1] ** 0.5
        return np.max(np.abs(drawn.mean(1) - due) / (error + 1e-5))  # some losses have no variance

    assert largest_error(weight) < 4
    assert largest_error(functools.partial(by_time, eps=0.3)) > 6 and largest_error(weight, np.roll(LENGTHS, 1)) > 6


DROPPING = with_trunk(THREES, SHALLOW)
ROWS = (TRAINED, LENGTHS, np.arange(8))
HALVES = [[array[half] for array in ROWS] for half in (slice(4), slice(4, 8))]


class Everywhere(BlockNetwork):
    """A network of blocks whose head runs at all positions."""

    def stats(self, params, **inputs):
        return super().stats(params, **inputs | {"masked_pairs": False})


EVERYWHERE = Everywhere(**{field.name: getattr(DROPPING, field.name) for field in dataclasses.fields(DROPPING)})


@pytest.mark.parametrize("noise_sampling", ["mask_count", slow("time")])
def test_losses_are_independent_of_devices_microbatches_and_where_the_head_runs(noise_sampling):
    """On four devices, the head at the masked positions of pairs; on one in two microbatches, the head everywhere.

    Padded, with dropout. Controls: the numbers of other rows; another key.
    """
    at_masks, everywhere = (
        functools.partial(losses_of, objective_of(network, noise_sampling), params_of(DROPPING))
        for network in (DROPPING, EVERYWHERE)
    )
    on_devices = at_masks(STEP, *on_four_devices(ROWS))
    assert len(on_devices.sharding.device_set) == 4
    first, second = (everywhere(STEP, *half) for half in HALVES)
    np.testing.assert_allclose(on_devices, np.concatenate([first, second]), rtol=1e-5)
    assert gap(everywhere(STEP, *HALVES[0][:2], HALVES[1][2]), first) > 1e-2
    assert gap(everywhere(jax.random.key(4), *HALVES[0]), first) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("noise_sampling", ["mask_count", "time"])
def test_the_gradient_of_blocks_is_independent_of_devices_and_microbatches(noise_sampling):
    """On four devices, and on one in two microbatches; padded, with dropout. Control: the numbers of other rows."""
    objective = objective_of(DROPPING, noise_sampling)
    gradient = jax.jit(jax.grad(lambda params, *rows: losses_of(objective, params, STEP, *rows).sum()))
    gradient = functools.partial(gradient, params_of(DROPPING))

    def close(left, right):
        return all(jax.tree.leaves(jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-3, atol=1e-3), left, right)))

    halves = [gradient(*half) for half in HALVES]
    assert close(gradient(*on_four_devices(ROWS)), jax.tree.map(np.add, *halves))
    assert not close(gradient(*HALVES[0][:2], np.arange(4, 8)), halves[0])


@pytest.mark.slow
@PADDED
def test_the_head_at_the_masked_positions_of_pairs_gives_the_same_losses(lengths):
    """For each row, with dropout. Control: other keys."""
    at_masks, everywhere = (
        functools.partial(losses_of, objective_of(network, "mask_count"), params_of(DROPPING))
        for network in (DROPPING, EVERYWHERE)
    )
    rows = (TRAINED, lengths, np.arange(8))
    np.testing.assert_allclose(at_masks(STEP, *rows), everywhere(STEP, *rows), rtol=1e-5)
    assert gap(at_masks(STEP, *rows), everywhere(jax.random.key(4), *rows)) > 1e-2


def test_pairs_need_the_head_at_half_as_many_positions_as_tokens_and_blocks():
    assert objective_of(DROPPING, "mask_count").head_positions(8, N_L) == 8 * (N_L + 2) / 2
    assert objective_of(DROPPING, "time").head_positions(8, N_L) == 8 * N_L


def is_stratified(levels):
    """True if each of n equal parts of [0, 1) has one of n levels."""
    return np.array_equal(np.floor(np.sort(np.ravel(levels)) * np.size(levels)), np.arange(np.size(levels)))


@pytest.fixture(scope="module")
def levels():
    """The levels in [0, 1) of the blocks of a batch, of times and of mask counts, each Float[rows blocks]."""
    fine = 2**20  # tokens of a block: a mask count is then one level

    @jax.jit
    def drawn(rows, key):
        by_time, by_count = (objective_of(NETWORK, noise_sampling, 16) for noise_sampling in ("time", "mask_count"))
        return by_time.levels(rows, key, 8), by_count.counts(rows, key, fine, 4), by_count.levels(rows, key, 8)

    times, counts, of_two = map(np.asarray, drawn(np.arange(16), jax.random.key(2)))
    assert np.all(counts[::2] + counts[1::2] == fine + 1)  # antithetic
    assert np.array_equal(np.bincount(of_two.ravel())[1:], [32, 32]) and np.all(of_two[::2] + of_two[1::2] == 3)
    return {"time": (times - 0.05) / 0.95, "mask_count": (counts[::2] - 0.5) / fine}


@pytest.mark.parametrize("noise_sampling", ["time", "mask_count"])
def test_each_stratum_of_a_batch_has_exactly_one_block(levels, noise_sampling):
    """Of mask counts, of the even rows of pairs. Control: the levels of a half of the batch."""
    assert is_stratified(levels[noise_sampling]) and levels[noise_sampling].shape[1] == 4
    assert not is_stratified(np.tile(levels[noise_sampling][::2], (2, 1)))


@pytest.mark.parametrize("noise_sampling", ["time", "mask_count"])
def test_the_blocks_at_each_place_of_a_row_have_all_levels(levels, noise_sampling):
    """In the batch, and on each of two devices; otherwise the loss of that place is not that of all noise levels."""
    for rows in (levels[noise_sampling], *np.split(levels[noise_sampling], 2)):
        assert all(is_stratified(of_place) for of_place in rows.T), rows


ONES = with_trunk(CAUSAL, SHALLOW.clone(dropout=0.0))


@functools.cache
def cross_entropies_of_ones():
    """Of each token given those before it, by the Denoiser. Float[8 L]."""
    before = np.arange(N_L) < np.arange(N_L)[:, None]  # of each position
    x = np.where(before, TRAINED[:, None], N_V).reshape(-1, N_L)
    log_r = jax.jit(lambda params, x: ONES.denoiser(params)(x, jnp.ones(len(x)), None))(params_of(ONES), x)
    place = np.arange(N_L)
    return -np.asarray(log_r).reshape(8, N_L, N_L, N_V)[np.arange(8)[:, None], place, place, TRAINED]


def nats_of_ones(lengths):
    """-log p of each text, by the Denoiser. Float[8]."""
    within = np.arange(N_L) < (np.full(8, N_L) if lengths is None else lengths)[:, None]
    return np.where(within, cross_entropies_of_ones(), 0.0).sum(-1)


def losses_of_ones(noise_sampling, lengths):
    """Of each text with three keys. Float[3 8]."""
    objective, params, rows = objective_of(ONES, noise_sampling), params_of(ONES), (TRAINED, lengths, np.arange(8))
    return np.array([losses_of(objective, params, jax.random.key(k), *rows) for k in range(3)])


@PADDED
def test_the_loss_of_blocks_of_one_token_is_the_cross_entropy_for_every_key(lengths):
    """That is the sum of the Denoiser's log-likelihoods, each given the tokens before it. Control: other texts."""
    losses, nats = losses_of_ones("mask_count", lengths), nats_of_ones(lengths)
    np.testing.assert_allclose(losses, np.tile(nats, (3, 1)), rtol=1e-5)
    assert gap(losses, np.roll(nats, 1)) > 0.1


@pytest.mark.slow
@PADDED
def test_the_bound_of_blocks_of_one_token_is_the_cross_entropy_in_every_draw(lengths):
    """Control: the losses at times depend on the key."""
    free = np.arange(N_L) < (np.full(8, N_L) if lengths is None else lengths)[:, None]

    @jax.jit
    def draws(params, lengths):
        stats = ONES.bound_stats(params, TRAINED, lengths)
        return ONES.bound(LogLinear()).draws(stats, row_keys(8), TRAINED, 4, jnp.asarray(free), lengths).diffusion

    drawn = draws(params_of(ONES), lengths)
    np.testing.assert_allclose(drawn, np.tile(nats_of_ones(lengths), (4, 1)), rtol=1e-5)
    assert np.ptp(losses_of_ones("time", lengths), axis=0).max() > 0.1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("small"))


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 1])
def test_losses_of_steps_are_independent_of_devices_and_microbatches(corpus, size):
    """Five steps of training, with dropout, on one device and on four in two microbatches. Control: another size."""

    def losses(size, devices, accumulation):
        settings = ("network.dropout=0.1", f"training.accumulation={accumulation}", f"network.block_size={size}")
        config = small_config(corpus, *settings, "training.batch_size=16")
        objective, optimizer, mesh = parts(config, corpus, devices)
        _, step, shardings = make_step(config, objective, optimizer, mesh)
        state = jax.device_put(jax.jit(lambda: init_state(config, objective, optimizer))(), shardings)
        values = []
        for k in range(5):
            rows = jax.device_put(batch(corpus, 16, 16, 0, k), parallel.batch_sharding(mesh))
            state, metrics = step(state, rows, {})
            values.append(float(metrics["loss"]))
        return np.array(values)

    alone = losses(size, 1, 1)
    np.testing.assert_allclose(losses(size, 4, 2), alone, rtol=1e-4)
    assert np.abs(losses(2, 1, 1) / alone - 1).max() > 1e-3


# Evaluation and generation.


@pytest.mark.parametrize("settings", [{}, slow({"steps": 3}), slow({"protocol": "duo"})], ids=str)
def test_an_evaluation_of_blocks_is_read_again_from_its_folder(corpus, tmp_path, settings):
    """With the same result: the noise levels of its records are those of its rows."""
    config = small_config(corpus, "network.block_size=4", "network.layers=1")
    model, texts = model_of(config, corpus.tokenizer, random_params), ["the 3 times table: 3, 6, 9.\n" * 3]
    first, again = (model.perplexity(texts, draws=4, out=tmp_path / "out", **settings) for _ in range(2))
    assert first.nats_per_token == again.nats_per_token


def test_windows_start_at_multiples_with_the_stride_asked_for():
    """The last covers the end of its row, shorter rows repeat their last, and none leaves a gap."""
    lengths = np.array([5, 16, 17, 24, 40, 41])
    for stride, multiple in itertools.product((None, 4, 8, 16), (1, 2, 4)):
        starts, step = np.array(list(windows(lengths, 16, stride, multiple))).T, stride or 8
        assert np.all(starts % multiple == 0) and np.all(np.diff(starts) >= 0) and np.all(np.diff(starts) <= step)
        end = starts[:, -1] + 16
        assert np.all(end >= lengths) and np.all(end < np.maximum(lengths, 16) + multiple)
        assert np.array_equal(starts, np.minimum(step * np.arange(starts.shape[1]), starts[:, -1:]))
        assert starts.shape[1] == -(-starts.max() // step) + 1  # no window more than needed


def test_windows_overlap_by_half_a_block_by_default():
    """Without a multiple as before; of half a block's multiples the largest, at least one."""
    lengths = np.array([3, 7, 12, 30])
    for block in (5, 6, 16):
        stride, last = block - block // 2, np.maximum(lengths - block, 0)
        due = [np.minimum(number * stride, last) for number in range(-(-last.max() // stride) + 1)]
        np.testing.assert_array_equal(list(windows(lengths, block)), due)
    assert np.array(list(windows(np.array([24]), 12, None, 4))).T.tolist() == [[0, 4, 8, 12]]
    assert np.array(list(windows(np.array([23]), 12, None, 6))).T.tolist() == [[0, 6, 12]]
    assert np.array(list(windows(np.array([20]), 8, None, 8))).T.tolist() == [[0, 8, 16]]


# The config.


@pytest.mark.parametrize(
    "settings, message",
    [
        (["process.name=uniform"], "block_size=4 needs process.name=absorbing"),
        (["process.name=gaussian"], "block_size=4 needs process.name=absorbing"),
        (["network.prediction=score"], "network.prediction=denoiser"),
        (["network.conditioning=sigma"], "needs network.conditioning=constant: each block has a noise level"),
        (["training.loss=cross_entropy", "training.noise_sampling=time"], "block_size=4 needs training.loss=bound"),
        (["data.block_length=30"], "block_size=4 must divide data.block_length=30"),
        (["data.block_length=4"], "must divide data.block_length=4, and be less; network.block_size=0 is one block"),
        (["network.block_size=64"], "block_size=64 must divide data.block_length=32, and be less"),
        (["network.attention=splash", "data.block_length=128"], "which network.attention=splash does not take"),
        (["network.architecture=bert"], "block_size is for network.architecture=dit"),
        (["network.block_size=-1"], "network.block_size must not be negative"),
        (["network.given_embedding=true"], "given_embedding is for process.name=uniform"),
    ],
)
def test_settings_that_do_not_go_with_blocks_are_one_line(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        configs.override(configs.default(), ["network.block_size=4", *settings])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size, kind", [(0, TokenNetwork), (1, AutoregressiveNetwork), (4, BlockNetwork)], ids=name_of)
def test_a_size_of_blocks_makes_the_network_and_its_recipe(size, kind):
    """Blocks have a recipe of their own, whose network is not conditioned on the noise. What is set stays set."""
    config = configs.override(configs.default(), [f"network.block_size={size}"])
    assert kind_of(config) == (BLOCKS if size else "absorbing")
    resolved = configs.resolved(config)
    assert resolved.network.conditioning == ("constant" if size else "sigma")
    for key, value in RECIPES[kind_of(config)].items():
        group, name = key.split(".")
        assert config[group][name] is None and resolved[group][name] == value
    process, _, network = configs.build(config, N_V)
    assert type(network) is kind and process == Absorbing(N_V) and network.block_of_generation == (size or None)
    at_times = configs.override(config, ["training.noise_sampling=time"])
    assert configs.resolved(at_times).training.noise_sampling == "time"
    assert kind_of(configs.override(configs.default(), ["process.name=uniform"])) == "uniform"
