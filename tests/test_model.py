"""Model: load, save, sample, infill."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import small_config, small_corpus, untrained_model

import sedd
from sedd import config as configs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A run of six steps with the absorbing process; of one layer, which compiles in half of the time."""
    workdir = tmp_path_factory.mktemp("runs") / "absorbing"
    sedd.train(small_config(corpus, "network.layers=1"), workdir)
    return workdir


@pytest.fixture(scope="module")
def model(run):
    return sedd.load(run)


@pytest.fixture(scope="module", params=["absorbing", pytest.param("uniform", marks=pytest.mark.slow)])
def either(request, corpus):
    """The model of the run, and one with the uniform process, which is not trained."""
    if request.param == "absorbing":
        return request.getfixturevalue("model")
    return untrained_model(corpus, "network.layers=1", "process.name=uniform", "training.noise_sampling=time")


@pytest.mark.smoke
def test_exported_model_samples_as_the_run(model, tmp_path):
    model.save(tmp_path / "exported")
    other = sedd.load(tmp_path / "exported")
    assert other.config.to_dict() == model.config.to_dict()
    expected = model.sample(num_samples=5, steps=8, seed=4)
    assert other.sample(num_samples=5, steps=8, seed=4).texts == expected.texts
    with pytest.raises(sedd.UserError, match="not empty"):
        model.save(tmp_path / "exported")


def test_a_config_of_another_format_is_refused(run, corpus, tmp_path):
    """That of version 0.1.0 has no format key. Loading and resuming fail with one line."""
    shutil.copytree(run, tmp_path / "old")
    about = json.loads((tmp_path / "old/config.json").read_text())
    config = configs.from_dict(about["config"])
    assert about.pop("format") == configs.FORMAT
    (tmp_path / "old/config.json").write_text(json.dumps(about))
    for action in (lambda: sedd.load(tmp_path / "old"), lambda: sedd.train(config, tmp_path / "old")):
        with pytest.raises(sedd.UserError, match="has format 1, and this version of sedd reads format 2; use the ver"):
            action()


def test_samples_have_the_block_length_and_a_trace(either):
    samples = either.sample(num_samples=5, steps=8, seed=1, trace=True)
    assert samples.tokens.shape == (5, 16) and len(samples.texts) == 5 and 0 < samples.network_calls <= 8
    assert samples.trace.shape == (samples.network_calls, 5, 16)
    np.testing.assert_array_equal(samples.trace[-1], samples.tokens)
    assert samples.tokens.min() >= 0 and samples.tokens.max() < either.process.vocab_size
    assert [either.tokenizer.decode(row) for row in samples.tokens] == samples.texts
    assert either.sample(num_samples=5, steps=8, seed=2).texts != samples.texts


def test_samples_are_independent_of_batch_size(model):
    """Groups of two rows, the last with one row, against one group of five."""
    expected = model.sample(num_samples=5, steps=8, seed=1)
    np.testing.assert_array_equal(model.sample(num_samples=5, steps=8, seed=1, batch_size=2).tokens, expected.tokens)


@pytest.mark.parametrize("sampler", ["euler", "tweedie"])
def test_samplers_by_name_and_by_object_are_equal(model, sampler):
    short = model.sample(length=5, steps=4, sampler=sampler)
    assert short.tokens.shape == (1, 5)
    kind = {"euler": sedd.Euler, "tweedie": sedd.Tweedie}[sampler]
    custom = kind(model.process, model.schedule, 4)
    np.testing.assert_array_equal(model.sample(length=5, sampler=custom).tokens, short.tokens)


def test_temperature_and_top_p_near_0_leave_the_most_probable_token(model):
    """All rows then have the same first unmasked token."""
    settings = dict(num_samples=16, steps=1, length=1)
    for sharp in (dict(temperature=1e-3), dict(top_p=1e-3)):
        assert len(set(model.sample(**settings, **sharp).texts)) < len(set(model.sample(**settings).texts))
        assert len(set(model.sample(**settings, **sharp).texts)) == 1


@pytest.mark.smoke
def test_infill_keeps_the_text_of_templates(model):
    """Blanks are anywhere; the samples of a template are adjacent."""
    template = ["<blank:3>times<blank:2>", "the <blank:4>"]
    samples = model.infill(template, num_samples=3, steps=4)
    times, the = model.tokenizer.encode("times"), model.tokenizer.encode("the ")
    assert (samples.tokens[:3, 3:8] == times).all() and (samples.tokens[3:, :4] == the).all()
    assert (samples.tokens >= 0).sum(1).tolist() == [10, 10, 10, 8, 8, 8]
    assert all("times" in text for text in samples.texts[:3]) and all(text[:4] == "the " for text in samples.texts[3:])


def test_infill_keeps_prefix_and_suffix(model):
    samples = model.infill(prefix="the ", suffix="table", length=12, steps=4)
    assert (
        samples.texts[0].startswith("the ") and samples.texts[0].endswith("table") and samples.tokens.shape == (1, 12)
    )
    assert model.infill(prefix="the ", steps=4).tokens.shape == (1, 16)


def test_infill_keeps_given_tokens_at_different_positions_in_each_row(either):
    random = np.random.default_rng(0)
    tokens = random.integers(0, either.process.vocab_size, (3, 16))
    given = random.random((3, 16)) < np.linspace(0, 1, 3)[:, None]
    given[2] = True
    samples = either.infill(tokens=tokens, given=given, num_samples=2, steps=16)
    for row in range(6):
        at = given[row // 2]
        np.testing.assert_array_equal(samples.tokens[row][at], tokens[row // 2][at])
    assert not np.array_equal(samples.tokens[0], samples.tokens[1])
    short = dict(tokens=[[1, 2, 3], [4, 5]], given=[[True, False, True], [False, True]])
    ragged = either.infill(**short, num_samples=3, steps=4)  # six rows and a token in each step, as above
    assert ragged.tokens[0, [0, 2]].tolist() == [1, 3] and ragged.tokens[3, 1:].tolist() == [5, -1]


def test_infill_without_free_positions_returns_the_tokens(either):
    tokens = np.zeros(16, int)
    samples = either.infill(tokens=tokens, given=np.ones(16, bool), steps=4)
    np.testing.assert_array_equal(samples.tokens, [tokens])
    if isinstance(either.process, sedd.Absorbing):
        assert samples.network_calls == 0


def test_log_score_has_all_states_and_denoiser_clamps_given_tokens(either):
    """The score of the current token is 0. The denoiser replaces the state at given positions."""
    states, tokens = either.process.num_states, np.zeros((2, 16), int)
    sigma = jnp.array([0.5, 2.0])
    score = either.log_score(tokens, sigma)
    assert score.shape == (2, 16, states) and score.dtype == jnp.float32
    np.testing.assert_array_equal(score[..., 0], 0)
    given = np.arange(16) < 8
    state = np.where(given, 3, 0)[None].repeat(2, 0)
    clamped = jax.jit(either.denoiser(tokens, np.broadcast_to(given, (2, 16))))(state, sigma, None)
    np.testing.assert_array_equal(clamped, jax.jit(either.denoiser())(tokens, sigma, None))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda model: model.sample(num_samples=0), "number of samples must be at least 1"),
        (lambda model: model.sample(steps=0), "steps must be at least 1"),
        (lambda model: model.sample(length=-5), "cannot sample a text of -5 tokens"),
        (lambda model: model.sample(sampler="tweedie:4"), "no sampler 'tweedie:4'"),
        (lambda model: model.sample(sampler=sedd.Tweedie), "a sampler is a name, or an object"),
        (lambda model: model.sample(seed=2**64), "seed must be a whole number from 0"),
        (lambda model: model.sample(temperature=float("inf")), "temperature must be positive"),
        (lambda model: model.infill([]), "nothing to fill in"),
        (lambda model: model.infill(tokens=[[1], [2]], given=[[True]]), "2 rows of tokens and 1"),
        (lambda model: model.infill(tokens=[[[1]]], given=[[[True]]]), "of the shape of tokens"),
        (lambda model: model.infill(tokens=[1.5, 2], given=[True, False]), "must be integers"),
        (lambda model: model.sample(length=0), "cannot sample a text of 0 tokens; it must have at least 1"),
        (lambda model: model.sample(sampler="best"), "no sampler 'best'; there are euler, tweedie"),
        (lambda model: model.sample(sampler=sedd.Tweedie(sedd.Absorbing(5), sedd.LogLinear(), 2)), "sampler is for"),
        (lambda model: model.sample(temperature=0), "temperature must be positive"),
        (lambda model: model.sample(top_p=1.5), "top_p must lie in"),
        (lambda model: model.sample(batch_size=0), "batch_size must be at least 1"),
        (lambda model: model.infill("the table"), "has no blank"),
        (lambda model: model.infill("the <blank:0>"), "blank of 0"),
        (lambda model: model.infill(prefix="the times table ", suffix="times"), "leaves none of the length of 16"),
        (lambda model: model.infill("the <blank:2>", length=9), "length goes with a prefix"),
        (lambda model: model.infill(), "takes a template, or"),
        (lambda model: model.infill("<blank:1>", prefix="the"), "takes a template, or"),
        (lambda model: model.infill(tokens=[1, 2]), "pass both tokens and given"),
        (lambda model: model.infill(tokens=[1, 2], given=[True]), "of the shape of tokens"),
        (lambda model: model.infill(tokens=[1, 2000], given=[False, True]), "given tokens must be from 0"),
        (lambda model: model.denoiser(tokens=[[1]]), "pass both tokens and given"),
        (lambda model: model.perplexity(["", "the"]), "text 1 of 2 is empty"),
        (lambda model: model.perplexity([]), "no texts"),
        (lambda model: model.perplexity(["the"], draws=0), "draws must be at least 1"),
    ],
)
def test_invalid_arguments_are_one_line(model, call, message):
    with pytest.raises(sedd.UserError, match=message) as caught:
        call(model)
    assert "\n" not in str(caught.value)


def test_load_refuses_a_folder_without_a_model(tmp_path, model):
    with pytest.raises(sedd.UserError, match="no folder"):
        sedd.load(tmp_path / "absent")
    with pytest.raises(sedd.UserError, match="no config.json"):
        sedd.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(sedd.UserError, match="not JSON"):
        sedd.load(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": []}')
    with pytest.raises(sedd.UserError, match="has no config"):
        sedd.load(tmp_path)
    about = {"format": configs.FORMAT, "config": model.config.to_dict(), "vocab_size": 30}
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(sedd.UserError, match="no checkpoint yet"):
        sedd.load(tmp_path)


def test_load_refuses_weights_that_do_not_fit(tmp_path, model):
    model.save(tmp_path / "exported")
    config = tmp_path / "exported/config.json"
    about = json.loads(config.read_text())
    about["config"]["network"]["width"] = 32
    config.write_text(json.dumps(about))
    with pytest.raises(sedd.UserError, match="does not fit its config.json"):
        sedd.load(tmp_path / "exported")
    weights = tmp_path / "exported/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(sedd.UserError, match="damaged"):
        sedd.load(tmp_path / "exported")
