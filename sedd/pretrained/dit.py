"""The diffusion transformer that SEDD, MDLM, Duo, UDLM, RADD and BD3-LM publish: this project's own trunk.

`dit_table` lists its tensors. Its config.json is that of the library transformers (`TransformersDiT`), or the config of
the training run (`RunDiT`).
"""

import abc
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from sedd import config as configs
from sedd.codecs.tensor_table import JOINED, Entry, Table, columns, layers, linear, norm, rows
from sedd.errors import UserError
from sedd.network.adapters import CONSTANT as NO_NOISE
from sedd.network.adapters import padded
from sedd.network.network import Network
from sedd.pretrained.format import Format
from sedd.recipes import resolved

_PREFIX = "backbone."
_RUN_SIZES = {"width": "hidden_size", "layers": "n_blocks", "heads": "n_heads", "dropout": "dropout"}
_SIZES = {"width": "hidden_dim", "layers": "n_blocks", "heads": "n_heads", "cond_dim": "cond_dim", "dropout": "dropout"}


def dit_table(network: Network, prefix: str = "") -> Table:
    """The parameters of a network with unrolled layers. prefix: of all names.

    A network that is not conditioned on the noise has no modulation, and norms with biases (RADD).
    """
    states, conditioned = network.columns, bool(network.cond_dim)
    stored = padded(states)

    def block(layer):
        path, name = f"trunk/block_{layer}", f"blocks.{layer}"
        return [
            *(linear(f"{path}/modulation", f"{name}.adaLN_modulation") if conditioned else []),
            *norm(f"{path}/norm_attention", f"{name}.norm1", bias=not conditioned),
            Entry(f"{path}/qkv/kernel", (f"{name}.attn_qkv.weight",), JOINED),
            *linear(f"{path}/out", f"{name}.attn_out", bias=False),
            *norm(f"{path}/norm_mlp", f"{name}.norm2", bias=not conditioned),
            *linear(f"{path}/up", f"{name}.mlp.0"),
            *linear(f"{path}/down", f"{name}.mlp.2"),
        ]

    noise = [*linear("trunk/sigma_in", "sigma_map.mlp.0"), *linear("trunk/sigma_out", "sigma_map.mlp.2")]
    table = [
        Entry("trunk/embedding", ("vocab_embed.embedding",), rows(states, stored)),
        *(noise if conditioned else []),
        *layers(network.trunk.layers, block),
        *(linear("head/modulation", "output_layer.adaLN_modulation") if conditioned else []),
        *norm("head/norm", "output_layer.norm_final", bias=not conditioned),
        Entry("head/out/kernel", ("output_layer.linear.weight",), columns(states, stored)),
        Entry("head/out/bias", ("output_layer.linear.bias",), rows(states, stored)),
    ]
    return [entry._replace(names=tuple(prefix + name for name in entry.names)) for entry in table]


def dit_constants(network: Network, prefix: str = "") -> dict[str, np.ndarray]:
    """Returns the tensors that are no parameters: the frequencies of the rotary positions."""
    head = network.trunk.width // network.trunk.heads
    exponents = np.arange(0, head, 2, dtype=np.float32) / np.float32(head)
    return {f"{prefix}rotary_emb.inv_freq": 1 / np.float32(10000) ** exponents}


class TransformersDiT(Format):
    """A format with the config.json of the library transformers.

    process: of the models; masks: the number of states in `vocab_size` that are no tokens; conditioned: on the noise,
    if config.json does not say it; fixed: settings that have one value.
    """

    process: str
    masks = 0
    conditioned = True
    fixed: tuple[tuple[str, bool], ...] = ()

    def is_mine(self, about):
        return self.name.upper() in about.get("architectures", ()) or about.get("model_type") == self.name

    def config(self, about, folder):
        for key, value in self.fixed:
            if about.get(key, value) != value:
                raise UserError(f"{folder}: {key}={about[key]} of {self.name} is not supported, only {value}")
        conditioned = about.get("time_conditioning", self.conditioned)
        network = {"prediction": "denoiser", "conditioning": "sigma" if conditioned else NO_NOISE}
        return configs.from_dict(
            {
                "process": {"name": self.process},
                "schedule": {"name": "loglinear"},
                "network": network | {ours: about[theirs] for ours, theirs in _SIZES.items()},
                "data": {"block_length": about["model_length"], "vocab_size": about["vocab_size"] - self.masks},
                "training": {"loss": "bound", "noise_sampling": "time"},
            }
        )

    def about(self, config, vocab_size):
        sizes = {theirs: config.network[ours] for ours, theirs in _SIZES.items()}
        conditioned = config.network.conditioning != NO_NOISE
        return {
            "architectures": [self.name.upper()],
            "model_type": self.name,
            "model_length": config.data.block_length,
            "vocab_size": vocab_size + self.masks,
            "time_conditioning": conditioned,
            **sizes,
            **dict(self.fixed),
            "return_dict": False,
        }

    def table(self, network):
        return dit_table(network, _PREFIX)

    def constants(self, network):
        return dit_constants(network, _PREFIX)


class RunDiT(Format):
    """A format whose config.json is the config of the training run, in groups.

    training: settings of the group of this name, by name; the others of a published run are not read.
    """

    training: tuple[tuple[str, str], ...] = ()

    @abc.abstractmethod
    def process(self, about: dict) -> str:
        """Returns the name of the process."""

    @abc.abstractmethod
    def network(self, about: dict, folder: Path) -> dict:
        """Returns the settings of the network but for its sizes. UserError if it is of a kind that is not supported."""

    @abc.abstractmethod
    def groups(self, config: ConfigDict) -> dict[str, dict]:
        """Returns what the groups of config.json hold beside sizes, noise and EMA."""

    def config(self, about, folder):
        model, noise = about["model"], about["noise"]
        sizes = {ours: model[theirs] for ours, theirs in _RUN_SIZES.items()}
        limits = {name: float(noise[name]) for name in ("sigma_min", "sigma_max")}
        return configs.from_dict(
            {
                "process": {"name": self.process(about)},
                "schedule": {"name": noise["type"], **limits},
                "network": sizes | self.network(about, folder),
                "data": {"block_length": model["length"], "vocab_size": about["tokens"]},
                "training": {"ema_decay": about["training"]["ema"], **dict(self.training)},
            }
        )

    def about(self, config, vocab_size):
        sizes = {theirs: config.network[ours] for ours, theirs in _RUN_SIZES.items()}
        limits = {name: config.schedule[name] for name in ("sigma_min", "sigma_max")}
        groups = self.groups(config)
        return {
            **groups,
            "model": groups["model"] | sizes | {"length": config.data.block_length},
            "noise": {"type": resolved(config).schedule.name, **limits},
            "tokens": vocab_size,
            "training": {"ema": config.training.ema_decay},
        }

    def table(self, network):
        return dit_table(network)

    def constants(self, network):
        return dit_constants(network)
