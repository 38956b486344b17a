"""Text generation from a network and its parameters: the sampling loop over rows of prompts, in groups of one shape."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from tqdm import tqdm

from sedd.data.layout import Layout
from sedd.data.tokenizers import Tokenizer
from sedd.diffusion.denoiser import condition_on_mask_ratio, edited, in_block, nucleus, temperature
from sedd.diffusion.discrete.process import Absorbing
from sedd.diffusion.keyed_random import fold, root_key
from sedd.diffusion.sampling import Progress, Sampler, advance, begin
from sedd.diffusion.schedule import Schedule
from sedd.errors import UserError
from sedd.generation import prompts
from sedd.generation.prompts import Prompt, PromptBatch
from sedd.generation.samplers import SamplerContext, named_sampler
from sedd.network.network import Network
from sedd.runtime import parallel, processes
from sedd.runtime.settings import jax_defaults
from sedd.seeds import SAMPLE_LENGTHS, check_seed, philox

_WINDOWS = 2**31  # window n > 0 folds this + n into the key; the rows of window 0 fold smaller numbers
HOST_SYNCS = 32  # times that a loop of many steps returns to the host, to show progress and to be interruptible

# Called after each step. rows: Int[B], row numbers; tokens: Int[B L], -1 where there is none; given: Bool[B L];
# steps: int, the number of steps done in this block.
Watch = Callable[[np.ndarray, np.ndarray, np.ndarray, int], None]


class SamplingOptions(TypedDict, total=False):
    """Options of sampling, with their defaults."""

    steps: int  # number of steps of a sampler that is given by name; 128
    sampler: str | Sampler  # a name in `sedd.generation.samplers`, or a Sampler; "tweedie"
    temperature: float  # of the distribution over clean tokens; 1
    top_p: float  # nucleus sampling: keep the most probable tokens of this total probability; 1
    seed: int  # from 0 to 2**64 - 1; 0
    batch_size: int | None  # rows per batch, which does not change the samples; None: by size of the network
    trace: bool  # return the state after each step; False
    watch: Watch | None  # called after each step; None


@dataclasses.dataclass(frozen=True)
class Samples:
    """The result of `sample` and `infill`: N rows, with the samples of one input row adjacent.

    texts: None if the model has no tokenizer. A text ends at the first end-of-text token after the last given token,
    but an unconditional sample of packed text is the whole block. The text of a row is its first `lengths` tokens.
    """

    texts: list[str] | None
    tokens: np.ndarray  # Int32[N L]; -1 after the end of rows shorter than the longest
    lengths: np.ndarray  # Int32[N]
    given: np.ndarray  # Bool[N L]
    network_calls: int  # per row; the maximum over groups of rows
    trace: np.ndarray | None  # Int32[T N L], the state after each step; -1 where a row has no token, or none yet


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """Generates texts. layout: that of the training corpus; block_length: tokens in one call of the network."""

    network: Network
    params: dict
    schedule: Schedule
    tokenizer: Tokenizer | None
    layout: Layout
    block_length: int

    def sample(self, num_samples: int, length: int | None = None, **settings) -> Samples:
        """Samples texts of `length` tokens.

        The default is the block length, or for padded documents with ignored padding a length drawn from those of the
        training corpus. settings: `SamplingOptions`. UserError as of `generate`.
        """
        if num_samples < 1:
            raise UserError(f"the number of samples must be at least 1, not {num_samples}")
        prompts.check_size(num_samples, self.block_length if length is None else length)
        if length is not None:
            self._check_length(length)
            lengths = [length] * num_samples
        elif self.layout.masks_padding:
            counts = self.layout.row_lengths
            assert counts is not None  # set for every model trained with ignored padding
            p = np.array(counts) / sum(counts)
            lengths = philox(settings.get("seed", 0), SAMPLE_LENGTHS).choice(len(p), num_samples, p=p).tolist()
        else:
            lengths = [self.block_length] * num_samples
        return self.generate([prompts.blank(length) for length in lengths], **settings)

    @jax_defaults()
    def generate(
        self,
        rows: list[Prompt],
        steps: int = 128,
        sampler: str | Sampler = "tweedie",
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int | None = None,
        trace: bool = False,
        watch: Watch | None = None,
    ) -> Samples:
        """Samples the free positions of prompts, conditioned on the given ones.

        Rows longer than a block are sampled semi-autoregressively: each further block has its first half given.
        UserError for an invalid argument, before compilation.
        """
        if not rows:
            raise UserError("there is nothing to fill in")
        for row in rows:
            self._check_length(len(row.tokens))
        prompts.check_size(len(rows) * (steps if trace else 1), max(len(row.tokens) for row in rows))
        batch = prompts.collate(rows, self.network.process, self.block_length, self.layout)
        _check_settings(temperature, top_p, seed, batch_size)
        sampler, key = self.sampler(sampler, steps, batch), root_key(seed)
        parts = parallel.num_batch_shards(self.params)
        group = min(len(rows), batch_size or parts * self.network.rows_at_once(self.block_length))
        params, sharding = parallel.place_for_batch(self.params, group)
        group += -group % (parts if group >= parts else 1)  # the same number of rows on each device
        adjusts_logits = (temperature, top_p) if (temperature, top_p) != (1.0, 1.0) else None
        no_bar = watch is not None or not processes.is_first()
        with tqdm(desc="sampling", unit="step", delay=2, total=0, disable=no_bar) as bar:
            generator = dataclasses.replace(self, params=params)
            loop = _Loop(generator, sharding, sampler, adjusts_logits, key, trace, watch, bar)
            starts = range(0, len(rows), group)
            groups = [loop(batch, np.arange(start, start + group), len(starts)) for start in starts]
        return self._collect(groups, rows, batch)

    def check(self, steps: int = 128, sampler: str | Sampler = "tweedie", **others):
        """Raises UserError for arguments of `generate` that are invalid for any rows."""
        self.sampler(sampler, steps)
        _check_settings(**others)

    def sampler(self, sampler: str | Sampler, steps: int, batch: PromptBatch | None = None) -> Sampler:
        """Returns the sampler of a name for a batch (by default one free block), or the given Sampler itself.

        UserError if there is no such name, or if the sampler is not for the process of this model.
        """
        process = self.network.process
        if isinstance(sampler, Sampler):
            if sampler.process != process:
                raise UserError(f"the sampler is for {sampler.process}, the model for {process}")
            return sampler
        if not isinstance(sampler, str):
            raise UserError(f"a sampler is a name, or an object such as sedd.Tweedie(...), not {sampler!r}")
        if batch is None:
            batch = prompts.collate([prompts.blank(self.block_length)], process, self.block_length, self.layout)
        return named_sampler(
            sampler,
            SamplerContext(process, self.schedule, steps, *self._largest_block(batch), self._ignores_given(batch)),
        )

    def _largest_block(self, batch: PromptBatch) -> tuple[int, int, int]:
        """Returns, for the block with the most free tokens, the number of free and of given tokens, and its length."""
        largest = (0, 0, self.block_length)
        for at, free in prompts.windows_of(batch, self.block_length):
            count = free.sum(axis=1)
            row = int(np.argmax(count))
            if count[row] > largest[0]:
                given = np.sum(~free[row] & batch.within[row, at[row]])
                length = batch.lengths[row] if self.layout.masks_padding else self.block_length
                largest = int(count[row]), int(given), int(length)
        return largest

    def _ignores_given(self, batch: PromptBatch) -> bool:
        """True if there are given tokens, also those of the previous block, that the network treats as noisy."""
        if isinstance(self.network.process, Absorbing) or self.network.given_embedding:
            return False
        return bool(np.any(~batch.free & batch.within) or batch.lengths.max() > self.block_length)

    def _check_length(self, length: int):
        limit = self.block_length if self.layout.padded else None
        if length < 1 or (limit and length > limit):
            valid = f"1 to {limit} tokens, the block length: this model was trained on one padded document per block"
            raise UserError(f"cannot sample a text of {length} tokens; it must have {valid if limit else 'at least 1'}")

    def _collect(self, groups: list["_Group"], rows: list[Prompt], batch: PromptBatch) -> Samples:
        width = batch.lengths.max()
        within = batch.within[:, :width]
        tokens = np.concatenate([group.tokens for group in groups])[: len(rows), :width]
        tokens = np.where(within, tokens, -1)
        trace = None
        traces = [group.trace for group in groups if group.trace is not None]
        if traces:
            num_steps = max(map(len, traces))
            # Rows of groups that end early repeat their last state.
            states = [np.concatenate([steps, group.tokens[None]]) for steps, group in zip(traces, groups)]
            states = [state[np.minimum(np.arange(num_steps), len(state) - 1)] for state in states]
            trace = np.where(within, np.concatenate(states, axis=1)[:, : len(rows), :width], -1)
        lengths = np.array([self._length(row, ids[: len(row.tokens)]) for row, ids in zip(rows, tokens)], np.int32)
        texts = None
        if self.tokenizer is not None:
            texts = [self.tokenizer.decode(ids[:length]) for ids, length in zip(tokens, lengths)]
        given = ~batch.free[:, :width] & within
        return Samples(texts, tokens, lengths, given, max(group.calls for group in groups), trace)

    def _length(self, row: Prompt, ids: np.ndarray) -> int:
        """Returns the number of tokens in the text of a row."""
        if self.tokenizer is None or not (self.layout.padded or row.given.any()):
            return len(ids)  # an unconditional sample of packed text is the whole block
        ends = ids == self.tokenizer.end_of_text
        given = np.flatnonzero(row.given & ~ends)
        ends[: given[-1] + 1 if len(given) else 0] = False
        return int(np.argmax(ends)) if ends.any() else len(ids)


def _check_settings(temperature: float = 1.0, top_p: float = 1.0, seed: int = 0, batch_size: int | None = None):
    """Raises UserError for a value that is out of range."""
    check_seed(seed)
    if not 0 < temperature < float("inf"):
        raise UserError(f"temperature must be positive, not {temperature}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must lie in (0, 1], not {top_p}")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {batch_size}")


class _Group(NamedTuple):
    """The samples of one group of rows."""

    tokens: np.ndarray  # Int32[B L]
    calls: int
    trace: np.ndarray | None  # Int32[T B L]


class _Loop(NamedTuple):
    """Runs the sampling loop for groups of rows, window after window, and shows progress on the host."""

    generator: Generator
    sharding: Sharding | None  # of rows
    sampler: Sampler
    adjusts_logits: tuple[float, float] | None  # temperature and top_p, unless both are 1
    key: jax.Array
    trace: bool
    watch: Watch | None
    bar: tqdm

    def __call__(self, batch: PromptBatch, rows: np.ndarray, groups: int) -> _Group:
        """Samples one group. rows: Int[B], global row numbers; those past the last row are copies, as padding."""
        count, row = len(batch.tokens), rows % len(batch.tokens)
        tokens, free, lengths = (array[row] for array in batch)
        given = ~free
        windows = list(prompts.windows_of(PromptBatch(tokens, free, lengths), self.generator.block_length))
        calls = 0
        states: list[np.ndarray] = []
        for number, (at, window_free) in enumerate(windows):
            np.put_along_axis(free, at, False, axis=1)

            def full_rows(x):  # the rows with the state of this block; later blocks are masked, or -1
                state = np.where(free, self._placeholder_id, tokens)
                np.put_along_axis(state, at, x, axis=1)
                return state

            def on_step(x, steps):
                shown, width = rows < count, batch.lengths.max()
                within, state, fixed = (array[shown, :width] for array in (batch.within[row], full_rows(x), given))
                self.watch(rows[shown], np.where(within, state, -1), fixed & within, steps)

            key = fold(self.key, _WINDOWS + number) if number else self.key
            start = np.take_along_axis(tokens, at, axis=1)
            num_runs = groups * len(windows)
            state = self._run(key, start, window_free, lengths, rows, num_runs, on_step if self.watch else None)
            np.put_along_axis(tokens, at, state.x, axis=1)
            calls += int(self.sampler.calls(state.steps)) if state.steps else 0
            if self.trace:
                states += [full_rows(x) for x in state.trace[: state.steps]]
        trace = np.array(states, np.int32).reshape(-1, *tokens.shape) if self.trace else None
        return _Group(tokens, calls, trace)

    @property
    def _placeholder_id(self) -> int:
        process = self.generator.network.process
        return process.mask_id if isinstance(process, Absorbing) else -1

    def _run(self, key, tokens, free, lengths, rows, num_runs: int, on_step: Callable | None):
        """Runs all steps of one window of one group. num_runs: windows times groups, for the progress bar."""
        generator = self.generator
        valid = lengths if generator.layout.masks_padding else None
        task, state = _begin(self.sampler, self.trace, self.sharding, key, tokens, free, rows)
        adjusts = self.adjusts_logits is not None
        static = (generator.network, self.sampler, generator.block_length, adjusts, self.sharding)
        stride = 1 if on_step else -(-task.steps // HOST_SYNCS)
        self.bar.total = task.steps * num_runs
        steps, done = 0, bool(state.done)
        while not done:
            until = steps + stride
            state = _advance(*static, generator.params, task, state, until, self.adjusts_logits or (1.0, 1.0), valid)
            before, steps, done = steps, int(state.steps), bool(state.done)
            self.bar.update(steps - before)
            if on_step:
                on_step(parallel.on_host(state.x), steps)
        self.bar.update(task.steps - steps)
        return parallel.on_host(state)


@functools.partial(jax.jit, static_argnums=range(3))
def _begin(sampler, trace, sharding, key, tokens, free, rows):
    tokens, free, rows = (
        _constrain(array, sharding) for array in (jnp.asarray(tokens), jnp.asarray(free), jnp.asarray(rows))
    )
    task, state = begin(key, sampler, tokens, free, rows, trace)
    return task, _constrain_rows(state, sharding)


def _constrain_rows(state: Progress, sharding: Sharding | None) -> Progress:
    """Constrains the sharding of the rows, so that one program runs the first steps and all later ones."""
    trace = None if state.trace is None else jnp.moveaxis(_constrain(jnp.moveaxis(state.trace, 1, 0), sharding), 0, 1)
    return state._replace(x=_constrain(state.x, sharding), trace=trace)


def _constrain(array: jax.Array, sharding: Sharding | None) -> jax.Array:
    return array if sharding is None else jax.lax.with_sharding_constraint(array, sharding)


@functools.partial(jax.jit, static_argnums=range(5), donate_argnums=7)
def _advance(network, sampler, block, adjusts_logits, sharding, params, task, state, until, temperature_top_p, lengths):
    """Runs one group of rows to step `until`. Compiled once per shape; temperature and top_p are traced arguments."""
    denoiser = network.denoiser(params, lengths, ~task.free if network.given_embedding else None)
    if isinstance(network.process, Absorbing):
        denoiser = condition_on_mask_ratio(network.process, denoiser, lengths)
        if lengths is None and task.free.shape[1] < block:
            denoiser = in_block(denoiser, block, network.process.mask_id)
    if adjusts_logits:
        denoiser = edited(denoiser, lambda log_clean: temperature(log_clean, temperature_top_p[0]))
        denoiser = edited(denoiser, lambda log_clean: nucleus(log_clean, temperature_top_p[1]))
    return _constrain_rows(advance(task, state, denoiser, sampler, until), sharding)
