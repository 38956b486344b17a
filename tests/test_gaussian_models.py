"""Models of Gaussian diffusion, from training to likelihoods: what holds for the other processes holds for them."""

import math

import jax
import numpy as np
import pytest
from small import shaken, small_config, small_corpus, untrained_model

import sedd
from sedd.training.fit import fit

GAUSSIAN = ("process.name=gaussian", "codec.width=4", "network.self_conditioning=false")
GIVEN = (*GAUSSIAN, "network.given_embedding=true", "network.self_conditioning=true")
REGRESSION = (*GAUSSIAN, "network.prediction=x0", "training.loss=regression", "codec.normalised=false")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def model(corpus):
    return shaken(untrained_model(corpus, *GAUSSIAN, "network.layers=1"))


@pytest.fixture(scope="module")
def conditioned(corpus):
    return shaken(untrained_model(corpus, *GIVEN, "network.layers=1"))


@pytest.mark.slow
def test_bound_of_uniform_text_is_log_vocab_size(corpus):
    """With its own evidence a network without any context is exact for uniform independent tokens.

    Control: without the evidence its bound is larger.
    """
    settings = (*GAUSSIAN, "codec.width=16")
    exact = untrained_model(corpus, *settings, "network.evidence_snr=1e-6")
    report = exact.perplexity(corpus, split="train", draws=8, progress=False)
    due = math.log(corpus.vocab_size)
    assert abs(report.nats_per_token - due) < 4 * report.standard_error < 0.4
    assert report.nats_per_token == pytest.approx(report.prior + report.diffusion + report.reconstruction)
    assert 0 < report.prior < 0.01 and report.reconstruction > 0
    without = untrained_model(corpus, *settings).perplexity(corpus, split="train", draws=8, progress=False)
    assert without.nats_per_token > due + 1


@pytest.mark.slow
def test_the_bound_does_not_depend_on_batches(corpus, conditioned):
    one, other = (
        conditioned.perplexity(corpus, split="validation", draws=2, batch_size=size, progress=False) for size in (8, 24)
    )
    assert one.nats_per_token == pytest.approx(other.nats_per_token, rel=1e-5)


@pytest.mark.slow
def test_an_interrupted_evaluation_resumes(corpus, model, tmp_path):
    settings = dict(split="validation", draws=2, batch_size=8, progress=False)
    whole = model.perplexity(corpus, out=tmp_path / "whole", **settings)
    done = (tmp_path / "whole/draws.f32").read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/job.json").write_bytes((tmp_path / "whole/job.json").read_bytes())
    (tmp_path / "cut/draws.f32").write_bytes(done[: len(done) // 2])
    assert model.perplexity(corpus, out=tmp_path / "cut", **settings) == whole


@pytest.mark.slow
def test_models_of_two_processes_are_compared_on_the_same_text(corpus, model):
    comparison = model.compare(untrained_model(corpus), corpus, split="validation", draws=2, progress=False)
    difference = comparison.first.nats_per_token - comparison.second.nats_per_token
    assert comparison.difference == pytest.approx(difference, rel=1e-5)


@pytest.mark.parametrize("kind, sampler", [("model", "ddim"), ("conditioned", "tweedie")])
def test_infilling_keeps_given_tokens_at_any_positions(request, kind, sampler):
    """The same rows in any batch; the trace ends at the sample."""
    model = request.getfixturevalue(kind)
    template = "the <blank:3> times <blank:2>."
    out = model.infill(template, num_samples=6, steps=4, sampler=sampler, trace=True)
    assert all(text.startswith("the ") and " times " in text and text.endswith(".") for text in out.texts)
    assert len(set(out.texts)) > 1 and out.network_calls == 4
    assert np.array_equal(out.trace[-1], out.tokens) and np.all((out.trace == out.tokens) | ~out.given)
    assert np.array_equal(
        model.infill(template, num_samples=6, steps=4, sampler=sampler, batch_size=4).tokens, out.tokens
    )


@pytest.mark.parametrize("options", [dict(temperature=0.1), dict(top_p=0.2), dict(round_below=math.inf)], ids=str)
def test_options_change_the_samples(model, options):
    plain = model.sample(8, steps=4)
    assert not np.array_equal(model.sample(8, steps=4, **options).tokens, plain.tokens)


def test_texts_longer_than_a_block_are_sampled(model):
    out = model.sample(2, length=40, steps=2)
    assert out.tokens.shape == (2, 40) and np.all(out.tokens >= 0)


def test_an_exported_model_is_the_same(conditioned, tmp_path):
    conditioned.save(tmp_path / "model")
    loaded = sedd.load(tmp_path / "model")
    assert loaded.network == conditioned.network
    assert np.array_equal(loaded.sample(4, steps=3).tokens, conditioned.sample(4, steps=3).tokens)


@pytest.mark.slow
def test_likelihoods_given_a_context_need_the_flag(model, conditioned):
    found = conditioned.log_likelihood(["3, 6", "9, 9"], given="the 3 times", draws=16)
    assert all(one.is_bound and one.method == "levels" and one.standard_error > 0 for one in found)
    with pytest.raises(sedd.UserError, match="treats given tokens as noisy"):
        model.log_likelihood("3, 6", given="the 3 times")
    assert model.log_likelihood("3, 6", draws=16).is_bound


def test_what_is_not_for_a_model_is_one_line(corpus, model, conditioned):
    regression = untrained_model(corpus, *REGRESSION)
    for call, message in (
        (lambda: regression.sample(1, steps=2, temperature=0.5), "no temperature or top_p"),
        (lambda: untrained_model(corpus).sample(1, steps=2, round_below=1.0), "for models with Gaussian noise"),
        (lambda: conditioned.sample(1, steps=2, round_below=1.0), "trained with network.self_conditioning"),
        (
            lambda: model.sample(1, steps=2, sampler="gibbs"),
            "the sampler gibbs is not for this model; use one of euler",
        ),
        (lambda: untrained_model(corpus).sample(1, sampler="ddim"), "the sampler ddim is not for this model"),
        (lambda: model.log_score(np.zeros((1, 16), int), np.ones(1)), "no concrete score"),
        (lambda: model.perplexity(corpus, protocol="mdlm", progress=False), "protocol is that of a discrete process"),
        (lambda: model.sample(1, round_below=-1.0), "at least 0"),
    ):
        with pytest.raises(sedd.UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_denoiser_sees_the_given_tokens_clean(conditioned):
    """At every step of a custom sampler, in the state and as flags."""
    tokens, given = np.arange(16)[None] % 5, np.arange(16)[None] < 6
    process = conditioned.process
    denoiser = conditioned.denoiser(tokens, given)
    x = sedd.DDIM(process, sedd.Sqrt(), 1).start(
        jax.random.split(jax.random.key(0), 1), np.zeros((1, 16, 4), np.float32)
    )
    clean = conditioned.network.clean(conditioned.params, tokens)
    bare = conditioned.network.denoiser(conditioned.params, given=given)
    sigma = np.ones(1, np.float32)
    due = bare(sedd.Latent(*(np.where(given[..., None], clean, leaf) for leaf in x)), sigma, None)
    np.testing.assert_allclose(denoiser(x, sigma, None), due, atol=1e-5)


@pytest.mark.slow
def test_a_given_table_is_read_and_not_trained(corpus, tmp_path):
    """A run starts from the array, which stays as it is; another shape, or no array, is one line."""
    table = np.random.default_rng(0).normal(size=(corpus.vocab_size, 4)).astype(np.float32)
    np.save(tmp_path / "table.npy", table)
    settings = (*GAUSSIAN, f"codec.table={tmp_path}/table.npy", "training.steps=2")
    fit(small_config(corpus, *settings), tmp_path / "run")
    loaded = sedd.load(tmp_path / "run")
    rows = loaded.network.codec.rows(loaded.params["codec"])
    np.testing.assert_allclose(rows, 4 * table / np.linalg.norm(table, axis=-1, keepdims=True), rtol=1e-5)
    np.save(tmp_path / "table.npy", table[1:])
    with pytest.raises(sedd.UserError, match="rows for all tokens have"):
        fit(small_config(corpus, *settings), tmp_path / "other")
    np.save(tmp_path / "table.npy", table * (np.arange(len(table)) != 3)[:, None])
    with pytest.raises(sedd.UserError, match="row 3 of .* is 0, which cannot be normalised"):
        fit(small_config(corpus, *settings), tmp_path / "other")
    (tmp_path / "table.npy").write_text("no array")
    with pytest.raises(sedd.UserError, match="no array that can be read"):
        fit(small_config(corpus, *settings), tmp_path / "other")


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(corpus, tmp_path):
    """With memory, given tokens and validation; stopped after three of six steps."""
    settings = (*GIVEN, "evaluation.every=6", "evaluation.draws=2", "checkpoint.every=3", "optimizer.decay=constant")
    fit(small_config(corpus, *settings), tmp_path / "whole")
    fit(small_config(corpus, *settings, "training.steps=3", "evaluation.every=0"), tmp_path / "parts")
    fit(small_config(corpus, *settings), tmp_path / "parts")
    whole, parts = (sedd.load(tmp_path / name).params for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
