"""Sampling beyond the block, samplers by name, and the trace."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from small import model_of, small_config, small_corpus

import sedd
from sedd.data.tokenizers import make_tokenizer
from sedd.generation import prompts
from sedd.generation.generate import _largest_block, _text_length, generate, sampler_for
from sedd.generation.options import SamplingOptions
from sedd.generation.prompts import before_blank
from sedd.generation.rows import Row, collate, windows
from sedd.generation.samplers import SAMPLERS, SamplerContext, named_sampler
from sedd.runtime import parallel

BLOCK = 16


def untrained(corpus, *settings):
    """A model with a small network, of one layer, at initialisation."""
    return model_of(
        small_config(corpus, "network.layers=1", *settings),
        corpus.tokenizer,
        lambda init: jax.jit(init)(jax.random.key(0)),
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def model(corpus):
    return untrained(corpus)


@pytest.fixture(scope="module")
def uniform(corpus):
    return untrained(corpus, "process.name=uniform", "training.noise_sampling=time")


def test_windows_cover_each_row_and_overlap_by_half_a_block():
    """The last window of a row ends with the row; shorter rows repeat their last window."""
    starts = np.array(list(windows(np.array([5, 16, 17, 24, 40]), 16))).T
    assert starts.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1], [0, 8, 8, 8], [0, 8, 16, 24]]
    assert [start.tolist() for start in windows(np.array([3, 9]), 16)] == [[0, 0]]
    assert np.array(list(windows(np.array([12]), 5))).T.tolist() == [[0, 3, 6, 7]]


@pytest.mark.parametrize("of", ["model", pytest.param("uniform", marks=pytest.mark.slow)])
def test_text_longer_than_a_block_starts_with_a_sample_of_a_block(request, of):
    """The samples are independent of the grouping of rows."""
    model = request.getfixturevalue(of)
    settings = dict(steps=4, seed=2)
    long = model.sample(3, length=37, trace=True, **settings)
    assert long.tokens.shape == (3, 37) and long.tokens.min() >= 0
    assert long.tokens.max() < model.network.process.vocab_size
    if of == "model":  # the uniform one adds Gibbs steps for the given half of a block
        np.testing.assert_array_equal(long.tokens[:, :BLOCK], model.sample(3, trace=True, **settings).tokens)
    grouped = model.sample(3, length=37, batch_size=2, **settings)
    np.testing.assert_array_equal(grouped.tokens, long.tokens)
    assert not np.array_equal(long.tokens[:, 8:16], long.tokens[:, 16:24])  # blocks have independent noise
    np.testing.assert_array_equal(long.trace[-1], long.tokens)
    placeholder = model.network.process.mask_id if of == "model" else -1
    assert np.all(long.trace[0][:, BLOCK:] == placeholder)  # later blocks
    assert len(long.trace) <= 4 * 4  # four blocks
    assert long.network_calls == len(long.trace) if of == "model" else long.network_calls == 4 * 7


def test_options_are_validated_when_they_are_made():
    """One line each. The number of steps is that of a sampler by name; a Sampler has its own."""
    invalid = [{"steps": 0}, {"temperature": 0.0}, {"top_p": 1.5}, {"seed": -1}, {"batch_size": 0}, {"sampler": 3}]
    for options in invalid:
        with pytest.raises(sedd.UserError, match=f"{next(iter(options))}( is a name| must )") as error:
            SamplingOptions(**options)
        assert "\n" not in str(error.value)
    tweedie = sedd.Tweedie(sedd.Absorbing(3), sedd.LogLinear(), 2)
    assert SamplingOptions(sampler=tweedie, steps=0).sampler == tweedie
    assert not SamplingOptions().adjusts_logits and SamplingOptions(top_p=0.9).adjusts_logits


def test_samples_use_all_64_bits_of_a_seed(model):
    seeds = (2, 2 + 2**32, 2 + 2**63, 2**64 - 1)
    samples = {model.sample(3, steps=4, seed=seed, trace=True).tokens.tobytes() for seed in seeds}
    assert len(samples) == len(seeds)


@pytest.mark.slow
@pytest.mark.parametrize("rows, split", [(19, True), (3, False)])
def test_samples_are_independent_of_devices(model, rows, split):
    """At least as many rows as devices are sharded over them; fewer rows are not."""
    expected = model.sample(rows, steps=4, seed=2, trace=True)
    mesh = parallel.data_mesh()
    params = parallel.put(model.params, parallel.shardings(mesh, model.params))
    placed, sharding = parallel.place_for_batch(params, rows)
    assert (sharding is not None) == split and parallel.num_batch_shards(params) == 8
    assert all(len(leaf.devices()) == (8 if split else 1) for leaf in jax.tree.leaves(placed))
    sharded = dataclasses.replace(model, params=params).sample(rows, steps=4, seed=2, trace=True)
    np.testing.assert_array_equal(sharded.tokens, expected.tokens)
    np.testing.assert_array_equal(sharded.trace, expected.trace)


def test_given_tokens_stay_in_every_block_of_rows_of_any_length(model):
    random, lengths = np.random.default_rng(0), (40, 3, 16, 29)
    rows = []
    for length in lengths:
        given = random.random(length) < 0.4
        rows.append(Row(random.integers(0, 20, length).astype(np.int32) * given, ~given))
    samples = generate(model, rows, SamplingOptions(steps=3, batch_size=3))
    for row, tokens, given in zip(rows, samples.tokens, samples.given):
        size = len(row.tokens)
        assert np.all(tokens[size:] == -1) and np.all(tokens[:size] >= 0)
        np.testing.assert_array_equal(given[:size], ~row.free)
        assert not given[size:].any()
        np.testing.assert_array_equal(tokens[:size][~row.free], row.tokens[~row.free])


def test_watch_is_called_with_the_trace(model):
    """After each step, with rows of any lengths and their given tokens, without the copies that fill a group."""
    rows = [
        prompts.blank(24),
        prompts.of_text("the 7", model.tokenizer),
        prompts.blank(9),
    ]
    calls = []
    options = SamplingOptions(steps=4, batch_size=2)
    watched = generate(model, rows, dataclasses.replace(options, watch=lambda *state: calls.append(state)))
    traced = generate(model, rows, dataclasses.replace(options, trace=True))
    np.testing.assert_array_equal(watched.tokens, traced.tokens)
    first = [(tokens, given, steps) for rows, tokens, given, steps in calls if rows.tolist() == [0, 1]]
    last = [tokens for rows, tokens, _, _ in calls if rows.tolist() == [2]]
    assert len(first) + len(last) == len(calls) and [steps for _, _, steps in first][:2] == [1, 2]
    np.testing.assert_array_equal([tokens for tokens, _, _ in first], traced.trace[: len(first), :2])
    np.testing.assert_array_equal([tokens for tokens in last], traced.trace[: len(last), 2:])
    assert all(np.array_equal(given, traced.given[:2]) for _, given, _ in first)


@pytest.mark.slow
def test_group_without_free_positions_has_a_constant_trace(model, uniform):
    """Alone it takes no network call, for either process."""
    tokens, given = np.tile(np.arange(6), (2, 1)), np.array([[True] * 6, [True] * 5 + [False]])
    for which in (model, uniform):
        rows = prompts.of_arrays(tokens, given, 20)
        options = SamplingOptions(steps=2, trace=True)
        samples = generate(which, rows, dataclasses.replace(options, batch_size=1))
        assert samples.trace.dtype == np.int32 and np.all(samples.trace[:, 0] == tokens[0]) and len(samples.trace) > 0
        alone = generate(which, rows[:1], options)
        assert alone.network_calls == 0 and alone.trace.shape == (0, 1, 6)
        np.testing.assert_array_equal(alone.tokens, tokens[:1])


def test_sampler_is_made_for_the_block_with_the_most_free_tokens(model, uniform):
    """Also if the first block is given, and for a uniform model, which fills in all of its block."""
    prefix, gap = (Row(np.zeros(length, np.int32), np.arange(length) >= count) for length, count in ((40, 16), (10, 8)))

    def largest(model, row):
        return _largest_block(model, collate([row], model))

    def sampler(model, name, steps, row):
        return sampler_for(model, SamplingOptions(sampler=name, steps=steps), collate([row], model))

    assert largest(model, prefix) == (8, 8, 16)
    assert sampler(model, "margin", 2, prefix) == sedd.Adaptive(model.process, sedd.Margin(4))
    assert largest(model, prompts.blank(3)) == (3, 0, 16)
    assert largest(model, gap) == (2, 8, 16) and largest(uniform, gap) == (8, 8, 16)
    assert sampler(uniform, "tweedie", 4, gap).corrector == sedd.Gibbs(1)
    assert isinstance(sampler(uniform, "tweedie", 4, prompts.blank(10)), sedd.Tweedie)


def test_planned_counts_are_those_of_the_free_tokens(tmp_path):
    """For a short text in a block whose other positions stay masked, not those of the end of the block."""
    bins = [{"low": k / 8, "high": (k + 1) / 8, "nats_per_token": k**3 + 1, "error": None} for k in range(8)]
    (tmp_path / "report.json").write_text(json.dumps({"profile": bins}))
    costs = sedd.diffusion.discrete.unmasking_schedules.information(bins, 16)

    def weights(num_free, num_given):
        context = SamplerContext(sedd.Absorbing(9), sedd.LogLinear(), 3, num_free, num_given, 16)
        return named_sampler(f"planned:{tmp_path}/report.json", context).weights

    assert weights(10, 0) == sedd.plan_unmasking(costs[:10], 3).counts != weights(10, 6)
    assert weights(10, 6) == sedd.plan_unmasking(costs[6:], 3).counts


def test_all_steps_and_groups_share_one_program(model):
    """The first step, the last group and another temperature compile nothing."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    model.sample(5, steps=6, batch_size=2, temperature=0.9)
    count = len(compiled)
    model.sample(7, steps=6, batch_size=2, temperature=0.8, top_p=0.7, seed=3)
    assert len(compiled) == count > 0


def test_text_ends_at_the_first_end_of_text_after_the_last_given_token(model):
    """Also in infilling of packed text. An unconditional sample is the whole block."""
    end = model.tokenizer.end_of_text
    assert end is not None
    ids = np.array([1, end, 2, end, 3, end])
    row = Row(ids.astype(np.int32), np.array([False, False, False, True, True, True]))
    assert _text_length(model, row, ids) == 3
    assert _text_length(model, row._replace(free=np.ones(6, bool)), ids) == 6
    assert _text_length(model, row._replace(free=np.arange(6) != 4), ids) == 5


def test_space_before_a_blank_is_left_to_the_blank():
    """If tokens begin with a space; not if a space is a token of its own."""
    words = "if x in self or the value of a key is not in any list of names then return none"
    texts = [" ".join(np.random.default_rng(seed).permutation(words.split())) for seed in range(60)]
    spaced, plain = (make_tokenizer(spec, texts, end_of_text=True) for spec in ("sentencepiece:300", "bytes"))
    assert plain.decode(before_blank("if x in self ", plain).tokens) == "if x in self "
    assert spaced.decode(before_blank("if x in self ", spaced).tokens) == "if x in self"
    for text in ("if x in self", "x =\n", ""):
        assert spaced.decode(before_blank(text, spaced).tokens) == text


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    "process", [sedd.Absorbing(9), sedd.Uniform(9), sedd.Gaussian(9)], ids=lambda process: type(process).__name__
)
def test_named_sampler_is_made_or_refused_for_each_process(name, process):
    """The error is one line that names the usable samplers."""
    context = SamplerContext(process, sedd.LogLinear(), 4, 10)
    of_all = {"euler", "tweedie"}
    of_tokens = of_all | {"trapezoidal", "gibbs", "renoise"}
    usable = {
        "Absorbing": set(SAMPLERS) - {"barker", "ddim", "flow", "renoised", "tencdm"},
        "Uniform": of_tokens | {"barker"},
        "Gaussian": of_all | {"ddim", "flow", "renoised", "tencdm"},
    }
    if name not in usable[type(process).__name__]:
        with pytest.raises(
            sedd.UserError, match=f"the sampler {name} is not for this model; use one of euler, t"
        ) as no:
            named_sampler(name, context)
        assert "\n" not in str(no.value) and f" {name}," not in str(no.value)
    else:
        sampler = named_sampler(name, context)
        assert sampler.process == process and hash(sampler) == hash(named_sampler(name, context))


def test_planned_sampler_reads_a_report(model, tmp_path):
    """Its counts sum to the number of free tokens. An invalid report is an error of one line."""
    bins = [{"low": k / 8, "high": (k + 1) / 8, "nats_per_token": 1 + k**2 / 9, "error": None} for k in range(8)]
    (tmp_path / "report.json").write_text(json.dumps({"profile": bins}))
    samples = model.sample(2, sampler=f"planned:{tmp_path}/report.json", steps=5)
    assert samples.network_calls == 5 and samples.tokens.max() < model.network.process.vocab_size
    assert model.sample(1, length=3, sampler=f"planned:{tmp_path}/report.json", steps=5).network_calls == 3
    (tmp_path / "odd.json").write_text('{"profile": [{"low": 0}]}')
    for name in (
        "planned",
        "planned:",
        f"planned:{tmp_path}",
        *(f"planned:{tmp_path}/{x}.json" for x in ("none", "odd")),
    ):
        with pytest.raises(sedd.UserError, match="there is no profile in"):
            model.sample(1, sampler=name)


def test_model_of_padded_documents_refuses_texts_longer_than_a_block(corpus):
    """It was trained on one document per block."""
    layout = sedd.data.layout.Layout("padded", "scored")
    padded = dataclasses.replace(untrained(corpus), layout=layout)
    with pytest.raises(sedd.UserError, match="cannot sample a text of 17 tokens; it must have 1 to 16 tokens"):
        padded.sample(1, length=17)
