"""Conditional log-likelihood of an answer given a context: exact where that is affordable, else a bound.

The distribution is that of infilling the answer with the context clamped. For a learned model it differs slightly from
Bayes' conditional of the joint distribution. An absorbing model is conditioned on every token that is not masked. A
uniform model has such a conditional, and a bound on it, if it was trained with a flag on given tokens
(`network.given_embedding`): the context is clean and flagged, the answer is corrupted and scored. Without the flag it
treats the context as noise, and has no bound.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sedd.data.layout import Layout
from sedd.data.tokenizers import Ends, Tokenizer
from sedd.diffusion import keyed_random
from sedd.diffusion.discrete.exact_likelihood import importance_bound, order_log_likelihoods, subset_log_likelihood
from sedd.diffusion.discrete.likelihood import count_draws, level_draws
from sedd.diffusion.discrete.pickers import Entropy, Margin
from sedd.diffusion.discrete.process import Absorbing, Process
from sedd.diffusion.discrete.unmasking import Adaptive
from sedd.diffusion.schedule import Schedule
from sedd.errors import UserError
from sedd.evaluation.scoring import sigma_limits
from sedd.evaluation.text import encode
from sedd.network.network import Network
from sedd.runtime.settings import jax_defaults
from sedd.seeds import check_seed

METHODS = ("auto", "exact", "bound", "orders", "margin", "entropy")
MAX_EXACT_TOKENS = 12  # 4095 network rows
_PICKERS = {"margin": Margin(), "entropy": Entropy()}
_REPLICATE = 4  # draws of the bound in a replicate, stratified together; the spread of replicates gives the error


@dataclasses.dataclass(frozen=True)
class LogLikelihood:
    """log p(answer | given) in nats. standard_error: of the estimator; None for an exact value.

    method: the estimator, and with it the decoding order whose likelihood this is. "exact": of decoding one token at a
    time in random order; "bound", "orders": lower bounds on that; "margin", "entropy": exact, of decoding the most
    certain position first; "levels": a lower bound for a uniform model. is_bound: True for the lower bounds.
    """

    nats: float
    standard_error: float | None
    method: str
    is_bound: bool


@dataclasses.dataclass(frozen=True)
class Answers:
    """Rows to score, one block each. Masked positions that are not free are unknown and stay masked."""

    tokens: np.ndarray  # Int32[A L]
    free: np.ndarray  # Bool[A L], True at the tokens of the answer
    lengths: np.ndarray | None  # Int32[A], of each row; None for an absorbing network that takes no lengths


def answers_to(
    given: str, texts: Sequence[str], tokenizer: Tokenizer, process: Process, block_length: int, layout: Layout
) -> Answers:
    """Returns one row for each text: the context `given`, the text, and unknown positions up to the block length.

    For a network that takes lengths, the row ends with the text. The answer's tokens are those of given + text after
    the prefix that they share with those of `given` alone. UserError for no texts, for an empty text, and where context
    and text take more tokens than a block.
    """
    if not texts:
        raise UserError("there are no answers to score")
    mask = process.mask_id if isinstance(process, Absorbing) else None
    context = encode(given, tokenizer, "the given text", Ends(closes=False)) if given else np.zeros(0, np.int32)
    shape = (len(texts), block_length)
    tokens, free = np.full(shape, 0 if mask is None else mask, np.int32), np.zeros(shape, bool)
    lengths = np.zeros(len(texts), np.int32)
    for number, text in enumerate(texts):
        if not text:
            raise UserError("an answer is empty; there is nothing to score")
        ids = encode(given + text, tokenizer, "an answer")
        lengths[number] = len(ids) + layout.masks_padding
        if lengths[number] > block_length:
            raise UserError(
                f"given and answer take {lengths[number]} tokens, more than the model's block of {block_length}; "
                "shorten the given text"
            )
        shared = min(len(context), len(ids))
        prefix = int(np.argmin(np.append(context[:shared] == ids[:shared], False)))
        if prefix == len(ids):
            raise UserError(f"the answer {text!r} adds no token to the given text; there is nothing to score")
        tokens[number, : len(ids)] = ids
        stop = lengths[number] if mask is None else len(ids)  # a uniform model also scores the end of text
        free[number, prefix:stop] = True
        if layout.masks_padding:
            assert tokenizer.end_of_text is not None  # every padded corpus has one
            tokens[number, len(ids) :] = tokenizer.end_of_text
    return Answers(tokens, free, lengths if mask is None or layout.masks_padding else None)


@jax_defaults()
def log_likelihoods(
    network: Network,
    schedule: Schedule,
    params: dict,
    answers: Answers,
    method: str = "auto",
    num_draws: int = 64,
    seed: int = 0,
) -> list[LogLikelihood]:
    """Returns the log-likelihood of each answer given the other tokens of its row.

    Answers share their noise, which reduces the variance of their differences. method: one of METHODS; "auto" is
    "exact" where that takes at most 4 `num_draws` network rows for every answer (8 tokens at 64 draws), else "bound"
    for all, since exact values and bounds are not comparable. num_draws: network rows of "bound", orders of "orders".
    UserError, before any compilation, for invalid arguments.
    """
    seed, counts = check_seed(seed), answers.free.sum(axis=1)
    if method not in METHODS:
        raise UserError(f"there is no method {method!r}; there are {', '.join(METHODS)}")
    if num_draws < 2 * _REPLICATE or num_draws % _REPLICATE:
        raise UserError(f"draws must be a multiple of {_REPLICATE}, and at least {2 * _REPLICATE}, not {num_draws}")
    if not isinstance(network.process, Absorbing):
        return _uniform(network, schedule, params, answers, method, num_draws, seed)
    if method == "exact" and counts.max() > MAX_EXACT_TOKENS:
        raise UserError(
            f"an answer of {counts.max()} tokens takes 2^{counts.max()} network rows to score exactly; "
            f"at most {MAX_EXACT_TOKENS} tokens are allowed; use method='bound', or 'margin'"
        )
    if method == "auto":
        affordable = counts.max() <= MAX_EXACT_TOKENS and 2 ** counts.max() - 1 <= 4 * num_draws
        method = "exact" if affordable else "bound"
    if method == "exact":
        exact = (_exact(network, params, answers, number) for number in range(len(counts)))
        return [LogLikelihood(nats, None, "exact", False) for nats in exact]
    rows = (keyed_random.root_key(seed), answers.tokens, answers.free, answers.lengths)
    return _absorbing(network, params, rows, method, num_draws)


def _exact(network, params, answers: Answers, number: int) -> float:
    length = None if answers.lengths is None else answers.lengths[number]
    positions = np.flatnonzero(answers.free[number])
    return float(_subsets(network, params, answers.tokens[number], positions, length))


@functools.partial(jax.jit, static_argnums=0)
def _subsets(network, params, tokens, positions, length):
    denoiser = network.denoiser(params, None if length is None else length[None])
    return subset_log_likelihood(network.process, denoiser, tokens, positions, lengths=length)


def _absorbing(network, params, rows, method, num_draws) -> list[LogLikelihood]:
    """An absorbing model's, of all answers in groups of rows."""
    key, tokens, free, lengths = rows
    if method in _PICKERS:
        run = functools.partial(_adaptive, network, Adaptive(network.process, _PICKERS[method]), params)
        exact = _in_groups(run, network.rows_at_once(tokens.shape[1]), tokens, free, lengths)
        return [LogLikelihood(float(nats), None, method, False) for nats in exact]
    if method == "orders":
        logs = np.asarray(_orders(network, num_draws, params, *rows), np.float64)
        return [LogLikelihood(*_importance(row), "orders", True) for row in logs]
    run = functools.partial(_count_replicates, network, params, key)
    return [_mean(row, "bound") for row in _replicated(run, network, num_draws, tokens, free, lengths)]


def _replicated(run, network, num_draws, *arrays) -> np.ndarray:
    """Replicates of the bound of each answer, with the same noise for all answers: Float64[A R], nats."""
    answers, repeats = len(arrays[0]), num_draws // _REPLICATE
    rows = [None if array is None else np.repeat(array, repeats, axis=0) for array in arrays]
    rows.append(np.tile(np.arange(repeats), answers))
    replicates = _in_groups(run, network.rows_at_once(arrays[0].shape[1]), *rows)
    return replicates.astype(np.float64).reshape(answers, repeats)


def _in_groups(run, size: int, *arrays) -> np.ndarray:
    """run(*arrays) in groups of `size` rows, all of one shape: the last group wraps around to the first rows."""
    num_rows = len(arrays[0])
    size, results = min(size, num_rows), []
    for start in range(0, num_rows, size):
        at = np.arange(start, start + size) % num_rows
        results.append(np.asarray(run(*(None if array is None else array[at] for array in arrays))))
    return np.concatenate(results)[:num_rows]


def _mean(replicates: np.ndarray, method: str) -> LogLikelihood:
    """The mean of independent replicates of a bound, Float64[R] in nats, and its standard error."""
    error = replicates.std(ddof=1) / math.sqrt(len(replicates))
    return LogLikelihood(-float(replicates.mean()), float(error), method, True)


def _importance(logs: np.ndarray) -> tuple[float, float]:
    """The importance-weighted bound of K orders, and its standard error by the delta method. Float64[K], nats."""
    weights = np.exp(logs - logs.max())
    with jax.enable_x64(True):
        bound = float(importance_bound(jnp.asarray(logs)))
    return bound, float(weights.std(ddof=1) / weights.mean() / math.sqrt(len(logs)))


@functools.partial(jax.jit, static_argnums=0)
def _count_replicates(network, params, key, tokens, free, lengths, replicates):
    """One replicate of each row's bound by mask counts, nats. replicates: Int[B], their indices -> Float[B]."""
    unnormalised = network.prediction == "score"
    pair_lengths = None if lengths is None else jnp.repeat(lengths, 2)
    stats = network.stats(params, lengths=pair_lengths, masked_pairs=True, tightened=unnormalised)
    keys = keyed_random.row_keys(key, replicates)
    draws = count_draws(network.process, stats, keys, tokens, _REPLICATE, free, lengths)
    tightened = draws.diffusion[:, -1] if unnormalised else draws.diffusion  # the scores of the other methods
    return tightened.mean(axis=0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _orders(network, num_orders, params, key, tokens, free, lengths):
    """log p along each of `num_orders` random orders, the same orders for every answer. Float[A K]."""
    keys = keyed_random.row_keys(key, jnp.arange(num_orders))

    def along_orders(answer):
        row, row_free, length = answer
        rows = (jnp.broadcast_to(leaf, (num_orders, *leaf.shape)) for leaf in (row, row_free))
        lengths = None if length is None else jnp.broadcast_to(length, num_orders)
        return order_log_likelihoods(network.process, network.denoiser(params, lengths), keys, *rows, lengths)

    return jax.lax.map(along_orders, (tokens, free, lengths))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _adaptive(network, sampler, params, tokens, free, lengths):
    return sampler.log_likelihood(network.denoiser(params, lengths), tokens, free, lengths)


def _uniform(network, schedule, params, answers: Answers, method, num_draws, seed) -> list[LogLikelihood]:
    """A uniform model's bound: without a context, or with flags of the given tokens."""
    assert answers.lengths is not None  # `answers_to` sets them for a uniform process
    in_row = np.arange(answers.tokens.shape[1]) < answers.lengths[:, None]
    if not network.given_embedding and not np.array_equal(answers.free, in_row):
        raise UserError(
            "this model is of the uniform process and was trained without flags of the given tokens, so it has no "
            "likelihood given a context; leave given= out, or train an absorbing model, or one with "
            "network.given_embedding=True"
        )
    if method not in ("auto", "bound"):
        raise UserError(f"method={method!r} is for the absorbing process; a uniform model has 'bound'")
    limits = sigma_limits(network, schedule)
    run = functools.partial(_level_replicates, network, *limits, params, keyed_random.root_key(seed))
    rows = (answers.tokens, answers.free, answers.lengths)
    return [_mean(row, "levels") for row in _replicated(run, network, num_draws, *rows)]


@functools.partial(jax.jit, static_argnums=range(3))
def _level_replicates(network, low, high, params, key, tokens, free, lengths, replicates):
    """One replicate of each row's bound by noise levels, nats. replicates: Int[B], their indices -> Float[B]."""
    keys = keyed_random.row_keys(key, replicates)
    given = (jnp.arange(tokens.shape[1]) < lengths[:, None]) & ~free if network.given_embedding else None
    unnormalised = network.prediction == "score"
    stats = network.stats(params, lengths=lengths, given=given, tightened=unnormalised)
    draws = level_draws(network.process, stats, keys, tokens, _REPLICATE, low, high, free)
    terms = draws.diffusion + draws.reconstruction
    prior = network.process.prior_divergence(high) * jnp.sum(free, axis=-1)
    return prior + (terms[:, -1] if unnormalised else terms).mean(axis=0)
