"""Published masked language models as networks of the absorbing process, against the published implementation."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small import unusual_jax_settings, write_files

import sedd
from sedd import config as configs
from sedd.cli import main
from sedd.diffusion import keyed_random
from sedd.pretrained import FORMATS
from sedd.pretrained.format import check_holds

ENCODERS = Path(__file__).parent / "encoders"
LENGTH = 12


@pytest.fixture(scope="module", params=["bert", "roberta"])
def published(request):
    """A model of random parameters with short rows, and the expected arrays."""
    model = sedd.load(ENCODERS / request.param)
    with np.load(ENCODERS / request.param / "expected.npz") as expected:
        return dataclasses.replace(model, block_length=LENGTH), dict(expected)


@pytest.fixture(scope="module")
def bert():
    """The first of these models alone."""
    return dataclasses.replace(sedd.load(ENCODERS / "bert"), block_length=LENGTH)


def rows(model, expected):
    """The rows without their start token: with masks as states, their lengths, where they are valid, and log r."""
    tokens, valid, log_clean = (expected[name][:, 1:] for name in ("tokens", "valid", "log_clean"))
    mask = model.network.mask_token
    others = np.arange(model.vocab_size) != mask
    log_clean = log_clean - np.log(np.exp(log_clean[..., others]).sum(-1, keepdims=True))
    return np.where(tokens == mask, model.process.mask_id, tokens), valid.sum(-1), valid, log_clean


def log_clean_of(model):
    """Its Denoiser as a compiled function of the states, their noise and their lengths."""
    return jax.jit(lambda x, sigma, lengths: model.denoiser(lengths=lengths)(x, sigma, None))


def error(found, expected, model, where):
    """The largest error over the tokens that a text can have."""
    others = np.arange(model.vocab_size) != model.network.mask_token
    return np.abs(np.where(where[..., None] & others, found - expected, 0)).max()


@pytest.mark.smoke
def test_log_probabilities_are_those_of_the_published_implementation(published):
    """Without the mask token, which the published distributions include. Control: rows that are shifted by one."""
    model, expected = published
    x, lengths, valid, log_clean = rows(model, expected)
    denoise, sigma = log_clean_of(model), np.full(len(x), 0.5, np.float32)
    found = denoise(x, sigma, lengths)
    assert np.any(x == model.process.mask_id) and error(found, log_clean, model, valid) < 1e-5
    shifted = denoise(expected["tokens"], sigma, lengths + 1)
    assert error(shifted[:, 1:], log_clean, model, valid) > 0.1


def test_the_denoiser_is_a_distribution_without_the_mask_token_at_any_noise(published):
    model, expected = published
    x, lengths, valid, _ = rows(model, expected)
    denoise = log_clean_of(model)
    all_noise = [
        np.asarray(denoise(x, np.full(len(x), sigma, np.float32), lengths)) for sigma in (0.0, 1e-3, 1.0, np.inf)
    ]
    probabilities = np.exp(all_noise[0])
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)
    assert not probabilities[..., model.network.mask_token].any() and np.isfinite(all_noise[0]).all()
    assert all(np.array_equal(one[valid], all_noise[0][valid]) for one in all_noise)


@pytest.mark.slow
def test_log_probabilities_are_the_same_under_unusual_settings(published):
    model, expected = published
    x, lengths, valid, log_clean = rows(model, expected)
    with unusual_jax_settings():
        found = model.denoiser(lengths=lengths)(x, np.full(len(x), 0.5, np.float32))
    assert error(found, log_clean, model, valid) < 1e-5


@pytest.mark.parametrize("kind, settings, count", [
    ("bert", {"vocab_size": 30522}, 109_514_298),
    ("roberta", {"vocab_size": 50265}, 124_697_433),
])  # fmt: skip
def test_parameter_counts_of_the_published_models(kind, settings, count):
    """Those of bert-base-uncased and roberta-base with their heads, whose special tokens are the defaults."""
    sizes = {"architecture": kind, "width": 768, "layers": 12, "heads": 12}
    network = configs.build(configs.from_dict({"network": sizes, "data": settings}), settings["vocab_size"])[2]
    assert network.num_parameters() == count
    inside = network.num_parameters() - network.outer_parameters
    assert 85e6 < inside < 87e6


@pytest.mark.slow
def test_samples_and_infilling_have_no_mask_token(bert):
    drawn = bert.sample(num_samples=3, steps=2)
    assert drawn.tokens.shape == (3, LENGTH) and drawn.texts is not None
    assert drawn.tokens.max() < bert.vocab_size and not np.any(drawn.tokens == bert.network.mask_token)
    filled = bert.infill("the cat <blank:2> bad", steps=2)
    assert filled.texts[0].startswith("the cat") and filled.texts[0].endswith("bad")
    assert not np.any(filled.tokens == bert.network.mask_token)


@pytest.mark.slow
def test_the_bound_of_a_text_of_one_token_is_its_log_probability(bert):
    """In a row that is masked, the positions after it too."""
    (token,) = bert.tokenizer.encode("cat")
    log_clean = bert.denoiser()(np.full((1, LENGTH), bert.process.mask_id), np.ones(1, np.float32))
    report = bert.perplexity(["cat"], draws=2, progress=False)
    np.testing.assert_allclose(report.nats_per_token, -log_clean[0, 0, token], rtol=1e-5)


@pytest.mark.slow
def test_gradients_are_finite_and_dropout_depends_on_the_key_alone(bert):
    """With remat too. Control: another key, and no dropout, give other losses."""
    tokens = np.random.default_rng(0).integers(5, 18, (4, LENGTH)).astype(np.int32)
    keys = keyed_random.row_keys(jax.random.key(1), np.arange(4))

    def loss(params, keys, remat="none", rate=0.3):
        network = dataclasses.replace(bert.network, trunk=bert.network.trunk.clone(remat=remat, dropout=rate))
        x = np.where(np.arange(LENGTH) % 3 == 0, network.process.mask_id, tokens)
        stats = network.stats(params, keys)(x, np.ones(4, np.float32), tokens)
        return jax.numpy.sum((stats.log_sum - stats.target) * (x != tokens))

    value, gradient = jax.jit(jax.value_and_grad(loss))(bert.params, keys)
    again, other = jax.jit(jax.value_and_grad(lambda params: loss(params, keys, "dots")))(bert.params)
    np.testing.assert_allclose(again, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), other, gradient)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert abs(loss(bert.params, keys[::-1]) - value) > 1e-3 and abs(loss(bert.params, None) - value) > 1e-3


@pytest.mark.slow
def test_a_run_starts_from_a_published_folder(tmp_path, capsys):
    """By the command line: a step of the default recipe, its network. The run and its export are loaded again."""
    folder, rng = ENCODERS / "roberta", np.random.default_rng(0)
    texts = ["".join("abcdefgh"[letter] for letter in rng.integers(8, size=60)) for _ in range(40)]
    tokenizer = f"huggingface:{folder / 'tokenizer.json'}"
    corpus = sedd.prepare(write_files(tmp_path / "texts", texts), tokenizer, tmp_path / "corpus")
    published = sedd.load(folder)
    flags = [f"--config.data.corpus={corpus.path}", "--config.data.block_length=8", "--config.training.batch_size=8"]
    flags += ["--config.training.steps=1", "--config.optimizer.name=adamw", "--config.optimizer.learning_rate=1e-5"]
    assert main(["train", f"--workdir={tmp_path}/run", f"--init_from={folder}", *flags]) == 0
    trained = sedd.load(tmp_path / "run")
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), trained.params, published.params)
    assert 0 < max(jax.tree.leaves(moved)) < 1e-4 and trained.network.trunk.dropout == 0.1
    trained.save(tmp_path / "exported")
    jax.tree.map(np.testing.assert_array_equal, sedd.load(tmp_path / "exported").params, trained.params)
    assert main(["convert", f"--model={tmp_path}/run", "--to=masked_lm", f"--out={tmp_path}/written"]) == 0
    written = sedd.load(tmp_path / "written")
    jax.tree.map(np.testing.assert_array_equal, written.params, trained.params)
    assert written.network == trained.network and written.block_length == 8
    assert written.tokenizer.fingerprint == trained.tokenizer.fingerprint
    wide = ["--config.network.width=16", *flags]
    assert main(["train", f"--workdir={tmp_path}/wide", f"--init_from={folder}", *wide]) == 2
    assert "cannot start this run" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_written_folder_equals_the_one_that_was_read(tmp_path, kind):
    """By the command line: each tensor, bit by bit, and what config.json says. It is read as the same model."""
    assert main(["convert", f"--model={ENCODERS / kind}", "--to=masked_lm", f"--out={tmp_path}/out"]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (ENCODERS / kind, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert after[name].dtype == array.dtype
        np.testing.assert_array_equal(after[name], array)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (ENCODERS / kind, tmp_path / "out"))
    assert {name for name in after if after[name] != before.get(name)} == {"attention_probs_dropout_prob", "sedd"}
    first, again = sedd.load(ENCODERS / kind), sedd.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)
    assert again.network == first.network and again.block_length == first.block_length == 511
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint


def test_each_parameter_is_written_to_its_own_tensor(tmp_path, bert):
    """Control: a map to keys that is changed changes one tensor of the written file, and that alone."""
    params = jax.tree.map(np.array, bert.params)
    params["trunk"]["block_1"]["qkv"]["kernel"][:, 1] += 1
    dataclasses.replace(bert, params=params).save(tmp_path / "out", "masked_lm")
    before, after = (load_file(folder / "model.safetensors") for folder in (ENCODERS / "bert", tmp_path / "out"))
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert changed == ["bert.encoder.layer.1.attention.self.key.weight"]


@pytest.mark.parametrize("kind, vocab_size", [("bert", 30522), ("roberta", 50265)])
def test_the_default_tokens_of_published_vocabularies_are_held(kind, vocab_size):
    """Without a tokenizer in the folder. Control: a config.json without the group of this project needs one."""
    form, config = FORMATS["masked_lm"], configs.override(configs.default(), [f"network.architecture={kind}"])
    about = form.about(config, vocab_size)
    check_holds(form, about, config, vocab_size)
    again = form.config(json.loads(json.dumps(about)), Path("nowhere"))
    assert configs.build(again, vocab_size)[2] == configs.build(config, vocab_size)[2]
    del about["sedd"]
    with pytest.raises(sedd.UserError, match="there is no nowhere/tokenizer.json"):
        form.config(about, Path("nowhere"))


def test_a_tokenizer_beside_that_of_the_folder_is_refused():
    with pytest.raises(sedd.UserError, match="has a tokenizer of its own"):
        sedd.load(ENCODERS / "bert", tokenizer="bytes")


@pytest.mark.parametrize(
    "setting, words",
    [
        ("process.name=uniform", "needs process.name=absorbing"),
        ("network.prediction=score", "network.prediction=denoiser"),
        ("network.scan=true", "network.scan is for network.architecture=dit"),
        ("network.cond_dim=64", "network.cond_dim is for network.architecture=dit"),
        ("network.attention=splash", "attention mask"),
        ("data.block_length=512", "at most 511 tokens after the start token"),
        ("network.architecture=gpt2", "network.architecture must be one of dit, bert, roberta"),
        ("network.architecture=dit", "network.mask_token is for network.architecture=bert or roberta"),
    ],
)
def test_settings_that_do_not_fit_are_refused(setting, words):
    settings = ["network.architecture=bert", "network.mask_token=4", "data.block_length=128"]
    base = configs.override(configs.default(), settings)
    with pytest.raises(sedd.UserError, match=words):
        configs.override(base, [setting])


def test_a_special_token_outside_of_the_vocabulary_is_refused():
    """That of the published models, if the vocabulary is another."""
    config = configs.override(configs.default(), ["network.architecture=bert"])
    with pytest.raises(sedd.UserError, match="network.mask_token=103 is no token of a vocabulary of 100"):
        configs.build(config, 100)


@pytest.fixture
def folder(tmp_path):
    """A copy of the small BERT, to be changed."""
    return Path(shutil.copytree(ENCODERS / "bert", tmp_path / "bert"))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"layer_norm_eps": 1e-5}, "eps 1e-05; published bert models have 1e-12"),
        ({"intermediate_size": 16}, "mlp_width 16; published bert models have 32"),
        ({"tie_word_embeddings": False}, "a table of its own"),
        ({"hidden_size": 16, "intermediate_size": 64}, "does not fit its config.json"),
        ({"vocab_size": 26}, "has 25 tokens, and config.json 26"),
        ({"num_hidden_layers": 3}, "lacks encoder.layer.2"),
        ({"model_type": "t5"}, "not a model of sedd"),
        ({"sedd": {"mask_token": 4}}, "config.json lacks start_token"),
        ({"sedd": {"mask_token": 4, "start_token": 25, "block_length": 8}}, "start_token=25 is no token"),
        ({"sedd": {"mask_token": 4, "start_token": 2, "block_length": 512}}, "at most 511 tokens"),
    ],
)
def test_another_config_than_that_of_published_models_is_refused(folder, change, words):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(sedd.UserError, match=words) as caught:
        sedd.load(folder)
    assert "\n" not in str(caught.value)


def test_an_encoder_without_head_and_missing_files_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    kept = {name: array for name, array in tensors.items() if not name.startswith("cls")}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(sedd.UserError, match="has no head for masked tokens, cls.predictions.bias"):
        sedd.load(folder)
    save_file({**kept, "cls.predictions.bias": tensors["cls.predictions.bias"]}, folder / "model.safetensors")
    with pytest.raises(sedd.UserError, match="lacks cls.predictions.transform.dense.weight"):
        sedd.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(sedd.UserError, match="there is no .*tokenizer.json"):
        sedd.load(folder)
