"""Text generation by a trained model: rows of prompts in, samples out."""

import dataclasses

import numpy as np
from tqdm import tqdm

from sedd.diffusion.sampling import Sampler
from sedd.errors import UserError
from sedd.generation import prompts
from sedd.generation.loop import Group, Loop
from sedd.generation.options import SamplingOptions
from sedd.generation.rows import Row, Rows, check_size, collate, windows_of
from sedd.generation.samplers import SamplerContext, named_sampler
from sedd.runtime import parallel, processes
from sedd.runtime.settings import jax_defaults
from sedd.seeds import SAMPLE_LENGTHS, philox
from sedd.trained import Trained


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


def sample(
    trained: Trained, num_samples: int, length: int | None = None, options: SamplingOptions = SamplingOptions()
) -> Samples:
    """Samples texts of `length` tokens.

    The default is the block length, or for padded documents with ignored padding a length drawn from those of the
    training corpus. UserError as of `generate`.
    """
    if num_samples < 1:
        raise UserError(f"the number of samples must be at least 1, not {num_samples}")
    check_size(num_samples, trained.block_length if length is None else length)
    if length is None and trained.layout.masks_padding:
        counts = trained.layout.row_lengths
        assert counts is not None  # set for every model trained with ignored padding
        p = np.array(counts) / sum(counts)
        lengths = philox(options.seed, SAMPLE_LENGTHS).choice(len(p), num_samples, p=p).tolist()
    else:
        length = trained.block_length if length is None else length
        _check_length(trained, length)
        lengths = [length] * num_samples
    return generate(trained, [prompts.blank(length) for length in lengths], options)


@jax_defaults()
def generate(trained: Trained, rows: list[Row], options: SamplingOptions = SamplingOptions()) -> Samples:
    """Samples the free positions of prompts, conditioned on the given ones.

    Rows longer than a block are sampled semi-autoregressively: each further block has its first half given, or all but
    `options.stride` tokens. UserError for an invalid argument, before compilation.
    """
    if not rows:
        raise UserError("there is nothing to fill in")
    for row in rows:
        _check_length(trained, len(row.tokens))
    check_size(len(rows) * (options.steps if options.trace else 1), max(len(row.tokens) for row in rows))
    _check_options(trained, options)
    batch = collate(rows, trained)
    _check_given(trained, batch)
    sampler = sampler_for(trained, options, batch)
    parts = parallel.num_batch_shards(trained.all_params)
    size = min(len(rows), options.batch_size or parts * trained.rows_at_once)
    params, sharding = parallel.place_for_batch(trained.all_params, size)
    size += -size % (parts if size >= parts else 1)  # the same number of rows on each device
    no_bar = options.watch is not None or not processes.is_first()
    with tqdm(desc="sampling", unit="step", delay=2, total=0, disable=no_bar) as bar:
        loop = Loop(trained.placed(params), sampler, options, sharding, bar)
        starts = range(0, len(rows), size)
        groups = [loop(batch, np.arange(start, start + size), len(starts)) for start in starts]
    return _collect(trained, groups, rows, batch)


def sampler_for(trained: Trained, options: SamplingOptions, batch: Rows | None = None) -> Sampler:
    """Returns the sampler of the options for a batch, by default one free block.

    UserError if there is no sampler of that name, or if it is not for the process of the model.
    """
    process, sampler, block = trained.process, options.sampler, trained.network.block_of_generation
    if isinstance(sampler, Sampler):
        if sampler.process != process:
            raise UserError(f"the sampler is for {sampler.process}, the model for {process}")
        try:
            return sampler if block is None else sampler.in_blocks(block)
        except ValueError as error:
            raise UserError(f"this model generates blocks of {block} tokens from left to right: {error}") from None
    if batch is None:
        batch = collate([prompts.blank(trained.block_length)], trained)
    largest, ignored = _largest_block(trained, batch, options.stride), _ignores_given(trained, batch)
    return named_sampler(sampler, SamplerContext(process, trained.schedule, options.steps, *largest, ignored, block))


def _largest_block(trained: Trained, batch: Rows, stride: int | None = None) -> tuple[int, int, int]:
    """Returns, for the block with the most free tokens, the number of free and of given tokens, and its length."""
    block = trained.network.block_of_generation
    if block is not None:
        return block, 0, block
    largest = (0, 0, trained.block_length)
    for at, free in windows_of(batch, trained.block_length, stride):
        count = free.sum(axis=1)
        row = int(np.argmax(count))
        if count[row] > largest[0]:
            given = np.sum(~free[row] & batch.within[row, at[row]])
            length = batch.lengths[row] if trained.layout.masks_padding else trained.block_length
            largest = int(count[row]), int(given), int(length)
    return largest


def _ignores_given(trained: Trained, batch: Rows) -> bool:
    """True if there are given tokens, also those of the previous block, that the network treats as noisy."""
    if trained.process.mask_id is not None or trained.network.given_embedding:
        return False
    return _has_given(trained, batch)


def _has_given(trained: Trained, batch: Rows) -> bool:
    """True if there are given tokens, also those of the previous block."""
    return bool(np.any(~batch.free & batch.within) or batch.lengths.max() > trained.block_length)


def _check_given(trained: Trained, batch: Rows):
    """UserError for given tokens that the network cannot take account of."""
    if not trained.network.infills and _has_given(trained, batch):
        raise UserError(
            "this model cannot fill in text, nor continue after a block: the encoding of a given token depends on the "
            "tokens that are to be filled in; take a model of tokens or of their embeddings"
        )
    size = trained.network.block_of_generation
    if size is not None:
        block, given = np.arange(batch.free.shape[1])[None] // size, ~batch.free & batch.within
        last_given = np.max(np.where(given, block, -1), axis=1)
        first_free = np.min(np.where(batch.free, block, block.size), axis=1)
        if np.any(last_given > first_free):
            one_by_one = "token after token" if size == 1 else f"blocks of {size} tokens one after the other"
            raise UserError(
                f"this model generates {one_by_one}, so that it cannot fill in what comes before given tokens; give a "
                "prefix only, or take a model with network.block_size=0"
            )


def _check_options(trained: Trained, options: SamplingOptions):
    network, multiple = trained.network, trained.network.block_of_generation or 1
    if options.stride is not None and (options.stride > trained.block_length or options.stride % multiple):
        of_blocks = f", and a multiple of {multiple}" if multiple > 1 else ""
        raise UserError(
            f"stride must be at most the block length, {trained.block_length}{of_blocks}, not {options.stride}"
        )
    if options.adjusts_logits and not network.has_logits:
        raise UserError("this model predicts latents, which have no temperature or top_p; leave them out")
    if options.round_below and not trained.process.over_latents:
        raise UserError("round_below is for models with Gaussian noise, which have latents to round; leave it out")
    if options.round_below and network.self_conditioned:
        raise UserError(
            "round_below does not go with a model that was trained with network.self_conditioning: its last "
            "answer is an input, in training never rounded; leave it out"
        )


def _check_length(trained: Trained, length: int):
    limit = trained.block_length if trained.layout.padded else None
    if length < 1 or (limit and length > limit):
        valid = f"1 to {limit} tokens, the block length: this model was trained on one padded document per block"
        raise UserError(f"cannot sample a text of {length} tokens; it must have {valid if limit else 'at least 1'}")


def _collect(trained: Trained, groups: list[Group], rows: list[Row], batch: Rows) -> Samples:
    """Joins the samples of all groups, without the copies that fill the last one."""
    width = batch.lengths.max()
    within = batch.within[:, :width]
    tokens = np.where(within, np.concatenate([group.tokens for group in groups])[: len(rows), :width], -1)
    lengths = [_text_length(trained, row, ids[: len(row.tokens)]) for row, ids in zip(rows, tokens)]
    texts = None
    if trained.tokenizer is not None:
        texts = [trained.tokenizer.decode(ids[:length]) for ids, length in zip(tokens, lengths)]
    trace = _joined_trace(groups)
    trace = None if trace is None else np.where(within, trace[:, : len(rows), :width], -1)
    given, calls = ~batch.free[:, :width] & within, max(group.calls for group in groups)
    return Samples(texts, tokens, np.array(lengths, np.int32), given, calls, trace)


def _joined_trace(groups: list[Group]) -> np.ndarray | None:
    """Returns the traces of all groups side by side, Int32[T N L]; those that end early repeat their last state."""
    traces = [(group.trace, group.tokens) for group in groups if group.trace is not None]
    if not traces:
        return None
    num_steps = max(len(trace) for trace, _ in traces)
    states = [np.concatenate([trace, last[None]]) for trace, last in traces]
    return np.concatenate([state[np.minimum(np.arange(num_steps), len(state) - 1)] for state in states], axis=1)


def _text_length(trained: Trained, row: Row, ids: np.ndarray) -> int:
    """Returns the number of tokens in the text of a row, whose tokens after sampling are `ids`."""
    if trained.tokenizer is None or not (trained.layout.padded or not row.free.all()):
        return len(ids)  # an unconditional sample of packed text is the whole block
    ends = ids == trained.tokenizer.end_of_text
    given = np.flatnonzero(~row.free & ~ends)
    opening = int(np.argmax(row.free | ~ends))  # given ends of text in front, such as that of the text before
    ends[: max(opening, given[-1] + 1 if len(given) else 0)] = False
    return int(np.argmax(ends)) if ends.any() else len(ids)
