"""`sedd eval` of published checkpoints under the protocols of their papers, on the same noisy tokens.

Of MDLM against the authors' validation: drawn here from a seed, the noisy tokens were given to the authors' code, whose
losses are in `tests/published/mdlm/eval.npz`. Of BD3-LM and of an autoregressive model against the formulas of theirs.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import NETWORK, columns_with_mask, model_of

import sedd
from sedd import config as configs
from sedd.cli import main
from sedd.data.tokenizers import make_tokenizer
from sedd.diffusion import keyed_random
from sedd.diffusion.discrete.score import ScoreStats
from sedd.evaluation.perplexity import perplexity
from sedd.evaluation.protocols import get_protocol, scoring_rows
from sedd.network.token_network import TokenNetwork

MDLM, BD3LM = (Path(__file__).parent / "published" / name for name in ("mdlm", "bd3lm"))
LETTERS = " 01234567abcdefghijklmnopqrstuvwxyz"  # with an end of text the 36 tokens of the checkpoint
PROTOCOL, OF_BLOCKS = get_protocol("mdlm"), get_protocol("bd3lm")


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


def noisy_tokens(protocol, model, scored, num_draws, seed):
    """The noisy tokens of each draw of each row, Int[M N L], and their sigma, Float[M N] or Float[M N L]."""
    seen = []

    def stats(x, sigma, x0):
        jax.debug.callback(lambda *noisy: seen.append(noisy), x, sigma, ordered=True)
        return ScoreStats(*[jnp.zeros(x.shape)] * 3)

    rows, tokens = jnp.arange(len(scored.tokens)), jnp.asarray(scored.tokens)
    keys = keyed_random.row_keys(keyed_random.root_key(seed), rows)
    free = jnp.broadcast_to(jnp.arange(tokens.shape[1]) >= scored.given, tokens.shape)
    protocol.bound(model).draws(stats, keys, tokens, num_draws, free, rows=rows)
    jax.effects_barrier()
    return map(np.stack, zip(*seen))


def test_the_noisy_tokens_given_to_the_authors_are_those_of_the_seed(model, expected, scored):
    np.testing.assert_array_equal(scored.tokens, expected["x0"])  # the blocks of the authors' `_group_texts`
    xt, sigma = noisy_tokens(PROTOCOL, model, scored, len(expected["t"]), int(expected["seed"]))
    np.testing.assert_array_equal(xt, expected["xt"])
    np.testing.assert_allclose(-np.expm1(-sigma) / (1 - 1e-3), expected["t"], rtol=1e-5)


class WithMask(TokenNetwork):
    columns_of = columns_with_mask


@pytest.mark.parametrize("change", ["seed", "mask"])
def test_another_evaluation_is_noticed(model, expected, scored, change):
    """Control: each change moves the number by more than a thousand times the tolerance."""
    seed = int(expected["seed"]) + (change == "seed")
    if change == "mask":
        model = dataclasses.replace(model, network=WithMask(**vars(model.network)))
    report, _ = perplexity(model, scored, PROTOCOL, len(expected["t"]), seed, progress=False)
    assert abs(report.nats_per_token - expected["nll"]) > 1e-2


def test_blocks_have_the_loss_of_the_authors(expected, tmp_path, capsys):
    """-log p / t of each masked token given the clean blocks before its own, by the Denoiser; t of each block its own.

    The first token is given, and does not count. That the same log probabilities give the authors' own number for their
    noise is in `test_published.py`.
    """
    model = dataclasses.replace(sedd.load(BD3LM), tokenizer=make_tokenizer("characters", [LETTERS + "89.,"], True))
    model.save(tmp_path / "model", "bd3lm")
    text, num_draws, seed = str(expected["text"]), 2, 3
    (tmp_path / "text").write_text(text)
    flags = ["--protocol=bd3lm", f"--draws={num_draws}", f"--seed={seed}", "--json"]
    assert main(["eval", f"--model={tmp_path}/model", f"--source=lines:{tmp_path}/text", *flags]) == 0
    report = json.loads(capsys.readouterr().out)

    scored = scoring_rows(OF_BLOCKS, text.split("\n"), "validation", model)
    xt, sigma = noisy_tokens(OF_BLOCKS, model, scored, num_draws, seed)
    x0, block, mask = scored.tokens, np.arange(16) // 4, model.process.mask_id
    t = -np.expm1(-sigma) / (1 - 1e-6)
    assert np.all(xt[..., 0] == x0[:, 0]) and 1e-3 < t.min() < 0.02 and 0.98 < t.max() < 1 + 1e-6
    assert np.all(t == np.repeat(t[..., ::4], 4, axis=-1)) and np.unique(t).size == t.size / 4
    denoiser, nats = jax.jit(model.denoiser()), np.zeros(xt.shape)
    for number in range(4):
        x = np.where(block < number, x0, np.where(block == number, xt, mask)).reshape(-1, 16)
        log_clean = np.asarray(denoiser(x, jnp.ones(len(x)), None)).reshape(*xt.shape, -1)
        log_p = np.take_along_axis(log_clean, np.broadcast_to(x0, xt.shape)[..., None], axis=-1)[..., 0]
        nats += np.where((xt == mask) & (block == number), -log_p / t, 0)
    assert (report["rows"], report["num_tokens"]) == (len(x0), 15 * len(x0))
    np.testing.assert_allclose(report["nats_per_token"], nats.sum() / num_draws / (15 * len(x0)), rtol=1e-5)


def test_an_autoregressive_model_has_its_exact_likelihood_under_the_protocol(expected):
    """Of all tokens but the first, given those before: the same for any draws. By the Denoiser, token after token."""
    settings = ["network.block_size=1", "network.conditioning=constant", "data.block_length=16"]
    config, random = configs.override(configs.default(), [*NETWORK, *settings]), np.random.default_rng(0)

    def params(init):
        shapes = jax.eval_shape(init, jax.random.key(0))
        return jax.tree.map(lambda leaf: jnp.asarray(0.3 * random.normal(size=leaf.shape), jnp.float32), shapes)

    model = model_of(config, make_tokenizer("characters", [LETTERS], True), params)
    scored = scoring_rows(OF_BLOCKS, str(expected["text"]).split("\n")[:40], "validation", model)
    reports = [perplexity(model, scored, OF_BLOCKS, *noise, progress=False)[0] for noise in ((1, 0), (2, 7))]
    x0, denoiser = scored.tokens, jax.jit(model.denoiser())
    nats = 0.0
    for place in range(1, 16):
        x = np.where(np.arange(16) < place, x0, model.process.mask_id)
        log_clean = np.asarray(denoiser(x, jnp.ones(len(x)), None))[:, place]
        nats -= np.take_along_axis(log_clean, x0[:, place, None], axis=-1).sum(dtype=np.float64)
    assert nats / (15 * len(x0)) > 3.7  # of a uniform prediction: 3.58
    for report in reports:
        np.testing.assert_allclose(report.nats_per_token, nats / (15 * len(x0)), rtol=1e-6)
        assert report.num_tokens == 15 * len(x0) and "from left to right" in report.likelihood_of
