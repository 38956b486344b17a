"""The objective of the SEDD paper: the score entropy of each row of a global batch."""

import dataclasses
import math
from typing import cast

import jax
import jax.numpy as jnp

from sedd.diffusion.discrete.loss import count_loss, denoising_loss
from sedd.diffusion.discrete.process import Absorbing
from sedd.training.token_objective import TokenObjective


@dataclasses.dataclass(frozen=True)
class ScoreEntropy(TokenObjective):
    """The paper's loss, an unbiased estimate of each row's NLL bound.

    noise_sampling: "time": times stratified over [min_time, 1] (SEDD, algorithm 1); "mask_count": antithetic pairs, in
    which rows 2i and 2i + 1 mask k and L + 1 - k tokens, so that the head runs at L + 1 positions per pair.
    """

    noise_sampling: str = "time"

    def losses(self, params, tokens, levels, keys, free, inputs, key):
        stats, process = self.network.stats(params, **inputs, masked_pairs=self._is_paired), self.network.process
        if not self._is_paired:
            loss = denoising_loss(process, self.schedule, stats, keys, tokens, levels, free)
            return {"loss": loss}, self.schedule.sigma(levels)
        lengths = inputs["lengths"]
        loss = count_loss(cast(Absorbing, process), stats, keys, tokens, levels, free, lengths)
        n = jnp.maximum(tokens.shape[1] if lengths is None else lengths, 1)
        return {"loss": loss}, -jnp.log1p(-(levels.astype(jnp.float32) - 0.5) / n.astype(jnp.float32))

    def levels(self, rows, key, lengths):
        return self.counts(rows, key, lengths) if self._is_paired else self.times(rows, key)

    def head_positions(self, rows, length):
        """The number of positions at which the head runs: the masked ones of antithetic pairs, or all."""
        return math.ceil(rows * (length + 1) / 2) if self._is_paired else rows * length

    @property
    def _is_paired(self) -> bool:
        return self.noise_sampling == "mask_count"

    def counts(self, rows: jax.Array, key: jax.Array, lengths: jax.Array | int) -> jax.Array:
        """Stratified mask counts, antithetic in the two rows of a pair. Int[B] -> Int[B].

        lengths: n, number of tokens of each row, Int[B] or one number for all. At level u the even row of a pair masks
        1 + floor(u n) of its n tokens, the odd row n' - floor(u n') of its n': k and L + 1 - k if both have L tokens.
        """
        # A pair masks at most L + 1 tokens: 1 + n' + floor(u n) - floor(u n'), where floor(u n) - floor(u n') is at
        # most ceil(u (n - n')) <= n - n' for n > n', and at most 0 else; so it is 1 + max(n, n') or less.
        level = self._level(rows // 2, key, self.batch_size // 2)
        lengths = jnp.maximum(lengths, 1)  # a row without tokens has no loss at any count
        below = jnp.minimum((level * lengths.astype(level.dtype)).astype(jnp.int32), lengths - 1)
        return jnp.where(rows % 2 == 0, 1 + below, lengths - below)
