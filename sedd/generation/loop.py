"""The sampling loop over rows on devices: groups of rows of one shape, window after window, with progress on the host.

The programs are jitted with the network, the sampler and the shapes as static arguments; parameters, prompts,
temperature and top_p are traced.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from tqdm import tqdm

from sedd.diffusion.denoiser import condition_on_mask_ratio, edited, in_block, nucleus, temperature
from sedd.diffusion.keyed_random import fold, root_key
from sedd.diffusion.sampling import Progress, Sampler, advance, begin
from sedd.generation.options import SamplingOptions
from sedd.generation.rows import Rows, windows_of
from sedd.network.network import Network
from sedd.runtime import parallel
from sedd.trained import Trained

_WINDOWS = 2**31  # window n > 0 folds this + n into the key; the rows of window 0 fold smaller numbers
HOST_SYNCS = 32  # times that a loop of many steps returns to the host, to show progress and to be interruptible


class Group(NamedTuple):
    """The samples of one group of rows."""

    tokens: np.ndarray  # Int32[B L]
    calls: int
    trace: np.ndarray | None  # Int32[T B L]


@dataclasses.dataclass(frozen=True)
class Loop:
    """Samples groups of rows. sharding: of the rows of a group; bar: shows the steps of all groups."""

    trained: Trained
    sampler: Sampler
    options: SamplingOptions
    sharding: Sharding | None
    bar: tqdm

    def __call__(self, rows: Rows, numbers: np.ndarray, num_groups: int) -> Group:
        """Samples one group. numbers: Int[B], of the rows; those past the last row are copies, as padding."""
        count = len(rows.tokens)
        group = rows.take(numbers % count)
        full_rows = _FullRows(group, self.trained.process.mask_id)
        trained, stride = self.trained, self.options.stride
        windows = list(windows_of(group, trained.block_length, stride, trained.network.block_of_generation or 1))
        calls, states = 0, []
        for number, (at, free) in enumerate(windows):
            full_rows.begin(at)
            on_step = self._watcher(full_rows, at, group, numbers, rows) if self.options.watch else None
            start = (self._key(number), np.take_along_axis(full_rows.tokens, at, axis=1), free, numbers)
            end = self._run(start, group.lengths, num_groups * len(windows), on_step)
            calls += int(self.sampler.calls(end.steps)) if end.steps else 0
            if self.options.trace:
                states += [full_rows.with_state(at, x) for x in end.trace[: end.steps]]
            full_rows.write(at, end.x)
        trace = np.array(states, np.int32).reshape(-1, *full_rows.tokens.shape) if self.options.trace else None
        return Group(full_rows.tokens, calls, trace)

    def _key(self, window: int) -> jax.Array:
        key = root_key(self.options.seed)
        return fold(key, _WINDOWS + window) if window else key

    def _watcher(
        self, full_rows: "_FullRows", at: np.ndarray, group: Rows, numbers: np.ndarray, rows: Rows
    ) -> Callable:
        """The function that passes the state of a window, Int32[B L], and the number of steps to `options.watch`."""
        shown, width, watch = numbers < len(rows.tokens), rows.lengths.max(), self.options.watch
        assert watch is not None

        def on_step(x, steps):
            arrays = (group.within, ~group.free, full_rows.with_state(at, x))
            within, given, tokens = (array[shown, :width] for array in arrays)
            watch(numbers[shown], np.where(within, tokens, -1), given & within, steps)

        return on_step

    def _run(self, start: tuple, lengths: np.ndarray, num_runs: int, on_step: Callable | None) -> Any:
        """Runs all steps of one window of one group. Returns its last Progress, on the host.

        start: the last arguments of `_begin`; num_runs: windows times groups, for the progress bar.
        """
        trained, options = self.trained, self.options
        task, progress = _begin(trained.network, self.sampler, options.trace, self.sharding, trained.all_params, *start)
        static = (trained.network, self.sampler, trained.block_length, options.adjusts_logits, options.round_below)
        traced = (options.temperature, options.top_p), lengths if trained.layout.masks_padding else None
        stride = 1 if on_step else -(-task.steps // HOST_SYNCS)
        self.bar.total = task.steps * num_runs
        steps, done = 0, bool(progress.done)
        while not done:
            progress = _advance(*static, self.sharding, trained.all_params, task, progress, steps + stride, *traced)
            before, steps, done = steps, int(progress.steps), bool(progress.done)
            self.bar.update(steps - before)
            if on_step:
                on_step(parallel.on_host(self._shown(progress)), steps)
        self.bar.update(task.steps - steps)
        return parallel.on_host(progress._replace(x=self._shown(progress)))

    def _shown(self, progress: Progress) -> jax.Array:
        """The tokens that the state of a window shows, Int32[B W]."""
        return _shown(self.trained.network, self.sharding, self.trained.all_params, progress.x)


class _FullRows:
    """The full rows of a group while their windows are sampled, one after the other."""

    def __init__(self, rows: Rows, mask_id: int | None):
        self.tokens = rows.tokens.copy()
        self._later = rows.free.copy()  # free positions of later windows
        self._placeholder = -1 if mask_id is None else mask_id  # shown there

    def begin(self, at: np.ndarray):
        """Begins the window with these positions, Int[B W]."""
        np.put_along_axis(self._later, at, False, axis=1)

    def with_state(self, at: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Returns the rows with the state x of the window, Int32[B W] -> Int32[B L]."""
        shown = np.where(self._later, self._placeholder, self.tokens)
        np.put_along_axis(shown, at, x, axis=1)
        return shown

    def write(self, at: np.ndarray, x: np.ndarray):
        """Writes the samples of the window, Int32[B W]."""
        np.put_along_axis(self.tokens, at, x, axis=1)


@functools.partial(jax.jit, static_argnums=range(4))
def _begin(network, sampler, trace, sharding, params, key, tokens, free, rows):
    """The task and the first Progress of a window. tokens: Int[B L]; free: Bool[B L]; rows: Int[B], global numbers."""
    tokens, free, rows = (_constrain(jnp.asarray(array), sharding) for array in (tokens, free, rows))
    task, progress = begin(key, sampler, network.clean(params, tokens), free, rows, trace)
    return task, _constrain_rows(progress, sharding)


@functools.partial(jax.jit, static_argnums=range(2))
def _shown(network, sharding, params, x):
    return _constrain(network.shown(params, x), sharding)


@functools.partial(jax.jit, static_argnums=range(6), donate_argnums=8)
def _advance(
    network,
    sampler,
    block,
    adjusts_logits,
    round_below,
    sharding,
    params,
    task,
    progress,
    until,
    temperature_top_p,
    lengths,
):
    """Runs one group of rows to step `until`. Compiled once per shape; temperature and top_p are traced arguments."""
    denoiser = _denoiser(network, params, block, task.free, lengths)
    if adjusts_logits:
        denoiser = edited(denoiser, lambda log_clean: temperature(log_clean, temperature_top_p[0]))
        denoiser = edited(denoiser, lambda log_clean: nucleus(log_clean, temperature_top_p[1]))
    shown = functools.partial(network.shown, params)
    denoiser = network.for_sampler(params, denoiser, round_below)
    return _constrain_rows(advance(task, progress, denoiser, sampler, until, shown), sharding)


def _denoiser(network: Network, params: dict, block: int, free: jax.Array, lengths: jax.Array | None):
    """The Denoiser of rows with these free positions, Bool[B L], in blocks of `block` positions. lengths: Int[B]."""
    process = network.process
    denoiser = network.denoiser(params, lengths, ~free if network.given_embedding else None)
    if process.mask_id is None:
        return denoiser
    denoiser = condition_on_mask_ratio(process, denoiser, lengths)
    shorter = lengths is None and free.shape[1] < block
    return in_block(denoiser, block, process.mask_id) if shorter else denoiser


def _constrain_rows(progress: Progress, sharding: Sharding | None) -> Progress:
    """Constrains the sharding of the rows, so that one program runs the first steps and all later ones."""
    trace = progress.trace
    if trace is not None:
        trace = jnp.moveaxis(_constrain(jnp.moveaxis(trace, 1, 0), sharding), 0, 1)
    x = jax.tree.map(lambda leaf: _constrain(leaf, sharding), progress.x)
    return progress._replace(x=x, trace=trace)


def _constrain(array: jax.Array, sharding: Sharding | None) -> jax.Array:
    return array if sharding is None else jax.lax.with_sharding_constraint(array, sharding)
