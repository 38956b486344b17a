"""The tensors of published encoders, as tables of the parameters of `Bert` and `T5Encoder`."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sedd.codecs.tensor_table import SAME, TRANSPOSED, Entry, Table, layers, linear, norm, params_from, qkv
from sedd.errors import UserError

BERT_ANCHOR = "embeddings.word_embeddings.weight"
T5_ANCHOR = "block.0.layer.0.SelfAttention.q.weight"
_SPELLINGS = (  # of TensorFlow, and of T5's encoder without its decoder
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
    (r"^embed_tokens\.weight$", "shared.weight"),
)
_UNUSED = re.compile(r"(pooler|cls|lm_head|decoder|classifier)\.|.*\.(position_ids|token_type_ids)$")


def encoder_params(tensors: Mapping[str, np.ndarray], table: Table, anchor: str, folder: Path) -> dict:
    """Returns the parameters of a table by path, as `params_from` does.

    What precedes the anchor, a name that each checkpoint has, is no part of the names: encoders are saved by
    themselves, in models for masked tokens (bert.) and with a decoder (encoder.). The heads and the decoder are not
    needed. UserError if the anchor is missing.
    """
    found = [name for name in tensors if re.search(rf"(^|\.){re.escape(anchor)}$", name) and "decoder." not in name]
    if not found:
        raise UserError(f"{folder}: the checkpoint lacks {anchor}")
    prefix = min(found, key=len).removesuffix(anchor)
    spelled = {_spelled(name.removeprefix(prefix)): array for name, array in tensors.items()}
    return params_from(spelled, table, folder, filter(_UNUSED.match, spelled))


def bert_table(settings: dict) -> Table:
    """The parameters of `Bert`. settings: its fields."""

    def block(layer):
        path, name = f"block_{layer}", f"encoder.layer.{layer}"
        return [
            *qkv(f"{path}/qkv", (f"{name}.attention.self.{part}" for part in ("query", "key", "value"))),
            *linear(f"{path}/out", f"{name}.attention.output.dense"),
            *norm(f"{path}/norm_attention", f"{name}.attention.output.LayerNorm"),
            *linear(f"{path}/up", f"{name}.intermediate.dense"),
            *linear(f"{path}/down", f"{name}.output.dense"),
            *norm(f"{path}/norm_mlp", f"{name}.output.LayerNorm"),
        ]

    return [
        Entry("embedding", (BERT_ANCHOR,), SAME),
        Entry("position_embedding", ("embeddings.position_embeddings.weight",), SAME),
        Entry("type_embedding", ("embeddings.token_type_embeddings.weight",), SAME),
        *norm("norm", "embeddings.LayerNorm"),
        *layers(settings["layers"], block),
    ]


def t5_table(settings: dict) -> Table:
    """The parameters of `T5Encoder`. settings: its fields."""
    maps = [("gate", "wi_0"), ("up", "wi_1")] if settings["gated"] else [("up", "wi")]
    maps.append(("down", "wo"))

    def block(layer):
        path, attention, mlp = f"block_{layer}", f"block.{layer}.layer.0", f"block.{layer}.layer.1"
        return [
            *norm(f"{path}/norm_attention", f"{attention}.layer_norm", bias=False),
            *qkv(f"{path}/qkv", (f"{attention}.SelfAttention.{part}" for part in "qkv"), bias=False),
            *linear(f"{path}/out", f"{attention}.SelfAttention.o", bias=False),
            *norm(f"{path}/norm_mlp", f"{mlp}.layer_norm", bias=False),
            *(
                Entry(f"{path}/{ours}/kernel", (f"{mlp}.DenseReluDense.{its}.weight",), TRANSPOSED)
                for ours, its in maps
            ),
        ]

    return [
        Entry("embedding", ("shared.weight",), SAME),
        Entry("bias", ("block.0.layer.0.SelfAttention.relative_attention_bias.weight",), SAME),
        *norm("norm", "final_layer_norm", bias=False),
        *layers(settings["layers"], block),
    ]


def _spelled(name: str) -> str:
    for pattern, spelling in _SPELLINGS:
        name = re.sub(pattern, spelling, name)
    return name
