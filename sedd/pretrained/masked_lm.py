"""Masked language models: BERT and RoBERTa in the format of Hugging Face, with their tokenizers."""

from typing import cast

from sedd import config as configs
from sedd.codecs.encoder_tables import BERT_ANCHOR, bert_table, encoder_params
from sedd.codecs.huggingface import CONFIG, TOKENIZER, read_vocabulary
from sedd.codecs.pretrained_encoder import described
from sedd.codecs.tensor_table import SAME, Entry, linear, norm
from sedd.data.tokenizers import pretrained_tokenizer
from sedd.errors import UserError
from sedd.network.masked_lm import ARCHITECTURES, MLP, MaskedLanguageModel
from sedd.pretrained.format import Format

_HEADS = {  # the tensors of the head: a linear map, a layer norm, the biases of the tokens
    "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
    "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
}


class MaskedLM(Format):
    name, title = "masked_lm", "masked language model"

    def is_mine(self, about):
        return about.get("model_type") in ARCHITECTURES

    def config(self, about, folder):
        """Rows are as long as the table of positions allows.

        UserError if the model differs from the published ones in more than its size.
        """
        family, settings = described(about, folder)
        kind = about["model_type"]
        for name, value in {**ARCHITECTURES[kind], "mlp_width": MLP * settings["width"]}.items():
            if settings[name] != value:
                raise UserError(f"{folder}: {CONFIG} has {name} {settings[name]}; published {kind} models have {value}")
        if not about.get("tie_word_embeddings", True):
            raise UserError(f"{folder}: a head with a table of its own is not supported")
        vocabulary, _ = read_vocabulary(folder)
        network = {name: settings[name] for name in ("width", "layers", "heads")}
        network |= {"architecture": kind, "dropout": float(about.get("hidden_dropout_prob", 0.1))}
        network["mask_token"] = vocabulary[cast(str, family.mask)]
        network["start_token"] = vocabulary[cast(str, family.start)]
        length = settings["positions"] - settings.get("position_offset", 0) - 1
        return configs.from_dict(
            {
                "process": {"name": "absorbing"},
                "network": network,
                "data": {"block_length": length, "vocab_size": settings["vocab_size"]},
            }
        )

    def table(self, network):
        dense, layer_norm, bias = _HEADS[_kind(network)]
        trunk = bert_table({"layers": network.trunk.layers})
        return [
            *(entry._replace(path=f"trunk/{entry.path}") for entry in trunk),
            *linear("head/dense", dense),
            *norm("head/norm", layer_norm),
            Entry("head/bias", (bias,), SAME),
        ]

    def params(self, tensors, network, folder):
        if (bias := _HEADS[_kind(network)][-1]) not in tensors:
            raise UserError(f"{folder} has no head for masked tokens, {bias}; choose a model with one")
        return encoder_params(tensors, self.table(network), BERT_ANCHOR, folder)

    def tokenizer(self, about, folder):
        tokenizer = pretrained_tokenizer(f"huggingface:{folder / TOKENIZER}")
        if tokenizer.vocab_size != about["vocab_size"]:
            sizes = f"{TOKENIZER} has {tokenizer.vocab_size} tokens, and {CONFIG} {about['vocab_size']}"
            raise UserError(f"{folder}: {sizes}")
        return tokenizer


def _kind(network: MaskedLanguageModel) -> str:
    """Returns the key in ARCHITECTURES of a network."""
    offsets = {values["position_offset"]: kind for kind, values in ARCHITECTURES.items()}
    return offsets[network.trunk.position_offset]
