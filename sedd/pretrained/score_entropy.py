"""SEDD (Lou, Meng, Ermon, arXiv 2310.16834): the score entropy models of the authors, such as louaaron/sedd-small."""

from sedd.errors import UserError
from sedd.pretrained.dit import RunDiT

_PROCESSES = {"absorb": "absorbing", "uniform": "uniform"}


class Sedd(RunDiT):
    """Scores of absorbing models are shifted by the noise (`scale_by_sigma`), those of uniform models are not."""

    name, title = "sedd", "SEDD, score entropy"
    training = (("loss", "bound"), ("noise_sampling", "time"))

    def is_mine(self, about):
        return {"graph", "noise", "model", "tokens"} <= about.keys()

    def process(self, about):
        return _PROCESSES.get(about["graph"]["type"], "absorbing")  # `network` refuses others

    def network(self, about, folder):
        kind, scaled = about["graph"]["type"], about["model"]["scale_by_sigma"]
        if kind not in _PROCESSES:
            raise UserError(f"{folder}: the graph {kind} is not supported, only {' and '.join(_PROCESSES)}")
        if scaled != (kind == "absorb"):
            raise UserError(f"{folder}: scale_by_sigma={scaled} with {kind} is not supported")
        return {"prediction": "score", "conditioning": "sigma", "cond_dim": about["model"]["cond_dim"]}

    def groups(self, config):
        absorbing = config.process.name == "absorbing"
        return {
            "graph": {"type": "absorb" if absorbing else "uniform", "file": "data", "report_all": False},
            "model": {
                "name": "small",
                "type": "ddit",
                "cond_dim": config.network.cond_dim,
                "scale_by_sigma": absorbing,
            },
            "ngpus": 1,
            "sampling": {"predictor": "euler", "steps": 128, "noise_removal": True},
        }
