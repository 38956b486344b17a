"""Pretrained encoders, read from a folder in the format of Hugging Face: BERT, RoBERTa, MiniLM and T5."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

from sedd.codecs.encoder_tables import BERT_ANCHOR, T5_ANCHOR, bert_table, encoder_params, t5_table
from sedd.codecs.hub import folder_of
from sedd.codecs.huggingface import CONFIG, TOKENIZER, read_json, read_tensors, read_vocabulary
from sedd.codecs.tensor_table import Table
from sedd.diffusion import keyed_random
from sedd.errors import UserError
from sedd.network.bert import Bert
from sedd.network.layers import ACTIVATIONS
from sedd.network.t5 import T5Encoder
from sedd.runtime.trees import fitted


@dataclasses.dataclass(frozen=True, eq=False)
class PretrainedEncoder:
    """An encoder with its parameters and the ids of its tokens.

    params: float32 arrays on the host. vocabulary: the id of each token by its text, added tokens included; special:
    those of the special tokens. start: the id that precedes the tokens of a row, None if there is none; end: the one
    that follows them; padding and mask: None if there is no mask. max_length: the largest number of tokens in a row,
    start and end included, None if there is no limit. digest: a hexadecimal hash of the settings, the
    vocabulary and the weights.
    """

    module: Bert | T5Encoder
    params: dict
    vocabulary: dict[str, int] = dataclasses.field(repr=False)
    special: dict[str, int]
    start: int | None
    end: int
    padding: int
    mask: int | None
    digest: str

    @property
    def max_length(self) -> int | None:
        return self.module.max_length


@dataclasses.dataclass(frozen=True)
class Family:
    """How encoders of a `model_type` are published.

    settings: the fields of the module, from config.json; table: its parameters, for these fields, whose tensors have
    names that follow `anchor`; start, end, padding and mask: the texts of these tokens.
    """

    module: type[Bert] | type[T5Encoder]
    settings: Callable[[dict], dict]
    anchor: str
    table: Callable[[dict], Table]
    start: str | None
    end: str
    padding: str
    mask: str | None


def read_module(spec: str | Path) -> Bert | T5Encoder:
    """Returns the encoder of a folder without its parameters: reads config.json alone. spec: as of `read_encoder`."""
    folder = folder_of(spec)
    family, settings = described(read_json(folder, CONFIG), folder)
    return family.module(**settings)


def read_encoder(spec: str | Path) -> PretrainedEncoder:
    """Reads an encoder. spec: a folder, or "ORGANISATION/NAME[@REVISION]" of the Hugging Face Hub.

    UserError if there is no such folder, if a file is missing or damaged, if the encoder is of an unknown kind, or if a
    tensor is missing, left over or of another shape than in config.json.
    """
    folder = folder_of(spec)
    config = read_json(folder, CONFIG)
    family, settings = described(config, folder)
    module = family.module(**settings)
    arrays, weights = read_tensors(folder)
    params = encoder_params(arrays, family.table(settings), family.anchor, folder)
    params = fitted_to(module, params, f"{weights} does not fit its {CONFIG}")
    vocabulary, special = read_vocabulary(folder)
    if not set(vocabulary.values()) <= set(range(module.vocab_size)):
        raise UserError(f"{folder}: {TOKENIZER} has tokens beyond the {module.vocab_size} of {CONFIG}")
    if missing := {family.start, family.end, family.padding, family.mask} - vocabulary.keys() - {None}:
        raise UserError(f"{folder}: {TOKENIZER} lacks {missing.pop()}, which {config['model_type']} needs")
    return PretrainedEncoder(
        module=module,
        params=params,
        vocabulary=vocabulary,
        special=special,
        start=None if family.start is None else vocabulary[family.start],
        end=vocabulary[family.end],
        padding=vocabulary[family.padding],
        mask=None if family.mask is None else vocabulary[family.mask],
        digest=_digest(settings, vocabulary, weights),
    )


def _digest(settings: dict, vocabulary: dict[str, int], weights: Path) -> str:
    text = json.dumps([settings, vocabulary], sort_keys=True).encode()
    with weights.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.sha256(text)).hexdigest()[:16]


def described(config: dict, folder: Path) -> tuple[Family, dict]:
    """Returns the family of an encoder and the fields of its module. UserError if the module cannot compute it."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{folder}: {CONFIG} has model_type {kind}; the known ones are {', '.join(FAMILIES)}")
    for key, value in SUPPORTED.items():
        if config.get(key, value) != value:
            raise UserError(f"{folder}: {CONFIG} has {key}={config[key]}, and only {value} is supported")
    try:
        settings = FAMILIES[kind].settings(config)
    except KeyError as error:
        raise UserError(f"{folder}: {CONFIG} lacks {error.args[0]}") from None
    if settings["activation"] not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(f"{folder}: {CONFIG} has the activation {settings['activation']}; the known ones are {known}")
    return FAMILIES[kind], settings


def fitted_to(module: nn.Module, params: dict, context: str) -> dict:
    """Returns the parameters, by path, in the tree of the module. UserError that begins so if one has another shape."""
    tokens, valid = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    like = jax.eval_shape(module.init, keyed_random.root_key(0), tokens, valid)["params"]
    return fitted(params, like, context)


def _bert(config):
    return {
        "vocab_size": config["vocab_size"],
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_width": config["intermediate_size"],
        "positions": config["max_position_embeddings"],
        "position_offset": 0,
        "types": config["type_vocab_size"],
        "eps": config.get("layer_norm_eps", 1e-12),
        "activation": config["hidden_act"],
    }


def _roberta(config):  # positions count from the id of the padding plus one
    return {**_bert(config), "position_offset": config.get("pad_token_id", 1) + 1}


def _t5(config):
    *gated, activation = config.get("feed_forward_proj", "relu").split("-", 1)
    return {
        "vocab_size": config["vocab_size"],
        "width": config["d_model"],
        "layers": config["num_layers"],
        "heads": config["num_heads"],
        "head_width": config["d_kv"],
        "mlp_width": config["d_ff"],
        "buckets": config.get("relative_attention_num_buckets", 32),
        "max_distance": config.get("relative_attention_max_distance", 128),
        "eps": config.get("layer_norm_epsilon", 1e-6),
        "activation": "gelu_new" if gated and activation == "gelu" else activation,
        "gated": bool(gated),
    }


SUPPORTED = {"position_embedding_type": "absolute", "is_decoder": False}
FAMILIES = {  # by the model_type of config.json
    "bert": Family(Bert, _bert, BERT_ANCHOR, bert_table, "[CLS]", "[SEP]", "[PAD]", "[MASK]"),
    "roberta": Family(Bert, _roberta, BERT_ANCHOR, bert_table, "<s>", "</s>", "<pad>", "<mask>"),
    "t5": Family(T5Encoder, _t5, T5_ANCHOR, t5_table, None, "</s>", "<pad>", None),
}
