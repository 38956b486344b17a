"""The objectives by name. To add one, write a small file and add a line to `OBJECTIVES`."""

from collections.abc import Callable

from ml_collections import ConfigDict

from sedd.diffusion.schedule import Schedule
from sedd.network.network import Network
from sedd.recipes import ENCODER, kind_of, resolved
from sedd.training.cross_entropy import CrossEntropy
from sedd.training.encodings import Decoding, Denoising, Encodings
from sedd.training.latents import LatentBoundLoss, LatentCrossEntropy, Regression
from sedd.training.objective import Objective
from sedd.training.score_entropy import ScoreEntropy

_TOKENS: dict[str, Callable[..., Objective]] = {"bound": ScoreEntropy, "cross_entropy": CrossEntropy}
OBJECTIVES: dict[str, dict[str, Callable[..., Objective]]] = {  # by the kind of model, then by `training.loss`
    "absorbing": _TOKENS,
    "blocks": {"bound": ScoreEntropy},
    "uniform": _TOKENS,
    "gaussian": {"bound": LatentBoundLoss, "cross_entropy": LatentCrossEntropy, "regression": Regression},
    "encoder": {"regression": Encodings, "denoising": Denoising, "decoder": Decoding},
}


def make_objective(config: ConfigDict, network: Network, schedule: Schedule) -> Objective:
    """Returns the objective that the group `training` of a config describes."""
    config = resolved(config)
    training, codec, of_model = config.training, config.codec, kind_of(config)
    other = {}
    if OBJECTIVES[of_model][training.loss] is ScoreEntropy:
        other = {"noise_sampling": training.noise_sampling}
    elif of_model == ENCODER:
        other = {name: codec[name] for name in ("corruption", "corruption_start", "corruption_end")}
    make = OBJECTIVES[of_model][training.loss]
    return make(network, schedule, training.batch_size, training.min_time, **other)
