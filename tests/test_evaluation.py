"""The perplexity job: its number against known values, its errors, resuming, and the baselines."""

import json
import math

import jax
import numpy as np
import pytest
from oracle import MarkovChain
from small import shaken, small_corpus, untrained_model

import sedd
from sedd.data.sources import open_source
from sedd.diffusion import keyed_random
from sedd.diffusion.discrete.likelihood import MaskCountBound
from sedd.diffusion.discrete.process import Absorbing
from sedd.diffusion.discrete.score import stats_from
from sedd.evaluation import scoring
from sedd.evaluation.baselines import bigram_nats, unigram_nats
from sedd.evaluation.perplexity import perplexity
from sedd.evaluation.statistics import Estimate, profile, ratio, sampling_error, t_quantile
from sedd.evaluation.text import from_corpus, from_texts
from sedd.runtime.parallel import data_mesh


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("small"))


PROCESSES = {
    "absorbing": (),
    "uniform": ("process.name=uniform", "network.prediction=denoiser"),
    "uniform, geometric": ("process.name=uniform", "network.prediction=denoiser", "schedule.name=geometric"),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_bound_of_the_uniform_distribution_is_log_vocab_size(corpus, name):
    """An untrained model is exact for uniform text: its bound is log V nats a token unless a range or term is wrong."""
    report = untrained_model(corpus, *PROCESSES[name]).perplexity(corpus, split="train", draws=16, progress=False)
    exact = math.log(corpus.vocab_size)
    if name == "absorbing":  # by mask counts, every draw is exact
        assert report.nats_per_token == pytest.approx(exact, rel=1e-5) and report.sampling_error < 1e-5
    else:
        assert abs(report.nats_per_token - exact) < 4 * report.standard_error
        assert report.sampling_error < report.standard_error < 0.03 * exact
    assert report.nats_per_token == pytest.approx(report.prior + report.diffusion + report.reconstruction)
    if name == "absorbing":
        assert report.prior == report.reconstruction == 0
    else:
        assert 0 < report.prior < 1e-3
        assert (report.reconstruction > 0) == ("geometric" in name)


def test_bound_is_independent_of_batching_and_devices(corpus):
    """The same seed gives the same number in any batch size and on any devices; another seed another number."""
    settings = ("network.layers=1", "network.prediction=score", "training.noise_sampling=time")
    model = shaken(untrained_model(corpus, *settings))
    scored = from_corpus(corpus, "validation", 16)

    def number(seed, batch_size, devices):
        mesh = data_mesh(jax.devices()[:devices])
        settings = dict(seed=seed, num_draws=4, batch_size=batch_size, mesh=mesh, progress=False)
        return perplexity(model, scored, **settings)[0].nats_per_token

    first = number(0, 64, 1)
    assert first == number(0, 64, 1) and first != number(1, 64, 1)
    np.testing.assert_allclose([number(0, 5, 1), number(0, 16, 8), number(0, None, 2)], first, rtol=1e-6)


@pytest.mark.smoke
def test_units_of_a_report_agree(corpus):
    """Every token of the split is scored once, those of the last, shorter block too."""
    report = untrained_model(corpus).perplexity(corpus, split="train", draws=2, progress=False)
    assert report.num_tokens == corpus.num_tokens("train") and report.num_tokens % 16
    assert (report.num_bytes, report.num_characters) == (corpus.num_bytes("train"), corpus.num_characters("train"))
    assert report.perplexity == pytest.approx(math.exp(report.nats_per_token))
    bits = report.nats_per_token * report.num_tokens / math.log(2)
    assert report.bits_per_byte == pytest.approx(bits / report.num_bytes)
    assert report.bits_per_character == pytest.approx(bits / report.num_characters)
    assert json.loads(report.to_json())["standard_error"] == report.standard_error
    assert f"{report.nats_per_token:.4f}" in str(report)


def test_report_records_data_tokenizer_model_and_versions(corpus):
    report = untrained_model(corpus).perplexity(corpus, split="validation", draws=2, seed=3, progress=False)
    about = json.loads(report.to_json())
    assert about["about"]["data"] == {"corpus": str(corpus.path), "split": "validation", "hash": corpus.hash}
    assert about["about"]["tokenizer"] == corpus.tokenizer.fingerprint
    assert about["about"]["versions"].keys() >= {"sedd", "jax", "flax", "python"}
    assert (about["protocol"], about["draws"], about["seed"]) == ("clean", 2, 3)
    assert len(about["about"]["model"]) == 32 and about["about"]["config"]["data"]["block_length"] == 16


def test_unnormalised_scores_have_two_bounds(corpus):
    """Unnormalised, and tightened, which is never worse; sedd-paper reports the first, clean the second."""
    model = shaken(untrained_model(corpus, "network.prediction=score", "training.noise_sampling=time"))
    report = model.perplexity(corpus, split="validation", draws=4, progress=False)
    assert report.tightened_nats_per_token == report.nats_per_token
    assert report.tightened_nats_per_token < report.raw_nats_per_token - 1e-4
    paper = model.perplexity(corpus, split="validation", draws=4, protocol="sedd-paper", progress=False)
    assert paper.raw_nats_per_token == paper.nats_per_token > paper.tightened_nats_per_token
    assert "tightened" in str(report)


def test_standard_error_is_that_of_the_ratio():
    """With clusters of different sizes, against the delta method written out. It is unknown for a single cluster."""
    random = np.random.default_rng(0)
    nats, counts = random.random(40) * 20, random.integers(1, 16, 40)
    estimate = ratio(nats, counts, np.arange(40) // 4)
    totals, sizes = nats.reshape(10, 4).sum(1), counts.reshape(10, 4).sum(1)
    error = np.std(totals - totals.sum() / sizes.sum() * sizes, ddof=1) * math.sqrt(10) / sizes.sum()
    assert estimate.standard_error == pytest.approx(error)
    interval = [estimate.value - 2.2622 * error, estimate.value + 2.2622 * error]
    assert estimate.interval == pytest.approx(interval, rel=1e-4)
    assert ratio(nats, counts, np.zeros(40, int)) == Estimate(estimate.value, None, None, 1)
    assert str(ratio(nats, counts, np.zeros(40, int))).endswith("± unknown")


def test_report_notes_that_few_clusters_give_an_uncertain_error(corpus):
    notes = [
        untrained_model(corpus).perplexity(["the 1", "table"][:n], draws=2, batch_size=8, progress=False).notes
        for n in (1, 2)
    ]
    assert "one cluster only" in notes[0][0]
    assert "2 clusters only" in notes[1][0] and "± 71 %" in notes[1][0] and "± 12.7 of it" in notes[1][0]
    assert not untrained_model(corpus).perplexity(["the 1"] * 20, draws=2, batch_size=8, progress=False).notes


REPEATS, DOCUMENTS, LONGEST = 400, 100, 16


def test_confidence_intervals_have_nominal_coverage():
    """In 400 corpora of 100 documents: of the population's value by the interval, of the corpus' by sampling_error.

    With the exact model of a Markov chain both values are known. Control: half the errors cover too rarely.
    """
    chain = MarkovChain.random(5, seed=1)
    random, number = np.random.default_rng(0), REPEATS * DOCUMENTS
    lengths = random.integers(4, LONGEST + 1, number)
    tokens = np.zeros((number, LONGEST), np.int32)
    cumulative = np.cumsum(np.concatenate([chain.start[None], chain.step]), axis=1)
    for at in range(LONGEST):
        row_cumulative = cumulative[0] if at == 0 else cumulative[1 + tokens[:, at - 1]]
        tokens[:, at] = np.sum(random.random(number)[:, None] > row_cumulative, axis=-1)
    surprise = -np.log(np.concatenate([chain.start[tokens[:, :1]], chain.step[tokens[:, :-1], tokens[:, 1:]]], 1))
    within = np.arange(LONGEST) < lengths[:, None]
    exact = np.sum(surprise * within, axis=1)

    @jax.jit
    def diffusion_draws(tokens, within):
        process = Absorbing(5)
        keys = keyed_random.row_keys(jax.random.key(0), jax.numpy.arange(number))
        masked = process.mask_tokens(tokens, ~within)
        return MaskCountBound(process).draws(stats_from(process, chain.denoiser), keys, masked, 4, within).diffusion

    halves = np.asarray(diffusion_draws(tokens, within), np.float64).reshape(2, 2, number).mean(1).T
    entropies = [-np.sum(chain.start * np.log(chain.start))]
    marginal, per_state = chain.start, -np.sum(chain.step * np.log(chain.step), axis=1)
    for _ in range(LONGEST - 1):
        entropies.append(marginal @ per_state)
        marginal = marginal @ chain.step
    sizes = np.arange(4, LONGEST + 1)
    population = np.mean(np.cumsum(entropies)[sizes - 1]) / np.mean(sizes)

    def coverage(factor):
        of_population, of_corpus = 0, 0
        for rows in np.arange(number).reshape(REPEATS, DOCUMENTS):
            counts, total = lengths[rows], lengths[rows].sum()
            estimate = ratio(halves[rows].mean(1), counts, np.arange(DOCUMENTS))
            low, high = estimate.value + factor * (np.array(estimate.interval) - estimate.value)
            of_population += low < population < high
            error, freedom = sampling_error(halves[rows], total)
            of_corpus += abs(estimate.value - exact[rows].sum() / total) < factor * t_quantile(freedom) * error
        return of_population / REPEATS, of_corpus / REPEATS

    for covered in coverage(1.0):
        assert 0.915 <= covered <= 0.975, coverage(1.0)
    assert max(coverage(0.5)) < 0.8


@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_mean_of_the_profile_is_the_diffusion_term(corpus, name):
    """For an untrained absorbing model the profile is flat."""
    report = untrained_model(corpus, *PROCESSES[name]).perplexity(corpus, split="train", draws=16, progress=False)
    known = [part for part in report.profile if part["nats_per_token"] is not None]
    mean = sum((part["high"] - part["low"]) * part["nats_per_token"] for part in known)
    error = math.sqrt(sum((part["error"] / len(known)) ** 2 for part in known))
    assert abs(mean - report.diffusion) < 4 * error + 0.02 * report.diffusion
    if name == "absorbing":
        flat = [part["nats_per_token"] for part in known]
        np.testing.assert_allclose(flat, math.log(corpus.vocab_size), rtol=1e-4)
    assert report.profile[0]["low"] == 0 and report.profile[-1]["high"] == 1


def test_area_of_the_profile_is_exact_for_texts_of_different_lengths():
    """Short texts of many nats a token and longer ones of few: the area is their mean.

    Control: by the mask ratio (k - 1/2) / n, short texts fall into few of the bins.
    """
    random, counts = np.random.default_rng(0), np.repeat([4, 20], 4000)
    levels = random.random((8000, 4))
    cost = np.where(counts == 4, 5.0, 1.0)[:, None] * np.ones((1, 4)) * counts[:, None]
    exact = cost.mean(1).sum() / counts.sum()

    def area(level):
        parts = profile(level, np.ones_like(level), cost, counts, 128)
        return sum((part["high"] - part["low"]) * (part["nats_per_token"] or 0.0) for part in parts)

    rounded = (np.floor(levels * counts[:, None]) + 0.5) / counts[:, None]
    assert abs(area(levels) - exact) < 0.02 * exact < abs(area(rounded) - exact)


def test_report_notes_fewer_documents_than_clusters(corpus, tmp_path):
    """Clusters of blocks of one document do not show the variation between documents."""
    (tmp_path / "one.txt").write_text("the 7 times table: 7, 14, 21, 28. " * 20)
    source = open_source(f"text:{tmp_path}/one.txt")
    report = untrained_model(corpus).perplexity(source, draws=2, batch_size=8, progress=False)
    assert report.clusters == 3 and "1 document(s) in 3 clusters" in report.notes[0]
    with pytest.raises(sedd.UserError, match="a corpus has splits, a source or a list of texts has none"):
        untrained_model(corpus).perplexity(source, split="test")


def test_an_interrupted_evaluation_resumes(corpus, tmp_path, monkeypatch):
    """Complete records are kept, a truncated one is scored again; the report is the same to the last bit."""
    model, settings = untrained_model(corpus), dict(split="validation", draws=4, batch_size=8, progress=False)
    whole = model.perplexity(corpus, out=tmp_path / "whole", **settings)
    assert json.loads((tmp_path / "whole/report.json").read_text()) == json.loads(whole.to_json())
    done = (tmp_path / "whole/draws.f32").read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/job.json").write_bytes((tmp_path / "whole/job.json").read_bytes())
    (tmp_path / "cut/draws.f32").write_bytes(done[: len(done) // 2 + 3])
    scored = []
    monkeypatch.setattr(scoring, "_records", lambda *args, inner=scoring._records: scored.append(args) or inner(*args))
    again = model.perplexity(corpus, out=tmp_path / "cut", **settings)
    assert again == whole and (tmp_path / "cut/draws.f32").read_bytes() == done
    assert 0 < len(scored) < whole.rows / 8
    assert model.perplexity(corpus, out=tmp_path / "cut", **settings) == whole
    assert len(scored) < whole.rows / 8  # nothing was scored again


def test_a_folder_of_another_evaluation_is_refused(corpus, tmp_path):
    """For another seed, a damaged job.json, or other files: one line each."""
    model, settings = untrained_model(corpus), dict(split="validation", draws=2, progress=False)
    model.perplexity(corpus, out=tmp_path / "out", **settings)
    with pytest.raises(sedd.UserError, match="holds another evaluation: its seed differs"):
        model.perplexity(corpus, out=tmp_path / "out", seed=1, **settings)
    for damaged in ('{"seed":', "[1, 2]"):
        (tmp_path / "out/job.json").write_text(damaged)
        with pytest.raises(sedd.UserError, match="job.json is damaged: it is no JSON"):
            model.perplexity(corpus, out=tmp_path / "out", **settings)
    with pytest.raises(sedd.UserError, match="something else is in the way"):
        model.perplexity(corpus, out=tmp_path / "out/job.json", **settings)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("mine")
    with pytest.raises(sedd.UserError, match="is not empty and holds no evaluation"):
        model.perplexity(corpus, out=tmp_path / "other", **settings)


@pytest.mark.parametrize(
    "text, message",
    [("a \udcff b", r"text 1 of 1 holds '\\udcff', which is no character"), ("a \u1234 b", "\u1234")],
)
def test_text_that_cannot_be_encoded_is_refused(corpus, text, message):
    with pytest.raises(sedd.UserError, match=message):
        untrained_model(corpus).perplexity([text], progress=False)


@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_each_text_of_a_list_is_a_cluster(corpus, name):
    """Short texts and one longer than a block."""
    model = untrained_model(corpus, *PROCESSES[name])
    texts = ["the 1", "the 27 times table: 27, 54, 81", "table"]
    report = model.perplexity(texts, draws=4, progress=False)
    assert report.num_tokens == sum(map(len, texts)) and report.clusters == 3
    assert model.perplexity(texts[0], draws=4, progress=False).clusters == 1
    scored = from_texts(texts, model)
    assert scored.lengths.tolist() == [5, 16, 14, 5] and scored.clusters.tolist() == [0, 1, 1, 2]
    assert ("its own length" if name == "uniform" else "stay masked") in report.lengths


def test_another_tokenizer_is_refused(corpus, tmp_path):
    other = small_corpus(tmp_path, "bytes")
    with pytest.raises(sedd.UserError, match="another tokenizer"):
        untrained_model(corpus).perplexity(other)


def test_unknown_split_is_refused(corpus):
    with pytest.raises(sedd.UserError, match="there are train, validation, test"):
        untrained_model(corpus).perplexity(corpus, split="tset")


def test_n_gram_baselines_by_hand():
    """Add-one unigram, Witten-Bell bigram; the bigram's probabilities sum to one after any token."""
    train = np.array([0, 1, 0, 1, 0, 2])
    assert unigram_nats(train, np.array([0, 2]), 3) == pytest.approx(-math.log(4 / 9) - math.log(2 / 9))
    after_0 = [-math.log((2 + 2 * 3 / 9) / (3 + 2)), -math.log((1 + 2 * 2 / 9) / (3 + 2))]
    start = -math.log(4 / 9)
    assert bigram_nats(train, np.array([0, 1]), 3) == pytest.approx(start + after_0[0])
    assert bigram_nats(train, np.array([0, 2]), 3) == pytest.approx(start + after_0[1])
    for first in range(3):
        first_nats = unigram_nats(train, np.array([first]), 3)
        p = [math.exp(first_nats - bigram_nats(train, np.array([first, second]), 3)) for second in range(3)]
        assert sum(p) == pytest.approx(1)
