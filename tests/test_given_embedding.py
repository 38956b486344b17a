"""Conditioning on given tokens: random ones in training, their embedding, and bounds conditioned on a context."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracle import Joint, MarkovChain, p_value, standard_errors
from small import parts, small_config, small_corpus, trained_of
from test_protocols import random_model

import sedd
from sedd.data.batches import Batch, batch
from sedd.diffusion import keyed_random
from sedd.diffusion.discrete.likelihood import bound_of
from sedd.diffusion.discrete.process import Absorbing, Uniform
from sedd.diffusion.discrete.score import stats_from
from sedd.diffusion.schedule import LogLinear
from sedd.evaluation.conditional import log_likelihoods
from sedd.generation.rows import Rows
from sedd.network.token_network import TokenNetwork
from sedd.network.trunk import Trunk
from sedd.runtime import parallel
from sedd.training.score_entropy import ScoreEntropy
from sedd.training.step import init_state, make_step
from sedd.training.token_objective import random_given

V, L = 3, 4
UNIFORM = ("process.name=uniform", "training.noise_sampling=time")
GIVEN_EMBEDDING = (*UNIFORM, "network.given_embedding=True")
NETWORK = TokenNetwork(
    Uniform(V), "denoiser", Trunk(16, 1, 2), sigma_range=(1e-3, 7.0), cond_dim=8, given_embedding=True
)


@pytest.fixture(scope="module")
def joint():
    """A joint distribution over four dependent positions of three tokens."""
    return Joint.random(V, L)


@dataclasses.dataclass(frozen=True)
class Exact:
    """A stand-in for a network: the exact scores of a joint distribution. conditioned: on the given tokens."""

    joint: Joint
    conditioned: bool = True
    process, has_unnormalised_scores, given_embedding, infills = Uniform(V), False, True, True
    block_of_generation = None

    def stats(self, params, keys=None, lengths=None, given=None, masked_pairs=False, tightened=False):
        given = given if self.conditioned else jnp.zeros_like(given)
        return stats_from(self.process, self.joint.denoiser_given(self.process, given))

    def bound(self, schedule):
        return bound_of(self.process, schedule)

    def bound_stats(self, params, tokens, lengths=None, given=None, masked_pairs=False):
        return self.stats(params, given=given)

    def clean(self, params, tokens, lengths=None):
        return tokens

    def rows_at_once(self, length):
        return 4096


# Random given tokens.


def given_rows(rows, lengths, seed=0):
    keys = keyed_random.row_keys(jax.random.key(seed), jnp.asarray(rows))
    return np.asarray(jax.jit(random_given)(keys, jnp.arange(np.max(lengths)) < jnp.asarray(lengths)[:, None]))


def test_distribution_of_given_tokens():
    """No token in half of the rows; in a quarter any number, at random positions; in a quarter all but a span, which
    often starts or ends the text. Control: the distribution without such spans."""
    n, rows = 6, 40_000
    masks = np.indices((2,) * n).reshape(n, -1).T
    count = masks.sum(1)
    scattered = np.where(count < n, 1 / n / np.array([max(1, np.sum(count == c)) for c in count]), 0)
    spans = np.zeros(2**n)
    for given in range(n):
        for begin in range(given + 1):
            ends = np.clip((np.array([begin - 0.5, begin + 0.5]) / max(given, 1) + 0.5) / 2, 0, 1)
            ends = np.where([begin == 0, begin == given], [0, 1], ends)
            mask = np.array([int(not begin <= i < begin + n - given) for i in range(n)])
            spans[mask @ 2 ** np.arange(n)[::-1]] += np.diff(ends)[0] / n
    expected = 0.25 * scattered + 0.25 * spans
    expected[0] += 0.5
    drawn = given_rows(np.arange(rows), np.full(rows, n)) @ 2 ** np.arange(n)[::-1]
    assert expected.sum() == pytest.approx(1) and p_value(drawn, expected) > 1e-3
    assert p_value(drawn, 0.5 * scattered + 0.5 * (np.arange(2**n) == 0)) < 1e-9
    for side in ([1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]):  # a prefix, a suffix
        assert np.mean(drawn == np.array(side) @ 2 ** np.arange(n)[::-1]) > 1 / 100


def test_given_tokens_depend_only_on_the_row():
    """On no other row of the batch, and not on padding. No token beyond the length is given, and one token is free."""
    rows, lengths = np.arange(512), np.random.default_rng(0).integers(0, 9, 512)
    given = given_rows(rows, lengths)
    np.testing.assert_array_equal(given_rows(rows[100:200], lengths[100:200]), given[100:200])
    assert not np.any(given & (np.arange(8) >= lengths[:, None]))
    assert np.all((given.sum(1) < lengths) | (lengths == 0)) and len(np.unique(given[lengths == 8], axis=0)) > 20
    assert np.any(given_rows(rows, lengths, seed=1) != given)


# The network.


def random_params(network):
    """Random parameters, without the zeros of initialisation, so that every path affects the output."""
    random, shapes = np.random.default_rng(0), jax.eval_shape(network.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * random.normal(size=leaf.shape), jnp.float32), shapes)


def test_given_embedding_is_one_more_parameter():
    """A vector of the width of the network; all other parameters are initialised as without it."""
    init = jax.jit(
        lambda key, given_embedding: dataclasses.replace(NETWORK, given_embedding=given_embedding).init(key),
        static_argnums=1,
    )
    with_embedding, without = (init(jax.random.key(3), given_embedding) for given_embedding in (True, False))
    vector = with_embedding["trunk"].pop("given")
    assert vector.shape == (16,) and vector.dtype == jnp.float32 and np.std(vector) > 0.1
    jax.tree.map(np.testing.assert_array_equal, with_embedding, without)
    assert NETWORK.num_parameters() == dataclasses.replace(NETWORK, given_embedding=False).num_parameters() + 16


def test_network_without_given_tokens_equals_network_without_given_embedding():
    """Exactly with given=None, and up to rounding with given=False everywhere, for denoiser, score and statistics. A
    given token changes the outputs at every position of its row."""
    params, plain = random_params(NETWORK), dataclasses.replace(NETWORK, given_embedding=False)
    x = jax.random.randint(jax.random.key(1), (2, L), 0, V)
    sigma, none = jnp.array([0.3, 2.0]), jnp.zeros((2, L), bool)

    def outputs(network, **given):
        denoised, log_score = network.denoiser(params, **given)(x, sigma), network.log_score(params, x, sigma, **given)
        return denoised, log_score, network.stats(params, **given)(x, sigma, 1 - x % 2)

    expected, actual = jax.jit(lambda: outputs(plain))(), jax.jit(lambda: outputs(NETWORK))()
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    conditioned = jax.jit(lambda given: outputs(NETWORK, given=given))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, conditioned(none), expected)
    one_given = conditioned(none.at[0, 1].set(True))
    jax.tree.map(lambda actual, other: close(actual[1], other[1]), one_given, expected)
    assert np.all(np.abs(one_given[0][0] - expected[0][0]).max(-1) > 1e-3)


def test_model_conditions_denoiser_and_score_on_given_tokens():
    """Through the `given` array. Control: without it the outputs differ."""
    params = random_params(NETWORK)
    model = sedd.Model(config=None, **vars(trained_of(NETWORK, LogLinear(), params, 4)))
    x, given = np.array([[0, 1, 2, 1]]), np.array([[True, False, True, False]])
    expected = jax.jit(lambda: NETWORK.denoiser(params, given=jnp.asarray(given))(x, jnp.ones(1)))()
    actual = jax.jit(lambda: model.denoiser(x, given)(np.where(given, 2 - x, x), jnp.ones(1), None))()
    np.testing.assert_array_equal(actual, expected)
    assert np.abs(expected - jax.jit(lambda: model.denoiser()(x, jnp.ones(1), None))()).max() > 1e-3
    score = model.log_score(x, np.ones(1, np.float32), given=given)
    assert np.abs(score - model.log_score(x, np.ones(1, np.float32))).max() > 1e-3


def test_given_tokens_without_given_embedding_are_refused():
    plain, given = dataclasses.replace(NETWORK, given_embedding=False), jnp.zeros((1, L), bool)
    with pytest.raises(ValueError, match="no embedding of given tokens; train one with network.given_embedding=True"):
        plain.denoiser({}, given=given)(jnp.zeros((1, L), int), jnp.ones(1))
    with pytest.raises(ValueError, match="network.given_embedding is for the uniform process"):
        dataclasses.replace(NETWORK, process=Absorbing(V))


# The objective.


def test_loss_is_the_entropy_of_the_free_tokens_conditioned_on_the_given_ones():
    """With exact scores conditioned on random given tokens, at random times. Controls: the entropy with no given token,
    and the same noise with unconditional scores."""
    rows, key = jnp.arange(2**15), jax.random.key(2)
    copied = MarkovChain(np.full(V, 1 / V), 0.94 * np.eye(V) + 0.02).joint(3)
    x0 = jnp.asarray(copied.draw(len(rows)))
    networks = Exact(copied), Exact(copied, conditioned=False)
    objectives = [ScoreEntropy(network, LogLinear(1e-4), len(rows), 1e-5) for network in networks]

    @jax.jit
    def losses():
        losses = [objective({}, Batch(x0, None), rows, key).loss for objective in objectives]
        return losses, objectives[0].free_and_given(rows, key, 3)

    (conditional, unconditional), (free, given) = losses()
    np.testing.assert_array_equal(free, ~given)
    assert abs(standard_errors(conditional - copied.nll(x0, free))) < 4 < standard_errors(copied.nll(x0) - conditional)
    assert standard_errors(unconditional - conditional) > 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("small"))


@pytest.mark.slow
def test_loss_with_given_tokens_is_the_same_on_any_devices(corpus):
    """On four devices in two microbatches, with ragged rows: the reported loss is that of the full batch on one device,
    per scored token. Control: there are more valid tokens than scored ones. The embedding is trained."""
    config = small_config(corpus, *GIVEN_EMBEDDING, "network.layers=1", "training.accumulation=2")
    objective, optimizer, mesh = parts(config, corpus, 4)
    _, step, shardings = make_step(config, objective, optimizer, mesh)
    start = jax.device_get(jax.jit(lambda: init_state(config, objective, optimizer))())
    state, rows, lengths = jax.device_put(start, shardings), jnp.arange(8), np.array([16, 9, 16, 3, 1, 16, 12, 16])

    @jax.jit
    def on_one_device(params, tokens, key):
        free, given = objective.free_and_given(rows, key, 16, lengths)
        return objective(params, Batch(tokens, lengths), rows, key).loss, free, given

    for k in range(3):
        params, tokens = jax.device_get(state.params), batch(corpus, 16, 8, 0, k).tokens
        loss, free, given = on_one_device(params, tokens, jax.random.fold_in(jax.random.key(config.training.seed), k))
        state, metrics = step(state, jax.device_put(Batch(tokens, lengths), parallel.batch_sharding(mesh)), {})
        np.testing.assert_allclose(metrics["loss"], np.sum(loss) / np.sum(free), rtol=1e-5)
        assert np.any(given) and np.sum(free) + np.sum(given) == lengths.sum() > 1.05 * np.sum(free)
    assert np.all(jax.device_get(state.params)["trunk"]["given"] != start.params["trunk"]["given"])


# Likelihoods.


def test_bound_conditioned_on_a_context_equals_the_conditional_likelihood(joint):
    """With exact scores the bound is tight, for several sequences and contexts. Control: unconditional scores."""
    tokens = np.indices((V,) * L).reshape(L, -1).T[::5]
    for seed, free in enumerate(([0, 0, 0, 1], [0, 1, 1, 0], [1, 0, 1, 1])):
        free = np.broadcast_to(np.array(free, bool), tokens.shape)
        answers = Rows(tokens, free, np.full(len(tokens), L))

        def deviations(conditioned):
            network = Exact(joint, conditioned)
            bounds = log_likelihoods(trained_of(network, LogLinear(1e-3), {}, L), answers, num_draws=512, seed=seed)
            assert {(bound.method, bound.is_bound) for bound in bounds} == {("levels", True)}
            expected = -joint.nll(tokens, free)
            return np.array([(bound.nats - nats) / bound.standard_error for bound, nats in zip(bounds, expected)])

        assert np.abs(deviations(True)).max() < 4 < np.abs(deviations(False)).max()


def test_model_with_given_embedding_scores_answers():
    """The bound depends on the context and on the embedding of given tokens; without a context it is that of the model
    without the embedding. A uniform model has no other method."""
    model, plain = random_model(*GIVEN_EMBEDDING, letters="abcd"), random_model(*UNIFORM, letters="abcd")
    trunk = {name: leaf for name, leaf in model.params["trunk"].items() if name != "given"}
    plain = dataclasses.replace(plain, params={**model.params, "trunk": trunk})
    zero = jnp.zeros_like(model.params["trunk"]["given"])
    ignoring = dataclasses.replace(model, params={**model.params, "trunk": {**trunk, "given": zero}})

    def nats(model, given):
        bounds = model.log_likelihood(["abc", "abc", "bca"], given)
        assert {(bound.method, bound.is_bound) for bound in bounds} == {("levels", True)}
        return np.array([bound.nats for bound in bounds])

    np.testing.assert_allclose(nats(model, ""), nats(plain, ""), rtol=1e-5)
    conditional = nats(model, "dd")
    assert conditional[0] == conditional[1] != conditional[2]
    for other in (nats(model, "da"), nats(ignoring, "dd"), nats(model, "")):
        assert np.abs(other - conditional).min() > 1e-3
    with pytest.raises(sedd.UserError, match="other models have 'bound'"):
        model.log_likelihood("abc", "d", method="exact")


@pytest.mark.slow
def test_network_learns_the_given_embedding():
    """Trained on tokens that are mostly copies of each other. At high noise its predictions are near the exact
    conditionals. Control: those without `given` are not, nor are its bounds with a zero embedding."""
    process, length, rows, steps = Uniform(4), 4, 128, 1500
    joint = MarkovChain(np.full(4, 1 / 4), 0.94 * np.eye(4) + 0.015).joint(length)
    network = TokenNetwork(
        process, "denoiser", Trunk(32, 1, 2), sigma_range=(1e-3, 6.9), cond_dim=32, given_embedding=True
    )
    objective = ScoreEntropy(network, LogLinear(1e-3), rows, 0.1)  # gradients have a high variance at low noise
    rate = optax.cosine_decay_schedule(5e-3, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rate, b2=0.99))
    texts = jnp.asarray(joint.draw(steps * rows)).reshape(steps, rows, length)

    @jax.jit
    def train(params):
        def step(carry, number):
            params, moments = carry
            key = jax.random.fold_in(jax.random.key(1), number)

            def loss(params):
                return objective(params, Batch(texts[number], None), jnp.arange(rows), key).loss.sum() / rows

            updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
            return (optax.apply_updates(params, updates), moments), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))[0][0]

    params = train(network.init(jax.random.key(0)))
    x0, given = joint.draw(512, seed=1), given_rows(np.arange(512), np.full(512, length), seed=7)
    x = np.where(given, x0, np.random.default_rng(2).integers(0, 4, x0.shape))
    sigma = np.full(512, 3.0, np.float32)
    exact = np.exp(joint.denoiser_given(process, given)(x, sigma))
    predict = jax.jit(lambda given: jnp.exp(network.denoiser(params, given=given)(x, sigma)))

    def total_variation(conditioned_on):  # mean over the free positions of the rows that have given tokens
        distance = np.abs(predict(conditioned_on) - exact).sum(-1) / 2
        return distance[~given & given.any(-1, keepdims=True)].mean()

    assert total_variation(given) < 0.1 < 0.4 < total_variation(np.zeros_like(given))

    free = np.broadcast_to(np.arange(length) > 0, (64, length))
    answers = Rows(x0[:64], free, np.full(64, length))
    trunk = {**params["trunk"], "given": jnp.zeros(32)}

    def excess(params):
        bounds = log_likelihoods(trained_of(network, LogLinear(1e-3), params, length), answers, num_draws=256)
        return np.mean([-bound.nats for bound in bounds] - joint.nll(answers.tokens, free))

    assert 0 < 2 * excess(params) < excess({**params, "trunk": trunk})
