"""The interface of the training objectives, on which the step, the guard, the metrics and the estimate depend."""

import dataclasses
from typing import Protocol

import jax

from sedd.data.batches import Batch
from sedd.network.network import Network


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Losses:
    """The losses of the rows of a batch."""

    loss: jax.Array  # Float[B], nats, weighted or not, summed over the scored tokens of the row
    count: jax.Array  # Int[B], number of scored tokens
    sigma: jax.Array  # Float[B], the noise level that the network is conditioned on
    terms: dict[str, jax.Array]  # the parts of the loss by name, Float[B], nats a row; empty for a loss of one part


class Objective(Protocol):
    """What is minimised: a pure function of (parameters, batch, rows, key), frozen and hashable.

    All random numbers of a row are drawn from the key of the step and the row's global index, so that they are
    independent of devices and accumulation.
    """

    @property
    def network(self) -> Network:
        """The network whose parameters are trained."""

    @property
    def trains_network(self) -> bool:
        """True if the trunk and its adapters run."""

    @property
    def trains_codec(self) -> bool:
        """True if the networks of a codec run that are trained beside them."""

    def init(self, key: jax.Array) -> dict:
        """Returns the initial parameters. Pure; meant to be jitted and sharded."""

    def __call__(self, params: dict, batch: Batch, rows: jax.Array, key: jax.Array) -> Losses:
        """Returns the losses of a batch, whose sum over rows is differentiated.

        batch: B rows of the global batch; rows: Int[B], their indices in it; key: of the step.
        """

    def head_positions(self, rows: int, length: int) -> int:
        """Returns the number of positions at which the head runs in a batch of `rows` rows of `length` tokens."""
