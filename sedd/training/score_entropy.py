"""The objective of the SEDD paper: the score entropy of each row of a global batch, and its noise levels.

The training loop holds no key. The key of a step is folded with the global index of each row; all random numbers of the
row (noise level within its stratum, corruption, given tokens, dropout) are drawn from the result, so that they are
independent of devices and accumulation.
"""

import dataclasses
import math
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sedd.data.batches import Batch
from sedd.diffusion import keyed_random
from sedd.diffusion.discrete.loss import count_loss, denoising_loss
from sedd.diffusion.discrete.process import Absorbing
from sedd.diffusion.schedule import Schedule
from sedd.network.network import Network
from sedd.training.objective import Losses

_LEVEL, _NOISE, _DROPOUT, _GIVEN = range(4)  # folded into the keys of the rows


def strata(count: int) -> np.ndarray:
    """The stratum of each of `count` examples: the rank of its bit-reversed index. Int[count].

    Any contiguous slice of the batch, of a device or a microbatch, then spans all noise levels.
    """
    bits = max(1, (count - 1).bit_length())
    reversed_bits = [int(f"{i:0{bits}b}"[::-1], 2) for i in range(count)]
    return np.argsort(np.argsort(reversed_bits))


def random_given(keys: jax.Array, valid: jax.Array) -> jax.Array:
    """Draws the given tokens of each row, on which the network is conditioned. Key[B], Bool[B L] -> Bool[B L].

    valid: the valid tokens, which precede the others. In half of the rows no token is given: that trains the
    unconditional model, which evaluation scores. In a quarter a share, uniform on [0, 1), of the n valid tokens is
    given, at random positions. In a quarter all but a span of 1 .. n tokens are given, each length equally likely; the
    span starts the text in a quarter of those rows, ends it in a quarter, and lies anywhere in the others, so that a
    suffix, a prefix or both are given. At least one valid token of each row is free.
    """
    kind, share, place = (keyed_random.uniform(keyed_random.fold(keys, number))[:, None] for number in range(3))
    n, position = jnp.sum(valid, axis=-1, keepdims=True), jnp.arange(valid.shape[-1])[None]
    count = jnp.minimum((share * n.astype(share.dtype)).astype(jnp.int32), n - 1)  # share * n can be rounded to n
    scattered = keyed_random.ranks(keyed_random.fold(keys, 3), valid) < count
    begin = jnp.round(jnp.clip(2 * place - 0.5, 0, 1) * count.astype(place.dtype)).astype(jnp.int32)
    around = (position < begin) | (position >= begin + n - count)
    return valid & (kind >= 0.5) & jnp.where(kind < 0.75, scattered, around)


@dataclasses.dataclass(frozen=True)
class ScoreEntropy:
    """The paper's loss: the score entropy summed over positions, for each row of a batch of `batch_size` rows.

    noise_sampling: "time": times stratified over [min_time, 1] (SEDD, algorithm 1); "mask_count": antithetic pairs, in
    which rows 2i and 2i + 1 mask k and L + 1 - k tokens, so that the head runs at L + 1 positions per pair.
    The optimiser minimises the sum over the scored positions, averaged over rows of any length. With
    `network.given_embedding` the tokens of `random_given` are clean, marked and not scored: the loss is an upper bound
    on the negative log-likelihood of the others given them.
    """

    network: Network
    schedule: Schedule
    batch_size: int
    noise_sampling: str = "time"
    min_time: float = 1e-3

    def init(self, key: jax.Array) -> dict:
        """Returns the initial parameters of the network."""
        return self.network.init(key)

    def __call__(self, params: dict, batch: Batch, rows: jax.Array, key: jax.Array) -> Losses:
        """Returns the losses of the rows. Tokens after the end of a row are neither attended to nor scored."""
        tokens, lengths = jax.tree.map(jnp.asarray, batch)
        keys = keyed_random.row_keys(key, rows)
        dropout = keyed_random.fold(keys, _DROPOUT)
        free, given = self.free_and_given(rows, key, tokens.shape[1], lengths)
        stats = self.network.stats(params, dropout, lengths=lengths, given=given, masked_pairs=self._is_paired)
        noise, process = keyed_random.fold(keys, _NOISE), self.network.process
        if self._is_paired:
            n = jnp.maximum(tokens.shape[1] if lengths is None else lengths, 1)
            counts = self.counts(rows, key, n)
            loss = count_loss(cast(Absorbing, process), stats, noise, tokens, counts, free, lengths)
            sigma = -jnp.log1p(-(counts.astype(jnp.float32) - 0.5) / n.astype(jnp.float32))
        else:
            times = self.times(rows, key)
            loss = denoising_loss(process, self.schedule, stats, noise, tokens, times, free)
            sigma = self.schedule.sigma(times)
        count = jnp.full(len(rows), tokens.shape[1]) if free is None else jnp.sum(free, axis=-1)
        return Losses(jnp.sum(loss, axis=-1), count, sigma, {})

    def head_positions(self, rows: int, length: int) -> int:
        """The number of positions at which the head runs: the masked ones of antithetic pairs, or all."""
        return math.ceil(rows * (length + 1) / 2) if self._is_paired else rows * length

    @property
    def _is_paired(self) -> bool:
        return self.noise_sampling == "mask_count"

    def free_and_given(
        self, rows: jax.Array, key: jax.Array, length: int, lengths: jax.Array | np.ndarray | None = None
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """Returns the tokens of each row that are corrupted and scored, and those that are given. Bool[B L] each.

        rows: Int[B]; lengths: Int[B]. None in place of the first: all are scored; of the second: none is given, and the
        network has no embedding of given tokens.
        """
        valid = None if lengths is None else jnp.arange(length)[None] < lengths[:, None]
        if not self.network.given_embedding:
            return valid, None
        valid = jnp.ones((len(rows), length), bool) if valid is None else valid
        given = random_given(keyed_random.fold(keyed_random.row_keys(key, rows), _GIVEN), valid)
        return valid & ~given, given

    def times(self, rows: jax.Array, key: jax.Array) -> jax.Array:
        """Stratified times. Int[B] -> Float[B] in [min_time, 1]."""
        return self.min_time + (1 - self.min_time) * self._level(rows, key, self.batch_size)

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

    def _level(self, index, key, count):
        """A uniform draw from the stratum of each index, of `count` strata of [0, 1). Int[B] -> Float[B]."""
        within = keyed_random.uniform(keyed_random.fold(keyed_random.row_keys(key, index), _LEVEL))
        return (jnp.asarray(strata(count), within.dtype)[index] + within) / count


def score_entropy(config: ConfigDict, network: Network, schedule: Schedule) -> ScoreEntropy:
    """Returns the objective that the group `training` of a config describes."""
    training = config.training
    return ScoreEntropy(network, schedule, training.batch_size, training.noise_sampling, training.min_time)
