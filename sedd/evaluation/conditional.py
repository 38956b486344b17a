"""The log-likelihood of some tokens given others: exact where that is affordable, else a bound with its error.

What is bounded, or computed, is the law of filling in the answer with the context clamped, which for a learned model is
not quite Bayes' conditional of its joint distribution. Under the absorbing process the network is conditioned on every
token that is not masked. A uniform model has such a conditional, and a bound on it, where it was trained with a flag on
given tokens (`network.given_embedding`): the context is clean and flagged, the answer is corrupted and scored. Without
the flag it takes the context for noise, and has no bound.
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
from sedd.diffusion.exact_likelihood import importance_bound, order_log_likelihoods, subset_log_likelihood
from sedd.diffusion.likelihood import count_draws, level_draws
from sedd.diffusion.pickers import Entropy, Margin
from sedd.diffusion.process import Absorbing, Process
from sedd.diffusion.schedule import Schedule
from sedd.diffusion.unmasking import Adaptive
from sedd.errors import UserError
from sedd.evaluation.scoring import sigma_limits
from sedd.evaluation.text import encoded
from sedd.network.network import Network
from sedd.runtime.settings import jax_defaults
from sedd.seeds import check_seed

METHODS = ("auto", "exact", "bound", "orders", "margin", "entropy")
MOST_EXACT = 12  # tokens: 4095 network rows
_PICKERS = {"margin": Margin(), "entropy": Entropy()}
_REPLICATE = 4  # draws of the bound that are stratified among themselves; the spread of such replicates is the error


@dataclasses.dataclass(frozen=True)
class LogLikelihood:
    """log p(answer | given) in nats. standard_error: of the estimator; None where it is exact.

    method: how it was found, and so of which way to decode it is the likelihood: "exact" and "bound" and "orders" of
    random order, one token at a time, the first exactly, the others from below; "margin" and "entropy" exactly, of
    decoding the most certain position first. "levels": a bound from below of a uniform model's.
    """

    nats: float
    standard_error: float | None
    method: str
    is_bound: bool


@dataclasses.dataclass(frozen=True)
class Answers:
    """Rows to be scored, whole blocks: what stands masked and is not free is unknown, and stays so."""

    tokens: np.ndarray  # Int32[A L]
    free: np.ndarray  # Bool[A L], the tokens of the answer
    lengths: np.ndarray | None  # Int32[A], where the network is told them


def answers_to(
    given: str, texts: Sequence[str], tokenizer: Tokenizer, process: Process, block_length: int, layout: Layout
) -> Answers:
    """Each text after what is given, in a block of which the rest is unknown; where lengths are told, it ends there.

    The answer's tokens are those of given + text beyond what they share with those of `given` alone. UserError for an
    empty text, or where both take more tokens than a block.
    """
    if not texts:
        raise UserError("there are no answers to score")
    masks = isinstance(process, Absorbing)
    context = encoded(given, tokenizer, "what is given", Ends(closes=False)) if given else np.zeros(0, np.int32)
    shape = (len(texts), block_length)
    tokens, free = np.full(shape, process.mask if masks else 0, np.int32), np.zeros(shape, bool)
    lengths = np.zeros(len(texts), np.int32)
    for number, text in enumerate(texts):
        if not text:
            raise UserError("an answer is empty; there is nothing to score")
        ids = encoded(given + text, tokenizer, "an answer")
        lengths[number] = len(ids) + layout.masks_padding
        if lengths[number] > block_length:
            raise UserError(
                f"given and answer take {lengths[number]} tokens, more than the model's block of {block_length}; "
                "shorten what is given"
            )
        shared = min(len(context), len(ids))
        known = int(np.argmin(np.append(context[:shared] == ids[:shared], False)))
        if known == len(ids):
            raise UserError(f"the answer {text!r} adds no token to what is given; there is nothing to score")
        tokens[number, : len(ids)] = ids
        free[number, known : len(ids) if masks else lengths[number]] = True  # a uniform model scores the end it is told
        if layout.masks_padding:
            tokens[number, len(ids) :] = tokenizer.end_of_text
    return Answers(tokens, free, None if masks and not layout.masks_padding else lengths)


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
    """Of each answer given its other tokens. Answers share their noise, so that their differences have less.

    method: one of METHODS; "auto" is "exact" where that takes at most 4 `num_draws` network rows for any answer (8
    tokens at 64), and else "bound" for all: a bound and what it bounds cannot be compared. num_draws: network rows of
    "bound", orders of "orders". UserError, before any compilation.
    """
    seed, counts = check_seed(seed), answers.free.sum(axis=1)
    if method not in METHODS:
        raise UserError(f"there is no method {method!r}; there are {', '.join(METHODS)}")
    if num_draws < 2 * _REPLICATE or num_draws % _REPLICATE:
        raise UserError(f"draws must be a multiple of {_REPLICATE}, and at least {2 * _REPLICATE}, not {num_draws}")
    if not isinstance(network.process, Absorbing):
        return _uniform(network, schedule, params, answers, method, num_draws, seed)
    if method == "exact" and counts.max() > MOST_EXACT:
        raise UserError(
            f"an answer of {counts.max()} tokens takes 2^{counts.max()} network rows to score exactly; at most "
            f"{MOST_EXACT} tokens can be; use method='bound', or 'margin'"
        )
    if method == "auto":
        affordable = counts.max() <= MOST_EXACT and 2 ** counts.max() - 1 <= 4 * num_draws
        method = "exact" if affordable else "bound"
    if method == "exact":
        found = (_exact(network, params, answers, number) for number in range(len(counts)))
        return [LogLikelihood(nats, None, "exact", False) for nats in found]
    rows = (keyed_random.root_key(seed), answers.tokens, answers.free, answers.lengths)
    return _together(network, params, rows, method, num_draws)


def _exact(network, params, answers: Answers, number: int) -> float:
    length = None if answers.lengths is None else answers.lengths[number]
    positions = np.flatnonzero(answers.free[number])
    return float(_subsets(network, params, answers.tokens[number], positions, length))


@functools.partial(jax.jit, static_argnums=0)
def _subsets(network, params, tokens, positions, length):
    denoiser = network.denoiser(params, None if length is None else length[None])
    return subset_log_likelihood(network.process, denoiser, tokens, positions, lengths=length)


def _together(network, params, rows, method, num_draws) -> list[LogLikelihood]:
    """Of all answers, in groups of rows."""
    key, tokens, free, lengths = rows
    if method in _PICKERS:
        run = functools.partial(_adaptive, network, Adaptive(network.process, _PICKERS[method]), params)
        found = _in_groups(run, network.rows_at_once(tokens.shape[1]), tokens, free, lengths)
        return [LogLikelihood(float(nats), None, method, False) for nats in found]
    if method == "orders":
        logs = np.asarray(_orders(network, num_draws, params, *rows), np.float64)
        return [LogLikelihood(*_importance(row), "orders", True) for row in logs]
    run = functools.partial(_counted, network, params, key)
    return [_mean(row, "bound") for row in _replicated(run, network, num_draws, tokens, free, lengths)]


def _replicated(run, network, num_draws, *arrays) -> np.ndarray:
    """Replicates of the bound of each answer, their noise the same for all answers: Float64[A R], nats."""
    answers, repeats = len(arrays[0]), num_draws // _REPLICATE
    rows = [None if array is None else np.repeat(array, repeats, axis=0) for array in arrays]
    rows.append(np.tile(np.arange(repeats), answers))
    found = _in_groups(run, network.rows_at_once(arrays[0].shape[1]), *rows)
    return found.astype(np.float64).reshape(answers, repeats)


def _in_groups(run, size: int, *arrays) -> np.ndarray:
    """run(*arrays) for so many rows at a time, all groups of one shape."""
    number = len(arrays[0])
    size, found = min(size, number), []
    for start in range(0, number, size):
        at = np.arange(start, start + size) % number
        found.append(np.asarray(run(*(None if array is None else array[at] for array in arrays))))
    return np.concatenate(found)[:number]


def _mean(replicates: np.ndarray, method: str) -> LogLikelihood:
    """The bound from independent replicates of it, in nats. Float64[R]."""
    error = replicates.std(ddof=1) / math.sqrt(len(replicates))
    return LogLikelihood(-float(replicates.mean()), float(error), method, True)


def _importance(logs: np.ndarray) -> tuple[float, float]:
    """The bound of K orders and the error of its logarithm, by the delta method. Float64[K]."""
    weights = np.exp(logs - logs.max())
    with jax.enable_x64(True):
        bound = float(importance_bound(jnp.asarray(logs)))
    return bound, float(weights.std(ddof=1) / weights.mean() / math.sqrt(len(logs)))


@functools.partial(jax.jit, static_argnums=0)
def _counted(network, params, key, tokens, free, lengths, replicates):
    """A replicate of each row's bound by counts, in nats. replicates: Int[B], their numbers. Float[B]."""
    told = None if lengths is None else jnp.repeat(lengths, 2)
    free_scores = network.prediction == "score"
    stats = network.stats(params, lengths=told, masked_pairs=True, tightened=free_scores)
    found = count_draws(
        network.process, stats, keyed_random.row_keys(key, replicates), tokens, _REPLICATE, free, lengths
    )
    tightened = found.diffusion[:, -1] if free_scores else found.diffusion  # as the other methods read free scores
    return tightened.mean(axis=0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _orders(network, num_orders, params, key, tokens, free, lengths):
    """log p along each of so many random orders. Float[A K]."""
    keys = keyed_random.row_keys(key, jnp.arange(num_orders))

    def of(answer):
        row, mine, length = answer
        rows = (jnp.broadcast_to(leaf, (num_orders, *leaf.shape)) for leaf in (row, mine))
        lengths = None if length is None else jnp.broadcast_to(length, num_orders)
        return order_log_likelihoods(network.process, network.denoiser(params, lengths), keys, *rows, lengths)

    return jax.lax.map(of, (tokens, free, lengths))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _adaptive(network, sampler, params, tokens, free, lengths):
    return sampler.log_likelihood(network.denoiser(params, lengths), tokens, free, lengths)


def _uniform(network, schedule, params, answers: Answers, method, num_draws, seed) -> list[LogLikelihood]:
    """A uniform model's: a bound where nothing is given, or it is told what is."""
    whole = np.arange(answers.tokens.shape[1]) < answers.lengths[:, None]
    if not network.given_embedding and not np.array_equal(answers.free, whole):
        raise UserError(
            "this model is of the uniform process and was not trained to know which tokens are given, so it has no "
            "likelihood given a context; leave given= out, or train an absorbing model, or one with "
            "network.given_embedding=True"
        )
    if method not in ("auto", "bound"):
        raise UserError(f"method={method!r} is for the absorbing process; a uniform model has 'bound'")
    run = functools.partial(_levels, network, *sigma_limits(network, schedule), params, keyed_random.root_key(seed))
    rows = (answers.tokens, answers.free, answers.lengths)
    return [_mean(row, "levels") for row in _replicated(run, network, num_draws, *rows)]


@functools.partial(jax.jit, static_argnums=range(3))
def _levels(network, low, high, params, key, tokens, free, lengths, replicates):
    """A replicate of each row's bound by levels, in nats. replicates: Int[B], their numbers. Float[B]."""
    keys = keyed_random.row_keys(key, replicates)
    given = (jnp.arange(tokens.shape[1]) < lengths[:, None]) & ~free if network.given_embedding else None
    free_scores = network.prediction == "score"
    stats = network.stats(params, lengths=lengths, given=given, tightened=free_scores)
    found = level_draws(network.process, stats, keys, tokens, _REPLICATE, low, high, free)
    terms = found.diffusion + found.reconstruction
    prior = network.process.prior_divergence(high) * jnp.sum(free, axis=-1)
    return prior + (terms[:, -1] if free_scores else terms).mean(axis=0)
