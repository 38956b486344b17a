"""The tensors of published encoders, and the parameters of `Bert` and `T5Encoder` that they make."""

import re
from pathlib import Path

import numpy as np

from sedd.errors import UserError

BERT_ANCHOR = "embeddings.word_embeddings.weight"
T5_ANCHOR = "block.0.layer.0.SelfAttention.q.weight"
_SPELLINGS = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))  # of TensorFlow
_UNUSED = re.compile(r"(pooler|cls|lm_head|decoder|classifier)\.|.*\.(position_ids|token_type_ids)$")


class Tensors:
    """The tensors of a checkpoint by name, of which each is taken once.

    What precedes the anchor, a name that each checkpoint has, is no part of the names: encoders are saved by
    themselves, in models for masked tokens (bert.) and with a decoder (encoder.). UserError if the anchor is missing.
    """

    def __init__(self, tensors: dict[str, np.ndarray], anchor: str, folder: Path):
        self.folder = folder
        found = [name for name in tensors if re.search(rf"(^|\.){re.escape(anchor)}$", name) and "decoder." not in name]
        if not found:
            raise UserError(f"{folder}: the checkpoint lacks {anchor}")
        prefix = min(found, key=len).removesuffix(anchor)
        self._tensors = {_spelled(name.removeprefix(prefix)): array for name, array in tensors.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str) -> np.ndarray:
        """Returns a tensor as float32. UserError if it is missing."""
        if name not in self:
            raise UserError(f"{self.folder}: the checkpoint lacks {name}")
        return self._tensors.pop(name).astype(np.float32)

    def linear(self, name: str, bias: bool = True) -> dict:
        """Returns the parameters of a linear map."""
        return {"kernel": self.take(f"{name}.weight").T} | ({"bias": self.take(f"{name}.bias")} if bias else {})

    def qkv(self, *names: str, bias: bool = True) -> dict:
        """Returns the linear maps to queries, keys and values as one, with an axis for the three before the last."""
        maps = [self.linear(name, bias) for name in names]
        if len({tuple(array.shape for array in one.values()) for one in maps}) > 1:
            raise UserError(f"{self.folder}: {', '.join(names)} of the checkpoint differ in shape")
        return {part: np.stack([one[part] for one in maps], axis=-2) for part in maps[0]}

    def norm(self, name: str) -> dict:
        """Returns the parameters of a layer norm."""
        return {"scale": self.take(f"{name}.weight"), "bias": self.take(f"{name}.bias")}

    def check_empty(self):
        """UserError if a tensor is left that is no part of an encoder or of the heads that are published with one."""
        surplus = sorted(name for name in self._tensors if not _UNUSED.match(name))
        if surplus:
            raise UserError(f"{self.folder}: the checkpoint has tensors that the encoder does not have: {surplus}")


def bert_params(tensors: Tensors, settings: dict) -> dict:
    """Takes the parameters of `Bert`. settings: its fields."""

    def block(name):
        return {
            "qkv": tensors.qkv(*(f"{name}.attention.self.{part}" for part in ("query", "key", "value"))),
            "out": tensors.linear(f"{name}.attention.output.dense"),
            "norm_attention": tensors.norm(f"{name}.attention.output.LayerNorm"),
            "up": tensors.linear(f"{name}.intermediate.dense"),
            "down": tensors.linear(f"{name}.output.dense"),
            "norm_mlp": tensors.norm(f"{name}.output.LayerNorm"),
        }

    return {
        "embedding": tensors.take(BERT_ANCHOR),
        "position_embedding": tensors.take("embeddings.position_embeddings.weight"),
        "type_embedding": tensors.take("embeddings.token_type_embeddings.weight"),
        "norm": tensors.norm("embeddings.LayerNorm"),
        **{f"block_{layer}": block(f"encoder.layer.{layer}") for layer in range(settings["layers"])},
    }


def t5_params(tensors: Tensors, settings: dict) -> dict:
    """Takes the parameters of `T5Encoder`. settings: its fields."""

    def block(name):
        attention, mlp = f"{name}.layer.0", f"{name}.layer.1"
        up = {"gate": "wi_0", "up": "wi_1"} if settings["gated"] else {"up": "wi"}
        return {
            "norm_attention": {"scale": tensors.take(f"{attention}.layer_norm.weight")},
            "qkv": tensors.qkv(*(f"{attention}.SelfAttention.{part}" for part in "qkv"), bias=False),
            "out": tensors.linear(f"{attention}.SelfAttention.o", bias=False),
            "norm_mlp": {"scale": tensors.take(f"{mlp}.layer_norm.weight")},
            **{ours: tensors.linear(f"{mlp}.DenseReluDense.{name}", bias=False) for ours, name in up.items()},
            "down": tensors.linear(f"{mlp}.DenseReluDense.wo", bias=False),
        }

    tables = [tensors.take(name) for name in ("shared.weight", "embed_tokens.weight") if name in tensors]
    return {
        "embedding": tables[0] if tables else tensors.take("shared.weight"),  # the two are one table
        "bias": tensors.take("block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        "norm": {"scale": tensors.take("final_layer_norm.weight")},
        **{f"block_{layer}": block(f"block.{layer}") for layer in range(settings["layers"])},
    }


def _spelled(name):
    for pattern, spelling in _SPELLINGS:
        name = re.sub(pattern, spelling, name)
    return name
