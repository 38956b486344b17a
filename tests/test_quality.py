"""The quality of samples: metrics by hand, scoring models of known likelihood, files of samples, sweeps, figures."""

import dataclasses
import json
import math
import sys
import time

import numpy as np
import pytest
from oracle import MarkovChain
from small import small_corpus, untrained_model

import sedd
from sedd.data.layout import Layout
from sedd.evaluation import pictures
from sedd.evaluation.quality import distinct, quality, read_samples, unigram_entropy
from sedd.evaluation.scorers import ScoredTexts, language_model, open_scorer, score_in_windows, windows
from sedd.evaluation.sweep import Point, sweep, table, to_json
from sedd.generation.generate import Samples
from sedd.generation.options import SamplingOptions


def letters(texts):
    """A scorer whose tokens are letters: a costs 1 nat, b 2, and so on to g, h costs 0."""
    return ScoredTexts([sum(ord(letter) % 8 for letter in text) for text in texts], [len(text) for text in texts])


# --- entropy, distinct n-grams, generative perplexity


def test_entropy_is_that_of_the_frequencies_within_a_sample():
    """Not of all samples together: samples that repeat one token each have entropy 0."""
    rows = [np.array([7, 7, 7]), np.array([1, 1, 2, 3]), np.arange(5), np.array([], int)]
    np.testing.assert_allclose(unigram_entropy(rows), [0, 1.5 * math.log(2), math.log(5), 0])
    assert quality(None, [[4, 4], [5, 5]]).unigram_entropy == 0


def test_distinct_n_grams_are_counted_over_all_samples():
    """No n-gram spans two samples, and samples shorter than n have none."""
    rows = [[1, 2, 1, 2], [2, 1, 3], [9]]
    assert distinct(rows, 1) == 4 / 8
    assert distinct(rows, 2) == 3 / 5  # 12 21 12, 21 13
    assert distinct(rows, 3) == 3 / 3  # 121 212, 213
    assert distinct(rows, 5) is None


def test_quality_of_known_samples():
    """Nats per token are those of all samples together, not the mean over samples."""
    measured = quality(["ab", "cccccc", "a"], [[0, 1], [2] * 6, [0]], letters)
    assert (measured.num_samples, measured.num_tokens, measured.scorer, measured.scorer_tokens) == (3, 9, "letters", 9)
    assert measured.nats_per_token == 22 / 9 and measured.generative_perplexity == pytest.approx(math.exp(22 / 9))
    assert measured.nats_per_token != pytest.approx((1.5 + 3 + 1) / 3)
    assert measured.unigram_entropy == pytest.approx(math.log(2) / 3)
    assert measured.unigram_entropy_error == pytest.approx(np.std([math.log(2), 0, 0], ddof=1) / math.sqrt(3))
    assert measured.distinct == (3 / 9, 2 / 6, 1 / 4)
    assert json.loads(measured.to_json())["distinct"] == [3 / 9, 2 / 6, 1 / 4]


def test_standard_error_is_clustered_by_sample():
    """The error of a ratio of sums over samples, against many repetitions. Control: independent tokens."""
    random = np.random.default_rng(0)

    def draw():
        """Forty samples of different lengths, each of one repeated letter, so that its tokens are fully dependent."""
        return ["abcdefgh"[random.integers(8)] * random.integers(5, 15) for _ in range(40)]

    measured = [quality(texts, [[0]] * 40, letters) for texts in (draw() for _ in range(400))]
    spread = np.std([one.nats_per_token for one in measured])
    error = np.mean([one.standard_error for one in measured])
    assert abs(error / spread - 1) < 0.12
    naive = math.sqrt(np.var(np.arange(8)) / np.mean([one.scorer_tokens for one in measured]))
    assert naive < 0.5 * spread


def test_text_of_a_quality_has_perplexity_and_entropy_with_errors():
    alone, scored = quality(["ab"], [[0, 1]]), quality(["ab", "cc"], [[0, 1], [2, 2]], letters)
    assert "perplexity" not in str(alone) and "0.6931 ± unknown nats" in str(alone)
    assert json.loads(alone.to_json())["nats_per_token"] is None
    perplexity, entropy, *_ = str(scored).splitlines()
    assert perplexity.startswith("generative perplexity 9.49 ± ") and "of letters" in perplexity
    assert entropy.startswith("unigram entropy       0.3466 ± 0.3466 nats")


def test_samples_that_cannot_be_measured_are_refused():
    def constant(nats, tokens):
        return lambda texts: ScoredTexts(np.array(nats, float), np.array(tokens))

    for texts, tokens, scorer, message in [
        ([], [], None, "nothing to measure"),
        (["", ""], [[], []], None, "nothing to measure"),
        (["a"], [[0], [1]], None, "1 texts and the tokens of 2"),
        (None, [[0]], letters, "these samples have none"),
        (["a", "b"], [[0], [1]], constant([1, np.inf], [1, 1]), "text 2 inf nats"),
        (["a", "b"], [[0], [1]], constant([1], [1]), "for 2 texts"),
        (["a", "b"], [[0], [1]], constant([0, 0], [0, 0]), "too short"),
    ]:
        with pytest.raises(sedd.UserError, match=message):
            quality(texts, tokens, scorer)


# --- files of samples


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_samples_are_read_as_they_were_written(tmp_path):
    """A Unicode line separator within a text does not end a line."""
    texts, tokens = ["one\u2028two\n", "é"], [[3, 1, 2], [5]]
    records = [{"text": text, "tokens": ids, "steps": 4} for text, ids in zip(texts, tokens)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records), "utf-8")
    read, ids = read_samples(tmp_path / "s.jsonl")
    assert read == texts and [row.tolist() for row in ids] == tokens
    (tmp_path / "t.jsonl").write_text(lines({"text": None, "tokens": [1]})[:-1])
    assert read_samples(tmp_path / "t.jsonl")[0] is None


def test_texts_of_another_program_need_a_tokenizer(tmp_path, corpus):
    """The tokenizer also encodes texts that have tokens, so that all are measured in the same tokens."""
    file = tmp_path / "s.jsonl"
    file.write_text(lines({"text": "the 1"}, {"text": "table", "tokens": [0]}, {"text": ""}))
    with pytest.raises(sedd.UserError, match="line 1 has no tokens; name a tokenizer"):
        read_samples(file)
    texts, tokens = read_samples(file, corpus.tokenizer)
    assert [corpus.tokenizer.decode(row) for row in tokens] == texts == ["the 1", "table", ""]


GOOD = {"text": "a", "tokens": [0]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines(GOOD, GOOD)[:-5], "line 2, the last, is cut off"),
        (lines(GOOD)[:-5] + "\n" + lines(GOOD), "line 1 is no JSON object"),
        (lines(GOOD) + "\n" + lines(GOOD), "line 2 is no JSON object"),
        (lines([1, 2]), "line 1 is no sample"),
        (lines(GOOD, {"text": 3, "tokens": [0]}), "line 2 is no sample"),
        (lines({"text": "a", "tokens": [0, -1]}), "line 1 is no sample"),
        (lines({"text": "a", "tokens": [0.5]}), "line 1 is no sample"),
        (lines({"seed": 1}), "line 1 is no sample"),
        (lines(GOOD, {"text": None, "tokens": [0]}), "line 2 has no text, and others have"),
        ("", "is empty"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "s.jsonl").write_text(content)
    with pytest.raises(sedd.UserError, match=message) as error:
        read_samples(tmp_path / "s.jsonl")
    assert "\n" not in str(error.value)


def test_end_of_text_and_padding_are_not_measured(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "ab", "tokens": [1, 2, 9, 9], "length": 2}\n')
    assert read_samples(tmp_path / "one.jsonl")[1][0].tolist() == [1, 2]
    (tmp_path / "one.jsonl").write_text('{"text": "ab", "tokens": [1, 2], "length": 3}\n')
    with pytest.raises(sedd.UserError, match="line 1 is no sample"):
        read_samples(tmp_path / "one.jsonl")


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "s.jsonl").write_bytes(b"\xff\xfe")
    for name in ("s.jsonl", "none.jsonl"):
        with pytest.raises(sedd.UserError, match="cannot be read as samples"):
            read_samples(tmp_path / name)


# --- scoring models


def test_windows_score_each_token_once_with_half_a_window_before_it():
    for length in range(40):
        for size in range(2, 12):
            result = windows(length, size)
            assert [at for _, first, stop in result for at in range(first, stop)] == list(range(1, length))
            for start, first, stop in result:
                assert stop - start == min(size, length)
                assert first - start >= min(first, size - size // 2)
    assert windows(7, 4) == [(0, 1, 4), (2, 4, 6), (3, 6, 7)]


def test_windows_of_any_size_are_exact_for_a_markov_chain():
    """It depends on one token of context only. Control: disjoint windows lose the tokens at their boundaries."""
    nats = -np.log(MarkovChain.random(5).step)
    random = np.random.default_rng(0)
    rows = [random.integers(0, 5, length) for length in (1, 300, 2, 37, 0, 64, 65)]
    exact = [sum(nats[pair] for pair in zip(row, row[1:])) for row in rows]

    def network(ids, valid):
        return nats[ids[:, :-1], ids[:, 1:]]

    for size in (2, 7, 64, 1000):
        scores = score_in_windows(rows, network, size)
        np.testing.assert_allclose(scores.nats, exact, rtol=1e-12)
        assert scores.tokens.tolist() == [0, 299, 1, 36, 0, 63, 64]
    disjoint = score_in_windows(np.split(rows[1], [64, 128, 192, 256]), network, 64)
    assert disjoint.nats.sum() < 0.995 * exact[1]


def test_each_token_is_scored_given_the_tokens_of_its_window():
    """A network whose nats are the number of tokens before, 1 2 3, then 2 3, then 3, whatever the batches are."""
    shapes = []

    def count(ids, valid):
        shapes.append(ids.shape)
        assert valid.all(axis=1).any() and (ids[~valid] == 0).all() and (ids[valid] == 9).all()
        return np.broadcast_to(np.arange(1.0, ids.shape[1]), (len(ids), ids.shape[1] - 1))

    scores = score_in_windows([np.full(7, 9), np.full(3, 9)], count, 4)
    assert scores.nats.tolist() == [1 + 2 + 3 + 2 + 3 + 3, 1 + 2]
    score_in_windows([np.full(1500, 9)] * 3, count, 1024)
    assert max(rows * width for rows, width in shapes) <= 2048


class Tokenizer:
    """Letters as ids, with the interface of the library transformers."""

    def __init__(self, bos, eos="."):
        self.bos_token_id, self.eos_token = bos, eos

    def __call__(self, texts, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def cost_of_id(ids, valid):
    return ids[:, 1:].astype(float)


def test_the_first_token_is_scored_only_after_bos():
    with_bos = language_model("lm", Tokenizer(bos=1), cost_of_id, 8)
    without = language_model("lm", Tokenizer(bos=None), cost_of_id, 8)
    assert with_bos.name == "lm (BOS first, windows of 8)"
    assert without.name == "lm (from the second token on, windows of 8)"
    first, second = with_bos(["ab", "c", ""]), without(["ab", "c", ""])
    assert first.nats.tolist() == [97 + 98, 99, 0] and first.tokens.tolist() == [2, 1, 0]
    assert second.nats.tolist() == [98, 0, 0] and second.tokens.tolist() == [1, 0, 0]


def test_an_end_of_text_becomes_the_eos_of_the_scoring_model():
    scores = language_model("lm", Tokenizer(bos=1), cost_of_id, 8)(["a<|endoftext|>b"])
    assert scores.tokens.tolist() == [3] and scores.nats.tolist() == [97 + ord(".") + 98]
    literal = language_model("lm", Tokenizer(bos=1, eos=None), cost_of_id, 8)(["a<|endoftext|>b"])
    assert literal.tokens.tolist() == [15]


def test_a_network_that_is_not_causal_is_refused():
    def looks_ahead(ids, valid):
        return np.broadcast_to(ids.sum(1, keepdims=True), (len(ids), ids.shape[1] - 1)).astype(float)

    with pytest.raises(sedd.UserError, match="bert is not causal"):
        language_model("bert", Tokenizer(bos=1), looks_ahead, 8)


def test_an_empty_tokenizer_is_refused():
    class Empty(Tokenizer):
        def __call__(self, texts, **_):
            return {"input_ids": [[] for _ in texts]}

    with pytest.raises(sedd.UserError, match="no tokenizer, or an empty one"):
        language_model("lm", Empty(bos=1), cost_of_id, 8)


def test_folders_without_a_language_model_are_refused(tmp_path, monkeypatch):
    """A missing package is named with the command that installs it."""
    (tmp_path / "config.json").write_text(json.dumps({"network": {}}))
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(sedd.UserError, match="no causal language model"):
            open_scorer(folder)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(sedd.UserError, match=r"pip install 'sedd\[judge\]'"):
        open_scorer(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("bos", [True, False])
def test_scores_of_gpt2_equal_those_of_one_call_for_each_token(tmp_path, bos):
    """A random GPT-2 over bytes, in windows of 32. A missing weight is refused, which the library initialises."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    of_bytes = Tokenizer(models.BPE(vocab={byte: id for id, byte in enumerate(alphabet)}, merges=[]))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"} if bos else {}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=of_bytes, **special)
    sizes = dict(vocab_size=257, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "lm")

    def by_hand(text):
        """Nats of each token but the first, given the tokens before it in its window, by one network call each."""
        ids = [tokenizer.bos_token_id] * bos + tokenizer(text)["input_ids"]
        total = 0.0
        for start, first, stop in windows(len(ids), 32):
            for at in range(first, stop):
                with torch.no_grad():
                    log_p = model(torch.tensor([ids[start:at]])).logits[0, -1].log_softmax(-1)
                total -= float(log_p[ids[at]])
        return total

    texts = ["hello world", "é", "x" * 32, "the quick brown fox jumps over the lazy dog " * 3, "a<|endoftext|>b"]
    scores = open_scorer(tmp_path / "lm")(texts)
    np.testing.assert_allclose(scores.nats, [by_hand(text) for text in texts], rtol=1e-5)
    assert scores.tokens[:3].tolist() == ([11, 2, 32] if bos else [10, 1, 31])
    weights = load_file(tmp_path / "lm/model.safetensors")
    del weights["transformer.h.0.ln_1.weight"]
    save_file(weights, tmp_path / "lm/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(sedd.UserError, match="lack transformer.h.0.ln_1.weight"):
        open_scorer(tmp_path / "lm")


# --- the sweep


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def model(corpus):
    """An untrained model: its distribution is uniform over the vocabulary."""
    return untrained_model(corpus, "network.layers=1")


@pytest.fixture(scope="module")
def points(model):
    return sweep(model, ["margin", "tweedie"], [2, 4], 6, letters, 8, SamplingOptions(seed=3), progress=False)


def test_sweep_measures_each_sampler_in_each_number_of_steps(model, points):
    """A point has the quality of the samples of that seed, also for texts shorter than a block."""
    assert [(point.sampler, point.steps) for point in points] == [
        ("margin", 2),
        ("margin", 4),
        ("tweedie", 2),
        ("tweedie", 4),
    ]
    for point in points:
        drawn = model.sample(6, 8, sampler=point.sampler, steps=point.steps, seed=3)
        assert point.quality == quality(drawn.texts, drawn.tokens, letters)
        assert point.network_calls == drawn.network_calls and point.quality.num_tokens == 48
        assert 0 < point.seconds < 60
    assert points[0].quality != points[1].quality and points[1].network_calls == 4
    assert json.loads(to_json(points))[2]["quality"]["scorer"] == "letters"


def test_table_has_a_line_for_each_point(points):
    """Its columns are aligned; without a scoring model there is no perplexity."""
    lines = table(points).splitlines()
    assert len(lines) == 6 and len({len(line) for line in lines[:5]}) == 1
    assert "perplexity" in lines[0] and f"{points[0].quality.nats_per_token:.4f}" in lines[1]
    assert "6 samples" in lines[5] and lines[5].endswith("under letters")
    alone = [Point("euler", 2, 2, 0.1, quality(None, [[1, 2]]))]
    assert "perplexity" not in table(alone) and table(alone).splitlines()[1].endswith(
        "  0.6931  -       1.000  1.000   -"
    )


def test_padding_of_samples_is_not_measured(model):
    """It would lower the entropy. Control: of packed samples, all tokens count."""
    padded = dataclasses.replace(model, layout=Layout("padded", "scored"))
    [point] = sweep(padded, ["tweedie"], [4], 6, letters, 8, SamplingOptions(seed=5), progress=False)
    texts = padded.sample(6, 8, sampler="tweedie", steps=4, seed=5).texts
    assert point.quality.num_tokens == sum(map(len, texts)) < 48


def test_invalid_sweeps_are_refused_before_sampling(model, monkeypatch):
    monkeypatch.setattr("sedd.evaluation.sweep.sample", lambda *_: pytest.fail("sample was called"))
    for samplers, steps, message in [
        (["tweedie", "twedie"], [2], "no sampler 'twedie'"),
        (["tweedie"], [2, 0], "at least 1"),
        ([], [2], "at least one sampler"),
    ]:
        with pytest.raises(sedd.UserError, match=message):
            sweep(model, samplers, steps, 2, progress=False)
    without_tokenizer = dataclasses.replace(model, tokenizer=None)
    with pytest.raises(sedd.UserError, match="leave the scoring model out"):
        sweep(without_tokenizer, ["tweedie"], [2], 2, letters)


def test_seconds_exclude_compilation(model, monkeypatch):
    """The fake sampler is slow in its first call, as one that compiles."""
    slept = []

    def sample(trained, num_samples, length, options):
        if options not in slept:
            slept.append(options)
            time.sleep(0.4)
        ids = np.ones((num_samples, 2), int)
        return Samples(["ab"] * num_samples, ids, np.full(num_samples, 2), ids < 0, 3, None)

    monkeypatch.setattr("sedd.evaluation.sweep.sample", sample)
    [first, second] = sweep(model, ["tweedie"], [2, 3], 2, progress=False)
    assert len(slept) == 2 and max(first.seconds, second.seconds) < 0.1


# --- figures


def curves(axes):
    """By label: the x and the y of each line, and the lengths of its error bars."""
    lines = {}
    for bars in axes.containers:
        line, _, [ends] = bars.lines
        lengths = [segment[1, 1] - segment[0, 1] for segment in ends.get_segments()]
        lines[bars.get_label()] = (*(values.tolist() for values in line.get_data()), lengths)
    return lines


def test_figure_of_a_sweep_has_a_line_for_each_sampler(points, tmp_path):
    pytest.importorskip("matplotlib")
    nats, entropy = pictures.sweep_figure(points).axes
    for axes, field, error in [
        (nats, "nats_per_token", "standard_error"),
        (entropy, "unigram_entropy", "unigram_entropy_error"),
    ]:
        assert axes.get_xscale() == "log" and "network calls" in axes.get_xlabel()
        assert "nats" in axes.get_ylabel()
        assert list(curves(axes)) == ["margin", "tweedie"]
        for sampler, (x, y, lengths) in curves(axes).items():
            of = [point for point in points if point.sampler == sampler]
            assert x == [point.network_calls for point in of]
            assert y == [getattr(point.quality, field) for point in of]
            np.testing.assert_allclose(lengths, [2 * getattr(point.quality, error) for point in of])
    assert [text.get_text() for text in nats.get_legend().get_texts()] == ["margin", "tweedie"]
    pictures.plot_sweep(points, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_figure_without_a_scoring_model_has_entropy_only():
    pytest.importorskip("matplotlib")
    [axes] = pictures.sweep_figure([Point("euler", 2, 2, 0.1, quality(None, [[1, 2]]))]).axes
    assert axes.get_ylabel().startswith("unigram entropy")


def test_area_of_the_figure_of_a_profile_is_the_diffusion_term(tmp_path):
    """For bins of any widths. Where a bin is empty the area is less, and the legend says so."""
    pytest.importorskip("matplotlib")
    profile = [
        {"low": 0.0, "high": 0.5, "nats_per_token": 1.0, "error": 0.1},
        {"low": 0.5, "high": 0.75, "nats_per_token": 2.0, "error": None},
        {"low": 0.75, "high": 1.0, "nats_per_token": 4.0, "error": 0.3},
    ]
    [axes] = pictures.profile_figure(profile, noise="random").axes
    assert sum(bar.get_width() * bar.get_height() for bar in axes.patches) == 2.0
    [label] = [text.get_text() for text in axes.get_legend().get_texts()]
    assert label == "area: 2.000 nats per token,\nthe bound's diffusion term"
    assert axes.get_xlabel() == "fraction of tokens random" and axes.get_ylabel() == "nats per token"
    profile[1]["nats_per_token"] = None
    [axes] = pictures.profile_figure(profile).axes
    assert "1.500 nats per token,\nover the measured noise levels" in axes.get_legend().get_texts()[0].get_text()
    pictures.plot_profile(profile, tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_figures_that_cannot_be_saved_are_refused(points, tmp_path, monkeypatch):
    """Nothing to plot, no folder to write to, an unknown format, no matplotlib."""
    pytest.importorskip("matplotlib")
    with pytest.raises(sedd.UserError, match="no points"):
        pictures.plot_sweep([], tmp_path / "a.png")
    with pytest.raises(sedd.UserError, match="no measurement"):
        pictures.plot_profile([{"low": 0, "high": 1, "nats_per_token": None, "error": None}], tmp_path / "a.png")
    for path in (tmp_path / "none/a.png", tmp_path / "a.nosuch"):
        with pytest.raises(sedd.UserError, match="cannot be written"):
            pictures.plot_sweep(points, path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(sedd.UserError, match=r"pip install 'sedd\[plots\]'"):
        pictures.plot_sweep(points, tmp_path / "a.png")
