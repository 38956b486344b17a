"""Protocols: the blocks, times and numbers of each, against the formulas of the papers."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from small import SETTINGS, model_of, small_corpus, without_network

import sedd
from sedd import config as configs
from sedd.data.layout import Layout
from sedd.data.sources import open_source
from sedd.data.tokenizers import make_tokenizer
from sedd.diffusion import keyed_random
from sedd.diffusion.discrete.process import Absorbing
from sedd.diffusion.discrete.score import ScoreStats
from sedd.diffusion.schedule import LogLinear
from sedd.evaluation.protocols import CLEAN, PROTOCOLS, get_protocol, grouped, scoring_rows
from sedd.network.token_network import TokenNetwork
from sedd.network.trunk import Trunk

LENGTH = 12
LETTERS = "abcdefgh "
SMALLER = (f"data.block_length={LENGTH}", "network.layers=1")
FAMILY = ("sedd-paper", "mdlm", "duo")
PACKED = Layout()


def random_model(*settings, letters=LETTERS, layout=PACKED, tokenizer=None, seed=0, scale=0.3):
    """A model of random parameters, those of the head too, so that its distribution is far from uniform."""
    tokenizer = tokenizer or make_tokenizer("characters", [letters], True)
    config = configs.override(configs.default(), [*SETTINGS, *SMALLER, *settings])
    random = np.random.default_rng(seed)

    def params(init):
        shapes = jax.eval_shape(init, jax.random.key(0))
        return jax.tree.map(lambda leaf: jnp.asarray(scale * random.normal(size=leaf.shape), jnp.float32), shapes)

    return model_of(config, tokenizer, params, layout)


def random_documents(number, longest, seed=0):
    """Texts of random letters, some empty."""
    random = np.random.default_rng(seed)
    return ["".join(random.choice(list(LETTERS), random.integers(0, longest))) for _ in range(number)]


# Blocks.

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7], [], [7] * 7]


@pytest.mark.parametrize(
    "name, documents, expected",
    [  # The first of eight shards takes two of nine documents; the last three are empty. 9 is the end of text.
        ("sedd-paper", [*DOCUMENTS, [], [], [], []], [[1, 2, 3, 9], [5, 6, 7, 9], [7, 7, 7, 7], [7, 7, 7, 9]]),
        ("sedd-paper", DOCUMENTS[:2], [[1, 2, 3, 9]]),  # fewer documents than shards
        ("mdlm", DOCUMENTS[:4], [[9, 1, 2, 9], [9, 3, 9, 9], [9, 4, 9, 9], [9, 5, 6, 9], [9, 7, 9, 9]]),
        ("duo", DOCUMENTS[:4], [[9, 1, 2, 9], [9, 3, 4, 9], [9, 5, 6, 9]]),
        ("duo", [[1]], np.zeros((0, 4))),
    ],
)
def test_blocks_by_hand(name, documents, expected):
    blocks = grouped([np.array(ids, np.int32) for ids in documents], 4, PROTOCOLS[name], 9)
    assert blocks.dtype == np.int32
    np.testing.assert_array_equal(blocks, expected)


def cut_by_hand(documents, length, end, shards, append_eos, wrap_with_eos, group=1000):
    """The blocks, built token by token."""
    sizes = [len(documents) // shards + (shard < len(documents) % shards) for shard in range(shards)]
    around = [end] if wrap_with_eos and end is not None else []
    rest, blocks = iter(documents), []
    for size in sizes:
        of_shard = list(itertools.islice(rest, size))
        while of_shard:
            block = []
            for ids in of_shard[:group]:
                for token in [*ids, end] if append_eos and end is not None else ids:
                    block.append(int(token))
                    if len(block) == length - 2 * len(around):
                        blocks.append([*around, *block, *around])
                        block = []
            of_shard = of_shard[group:]
    return blocks


RULES = {"sedd-paper": (8, True, False), "mdlm": (1, True, True), "duo": (1, False, True)}


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("end", [9, None])
def test_blocks_of_random_documents(name, end):
    """From fewer documents than shards to several groups in each shard. Control: all documents in one group."""
    random = np.random.default_rng(0)
    for number in (1, 5, 8, 9, 1000, 1001, 2100, 8080):
        documents = [random.integers(0, 9, random.integers(0, 6)).astype(np.int32) for _ in range(number)]
        blocks = grouped(documents, 7, PROTOCOLS[name], end)
        by_hand = cut_by_hand(documents, 7, end, *RULES[name])
        np.testing.assert_array_equal(blocks, np.reshape(by_hand, (-1, 7)))
    one_group = cut_by_hand(documents, 7, end, *RULES[name], group=number)
    assert len(one_group) >= len(blocks) > 0 and one_group != by_hand


# Numbers, from the formulas of the papers, in float64.

GEOMETRIC = ("schedule.name=geometric", "schedule.sigma_min=0.01", "schedule.sigma_max=4.0")
PROCESSES = {  # their own schedules, with a narrower range of sigma, to which the network's sigma is clipped
    "absorbing": ("schedule.eps=0.05", "training.min_time=0.5"),
    "uniform": (
        *("process.name=uniform", "network.conditioning=sigma", *GEOMETRIC),
        *("training.loss=bound", "training.min_time=0.5"),
    ),
}


def log_linear(t, eps=1e-3):
    """sigma and its rate in the integrals of MDLM and Duo, and of SEDD with an absorbing model."""
    return -np.log1p(-(1 - eps) * t), (1 - eps) / (1 - (1 - eps) * t)


def geometric(t, low=0.01, high=4.0):
    return low ** (1 - t) * high**t, np.log(high / low) * low ** (1 - t) * high**t


OWN = {"absorbing": lambda t: log_linear(t, 0.05), "uniform": geometric}


def softmax(logits):
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def at(values, tokens):
    return np.take_along_axis(values, tokens[..., None], axis=-1)[..., 0]


# Nats per unit time of noisy tokens x of x0. `output` is the network's, Float64[N L S]: for the absorbing process the
# logits, which are the log score without the factor 1 / (e^sigma - 1); for the uniform process the log score, or r, the
# distribution of the clean token.


def sedd_absorbing(output, x, x0, sigma, rate):
    """Score entropy of masks: sum_y e^s - r s_x0 + r (log r - 1), with r = 1 / (e^sigma - 1)."""
    ratio = 1 / np.expm1(sigma)
    log_score = (output - np.log(np.expm1(sigma))[..., None])[..., :-1]
    entropy = np.exp(log_score).sum(-1) - ratio * at(log_score, x0) + ratio * (np.log(ratio) - 1)
    return np.where(x == output.shape[-1] - 1, rate * entropy, 0.0)


def cross_entropy(output, x, x0, sigma, rate):
    """MDLM, and Duo's code of it: -log softmax(logits)_x0 sigma' / (e^sigma - 1), without the mask's logit."""
    nats = -at(softmax(output[..., :-1]), x0)
    return np.where(x == output.shape[-1] - 1, rate / np.expm1(sigma) * nats, 0.0)


def sedd_uniform(log_score, x, x0, sigma, rate):
    """Score entropy of uniform noise: (1/V) sum_{y != x} e^s - a s + a (log a - 1), a = q(y | x0) / q(x | x0)."""
    size, alpha, y = log_score.shape[-1], np.exp(-sigma)[..., None], np.arange(log_score.shape[-1])
    q = alpha * (y == x0[..., None]) + (1 - alpha) / size
    ratio = q / at(q, x)[..., None]
    entropy = np.exp(log_score) - ratio * log_score + ratio * (np.log(ratio) - 1)
    return rate / size * np.where(y == x[..., None], 0.0, entropy).sum(-1)


def clipped_uniform(log_score, x, x0, sigma, rate):
    """The same for scores clipped to the range of a ratio."""
    limit = np.log1p(log_score.shape[-1] / np.expm1(sigma))[..., None]
    return sedd_uniform(np.clip(log_score, -limit, limit), x, x0, sigma, rate)


def sedd_uniform_of_denoiser(r, x, x0, sigma, rate):
    """The score entropy of the score of r, the distribution of the clean token."""
    alpha = np.exp(-sigma)[..., None]
    m = alpha * r + (1 - alpha) / r.shape[-1]
    return sedd_uniform(np.log(m / at(m, x)[..., None]), x, x0, sigma, rate)


def duo_uniform(r, x, x0, sigma, rate):
    """Duo's bound, with xbar = V alpha x + 1 - alpha of the data and of the model."""
    size, alpha = r.shape[-1], np.exp(-sigma)[..., None]
    data = size * alpha * (np.arange(size) == x0[..., None]) + 1 - alpha
    model = size * alpha * r + 1 - alpha
    data_at_x, model_at_x = at(data, x)[..., None], at(model, x)[..., None]
    change = (size / data_at_x - size / model_at_x)[..., 0]
    change -= np.sum(data / data_at_x * np.log(model_at_x * data / (model * data_at_x)), axis=-1)
    return -rate / size * change  # d alpha / dt = -rate alpha


def network_output(model, x, sigma):
    """The network's output conditioned on sigma. Int[N L], Float[N] -> Float64[N L S], as the formulas take it."""
    log_score, noise = np.asarray(model.log_score(x, sigma), np.float64), np.asarray(sigma)[:, None, None]
    if isinstance(model.process, Absorbing):
        return log_score + np.log(np.expm1(noise))
    if model.network.prediction == "score":
        return log_score
    m = np.exp(softmax(log_score))  # the distribution of a noisy token given the others
    return (m + np.expm1(-noise) / m.shape[-1]) * np.exp(noise)


perturbed = jax.jit(lambda process, *args: process.corrupt(*args), static_argnums=0)

CASES = [  # the formulas that give the number, and control formulas that do not
    ("absorbing", "score", "sedd-paper", (sedd_absorbing,), (cross_entropy,)),
    ("absorbing", "score", "mdlm", (cross_entropy,), (sedd_absorbing,)),
    ("absorbing", "denoiser", "duo", (cross_entropy, sedd_absorbing), ()),  # equal for normalised outputs
    ("uniform", "score", "sedd-paper", (sedd_uniform,), (clipped_uniform,)),
    pytest.param("uniform", "score", "mdlm", (clipped_uniform,), (sedd_uniform,), marks=pytest.mark.slow),
    pytest.param("uniform", "denoiser", "sedd-paper", (sedd_uniform_of_denoiser,), (), marks=pytest.mark.slow),
    ("uniform", "denoiser", "duo", (duo_uniform, sedd_uniform_of_denoiser), ()),
]


@pytest.mark.parametrize("kind, prediction, name, right, wrong", CASES)
def test_number_of_a_protocol_is_that_of_the_papers_formula(kind, prediction, name, right, wrong):
    """Times and noise are drawn again from the same keys; the rest is NumPy.

    Controls: the other formulas, the other schedule, and the network's sigma not clipped to its training range.
    """
    model = random_model(*PROCESSES[kind], f"network.prediction={prediction}")
    texts, protocol = random_documents(40, 30), PROTOCOLS[name]
    number, draws = (2, {"draws": 2}) if name == "sedd-paper" else (1, {})  # the default of the others is one
    report = model.perplexity(texts, protocol=name, seed=3, progress=False, **draws)

    documents = [model.tokenizer.encode(text) for text in texts]
    x0 = np.array(cut_by_hand(documents, LENGTH, model.tokenizer.end_of_text, *RULES[name]))
    rows, loss = np.arange(len(x0)), protocol.bound(model)
    keys, stratum = keyed_random.row_keys(jax.random.key(3), rows), loss.stratum(rows)

    def value(formula, schedule, conditioning):
        total = 0.0
        for draw in range(number):  # keyed by half, then by stratum; with two draws each is a half
            of_draw = keyed_random.fold(keyed_random.fold(keys, draw), 0)
            share = (stratum + keyed_random.uniform(keyed_random.fold(of_draw, 0))) / protocol.strata
            sigma, rate = (part[:, None] for part in schedule(np.asarray(1e-3 + (1 - 1e-3) * share, np.float64)))
            x = np.asarray(perturbed(model.process, keyed_random.fold(of_draw, 1), x0, sigma.astype(np.float32)))
            output = network_output(model, x, conditioning(sigma[:, 0]))
            total += formula(output, x, x0, sigma, rate).sum()
        return total / number / x0.size

    def clipped(sigma):
        return np.clip(sigma, *model.network.sigma_range)

    schedules = (OWN[kind], log_linear) if name == "sedd-paper" else (log_linear, OWN[kind])
    assert (report.num_tokens, report.rows, report.draws) == (x0.size, len(x0), number)
    for formula in right:
        np.testing.assert_allclose(report.nats_per_token, value(formula, schedules[0], clipped), rtol=1e-5)
    others = [value(formula, schedules[0], clipped) for formula in wrong]
    others += [value(right[0], schedules[1], clipped), value(right[0], schedules[0], np.asarray)]
    assert min(abs(other / report.nats_per_token - 1) for other in others) > 1e-3
    if wrong:  # the report has the numbers of unnormalised and of tightened scores
        both = sorted([report.raw_nats_per_token, report.tightened_nats_per_token])
        np.testing.assert_allclose(both, sorted([report.nats_per_token, others[0]]), rtol=1e-5)


def absorbing(schedule):
    """A model without parameters."""
    network = TokenNetwork(Absorbing(3), "denoiser", Trunk(width=8, layers=1, heads=1), (1e-3, 1.0))
    return dataclasses.replace(without_network(None, Absorbing(3), LENGTH), network=network, schedule=schedule)


@pytest.mark.parametrize("strata", [1, 16, 64])
def test_consecutive_rows_have_different_strata(strata):
    """Each of `strata` consecutive rows has its own stratum, and neighbours have distant ones."""
    (protocol,) = {p for p in map(get_protocol, FAMILY) if p.strata == strata}
    stratum = np.asarray(protocol.bound(absorbing(LogLinear())).stratum(jnp.arange(300)))
    for first in range(300 - strata):
        assert sorted(stratum[first : first + strata]) == list(range(strata))
    apart = np.abs(np.diff(stratum))
    assert strata == 1 or np.minimum(apart, strata - apart).min() > strata / 4


@pytest.mark.parametrize("name", FAMILY)
def test_times_are_uniform_on_the_range_of_the_papers(name):
    """[eps, 1], with two times for each row. Of 51,200 in [0, 1] some fifty would lie below eps."""
    protocol, eps, nothing = get_protocol(name), 1e-3, jnp.zeros((25_600, 1))

    @jax.jit
    def times(rows):
        stats, keys = ScoreStats(nothing, nothing, nothing), keyed_random.row_keys(jax.random.key(0), rows)
        loss = protocol.bound(absorbing(LogLinear(eps)))
        return loss.draws(lambda *_: stats, keys, nothing.astype(jnp.int32), 2, rows=rows).level / (1 - eps)

    share = (np.asarray(times(jnp.arange(len(nothing))), np.float64) - eps) / (1 - eps)
    assert np.all(share[0] != share[1]) and 0 <= share.min() < 1e-3 and 1 - 1e-3 < share.max() <= 1
    taken = np.floor(share * protocol.strata).reshape(-1, protocol.strata)
    assert np.all(np.sort(taken) == np.arange(protocol.strata))
    assert scipy.stats.kstest(share.ravel(), "uniform").pvalue > 1e-3


def test_default_draws_and_split_of_each_protocol(tmp_path):
    """Arguments override them."""
    assert [get_protocol(name).draws for name in PROTOCOLS] == [None, 1000, 1, 1, 1]
    (tmp_path / "text").write_text("a few letters\nand more\n")
    corpus = sedd.prepare({"train": f"lines:{tmp_path}/text"}, "characters", tmp_path / "corpus")
    model = random_model(tokenizer=corpus.tokenizer)
    for name, split in zip(PROTOCOLS, ("test", "test", "validation", "validation", "validation")):
        for expected, settings in ((split, {}), ("mine", {"split": "mine"})):
            with pytest.raises(sedd.UserError, match=f"has no split '{expected}'"):
                model.perplexity(corpus, protocol=name, **settings)
    with pytest.raises(sedd.UserError, match="draws must be at least 1 and at most 1,048,576, not 0"):
        model.perplexity(corpus, split="train", protocol="sedd-paper", draws=0)


@pytest.mark.parametrize("name", FAMILY)
def test_invalid_arguments_are_refused(name):
    """Each in one line, before the parameters are used."""
    packed = dataclasses.replace(random_model(), params=None)
    padded = dataclasses.replace(packed, layout=Layout("padded", "ignored"))
    for model, texts, protocol, message in [
        (padded, ["abc" * 9], name, f"{name} packs text, but the model was trained on padded documents; use clean"),
        (
            packed,
            ["abc", "def"],
            name,
            f"{name} leaves nothing of 6 tokens in 2 documents: .* block of 12 .* use clean",
        ),
        (packed, [], name, f"{name} leaves nothing of 0 tokens in 0 documents"),
        (packed, ["abc", "b\ud800"], name, r"text 2 of 2 holds '\\ud800', which is no character"),
        (packed, ["abc"], name[1:], f"no protocol '{name[1:]}'; there are clean, sedd-paper, mdlm, duo"),
    ]:
        with pytest.raises(sedd.UserError, match=message) as error:
            model.perplexity(texts, protocol=protocol)
        assert "\n" not in str(error.value)


# Rows of `clean`.


def rows_of(scored):
    return [row[:count].tolist() for row, count in zip(scored.tokens, scored.counts, strict=True)]


def test_clean_scores_each_token_once(tmp_path):
    """A corpus in blocks, the last with its own length; a list text by text. Control: the other protocols drop some."""
    corpus = small_corpus(tmp_path)
    trained = without_network(corpus.tokenizer, None, LENGTH)
    scored = scoring_rows(CLEAN, corpus, "train", trained)
    tokens = np.asarray(corpus.tokens("train")).tolist()
    assert list(itertools.chain(*rows_of(scored))) == tokens
    assert scored.counts[:-1].tolist() == [LENGTH] * (len(scored.tokens) - 1) and 0 < scored.counts[-1] < LENGTH
    np.testing.assert_array_equal(scored.lengths, scored.counts)
    for name in FAMILY:
        blocks = scoring_rows(PROTOCOLS[name], corpus, "train", trained)
        assert blocks.counts.tolist() == [LENGTH] * len(blocks.tokens) and blocks.num_bytes is None
        assert np.concatenate(rows_of(blocks)).tolist() != tokens[: blocks.tokens.size]

    texts = ["the 1", "the 27 times table", "1, 2"]
    scored = scoring_rows(CLEAN, texts, "test", trained)
    rows = rows_of(scored)
    assert [corpus.tokenizer.decode(np.array(ids)) for ids in rows] == ["the 1", "the 27 times", " table", "1, 2"]
    assert scored.clusters.tolist() == [0, 1, 1, 2] and scored.num_characters == sum(map(len, texts))


@pytest.mark.parametrize("padding", [None, "ignored", "scored"])
@pytest.mark.parametrize("kind", ["lines", "ptb"])
def test_rows_of_a_source_equal_those_of_its_corpus(kind, padding, tmp_path):
    """For documents that end with an id, and with a newline; an empty line is no document."""
    texts = random_documents(30, 40, seed=1) + ["zebra é"]
    (tmp_path / "text").write_text("\n".join(texts) + "\n", encoding="utf-8")
    spec, mode = f"{kind}:{tmp_path}/text", "packed" if padding is None else "padded"
    corpus = sedd.prepare(spec, "characters", tmp_path / "corpus", split="position:1", mode=mode, padding=padding)
    ends = dataclasses.replace(corpus.tokenizer, has_end_of_text=True)  # unused where newlines end documents
    trained = without_network(ends, None, LENGTH, corpus.layout)
    rows, expected = (scoring_rows(CLEAN, text, "train", trained) for text in (open_source(spec), corpus))
    assert rows.num_bytes == expected.num_bytes > rows.num_characters == expected.num_characters
    for field in ("tokens", "lengths", "counts", "clusters"):
        np.testing.assert_array_equal(getattr(rows, field), getattr(expected, field), field)
    assert rows.layout == expected.layout and rows.data["source"] == spec
    assert rows.counts.sum() == corpus.num_tokens("train")
