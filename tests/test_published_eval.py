"""`sedd eval --protocol=mdlm` of a published MDLM checkpoint against the authors' validation of the same noisy tokens.

Drawn here from a seed, these were given to the authors' code, whose losses are in `tests/published/mdlm/eval.npz`.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sedd
from sedd.cli import main
from sedd.data.tokenizers import make_tokenizer
from sedd.diffusion import keyed_random
from sedd.diffusion.discrete.score import ScoreStats
from sedd.evaluation.perplexity import perplexity
from sedd.evaluation.protocols import get_protocol, scoring_rows
from sedd.network import predictions

MDLM = Path(__file__).parent / "published" / "mdlm"
LETTERS = " 01234567abcdefghijklmnopqrstuvwxyz"  # with an end of text the 36 tokens of the checkpoint
PROTOCOL = get_protocol("mdlm")


@pytest.fixture(scope="module")
def model():
    return dataclasses.replace(sedd.load(MDLM), tokenizer=make_tokenizer("characters", [LETTERS], True))


@pytest.fixture(scope="module")
def expected():
    with np.load(MDLM / "eval.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def scored(model, expected):
    """The rows of the text."""
    return scoring_rows(PROTOCOL, str(expected["text"]).split("\n"), "validation", model)


def test_the_command_gives_the_loss_of_the_authors(model, expected, tmp_path, capsys):
    """Of the checkpoint, converted."""
    model.save(tmp_path / "converted")
    (tmp_path / "text").write_text(str(expected["text"]))
    draws, rows, length = expected["xt"].shape
    settings = ["--protocol=mdlm", f"--draws={draws}", f"--seed={expected['seed']}", "--json"]
    assert main(["eval", f"--model={tmp_path}/converted", f"--source=lines:{tmp_path}/text", *settings]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["num_tokens"], report["draws"]) == (rows, rows * length, draws)
    assert report["prior"] == report["reconstruction"] == 0
    for nats in (expected["nll"], expected["loss"].mean() / length, expected["our_nll"]):
        np.testing.assert_allclose(report["nats_per_token"], nats, rtol=0, atol=1e-5)


def test_each_draw_of_each_row_has_the_loss_of_the_authors(model, expected, scored):
    """In float32 the rounding of 1 - alpha, which is 3e-8 near t = 1, changes the weight by up to 3e-5 of itself."""
    _, terms = perplexity(model, scored, PROTOCOL, len(expected["t"]), int(expected["seed"]), progress=False)
    np.testing.assert_allclose(terms.diffusion.T, expected["loss"], rtol=5e-5)


def test_the_noisy_tokens_given_to_the_authors_are_those_of_the_seed(model, expected, scored):
    np.testing.assert_array_equal(scored.tokens, expected["x0"])  # the blocks of the authors' `_group_texts`
    seen = []

    def stats(x, sigma, x0):
        jax.debug.callback(lambda *noisy: seen.append(noisy), x, sigma, ordered=True)
        return ScoreStats(*[jnp.zeros(x.shape)] * 3)

    rows = jnp.arange(len(scored.tokens))
    keys = keyed_random.row_keys(keyed_random.root_key(int(expected["seed"])), rows)
    PROTOCOL.bound(model).draws(stats, keys, jnp.asarray(scored.tokens), len(expected["t"]), rows=rows)
    jax.effects_barrier()
    xt, sigma = map(np.stack, zip(*seen))
    np.testing.assert_array_equal(xt, expected["xt"])
    np.testing.assert_allclose(-np.expm1(-sigma) / (1 - 1e-3), expected["t"], rtol=1e-5)


class WithMask(predictions.DenoiserPrediction):
    """The logit of the mask left in the softmax."""

    def log_clean(self, logits, x, sigma):
        return jax.nn.log_softmax(logits)[..., : self.process.vocab_size]


@pytest.mark.parametrize("change", ["seed", "mask"])
def test_another_evaluation_is_noticed(model, expected, scored, monkeypatch, change):
    """Control: each change moves the number by more than a thousand times the tolerance."""
    seed = int(expected["seed"]) + (change == "seed")
    if change == "mask":
        monkeypatch.setitem(predictions.PREDICTIONS, "with mask", WithMask)
        model = dataclasses.replace(model, network=dataclasses.replace(model.network, prediction="with mask"))
    report, _ = perplexity(model, scored, PROTOCOL, len(expected["t"]), seed, progress=False)
    assert abs(report.nats_per_token - expected["nll"]) > 1e-2
