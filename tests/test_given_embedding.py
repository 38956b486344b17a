"""Told which tokens are given: random given tokens in training, flags in the network, bounds given a context."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracle import Joint, MarkovChain, p_value, standard_errors
from small import parts, small_config, small_corpus
from test_protocols import random_model

import sedd
from sedd import parallel
from sedd.data.batches import Batch, batch
from sedd.diffusion import keyed_random
from sedd.diffusion.process import Absorbing, Uniform
from sedd.diffusion.schedule import LogLinear
from sedd.diffusion.score import stats_from
from sedd.evaluation.conditional import Answers, log_likelihoods
from sedd.network.network import Network
from sedd.training.objective import Objective, random_given
from sedd.training.step import init_state, make_step

V, L = 3, 4
UNIFORM = ("process.name=uniform", "training.noise_sampling=time")
OBSERVED = (*UNIFORM, "network.given_embedding=True")
NETWORK = Network(Uniform(V), "denoiser", 16, 1, 2, sigma_range=(1e-3, 7.0), cond_dim=8, given_embedding=True)


@pytest.fixture(scope="module")
def law():
    """Of three tokens over four positions, which depend on each other."""
    return Joint.random(V, L)


@dataclasses.dataclass(frozen=True)
class Exact:
    """A stand-in for a network: the exact scores of a law, told which tokens are given; or, the control, not told."""

    law: Joint
    told: bool = True
    process, prediction, dropout, given_embedding = Uniform(V), "denoiser", 0.0, True

    def stats(self, params, keys=None, lengths=None, given=None, masked_pairs=False, tightened=False):
        return stats_from(self.process, self.law.informed(self.process, given if self.told else jnp.zeros_like(given)))

    def rows_at_once(self, length):
        return 4096


# Which tokens are given.


def given_rows(rows, lengths, seed=0):
    keys = keyed_random.row_keys(jax.random.key(seed), jnp.asarray(rows))
    return np.asarray(jax.jit(random_given)(keys, jnp.arange(np.max(lengths)) < jnp.asarray(lengths)[:, None]))


def test_the_law_of_what_is_given():
    """In a half of the rows nothing; in a quarter any number, scattered; in a quarter all but a span, which begins or
    ends the text often enough. Control: the law of the first without the last."""
    n, rows = 6, 40_000
    masks = np.indices((2,) * n).reshape(n, -1).T
    count = masks.sum(1)
    scattered = np.where(count < n, 1 / n / np.array([max(1, np.sum(count == c)) for c in count]), 0)
    spans = np.zeros(2**n)
    for given in range(n):
        for begin in range(given + 1):
            ends = np.clip((np.array([begin - 0.5, begin + 0.5]) / max(given, 1) + 0.5) / 2, 0, 1)
            ends = np.where([begin == 0, begin == given], [0, 1], ends)
            left = np.array([int(not begin <= i < begin + n - given) for i in range(n)])
            spans[left @ 2 ** np.arange(n)[::-1]] += np.diff(ends)[0] / n
    law = 0.25 * scattered + 0.25 * spans
    law[0] += 0.5
    seen = given_rows(np.arange(rows), np.full(rows, n)) @ 2 ** np.arange(n)[::-1]
    assert law.sum() == pytest.approx(1) and p_value(seen, law) > 1e-3
    assert p_value(seen, 0.5 * scattered + 0.5 * (np.arange(2**n) == 0)) < 1e-9
    for side in ([1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]):  # a prefix, a suffix
        assert np.mean(seen == np.array(side) @ 2 ** np.arange(n)[::-1]) > 1 / 100


def test_what_is_given_belongs_to_the_row():
    """In any slice of the batch, at any padding; nothing beyond the length, and not all of a row."""
    rows, lengths = np.arange(512), np.random.default_rng(0).integers(0, 9, 512)
    whole = given_rows(rows, lengths)
    np.testing.assert_array_equal(given_rows(rows[100:200], lengths[100:200]), whole[100:200])
    assert not np.any(whole & (np.arange(8) >= lengths[:, None]))
    assert np.all((whole.sum(1) < lengths) | (lengths == 0)) and len(np.unique(whole[lengths == 8], axis=0)) > 20
    assert np.any(given_rows(rows, lengths, seed=1) != whole)


# The network.


def random_params(network):
    """Parameters without the zeros of initialisation, so that every path counts."""
    random, shapes = np.random.default_rng(0), jax.eval_shape(network.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * random.normal(size=leaf.shape), jnp.float32), shapes)


def test_the_flag_is_one_more_parameter():
    """A vector of the width of the embedding; all others start as they do without it."""
    init = jax.jit(
        lambda key, given_embedding: dataclasses.replace(NETWORK, given_embedding=given_embedding).init(key),
        static_argnums=1,
    )
    with_flag, without = (init(jax.random.key(3), given_embedding) for given_embedding in (True, False))
    flag = with_flag["trunk"].pop("given")
    assert flag.shape == (16,) and flag.dtype == jnp.float32 and np.std(flag) > 0.1
    jax.tree.map(np.testing.assert_array_equal, with_flag, without)
    assert NETWORK.num_parameters() == dataclasses.replace(NETWORK, given_embedding=False).num_parameters() + 16


def test_with_nothing_given_it_is_the_network_without_the_flag():
    """Bit for bit, each way to ask, and to rounding where it is told so by flags. A flag is seen by every position of
    its row."""
    params, plain = random_params(NETWORK), dataclasses.replace(NETWORK, given_embedding=False)
    x = jax.random.randint(jax.random.key(1), (2, L), 0, V)
    sigma, none = jnp.array([0.3, 2.0]), jnp.zeros((2, L), bool)

    def asked(network, **flags):
        denoised, log_score = network.denoiser(params, **flags)(x, sigma), network.log_score(params, x, sigma, **flags)
        return denoised, log_score, network.stats(params, **flags)(x, sigma, 1 - x % 2)

    wanted, found = jax.jit(lambda: asked(plain))(), jax.jit(lambda: asked(NETWORK))()
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    told = jax.jit(lambda given: asked(NETWORK, given=given))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, told(none), wanted)
    flagged = told(none.at[0, 1].set(True))
    jax.tree.map(lambda found, other: close(found[1], other[1]), flagged, wanted)
    assert np.all(np.abs(flagged[0][0] - wanted[0][0]).max(-1) > 1e-3)


def test_a_model_tells_its_denoiser_and_its_score_what_is_given():
    """By the array of given tokens. Control: without it they are other numbers."""
    params = random_params(NETWORK)
    model = sedd.Model(None, params, None, NETWORK.process, LogLinear(), NETWORK)
    x, given = np.array([[0, 1, 2, 1]]), np.array([[True, False, True, False]])
    told = jax.jit(lambda: NETWORK.denoiser(params, given=jnp.asarray(given))(x, jnp.ones(1)))()
    seen = jax.jit(lambda: model.denoiser(x, given)(np.where(given, 2 - x, x), jnp.ones(1), None))()
    np.testing.assert_array_equal(seen, told)
    assert np.abs(told - jax.jit(lambda: model.denoiser()(x, jnp.ones(1), None))()).max() > 1e-3
    score = model.log_score(x, np.ones(1, np.float32), given=given)
    assert np.abs(score - model.log_score(x, np.ones(1, np.float32))).max() > 1e-3


def test_flags_without_a_place_for_them_are_refused():
    plain, given = dataclasses.replace(NETWORK, given_embedding=False), jnp.zeros((1, L), bool)
    with pytest.raises(ValueError, match="no embedding of given tokens; train one with network.given_embedding=True"):
        plain.denoiser({}, given=given)(jnp.zeros((1, L), int), jnp.ones(1))
    with pytest.raises(ValueError, match="network.given_embedding is for the uniform process"):
        dataclasses.replace(NETWORK, process=Absorbing(V))


# The objective.


def test_the_loss_is_the_entropy_of_the_others_given_them():
    """Of exact scores told what is given, over random given tokens and times. Controls: the entropy with nothing given,
    and the same noise with scores that are not told."""
    rows, key = jnp.arange(2**15), jax.random.key(2)
    copied = MarkovChain(np.full(V, 1 / V), 0.94 * np.eye(V) + 0.02).joint(3)
    x0 = jnp.asarray(copied.draw(len(rows)))
    objectives = [Objective(Exact(copied, told), LogLinear(1e-4), len(rows), "time", 1e-5) for told in (True, False)]

    @jax.jit
    def found():
        return [objective({}, x0, rows, key) for objective in objectives], objectives[0].free_and_given(rows, key, 3)

    (told, untold), (free, given) = found()
    np.testing.assert_array_equal(free, ~given)
    assert abs(standard_errors(told - copied.surprise(x0, free))) < 4 < standard_errors(copied.surprise(x0) - told)
    assert standard_errors(untold - told) > 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("small"))


@pytest.mark.slow
def test_given_tokens_are_the_same_on_any_devices(corpus):
    """Steps on four devices in two microbatches, with ragged rows: the loss shown is that of the whole batch on one,
    of a token that is scored. Control: of one that counts. The flag is learnt."""
    config = small_config(corpus, *OBSERVED, "network.layers=1", "training.accumulation=2")
    objective, optimizer, mesh = parts(config, corpus, 4)
    _, step, where = make_step(config, objective, optimizer, mesh)
    start = jax.device_get(jax.jit(lambda: init_state(config, objective, optimizer))())
    state, rows, lengths = jax.device_put(start, where), jnp.arange(8), np.array([16, 9, 16, 3, 1, 16, 12, 16])

    @jax.jit
    def whole(params, tokens, key):
        free, given = objective.free_and_given(rows, key, 16, lengths)
        return objective(params, tokens, rows, key, lengths), free, given

    for k in range(3):
        params, tokens = jax.device_get(state.params), batch(corpus, 16, 8, 0, k).tokens
        loss, free, given = whole(params, tokens, jax.random.fold_in(jax.random.key(config.training.seed), k))
        state, metrics = step(state, jax.device_put(Batch(tokens, lengths), parallel.batch_sharding(mesh)))
        np.testing.assert_allclose(metrics["loss"], np.sum(loss) / np.sum(free), rtol=1e-5)
        assert np.any(given) and np.sum(free) + np.sum(given) == lengths.sum() > 1.05 * np.sum(free)
    assert np.all(jax.device_get(state.params)["trunk"]["given"] != start.params["trunk"]["given"])


# Likelihoods.


def test_a_bound_given_a_context_is_the_conditional(law):
    """Of exact scores, for each sequence and several contexts: they have no gap. Controls: scores not told."""
    tokens = np.indices((V,) * L).reshape(L, -1).T[::5]
    for seed, free in enumerate(([0, 0, 0, 1], [0, 1, 1, 0], [1, 0, 1, 1])):
        free = np.broadcast_to(np.array(free, bool), tokens.shape)
        answers = Answers(tokens, free, np.full(len(tokens), L))

        def off(told):
            found = log_likelihoods(Exact(law, told), LogLinear(1e-3), {}, answers, num_draws=512, seed=seed)
            assert {(one.method, one.is_bound) for one in found} == {("levels", True)}
            wanted = -law.surprise(tokens, free)
            return np.array([(one.nats - nats) / one.standard_error for one, nats in zip(found, wanted)])

        assert np.abs(off(True)).max() < 4 < np.abs(off(False)).max()


def test_a_model_told_what_is_given_scores_answers():
    """A context counts, and its flag does; with none it is the bound of the model without flags, which has no other."""
    told, plain = random_model(*OBSERVED, letters="abcd"), random_model(*UNIFORM, letters="abcd")
    trunk = {name: leaf for name, leaf in told.params["trunk"].items() if name != "given"}
    plain = dataclasses.replace(plain, params={**told.params, "trunk": trunk})
    flag = jnp.zeros_like(told.params["trunk"]["given"])
    blind = dataclasses.replace(told, params={**told.params, "trunk": {**trunk, "given": flag}})

    def nats(model, given):
        found = model.log_likelihood(["abc", "abc", "bca"], given)
        assert {(one.method, one.is_bound) for one in found} == {("levels", True)}
        return np.array([one.nats for one in found])

    np.testing.assert_allclose(nats(told, ""), nats(plain, ""), rtol=1e-5)
    found = nats(told, "dd")
    assert found[0] == found[1] != found[2]
    for other in (nats(told, "da"), nats(blind, "dd"), nats(told, "")):
        assert np.abs(other - found).min() > 1e-3
    with pytest.raises(sedd.UserError, match="a uniform model has 'bound'"):
        told.log_likelihood("abc", "d", method="exact")


@pytest.mark.slow
def test_a_network_learns_to_be_told():
    """Trained on a law whose tokens are mostly copies of each other. At much noise its answers with the flags are near
    to the exact conditional, those of the same network without them are not; nor are its bounds of answers."""
    process, length, rows, steps = Uniform(4), 4, 128, 1500
    law = MarkovChain(np.full(4, 1 / 4), 0.94 * np.eye(4) + 0.015).joint(length)
    network = Network(process, "denoiser", 32, 1, 2, sigma_range=(1e-3, 6.9), cond_dim=32, given_embedding=True)
    objective = Objective(network, LogLinear(1e-3), rows, "time", 0.1)  # gradients scatter much at little noise
    rate = optax.cosine_decay_schedule(5e-3, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rate, b2=0.99))
    texts = jnp.asarray(law.draw(steps * rows)).reshape(steps, rows, length)

    @jax.jit
    def trained(params):
        def step(carry, number):
            params, moments = carry
            key = jax.random.fold_in(jax.random.key(1), number)

            def loss(params):
                return objective(params, texts[number], jnp.arange(rows), key).sum() / rows

            updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
            return (optax.apply_updates(params, updates), moments), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))[0][0]

    params = trained(network.init(jax.random.key(0)))
    x0, given = law.draw(512, seed=1), given_rows(np.arange(512), np.full(512, length), seed=7)
    x = np.where(given, x0, np.random.default_rng(2).integers(0, 4, x0.shape))
    sigma = np.full(512, 3.0, np.float32)
    exact = np.exp(law.informed(process, given)(x, sigma))
    ask = jax.jit(lambda flags: jnp.exp(network.denoiser(params, given=flags)(x, sigma)))

    def away(flags):  # in total variation, where something is given
        each = np.abs(ask(flags) - exact).sum(-1) / 2
        return each[~given & given.any(-1, keepdims=True)].mean()

    assert away(given) < 0.1 < 0.4 < away(np.zeros_like(given))

    free = np.broadcast_to(np.arange(length) > 0, (64, length))
    answers = Answers(x0[:64], free, np.full(64, length))
    trunk = {**params["trunk"], "given": jnp.zeros(32)}

    def excess(params):
        found = log_likelihoods(network, LogLinear(1e-3), params, answers, num_draws=256)
        return np.mean([-one.nats for one in found] - law.surprise(answers.tokens, free))

    assert 0 < 2 * excess(params) < excess({**params, "trunk": trunk})
