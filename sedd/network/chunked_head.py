"""The statistics of a head's logits without an array of all of them: chunks of the vocabulary, computed twice.

The forward pass adds up the sums of each chunk of logits and forgets it; the backward pass computes it again. Buffers
hold at most MAX_LOGITS logits: rows are taken in an inner loop, chunks of the vocabulary in an outer one, so that each
chunk of the kernel, and of its gradient, is read and written once. The idea is that of cut cross-entropy (Wijmans et
al., arXiv 2411.09009), here for the sums of any function of the logits.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sedd.diffusion.discrete.score import Columns, Sums
from sedd.network.sharding import has_mesh, num_row_shards
from sedd.runtime.parallel import BATCH_AXES, MODEL_AXIS

CHUNK = 8192  # columns at a time, at most
MAX_LOGITS = 2**23  # in a buffer


@dataclasses.dataclass(frozen=True)
class HeadColumns(Columns):
    """The logits x W + b of `features`, for the first `count` columns.

    features: Float32[B ... W]; kernel: Float32[W S]; bias: Float32[S], with S >= count. On a mesh that shards B and S,
    each device takes its own rows and columns, and the sums over columns are exchanged.
    """

    features: jax.Array
    kernel: jax.Array
    bias: jax.Array
    count: int

    def sums(self, x, x0, function=None, *numbers):
        sums = functools.partial(_sums_of_rows, function or _identity, self.count)
        sites = (self.features, x, x0, *(jnp.broadcast_to(number, x.shape) for number in numbers))
        if not self._is_split:
            return sums(False, self.kernel, self.bias, *sites)
        rows = P(BATCH_AXES)
        in_specs = (P(None, MODEL_AXIS), P(MODEL_AXIS), *[rows] * len(sites))
        split = jax.shard_map(functools.partial(sums, True), in_specs=in_specs, out_specs=rows, check_vma=False)
        return split(self.kernel, self.bias, *sites)

    @property
    def _is_split(self) -> bool:
        """True on a mesh whose shards are of equal size."""
        if not has_mesh():
            return False
        sizes = jax.sharding.get_abstract_mesh().shape
        return self.features.shape[0] % num_row_shards() == 0 and self.kernel.shape[1] % sizes[MODEL_AXIS] == 0


def _sums_of_rows(function, count, is_split, kernel, bias, features, x, x0, *numbers) -> Sums:
    """The Sums of rows of sites. is_split: the columns are those of one device along MODEL_AXIS."""
    first = jax.lax.axis_index(MODEL_AXIS) * kernel.shape[1] if is_split else 0
    flat = [leaf.ravel() for leaf in (x - first, x0 - first, *numbers)]
    here = jnp.clip(count - first, 0, kernel.shape[1])  # columns that are tokens
    sums = _sums(function, kernel, bias, here, features.reshape(-1, features.shape[-1]), *flat)
    if is_split:
        top = jax.lax.pmax(jax.lax.stop_gradient(sums.log_sum), MODEL_AXIS)
        log_sum = top + jnp.log(jax.lax.psum(jnp.exp(sums.log_sum - top), MODEL_AXIS))
        sums = Sums(log_sum, *(jax.lax.psum(leaf, MODEL_AXIS) for leaf in sums[1:]))
    return jax.tree.map(lambda leaf: leaf.reshape(x.shape), sums)


def _identity(weights, *_):
    return weights


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(function, kernel, bias, count, features, x, x0, *numbers) -> Sums:
    """The Sums of N sites over the first `count` columns, log_sum -inf where there is none.

    count: Int[]; features: Float[N W]; x, x0: Int[N]; numbers: Float[N] each.
    """
    return _forward(function, kernel, bias, count, features, x, x0, *numbers)[0]


def _forward(function, kernel, bias, count, features, x, x0, *numbers):
    chunks = _Chunks.of(kernel, bias, count, len(x))
    center = _center(function, kernel, bias, count, features, numbers)
    sites = chunks.in_rows((features, x, x0, center, *numbers))

    def chunk(state, start):
        part, offsets, columns = chunks.at(start)

        def rows(_, site):
            (features, x, x0, center, *numbers), (top, rest, total, own, target) = site
            weights = features @ part + offsets[None]
            others = columns.valid[None] & (columns.ids[None] != x[:, None])
            values = function(weights, *numbers)
            total += jnp.sum(jnp.where(others, values - center[:, None], 0.0), axis=-1)
            values = jnp.where(others, values, -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(values, axis=-1))
            base = _finite(new_top)
            rest = rest * jnp.exp(top - base) + jnp.sum(jnp.exp(values - base[:, None]), axis=-1)
            return None, (new_top, rest, total, own + columns.pick(weights, x), target + columns.pick(weights, x0))

        return jax.lax.scan(rows, None, (sites, state))[1], None

    zeros = jnp.zeros(sites[1].shape, features.dtype)
    state = (jnp.full_like(zeros, -jnp.inf), zeros, zeros, zeros, zeros)
    (top, rest, total, own, target), _ = jax.lax.scan(chunk, state, chunks.starts)
    log_sum, total, own, target = (leaf.ravel()[: len(x)] for leaf in (jnp.log(rest) + top, total, own, target))
    num_others = count - ((x >= 0) & (x < count))
    sums = Sums(log_sum, total + num_others.astype(total.dtype) * center, own, target)
    return sums, (kernel, bias, count, features, x, x0, numbers, log_sum)


def _backward(function, residuals, gradient: Sums):
    kernel, bias, count, features, x, x0, numbers, log_sum = residuals
    chunks = _Chunks.of(kernel, bias, count, len(x))
    sites = chunks.in_rows((features, x, x0, _finite(log_sum), *gradient, *numbers))

    def chunk(state, start):
        part, offsets, columns = chunks.at(start)

        def rows(of_chunk, site):
            (features, x, x0, log_sum, of_log_sum, of_total, of_own, of_target, *numbers), of_site = site
            weights = features @ part + offsets[None]
            others = columns.valid[None] & (columns.ids[None] != x[:, None])
            values, pull = jax.vjp(function, weights, *numbers)
            share = jnp.exp(jnp.where(others, values, -jnp.inf) - log_sum[:, None])
            of_values = share * of_log_sum[:, None] + of_total[:, None]
            of_weights, *of_numbers = pull(jnp.where(others, of_values, 0.0))
            of_weights += columns.put(of_own, x) + columns.put(of_target, x0)
            of_part, of_offsets = of_chunk
            of_chunk = (of_part + features.T @ of_weights, of_offsets + jnp.sum(of_weights, axis=0))
            return of_chunk, jax.tree.map(jnp.add, of_site, (of_weights @ part.T, *of_numbers))

        of_sites, of_kernel, of_bias = state
        of_chunk = (jnp.zeros_like(part), jnp.zeros_like(offsets))
        (of_part, of_offsets), of_sites = jax.lax.scan(rows, of_chunk, (sites, of_sites))
        return (of_sites, chunks.add(of_kernel, start, of_part), chunks.add(of_bias, start, of_offsets)), None

    of_sites = tuple(map(jnp.zeros_like, (sites[0], *sites[8:])))
    state = (of_sites, jnp.zeros_like(kernel), jnp.zeros_like(bias))
    (of_sites, of_kernel, of_bias), _ = jax.lax.scan(chunk, state, chunks.starts)
    of_features, *of_numbers = (leaf.reshape(-1, *leaf.shape[2:])[: len(x)] for leaf in of_sites)
    return of_kernel, of_bias, None, of_features, None, None, *of_numbers


_sums.defvjp(_forward, _backward)


class _Ids(NamedTuple):
    """The columns of a chunk. ids: Int[C]; valid: Bool[C], False beyond the tokens and where a chunk repeats some."""

    ids: jax.Array
    valid: jax.Array

    def pick(self, weights: jax.Array, tokens: jax.Array) -> jax.Array:
        """The weight of one token a site, 0 where it is in another chunk. Float[R C], Int[R] -> Float[R]."""
        return jnp.sum(jnp.where(self._is(tokens), weights, 0.0), axis=-1)

    def put(self, values: jax.Array, tokens: jax.Array) -> jax.Array:
        """The transpose of `pick`. Float[R], Int[R] -> Float[R C]."""
        return jnp.where(self._is(tokens), values[:, None], 0.0)

    def _is(self, tokens):
        return self.valid[None] & (self.ids[None] == tokens[:, None])


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """How columns and sites are cut: `columns` and `rows` at a time. The last chunk of columns begins earlier."""

    kernel: jax.Array
    bias: jax.Array
    count: jax.Array
    columns: int
    rows: int

    @classmethod
    def of(cls, kernel, bias, count, sites: int) -> "_Chunks":
        stored = kernel.shape[1]
        columns = -(-stored // -(-stored // CHUNK))  # of equal size
        return cls(kernel, bias, count, columns, max(1, min(sites, MAX_LOGITS // columns)))

    @property
    def starts(self) -> jax.Array:
        return jnp.arange(0, self.kernel.shape[1], self.columns)

    def at(self, start: jax.Array) -> tuple[jax.Array, jax.Array, _Ids]:
        """A chunk of the kernel, Float[W C], of the bias, Float[C], and its columns."""
        first = self._first(start)
        ids = first + jnp.arange(self.columns)
        part = jax.lax.dynamic_slice_in_dim(self.kernel, first, self.columns, axis=1)
        offsets = jax.lax.dynamic_slice_in_dim(self.bias, first, self.columns)
        return part, offsets, _Ids(ids, (ids >= start) & (ids < self.count))

    def add(self, whole: jax.Array, start: jax.Array, part: jax.Array) -> jax.Array:
        """Adds the chunk that begins at `start` to an array of all columns, [... S]."""
        first, axis = self._first(start), whole.ndim - 1
        there = jax.lax.dynamic_slice_in_dim(whole, first, self.columns, axis)
        return jax.lax.dynamic_update_slice_in_dim(whole, there + part, first, axis)

    def in_rows(self, leaves: tuple) -> tuple:
        """Arrays of N sites in blocks, the last one filled up with zeros. [N ...] -> [N/rows rows ...]."""

        def one(leaf):
            padded = jnp.pad(leaf, [(0, -len(leaf) % self.rows), *[(0, 0)] * (leaf.ndim - 1)])
            return padded.reshape(-1, self.rows, *leaf.shape[1:])

        return tuple(map(one, leaves))

    def _first(self, start):
        return jnp.minimum(start, self.kernel.shape[1] - self.columns)


def _finite(log_sum: jax.Array) -> jax.Array:
    """0 in the place of -inf, the log of an empty sum."""
    return jnp.where(jnp.isfinite(log_sum), log_sum, 0.0)


def _center(function, kernel, bias, count, features, numbers) -> jax.Array:
    """The value at the mean weight of each site, Float[N]: sums about it lose little to rounding."""
    valid = jnp.arange(kernel.shape[1]) < count
    share = jnp.where(valid, 1 / jnp.maximum(count, 1), 0.0).astype(kernel.dtype)
    mean = features @ (kernel @ share) + bias @ share
    return jax.lax.stop_gradient(function(mean[:, None], *numbers)[:, 0])
