"""Checkpoints in the published format against every array that the authors' code computes from them (float32)."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import sedd
from sedd.config import build, from_dict

PARITY = Path(__file__).parent / "parity"


@pytest.fixture(scope="module", params=["absorb", "uniform"])
def published(request):
    """A model of random parameters, and the expected arrays."""
    folder = PARITY / request.param
    with np.load(folder / "expected.npz") as expected:
        return sedd.load(folder), dict(expected)


def close(found, expected, rtol):
    """Within rtol, plus 1e-6 of the position's largest entry."""
    slack = 1e-6 * np.abs(expected).max(axis=-1, keepdims=True)
    return np.all(np.abs(found - expected) <= rtol * np.abs(expected) + slack)


@pytest.mark.smoke
def test_log_score(published):
    """Every shape and formula of the network, from embedding to the head's shift."""
    model, expected = published
    np.testing.assert_allclose(model.log_score(expected["xt"], expected["sigma"]), expected["log_score"], atol=1e-4)


def test_schedule(published):
    model, expected = published
    np.testing.assert_allclose(model.schedule.sigma(expected["t"]), expected["sigma"], rtol=1e-5)
    np.testing.assert_allclose(model.schedule.rate(expected["t"]), expected["rate"], rtol=1e-5)


@pytest.mark.smoke
def test_score_entropy_and_loss(published):
    """From the model's own log score, through the three statistics."""
    model, expected = published
    x, x0, sigma = expected["xt"], expected["x0"], expected["sigma"]
    stats = sedd.score_stats(model.log_score(x, sigma), x, x0)
    entropy = model.process.score_entropy(stats, x, x0, sigma[:, None])
    np.testing.assert_allclose(entropy, expected["score_entropy"], rtol=1e-4)
    loss = jnp.sum(model.schedule.rate(expected["t"])[:, None] * entropy, axis=-1)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-4)


def test_network_stats_are_those_of_its_log_score(published):
    model, expected = published
    x, x0, sigma = expected["xt"], expected["x0"], np.clip(expected["sigma"], *model.network.sigma_range)
    dense = sedd.score_stats(model.log_score(x, sigma), x, x0)
    used = np.ones(x.shape, bool) if isinstance(model.process, sedd.Uniform) else x == model.process.mask_id
    for found, expected in zip(model.network.stats(model.params)(x, sigma, x0), dense):
        np.testing.assert_allclose(np.where(used, found, 0), np.where(used, expected, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.smoke
def test_euler(published):
    """The signed probabilities of a step with the unnormalised score: pi_x s_y dt for y != x, the rest at x."""
    model, expected = published
    x, process = expected["xt"], model.process
    score = np.exp(np.asarray(model.log_score(x, expected["sigma"])))
    here = np.arange(process.num_states) == x[..., None]
    if isinstance(process, sedd.Uniform):
        pi = 1 / process.num_states
    else:
        pi = (x == process.mask_id)[..., None]
    rate = np.where(here, 0, pi * score) * (expected["rate"] * expected["step"])[:, None, None]
    found = np.where(here, 1 - rate.sum(-1, keepdims=True), rate)
    assert close(found, expected["euler_probs"], 1e-4)


@pytest.mark.smoke
def test_tweedie(published):
    """exp(-dQ) s times exp(dQ) (SEDD, equation 19), signed: unnormalised scores give no distribution."""
    model, expected = published
    x, process = expected["xt"], model.process
    score = np.exp(np.asarray(model.log_score(x, expected["sigma"]), np.float64))
    here = np.arange(process.num_states) == x[..., None]
    step = (expected["sigma"].astype(np.float64) - expected["sigma_next"])[:, None, None]
    total, noise = score.sum(-1, keepdims=True), -np.expm1(-step)
    if isinstance(process, sedd.Uniform):
        back = score * np.exp(step) - np.expm1(step) / process.num_states * total
        through = here * np.exp(-step) + noise / process.num_states
    else:
        to_mask = np.arange(process.num_states) == process.mask_id
        back = score * np.exp(step) - np.expm1(step) * total * to_mask
        through = here * np.exp(-step) + noise * (x == process.mask_id)[..., None]
    found, early = back * through, expected["sigma"] < 1e-3
    assert close(found[~early], expected["tweedie_probs"][~early], 1e-4)
    assert close(found[early], expected["tweedie_probs"][early], 2e-3)
    if isinstance(process, sedd.Uniform):
        assert (expected["tweedie_probs"] < 0).sum() == 544  # the denoiser of samplers clips these


def test_denoiser_of_samplers_is_a_distribution(published):
    """It projects an unnormalised score to the simplex, also at noise levels beyond the training range."""
    model, expected = published
    x = np.full_like(expected["xt"], model.process.num_states - 1)
    for sigma in (0.0, 1e-6, 1.0, 30.0, np.inf):
        log_clean = model.denoiser()(x, jnp.full(len(x), sigma), None)
        assert log_clean.shape == (*x.shape, model.process.vocab_size)
        np.testing.assert_allclose(jnp.exp(log_clean).sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("width, layers, heads, count", [(768, 12, 12, 169_627_218), (1024, 24, 16, 424_477_010)])
def test_parameter_counts_of_the_published_models(width, layers, heads, count):
    """Embedding and head are stored padded; the count is that of the true vocabulary."""
    config = from_dict({"network": {"width": width, "layers": layers, "heads": heads, "prediction": "score"}})
    assert build(config, 50257)[2].num_parameters() == count


@pytest.mark.slow
def test_samples_of_a_model_without_tokenizer_have_tokens_only(published):
    model, _ = published
    drawn = model.sample(num_samples=2, steps=4)
    assert drawn.texts is None and drawn.tokens.shape == (2, model.block_length)
    assert drawn.tokens.min() >= 0 and drawn.tokens.max() < model.process.vocab_size


def test_damaged_or_missing_weights_are_refused(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(PARITY / "absorb", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(sedd.UserError, match="damaged"):
        sedd.load(folder)
    weights.unlink()
    with pytest.raises(sedd.UserError, match="there is no"):
        sedd.load(folder)


def test_a_missing_or_unknown_tensor_is_named(tmp_path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(PARITY / "absorb" / "model.safetensors")
    (tmp_path / "config.json").write_text((PARITY / "absorb" / "config.json").read_text())
    norm = tensors.pop("blocks.1.norm2.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(sedd.UserError, match="lacks blocks.1.norm2.weight"):
        sedd.load(tmp_path)
    save_file({**tensors, "blocks.1.norm2.weight": norm, "extra": norm}, tmp_path / "model.safetensors")
    with pytest.raises(sedd.UserError, match="extra"):
        sedd.load(tmp_path)


@pytest.mark.parametrize("setting", [("model", "hidden_size", 32), ("model", "cond_dim", 64), ("tokens", 300)])
def test_weights_of_another_size_than_in_the_config_are_refused(setting, tmp_path):
    """In one line that names the first parameter that does not fit."""
    shutil.copy(PARITY / "absorb" / "model.safetensors", tmp_path)
    config = json.loads((PARITY / "absorb" / "config.json").read_text())
    *groups, name, value = setting
    (config[groups[0]] if groups else config)[name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        sedd.UserError, match="does not fit its config.json: .* there, .* in the config's network"
    ) as caught:
        sedd.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_unsupported_scaling_is_refused(tmp_path):
    config = json.loads((PARITY / "uniform" / "config.json").read_text())
    config["model"]["scale_by_sigma"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(sedd.UserError, match="scale_by_sigma"):
        sedd.load(tmp_path)
