"""Published SEDD checkpoints (PyTorch): a directory with config.json and model.safetensors, read without PyTorch."""

import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from sedd import config as configs
from sedd.errors import UserError
from sedd.network.trunk import padded


def is_published(about: dict) -> bool:
    """Whether the contents of a config.json are those of a published checkpoint."""
    return {"graph", "noise", "model", "tokens"} <= about.keys()


def load(directory: Path) -> tuple[ConfigDict, dict]:
    """The config and the parameters of a published checkpoint. UserError if it cannot be read."""
    config = _config(json.loads((directory / "config.json").read_text()), directory)
    file = directory / "model.safetensors"
    if not file.is_file():
        raise UserError(f"there is no {file}; copy it there, beside its config.json")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is damaged ({error}); copy it there again") from None
    tensors.pop("rotary_emb.inv_freq", None)  # a constant
    return config, _params(tensors, config, directory)


def _config(published: dict, directory: Path) -> ConfigDict:
    """The published settings in the words of our config."""
    graph, noise, model = published["graph"], published["noise"], published["model"]
    if model["scale_by_sigma"] != (graph["type"] == "absorb"):
        raise UserError(f"{directory}: scale_by_sigma={model['scale_by_sigma']} with {graph['type']} is not supported")
    return configs.from_dict(
        {
            "process": {"name": {"absorb": "absorbing", "uniform": "uniform"}[graph["type"]]},
            "schedule": {
                "name": noise["type"],
                "sigma_min": float(noise["sigma_min"]),
                "sigma_max": float(noise["sigma_max"]),
            },
            "network": {
                "prediction": "score",
                "width": model["hidden_size"],
                "layers": model["n_blocks"],
                "heads": model["n_heads"],
                "cond_dim": model["cond_dim"],
                "dropout": model["dropout"],
            },
            "data": {"block_length": model["length"], "vocab_size": published["tokens"]},
            "training": {"ema_decay": published["training"]["ema"], "noise_sampling": "time"},
        }
    )


def _params(tensors: dict[str, np.ndarray], config: ConfigDict, directory: Path) -> dict:
    """The tensors under the names and shapes of our tree; every one is used, and none is missing."""
    process, _, network = configs.build(config, config.data.vocab_size)
    spare = padded(process.num_states) - process.num_states

    def take(name):
        if name not in tensors:
            raise UserError(f"{directory}: the checkpoint lacks {name}")
        return tensors.pop(name).astype(np.float32)

    def linear(name, bias=True):
        kernel = {"kernel": take(f"{name}.weight").T}
        return {**kernel, "bias": take(f"{name}.bias")} if bias else kernel

    def heads(name):  # queries, keys and values, of which we keep an axis
        return {"kernel": take(f"{name}.weight").T.reshape(network.width, 3, network.width)}

    def norm(name):
        return {"scale": take(f"{name}.weight")}

    def block(name):
        return {
            "modulation": linear(f"{name}.adaLN_modulation"),
            "norm_attention": norm(f"{name}.norm1"),
            "qkv": heads(f"{name}.attn_qkv"),
            "out": linear(f"{name}.attn_out", bias=False),
            "norm_mlp": norm(f"{name}.norm2"),
            "up": linear(f"{name}.mlp.0"),
            "down": linear(f"{name}.mlp.2"),
        }

    out = linear("output_layer.linear")
    params = {
        "trunk": {
            "embedding": np.pad(take("vocab_embed.embedding"), ((0, spare), (0, 0))),
            "sigma_in": linear("sigma_map.mlp.0"),
            "sigma_out": linear("sigma_map.mlp.2"),
            **{f"block_{i}": block(f"blocks.{i}") for i in range(network.layers)},
        },
        "head": {
            "modulation": linear("output_layer.adaLN_modulation"),
            "norm": norm("output_layer.norm_final"),
            "out": {"kernel": np.pad(out["kernel"], ((0, 0), (0, spare))), "bias": np.pad(out["bias"], (0, spare))},
        },
    }
    if tensors:
        raise UserError(f"{directory}: the checkpoint holds tensors that no part of the network has: {sorted(tensors)}")
    return params
