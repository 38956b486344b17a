"""Padded corpora from training to evaluation and sampling, with padding that is scored or ignored."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import small_config, small_corpus

import sedd
from sedd.data.layout import Layout
from sedd.diffusion.denoiser import condition_on_mask_ratio
from sedd.evaluation.perplexity import perplexity
from sedd.evaluation.text import from_corpus, from_texts

KINDS = [
    ("ignored", "absorbing"),
    pytest.param(("scored", "absorbing"), marks=pytest.mark.slow),
    pytest.param(("ignored", "uniform"), marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Sixty documents of less than 32 tokens, so that every row has padding."""

    def prepared(padding):
        folder = tmp_path_factory.mktemp(padding)
        (folder / "texts").mkdir()
        for number in range(60):
            (folder / "texts" / f"{number:02}.txt").write_text(f"{number} " * (1 + number % 9))
        return sedd.prepare(
            f"text:{folder}/texts/*.txt", "characters", folder / "corpus", mode="padded", padding=padding
        )

    return {padding: prepared(padding) for padding in ("ignored", "scored")}


@pytest.fixture(scope="module", params=KINDS, ids=["ignored", "scored", "uniform"])
def run(request, corpora, tmp_path_factory):
    """The run directory of forty steps of training, and its corpus."""
    padding, process = request.param
    workdir = tmp_path_factory.mktemp("runs") / "run"
    settings = [f"process.name={process}"] + ["training.noise_sampling=time"] * (process == "uniform")
    settings += ["network.layers=1", "data.block_length=32", "training.steps=40"]
    sedd.train(small_config(corpora[padding], *settings), workdir)
    return workdir, corpora[padding]


@pytest.fixture(scope="module")
def model(run):
    return sedd.load(run[0])


def test_layout_is_saved_with_run_and_export(run, model, tmp_path):
    workdir, corpus = run
    description = json.loads((workdir / "config.json").read_text())
    assert model.layout == Layout.from_json(description["layout"])
    assert model.layout.padding == corpus.layout.padding
    lengths = np.diff(corpus.offsets("train"))
    if model.layout.masks_padding:
        assert model.layout.row_lengths == tuple(np.bincount(lengths, minlength=33))
    model.save(tmp_path / "exported")
    assert sedd.load(tmp_path / "exported").layout == model.layout


@pytest.mark.slow
def test_model_of_padded_documents_learns_and_samples_their_lengths(run, model):
    """The loss falls. Samples have no end-of-text, and lengths of the corpus if padding is ignored."""
    workdir, _ = run
    losses = [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").open() if "loss" in line]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    drawn = model.sample(num_samples=24, steps=4, seed=3)
    assert all("<|endoftext|>" not in text for text in drawn.texts)
    lengths = (drawn.tokens >= 0).sum(axis=1)
    if model.layout.masks_padding:
        assert {n for n, count in enumerate(model.layout.row_lengths) if count} >= set(lengths) and len(
            set(lengths)
        ) > 5
    else:
        assert set(lengths) == {32}
    three = model.sample(num_samples=3, steps=4, seed=3, batch_size=2)
    assert three.texts == drawn.texts[:3]  # texts and lengths are independent of the batch
    assert model.sample(num_samples=2, length=9, steps=4).tokens.shape == (2, 9)


def test_sampler_conditions_on_the_length_of_each_row(model):
    """Samples are those of the denoiser with the drawn lengths, for any tokens beyond them. Control: with the block
    length they differ. The parameters are random, since forty steps hardly train the dependence on lengths."""
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 1, leaf.shape), jnp.float32), model.params)
    model = dataclasses.replace(model, params=params)
    drawn = model.sample(num_samples=24, steps=4, seed=3).tokens
    inside = np.pad(drawn >= 0, ((0, 0), (0, 32 - drawn.shape[1])))

    @jax.jit
    def by_hand(lengths):
        denoiser = model.denoiser(lengths=lengths)
        if isinstance(model.process, sedd.Absorbing):
            denoiser = condition_on_mask_ratio(model.process, denoiser, lengths)
        tokens = jnp.full(inside.shape, 3)
        return sedd.sample(jax.random.key(3), denoiser, sedd.Tweedie(model.process, model.schedule, 4), tokens, inside)

    def changed(lengths):
        return np.mean(np.asarray(by_hand(lengths).tokens)[inside] != drawn[drawn >= 0])

    lengths = jnp.asarray(inside.sum(axis=1))
    assert changed(lengths if model.layout.masks_padding else None) == 0
    assert (changed(jnp.full_like(lengths, 32)) > 0.05) == model.layout.masks_padding


def test_bound_depends_on_padding_only_if_it_is_scored(run, model):
    """The bound is independent of the tokens at ignored padding; scored padding is text."""
    _, corpus = run
    scored = from_corpus(corpus, "train", 32)
    beyond = np.arange(32) >= scored.counts[:, None]
    changed = dataclasses.replace(scored, tokens=np.where(beyond, 3, scored.tokens))
    reports = [perplexity(model, one, num_draws=2, progress=False)[0] for one in (scored, changed)]
    same = np.isclose(reports[0].nats_per_token, reports[1].nats_per_token, rtol=1e-5)
    assert same == model.layout.masks_padding
    assert reports[0].num_tokens == corpus.num_tokens("train") and reports[0].num_bytes == corpus.num_bytes("train")
    assert reports[0].clusters == 54  # one per document
    expected = "given its length" if model.layout.masks_padding else "with its padding, as a full block"
    assert reports[0].lengths == expected


def test_log_score_masks_positions_beyond_the_length(model):
    """Scores are independent of tokens beyond the length. Control: without lengths they depend on them."""
    tokens = np.tile(np.arange(8) % model.process.vocab_size, (2, 1))
    tokens[1, 5:] = 0
    sigma, lengths = np.ones(2, np.float32), np.array([5, 5])
    log_score = model.log_score(tokens, sigma, lengths)
    np.testing.assert_allclose(log_score[0, :5], log_score[1, :5], rtol=1e-4, atol=1e-4)
    assert not np.allclose(*model.log_score(tokens, sigma)[:, :5], rtol=1e-3, atol=1e-3)


def test_texts_are_scored_like_a_corpus_of_them(run, model):
    """A list of texts gives the same rows and bound as a corpus of them."""
    _, corpus = run
    scored = from_corpus(corpus, "test", 32)
    tokens, offsets = corpus.tokens("test"), corpus.offsets("test")
    texts = [corpus.tokenizer.decode(tokens[a : b - 1]) for a, b in zip(offsets, offsets[1:])]
    listed = from_texts(texts, model)
    for name in ("tokens", "lengths", "counts", "clusters"):
        np.testing.assert_array_equal(getattr(listed, name), getattr(scored, name))
    reports = [model.perplexity(one, draws=2, progress=False) for one in (texts, corpus)]
    assert reports[0].nats_per_token == reports[1].nats_per_token and reports[0].num_bytes == reports[1].num_bytes


def test_infilling_gives_the_end_of_text(model):
    drawn = model.infill(["1<blank:3>1 1 ", "<blank:2>"], num_samples=2, steps=4)
    end = model.tokenizer.end_of_text
    ids = [row[row >= 0] for row in drawn.tokens]
    assert all(row[8 if number < 2 else 2] == end for number, row in enumerate(ids))
    assert all(text.startswith("1") and text.endswith("1 1 ") for text in drawn.texts[:2])
    assert len(ids[0]) == (9 if model.layout.masks_padding else 32)
    with pytest.raises(sedd.UserError, match="a text of 33 tokens"):
        model.infill("<blank:32>")
    row = model.infill(prefix="1 ", suffix=" 1", length=10, steps=4).tokens[0]
    assert row[9] == end and model.tokenizer.decode(row[7:9]) == " 1"  # nine tokens and the end of text


def test_corpus_of_another_layout_is_refused(model, corpora, tmp_path):
    other = corpora["scored" if model.layout.masks_padding else "ignored"]
    with pytest.raises(sedd.UserError, match="prepare it so"):
        model.perplexity(other)
    with pytest.raises(sedd.UserError, match="another tokenizer"):
        model.perplexity(small_corpus(tmp_path))
