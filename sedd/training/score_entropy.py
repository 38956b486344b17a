"""The objective of the SEDD paper: the score entropy of each row of a global batch."""

import dataclasses
import math
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from sedd.diffusion.discrete.blocks import num_blocks, of_rows
from sedd.diffusion.discrete.loss import count_loss, denoising_loss
from sedd.diffusion.discrete.process import Absorbing
from sedd.network.sharding import num_row_shards
from sedd.training.token_objective import TokenObjective, strata

MAX_SHARE = 7 / 8  # of the positions of a device; beyond it to gather the masked ones does not pay
POINTS = 2**12  # at which integrals over all strata take the schedule


@dataclasses.dataclass(frozen=True)
class ScoreEntropy(TokenObjective):
    """The paper's loss, an unbiased estimate of each row's NLL bound.

    noise_sampling: "time": times stratified over [min_time, 1] (SEDD, algorithm 1); "mask_count": antithetic pairs, in
    which rows 2i and 2i + 1 mask k and L + 1 - k tokens, so that the head runs at L + 1 positions per pair. Of a
    network of blocks every block has a level of its own, stratified over the blocks of the batch; with blocks of one
    token that is the cross-entropy of the autoregressive model.
    """

    noise_sampling: str = "time"

    def losses(self, params, tokens, levels, keys, free, inputs, key):
        packing = self._packing(len(tokens) / num_row_shards(), tokens.shape[1])
        stats, process = self.network.stats(params, **inputs, **packing), self.network.process
        if not self._is_paired:
            loss = denoising_loss(process, self.schedule, stats, keys, tokens, levels, free)
            return {"loss": loss}, self.schedule.sigma(of_rows(levels))
        lengths = inputs["lengths"]
        loss = count_loss(cast(Absorbing, process), stats, keys, tokens, levels, free, lengths)
        n = jnp.maximum(self._lengths_of_blocks(tokens.shape[1], lengths), 1)
        ratio = (levels.astype(jnp.float32) - 0.5) / n.astype(jnp.float32)
        return {"loss": loss}, -jnp.log1p(-of_rows(ratio))

    def levels(self, rows, key, length, lengths=None):
        blocks = num_blocks(length, self.network.block_of_generation or 0)
        if self._is_paired:
            return self.counts(rows, key, self._lengths_of_blocks(length, lengths), blocks)
        return self.times(_of_blocks(rows, blocks, self.batch_size), key, blocks)

    def head_positions(self, rows, length):
        """The number of positions at which the head runs: about the masked ones, or under the uniform process all."""
        blocks = num_blocks(length, self.network.block_of_generation or 0)
        if self._is_paired:
            return math.ceil(rows * (length + blocks) / 2)
        return self._packing(rows, length).get("capacity", rows * length)

    def _packing(self, rows: float, length: int) -> dict[str, int | bool]:
        """How the network's `stats` finds the positions at which the head runs in `rows` rows of a device."""
        if self._is_paired:
            return {"masked_pairs": True}
        if self.network.process.mask_id is None or rows % 1:  # devices that do not share the rows evenly
            return {}
        capacity = self.capacity(int(rows), length)
        return {"capacity": capacity} if capacity <= MAX_SHARE * rows * length else {}

    def capacity(self, rows: int, length: int) -> int:
        """A number of masked positions that `rows` consecutive rows of a batch hardly ever exceed.

        The mean and six standard deviations, over times in their strata and masks, of the rows with the most noise.
        """
        blocks = num_blocks(length, self.network.block_of_generation or 0)
        count, size = self.batch_size * blocks, length / blocks
        with jax.ensure_compile_time_eval():
            numbers = np.asarray(_of_blocks(jnp.arange(self.batch_size), blocks, self.batch_size))
            points = max(2, POINTS // count)
            level = jnp.linspace(0, 1, count * points, endpoint=False, dtype=jnp.float32) + 0.5 / (count * points)
            alpha = np.asarray(self.schedule.alpha(self.min_time + (1 - self.min_time) * level), float)
        share = 1 - alpha.reshape(count, points)  # of masks, by stratum
        mean = size * np.mean(share, axis=-1)
        variance = size * np.mean(share * (1 - share), axis=-1) + size**2 * np.var(share, axis=-1)
        stratum = strata(count)[numbers].reshape(self.batch_size, blocks)
        mean, variance = np.sum(mean[stratum], axis=-1), np.sum(variance[stratum], axis=-1)
        starts = np.arange(0, self.batch_size, rows)
        mean, variance = np.add.reduceat(mean, starts), np.add.reduceat(variance, starts)
        return min(rows * length, math.ceil(np.max(mean + 6 * np.sqrt(variance))))

    @property
    def _is_paired(self) -> bool:
        return self.noise_sampling == "mask_count"

    def counts(self, rows: jax.Array, key: jax.Array, lengths: jax.Array | int, blocks: int = 1) -> jax.Array:
        """Stratified mask counts, antithetic in the two rows of a pair. Int[B] -> Int[B], or Int[B N] of N blocks.

        lengths: n, number of tokens of each row, or of each block, or one number for all. At level u the even row of a
        pair masks 1 + floor(u n) of its n tokens, the odd row n' - floor(u n') of its n': k and L + 1 - k if both have
        L tokens.
        """
        # A pair masks at most L + 1 tokens: 1 + n' + floor(u n) - floor(u n'), where floor(u n) - floor(u n') is at
        # most ceil(u (n - n')) <= n - n' for n > n', and at most 0 else; so it is 1 + max(n, n') or less.
        pairs = self.batch_size // 2
        level = self._level(_of_blocks(rows // 2, blocks, pairs), key, pairs * blocks)
        lengths = jnp.maximum(lengths, 1)  # a row without tokens has no loss at any count
        below = jnp.minimum((level * lengths.astype(level.dtype)).astype(jnp.int32), lengths - 1)
        is_even = jnp.reshape(rows % 2 == 0, (-1, *[1] * (level.ndim - 1)))
        return jnp.where(is_even, 1 + below, lengths - below)

    def _lengths_of_blocks(self, length: int, lengths: jax.Array | None) -> jax.Array | int:
        """The number of tokens of each row, Int[B] or one for all; of blocks that of each, Int[B N] or one for all."""
        size = self.network.block_of_generation
        if not size:
            return length if lengths is None else lengths
        return size if lengths is None else jnp.clip(lengths[:, None] - jnp.arange(0, length, size)[None], 0, size)


def _of_blocks(rows: jax.Array, blocks: int, count: int) -> jax.Array:
    """The numbers of the blocks of each of `count` rows, Int[B] -> Int[B N]; with one block the rows' own, Int[B].

    Blocks at one place of their rows have consecutive numbers, so that their strata span all noise levels.
    """
    place = jnp.arange(blocks)[None]
    return rows if blocks == 1 else place * count + (rows[:, None] + place) % count
