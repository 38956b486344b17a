"""The perplexity job: its number against one that is known, its error, and what it is held against."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from small import small_config, small_corpus

import sedd
from sedd import config as configs
from sedd.data.layout import Layout
from sedd.evaluation.baselines import bigram_nats, unigram_nats
from sedd.evaluation.perplexity import Scored, from_corpus, from_texts, perplexity


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("small"))


def fresh(corpus, *settings):
    """A model that was never trained: its head is 0, so that its law is uniform, whatever the process."""
    config = small_config(corpus, *settings)
    process, schedule, network = configs.build(config, corpus.vocab_size)
    params = jax.jit(network.init)(jax.random.key(0))
    return sedd.Model(config, params, corpus.tokenizer, process, schedule, network)


PROCESSES = {
    "absorbing": (),
    "uniform": ("process.name=uniform", "training.levels=times"),
    "uniform, geometric": ("process.name=uniform", "training.levels=times", "schedule.name=geometric"),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_bound_of_the_uniform_law(corpus, name):
    """The exact model of a uniform law has a bound of log V nats a token: a wrong range or term would show."""
    report = fresh(corpus, *PROCESSES[name]).perplexity(corpus, "train", draws=16, progress=False)
    exact = math.log(corpus.vocab_size)
    assert abs(report.nats_per_token - exact) < 4 * report.standard_error
    assert report.standard_error < 0.03 * exact
    assert report.nats_per_token == pytest.approx(report.prior + report.diffusion + report.reconstruction)
    if name == "absorbing":
        assert report.prior == report.reconstruction == 0
    else:
        assert 0 < report.prior < 1e-3
        assert (report.reconstruction > 0) == ("geometric" in name)


def test_the_number_depends_on_nothing_else(corpus):
    """The same seed gives the same number in any batch size; another seed another number."""
    model = fresh(corpus)
    parts = (model.network, model.schedule, model.params, from_corpus(corpus, "validation", 16))
    reports = [perplexity(*parts, seed, 4, batch, False) for seed, batch in ((0, 64), (0, 5), (1, 64))]
    np.testing.assert_allclose(reports[0].nats_per_token, reports[1].nats_per_token, rtol=1e-6)
    assert reports[0].nats_per_token != reports[2].nats_per_token


def test_units(corpus):
    """Every token of the split is scored once, the tail too."""
    report = fresh(corpus).perplexity(corpus, "train", draws=2, progress=False)
    assert report.num_tokens == corpus.num_tokens("train") and report.num_tokens % 16
    assert report.num_bytes == corpus.num_bytes("train")
    assert report.perplexity == pytest.approx(math.exp(report.nats_per_token))
    nats = report.nats_per_token * report.num_tokens
    assert report.bits_per_byte == pytest.approx(nats / math.log(2) / report.num_bytes)
    assert json.loads(report.to_json())["standard_error"] == report.standard_error
    assert f"{report.nats_per_token:.4f}" in str(report)


def test_standard_error_is_that_of_the_ratio():
    """Clusters of different sizes: against the delta method written out, and null for a single one."""
    from sedd.evaluation.perplexity import _report

    random = np.random.default_rng(0)
    terms, lengths = random.random((40, 3)) * 20, random.integers(1, 16, 40)
    network = configs.build(configs.default(), 30)[2]
    scored = Scored(np.zeros((40, 16), int), lengths, lengths, np.arange(40) // 4, 100, Layout())
    report = _report(terms, scored, 1, 0, network)
    totals, sizes = terms.sum(1).reshape(10, 4).sum(1), lengths.reshape(10, 4).sum(1)
    wanted = np.std(totals - totals.sum() / sizes.sum() * sizes, ddof=1) * math.sqrt(10) / sizes.sum()
    assert report.standard_error == pytest.approx(wanted)
    alone = _report(terms, dataclasses.replace(scored, clusters=np.zeros(40, int)), 1, 0, network)
    assert json.loads(alone.to_json())["standard_error"] is None and "± unknown" in str(alone)


@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_texts_one_by_one(corpus, name):
    """Short texts beside longer ones; a text is scored the same in any company."""
    model = fresh(corpus, *PROCESSES[name])
    texts = ["the 1", "the 27 times table: 27, 54, 81", "table"]
    report = model.perplexity(texts, draws=4, progress=False)
    assert report.num_tokens == sum(map(len, texts)) and report.clusters == 3
    assert model.perplexity(texts[0], draws=4, progress=False).clusters == 1
    scored = from_texts(texts, corpus.tokenizer, 16, model.layout)
    assert scored.lengths.tolist() == [5, 16, 14, 5] and scored.clusters.tolist() == [0, 1, 1, 2]
    wanted = "its own length" if name == "uniform" else "stay masked"
    assert wanted in report.lengths


def test_another_tokenizer_is_refused(corpus, tmp_path):
    other = small_corpus(tmp_path, "bytes")
    with pytest.raises(sedd.UserError, match="another tokenizer"):
        fresh(corpus).perplexity(other)


def test_unknown_split_is_refused(corpus):
    with pytest.raises(sedd.UserError, match="there are train, validation, test"):
        fresh(corpus).perplexity(corpus, "tset")


def test_baselines():
    """By hand: add-one unigram, Witten-Bell bigram; the bigram's law sums to one after any token."""
    train = np.array([0, 1, 0, 1, 0, 2])
    assert unigram_nats(train, np.array([0, 2]), 3) == pytest.approx(-math.log(4 / 9) - math.log(2 / 9))
    after_0 = [-math.log((2 + 2 * 3 / 9) / (3 + 2)), -math.log((1 + 2 * 2 / 9) / (3 + 2))]
    start = -math.log(4 / 9)
    assert bigram_nats(train, np.array([0, 1]), 3) == pytest.approx(start + after_0[0])
    assert bigram_nats(train, np.array([0, 2]), 3) == pytest.approx(start + after_0[1])
    for first in range(3):
        first_nats = unigram_nats(train, np.array([first]), 3)
        law = [math.exp(first_nats - bigram_nats(train, np.array([first, second]), 3)) for second in range(3)]
        assert sum(law) == pytest.approx(1)
