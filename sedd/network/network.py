"""What training, evaluation and generation ask of a network, whatever diffuses: `Network`, and the parts they share.

A network puts adapters at both ends of a trunk: the noisy state and the noise are embedded, and the head's outputs are
a prediction. With parameters it is a Denoiser or a MeanDenoiser, and a function of statistics for losses and bounds.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random
from sedd.diffusion.bounds import Bound
from sedd.diffusion.denoiser import Clean, State
from sedd.diffusion.schedule import Schedule
from sedd.network.adapters import CONDITIONING, NoiseEmbedding, padded
from sedd.network.bert import Bert
from sedd.network.trunk import Trunk

MAX_ROWS, MAX_LOGITS = 64, 2**28  # of one batch on a device in evaluation and sampling, by default


@dataclasses.dataclass(frozen=True)
class Network(abc.ABC):
    """A trunk and what it predicts; frozen and hashable, a static argument of jit.

    prediction: what the outputs mean, a key of the network's predictions. sigma_range: the noise levels of training;
    the sigma that the network is conditioned on is clipped to this range. cond_dim: C, the size of the embedding of
    sigma; embedding_std: of the initial embeddings of tokens. given_embedding: adds a learned embedding to the given
    positions, which are clean at any noise. conditioning: a key of CONDITIONING, what is embedded of the noise level.
    """

    process: Any
    prediction: str
    trunk: Trunk | Bert
    sigma_range: tuple[float, float]
    cond_dim: int = 128
    embedding_std: float = 0.5
    given_embedding: bool = False
    conditioning: str = "sigma"

    def __post_init__(self):
        if self.prediction not in self.predictions():
            names = ", ".join(self.predictions())
            raise ValueError(f"network.prediction must be one of {names}, not {self.prediction!r}")
        if self.conditioning not in CONDITIONING:
            raise ValueError(
                f"network.conditioning must be one of {', '.join(CONDITIONING)}, not {self.conditioning!r}"
            )

    @staticmethod
    @abc.abstractmethod
    def predictions() -> tuple[str, ...]:
        """The names of what such a network can predict."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """V, the number of clean tokens."""

    @property
    def has_unnormalised_scores(self) -> bool:
        """True if it predicts scores with an unknown normaliser, of which `process.tightened` gives a lower loss."""
        return False

    @property
    def has_logits(self) -> bool:
        """True if it predicts a distribution over tokens, which temperature and top_p can change."""
        return True

    @property
    def self_conditioned(self) -> bool:
        """True if the network takes its last answer too."""
        return False

    @property
    def noise_embedding(self) -> NoiseEmbedding:
        return NoiseEmbedding(self.cond_dim, self.conditioning)

    @property
    @abc.abstractmethod
    def columns(self) -> int:
        """The size of a distribution over tokens at a position, without padding."""

    @property
    def wide_arrays(self) -> int:
        """About how many float32 arrays with `columns` numbers a position the backward pass needs."""
        return 3

    def logits_at_once(self, sites: int, shards: int = 1) -> int:
        """How many logits of a loss a device holds at a time. shards: devices that share the columns of its sites."""
        return sites * padded(self.columns) // shards

    def codec_products(self, length: int) -> tuple[int, int]:
        """Multiply-adds at a position of rows of `length` tokens in networks beside the trunk: trained, and frozen."""
        return 0, 0

    @property
    def num_frozen(self) -> int:
        """The number of parameters beside those of `init`, which nothing trains."""
        return 0

    @property
    def infills(self) -> bool:
        """True if a clean value depends on its own token only, so that some tokens can be given."""
        return True

    @property
    def block_of_generation(self) -> int | None:
        """The number of tokens of a block, if rows are generated block after block, each given those before it.

        None: all of a row together, given any tokens. A given token is taken account of in its own and later blocks.
        """
        return None

    def trunk_length(self, length: int) -> int:
        """The number of positions at which the trunk runs for a row of `length` tokens."""
        return length

    @property
    @abc.abstractmethod
    def outer_parameters(self) -> int:
        """The number of parameters of the embedding of the state and of the head's outputs, without padding."""

    @property
    @abc.abstractmethod
    def outer_products(self) -> int:
        """The number of multiply-adds at a position in the embedding of the state and the head's outputs."""

    @abc.abstractmethod
    def init(self, key: jax.Array) -> dict:
        """Initial parameters, float32: {"trunk": ..., "head": ...}. A pure function that can be jitted and sharded.

        "trunk" also holds the parameters of the embeddings.
        """

    @property
    @abc.abstractmethod
    def num_padding(self) -> int:
        """The number of parameters that pad the vocabulary."""

    @property
    def token_axes(self) -> dict[str, int]:
        """The parameters with an axis of tokens by path, and that axis; {} if they cannot be had for other tokens."""
        return {}

    def num_parameters(self) -> int:
        """Number of parameters, without the padding of the vocabulary."""
        params = jax.eval_shape(self.init, keyed_random.root_key(0))
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) - self.num_padding

    def rows_at_once(self, length: int) -> int:
        """Default batch size per device for rows of `length` tokens: their logits fit into a gigabyte."""
        return max(1, min(MAX_ROWS, MAX_LOGITS // (length * self.columns)))

    def clean(self, params: dict, tokens: jax.Array, lengths: jax.Array | None = None) -> Clean:
        """The clean values of tokens: what diffuses, without noise. Int[B L] -> Int[B L] or Float[B L D].

        lengths: Int[B], number of valid tokens; values after them are unspecified, and independent of those tokens.
        """
        return tokens

    def shown(self, params: dict, x: State) -> jax.Array:
        """The tokens that a state shows. State -> Int32[B L]."""
        return cast(jax.Array, x)

    @abc.abstractmethod
    def denoiser(
        self, params: dict, lengths: jax.Array | None = None, given: jax.Array | None = None
    ) -> Callable[..., jax.Array]:
        """Returns the Denoiser of these parameters; the head runs at the requested positions only.

        lengths: Int[B], number of valid tokens; given: Bool[B L], True at positions that hold given, clean values in
        every x. Here and below: ValueError if `given` is set and the network has no `given_embedding`. Without
        `has_logits` it is a MeanDenoiser.
        """

    def for_sampler(
        self, params: dict, denoiser: Callable[..., jax.Array], round_below: float = 0.0
    ) -> Callable[..., jax.Array]:
        """What the samplers of the process take, from a `denoiser`, changed or not. round_below: of latents only."""
        return denoiser

    @abc.abstractmethod
    def bound(self, schedule: Schedule) -> Bound:
        """The bound of the process, for a network that is trained with a schedule."""

    @abc.abstractmethod
    def loss_at_times(self, schedule: Schedule, eps: float, strata: int) -> Bound:
        """The loss at times in [eps, 1] that papers report in place of the bound, or the negative log-likelihood.

        strata: as of `TimeLoss`. UserError for a network that has no such loss.
        """

    @abc.abstractmethod
    def bound_stats(
        self,
        params: dict,
        tokens: jax.Array,
        lengths: jax.Array | None = None,
        given: jax.Array | None = None,
        masked_pairs: bool = False,
    ) -> Callable[..., Any]:
        """The function of statistics with which a bound takes its draws: a StatsFn, or a LatentStatsFn of the tokens.

        tokens: Int[B L]; masked_pairs: as of `TokenNetwork.stats`.
        """

    def _checked(self, given: jax.Array | None) -> jax.Array | None:
        if given is not None and not self.given_embedding:
            raise ValueError(
                "this network has no embedding of given tokens; train one with network.given_embedding=True"
            )
        return given

    def _clipped(self, sigma):
        return jnp.clip(sigma.astype(jnp.float32), *self.sigma_range)


def apply(module: nn.Module, params: dict, *inputs) -> jax.Array:
    """The module with the parameters that it names, of a tree that may hold others."""
    return cast(jax.Array, module.apply({"params": params}, *inputs))
