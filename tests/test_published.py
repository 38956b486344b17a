"""Published checkpoints of MDLM, Duo, UDLM, RADD and BD3-LM against what the authors' code computes (float32)."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small import columns_with_mask, write_files

import sedd
from sedd import config as configs
from sedd.cli import main
from sedd.codecs.tensor_table import tensors_from
from sedd.data.layout import Layout
from sedd.data.tokenizer_huggingface import gpt2_data
from sedd.diffusion import keyed_random
from sedd.diffusion.discrete.score import clean_stats
from sedd.model import Model
from sedd.network import block_network, layers, predictions, token_network, trunk
from sedd.network.token_network import TokenNetwork
from sedd.network.trunk import scanned, unrolled
from sedd.pretrained import FORMATS, format_of
from sedd.runtime.trees import named

PUBLISHED = Path(__file__).parent / "published"
FOLDERS = {name: PUBLISHED / name for name in ("mdlm", "duo", "udlm", "radd", "bd3lm")}
FOLDERS["sedd"] = Path(__file__).parent / "parity" / "absorb"
UNIFORM = ["process.name=uniform", "network.conditioning=sigma"]
CONSTANT = "network.conditioning=constant"
BERT = ["network.architecture=bert", "network.mask_token=7", "network.start_token=9"]
BLOCK_MASK = block_network.block_mask
GPT2 = {"hidden_dim": 768, "n_blocks": 12, "n_heads": 12, "cond_dim": 128, "dropout": 0.1}


@pytest.fixture(params=["mdlm", "duo", "udlm", "radd"])
def published(request):
    """The name of a format, its model and the arrays of the authors' code."""
    folder = PUBLISHED / request.param
    with np.load(folder / "expected.npz") as expected:
        return request.param, sedd.load(folder), dict(expected)


def total_noise(expected):
    """The noise of the noisy tokens, which MDLM and RADD do not tell the network."""
    return expected.get("sigma_t", expected["sigma"])


def log_clean(model, expected, network=None, params=None):
    network, params = network or model.network, params or model.params
    return np.asarray(network.denoiser(params)(expected["xt"], total_noise(expected), None))


def log_probs(model, expected):
    """What the authors' code makes of the logits of clean tokens, at the positions where it predicts them."""
    where = expected["xt"] == model.process.mask_id if "q_xs" in expected else np.ones(expected["xt"].shape, bool)
    return expected["log_probs"][..., : model.vocab_size], where[..., None]


@pytest.mark.parametrize("scan", [False, True])
def test_log_probabilities_are_those_of_the_authors(published, scan):
    _, model, expected = published
    theirs, where = log_probs(model, expected)
    network = dataclasses.replace(model.network, trunk=model.network.trunk.clone(scan=scan))
    ours = log_clean(model, expected, network, scanned(model.params) if scan else model.params)
    assert where.any() and np.abs(ours - theirs)[np.broadcast_to(where, ours.shape)].max() < 1e-4


def test_losses_are_those_of_the_authors(published):
    """The weighted loss of each token: the score entropy of the denoiser times the rate of the noise."""
    name, model, expected = published
    x, x0, sigma = expected["xt"], expected["x0"], total_noise(expected)
    rate = expected["dsigma"] if "dsigma" in expected else -expected["dalpha_t"] / expected["alpha_t"]
    if "loss_alpha_t" in expected:  # the loss of UDLM is that of a schedule without eps
        sigma, rate = -np.log(expected["loss_alpha_t"]), 1 / expected["loss_alpha_t"]
    stats = clean_stats(model.process, jnp.asarray(log_clean(model, expected)), x, x0, sigma[:, None])
    loss = rate[:, None] * model.process.score_entropy(stats, x, x0, sigma[:, None])
    theirs = expected["loss"]
    if name == "radd":  # d lambda of the corruption probability in the place of dt
        loss = loss / (np.exp(-sigma) * rate)[:, None]
    np.testing.assert_allclose(loss, theirs, rtol=2e-4, atol=1e-4)


def step_of(model, log_clean, expected):
    """The distribution of each token after a step of `tweedie` from t to s. Float[B L S]."""
    x, process = jnp.asarray(expected["xt"]), model.process
    if "alpha_s" in expected:
        levels = -np.log(expected["alpha_t"]), -np.log(expected["alpha_s"])
    else:
        levels = expected["sigma_t"], expected["sigma_s"]
    jump = process.tweedie(jnp.asarray(log_clean), x, *(level[:, None] for level in levels))
    to = jnp.pad(jax.nn.softmax(jump.log_dest), ((0, 0), (0, 0), (0, process.num_states - process.vocab_size)))
    here = jax.nn.one_hot(x, process.num_states)
    return np.asarray((1 - jump.p_move)[..., None] * here + jump.p_move[..., None] * to)


def test_steps_are_those_of_the_authors(published):
    name, model, expected = published
    ours = step_of(model, log_clean(model, expected), expected)
    if name in ("duo", "udlm"):
        theirs = expected["posterior"]
    elif name == "mdlm":
        theirs = expected["q_xs"] / expected["move_chance_t"][:, None, None]
    else:
        theirs = expected["tweedie_probs"]
    where = np.ones(ours.shape[:2], bool) if model.process.mask_id is None else expected["xt"] == model.process.mask_id
    np.testing.assert_allclose(ours[where], theirs[where], atol=1e-5)


@pytest.mark.parametrize("name", ["duo", "udlm"])
def test_the_output_of_uniform_models_is_no_posterior(name):
    """Control: with the own token's evidence taken out of it, as of a posterior, the steps are others."""
    model = sedd.load(PUBLISHED / name)
    with np.load(PUBLISHED / name / "expected.npz") as arrays:
        expected = dict(arrays)
    evidence = model.process.log_evidence(expected["xt"], expected["sigma"][:, None])
    converted = jax.nn.log_softmax(log_clean(model, expected) - evidence, axis=-1)
    assert np.abs(step_of(model, converted, expected) - expected["posterior"]).max() > 0.1


def interleaved(x, positions=None):
    """The rotary embedding with neighbouring coordinates paired instead of halves."""
    order = np.arange(x.shape[-1]).reshape(-1, 2).T.ravel()
    return layers.rotary(x[..., order], positions)[..., np.argsort(order)]


def with_mask(self, logits, x, sigma):
    """The log probabilities of clean tokens, with the mask's logit left in the softmax."""
    return jax.nn.log_softmax(logits)[..., : self.process.vocab_size]


def swapped_norm(*settings, **names):
    """A norm that takes the shift for the scale, and the scale for the shift."""
    norm = layers.Norm(*settings, **names)
    return lambda x, shift, scale: norm(x, scale, shift)


@pytest.mark.parametrize("change", ["rotary", "modulation", "mask"])
def test_a_wrong_network_is_noticed(published, monkeypatch, change):
    """Control: each change moves the log probabilities by more than a hundred times the tolerance."""
    name, model, expected = published
    if change == "rotary":
        monkeypatch.setattr(trunk, "rotary", interleaved)
    elif change == "modulation":  # scale, shift, gate
        monkeypatch.setattr(trunk, "Norm", swapped_norm)
    else:
        monkeypatch.setattr(predictions.DenoiserPrediction, "log_clean", with_mask)
    theirs, where = log_probs(model, expected)
    moved = np.abs(np.where(where, log_clean(model, expected) - theirs, 0)).max()
    unaffected = (change == "modulation" and name == "radd") or (change == "mask" and model.process.mask_id is None)
    assert moved < 1e-4 if unaffected else moved > 1e-2


@pytest.fixture(scope="module")
def of_blocks():
    """The model of BD3-LM, of blocks of 4 tokens, and the arrays of the authors' code."""
    with np.load(PUBLISHED / "bd3lm" / "expected.npz") as expected:
        return sedd.load(PUBLISHED / "bd3lm"), dict(expected)


def nats_of_blocks(model, expected, network=None, params=None):
    """-log p of each masked token given its noisy block and the clean blocks before it, by the StatsFn. Float[B L]."""
    network, params = network or model.network, params or model.params
    x, sigma = expected["xt"], jnp.ones(len(expected["xt"]))  # any: the network is not conditioned on it
    stats = jax.jit(network.stats(params))(x, sigma, expected["x0"])
    return np.asarray(model.process.cross_entropy(stats, x, sigma[:, None]))


def expected_nats(expected):
    return -np.take_along_axis(expected["log_probs"], expected["x0"][..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("scan", [False, True])
def test_log_probabilities_of_all_blocks_are_those_of_the_authors(of_blocks, scan):
    """Of [xt, x0], the input of their validation; the logits before anything is done to them, that of the mask too."""
    model, expected = of_blocks
    network = dataclasses.replace(model.network, trunk=model.network.trunk.clone(scan=scan))
    params = scanned(model.params) if scan else model.params

    @jax.jit
    def logits_of(params):
        hidden, condition = network.hidden(params, expected["xt"], expected["sigma"], context=expected["x0"])
        return network.logits(params, hidden, condition[:, None])

    logits = np.asarray(logits_of(params))
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)
    masked = expected["xt"] == model.process.mask_id
    ours = predictions.DenoiserPrediction(model.process).log_clean(logits, expected["xt"], expected["sigma"])
    np.testing.assert_allclose(ours[masked], expected["log_probs"][masked][:, :40], rtol=0, atol=1e-4)
    np.testing.assert_allclose(
        nats_of_blocks(model, expected, network, params), expected_nats(expected), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("num_layers", [1, 2])
def test_hidden_states_of_noisy_tokens_are_those_of_the_authors(of_blocks, num_layers):
    """After each layer. They are as large as 105, so that float32 errs by 2e-4."""
    model, expected = of_blocks
    network = dataclasses.replace(model.network, trunk=model.network.trunk.clone(layers=num_layers))
    run = jax.jit(lambda params: network.hidden(params, expected["xt"], expected["sigma"], context=expected["x0"])[0])
    np.testing.assert_allclose(run(model.params), expected["hidden"][num_layers - 1][:, :16], rtol=0, atol=5e-4)


def test_a_denoiser_predicts_the_first_block_that_has_masks(of_blocks):
    """Given the clean blocks before it, as the authors sample; all is masked after it. Also at the positions alone."""
    model, expected = of_blocks
    mask, block, number = model.process.mask_id, np.arange(16) // 4, np.arange(4)[:, None, None]
    x = np.where(block < number, expected["x0"], np.where(block == number, expected["xt"], mask)).reshape(12, 16)
    positions = np.tile(4 * number + np.arange(4), (1, 3, 1)).reshape(12, 4)
    theirs = np.concatenate([expected[f"sample_logits_{number}"] for number in range(4)])
    theirs = np.asarray(jax.nn.log_softmax(theirs[..., :40]))
    masked = np.take_along_axis(x, positions, axis=1) == mask
    denoiser, sigma = jax.jit(model.denoiser()), jnp.ones(12)
    whole = np.asarray(denoiser(x, sigma, None))
    for ours in (np.take_along_axis(whole, positions[..., None], axis=1), denoiser(x, sigma, positions)):
        np.testing.assert_allclose(np.asarray(ours)[masked], theirs[masked], rtol=0, atol=1e-4)
    assert all(masked.reshape(4, 12).any(axis=1))


def test_losses_of_blocks_are_those_of_the_authors(of_blocks):
    """Of each token, -log p / t; of each row without its first token; and per token, the number of their validation."""
    model, expected = of_blocks
    loss = nats_of_blocks(model, expected) / expected["t"]
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5, atol=1e-4)
    of_rows = (loss * expected["token_mask"]).sum(axis=1)
    np.testing.assert_allclose(of_rows, expected["row_loss"], rtol=1e-5)
    np.testing.assert_allclose(of_rows.sum() / expected["token_mask"].sum(), expected["nll"], rtol=1e-5)


def own_clean_block(positions, noisy, size):
    """A mask with which noisy tokens also see the clean tokens of their own block."""
    block = positions // size
    return BLOCK_MASK(positions, noisy, size) | (~noisy & (block[:, :, None] >= block[:, None]))


def causal_context(positions, noisy, size):
    """A mask with which a clean token does not see the later ones of its block."""
    later = positions[:, :, None] < positions[:, None]
    return BLOCK_MASK(positions, noisy, size) & ~(later & ~noisy[:, None] & ~noisy)


@pytest.mark.parametrize("change", ["rotary", "positions", "leak", "causal", "modulation", "mask"])
def test_a_wrong_network_of_blocks_is_noticed(of_blocks, monkeypatch, change):
    """Control: each change moves the log probabilities by more than a hundred times the tolerance."""
    model, expected = of_blocks
    if change == "rotary":
        monkeypatch.setattr(trunk, "rotary", interleaved)
    elif change == "positions":  # of the clean tokens after those of the noisy ones
        monkeypatch.setattr(trunk, "rotary", lambda x, positions: layers.rotary(x))
    elif change == "modulation":  # scale, shift, gate
        monkeypatch.setattr(trunk, "Norm", swapped_norm)
    elif change == "mask":
        monkeypatch.setattr(token_network.TokenNetwork, "columns_of", columns_with_mask)
    else:
        monkeypatch.setattr(block_network, "block_mask", own_clean_block if change == "leak" else causal_context)
    assert np.abs(nats_of_blocks(model, expected) - expected_nats(expected)).max() > 1e-2


@pytest.mark.parametrize("name", ["mdlm", "radd"])
def test_models_that_are_not_conditioned_on_noise(name):
    """Their answers are the same at any noise, also those of the log score, which does not clip it."""
    model = sedd.load(PUBLISHED / name)
    x = jnp.full((3, 16), model.process.mask_id).at[:, ::3].set(5)
    sigma = jnp.array([0.0, 0.3, 40.0])
    found = np.asarray(model.denoiser()(x, sigma, None))
    np.testing.assert_array_equal(found[1:], found[:1].repeat(2, 0))
    ratios = model.log_score(x, jnp.array([0.1, 0.3, 5.0]))[:, 1, :36]
    np.testing.assert_allclose(np.diff(ratios - ratios[:, :1], axis=0), 0, atol=1e-5)


@pytest.mark.parametrize(
    "about, count",
    [
        ({"model_type": "mdlm", "vocab_size": 50258, "model_length": 1024, **GPT2}, 169_627_218),
        (
            {"model_type": "bd3lm", "vocab_size": 50258, "model_length": 1024, "block_size": 4, **GPT2},
            169_627_218,
        ),
        ({"architectures": ["DUO"], "vocab_size": 50258, "model_length": 1024, **GPT2}, 169_627_218),
        ({"model_type": "udlm", "vocab_size": 30522, "model_length": 128, "cfg": False, **GPT2}, 139_292_986),
        (
            {
                "tokens": 50257,
                "model": {"type": "ddit_wot", "hidden_size": 768, "n_blocks": 12, "n_heads": 12, "length": 1024}
                | {"dropout": 0.02, "cond_dim": 128},
                "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20},
                "training": {"ema": 0.9999},
            },
            162_265_682,
        ),
    ],
)
def test_parameter_counts_are_those_of_the_published_models(about, count):
    config = format_of(about).config(about, Path())
    assert configs.build(config, config.data.vocab_size)[2].num_parameters() == count


@pytest.mark.parametrize("name", FOLDERS)
def test_written_checkpoints_equal_those_that_were_read(tmp_path, name):
    """Bit by bit, and with all that their config.json says of the network."""
    sedd.load(FOLDERS[name]).save(tmp_path / "out", name)
    before, after = (load_file(folder / "model.safetensors") for folder in (FOLDERS[name], tmp_path / "out"))
    assert before.keys() == after.keys()
    for tensor, array in before.items():
        assert after[tensor].dtype == array.dtype
        np.testing.assert_array_equal(after[tensor], array)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (FOLDERS[name], tmp_path / "out"))
    unread = {"model": {"name", "dtype", "cond_dim"} - ({"cond_dim"} if name == "sedd" else set())}
    for key in set(before) - {"training", "ngpus", "sampling"} if "model" in before else set(before) & set(after):
        if key in after and isinstance(before[key], dict):
            names = set(before[key]) - unread.get(key, set())
            assert {one: before[key][one] for one in names} == {one: after[key].get(one) for one in names}
        elif key in after:
            assert before[key] == after[key]


def random_model(*settings, vocab_size=36):
    """A model of random parameters, each of them different from zero."""
    config = configs.override(configs.default(), ["network.width=32", "network.heads=2", "network.layers=2", *settings])
    _, schedule, network = configs.build(config, vocab_size)
    leaves, tree = jax.tree.flatten(network.init(keyed_random.root_key(0)))
    rng = np.random.default_rng(0)
    params = tree.unflatten([leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])
    parts = dict(tokenizer=None, layout=Layout(), block_length=config.data.block_length)
    return Model(config=config, network=network, params=params, schedule=schedule, **parts)


@pytest.mark.parametrize(
    "name, settings",
    [
        ("mdlm", [CONSTANT, "network.scan=true"]),
        ("mdlm", ["training.min_time=1e-3"]),  # conditioned on the noise
        ("bd3lm", [CONSTANT, "network.block_size=4", "network.scan=true"]),
        ("bd3lm", [CONSTANT]),
        ("radd", [CONSTANT, "network.cond_dim=0", "network.scan=true"]),
        ("duo", [*UNIFORM, "network.prediction=denoiser"]),
        ("udlm", [*UNIFORM, "network.prediction=denoiser", "network.scan=true"]),
        ("sedd", ["network.prediction=score", "training.noise_sampling=time", "schedule.name=geometric"]),
        ("sedd", [*UNIFORM, "network.prediction=score", "training.loss=bound", "network.scan=true"]),
        ("masked_lm", [*BERT, "network.dropout=0.2"]),
        ("masked_lm", [*BERT, "network.architecture=roberta", "data.block_length=511"]),
    ],
)
def test_models_trained_here_are_the_same_in_published_formats(tmp_path, name, settings):
    """The same parameters, with unrolled layers, of the same network, whose meaning and noise are the same."""
    model = random_model(*settings)
    model.save(tmp_path / "out", name)
    again = sedd.load(tmp_path / "out")
    table = FORMATS[name].table(again.network)  # without the padding of the vocabulary
    theirs, ours = (tensors_from(named(unrolled(one.params)), table) for one in (again, model))
    assert all(np.array_equal(theirs[tensor], ours[tensor]) for tensor in ours)
    unscanned = {"scan": False} if "network.scan=true" in settings else {}
    network = dataclasses.replace(model.network, trunk=model.network.trunk.clone(**unscanned))
    assert again.network == network and again.schedule == model.schedule
    assert (again.block_length, again.vocab_size) == (model.block_length, model.vocab_size)


@pytest.mark.parametrize(
    "name, settings, words",
    [
        ("mdlm", ["network.prediction=score"], "cannot hold network.prediction=score"),
        ("mdlm", ["process.name=uniform"], "cannot hold process.name=uniform"),
        ("mdlm", ["schedule.name=geometric"], "cannot hold schedule=Geometric"),
        ("mdlm", ["network.conditioning=log_snr"], "cannot hold network.conditioning=log_snr"),
        ("duo", ["process.name=uniform"], "cannot hold network.conditioning=log_snr"),
        ("mdlm", [CONSTANT, "network.block_size=4"], "cannot hold network.block_size=4; its models have 0"),
        ("mdlm", [CONSTANT, "network.block_size=1"], "cannot hold network.block_size=1; its models have 0"),
        ("bd3lm", [CONSTANT, "network.block_size=1"], "block_size=1"),
        ("bd3lm", [CONSTANT, "network.block_size=4", "schedule.name=geometric"], "cannot hold schedule=Geometric"),
        ("radd", [], "cannot hold network.cond_dim=128; its models have 0"),
        (
            "radd",
            [CONSTANT, "network.block_size=4", "network.cond_dim=0"],
            "cannot hold network.block_size=4; its models have 0",
        ),
        ("sedd", [], "cannot hold network.prediction=denoiser; its models have score"),
        ("sedd", [CONSTANT, "network.block_size=4"], "cannot hold network.block_size=4; its models have 0"),
        ("sedd", ["network.prediction=score", "network.long_skips=true"], "cannot hold network.long_skips=True"),
        ("masked_lm", [], "cannot hold network.architecture=dit; its models have bert or roberta"),
        ("masked_lm", [*BERT, "schedule.eps=1e-2"], "cannot hold schedule=LogLinear"),
        ("mdlm", BERT, "cannot hold network.architecture=bert; its models have dit"),
        ("gpt2", [], "there is no format gpt2; choose one of"),
    ],
)
def test_what_a_format_cannot_hold_is_one_line(tmp_path, name, settings, words):
    with pytest.raises(sedd.UserError, match=words) as caught:
        random_model(*settings).save(tmp_path / "out", name)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_padded_documents_with_their_lengths_are_in_no_published_format(tmp_path):
    model = dataclasses.replace(random_model(), layout=Layout("padded", "ignored", (0, 1)))
    with pytest.raises(sedd.UserError, match="cannot hold a model of padded documents"):
        model.save(tmp_path / "out", "mdlm")


@pytest.mark.parametrize(
    "name, refused",
    [("mdlm", "network.conditioning=constant; its models have sigma"), ("bd3lm", "network.block_size=4;")],
)
def test_the_command_converts(tmp_path, capsys, name, refused):
    assert main(["convert", f"--model={PUBLISHED}/{name}", "--to=export", f"--out={tmp_path}/export"]) == 0
    assert main(["convert", f"--model={tmp_path}/export", f"--to={name}", f"--out={tmp_path}/{name}"]) == 0
    before, after = (load_file(folder / name / "model.safetensors") for folder in (PUBLISHED, tmp_path))
    assert all(np.array_equal(after[tensor], before[tensor]) for tensor in before)
    assert f"in the format {name}" in capsys.readouterr().out
    assert main(["convert", f"--model={tmp_path}/export", "--to=sedd", f"--out={tmp_path}/sedd"]) == 2
    assert f"cannot hold {refused}" in capsys.readouterr().err


@pytest.fixture(params=["mdlm", "radd", "bd3lm"])
def folder(request, tmp_path):
    """A copy of a checkpoint, to be changed."""
    return Path(shutil.copytree(PUBLISHED / request.param, tmp_path / "model"))


def refused(folder, words):
    with pytest.raises(sedd.UserError, match=words) as caught:
        sedd.load(folder)
    assert "\n" not in str(caught.value)


def test_damaged_tensors_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("blocks.1.attn_qkv.weight"))

    def changed(array, words):
        save_file({**tensors, name: array}, folder / "model.safetensors")
        refused(folder, words)

    changed(tensors[name].astype(np.int32), f"{name} of the checkpoint has the type int32")
    changed(tensors[name][:-1], "attn_qkv.weight")
    changed(tensors[name][0], "attn_qkv.weight")
    changed(np.concatenate([tensors[name]] * 2), "qkv/kernel")
    save_file({key: array for key, array in tensors.items() if key != name}, folder / "model.safetensors")
    refused(folder, f"lacks {name}")
    save_file({**tensors, "lora.weight": tensors[name]}, folder / "model.safetensors")
    refused(folder, "does not have: .*lora.weight")
    constant = next(key for key in tensors if key.endswith("inv_freq"))
    save_file({**tensors, constant: 2 * tensors[constant]}, folder / "model.safetensors")
    refused(folder, "inv_freq is not that of 2 heads and the base 10000")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hidden_dim": 64}, "does not fit its config.json"),
        ({"n_heads": 4}, "inv_freq is not that of 4 heads"),
        ({"hidden_dim": "32"}, "network.width must be of type int"),
        ({"n_blocks": 3}, "lacks backbone.blocks.2"),
        ({"n_blocks": 10**7}, "has 10000000 layers, and model.safetensors 31 tensors"),
        ({"n_blocks": -1}, "must be positive"),
        ({"n_heads": 3}, "multiple of twice network.heads"),
        ({"vocab_size": 50258}, "does not fit its config.json"),
        ({"model_type": "duo", "architectures": ["DUO"]}, None),
        ({"cond_dim": None}, "network.cond_dim must be of type int"),
    ],
)
def test_settings_that_do_not_fit_the_tensors_are_refused(tmp_path, change, words):
    folder = Path(shutil.copytree(PUBLISHED / "mdlm", tmp_path / "model"))
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | change))
    if words is None:  # the same tensors with another meaning
        assert sedd.load(folder).process == sedd.Uniform(37)
    else:
        refused(folder, words)
    del about["hidden_dim"]
    (folder / "config.json").write_text(json.dumps(about))
    refused(folder, "config.json lacks hidden_dim, which the format mdlm has")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"block_size": 1}, "block_size=1 of bd3lm is not supported, only blocks of several tokens"),
        ({"block_size": 5}, "block_size=5 must divide data.block_length=16"),
        ({"block_size": 32}, "block_size=32 must divide data.block_length=16"),
        ({"cross_attn": False}, "cross_attn=False of bd3lm is not supported"),
        ({"causal": True}, "causal=True of bd3lm is not supported"),
        ({"time_conditioning": True}, "needs network.conditioning=constant"),
        ({"block_size": None}, "network.block_size must be of type int"),
    ],
)
def test_blocks_that_are_not_supported_are_refused(tmp_path, change, words):
    folder = Path(shutil.copytree(PUBLISHED / "bd3lm", tmp_path / "model"))
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | change))
    refused(folder, words)
    del about["block_size"]
    (folder / "config.json").write_text(json.dumps(about))
    refused(folder, "config.json lacks block_size, which the format bd3lm has")


def test_limits_of_the_times_of_training_may_have_any_value(tmp_path):
    """A search keeps adjusting them in training; nothing here depends on them. Control: a size of blocks counts."""
    folder = Path(shutil.copytree(PUBLISHED / "bd3lm", tmp_path / "model"))
    about, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    limits = {"sampling_eps_min": 0.3, "sampling_eps_max": 0.8}
    (folder / "config.json").write_text(json.dumps(about | limits))
    tensors |= {name: np.array(limit, np.float32) for name, limit in limits.items()}
    save_file(tensors, folder / "model.safetensors")
    model, again = sedd.load(PUBLISHED / "bd3lm"), sedd.load(folder)
    assert again.network == model.network and again.schedule == model.schedule
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    (folder / "config.json").write_text(json.dumps(about | {"block_size": 8}))
    assert sedd.load(folder).network == dataclasses.replace(model.network, block_size=8)


def test_one_block_a_row_is_plain_diffusion(tmp_path):
    """The model is the same, written as BD3-LM and as MDLM, but for what `block_size` says."""
    for name in ("bd3lm", "mdlm"):
        random_model(CONSTANT).save(tmp_path / name, name)
    about = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in ("bd3lm", "mdlm")}
    assert about["bd3lm"]["block_size"] == about["bd3lm"]["model_length"] and "block_size" not in about["mdlm"]
    blocks, mdlm = sedd.load(tmp_path / "bd3lm"), sedd.load(tmp_path / "mdlm")
    assert type(blocks.network) is TokenNetwork and blocks.network == mdlm.network
    assert (blocks.config.network.block_size, blocks.network.block_of_generation) == (0, None)
    jax.tree.map(np.testing.assert_array_equal, blocks.params, mdlm.params)


def test_a_model_of_blocks_is_described(capsys):
    assert main(["info", f"{PUBLISHED}/bd3lm", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["model"]["format"], facts["network"]["block_size"], facts["verified"]) == ("bd3lm", 4, True)


def test_a_model_of_blocks_continues_a_prefix(of_blocks):
    """By one token a call. A prefix may end within a block; what comes before given tokens is one line."""
    model, expected = of_blocks
    given = np.arange(16) < [[6], [12]]
    out = model.infill(tokens=expected["x0"][:2], given=given, sampler="first_hitting")
    assert out.network_calls == 10 and out.tokens.max() < 40
    np.testing.assert_array_equal(out.tokens[given], expected["x0"][:2][given])
    with pytest.raises(sedd.UserError, match="give a prefix only, or take a model with network.block_size=0"):
        model.infill(tokens=expected["x0"], given=np.tile(np.arange(16) > 3, (3, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("block_size, settings", [(4, []), (8, ["network.block_size=8"])])
def test_a_run_starts_from_a_model_of_blocks(tmp_path, capsys, block_size, settings):
    """Without --config its blocks are those of the model. A size of its own is another model with the same weights."""
    vocab_size = gpt2(tmp_path / "gpt2")
    source = write_files(tmp_path / "texts", [f"the cat sat on the mat {number} times" for number in range(60)])
    corpus = sedd.prepare(source, f"gpt2:{tmp_path}/gpt2", tmp_path / "corpus")
    random_model(CONSTANT, "network.block_size=4", vocab_size=vocab_size).save(tmp_path / "model", "bd3lm")
    settings = [*settings, f"data.corpus={corpus.path}", "training.steps=1", "training.batch_size=8"]
    settings += ["optimizer.name=adamw", "optimizer.learning_rate=1e-9", "evaluation.draws=2"]
    flags = [f"--config.{setting}" for setting in settings]
    assert main(["train", f"--init_from={tmp_path}/model", f"--workdir={tmp_path}/run", *flags]) == 0
    before, after = sedd.load(tmp_path / "model"), sedd.load(tmp_path / "run")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.params, before.params)
    assert after.network.block_size == block_size
    after.save(tmp_path / "out", "bd3lm")
    assert json.loads((tmp_path / "out/config.json").read_text())["block_size"] == block_size
    assert main(["sample", f"--model={tmp_path}/out", "--steps=2", "--length=40", "--stride=8", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"]) == 40
    assert main(["infill", f"--model={tmp_path}/out", "--prefix=the cat", "--length=16", "--steps=2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("the cat")


def test_classifier_free_guidance_of_udlm_is_refused(tmp_path):
    folder = Path(shutil.copytree(PUBLISHED / "udlm", tmp_path / "model"))
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"cfg": True}))
    refused(folder, "cfg=True of udlm is not supported")


def gpt2(folder):
    """Writes a tokenizer with GPT-2's files: the bytes, two merges and the end of a text. Returns its size."""
    folder.mkdir(parents=True)
    letters = [chr(byte) for byte in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    letters += [chr(256 + number) for number in range(256 - len(letters))]
    vocabulary = {text: number for number, text in enumerate([*letters, "th", "the", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    return len(vocabulary)


@pytest.mark.parametrize("name, more", [("mdlm", 0), ("duo", 1)])
def test_the_tokenizer_of_published_models_is_found_in_the_cache_of_the_hub(tmp_path, monkeypatch, name, more):
    """Without --tokenizer; Duo adds [PAD] to it. One that does not fit the model is left out, a given one is taken."""
    vocab_size = gpt2(tmp_path / "gpt2")
    cache = tmp_path / "hub/models--openai-community--gpt2"
    (cache / "snapshots/1").mkdir(parents=True)
    (cache / "snapshots/1/tokenizer.json").write_bytes(gpt2_data(tmp_path / "gpt2"))
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("1")
    settings = [*UNIFORM, "network.prediction=denoiser"] if more else []
    random_model(*settings, vocab_size=vocab_size + more).save(tmp_path / "model", name)
    assert sedd.load(tmp_path / "model").tokenizer is None
    given = sedd.load(tmp_path / "model", tokenizer=f"gpt2:{tmp_path}/gpt2").tokenizer
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    found = sedd.load(tmp_path / "model").tokenizer
    assert found.vocab_size == vocab_size + more and found.end_of_text == vocab_size - 1
    assert found.decode(found.encode("the cat")) == "the cat" and len(found.encode("the")) == 1
    assert found.fingerprint == given.fingerprint
    assert sedd.load(PUBLISHED / name).tokenizer is None
    again = sedd.load(tmp_path / "model", tokenizer=f"gpt2:{tmp_path}/gpt2").tokenizer
    assert again.fingerprint == given.fingerprint


@pytest.mark.slow
def test_the_page_from_a_name_to_text_and_back(tmp_path, monkeypatch, capsys):
    """Each command of docs/published.md, at a smaller size; the name is that of a folder of random weights."""
    monkeypatch.chdir(tmp_path)
    vocab_size = gpt2(tmp_path / "data/gpt2")
    write_files(
        tmp_path / "data/mine", [f"the cat sat on the mat {number} times, and then it slept" for number in range(60)]
    )
    name = "kuleshov-group/mdlm-owt"
    random_model(CONSTANT, vocab_size=vocab_size).save(tmp_path / name, "mdlm")
    page = (Path(__file__).parent.parent / "docs/published.md").read_text()
    block = page.split("```")[1].strip().replace("\\\n", "")
    printed = {}
    for line in block.splitlines():
        words = [word for word in shlex.split(line) if not word.startswith("--steps")]
        if words[1] == "train":
            words += ["--config.training.steps=2", "--config.training.batch_size=8"]
        assert main(words[1:]) == 0
        printed[words[1]] = capsys.readouterr().out
    assert set(printed) == {"info", "sample", "infill", "eval", "prepare", "train", "convert"}
    assert printed["infill"].count(" sat on the ") == 1 and "tuned-mdlm" in printed["convert"]
    tuned, run = sedd.load("tuned-mdlm"), sedd.load("runs/tuned")
    jax.tree.map(np.testing.assert_array_equal, tuned.params, run.params)
    assert tuned.tokenizer.fingerprint == run.tokenizer.fingerprint
