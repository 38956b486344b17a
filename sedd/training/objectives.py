"""The objectives by name. To add one, write a small file and add a line to `OBJECTIVES`."""

from collections.abc import Callable

from ml_collections import ConfigDict

from sedd.config import resolved
from sedd.diffusion.schedule import Schedule
from sedd.network.network import Network
from sedd.training.cross_entropy import CrossEntropy
from sedd.training.objective import Objective
from sedd.training.score_entropy import ScoreEntropy


def _bound(training: ConfigDict, network: Network, schedule: Schedule) -> Objective:
    return ScoreEntropy(network, schedule, training.batch_size, training.min_time, training.noise_sampling)


def _cross_entropy(training: ConfigDict, network: Network, schedule: Schedule) -> Objective:
    return CrossEntropy(network, schedule, training.batch_size, training.min_time)


OBJECTIVES: dict[str, Callable[[ConfigDict, Network, Schedule], Objective]] = {
    "bound": _bound,
    "cross_entropy": _cross_entropy,
}


def make_objective(config: ConfigDict, network: Network, schedule: Schedule) -> Objective:
    """Returns the objective that the group `training` of a config describes."""
    training = resolved(config).training
    return OBJECTIVES[training.loss](training, network, schedule)
