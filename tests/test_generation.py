"""Drawing beyond the block, from samplers by name, and what is shown on the way."""

import json

import jax
import numpy as np
import pytest
from small import small_config, small_corpus

import sedd
from sedd import config as configs
from sedd.generation import Generator
from sedd.prompts import before_blank, windows
from sedd.samplers import SAMPLERS, Wanted, named_sampler

BLOCK = 16


def untrained(corpus, *settings):
    """A small network that was never trained: what it says does not matter here."""
    config = small_config(corpus, *settings)
    _, schedule, network = configs.build(config, corpus.vocab_size)
    return Generator(network, network.init(jax.random.key(0)), schedule, corpus.tokenizer, corpus.layout, BLOCK)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def generator(corpus):
    return untrained(corpus)


@pytest.fixture(scope="module")
def uniform(corpus):
    return untrained(corpus, "process.name=uniform", "training.levels=times")


def test_windows_cover_each_row_and_overlap_by_half_a_block():
    """The last block of a row ends with it; a row that is done repeats it."""
    found = np.array(list(windows(np.array([5, 16, 17, 24, 40]), 16))).T
    assert found.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1], [0, 8, 8, 8], [0, 8, 16, 24]]
    assert [start.tolist() for start in windows(np.array([3, 9]), 16)] == [[0, 0]]
    assert np.array(list(windows(np.array([12]), 5))).T.tolist() == [[0, 3, 6, 7]]


@pytest.mark.parametrize("of", ["generator", "uniform"])
def test_longer_than_a_block(request, of):
    """Block after block, the first a sample of a block; grouping rows changes nothing."""
    generator = request.getfixturevalue(of)
    settings = dict(steps=4, seed=2)
    long = generator.sample(3, length=37, trace=True, **settings)
    assert long.tokens.shape == (3, 37) and long.tokens.min() >= 0
    assert long.tokens.max() < generator.network.process.vocab_size
    if of == "generator":  # the uniform one resamples, as it will have to where the half of a block is given
        np.testing.assert_array_equal(long.tokens[:, :BLOCK], generator.sample(3, **settings).tokens)
    np.testing.assert_array_equal(generator.sample(3, length=37, batch_size=2, **settings).tokens, long.tokens)
    assert not np.array_equal(long.tokens[:, 8:16], long.tokens[:, 16:24])  # each block has noise of its own
    np.testing.assert_array_equal(long.trace[-1], long.tokens)
    nothing = generator.network.process.mask if of == "generator" else -1
    assert np.all(long.trace[0][:, BLOCK:] == nothing)  # not begun
    assert len(long.trace) <= 4 * 4  # four blocks
    assert long.network_calls == len(long.trace) if of == "generator" else long.network_calls == 4 * 7


def test_given_tokens_far_apart_in_rows_of_any_length(generator):
    """They stay, in whichever block they come."""
    random, lengths = np.random.default_rng(0), (40, 3, 16, 29)
    rows = []
    for length in lengths:
        given = random.random(length) < 0.4
        rows.append(sedd.prompts.Prompt(random.integers(0, 20, length).astype(np.int32) * given, given))
    drawn = generator.draw(rows, steps=3, batch_size=3)
    for row, tokens, given in zip(rows, drawn.tokens, drawn.given):
        size = len(row.tokens)
        assert np.all(tokens[size:] == -1) and np.all(tokens[:size] >= 0)
        np.testing.assert_array_equal(given[:size], row.given)
        assert not given[size:].any()
        np.testing.assert_array_equal(tokens[:size][row.given], row.tokens[row.given])


def test_what_is_watched_is_the_trace(generator):
    """After each step, all of it, with what is given; and watching changes no sample."""
    seen = []
    watched = generator.sample(2, length=24, steps=4, watch=lambda *state: seen.append(state))
    traced = generator.sample(2, length=24, steps=4, trace=True)
    np.testing.assert_array_equal(watched.tokens, traced.tokens)
    np.testing.assert_array_equal([tokens for _, tokens, _, _ in seen], traced.trace)
    assert all(rows.tolist() == [0, 1] and not given.any() for rows, _, given, _ in seen)
    assert [steps for _, _, _, steps in seen][:2] == [1, 2]


def test_one_program_for_all_steps_and_groups(generator):
    """The first step is not compiled for itself, nor the last group, nor another temperature."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    generator.sample(5, steps=6, batch_size=2, temperature=0.9)
    count = len(compiled)
    generator.sample(7, steps=6, batch_size=2, temperature=0.8, top_p=0.7, seed=3)
    assert 0 < count <= 4 and len(compiled) == count


def test_text_ends_at_the_first_end_of_text_after_what_is_given(generator):
    """In infilling, of packed text too; ids stay. A sample with nothing given shows all that is in its block."""
    end = generator.tokenizer.end_of_text
    assert end is not None
    ids = np.array([1, end, 2, end, 3, end])
    row = sedd.prompts.Prompt(ids.astype(np.int32), np.array([True, True, True, False, False, False]))
    assert generator._length(row, ids) == 3
    assert generator._length(row._replace(given=np.zeros(6, bool)), ids) == 6
    assert generator._length(row._replace(given=np.arange(6) == 4), ids) == 5


def test_a_space_before_a_blank_is_left_to_the_blank(tmp_path):
    """Where tokens begin with their space; where a space is a token like any other it stays."""
    spaced = sedd.prepare("builtin:functions", "sentencepiece:400", tmp_path / "spaced").tokenizer
    plain = sedd.prepare("builtin:functions", "bytes", tmp_path / "plain").tokenizer
    assert plain.decode(before_blank("if x in self ", plain).tokens) == "if x in self "
    assert spaced.decode(before_blank("if x in self ", spaced).tokens) == "if x in self"
    for text in ("if x in self", "x =\n", ""):
        assert spaced.decode(before_blank(text, spaced).tokens) == text


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("kind", ["absorbing", "uniform"])
def test_every_sampler_by_name(name, kind):
    """It is made for each process, or refused in one line that names those that can be used."""
    process = sedd.Absorbing(9) if kind == "absorbing" else sedd.Uniform(9)
    wanted = Wanted(process, sedd.LogLinear(), 4, 10, BLOCK)
    masks = ("first_hitting", "counts", "even", "cosine", "margin", "entropy", "entropy_bounded")
    if (name in masks and kind == "uniform") or (name == "barker" and kind == "absorbing"):
        with pytest.raises(
            sedd.UserError, match=f"the sampler {name} is not for this model; use one of euler, t"
        ) as no:
            named_sampler(name, wanted)
        assert "\n" not in str(no.value) and f" {name}," not in str(no.value)
    else:
        sampler = named_sampler(name, wanted)
        assert sampler.process == process and hash(sampler) == hash(named_sampler(name, wanted))


def test_the_planned_sampler_reads_a_report(generator, tmp_path):
    """Its calls add up to what is to be filled in. Mistakes are one line."""
    bins = [{"low": k / 8, "high": (k + 1) / 8, "nats_per_token": 1 + k**2 / 9, "error": None} for k in range(8)]
    (tmp_path / "report.json").write_text(json.dumps({"profile": bins}))
    drawn = generator.sample(2, sampler=f"planned:{tmp_path}/report.json", steps=5)
    assert drawn.network_calls == 5 and drawn.tokens.max() < generator.network.process.vocab_size
    assert generator.sample(1, length=3, sampler=f"planned:{tmp_path}/report.json", steps=5).network_calls == 3
    for name in ("planned", "planned:", f"planned:{tmp_path}", f"planned:{tmp_path}/none.json"):
        with pytest.raises(sedd.UserError, match="there is no profile in"):
            generator.sample(1, sampler=name)


def test_padded_documents_have_no_second_block(corpus):
    """A model that knows documents in rows of their own has not seen a document go on."""
    layout = sedd.data.layout.Layout("padded", "scored")
    padded = Generator(
        *(getattr(untrained(corpus), name) for name in ("network", "params", "schedule", "tokenizer")), layout, BLOCK
    )
    with pytest.raises(sedd.UserError, match="a text of 17 tokens cannot be drawn; it must have from 1 to the 16"):
        padded.sample(1, length=17)
