"""Masked language models: BERT and RoBERTa in the format of Hugging Face, with their tokenizers."""

from pathlib import Path
from typing import cast

from sedd import config as configs
from sedd.codecs.encoder_tables import BERT_ANCHOR, bert_table, encoder_params
from sedd.codecs.huggingface import CONFIG, TOKENIZER, read_vocabulary
from sedd.codecs.pretrained_encoder import Family, described
from sedd.codecs.tensor_table import SAME, Entry, Table, linear, norm
from sedd.data.tokenizer_huggingface import HuggingFace
from sedd.errors import UserError
from sedd.network.masked_lm import ARCHITECTURES, MLP, MaskedLanguageModel
from sedd.pretrained.format import Format

_HEADS = {  # the tensors of the head: a linear map, a layer norm, the biases of the tokens
    "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
    "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
}
_KINDS = {
    "bert": {"architectures": ["BertForMaskedLM"], "model_type": "bert", "pad_token_id": 0},
    "roberta": {"architectures": ["RobertaForMaskedLM"], "model_type": "roberta", "pad_token_id": 1},
}
_SIZES = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
_CONSTANTS = {
    "positions": "max_position_embeddings",
    "types": "type_vocab_size",
    "eps": "layer_norm_eps",
    "activation": "hidden_act",
}
_OURS = "sedd"  # the group of config.json of the settings that only this project reads


class MaskedLM(Format):
    name, title = "masked_lm", "masked language model"
    tokenizers = ()

    def is_mine(self, about):
        return about.get("model_type") in ARCHITECTURES

    def config(self, about, folder):
        """Without the group of this project the special tokens are those of tokenizer.json, and rows as long as can be.

        UserError if the model differs from the published ones in more than its size.
        """
        family, settings = described(about, folder)
        kind = about["model_type"]
        for name, value in {**ARCHITECTURES[kind], "mlp_width": MLP * settings["width"]}.items():
            if settings[name] != value:
                raise UserError(f"{folder}: {CONFIG} has {name} {settings[name]}; published {kind} models have {value}")
        if not about.get("tie_word_embeddings", True):
            raise UserError(f"{folder}: a head with a table of its own is not supported")
        network = {name: settings[name] for name in _SIZES}
        network |= {"architecture": kind, "dropout": float(about.get("hidden_dropout_prob", 0.1))}
        longest = settings["positions"] - settings.get("position_offset", 0) - 1
        ours = about.get(_OURS) or {**_special_tokens(family, folder), "block_length": longest}
        network |= {name: ours[name] for name in ("mask_token", "start_token")}
        return configs.from_dict(
            {
                "process": {"name": "absorbing"},
                "network": network,
                "data": {"block_length": ours["block_length"], "vocab_size": settings["vocab_size"]},
            }
        )

    def about(self, config, vocab_size):
        """The settings that transformers has no names for are in a group of their own, which it ignores."""
        network, kind = config.network, config.network.architecture
        if kind not in ARCHITECTURES:
            kinds = " or ".join(ARCHITECTURES)
            raise UserError(f"the format {self.name} cannot hold network.architecture={kind}; its models have {kinds}")
        return {
            **_KINDS[kind],
            "vocab_size": vocab_size,
            **{theirs: network[ours] for ours, theirs in _SIZES.items()},
            "intermediate_size": MLP * network.width,
            **{theirs: ARCHITECTURES[kind][ours] for ours, theirs in _CONSTANTS.items()},
            "hidden_dropout_prob": network.dropout,
            "attention_probs_dropout_prob": 0.0,  # attention weights have none here
            "tie_word_embeddings": True,
            _OURS: {
                "mask_token": network.mask_token,
                "start_token": network.start_token,
                "block_length": config.data.block_length,
            },
        }

    def table(self, network):
        return _table(network, f"{_kind(network)}.")

    def params(self, tensors, network, folder):
        if (bias := _HEADS[_kind(network)][-1]) not in tensors:
            raise UserError(f"{folder} has no head for masked tokens, {bias}; choose a model with one")
        return encoder_params(tensors, _table(network), BERT_ANCHOR, folder)

    def tokenizer(self, about, folder):
        tokenizer = super().tokenizer(about, folder)
        if tokenizer is not None and tokenizer.vocab_size != about["vocab_size"]:
            sizes = f"its tokenizer has {tokenizer.vocab_size} tokens, and {CONFIG} {about['vocab_size']}"
            raise UserError(f"{folder}: {sizes}")
        return tokenizer

    def save_tokenizer(self, tokenizer, folder):
        """As transformers reads it, if it is of that kind."""
        if isinstance(tokenizer.backend, HuggingFace) and tokenizer.has_end_of_text:
            (folder / TOKENIZER).write_bytes(tokenizer.backend.data)
        else:
            super().save_tokenizer(tokenizer, folder)


def _table(network: MaskedLanguageModel, prefix: str = "") -> Table:
    """The parameters of a network. prefix: of the names of the trunk's tensors; it is not needed to read them."""
    dense, layer_norm, bias = _HEADS[_kind(network)]
    return [
        *(
            Entry(f"trunk/{path}", tuple(prefix + name for name in names), form)
            for path, names, form in bert_table({"layers": network.trunk.layers})
        ),
        *linear("head/dense", dense),
        *norm("head/norm", layer_norm),
        Entry("head/bias", (bias,), SAME),
    ]


def _special_tokens(family: Family, folder: Path) -> dict[str, int]:
    """Returns the settings of the special tokens, by the vocabulary of tokenizer.json."""
    vocabulary, _ = read_vocabulary(folder)
    return {
        "mask_token": vocabulary[cast(str, family.mask)],
        "start_token": vocabulary[cast(str, family.start)],
    }


def _kind(network: MaskedLanguageModel) -> str:
    """Returns the key in ARCHITECTURES of a network."""
    offsets = {values["position_offset"]: kind for kind, values in ARCHITECTURES.items()}
    return offsets[network.trunk.position_offset]
