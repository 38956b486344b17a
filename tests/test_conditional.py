"""The log-likelihood of answers: against sums over all orders by hand, and what answers share; two models compared."""

import dataclasses
import itertools
import re

import jax
import numpy as np
import pytest
from test_protocols import LENGTH, random_documents, random_model

import sedd
from sedd.data.layout import Layout
from sedd.data.tokenizers import Tokenizer, make_tokenizer
from sedd.diffusion.process import Absorbing, Uniform
from sedd.evaluation.conditional import answers_to, log_likelihoods

IGNORED = Layout("padded", "ignored")
KINDS = {  # the second is told the noise of a padded row; the noise of the others is clipped, where little is masked
    "denoiser": {"settings": ("training.min_time=0.4",)},
    "score": {"settings": ("network.prediction=score", "training.min_time=0.4")},
    "padded": {"settings": (), "layout": IGNORED},
}
UNIFORM = ("process.name=uniform", "training.noise_sampling=time")
GIVEN, ANSWER = "dabca", "cba"


def made(*settings, **others):
    return random_model(*settings, letters="abcd", **{"scale": 0.5, **others})


@pytest.fixture(scope="module")
def models():
    return {kind: made(*about["settings"], layout=about.get("layout", Layout())) for kind, about in KINDS.items()}


@pytest.fixture(scope="module")
def model():
    """Of one shape with the first, less sure of itself: its orders differ less."""
    return made(*KINDS["denoiser"]["settings"], scale=0.3)


@dataclasses.dataclass(frozen=True)
class ByHand:
    """What a network believes of an answer's n tokens, whatever is revealed of them. log_r: Float64[2^n n V]."""

    log_r: np.ndarray
    told: np.ndarray  # Int[n]

    @classmethod
    def of(cls, model, given, answer):
        """From its log scores: of masks they are log r but for a constant."""
        ids = model.tokenizer.encode(given + answer)
        told, n = ids[len(given) :], len(answer)
        revealed = (np.arange(2**n)[:, None] >> np.arange(n)) & 1 > 0
        rows = np.full((2**n, LENGTH), model.process.mask)
        rows[:, : len(given)] = ids[: len(given)]
        rows[:, len(given) : len(ids)] = np.where(revealed, told, model.process.mask)
        length, lengths = LENGTH, None
        if model.layout.masks_padding:
            rows[:, len(ids) :] = model.tokenizer.end_of_text
            length, lengths = len(ids) + 1, np.full(2**n, len(ids) + 1)
        share = (np.maximum((rows == model.process.mask).sum(1), 1) - 0.5) / length
        sigma = np.clip(-np.log1p(-share), *model.network.sigma_range)
        log_score = np.asarray(model.log_score(rows, sigma, lengths), np.float64)[..., : model.process.vocab_size]
        log_r = log_score - np.logaddexp.reduce(log_score, axis=-1, keepdims=True)
        return cls(log_r[:, len(given) : len(ids)], told)

    def along(self, order):
        """The log-likelihood, revealed in this order."""
        before = [sum(1 << i for i in order[:k]) for k in range(len(order))]
        return sum(self.log_r[revealed, i, self.told[i]] for revealed, i in zip(before, order))

    def along_all(self):
        return np.array([self.along(order) for order in itertools.permutations(range(len(self.told)))])

    def exact(self):
        values = self.along_all()
        return np.logaddexp.reduce(values) - np.log(len(values))

    def walked(self, certainty):
        """Always the position that is the most certain."""
        order = []
        while len(order) < len(self.told):
            left = [i for i in range(len(self.told)) if i not in order]
            law = self.log_r[sum(1 << i for i in order)]
            order.append(max(left, key=lambda i: certainty(np.sort(law[i]))))
        return self.along(order)


CERTAINTIES = {
    "margin": lambda log_r: np.exp(log_r[-1]) - np.exp(log_r[-2]),
    "entropy": lambda log_r: np.sum(np.exp(log_r) * log_r),
}
SAMPLES = 2**14


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("full", [False, True], ids=["the rest unknown", "a full block"])
def test_exact_is_the_sum_over_all_orders(models, kind, full):
    """Control: the likelihood along a single one."""
    model, given = models[kind], GIVEN + "abcd"[: 4 - (kind == "padded")] * full
    by_hand, found = ByHand.of(model, given, ANSWER), model.log_likelihood(ANSWER, given, method="exact")
    np.testing.assert_allclose(found.nats, by_hand.exact(), rtol=1e-5)
    assert np.abs(by_hand.along_all() - found.nats).min() > 1e-4
    assert (found.standard_error, found.method, found.is_bound) == (None, "exact", False)
    assert model.log_likelihood(ANSWER, given) == found  # auto


@pytest.mark.parametrize("method", CERTAINTIES)
def test_the_most_certain_first(model, method):
    """Walked by hand. Control: the walk of the other."""
    answers = ["abc", "dca", "bbb", "cdc", "adb", "cba"]
    found = model.log_likelihood(answers, GIVEN, method=method)
    walks = {
        name: [ByHand.of(model, GIVEN, answer).walked(certainty) for answer in answers]
        for name, certainty in CERTAINTIES.items()
    }
    nats = np.array([one.nats for one in found])
    np.testing.assert_allclose(nats, walks.pop(method), rtol=1e-5)
    assert np.abs(nats - next(iter(walks.values()))).max() > 1e-3
    assert {(one.standard_error, one.method, one.is_bound) for one in found} == {(None, method, False)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_the_mean_over_orders(models, kind):
    """Below the exact value, by more than its error."""
    by_hand = ByHand.of(models[kind], GIVEN, ANSWER)
    found = models[kind].log_likelihood(ANSWER, GIVEN, method="bound", draws=SAMPLES)
    assert abs(found.nats - by_hand.along_all().mean()) < 4 * found.standard_error
    assert found.nats + 4 * found.standard_error < by_hand.exact()
    assert found.method == "bound" and found.is_bound


def test_orders_lie_between(models, model):
    """Of many the bound is nearly exact; of few it lies lower, as it has to, and its error is known."""
    by_hand = ByHand.of(models["denoiser"], GIVEN, ANSWER)
    many = models["denoiser"].log_likelihood(ANSWER, GIVEN, method="orders", draws=SAMPLES)
    assert abs(many.nats - by_hand.exact()) < 4 * many.standard_error
    assert many.nats - 4 * many.standard_error > by_hand.along_all().mean()
    assert many.method == "orders" and many.is_bound

    def few(model):
        found = [model.log_likelihood(ANSWER, GIVEN, method="orders", draws=8, seed=seed) for seed in range(120)]
        return np.array([[one.nats, one.standard_error] for one in found]).T

    nats, _ = few(models["denoiser"])
    drawn = np.random.default_rng(0).choice(by_hand.along_all(), (100_000, 8))
    expected = np.mean(np.logaddexp.reduce(drawn, axis=1) - np.log(8))
    assert abs(nats.mean() - expected) < 4 * nats.std() / len(nats) ** 0.5 < expected - by_hand.along_all().mean()
    assert expected < by_hand.exact() - 0.1
    nats, errors = few(model)
    np.testing.assert_allclose(errors.mean(), nats.std(), rtol=0.2)


def test_auto_is_exact_where_that_is_affordable(model):
    """Up to 8 tokens at 64 draws. A list has one method, as exact values and bounds cannot be compared."""
    methods = {answer: model.log_likelihood(answer, "d").method for answer in ("abcdabcd", "abcdabcda")}
    assert methods == {"abcdabcd": "exact", "abcdabcda": "bound"}
    assert model.log_likelihood("abc", "d", draws=8).method == "exact"
    assert [one.method for one in model.log_likelihood(["a", "abcdabcda"], "d")] == ["bound"] * 2


# What answers share.


def test_answers_share_their_noise(model):
    """Twice the same answer is twice the same number, in any company; another seed gives another."""

    def of(answers, seed=0):
        return model.log_likelihood(answers, "da", method="bound", seed=seed)

    first, second = of(["abcabc", "abcabc"])
    assert first == second and first == of(["abcabc", "ddd"])[0]
    for company in (["abcabc"], ["ddd"] * 5 + ["abcabc"]):  # fewer rows at once, and more than there are at once
        np.testing.assert_allclose(of(company)[-1].nats, first.nats, rtol=1e-6)
    assert of(["abcabc", "ddd"], seed=1)[0].nats != first.nats
    with_alike = np.array([[one.nats for one in of(["abcabc", "abcabd"], seed)] for seed in range(40)])
    shared, own = (np.subtract(*pair).std() for pair in (with_alike.T, (with_alike[:-1, 0], with_alike[1:, 1])))
    assert shared < own / 2


# What is an answer's.


class Merging:
    """Pieces of which one, `ab`, hides a boundary: the longest that fits is taken."""

    data, size, end_of_text = b"", 4, None
    pieces = ("a", "b", "c", "ab")

    def encode_all(self, texts):
        return [np.array([self.pieces.index(piece) for piece in re.findall("ab|.", text)], np.int32) for text in texts]


MERGING = Tokenizer("merging", Merging(), True)
BYTES, MASK = make_tokenizer("bytes", [], True), 4


@pytest.mark.parametrize(
    "given, answer, tokens, positions",
    [
        ("", "abc", [3, 2], [0, 1]),
        ("c", "ab", [2, 3], [1]),
        ("ca", "b", [2, 3], [1]),  # what was given ends in another piece
        ("ca", "bab", [2, 3, 3], [1, 2]),
        ("a", "b", [3], [0]),  # nothing of it is left
        ("cab", "b", [2, 3, 1], [2]),
    ],
)
def test_the_tokens_of_an_answer(models, given, answer, tokens, positions):
    """Those of both together that those of what is given do not begin with; the rest is masked and stays so."""
    found = answers_to(given, [answer], MERGING, Absorbing(5), 6, Layout())
    np.testing.assert_array_equal(found.tokens, [tokens + [5] * (6 - len(tokens))])
    assert np.flatnonzero(found.free[0]).tolist() == positions and found.lengths is None


def test_bytes_of_a_character_are_one_answer():
    found = answers_to("é", ["è", "ab"], BYTES, Absorbing(257), 6, Layout())
    np.testing.assert_array_equal(found.tokens[:, :4], [[0xC3, 0xA9, 0xC3, 0xA8], [0xC3, 0xA9, 0x61, 0x62]])
    np.testing.assert_array_equal(found.free, [[False, False, True, True, False, False]] * 2)


@pytest.mark.parametrize(
    "layout, process, rest, lengths",
    [
        (Layout("padded", "ignored"), Absorbing(5), [4, 4, 4], [4]),  # it ends there, and the network is told
        (Layout("padded", "scored"), Absorbing(5), [5, 5, 5], None),
        (Layout(), Absorbing(5), [5, 5, 5], None),
        (Layout(), Uniform(5), None, [3]),
    ],
    ids=["ignored", "scored", "packed", "uniform"],
)
def test_what_follows_an_answer(layout, process, rest, lengths):
    found = answers_to("c", ["aba"], MERGING, process, 6, layout)
    assert found.tokens[0, :3].tolist() == [2, 3, 0] and found.free.tolist() == [[False, True, True] + [False] * 3]
    assert rest is None or found.tokens[0, 3:].tolist() == rest
    assert lengths == (None if found.lengths is None else found.lengths.tolist())


def test_a_merged_piece_is_scored_as_what_it_is(model):
    """p(ab | c), wherever the boundary fell. Control: the piece b after c and a."""
    merging = dataclasses.replace(model, tokenizer=MERGING)
    answer = merging.log_likelihood("bcc", "ca")
    assert answer == merging.log_likelihood("abcc", "c") and answer != model.log_likelihood("bcc", "ca")


# Mistakes.


@pytest.mark.parametrize(
    "ask, message",
    [
        (([],), "there are no answers to score"),
        ((["a", ""], "b"), "an answer is empty; there is nothing to score"),
        (("abcd", "abcd" * 3), f"given and answer take 16 tokens, more than the model's block of {LENGTH}; shorten"),
        (("a\ud800",), r"an answer holds '\\ud800', which is no character"),
        (("a", "b\udfff"), r"what is given holds '\\udfff', which is no character"),
        (("z",), "character 'z'"),
        (("a", "b", "best"), "no method 'best'; there are auto, exact, bound, orders, margin, entropy"),
        (("a", "b", "bound", 10), "draws must be a multiple of 4, and at least 8, not 10"),
        (("a", "b", "bound", 4), "draws must be a multiple of 4, and at least 8, not 4"),
    ],
)
def test_mistakes(model, ask, message):
    """Each in one line, before the parameters are touched."""
    names = dict(zip(("answer", "given", "method", "draws"), ask))
    with pytest.raises(sedd.UserError, match=message) as error:
        dataclasses.replace(model, params=None).log_likelihood(names.pop("answer"), names.pop("given", ""), **names)
    assert "\n" not in str(error.value)


def test_mistakes_of_some_models(model):
    bare = dataclasses.replace(model, params=None)
    with pytest.raises(sedd.UserError, match="no tokenizer, so it takes no text"):
        dataclasses.replace(bare, tokenizer=None).log_likelihood("a")
    longer = dataclasses.replace(made("data.block_length=16"), params=None)
    with pytest.raises(sedd.UserError, match=r"13 tokens takes 2\^13 network rows .* at most 12 .* use method='bound'"):
        longer.log_likelihood("a" * 13, method="exact")
    padded = dataclasses.replace(bare, layout=IGNORED)
    with pytest.raises(sedd.UserError, match="take 13 tokens, more than the model's block of 12"):  # with its end
        padded.log_likelihood("a" * 11, "b")
    uniform = dataclasses.replace(made(*UNIFORM), params=None)
    with pytest.raises(
        sedd.UserError, match="given a context; leave given= out, .* or one with network.given_embedding=True"
    ):
        uniform.log_likelihood("a", "b")
    with pytest.raises(sedd.UserError, match="'exact' is for the absorbing process; a uniform model has 'bound'"):
        uniform.log_likelihood("a", method="exact")


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["denoiser", "score"])
def test_a_uniform_model_has_a_bound_of_whole_texts(prediction):
    """That of the perplexity job, of a text at its own length. Control: of another text."""
    model, texts = made(*UNIFORM, f"network.prediction={prediction}", scale=0.3), ["abcdabc", "ddd"]
    found = model.log_likelihood(texts, draws=4096)
    assert {(one.method, one.is_bound) for one in found} == {("levels", True)}
    report = model.perplexity(["abcdabc"] * 64, draws=64, progress=False)
    error = np.hypot(found[0].standard_error, 7 * report.standard_error)
    differences = [one.nats + 7 * report.nats_per_token for one in found]
    assert abs(differences[0]) < 4 * error < abs(differences[1])
    answers = answers_to("", texts, model.tokenizer, model.process, LENGTH, model.layout)
    answers.tokens[:, 7:] = 3  # whatever lies behind the text is not seen
    assert log_likelihoods(model.network, model.schedule, model.params, answers, num_draws=4096) == found


# Two models.

TEXTS = [text for text in random_documents(60, 30, seed=2) if text]


@pytest.fixture(scope="module")
def pair():
    """A model, and one with parameters that are near to its own."""
    model, other = random_model(), random_model(seed=1)
    return model, dataclasses.replace(
        model, params=jax.tree.map(lambda a, b: 0.95 * a + 0.05 * b, model.params, other.params)
    )


def test_a_model_does_not_differ_from_itself(pair):
    comparison = pair[0].compare(pair[0], TEXTS, protocol="mdlm", progress=False)
    assert (comparison.difference, comparison.standard_error, comparison.interval) == (0, 0, (0, 0))
    assert comparison.first.draws == 1  # the protocol's


def test_the_difference_of_two_models(pair):
    """That of their perplexities, with less error than two reports have that share no noise."""
    comparison = pair[0].compare(pair[1], TEXTS, draws=4, seed=5, progress=False)
    reports = [model.perplexity(TEXTS, draws=4, seed=5, progress=False) for model in pair]
    assert (comparison.first, comparison.second) == tuple(reports)
    first, second = reports
    np.testing.assert_allclose(comparison.difference, first.nats_per_token - second.nats_per_token, rtol=1e-9)
    assert 0 < comparison.standard_error < np.hypot(first.standard_error, second.standard_error) / 2
    low, high = comparison.interval
    assert low < comparison.difference < high
    back = pair[1].compare(pair[0], TEXTS, draws=4, seed=5, progress=False)
    np.testing.assert_allclose(back.difference, -comparison.difference, rtol=1e-9)
    assert f"{comparison.difference:.4f} ± {comparison.standard_error:.4f}" in str(comparison)


def test_models_that_cannot_be_compared(pair):
    model = dataclasses.replace(pair[0], params=None)
    for other, message in [
        (random_model(letters="xyz"), "they have different tokenizers"),
        (random_model("data.block_length=8"), "one has packed blocks of 12, the other packed blocks of 8"),
        (random_model(layout=IGNORED), "the other padded, its padding ignored blocks of 12"),
    ]:
        with pytest.raises(sedd.UserError, match=message) as error:
            model.compare(other, TEXTS)
        assert "\n" not in str(error.value)
