"""The objectives by name. To add one, write a small file and add a line to `OBJECTIVES`."""

from collections.abc import Callable

from ml_collections import ConfigDict

from sedd.diffusion.schedule import Schedule
from sedd.network.latent_network import LatentNetwork
from sedd.network.network import Network
from sedd.network.token_network import TokenNetwork
from sedd.recipes import resolved
from sedd.training.cross_entropy import CrossEntropy
from sedd.training.latents import LatentBoundLoss, LatentCrossEntropy, Regression
from sedd.training.objective import Objective
from sedd.training.score_entropy import ScoreEntropy

OBJECTIVES: dict[type[Network], dict[str, Callable[..., Objective]]] = {
    TokenNetwork: {"bound": ScoreEntropy, "cross_entropy": CrossEntropy},
    LatentNetwork: {"bound": LatentBoundLoss, "cross_entropy": LatentCrossEntropy, "regression": Regression},
}


def make_objective(config: ConfigDict, network: Network, schedule: Schedule) -> Objective:
    """Returns the objective that the group `training` of a config describes."""
    training = resolved(config).training
    kind = OBJECTIVES[type(network)][training.loss]
    other = {"noise_sampling": training.noise_sampling} if kind is ScoreEntropy else {}
    return kind(network, schedule, training.batch_size, training.min_time, **other)
