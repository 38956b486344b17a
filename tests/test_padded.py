"""Padded corpora through the whole house: trained, evaluated and sampled, the padding scored or ignored."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import small_config, small_corpus

import sedd
from sedd.data.layout import Layout
from sedd.diffusion.score import condition_on_mask_ratio
from sedd.evaluation.perplexity import perplexity
from sedd.evaluation.text import from_corpus, from_texts

KINDS = [
    ("ignored", "absorbing"),
    pytest.param(("scored", "absorbing"), marks=pytest.mark.slow),
    pytest.param(("ignored", "uniform"), marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Sixty documents, rows of 32: none needs as many, so that every row has padding."""

    def made(padding):
        folder = tmp_path_factory.mktemp(padding)
        (folder / "texts").mkdir()
        for number in range(60):
            (folder / "texts" / f"{number:02}.txt").write_text(f"{number} " * (1 + number % 9))
        return sedd.prepare(
            f"text:{folder}/texts/*.txt", "characters", folder / "corpus", mode="padded", padding=padding
        )

    return {padding: made(padding) for padding in ("ignored", "scored")}


@pytest.fixture(scope="module", params=KINDS, ids=["ignored", "scored", "uniform"])
def run(request, corpora, tmp_path_factory):
    """A run of a few steps, and its corpus."""
    padding, process = request.param
    workdir = tmp_path_factory.mktemp("runs") / "run"
    settings = [f"process.name={process}"] + ["training.noise_sampling=time"] * (process == "uniform")
    settings += ["data.block_length=32", "training.steps=40"]
    sedd.train(small_config(corpora[padding], *settings), workdir)
    return workdir, corpora[padding]


@pytest.fixture(scope="module")
def model(run):
    return sedd.load(run[0])


def test_a_run_remembers_its_layout(run, model, tmp_path):
    workdir, corpus = run
    about = json.loads((workdir / "config.json").read_text())
    assert model.layout == Layout.from_json(about["layout"])
    assert model.layout.padding == corpus.layout.padding
    lengths = np.diff(corpus.offsets("train"))
    if model.layout.masks_padding:
        assert model.layout.row_lengths == tuple(np.bincount(lengths, minlength=33))
    model.save(tmp_path / "exported")
    assert sedd.load(tmp_path / "exported").layout == model.layout


def test_it_learns_and_samples_what_documents_are_like(run, model):
    """After forty steps it knows at least that padding is padding and that texts are digits and spaces."""
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
    few = model.sample(num_samples=3, steps=4, seed=3, batch_size=2)
    assert few.texts == drawn.texts[:3]  # lengths too belong to the row
    assert model.sample(num_samples=2, length=9, steps=4).tokens.shape == (2, 9)


def test_samples_are_drawn_at_their_lengths(model):
    """The network sees the length of each row on every step: samples are those of its denoiser at these lengths,
    whatever stands beyond; control: at the length of a block they are others. The parameters are random, as forty steps
    of training hardly move what a network does with lengths."""
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.3, leaf.shape), jnp.float32), model.params)
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


def test_what_is_scored(run, model):
    """Ignored padding is not seen: whatever stands there, the bound is the same. Scored padding is text."""
    _, corpus = run
    scored = from_corpus(corpus, "train", 32)
    beyond = np.arange(32) >= scored.counts[:, None]
    changed = dataclasses.replace(scored, tokens=np.where(beyond, 3, scored.tokens))
    reports = [
        perplexity(model.network, model.schedule, model.params, one, num_draws=2, progress=False)[0]
        for one in (scored, changed)
    ]
    same = np.isclose(reports[0].nats_per_token, reports[1].nats_per_token, rtol=1e-5)
    assert same == model.layout.masks_padding
    assert reports[0].num_tokens == corpus.num_tokens("train") and reports[0].num_bytes == corpus.num_bytes("train")
    assert reports[0].clusters == 54  # each document is one
    wanted = "given its length" if model.layout.masks_padding else "with its padding, as a whole block"
    assert reports[0].lengths == wanted


def test_scores_know_of_the_lengths(model):
    """What lies beyond the valid tokens changes no score; control: without lengths it does."""
    tokens = np.tile(np.arange(8) % model.process.vocab_size, (2, 1))
    tokens[1, 5:] = 0
    sigma, lengths = np.ones(2, np.float32), np.array([5, 5])
    found = model.log_score(tokens, sigma, lengths)
    np.testing.assert_allclose(found[0, :5], found[1, :5], rtol=1e-4, atol=1e-4)
    assert not np.allclose(*model.log_score(tokens, sigma)[:, :5], rtol=1e-3, atol=1e-3)


def test_texts_are_scored_as_documents(run, model):
    """A list of texts has the rows that a corpus of them has."""
    _, corpus = run
    scored = from_corpus(corpus, "test", 32)
    tokens, offsets = corpus.tokens("test"), corpus.offsets("test")
    texts = [corpus.tokenizer.decode(tokens[a : b - 1]) for a, b in zip(offsets, offsets[1:])]
    listed = from_texts(texts, corpus.tokenizer, 32, model.layout)
    for name in ("tokens", "lengths", "counts", "clusters"):
        np.testing.assert_array_equal(getattr(listed, name), getattr(scored, name))
    reports = [model.perplexity(one, draws=2, progress=False) for one in (texts, corpus)]
    assert reports[0].nats_per_token == reports[1].nats_per_token and reports[0].num_bytes == reports[1].num_bytes


def test_infilling_knows_where_the_text_ends(model):
    drawn = model.infill(["1<blank:3>1 1 ", "<blank:2>"], num_samples=2, steps=4)
    end = model.tokenizer.end_of_text
    ids = [row[row >= 0] for row in drawn.tokens]
    assert all(row[8 if number < 2 else 2] == end for number, row in enumerate(ids))
    assert all(text.startswith("1") and text.endswith("1 1 ") for text in drawn.texts[:2])
    assert len(ids[0]) == (9 if model.layout.masks_padding else 32)
    with pytest.raises(sedd.UserError, match="a text of 33 tokens"):
        model.infill("<blank:32>")
    row = model.infill(prefix="1 ", suffix=" 1", length=10, steps=4).tokens[0]
    assert row[9] == end and model.tokenizer.decode(row[7:9]) == " 1"  # the end makes ten


def test_another_layout_is_refused(model, corpora, tmp_path):
    other = corpora["scored" if model.layout.masks_padding else "ignored"]
    with pytest.raises(sedd.UserError, match="prepare it so"):
        model.perplexity(other)
    with pytest.raises(sedd.UserError, match="another tokenizer"):
        model.perplexity(small_corpus(tmp_path))
