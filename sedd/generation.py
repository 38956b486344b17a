"""Texts from a network and its parameters: rows of prompts through the one sampling loop, in groups of one shape."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from tqdm import tqdm

from sedd import prompts
from sedd.data.layout import Layout
from sedd.data.splits import philox
from sedd.data.tokenizers import Tokenizer
from sedd.diffusion.process import Absorbing, Process
from sedd.diffusion.reveal import Adaptive, Entropy, Margin
from sedd.diffusion.samplers import Euler, Sampler, Tweedie, sample
from sedd.diffusion.schedule import Schedule
from sedd.diffusion.score import edited, in_block, nucleus, temperature, told_share
from sedd.errors import UserError
from sedd.network.network import Network
from sedd.prompts import Prompt


def _adaptive(picker):
    """Reveals as many tokens a call as it takes to be done after so many steps."""
    return lambda process, _, steps, tokens: Adaptive(process, picker(-(-tokens // steps)))


# By name: from the process, its schedule, the number of steps, and the most tokens that a row has to be filled with.
SAMPLERS: dict[str, Callable[[Process, Schedule, int, int], Sampler]] = {
    "euler": lambda process, schedule, steps, _: Euler(process, schedule, steps),
    "tweedie": lambda process, schedule, steps, _: Tweedie(process, schedule, steps),
    "margin": _adaptive(Margin),
    "entropy": _adaptive(Entropy),
}
REVEALING = ("margin", "entropy")  # those that need masks


@dataclasses.dataclass(frozen=True)
class Samples:
    """What `sample` and `infill` return: N rows, the samples of a row of input adjacent.

    texts: None where the model has no tokenizer. Of a model of padded documents a text ends at the first end-of-text
    token after the last given one; `tokens` has them all, the first `lengths` of a row are the text.
    """

    texts: list[str] | None
    tokens: np.ndarray  # Int32[N L]; -1 after the end of rows shorter than the longest
    lengths: np.ndarray  # Int32[N]
    network_calls: int  # of each row; the most that any group of rows took
    trace: np.ndarray | None  # Int32[T N L], the state after each of the T calls; rows that end early repeat their last


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
        if length is not None:
            lengths = [length] * num_samples
        elif self.layout.binds_lengths:
            share = np.array(self.layout.row_lengths) / sum(self.layout.row_lengths)
            lengths = philox(settings.get("seed", 0), 2).choice(len(share), num_samples, p=share).tolist()
        else:
            lengths = [self.block_length] * num_samples
        return self.draw([prompts.blank(length) for length in lengths], **settings)

    def draw(
        self,
        rows: list[Prompt],
        steps: int = 128,
        sampler: str | Sampler = "tweedie",
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int | None = None,
        trace: bool = False,
    ) -> Samples:
        """Draws the free positions of prompts given the others. UserError, before any compilation, for a mistake."""
        blanks = [int(np.sum(~row.given)) for row in rows]
        sampler = self.sampler(sampler, steps, max(1, *blanks))
        if not temperature > 0:
            raise UserError(f"temperature must be positive, not {temperature}")
        if not 0 < top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1], not {top_p}")
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
        for row in rows:
            self._check_length(len(row.tokens))
        tokens, free, lengths = prompts.laid_out(rows, self.network.process, self.block_length, self.layout)
        group = min(len(rows), batch_size or self.network.rows_at_once(self.block_length))
        reshaped = (temperature, top_p) != (1.0, 1.0)
        run = functools.partial(_sample, self.network, sampler, self.block_length, reshaped, trace, self.params)
        run = functools.partial(run, jax.random.key(seed), temperature, top_p)
        drawn = []
        starts = range(0, len(rows), group)
        for start in tqdm(starts, desc="sampling", unit="batch", delay=2, disable=len(starts) == 1):
            at = np.arange(start, start + group)
            row = at % len(rows)  # one shape for all; what is over is dropped
            bound = lengths[row] if self.layout.binds_lengths else None
            drawn.append(jax.device_get(run(tokens[row], free[row], bound, at)))
        return self._collected(drawn, rows, lengths, trace)

    def _check_length(self, length: int):
        if not 1 <= length <= self.block_length:
            raise UserError(
                f"a text of {length} tokens cannot be drawn; it must have from 1 to the model's block of "
                f"{self.block_length}"
            )

    def sampler(self, sampler: str | Sampler, steps: int, tokens: int | None = None) -> Sampler:
        """The sampler of a name, to fill in at most so many tokens of a row (a block); or the one told.

        UserError if there is none of that name, or it is not for this model's process.
        """
        process = self.network.process
        if isinstance(sampler, Sampler):
            if sampler.process != process:
                raise UserError(f"the sampler is for {sampler.process}, the model for {process}")
            return sampler
        if sampler not in SAMPLERS:
            raise UserError(f"there is no sampler {sampler!r}; there are {', '.join(SAMPLERS)}")
        if steps < 1:
            raise UserError(f"steps must be at least 1, not {steps}")
        if sampler in REVEALING and not isinstance(process, Absorbing):
            others = ", ".join(name for name in SAMPLERS if name not in REVEALING)
            raise UserError(f"the sampler {sampler} reveals masks, and the model's process has none; use {others}")
        return SAMPLERS[sampler](process, self.schedule, steps, tokens or self.block_length)

    def _collected(self, drawn, rows: list[Prompt], lengths: np.ndarray, trace: bool) -> Samples:
        calls = int(max(group.calls for group in drawn))
        width = lengths.max()
        beyond = np.arange(width) >= lengths[:, None]
        tokens = np.concatenate([group.tokens for group in drawn])[: len(rows), :width]
        tokens = np.where(beyond, -1, tokens)
        states = None
        if trace:
            states = np.concatenate([group.trace[:calls] for group in drawn], axis=1)[:, : len(rows), :width]
            states = np.where(beyond, -1, states)
        kept = np.array([self._length(row, ids[: len(row.tokens)]) for row, ids in zip(rows, tokens)], np.int32)
        texts = None
        if self.tokenizer is not None:
            texts = [self.tokenizer.decode(ids[:length]) for ids, length in zip(tokens, kept)]
        return Samples(texts, tokens, kept, calls, states)

    def _length(self, row: Prompt, ids: np.ndarray) -> int:
        """How many tokens the text of a row has."""
        if self.tokenizer is None or not self.layout.padded:
            return len(ids)
        ends = ids == self.tokenizer.end_of_text
        given = np.flatnonzero(row.given & ~ends)
        ends[: given[-1] + 1 if len(given) else 0] = False
        return int(np.argmax(ends)) if ends.any() else len(ids)


@functools.partial(jax.jit, static_argnums=range(5))
def _sample(network, sampler, block, reshaped, trace, params, key, heat, top_p, tokens, free, lengths, rows):
    """One group of rows. Compiled once a shape; heat and top_p are arguments, `reshaped` says whether they matter."""
    denoiser = network.denoiser(params, lengths)
    if isinstance(sampler, Adaptive):
        denoiser = told_share(network.process, denoiser, lengths)
    if lengths is None and tokens.shape[1] < block:
        denoiser = in_block(denoiser, block, network.process.mask)
    if reshaped:
        denoiser = edited(denoiser, lambda log_clean: temperature(log_clean, heat))
        denoiser = edited(denoiser, lambda log_clean: nucleus(log_clean, top_p))
    return sample(key, denoiser, sampler, tokens, free, rows, trace)
