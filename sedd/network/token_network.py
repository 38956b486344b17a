"""The network of noisy tokens: with parameters it is a Denoiser and a StatsFn.

The head's logits are a prediction of the process, whose meaning is that of `sedd.network.predictions`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random
from sedd.diffusion.bounds import Bound
from sedd.diffusion.denoiser import Denoiser
from sedd.diffusion.discrete.blocks import by_token, num_blocks
from sedd.diffusion.discrete.likelihood import DiscreteTimeBound, TimeLoss, bound_of
from sedd.diffusion.discrete.process import Process
from sedd.diffusion.discrete.score import ArrayColumns, Columns, PosteriorFn, StatsFn
from sedd.network.adapters import TokenEmbedding, TokenHead, padded
from sedd.network.chunked_head import MAX_LOGITS, HeadColumns
from sedd.network.network import Network, apply
from sedd.network.predictions import PREDICTIONS, Prediction
from sedd.network.sharding import num_row_shards, num_shards

MAX_DENSE_LOGITS = 2**25  # of a device, in one array of statistics; larger ones are computed in chunks


@dataclasses.dataclass(frozen=True)
class TokenNetwork(Network):
    """A network that predicts the scores or the clean tokens of a jump process; prediction: a key of PREDICTIONS.

    given_embedding is for the uniform process only, where a token does not show whether it is corrupted; under the
    absorbing process any token but the mask is clean. bound_steps: T of a bound in discrete time, absorbing process
    only; 0: continuous time.
    """

    process: Process
    bound_steps: int = dataclasses.field(default=0, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.bound_steps and self.process.mask_id is None:
            raise ValueError("bound_steps is for the absorbing process; the uniform one has no bound in discrete time")
        if self.given_embedding and self.process.mask_id is not None:
            raise ValueError(
                "network.given_embedding is for the uniform process; the absorbing process does not need it"
            )
        if self.process.mask_id is not None and not self._meaning.with_mask:
            raise ValueError(
                f"network.prediction={self.prediction} is for the uniform process; of a masked token denoiser is the "
                "posterior"
            )

    @staticmethod
    def predictions():
        return tuple(PREDICTIONS)

    @property
    def vocab_size(self):
        return self.process.vocab_size

    @property
    def columns(self):
        return self.process.num_states

    @property
    def outer_parameters(self):
        return self.columns * (2 * self.trunk.width + 1)

    @property
    def outer_products(self):
        return padded(self.columns) * self.trunk.width

    @property
    def num_padding(self):
        return (padded(self.columns) - self.columns) * (2 * self.trunk.width + 1)

    @property
    def token_axes(self):
        return {"trunk/embedding": 0, "head/out/kernel": 1, "head/out/bias": 0}

    def logits_at_once(self, sites, shards=1):
        dense = super().logits_at_once(sites, shards)
        return min(dense, MAX_LOGITS) if self._is_large(sites, shards) else dense

    def _is_large(self, sites: int, shards: int) -> bool:
        """True if the logits of the clean tokens at `sites` positions are too many for an array."""
        return sites * self.vocab_size > MAX_DENSE_LOGITS * shards

    @property
    def embedding(self) -> TokenEmbedding:
        return TokenEmbedding(self.process.num_states, self.trunk.width, self.embedding_std, self.given_embedding)

    @property
    def head(self) -> TokenHead:
        return TokenHead(self.process.num_states)

    @property
    def has_unnormalised_scores(self):
        return self._meaning.unnormalised

    @property
    def _meaning(self) -> Prediction:
        return PREDICTIONS[self.prediction](self.process)

    def init(self, key):
        tokens, sigma = jnp.zeros((1, 2), jnp.int32), jnp.ones(1, jnp.float32)
        h, condition = jnp.zeros((1, 2, self.trunk.width), jnp.float32), jnp.zeros((1, self.cond_dim), jnp.float32)
        for_trunk, for_head = jax.random.split(keyed_random.threefry(key))
        trunk = {
            **self.embedding.init(for_trunk, tokens)["params"],
            **self.noise_embedding.init(for_trunk, sigma).get("params", {}),
            **self.trunk.init(for_trunk, h, condition)["params"],
        }
        return {"trunk": trunk, "head": self.head.init(for_head, h, condition[:, None])["params"]}

    def denoiser(self, params: dict, lengths: jax.Array | None = None, given: jax.Array | None = None) -> Denoiser:
        def denoise(x, sigma, positions=None):
            clipped_sigma = self._clipped(sigma)
            hidden, condition = self.hidden(params, x, clipped_sigma, lengths=lengths, given=given)
            if positions is not None:
                hidden = jnp.take_along_axis(hidden, positions[..., None], axis=1)
                x = jnp.take_along_axis(x, positions, axis=1)
            logits = self.logits(params, hidden, condition[:, None])
            return self._meaning.log_clean(logits, x, clipped_sigma[:, None])

        return denoise

    def stats(
        self,
        params: dict,
        keys: jax.Array | None = None,
        lengths: jax.Array | None = None,
        given: jax.Array | None = None,
        masked_pairs: bool = False,
        tightened: bool = False,
        capacity: int | None = None,
    ) -> StatsFn:
        """Returns the StatsFn of these parameters. keys: Key[B] for dropout; lengths: Int[B]; given: Bool[B L].

        masked_pairs: the head runs at masked positions only, without those that are masked in x0 too. Rows 2i and
        2i + 1 together may hold at most L + 1 of them, of blocks one more a block, as antithetic mask counts do. At
        other positions the statistics are 0; Absorbing does not use them. capacity: in place of it, for masks of any
        number; where a device's rows hold more than `capacity` of them, the head runs at all positions, in chunks of
        the vocabulary. A mesh must split the rows evenly. tightened: for an unnormalised score only; the statistics get
        a leading axis of size two, for the score as it is and for `process.tightened` of it.
        """

        def stats(x, sigma, x0):
            sigma, clipped_sigma = sigma.astype(jnp.float32), self._clipped(sigma)
            hidden, condition = self.hidden(params, x, clipped_sigma, keys, lengths, given, x0)
            sites = (hidden, jnp.broadcast_to(condition[:, None], (*x.shape, self.cond_dim)), x, x0)
            levels = (by_token(level, x.shape[1]) for level in (sigma, clipped_sigma))
            sites = (*sites, *(jnp.broadcast_to(level, x.shape) for level in levels))
            if not masked_pairs and capacity is None:
                return at_sites(*sites)
            masked = (x == self.process.mask_id) & (x0 != self.process.mask_id)
            if capacity is None:
                blocks = num_blocks(x.shape[1], self.block_of_generation or 0)
                return at_masked(masked, len(x) // 2, x.shape[1] + blocks, *sites)
            groups = num_row_shards()
            fits = jnp.max(jnp.sum(masked.reshape(groups, -1), axis=-1)) <= capacity
            packed = functools.partial(at_masked, masked, groups, capacity)
            overflow = jax.checkpoint(functools.partial(at_sites, in_chunks=True))  # its residuals would be held unused
            return jax.lax.cond(fits, packed, overflow, *sites)

        def at_masked(masked, groups, count, *sites):
            gather, scatter = _masked_of_groups(masked, groups, count)
            return jax.tree.map(scatter, at_sites(*map(gather, sites)))

        def at_sites(hidden, condition, *sites, in_chunks=False):
            return self._meaning.stats(self.columns_of(params, hidden, condition, in_chunks), *sites, tightened)

        return stats

    def bound(self, schedule):
        if self.bound_steps:
            return DiscreteTimeBound(self.process, self.bound_steps, self.block_of_generation or 0)
        return bound_of(self.process, schedule, self.block_of_generation or 0)

    def loss_at_times(self, schedule, eps, strata) -> Bound:
        return TimeLoss(self.process, schedule, eps, strata, self.block_of_generation or 0)

    def bound_stats(self, params, tokens, lengths=None, given=None, masked_pairs=False):
        tightened = self.has_unnormalised_scores
        return self.stats(params, lengths=lengths, given=given, masked_pairs=masked_pairs, tightened=tightened)

    def posterior(
        self,
        params: dict,
        keys: jax.Array | None = None,
        lengths: jax.Array | None = None,
        given: jax.Array | None = None,
    ) -> PosteriorFn:
        """Returns the PosteriorFn of these parameters. Arguments: as of `stats`."""

        def posterior(x, sigma, x0):
            clipped_sigma = self._clipped(sigma)
            hidden, condition = self.hidden(params, x, clipped_sigma, keys, lengths, given, x0)
            columns = self.columns_of(params, hidden, condition[:, None])
            return self._meaning.log_posterior_at(columns, x, x0, clipped_sigma[:, None])

        return posterior

    def log_score(
        self,
        params: dict,
        x: jax.Array,
        sigma: jax.Array,
        lengths: jax.Array | None = None,
        given: jax.Array | None = None,
    ) -> jax.Array:
        """The log concrete score of all states, the mask included; 0 at the current token. Float32[B L S].

        Conditioned on sigma without clipping, like the published models. For the absorbing process it is meaningful at
        masked positions only.
        """
        sigma = sigma.astype(jnp.float32)
        hidden, condition = self.hidden(params, x, sigma, lengths=lengths, given=given)
        return self._meaning.log_score(self.logits(params, hidden, condition[:, None]), x, sigma[:, None])

    def hidden(
        self,
        params: dict,
        x: jax.Array,
        sigma: jax.Array,
        keys: jax.Array | None = None,
        lengths: jax.Array | None = None,
        given: jax.Array | None = None,
        context: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Hidden states, Float32[B L W], and the embedding of sigma, Float32[B C]. Arguments: as of `stats`.

        Conditioned on sigma without clipping. context: Int[B L], the clean tokens, of which a network of blocks takes
        those of the blocks before a token's own; others do not read it. None: x, in which these blocks are clean.
        """
        given = self._checked(given)
        h = apply(self.embedding, params["trunk"], x, given)
        condition = apply(self.noise_embedding, params["trunk"], sigma)
        return apply(self.trunk, params["trunk"], h, condition, keys, lengths), condition

    def columns_of(self, params: dict, hidden: jax.Array, condition: jax.Array, in_chunks: bool = False) -> Columns:
        """The logits of the clean tokens, for statistics: in an array, or if that is large in chunks.

        Arguments as of `logits`. in_chunks: in chunks in any case.
        """
        if in_chunks or self._is_large(math.prod(hidden.shape[:-1]), num_shards()):
            return HeadColumns(*self.head_parts(params, hidden, condition), self.vocab_size)
        return ArrayColumns(self.logits(params, hidden, condition)[..., : self.vocab_size])

    def head_parts(
        self, params: dict, hidden: jax.Array, condition: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The last linear map of the head: its inputs, Float32[... W], kernel, Float32[W S], and bias, Float32[S]."""
        out = params["head"]["out"]
        return apply(self.head, params["head"], hidden, condition, True), out["kernel"], out["bias"]

    def logits(self, params: dict, hidden: jax.Array, condition: jax.Array) -> jax.Array:
        """The head, at any sites. Float[... P W], Float[... P C] or Float[... 1 C] -> Float32[... P S]."""
        return apply(self.head, params["head"], hidden, condition)


def _masked_of_groups(masked: jax.Array, groups: int, count: int):
    """Gather and scatter between all positions and the `count` masked ones of each of G groups of consecutive rows.

    masked: Bool[B L]. Returns gather: [B L ...] -> [G count ...], and its inverse scatter, 0 elsewhere. A group with
    fewer masks is filled up with positions that are not masked.
    """
    # Group by group under `vmap`, so that no device needs the rows of another.
    batch, length = masked.shape
    sites = batch * length // groups
    indices = jnp.argsort(~masked.reshape(groups, sites), axis=-1, stable=True)[:, :count]

    def gather(values):
        return jax.vmap(lambda row, at: row[at])(values.reshape(groups, sites, *values.shape[2:]), indices)

    def scatter(values):  # [... G count], with or without a leading axis
        def one(row, at):
            return jnp.zeros((*row.shape[:-1], sites), row.dtype).at[..., at].set(row)

        return jax.vmap(one, (-2, 0), -2)(values, indices).reshape(*values.shape[:-2], batch, length)

    return gather, scatter
