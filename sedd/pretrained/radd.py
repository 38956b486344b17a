"""RADD (Ou et al., arXiv 2406.03736): absorbing diffusion that is not conditioned on the noise."""

from sedd.network.adapters import CONSTANT
from sedd.pretrained.dit import RunDiT

_TYPE = "ddit_wot"


class Radd(RunDiT):
    """The layers have no modulation, and their norms have biases."""

    name, title = "radd", "RADD, absorbing diffusion without conditioning on the noise"

    def is_mine(self, about):
        return isinstance(about.get("model"), dict) and about["model"].get("type") == _TYPE

    def process(self, about):
        return "absorbing"

    def network(self, about, folder):
        return {"prediction": "denoiser", "conditioning": CONSTANT, "cond_dim": 0}

    def groups(self, config):
        unread = {"cond_dim": 128, "use_checkpoint": False, "dtype": "float32"}  # by the network of the authors' code
        return {"model": {"name": "small_radd", "type": _TYPE, **unread}}
