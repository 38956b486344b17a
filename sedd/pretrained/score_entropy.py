"""SEDD (Lou, Meng, Ermon, arXiv 2310.16834): the score entropy models of the authors, such as louaaron/sedd-small."""

from sedd import config as configs
from sedd.errors import UserError
from sedd.pretrained.dit import dit_constants, dit_table
from sedd.pretrained.format import Format

_PROCESSES = {"absorb": "absorbing", "uniform": "uniform"}


class Sedd(Format):
    name, title = "sedd", "SEDD, score entropy"

    def is_mine(self, about):
        return {"graph", "noise", "model", "tokens"} <= about.keys()

    def config(self, about, folder):
        graph, noise, model = about["graph"], about["noise"], about["model"]
        if model["scale_by_sigma"] != (graph["type"] == "absorb"):
            raise UserError(f"{folder}: scale_by_sigma={model['scale_by_sigma']} with {graph['type']} is not supported")
        return configs.from_dict(
            {
                "process": {"name": _PROCESSES[graph["type"]]},
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
                "data": {"block_length": model["length"], "vocab_size": about["tokens"]},
                "training": {"ema_decay": about["training"]["ema"], "loss": "bound", "noise_sampling": "time"},
            }
        )

    def about(self, config, vocab_size):
        network, absorbing = config.network, config.process.name == "absorbing"
        return {
            "graph": {"type": "absorb" if absorbing else "uniform", "file": "data", "report_all": False},
            "model": {
                "name": "small",
                "type": "ddit",
                "hidden_size": network.width,
                "cond_dim": network.cond_dim,
                "length": config.data.block_length,
                "n_blocks": network.layers,
                "n_heads": network.heads,
                "scale_by_sigma": absorbing,
                "dropout": network.dropout,
            },
            "noise": {
                "type": config.schedule.name or "loglinear",
                "sigma_min": config.schedule.sigma_min,
                "sigma_max": config.schedule.sigma_max,
            },
            "ngpus": 1,
            "sampling": {"predictor": "euler", "steps": 128, "noise_removal": True},
            "tokens": vocab_size,
            "training": {"ema": config.training.ema_decay},
        }

    def table(self, network):
        return dit_table(network)

    def constants(self, network):
        return dit_constants(network)
