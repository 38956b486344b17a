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
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from sedd.diffusion import keyed_random
from sedd.diffusion.discrete.exact_likelihood import importance_bound, order_log_likelihoods, subset_log_likelihood
from sedd.diffusion.discrete.pickers import Entropy, Margin
from sedd.diffusion.discrete.process import Absorbing
from sedd.diffusion.discrete.unmasking import Adaptive
from sedd.errors import UserError
from sedd.evaluation.scoring import bound_stats
from sedd.generation.rows import Rows
from sedd.runtime.settings import jax_defaults
from sedd.seeds import check_seed
from sedd.trained import Trained

METHODS = ("auto", "exact", "bound", "orders", "margin", "entropy")
LEFT_TO_RIGHT = "left_to_right"  # what "exact" is for an autoregressive model
MAX_EXACT_TOKENS = 12  # 4095 network rows
_PICKERS = {"margin": Margin(), "entropy": Entropy()}
_REPLICATE = 4  # draws of the bound in a replicate, stratified together; the spread of replicates gives the error


@dataclasses.dataclass(frozen=True)
class LogLikelihood:
    """log p(answer | given) in nats. standard_error: of the estimator; None for an exact value.

    method: the estimator, and with it the decoding order whose likelihood this is. "exact": of decoding one token at a
    time in random order; "bound", "orders": lower bounds on that; "margin", "entropy": exact, of decoding the most
    certain position first; "left_to_right": exact, of an autoregressive model; "levels": a lower bound for a uniform
    model. is_bound: True for the lower bounds.
    """

    nats: float
    standard_error: float | None
    method: str
    is_bound: bool


@jax_defaults()
def log_likelihoods(
    trained: Trained, answers: Rows, method: str = "auto", num_draws: int = 64, seed: int = 0
) -> list[LogLikelihood]:
    """Returns the log-likelihood of each answer, the free tokens of a row, given the other tokens of its row.

    Answers share their noise, which reduces the variance of their differences. method: one of METHODS; "auto" is
    "exact" where that takes at most 4 `num_draws` network rows for every answer (8 tokens at 64 draws), else "bound"
    for all, since exact values and bounds are not comparable. num_draws: network rows of "bound", orders of "orders".
    UserError, before any compilation, for invalid arguments.
    """
    seed = check_seed(seed)
    if method not in METHODS:
        raise UserError(f"there is no method {method!r}; there are {', '.join(METHODS)}")
    if num_draws < 2 * _REPLICATE or num_draws % _REPLICATE:
        raise UserError(f"draws must be a multiple of {_REPLICATE}, and at least {2 * _REPLICATE}, not {num_draws}")
    if trained.process.mask_id is None:
        estimator = _estimator_without_mask(trained, answers, method)
    elif trained.network.block_of_generation is not None:
        estimator = _estimator_of_blocks(trained, method)
    else:
        estimator = _estimator_with_mask(answers, method, num_draws)
    if estimator == LEFT_TO_RIGHT:
        nats = (answer.nats for answer in _bounds(trained, answers, estimator, _REPLICATE, seed))
        return [LogLikelihood(value, None, LEFT_TO_RIGHT, False) for value in nats]
    if estimator == "exact":
        return _exact(trained, answers)
    if estimator in _PICKERS:
        return _adaptive(trained, answers, estimator)
    if estimator == "orders":
        return _orders(trained, answers, num_draws, seed)
    return _bounds(trained, answers, estimator, num_draws, seed)


def _estimator_with_mask(answers: Rows, method: str, num_draws: int) -> str:
    """Returns the estimator that a method is for an absorbing model. UserError for too many tokens."""
    count = answers.free.sum(axis=1).max()
    if method == "exact" and count > MAX_EXACT_TOKENS:
        raise UserError(
            f"an answer of {count} tokens takes 2^{count} network rows to score exactly; "
            f"at most {MAX_EXACT_TOKENS} tokens are allowed; use method='bound', or 'margin'"
        )
    if method != "auto":
        return method
    return "exact" if count <= MAX_EXACT_TOKENS and 2**count - 1 <= 4 * num_draws else "bound"


def _estimator_of_blocks(trained: Trained, method: str) -> str:
    """Returns the estimator that a method is for a model that generates block after block."""
    size = trained.network.block_of_generation
    names = ("auto", "exact") if size == 1 else ("auto", "bound")
    if method not in names:
        raise UserError(
            f"method={method!r} is for models that decode in any order; one with network.block_size={size} has "
            f"{names[1]!r}"
        )
    return LEFT_TO_RIGHT if size == 1 else "bound"


def _estimator_without_mask(trained: Trained, answers: Rows, method: str) -> str:
    """Returns the estimator that a method is for a process without a mask: "levels". UserError without a likelihood."""
    if not trained.network.infills and not np.array_equal(answers.free, answers.within):
        raise UserError(
            "the encoding of a given token depends on the answer: this model has no likelihood given a context"
        )
    if not trained.network.given_embedding and not np.array_equal(answers.free, answers.within):
        raise UserError(
            "this model treats given tokens as noisy, since it was trained without flags of them, so it has no "
            "likelihood given a context; leave given= out, or train an absorbing model, or one with "
            "network.given_embedding=True"
        )
    if method not in ("auto", "bound"):
        raise UserError(f"method={method!r} is for the absorbing process; other models have 'bound'")
    return "levels"


def _exact(trained: Trained, answers: Rows) -> list[LogLikelihood]:
    """The likelihood of decoding in random order, of one answer after the other."""
    logs = []
    for tokens, free, length in zip(*answers):
        row = (tokens, np.flatnonzero(free), length if trained.uses_lengths else None)
        logs.append(float(_over_subsets(trained.network, trained.all_params, *row)))
    return [LogLikelihood(nats, None, "exact", False) for nats in logs]


@functools.partial(jax.jit, static_argnums=0)
def _over_subsets(network, params, tokens, positions, length):
    denoiser = network.denoiser(params, None if length is None else length[None])
    return subset_log_likelihood(network.process, denoiser, tokens, positions, lengths=length)


def _adaptive(trained: Trained, answers: Rows, picker: str) -> list[LogLikelihood]:
    """The likelihood of decoding the most certain position first."""
    sampler = Adaptive(cast(Absorbing, trained.process), _PICKERS[picker])
    run = functools.partial(_along_choices, trained.network, sampler, trained.all_params)
    logs = _in_groups(run, trained.rows_at_once, *_arrays(trained, answers))
    return [LogLikelihood(float(nats), None, picker, False) for nats in logs]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _along_choices(network, sampler, params, tokens, free, lengths):
    return sampler.log_likelihood(network.denoiser(params, lengths), tokens, free, lengths)


def _orders(trained: Trained, answers: Rows, num_orders: int, seed: int) -> list[LogLikelihood]:
    """The importance-weighted bound of random orders."""
    arrays = (keyed_random.root_key(seed), *_arrays(trained, answers))
    logs = np.asarray(_along_orders(trained.network, num_orders, trained.all_params, *arrays), np.float64)
    return [LogLikelihood(*_importance(row), "orders", True) for row in logs]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _along_orders(network, num_orders, params, key, tokens, free, lengths):
    """log p along each of `num_orders` random orders, the same orders for every answer. Float[A K]."""
    keys = keyed_random.row_keys(key, jnp.arange(num_orders))

    def along_orders(answer):
        row, row_free, length = answer
        rows = (jnp.broadcast_to(leaf, (num_orders, *leaf.shape)) for leaf in (row, row_free))
        lengths = None if length is None else jnp.broadcast_to(length, num_orders)
        return order_log_likelihoods(network.process, network.denoiser(params, lengths), keys, *rows, lengths)

    return jax.lax.map(along_orders, (tokens, free, lengths))


def _importance(logs: np.ndarray) -> tuple[float, float]:
    """The importance-weighted bound of K orders, and its standard error by the delta method. Float64[K], nats."""
    weights = np.exp(logs - logs.max())
    with jax.enable_x64(True):
        bound = float(importance_bound(jnp.asarray(logs)))
    return bound, float(weights.std(ddof=1) / weights.mean() / math.sqrt(len(logs)))


def _bounds(trained: Trained, answers: Rows, estimator: str, num_draws: int, seed: int) -> list[LogLikelihood]:
    """The bound of the process: the mean of independent replicates, with the same noise for all answers."""
    bound, count = trained.network.bound(trained.schedule), num_draws // _REPLICATE
    run = functools.partial(_replicates, trained.network, bound, trained.all_params, keyed_random.root_key(seed))
    rows = [None if array is None else np.repeat(array, count, axis=0) for array in _arrays(trained, answers)]
    nats = _in_groups(run, trained.rows_at_once, *rows, np.tile(np.arange(count), len(answers.tokens)))
    return [_mean(row, estimator) for row in nats.astype(np.float64).reshape(-1, count)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _replicates(network, bound, params, key, tokens, free, lengths, replicates):
    """One replicate of the bound of each row, nats. replicates: Int[B], their indices -> Float[B]."""
    given = (jnp.arange(tokens.shape[1]) < lengths[:, None]) & ~free if network.given_embedding else None
    stats = bound_stats(network, bound, _REPLICATE, params, tokens, lengths, given)
    clean = network.clean(params, tokens, lengths)
    draws = bound.draws(stats, keyed_random.row_keys(key, replicates), clean, _REPLICATE, free, lengths)
    nats = bound.nats(draws)
    return (nats[:, -1] if network.has_unnormalised_scores else nats).mean(axis=0)  # tightened, as other methods


def _mean(replicates: np.ndarray, method: str) -> LogLikelihood:
    """The mean of independent replicates of a bound, Float64[R] in nats, and its standard error."""
    error = replicates.std(ddof=1) / math.sqrt(len(replicates)) if len(replicates) > 1 else 0.0
    return LogLikelihood(-float(replicates.mean()), float(error), method, True)


def _arrays(trained: Trained, answers: Rows) -> tuple:
    """The tokens, the free positions, and the lengths if the network is conditioned on them, else None."""
    return answers.tokens, answers.free, answers.lengths if trained.uses_lengths else None


def _in_groups(run, size: int, *arrays) -> np.ndarray:
    """run(*arrays) in groups of `size` rows, all of one shape: the last group wraps around to the first rows."""
    num_rows = len(arrays[0])
    size, results = min(size, num_rows), []
    for start in range(0, num_rows, size):
        at = np.arange(start, start + size) % num_rows
        results.append(np.asarray(run(*(None if array is None else array[at] for array in arrays))))
    return np.concatenate(results)[:num_rows]
