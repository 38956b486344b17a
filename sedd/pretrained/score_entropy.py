"""Reads published SEDD checkpoints, config.json and model.safetensors, without PyTorch."""

from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from sedd import config as configs
from sedd.diffusion.keyed_random import root_key
from sedd.errors import UserError
from sedd.network.adapters import padded
from sedd.runtime.trees import fitted


def is_published(about: dict) -> bool:
    """True if the contents of a config.json are those of a published checkpoint."""
    return {"graph", "noise", "model", "tokens"} <= about.keys()


def load(directory: Path, about: dict) -> tuple[ConfigDict, dict, None]:
    """Returns the config and the parameters; there is no tokenizer. UserError if the checkpoint cannot be read.

    about: the contents of config.json.
    """
    config = _config(about, directory)
    file = directory / "model.safetensors"
    if not file.is_file():
        raise UserError(f"there is no {file}; copy it to the folder of its config.json")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is damaged ({error}); copy it again") from None
    tensors.pop("rotary_emb.inv_freq", None)  # a constant
    return config, _params(tensors, config, directory), None


def _config(published: dict, directory: Path) -> ConfigDict:
    """Translates the published settings to a config of sedd."""
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
                "conditioning": "sigma",
                "width": model["hidden_size"],
                "layers": model["n_blocks"],
                "heads": model["n_heads"],
                "cond_dim": model["cond_dim"],
                "dropout": model["dropout"],
            },
            "data": {"block_length": model["length"], "vocab_size": published["tokens"]},
            "training": {"ema_decay": published["training"]["ema"], "loss": "bound", "noise_sampling": "time"},
        }
    )


def _params(tensors: dict[str, np.ndarray], config: ConfigDict, directory: Path) -> dict:
    """Maps the tensors to the parameter tree. UserError if one is missing, left over or of another shape."""
    _, _, network = configs.build(config, config.data.vocab_size)
    padding = padded(network.columns) - network.columns

    def take(name):
        if name not in tensors:
            raise UserError(f"{directory}: the checkpoint lacks {name}")
        return tensors.pop(name).astype(np.float32)

    def linear(name, bias=True):
        kernel = {"kernel": take(f"{name}.weight").T}
        return {**kernel, "bias": take(f"{name}.bias")} if bias else kernel

    def heads(name):  # queries, keys and values get an axis of their own
        kernel = take(f"{name}.weight").T
        return {"kernel": kernel.reshape(len(kernel), 3, -1)}

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
            "embedding": np.pad(take("vocab_embed.embedding"), ((0, padding), (0, 0))),
            "sigma_in": linear("sigma_map.mlp.0"),
            "sigma_out": linear("sigma_map.mlp.2"),
            **{f"block_{i}": block(f"blocks.{i}") for i in range(network.trunk.layers)},
        },
        "head": {
            "modulation": linear("output_layer.adaLN_modulation"),
            "norm": norm("output_layer.norm_final"),
            "out": {"kernel": np.pad(out["kernel"], ((0, 0), (0, padding))), "bias": np.pad(out["bias"], (0, padding))},
        },
    }
    if tensors:
        raise UserError(f"{directory}: the checkpoint has tensors that the network does not have: {sorted(tensors)}")
    return fitted(params, jax.eval_shape(network.init, root_key(0)), f"{directory} does not fit its config.json")
