"""Published SEDD checkpoints (PyTorch): a directory with config.json and model.safetensors, read without PyTorch."""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from sedd.diffusion.process import Absorbing, Process, Uniform
from sedd.diffusion.schedule import Geometric, LogLinear, Schedule
from sedd.errors import UserError
from sedd.network.network import Network
from sedd.network.trunk import padded

TIME_FLOOR = 1e-3  # the earliest time that the published models were trained at


def is_published(directory: Path) -> bool:
    """Whether a directory holds a checkpoint in the published format."""
    config = directory / "config.json"
    return config.is_file() and (directory / "model.safetensors").is_file() and "graph" in json.loads(config.read_text())


def load(directory: Path) -> tuple[Process, Schedule, Network, dict, int]:
    """Process, schedule, network, parameters and length of a published checkpoint. UserError if it cannot be read."""
    config = json.loads((directory / "config.json").read_text())
    process, schedule, network = _build(config, directory)
    try:
        tensors = load_file(directory / "model.safetensors")
    except SafetensorError as error:
        raise UserError(f"{directory / 'model.safetensors'} is damaged ({error}); copy it there again") from None
    tensors.pop("rotary_emb.inv_freq", None)  # a constant
    params = _params(tensors, network, directory)
    return process, schedule, network, params, config["model"]["length"]


def _build(config: dict, directory: Path) -> tuple[Process, Schedule, Network]:
    graph, noise, model = config["graph"], config["noise"], config["model"]
    process = {"absorb": Absorbing, "uniform": Uniform}[graph["type"]](config["tokens"])
    if noise["type"] == "loglinear":
        schedule = LogLinear()
    else:
        schedule = Geometric(noise["sigma_min"], noise["sigma_max"])
    if model["scale_by_sigma"] != isinstance(process, Absorbing):
        raise UserError(f"{directory}: scale_by_sigma={model['scale_by_sigma']} with {graph['type']} is not supported")
    network = Network(
        process=process,
        prediction="score",
        width=model["hidden_size"],
        layers=model["n_blocks"],
        heads=model["n_heads"],
        condition=model["cond_dim"],
        dropout=model["dropout"],
        sigma_range=(float(schedule.sigma(TIME_FLOOR)), float(schedule.sigma(1.0))),
    )
    return process, schedule, network


def _params(tensors: dict[str, np.ndarray], network: Network, directory: Path) -> dict:
    """The tensors under the names and shapes of our tree; every one is used, and none is missing."""
    states = network.process.num_states
    spare = padded(states) - states

    def take(name):
        if name not in tensors:
            raise UserError(f"{directory}: the checkpoint lacks {name}")
        return tensors.pop(name).astype(np.float32)

    def linear(name, bias=True):
        kernel = {"kernel": take(f"{name}.weight").T}
        return {**kernel, "bias": take(f"{name}.bias")} if bias else kernel

    def norm(name):
        return {"scale": take(f"{name}.weight")}

    def block(name):
        return {
            "modulation": linear(f"{name}.adaLN_modulation"),
            "norm_attention": norm(f"{name}.norm1"),
            "qkv": linear(f"{name}.attn_qkv", bias=False),
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
