"""The lm-evaluation-harness adapter: lm_eval's tasks and metrics against the methods of Model."""

import dataclasses
import functools
import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import lm_eval
import numpy as np
import pytest
import sentencepiece
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from small import model_of, small_config, write_files
from test_protocols import random_model

import sedd
from sedd.data.layout import Layout
from sedd.data.prepare import prepare
from sedd.data.tokenizers import make_tokenizer
from sedd.harness import Harness
from sedd.harness_settings import generation

TASKS = Path(__file__).parent / "harness_tasks"
BLOCK = 24
SEED = 15  # of parameters with which greedy text holds no end of text


def random_model_of(corpus, *settings, layout=Layout()):
    """A model of random parameters: its distribution is far from uniform and its tokens depend on each other."""
    config = small_config(corpus, f"data.block_length={BLOCK}", *settings)
    random = np.random.default_rng(SEED)

    def noise(leaf):
        return random.normal(0, 0.5 if leaf.ndim > 1 else 0.1, leaf.shape).astype(leaf.dtype)

    def params(init):
        return jax.device_put(jax.tree.map(noise, jax.eval_shape(init, jax.random.key(0))))

    return model_of(config, corpus.tokenizer, params, layout)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus with the characters of the tasks and of a template."""
    folder = tmp_path_factory.mktemp("times")
    texts = [f"the {number} times table: {number}, {2 * number}.\n<blank:8>" for number in range(60)]
    return prepare(write_files(folder / "texts", texts), "characters", folder / "corpus")


@pytest.fixture(scope="module")
def model(corpus):
    return random_model_of(corpus)


@pytest.fixture(scope="module")
def harness(model):
    return Harness(model, method="margin", draws=8)


@pytest.fixture(scope="module")
def results(harness, tmp_path_factory):
    """The results of all four tasks from one run of lm_eval, without network access."""
    with pytest.MonkeyPatch.context() as patch:
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.chdir(TASKS)
        manager = TaskManager(include_path=str(TASKS), include_defaults=False)
        tasks = ["times_choice", "times_last", "times_text", "times_until"]
        return lm_eval.simple_evaluate(model=harness, tasks=tasks, task_manager=manager, bootstrap_iters=0)


def requests_for(*arguments, kind="loglikelihood", documents=None):
    """Requests as lm_eval makes them. documents: the index of each request's document; default: all different."""
    documents = range(len(arguments)) if documents is None else documents
    return [
        Instance(kind, {}, one, number, ("task", document, 1))
        for number, (one, document) in enumerate(zip(arguments, documents))
    ]


@functools.partial(jax.jit, static_argnums=0)
def denoise(network, params, x, sigma):
    return network.denoiser(params)(x, sigma, None)


def decoded(model, context, count):
    """Greedy decoding by hand: the masked position of the largest margin gets its most likely token."""
    mask = model.process.mask_id
    ids = model.tokenizer.encode(context)
    x = np.full((1, BLOCK), mask)
    x[0, : len(ids)] = ids
    free = np.arange(len(ids), len(ids) + count)
    for _ in range(count):
        sigma = model.process.sigma_from_mask_ratio(jax.numpy.asarray(x))
        p = np.exp(np.asarray(denoise(model.network, model.params, x, sigma), np.float64))[0]
        best = np.sort(p, axis=-1)
        margin = np.where(x[0] == mask, best[:, -1] - best[:, -2], -1)
        at = free[np.argmax(margin[free])]
        x[0, at] = np.argmax(p[at])
    return model.tokenizer.decode(x[0, free])


def logged_samples(results, task):
    """Yields for each document of a task: the arguments of its requests, their results, and the document."""
    for sample in results["samples"][task]:
        yield sample["arguments"], [answers[0] for answers in sample["resps"]], sample["doc"]


def test_accuracy_of_multiple_choice_follows_from_log_likelihoods(model, results):
    """Spaces at the end of a context move to the continuation, and a long context is truncated on the left."""
    correct, num_truncated = [], 0
    for pairs, answers, doc in logged_samples(results, "times_choice"):
        context = pairs[0][0].rstrip()
        options = [pairs[0][0][len(context) :] + continuation for _, continuation in pairs]
        truncated = context[-(BLOCK - max(map(len, options))) :]
        num_truncated += truncated != context
        expected = model.log_likelihood(options, given=truncated, method="margin")
        assert [nats for nats, _ in answers] == pytest.approx([one.nats for one in expected])
        correct.append(np.argmax([one.nats for one in expected]) == doc["answer"])
    assert num_truncated and results["results"]["times_choice"]["acc,none"] == np.mean(correct)


def test_perplexity_of_documents_is_that_of_the_model(model, results):
    """An empty document adds 0 nats; lm_eval and the model count the same bytes."""
    texts = [pairs[0][0] for pairs, _, _ in logged_samples(results, "times_text")]
    assert "" in texts and max(map(len, texts)) > BLOCK
    report = model.perplexity([text for text in texts if text], draws=8, progress=False)
    assert results["results"]["times_text"]["bits_per_byte,none"] == pytest.approx(report.bits_per_byte)
    assert 2**report.bits_per_byte == pytest.approx(results["results"]["times_text"]["byte_perplexity,none"])


def test_each_document_has_its_own_bound(model, harness):
    """The first document has the same number alone."""
    texts = ["the 5 times table", "the 12 times table: 12, 24, 36, 48", "", "times"]
    nats = harness.loglikelihood_rolling(requests_for(*((text,) for text in texts)))
    alone = model.perplexity(texts[0], draws=8, progress=False)
    assert nats[0] == pytest.approx(-alone.nats_per_token * alone.num_tokens)
    together = model.perplexity([text for text in texts if text], draws=8, progress=False)
    assert sum(nats) == pytest.approx(-together.nats_per_token * together.num_tokens)
    assert nats[2] == 0 and max(nats[:2]) < 0


def test_generated_text_is_greedy_up_to_a_stop(model, results):
    for (pair,), (text,), _ in logged_samples(results, "times_until"):
        context, settings = pair
        expected = decoded(model, context[-(BLOCK - settings["max_gen_toks"]) :], settings["max_gen_toks"])
        assert text == expected.partition(",")[0]
    assert results["results"]["times_until"]["exact_match,none"] == 0


def test_greedy_is_true_for_the_continuation_of_greedy_decoding(model, harness, results):
    """In batches of any rows; with one token changed it is False. lm_eval's acc is its mean."""
    contexts = ["the 3 times", "", "12, 24, 36", "the"]
    greedy_texts = [decoded(model, context, 2 + number) for number, context in enumerate(contexts)]
    others = [text[:-1] + ("a" if text[-1] != "a" else "b") for text in greedy_texts]
    pairs = list(zip(contexts * 2, greedy_texts + others))
    flags = [greedy for _, greedy in harness.loglikelihood(requests_for(*pairs))]
    assert flags == [True] * 4 + [False] * 4
    last = [greedy for _, answers, _ in logged_samples(results, "times_last") for _, greedy in answers]
    assert results["results"]["times_last"]["acc,none"] == np.mean(last)


def test_options_share_their_noise_and_their_method(model):
    """Equal options have equal numbers. A short option beside a long one has a bound, although alone it is exact."""
    harness, texts = Harness(model, draws=8), [" times table", " times table"]

    def bounds(texts, **settings):
        return [one.nats for one in model.log_likelihood(texts, given="the", method="bound", draws=8, **settings)]

    def by_harness(texts, documents):
        requests = requests_for(*(("the", text) for text in texts), documents=documents)
        return [nats for nats, _ in harness.loglikelihood(requests)]

    same = by_harness(texts, [0, 0])
    assert same[0] == same[1] and same == bounds(texts) != bounds(texts, seed=1)
    mixed = [" 12", " times table"]
    assert by_harness(mixed, [0, 0]) == bounds(mixed)
    assert by_harness(mixed, [0, 1])[0] == pytest.approx(model.log_likelihood(" 12", given="the", method="exact").nats)


def test_truncated_contexts_are_one_warning(model, harness, caplog):
    long = "the 12 times table: 12, 24, 36"
    with caplog.at_level(logging.WARNING):
        results = harness.loglikelihood(requests_for((long, ", 48"), ("the", " 1")))
    assert [record.message for record in caplog.records] == [
        f"1 of 2 contexts did not fit into the model's block of {BLOCK} tokens; cut on the left"
    ]
    assert results == harness.loglikelihood(requests_for((long[-(BLOCK - 4) :], ", 48"), ("the", " 1")))


def until(harness, context, **settings):
    return harness.generate_until(requests_for(*((context, settings),) * 2, kind="generate_until"))


@pytest.mark.slow
def test_generation_is_greedy_unless_sampling_is_requested(model, harness):
    """Samples depend on the seed, and differ between requests."""
    greedy = until(harness, "the 3 times", max_gen_toks=8)
    assert greedy == [decoded(model, "the 3 times", 8)] * 2
    for same in (dict(do_sample=False, temperature=1.0), dict(do_sample=True, temperature=0.0), dict(seed=5)):
        assert until(harness, "the 3 times", max_gen_toks=8, **same) == greedy
    drawn = until(harness, "the 3 times", max_gen_toks=8, do_sample=True, steps=8)
    assert drawn[0] != drawn[1] and drawn == until(harness, "the 3 times", max_gen_toks=8, temperature=1.0, steps=8)
    assert drawn != until(harness, "the 3 times", max_gen_toks=8, do_sample=True, steps=8, seed=1)
    assert all(len(text) == 8 for text in greedy + drawn)


@pytest.mark.parametrize(
    "stops, expected",
    [([], "12, 24.\nthe"), (["\n", ", ", "."], "12"), ("4.", "12, 2"), (["no such", ""], "12, 24.\nthe"), (["1"], "")],
)
def test_text_is_cut_at_the_first_stop(model, harness, monkeypatch, stops, expected):
    """And always at an end of text. The infilled tokens are given by the test."""
    ids = model.tokenizer.encode("12, 24.\nthe times")
    ids[len("12, 24.\nthe")] = model.tokenizer.end_of_text
    monkeypatch.setattr(
        Harness, "_infill", lambda self, rows, sampling: [np.append(row.tokens[:3], ids) for row in rows]
    )
    assert until(harness, "the", max_gen_toks=len(ids), until=stops) == [expected] * 2


def test_continuation_keeps_its_leading_space(tmp_path, monkeypatch):
    """With a tokenizer that adds a space before a text, and drops it in decoding."""
    train = sentencepiece.SentencePieceTrainer.train
    train(sentence_iterator=iter(["the times table"] * 9), model_prefix=f"{tmp_path}/a", vocab_size=14, minloglevel=2)
    tokenizer = make_tokenizer(f"sentencepiece:{tmp_path}/a.model", [], end_of_text=True)
    harness, ids = Harness(random_model(f"data.block_length={BLOCK}", tokenizer=tokenizer)), tokenizer.encode("times")
    assert tokenizer.decode(ids) == "times"
    monkeypatch.setattr(
        Harness, "_infill", lambda self, rows, sampling: [np.append(row.tokens[: -len(ids)], ids) for row in rows]
    )
    monkeypatch.setattr(Harness, "_in_block", lambda self, row: row)
    assert until(harness, "the", max_gen_toks=len(ids)) == [" times"] * 2


def test_a_template_in_a_context_is_text(model, harness):
    """Requests of different settings are returned in their order."""
    settings = [{"max_new_tokens": 3, "num_beams": 1}, {"max_gen_toks": 4}] * 2
    texts = harness.generate_until(requests_for(*(("the <blank:8>", one) for one in settings), kind="generate_until"))
    assert texts == [decoded(model, "the <blank:8>", count) for count in (3, 4)] * 2


def without_tokenizer(model):
    """The model without its tokenizer, as a published checkpoint."""
    return dataclasses.replace(model, tokenizer=None)


def test_tokenizer_argument_is_used_for_a_model_without_one(model):
    network = dataclasses.replace(model.network, process=sedd.Absorbing(257))
    published = dataclasses.replace(without_tokenizer(model), network=network)
    assert Harness(published, "bytes").model.tokenizer.encode("a").tolist() == [97]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda harness: until(harness, "the", num_beams=2), "takes no num_beams=2, only 1; leave it out"),
        (lambda harness: until(harness, "the", max_gen_toks=24), "leave no room for a context in the model's block"),
        (lambda harness: until(harness, "the", max_gen_toks=4, do_sample=True, top_p=2), "top_p must lie in"),
        (
            lambda harness: harness.loglikelihood(requests_for(("the", " times" * 5))),
            "has 30 tokens, more than the model's",
        ),
        (lambda harness: Harness(harness.model, "bytes"), "has a tokenizer of its own; leave out tokenizer=bytes"),
        (
            lambda harness: Harness(without_tokenizer(harness.model)),
            "has no tokenizer; name the one it was trained with",
        ),
        (
            lambda harness: Harness(without_tokenizer(harness.model), "bytes"),
            "the tokenizer bytes has 257 tokens, the model 29",
        ),
        (lambda harness: Harness("no/such/folder"), "there is no folder no/such/folder"),
        (lambda harness: Harness(), "name the model, as in --model_args pretrained=runs/mine"),
        (lambda harness: Harness(harness.model, method="best"), "there is no method 'best'; there are auto, exact"),
        (lambda harness: Harness(harness.model, draws=10**12), "draws must be at least 1 and at most 1,048,576"),
        (lambda harness: Harness(harness.model, draws="many"), "draws must be a whole number, not 'many'"),
        (lambda harness: Harness(harness.model, metod="auto"), "takes no metod=auto; the nearest is method"),
        (lambda harness: Harness(harness.model, dtype="float16"), "takes no dtype=float16, only auto or float32"),
        (lambda harness: Harness(harness.model, peft="folder"), "takes no peft=folder; leave it out"),
        (lambda harness: Harness(harness.model, max_length=2048), "takes no max_length=2048, only 24; leave it out"),
        (lambda harness: harness.apply_chat_template([]), "leave out --apply_chat_template"),
    ],
)
def test_invalid_arguments_are_refused(harness, call, message):
    with pytest.raises(sedd.UserError, match=message) as error:
        call(harness)
    assert "\n" not in str(error.value)


FLAGS = {"batch_size": "auto:4", "max_batch_size": 64, "device": "cuda:0", "trust_remote_code": True}
EMPTY = {"tokenizer": "", "method": "", "draws": "", "seed": None, "max_gen_toks": None, "peft": None, "revision": ""}


@pytest.mark.parametrize(
    "others", [FLAGS, EMPTY, {"dtype": "auto", "backend": "causal"}, {"dtype": "float32", "max_length": BLOCK}]
)
def test_arguments_of_other_models_without_effect_are_accepted(model, others):
    """As lm_eval passes them: with defaults of --device and --batch_size beside --model_args."""
    made = Harness.create_from_arg_obj({"pretrained": model, **others}, {"batch_size": 1, "device": "cuda:0"})
    assert made.get_model_info() == Harness(model).get_model_info() and made.max_gen_toks == 64


@pytest.mark.parametrize(
    "settings, num_tokens, stops, sampling",
    [
        ({}, 64, [], None),
        ({"until": ["\n"], "max_new_tokens": 16, "num_beams": 1, "do_sample": False}, 16, ["\n"], None),
        ({"until": "stop", "max_gen_toks": 8.0, "temperature": 0.0, "top_k": 50, "min_p": 0.1}, 8, ["stop"], None),
        ({"until": None, "max_gen_toks": None, "temperature": None, "do_sample": None, "top_p": ""}, 64, [], None),
        ({"until": [], "max_tokens": "8", "do_sample": 1, "seed": 7.0, "steps": 1e2}, 8, [], {"seed": 7, "steps": 100}),
        ({"until": ["", None, 5], "temperature": 0.7, "top_k": 0}, 64, ["5"], {"temperature": 0.7}),
        ({"do_sample": True, "temperature": 0, "length_penalty": 2, "early_stopping": True}, 64, [], None),
    ],
)
def test_settings_of_task_files_are_translated(settings, num_tokens, stops, sampling):
    """Settings without effect are accepted, empty ones are ignored, and numbers are of any type."""
    assert generation(settings, 64) == (num_tokens, stops, sampling)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_beams": 10}, "takes no num_beams=10, only 1; leave it out"),
        ({"top_k": 50, "do_sample": True}, "takes no top_k=50, only 0 or -1; leave it out"),
        ({"temprature": 1.0}, "takes no temprature=1.0; the nearest is temperature"),
        ({"max_new_tokens": "many"}, "max_new_tokens must be a whole number, not 'many'"),
        ({"max_gen_toks": 1.5}, "max_gen_toks must be a whole number, not 1.5"),
        ({"temperature": "warm"}, "temperature must be a number, not 'warm'"),
        ({"do_sample": "yes"}, "do_sample is true or false, not 'yes'"),
        ({"guidance": {}}, "takes no guidance="),
    ],
)
def test_unsupported_settings_are_refused(settings, message):
    with pytest.raises(sedd.UserError, match=message) as error:
        generation(settings, 64)
    assert "\n" not in str(error.value)


def test_invalid_settings_are_refused_before_sampling(harness, monkeypatch):
    """Also those of a later request."""
    monkeypatch.setattr(Harness, "_infill", lambda *_: pytest.fail("_infill was called"))
    for invalid in ({"top_p": 2}, {"sampler": "best"}, {"steps": 0}, {"temperature": -1}, {"seed": -1}):
        settings = [{"max_gen_toks": 3}, {"max_gen_toks": 4, "do_sample": True, **invalid}]
        with pytest.raises(sedd.UserError, match=f"{next(iter(invalid))}|sampler"):
            harness.generate_until(requests_for(*(("the", one) for one in settings), kind="generate_until"))


@pytest.fixture(scope="module")
def uniform(corpus):
    return Harness(random_model_of(corpus, "process.name=uniform", "training.noise_sampling=time"), draws=8)


def test_uniform_model_has_no_likelihood_given_a_context(uniform):
    with pytest.raises(sedd.UserError, match="it has no likelihood given a context"):
        uniform.loglikelihood(requests_for(("the", " times")))


@pytest.mark.slow
def test_uniform_model_scores_texts_and_generates(uniform):
    """It scores text without a context, and documents; greedy continuations do not depend on the seed."""
    (nats, greedy), *_ = uniform.loglikelihood(requests_for(("", "the times")))
    expected = uniform.model.log_likelihood(["the times"], draws=8)
    assert nats == pytest.approx(expected[0].nats) and greedy is False
    assert uniform.loglikelihood_rolling(requests_for(("the times",)))[0] < 0
    first, second = until(uniform, "the", max_gen_toks=4, seed=1)
    assert [first, second] == until(uniform, "the", max_gen_toks=4, seed=2)


@pytest.mark.parametrize("padding", ["scored", pytest.param("ignored", marks=pytest.mark.slow)])
def test_generated_text_is_greedy_for_models_of_padded_documents(corpus, padding):
    """And another text is not; contexts are truncated to a block."""
    padded = Harness(random_model_of(corpus, layout=Layout("padded", padding, (0,) * BLOCK + (1,))), method="margin")
    room = BLOCK - (padding == "ignored")  # the row ends with an end of text
    for context in ("the", "the 12 times table: 12, 24"):
        text = until(padded, context, max_gen_toks=4)[0]
        (nats, same), (_, other) = padded.loglikelihood(requests_for((context, text), (context, text[::-1] + ",")))
        assert len(text) == 4 and same and not other
        truncated = context[-(room - 4) :]
        assert nats == pytest.approx(padded.model.log_likelihood(text, given=truncated, method="margin").nats)


def test_lm_eval_knows_the_model_by_name(model, tmp_path):
    """Beside its own models, which it registers only into an empty registry."""
    model.save(tmp_path / "exported")
    settings = f"pretrained={tmp_path / 'exported'},method=bound,draws=2"
    made = get_model("sedd").create_from_arg_string(settings, {"batch_size": 1, "device": "cuda:0"})
    about = made.get_model_info()
    assert isinstance(made, Harness) and (about["method"], about["num_draws"], about["seed"]) == ("bound", 2, 0)
    assert made.tokenizer_name == model.tokenizer.fingerprint
    assert get_model("dummy").__name__ == "DummyLM"


def test_missing_lm_eval_is_one_line(monkeypatch):
    monkeypatch.delitem(sys.modules, "sedd.harness")
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(sedd.UserError, match=r"pip install 'sedd\[harness\]'"):
        importlib.import_module("sedd.harness")


@pytest.mark.slow
def test_command_of_lm_eval_with_this_model(model, tmp_path):
    """An error is one line."""
    model.save(tmp_path / "exported")
    command = [sys.executable, "-m", "sedd.harness", "run", "--model", "sedd", "--include_path", str(TASKS)]
    command += ["--tasks", "times_until", "--output_path", str(tmp_path / "results"), "--model_args"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "datasets"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(sedd.__file__).parents[1])
    run = functools.partial(subprocess.run, cwd=TASKS, env=environment, capture_output=True, text=True)
    flags = ["--trust_remote_code", "--device=cuda:0", "--batch_size=auto"]
    flags += ["--gen_kwargs", "max_new_tokens=6,num_beams=1"]
    done = run([*command, f"pretrained={tmp_path / 'exported'},dtype=auto,device=cpu,tokenizer=", *flags])
    assert done.returncode == 0 and "exact_match" in done.stdout, done.stderr
    assert list((tmp_path / "results").rglob("results_*.json"))
    done = run([*command, "pretrained=no/such/folder"])
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("sedd: error: there is no folder")
