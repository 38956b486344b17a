"""Reads published masked language models, BERT and RoBERTa in the format of Hugging Face, with their tokenizers."""

from pathlib import Path
from typing import cast

import jax
from ml_collections import ConfigDict

from sedd import config as configs
from sedd.codecs.encoder_tensors import Tensors
from sedd.codecs.huggingface import CONFIG, TOKENIZER, read_tensors, read_vocabulary
from sedd.codecs.pretrained_encoder import described
from sedd.data.tokenizers import Tokenizer, pretrained_tokenizer
from sedd.diffusion.keyed_random import root_key
from sedd.errors import UserError
from sedd.network.masked_lm import ARCHITECTURES, MLP
from sedd.runtime.trees import fitted

_HEADS = {  # the tensors of the head: a linear map, a layer norm, the biases of the tokens
    "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
    "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
}


def is_published(about: dict) -> bool:
    """True if the contents of a config.json are those of BERT or RoBERTa."""
    return about.get("model_type") in ARCHITECTURES


def load(directory: Path, about: dict) -> tuple[ConfigDict, dict, Tokenizer]:
    """Returns the config, the parameters and the tokenizer. about: the contents of config.json.

    UserError if a file is missing or damaged, if there is no head for masked tokens, or if the model differs from the
    published ones in more than its size.
    """
    family, settings = described(about, directory)
    kind = about["model_type"]
    for name, value in {**ARCHITECTURES[kind], "mlp_width": MLP * settings["width"]}.items():
        if settings[name] != value:
            raise UserError(f"{directory}: {CONFIG} has {name} {settings[name]}; published {kind} models have {value}")
    if not about.get("tie_word_embeddings", True):
        raise UserError(f"{directory}: a head with a table of its own is not supported")
    tensors = Tensors(read_tensors(directory)[0], family.anchor, directory)
    if _HEADS[kind][-1] not in tensors:
        raise UserError(f"{directory} has no head for masked tokens, {_HEADS[kind][-1]}; choose a model with one")
    tokenizer = pretrained_tokenizer(f"huggingface:{directory / TOKENIZER}")
    if tokenizer.vocab_size != settings["vocab_size"]:
        raise UserError(
            f"{directory}: {TOKENIZER} has {tokenizer.vocab_size} tokens, and {CONFIG} {settings['vocab_size']}"
        )
    params = {"trunk": family.params(tensors, settings), "head": _head(tensors, *_HEADS[kind])}
    tensors.check_empty()
    vocabulary, _ = read_vocabulary(directory)
    config = _config(about, settings, vocabulary[cast(str, family.mask)], vocabulary[cast(str, family.start)])
    _, _, network = configs.build(config, settings["vocab_size"])
    like = jax.eval_shape(network.init, root_key(0))
    return config, fitted(params, like, f"{directory} does not fit its {CONFIG}"), tokenizer


def _head(tensors: Tensors, dense: str, norm: str, bias: str) -> dict:
    return {"dense": tensors.linear(dense), "norm": tensors.norm(norm), "bias": tensors.take(bias)}


def _config(about: dict, settings: dict, mask: int, start: int) -> ConfigDict:
    """Translates the published settings to a config of sedd: rows are as long as the table of positions allows."""
    network = {name: settings[name] for name in ("width", "layers", "heads")}
    dropout = float(about.get("hidden_dropout_prob", 0.1))
    network |= {"architecture": about["model_type"], "mask_token": mask, "start_token": start, "dropout": dropout}
    length = settings["positions"] - settings.get("position_offset", 0) - 1
    return configs.from_dict(
        {
            "process": {"name": "absorbing"},
            "network": network,
            "data": {"block_length": length, "vocab_size": settings["vocab_size"]},
        }
    )
