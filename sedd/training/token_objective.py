"""What the objectives over tokens have in common: the noise levels, the given tokens and the keys of each row.

The training loop holds no key. The key of a step is folded with the global index of each row; all random numbers of the
row (noise level within its stratum, corruption, given tokens, dropout) are drawn from the result, so that they are
independent of devices and accumulation.
"""

import abc
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sedd.data.batches import Batch
from sedd.diffusion import keyed_random
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
class TokenObjective(abc.ABC):
    """A loss of each token of a batch of `batch_size` rows, at a noise level of each row.

    The optimiser minimises the sum over the scored positions, averaged over rows of any length. With
    `network.given_embedding` the tokens of `random_given` are clean, marked and not scored: the loss is that of the
    others given them. min_time: the smallest time of the schedule that is drawn.
    """

    network: Network
    schedule: Schedule
    batch_size: int
    min_time: float = 1e-3
    trains_network = True  # else only networks beside it, a codec's
    trains_codec = True

    def init(self, key: jax.Array) -> dict:
        """Returns the initial parameters of the network."""
        return self.network.init(key)

    def __call__(self, params: dict, batch: Batch, rows: jax.Array, key: jax.Array) -> Losses:
        """Returns the losses of the rows. Tokens after the end of a row are neither attended to nor scored."""
        tokens, lengths = jax.tree.map(jnp.asarray, batch)
        keys = keyed_random.row_keys(key, rows)
        noise, dropout = keyed_random.fold(keys, _NOISE), keyed_random.fold(keys, _DROPOUT)
        free, given = self.free_and_given(rows, key, tokens.shape[1], lengths)
        levels = self.levels(rows, key, tokens.shape[1], lengths)
        inputs = dict(keys=dropout, lengths=lengths, given=given)
        terms, sigma = self.losses(params, tokens, levels, noise, free, inputs, key)
        terms = {name: jnp.sum(term, axis=-1) for name, term in terms.items()}
        count = jnp.full(len(rows), tokens.shape[1]) if free is None else jnp.sum(free, axis=-1)
        return Losses(functools.reduce(jnp.add, terms.values()), count, sigma, terms if len(terms) > 1 else {})

    @abc.abstractmethod
    def losses(
        self,
        params: dict,
        tokens: jax.Array,
        levels: jax.Array,
        keys: jax.Array,
        free: jax.Array | None,
        inputs: dict,
        key: jax.Array,
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """Returns the terms of the loss of each token by name, Float[B L], and the noise level of each row, Float[B].

        tokens: Int[B L]; levels: [B], of `levels`; keys: Key[B], of the corruption; free: Bool[B L], as of
        `free_and_given`; inputs: the arguments keys, lengths and given of the network's `stats`; key: of the step.
        """

    def levels(self, rows: jax.Array, key: jax.Array, length: int, lengths: jax.Array | None = None) -> jax.Array:
        """The noise of each row of `length` positions: stratified times. lengths: numbers of tokens, Int[B]."""
        return self.times(rows, key)

    def head_positions(self, rows: int, length: int) -> int:
        """The number of positions at which the head runs."""
        return rows * length

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

    def times(self, rows: jax.Array, key: jax.Array, blocks: int = 1) -> jax.Array:
        """Stratified times, Int[...] -> Float[...] in [min_time, 1]. blocks: of a row, if `rows` numbers blocks."""
        return self.min_time + (1 - self.min_time) * self._level(rows, key, self.batch_size * blocks)

    def _level(self, index, key, count):
        """A uniform draw from the stratum of each index, of `count` strata of [0, 1). Int[...] -> Float[...]."""
        keys = keyed_random.row_keys(key, jnp.ravel(index))
        within = keyed_random.uniform(keyed_random.fold(keys, _LEVEL)).reshape(jnp.shape(index))
        return (jnp.asarray(strata(count), within.dtype)[index] + within) / count
