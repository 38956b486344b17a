"""RADD (Ou et al., arXiv 2406.03736): absorbing diffusion that is not conditioned on the noise."""

from sedd import config as configs
from sedd.network.adapters import CONSTANT as NO_NOISE
from sedd.pretrained.dit import dit_constants, dit_table
from sedd.pretrained.format import Format

_TYPE = "ddit_wot"


class Radd(Format):
    name, title = "radd", "RADD, absorbing diffusion without conditioning on the noise"

    def is_mine(self, about):
        return isinstance(about.get("model"), dict) and about["model"].get("type") == _TYPE

    def config(self, about, folder):
        model, noise = about["model"], about["noise"]
        return configs.from_dict(
            {
                "process": {"name": "absorbing"},
                "schedule": {
                    "name": noise["type"],
                    "sigma_min": float(noise["sigma_min"]),
                    "sigma_max": float(noise["sigma_max"]),
                },
                "network": {
                    "prediction": "denoiser",
                    "conditioning": NO_NOISE,
                    "cond_dim": 0,
                    "width": model["hidden_size"],
                    "layers": model["n_blocks"],
                    "heads": model["n_heads"],
                    "dropout": model["dropout"],
                },
                "data": {"block_length": model["length"], "vocab_size": about["tokens"]},
                "training": {"ema_decay": about["training"]["ema"]},
            }
        )

    def about(self, config, vocab_size):
        network = config.network
        return {
            "model": {
                "name": "small_radd",
                "type": _TYPE,
                "hidden_size": network.width,
                "cond_dim": 128,  # the authors' code does not read it
                "length": config.data.block_length,
                "n_blocks": network.layers,
                "n_heads": network.heads,
                "dropout": network.dropout,
                "use_checkpoint": False,
                "dtype": "float32",
            },
            "noise": {
                "type": config.schedule.name or "loglinear",
                "sigma_min": config.schedule.sigma_min,
                "sigma_max": config.schedule.sigma_max,
            },
            "tokens": vocab_size,
            "training": {"ema": config.training.ema_decay},
        }

    def table(self, network):
        return dit_table(network)

    def constants(self, network):
        return dit_constants(network)
