"""Texts from a network and its parameters: rows of prompts through the one sampling loop, in groups of one shape."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from tqdm import tqdm

from sedd import parallel, prompts
from sedd.data.layout import Layout
from sedd.data.splits import philox
from sedd.data.tokenizers import Tokenizer
from sedd.diffusion.keyed_random import fold, root_key
from sedd.diffusion.process import Absorbing
from sedd.diffusion.samplers import Sampler, State, advance, begin
from sedd.diffusion.schedule import Schedule
from sedd.diffusion.score import condition_on_mask_ratio, edited, in_block, nucleus, temperature
from sedd.errors import UserError
from sedd.network.network import Network
from sedd.prompts import Prompt, PromptBatch
from sedd.runtime import processes
from sedd.runtime.settings import jax_defaults
from sedd.samplers import SamplerContext, named_sampler
from sedd.seeds import check_seed

_WINDOWS = 2**31  # later windows fold this, and their number, into the key; the rows of the first fold smaller ones
HOST_SYNCS = 32  # how often a loop of many steps returns to the host, which shows how far it is and can be interrupted

# (rows: Int[B], their numbers; tokens: Int[B L], -1 where there is none; given: Bool[B L]; steps: int, of this block),
# after each step.
Watch = Callable[[np.ndarray, np.ndarray, np.ndarray, int], None]


class SamplingOptions(TypedDict, total=False):
    """How texts are drawn; all may be left out."""

    steps: int  # of the sampler, if that is a name; 128
    sampler: str | Sampler  # a name of `sedd.samplers`, or one of your own; "tweedie"
    temperature: float  # of the law over clean tokens; 1
    top_p: float  # keep the likeliest tokens of this mass; 1
    seed: int  # 0
    batch_size: int | None  # rows at a time, which changes no sample
    trace: bool  # keep the states on the way
    watch: Watch | None  # called after each step


@dataclasses.dataclass(frozen=True)
class Samples:
    """What `sample` and `infill` return: N rows, the samples of a row of input adjacent.

    texts: None where the model has no tokenizer. A text ends at the first end-of-text token after the last given one,
    but a sample of packed text shows all that is in its block. tokens: all, the first `lengths` of a row are the text.
    """

    texts: list[str] | None
    tokens: np.ndarray  # Int32[N L]; -1 after the end of rows shorter than the longest
    lengths: np.ndarray  # Int32[N]
    given: np.ndarray  # Bool[N L]
    network_calls: int  # of each row; the most that any group of rows took
    trace: np.ndarray | None  # Int32[T N L], the state after each step; -1 where there is none yet, or none at all


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """All that texts are drawn with. layout: that of the corpus that the network was trained on."""

    network: Network
    params: dict
    schedule: Schedule
    tokenizer: Tokenizer | None
    layout: Layout
    block_length: int

    def sample(self, num_samples: int, length: int | None = None, **settings) -> Samples:
        """Draws texts of `length` tokens; by default a block, or where padding is ignored as long as documents are."""
        if num_samples < 1:
            raise UserError(f"the number of samples must be at least 1, not {num_samples}")
        prompts.check_size(num_samples, self.block_length if length is None else length)
        if length is not None:
            self._check_length(length)
            lengths = [length] * num_samples
        elif self.layout.masks_padding:
            share = np.array(self.layout.row_lengths) / sum(self.layout.row_lengths)
            lengths = philox(settings.get("seed", 0), 2).choice(len(share), num_samples, p=share).tolist()
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
        """Draws the free positions of prompts given the others. UserError, before any compilation, for a mistake.

        Rows longer than a block are drawn semi-autoregressively: a block, then the next with its first half given.
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
        params, where = parallel.place_for_batch(self.params, group)
        group += -group % (parts if group >= parts else 1)  # each device takes as many rows
        adjusts_logits = (temperature, top_p) if (temperature, top_p) != (1.0, 1.0) else None
        hidden = watch is not None or not processes.is_first()
        with tqdm(desc="sampling", unit="step", delay=2, total=0, disable=hidden) as bar:
            generator = dataclasses.replace(self, params=params)
            loop = _Loop(generator, where, sampler, adjusts_logits, key, trace, watch, bar)
            starts = range(0, len(rows), group)
            drawn = [loop(batch, np.arange(start, start + group), len(starts)) for start in starts]
        return self._collected(drawn, rows, batch)

    def check(self, steps: int = 128, sampler: str | Sampler = "tweedie", **others):
        """UserError for settings, as those of `draw`, with which nothing can be drawn, whatever the rows."""
        self.sampler(sampler, steps)
        _check_settings(**others)

    def sampler(self, sampler: str | Sampler, steps: int, batch: PromptBatch | None = None) -> Sampler:
        """The sampler of a name, made for the rows told (a free block), or the one that is told.

        UserError if there is none of that name, or it is not for this model's process.
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
        """Of the block with the most to be filled in: how many tokens, how many are known in it, and its length."""
        most = (0, 0, self.block_length)
        for at, free in prompts.windows_of(batch, self.block_length):
            count = free.sum(axis=1)
            row = int(np.argmax(count))
            if count[row] > most[0]:
                known = np.sum(~free[row] & batch.within[row, at[row]])
                length = batch.lengths[row] if self.layout.masks_padding else self.block_length
                most = int(count[row]), int(known), int(length)
        return most

    def _ignores_given(self, batch: PromptBatch) -> bool:
        """Whether the network will take given tokens, or those of the block before, for noisy ones."""
        if isinstance(self.network.process, Absorbing) or self.network.given_embedding:
            return False
        return bool(np.any(~batch.free & batch.within) or batch.lengths.max() > self.block_length)

    def _check_length(self, length: int):
        most = self.block_length if self.layout.padded else None
        if length < 1 or (most and length > most):
            bound = f"from 1 to the {most} of a block, for this model knows documents in blocks of their own"
            raise UserError(
                f"a text of {length} tokens cannot be drawn; it must have {bound if most else 'at least 1'}"
            )

    def _collected(self, drawn: list["_Group"], rows: list[Prompt], batch: PromptBatch) -> Samples:
        width = batch.lengths.max()
        within = batch.within[:, :width]
        tokens = np.concatenate([group.tokens for group in drawn])[: len(rows), :width]
        tokens = np.where(within, tokens, -1)
        trace = None
        if drawn[0].trace is not None:
            most = max(len(group.trace) for group in drawn)
            # Rows of groups that end early repeat their last state.
            states = [np.concatenate([group.trace, group.tokens[None]]) for group in drawn]
            states = [state[np.minimum(np.arange(most), len(state) - 1)] for state in states]
            trace = np.where(within, np.concatenate(states, axis=1)[:, : len(rows), :width], -1)
        kept = np.array([self._length(row, ids[: len(row.tokens)]) for row, ids in zip(rows, tokens)], np.int32)
        texts = None
        if self.tokenizer is not None:
            texts = [self.tokenizer.decode(ids[:length]) for ids, length in zip(tokens, kept)]
        given = ~batch.free[:, :width] & within
        return Samples(texts, tokens, kept, given, max(group.calls for group in drawn), trace)

    def _length(self, row: Prompt, ids: np.ndarray) -> int:
        """How many tokens the text of a row has."""
        if self.tokenizer is None or not (self.layout.padded or row.given.any()):
            return len(ids)  # a sample of packed text shows all that is in its block
        ends = ids == self.tokenizer.end_of_text
        given = np.flatnonzero(row.given & ~ends)
        ends[: given[-1] + 1 if len(given) else 0] = False
        return int(np.argmax(ends)) if ends.any() else len(ids)


def _check_settings(temperature: float = 1.0, top_p: float = 1.0, seed: int = 0, batch_size: int | None = None):
    """UserError where one of these is out of range."""
    check_seed(seed)
    if not 0 < temperature < float("inf"):
        raise UserError(f"temperature must be positive, not {temperature}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must lie in (0, 1], not {top_p}")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {batch_size}")


class _Group(NamedTuple):
    """A group of rows, done."""

    tokens: np.ndarray  # Int32[B L]
    calls: int
    trace: np.ndarray | None  # Int32[T B L]


class _Loop(NamedTuple):
    """Runs the sampling loop for groups of rows, window after window, and shows on the host how far it is."""

    generator: Generator
    where: Sharding | None  # of rows
    sampler: Sampler
    adjusts_logits: tuple[float, float] | None  # temperature and top_p, where they change anything
    key: jax.Array
    trace: bool
    watch: Watch | None
    bar: tqdm

    def __call__(self, batch: PromptBatch, rows: np.ndarray, groups: int) -> _Group:
        """rows: Int[B], global numbers; those beyond the last row are copies that fill up the group's one shape."""
        count, row = len(batch.tokens), rows % len(batch.tokens)
        tokens, free, lengths = (array[row] for array in batch)
        given, windows = (
            ~free,
            list(prompts.windows_of(PromptBatch(tokens, free, lengths), self.generator.block_length)),
        )
        calls, traces = 0, []
        for number, (at, here) in enumerate(windows):
            np.put_along_axis(free, at, False, axis=1)

            def full_rows(x):  # the rows with this block's state; what is not begun has no token, or is masked
                state = np.where(free, self._placeholder_id, tokens)
                np.put_along_axis(state, at, x, axis=1)
                return state

            def on_step(x, steps):
                shown, width = rows < count, batch.lengths.max()
                within, state, known = (array[shown, :width] for array in (batch.within[row], full_rows(x), given))
                self.watch(rows[shown], np.where(within, state, -1), known & within, steps)

            key = fold(self.key, _WINDOWS + number) if number else self.key
            start = np.take_along_axis(tokens, at, axis=1)
            state = self._run(key, start, here, lengths, rows, groups * len(windows), on_step if self.watch else None)
            np.put_along_axis(tokens, at, state.tokens, axis=1)
            calls += int(self.sampler.calls(state.steps)) if state.steps else 0
            if self.trace:
                traces += [full_rows(x) for x in state.trace[: state.steps]]
        traces = np.array(traces, np.int32).reshape(-1, *tokens.shape) if self.trace else None
        return _Group(tokens, calls, traces)

    @property
    def _placeholder_id(self) -> int:
        process = self.generator.network.process
        return process.mask if isinstance(process, Absorbing) else -1

    def _run(self, key, tokens, free, lengths, rows, runs: int, on_step: Callable | None):
        """One window of one group, from its first step to its last."""
        generator = self.generator
        bound = lengths if generator.layout.masks_padding else None
        task, state = _begin(self.sampler, self.trace, self.where, key, tokens, free, rows)
        fixed = (generator.network, self.sampler, generator.block_length, self.adjusts_logits is not None, self.where)
        stride = 1 if on_step else -(-task.steps // HOST_SYNCS)
        self.bar.total = task.steps * runs
        steps, done = 0, bool(state.done)
        while not done:
            until = steps + stride
            state = _advance(*fixed, generator.params, task, state, until, self.adjusts_logits or (1.0, 1.0), bound)
            before, steps, done = steps, *map(int, (state.steps, state.done))
            self.bar.update(steps - before)
            if on_step:
                on_step(parallel.on_host(state.tokens), steps)
        self.bar.update(task.steps - steps)
        return parallel.on_host(state)


@functools.partial(jax.jit, static_argnums=range(3))
def _begin(sampler, trace, where, key, tokens, free, rows):
    tokens, free, rows = (
        _constrain(array, where) for array in (jnp.asarray(tokens), jnp.asarray(free), jnp.asarray(rows))
    )
    task, state = begin(key, sampler, tokens, free, rows, trace)
    return task, _constrain_rows(state, where)


def _constrain_rows(state: State, where: Sharding | None) -> State:
    """The state with its rows where they are to be: so it is the same program for the first step and the next ones."""
    trace = None if state.trace is None else jnp.moveaxis(_constrain(jnp.moveaxis(state.trace, 1, 0), where), 0, 1)
    return state._replace(tokens=_constrain(state.tokens, where), trace=trace)


def _constrain(array: jax.Array, where: Sharding | None) -> jax.Array:
    return array if where is None else jax.lax.with_sharding_constraint(array, where)


@functools.partial(jax.jit, static_argnums=range(5), donate_argnums=7)
def _advance(network, sampler, block, adjusts_logits, where, params, task, state, until, temperature_top_p, lengths):
    """Some steps of one group of rows. Compiled once a shape; `reshaped` says whether heat, an argument, matters."""
    denoiser = network.denoiser(params, lengths, ~task.free if network.given_embedding else None)
    if isinstance(network.process, Absorbing):
        denoiser = condition_on_mask_ratio(network.process, denoiser, lengths)
        if lengths is None and task.tokens.shape[1] < block:
            denoiser = in_block(denoiser, block, network.process.mask)
    if adjusts_logits:
        denoiser = edited(denoiser, lambda log_clean: temperature(log_clean, temperature_top_p[0]))
        denoiser = edited(denoiser, lambda log_clean: nucleus(log_clean, temperature_top_p[1]))
    return _constrain_rows(advance(task, state, denoiser, sampler, until), where)
