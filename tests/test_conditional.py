"""Conditional log-likelihoods against sums over all decoding orders by hand; the comparison of two models."""

import dataclasses
import itertools
import re

import jax
import numpy as np
import pytest
from small import without_network
from test_protocols import LENGTH, random_documents, random_model

import sedd
from sedd.data.layout import Layout
from sedd.data.tokenizers import Tokenizer, make_tokenizer
from sedd.diffusion.discrete.process import Absorbing, Uniform
from sedd.evaluation.answers import answers_to
from sedd.evaluation.conditional import log_likelihoods

IGNORED = Layout("padded", "ignored")
KINDS = {  # min_time clips the noise level that the network is conditioned on where few tokens are masked
    "denoiser": {"settings": ("training.min_time=0.4",)},
    "score": {"settings": ("network.prediction=score", "training.min_time=0.4")},
    "padded": {"settings": (), "layout": IGNORED},
}
UNIFORM = ("process.name=uniform", "training.loss=bound")
GIVEN, ANSWER = "dabca", "cba"


def small_model(*settings, **others):
    return random_model(*settings, letters="abcd", **{"scale": 0.5, **others})


@pytest.fixture(scope="module")
def models():
    return {
        kind: small_model(*about["settings"], layout=about.get("layout", Layout())) for kind, about in KINDS.items()
    }


@pytest.fixture(scope="module")
def model():
    """Of the same shape as the first, with flatter distributions, so that its orders differ less."""
    return small_model(*KINDS["denoiser"]["settings"], scale=0.3)


@dataclasses.dataclass(frozen=True)
class ByHand:
    """log r of an answer's n tokens given every subset of them. log_r: Float64[2^n n V]; ids: Int[n], the answer."""

    log_r: np.ndarray
    ids: np.ndarray

    @classmethod
    def of(cls, model, given, answer):
        """From the log scores, which at masks are log r up to a constant."""
        ids = model.tokenizer.encode(given + answer)
        answer_ids, n = ids[len(given) :], len(answer)
        unmasked = (np.arange(2**n)[:, None] >> np.arange(n)) & 1 > 0
        rows = np.full((2**n, LENGTH), model.process.mask_id)
        rows[:, : len(given)] = ids[: len(given)]
        rows[:, len(given) : len(ids)] = np.where(unmasked, answer_ids, model.process.mask_id)
        length, lengths = LENGTH, None
        if model.layout.masks_padding:
            rows[:, len(ids) :] = model.tokenizer.end_of_text
            length, lengths = len(ids) + 1, np.full(2**n, len(ids) + 1)
        mask_ratio = (np.maximum((rows == model.process.mask_id).sum(1), 1) - 0.5) / length
        sigma = np.clip(-np.log1p(-mask_ratio), *model.network.sigma_range)
        log_score = np.asarray(model.log_score(rows, sigma, lengths), np.float64)[..., : model.process.vocab_size]
        log_r = log_score - np.logaddexp.reduce(log_score, axis=-1, keepdims=True)
        return cls(log_r[:, len(given) : len(ids)], answer_ids)

    def along(self, order):
        """The log-likelihood along one decoding order."""
        unmasked = [sum(1 << i for i in order[:k]) for k in range(len(order))]
        return sum(self.log_r[subset, i, self.ids[i]] for subset, i in zip(unmasked, order))

    def along_all(self):
        return np.array([self.along(order) for order in itertools.permutations(range(len(self.ids)))])

    def exact(self):
        values = self.along_all()
        return np.logaddexp.reduce(values) - np.log(len(values))

    def most_certain_first(self, certainty):
        """The log-likelihood of decoding the most certain position first."""
        order = []
        while len(order) < len(self.ids):
            masked = [i for i in range(len(self.ids)) if i not in order]
            log_r = self.log_r[sum(1 << i for i in order)]
            order.append(max(masked, key=lambda i: certainty(np.sort(log_r[i]))))
        return self.along(order)


CERTAINTIES = {
    "margin": lambda log_r: np.exp(log_r[-1]) - np.exp(log_r[-2]),
    "entropy": lambda log_r: np.sum(np.exp(log_r) * log_r),
}
SAMPLES = 2**14


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("full", [False, True], ids=["the rest unknown", "a full block"])
def test_exact_is_the_sum_over_all_orders(models, kind, full):
    """Control: the likelihood along a single order."""
    model, given = models[kind], GIVEN + "abcd"[: 4 - (kind == "padded")] * full
    by_hand, exact = ByHand.of(model, given, ANSWER), model.log_likelihood(ANSWER, given, method="exact")
    np.testing.assert_allclose(exact.nats, by_hand.exact(), rtol=1e-5)
    assert np.abs(by_hand.along_all() - exact.nats).min() > 1e-4
    assert (exact.standard_error, exact.method, exact.is_bound) == (None, "exact", False)
    assert model.log_likelihood(ANSWER, given) == exact  # auto


@pytest.mark.parametrize("method", CERTAINTIES)
def test_margin_and_entropy_decode_the_most_certain_position_first(model, method):
    """By hand. Control: the other method."""
    answers = ["abc", "dca", "bbb", "cdc", "adb", "cba"]
    likelihoods = model.log_likelihood(answers, GIVEN, method=method)
    by_hand = {
        name: [ByHand.of(model, GIVEN, answer).most_certain_first(certainty) for answer in answers]
        for name, certainty in CERTAINTIES.items()
    }
    nats = np.array([one.nats for one in likelihoods])
    np.testing.assert_allclose(nats, by_hand.pop(method), rtol=1e-5)
    assert np.abs(nats - next(iter(by_hand.values()))).max() > 1e-3
    assert {(one.standard_error, one.method, one.is_bound) for one in likelihoods} == {(None, method, False)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_the_mean_over_orders(models, kind):
    """It is below the exact value by more than its error."""
    by_hand = ByHand.of(models[kind], GIVEN, ANSWER)
    bound = models[kind].log_likelihood(ANSWER, GIVEN, method="bound", draws=SAMPLES)
    assert abs(bound.nats - by_hand.along_all().mean()) < 4 * bound.standard_error
    assert bound.nats + 4 * bound.standard_error < by_hand.exact()
    assert bound.method == "bound" and bound.is_bound


def test_bound_of_orders_lies_between_bound_and_exact_value(models, model):
    """With many orders it is nearly exact; with 8 it is lower, by the expected amount, and its error is right."""
    by_hand = ByHand.of(models["denoiser"], GIVEN, ANSWER)
    many = models["denoiser"].log_likelihood(ANSWER, GIVEN, method="orders", draws=SAMPLES)
    assert abs(many.nats - by_hand.exact()) < 4 * many.standard_error
    assert many.nats - 4 * many.standard_error > by_hand.along_all().mean()
    assert many.method == "orders" and many.is_bound

    def of_8_orders(model):
        bounds = [model.log_likelihood(ANSWER, GIVEN, method="orders", draws=8, seed=seed) for seed in range(120)]
        return np.array([[one.nats, one.standard_error] for one in bounds]).T

    nats, _ = of_8_orders(models["denoiser"])
    drawn = np.random.default_rng(0).choice(by_hand.along_all(), (100_000, 8))
    expected = np.mean(np.logaddexp.reduce(drawn, axis=1) - np.log(8))
    assert abs(nats.mean() - expected) < 4 * nats.std() / len(nats) ** 0.5 < expected - by_hand.along_all().mean()
    assert expected < by_hand.exact() - 0.1
    nats, errors = of_8_orders(model)
    np.testing.assert_allclose(errors.mean(), nats.std(), rtol=0.2)


def test_auto_is_exact_where_that_is_affordable(model):
    """Up to 8 tokens at 64 draws. A list has one method, since exact values and bounds are not comparable."""
    methods = {answer: model.log_likelihood(answer, "d").method for answer in ("abcdabcd", "abcdabcda")}
    assert methods == {"abcdabcd": "exact", "abcdabcda": "bound"}
    assert model.log_likelihood("abc", "d", draws=8).method == "exact"
    assert [one.method for one in model.log_likelihood(["a", "abcdabcda"], "d")] == ["bound"] * 2


# Noise shared between answers.


def test_answers_share_their_noise(model):
    """Equal answers have equal numbers, whatever the other answers are; another seed gives another number."""

    def of(answers, seed=0):
        return model.log_likelihood(answers, "da", method="bound", seed=seed)

    first, second = of(["abcabc", "abcabc"])
    assert first == second and first == of(["abcabc", "ddd"])[0]
    for answers in (["abcabc"], ["ddd"] * 5 + ["abcabc"]):  # fewer rows than a group has, and more
        np.testing.assert_allclose(of(answers)[-1].nats, first.nats, rtol=1e-6)
    assert of(["abcabc", "ddd"], seed=1)[0].nats != first.nats
    nats = np.array([[one.nats for one in of(["abcabc", "abcabd"], seed)] for seed in range(40)])
    shared, own = (np.subtract(*pair).std() for pair in (nats.T, (nats[:-1, 0], nats[1:, 1])))
    assert shared < own / 2


# Rows of answers.


class Merging:
    """A greedy longest-match tokenizer whose piece `ab` spans the boundary between context and answer."""

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
        ("ca", "b", [2, 3], [1]),  # the last piece of the context changes
        ("ca", "bab", [2, 3, 3], [1, 2]),
        ("a", "b", [3], [0]),  # no piece of the context is left
        ("cab", "b", [2, 3, 1], [2]),
    ],
)
def test_tokens_of_an_answer_follow_the_prefix_shared_with_the_context(models, given, answer, tokens, positions):
    """The rest of the row is masked."""
    answers = answers_to(given, [answer], without_network(MERGING, Absorbing(5), 6))
    np.testing.assert_array_equal(answers.tokens, [tokens + [5] * (6 - len(tokens))])
    assert np.flatnonzero(answers.free[0]).tolist() == positions and answers.lengths.tolist() == [6]


def test_all_bytes_of_a_character_belong_to_the_answer():
    """Also those that the context ends with."""
    answers = answers_to("é", ["è", "ab"], without_network(BYTES, Absorbing(257), 6))
    np.testing.assert_array_equal(answers.tokens[:, :4], [[0xC3, 0xA9, 0xC3, 0xA8], [0xC3, 0xA9, 0x61, 0x62]])
    np.testing.assert_array_equal(answers.free, [[False, False, True, True, False, False]] * 2)


@pytest.mark.parametrize(
    "layout, process, rest, lengths",
    [
        (Layout("padded", "ignored"), Absorbing(5), [4, 4, 4], [4]),  # the row ends with an end of text
        (Layout("padded", "scored"), Absorbing(5), [5, 5, 5], [6]),
        (Layout(), Absorbing(5), [5, 5, 5], [6]),
        (Layout(), Uniform(5), None, [3]),
    ],
    ids=["ignored", "scored", "packed", "uniform"],
)
def test_rest_of_a_row_depends_on_process_and_layout(layout, process, rest, lengths):
    answers = answers_to("c", ["aba"], without_network(MERGING, process, 6, layout))
    assert answers.tokens[0, :3].tolist() == [2, 3, 0]
    assert answers.free.tolist() == [[False, True, True] + [False] * 3]
    assert rest is None or answers.tokens[0, 3:].tolist() == rest
    assert answers.lengths.tolist() == lengths


def test_a_piece_across_the_boundary_is_scored_as_one_token(model):
    """p(ab | c), wherever the boundary lies. Control: the piece b after c and a."""
    merging = dataclasses.replace(model, tokenizer=MERGING)
    answer = merging.log_likelihood("bcc", "ca")
    assert answer == merging.log_likelihood("abcc", "c") and answer != model.log_likelihood("bcc", "ca")


# Invalid arguments.


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([],), "there are no answers to score"),
        ((["a", ""], "b"), "an answer is empty; there is nothing to score"),
        (
            ("abcd", "abcd" * 3),
            f"given and answer take 16 tokens, more than the model's block of {LENGTH}; shorten the given",
        ),
        (("a\ud800",), r"an answer holds '\\ud800', which is no character"),
        (("a", "b\udfff"), r"the given text holds '\\udfff', which is no character"),
        (("z",), "character 'z'"),
        (("a", "b", "best"), "no method 'best'; there are auto, exact, bound, orders, margin, entropy"),
        (("a", "b", "bound", 10), "draws must be a multiple of 4, and at least 8, not 10"),
        (("a", "b", "bound", 4), "draws must be a multiple of 4, and at least 8, not 4"),
    ],
)
def test_invalid_arguments_are_refused(model, arguments, message):
    """Each in one line, before the parameters are used."""
    named = dict(zip(("answer", "given", "method", "draws"), arguments))
    with pytest.raises(sedd.UserError, match=message) as error:
        dataclasses.replace(model, params=None).log_likelihood(named.pop("answer"), named.pop("given", ""), **named)
    assert "\n" not in str(error.value)


def test_arguments_that_a_model_does_not_support_are_refused(model):
    bare = dataclasses.replace(model, params=None)
    with pytest.raises(sedd.UserError, match="no tokenizer, so it takes no text"):
        dataclasses.replace(bare, tokenizer=None).log_likelihood("a")
    longer = dataclasses.replace(small_model("data.block_length=16"), params=None)
    with pytest.raises(sedd.UserError, match=r"13 tokens takes 2\^13 network rows .* at most 12 .* use method='bound'"):
        longer.log_likelihood("a" * 13, method="exact")
    padded = dataclasses.replace(bare, layout=IGNORED)
    with pytest.raises(
        sedd.UserError, match="take 13 tokens, more than the model's block of 12"
    ):  # with the end of text
        padded.log_likelihood("a" * 11, "b")
    uniform = dataclasses.replace(small_model(*UNIFORM), params=None)
    with pytest.raises(
        sedd.UserError, match="given a context; leave given= out, .* or one with network.given_embedding=True"
    ):
        uniform.log_likelihood("a", "b")
    with pytest.raises(sedd.UserError, match="'exact' is for the absorbing process; other models have 'bound'"):
        uniform.log_likelihood("a", method="exact")


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["posterior", "score"])
def test_bound_of_a_uniform_model_without_context_is_that_of_the_perplexity_job(prediction):
    """For a text at its own length. Control: another text."""
    model, texts = small_model(*UNIFORM, f"network.prediction={prediction}", scale=0.3), ["abcdabc", "ddd"]
    bounds = model.log_likelihood(texts, draws=4096)
    assert {(one.method, one.is_bound) for one in bounds} == {("levels", True)}
    report = model.perplexity(["abcdabc"] * 64, draws=64, progress=False)
    error = np.hypot(bounds[0].standard_error, 7 * report.standard_error)
    differences = [one.nats + 7 * report.nats_per_token for one in bounds]
    assert abs(differences[0]) < 4 * error < abs(differences[1])
    answers = answers_to("", texts, model)
    answers.tokens[:, 7:] = 3  # padding is masked from the network
    assert log_likelihoods(model, answers, num_draws=4096) == bounds


# Two models.

TEXTS = [text for text in random_documents(60, 30, seed=2) if text]


@pytest.fixture(scope="module")
def pair():
    """Two models with similar parameters."""
    model, other = random_model(), random_model(seed=1)
    return model, dataclasses.replace(
        model, params=jax.tree.map(lambda a, b: 0.95 * a + 0.05 * b, model.params, other.params)
    )


def test_a_model_does_not_differ_from_itself(pair):
    comparison = pair[0].compare(pair[0], TEXTS, protocol="mdlm", progress=False)
    assert (comparison.difference, comparison.standard_error, comparison.interval) == (0, 0, (0, 0))
    assert comparison.first.draws == 1  # the protocol's


def test_comparison_is_the_paired_difference_of_two_reports(pair):
    """Its error is less than that of the difference of reports without shared noise."""
    comparison = pair[0].compare(pair[1], TEXTS, draws=4, seed=5, progress=False)
    reports = [model.perplexity(TEXTS, draws=4, seed=5, progress=False) for model in pair]
    assert (comparison.first, comparison.second) == tuple(reports)
    first, second = reports
    np.testing.assert_allclose(comparison.difference, first.nats_per_token - second.nats_per_token, rtol=1e-9)
    assert 0 < comparison.standard_error < np.hypot(first.standard_error, second.standard_error) / 2
    low, high = comparison.interval
    assert low < comparison.difference < high
    reverse = pair[1].compare(pair[0], TEXTS, draws=4, seed=5, progress=False)
    np.testing.assert_allclose(reverse.difference, -comparison.difference, rtol=1e-9)
    assert f"{comparison.difference:.4f} ± {comparison.standard_error:.4f}" in str(comparison)


def test_models_that_cannot_be_compared_are_refused(pair):
    model = dataclasses.replace(pair[0], params=None)
    for other, message in [
        (random_model(letters="xyz"), "they have different tokenizers"),
        (random_model("data.block_length=8"), "one has packed blocks of 12, the other packed blocks of 8"),
        (random_model(layout=IGNORED), "the other padded, its padding ignored blocks of 12"),
    ]:
        with pytest.raises(sedd.UserError, match=message) as error:
            model.compare(other, TEXTS)
        assert "\n" not in str(error.value)
