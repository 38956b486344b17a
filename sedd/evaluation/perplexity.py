"""The perplexity job: a bound on the negative log-likelihood of a corpus or of texts, with its error.

For Absorbing the exact law of the masks is integrated from alpha = 1 to alpha = 0, so that prior and reconstruction are
0 and nothing is cut off; the network is told the noise clipped to what it was trained on. For Uniform sigma runs from
the schedule's sigma(0) to max(sigma(1), 12), and both terms are added. Noise levels are stratified within each block.

With Absorbing a text shorter than the block is scored in a full block whose other positions stay masked: that is the
model's exact marginal, and better than at its own length by .12 nats a token at 4 tokens, .01 at 32, on a model of
blocks of 128 (docs/measurements.md). A network that was trained on padded documents is told their lengths instead.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sedd.data.batches import blocks
from sedd.data.corpus import Corpus
from sedd.data.layout import Layout
from sedd.data.tokenizers import Tokenizer
from sedd.diffusion import draws
from sedd.diffusion.likelihood import sigma_bound
from sedd.diffusion.process import Absorbing
from sedd.diffusion.schedule import Schedule
from sedd.errors import UserError
from sedd.network.network import Network

RUN = 16  # blocks of a packed corpus in a cluster of the standard error: neighbours come from the same documents
UNIFORM_SIGMA = 12.0  # where the uniform bound ends at the earliest: there its prior is below 1e-5 nats a token


@dataclasses.dataclass(frozen=True)
class Scored:
    """Text laid out for scoring: N rows of a block each."""

    tokens: np.ndarray  # Int32[N L]
    lengths: np.ndarray  # Int32[N], the positions of a row that are scored
    counts: np.ndarray  # Int32[N], the tokens of text among them, by whose number nats are divided
    clusters: np.ndarray  # Int[N], rows that stand or fall together in the standard error
    num_bytes: int  # UTF-8
    layout: Layout


@dataclasses.dataclass(frozen=True)
class Report:
    """A bound, its three terms and its error in nats per token, and the same in other units.

    The errors are None where there is one cluster only, which tells nothing of them.
    """

    nats_per_token: float
    standard_error: float | None
    prior: float
    diffusion: float
    reconstruction: float
    perplexity: float
    bits_per_byte: float
    bits_per_byte_error: float | None
    num_tokens: int
    num_bytes: int
    clusters: int
    draws: int
    seed: int
    lengths: str  # how text shorter than a block was scored

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        parts = f"prior {self.prior:.4f}, diffusion {self.diffusion:.4f}, reconstruction {self.reconstruction:.4f}"
        error = self.standard_error and self.perplexity * self.standard_error
        return (
            f"bound         {with_error(self.nats_per_token, self.standard_error)} nats per token ({parts})\n"
            f"perplexity    {with_error(self.perplexity, error, 3)}\n"
            f"bits per byte {with_error(self.bits_per_byte, self.bits_per_byte_error)}\n"
            f"scored        {self.num_tokens:,} tokens, {self.num_bytes:,} bytes, {self.draws} noise levels a block; "
            f"± is one standard error over {self.clusters} clusters"
        )


def with_error(value: float, error: float | None, digits: int = 4) -> str:
    """A number and its error, as people read it."""
    return f"{value:.{digits}f} ± " + ("unknown" if error is None else f"{error:.{digits}f}")


def from_corpus(corpus: Corpus, split: str, block_length: int) -> Scored:
    """A split: packed in consecutive blocks, the tail with its own length, in clusters of 16 blocks; padded document
    by document, each a cluster."""
    tokens, counts, document = blocks(corpus, split, block_length)
    clusters = np.arange(len(tokens)) // RUN if document is None else document
    return _scored(tokens, counts, clusters, corpus.num_bytes(split), corpus.layout)


def from_texts(texts: Sequence[str], tokenizer: Tokenizer, block_length: int, layout: Layout) -> Scored:
    """Texts one by one, cut into blocks where they are longer; each is a cluster. UserError for an empty one.

    For a model of padded documents each ends as those do, with the end-of-text id.
    """
    rows, counts, clusters = [], [], []
    end = [tokenizer.end_of_text] if layout.padded else []
    for number, text in enumerate(texts):
        ids = np.append(tokenizer.encode(text), np.array(end, np.int32))
        if len(ids) == len(end):
            raise UserError(f"text {number + 1} of {len(texts)} is empty; there is nothing to score")
        for start in range(0, len(ids), block_length):
            piece = ids[start : start + block_length]
            rows.append(np.pad(piece, (0, block_length - len(piece)), constant_values=(*end, 0)[0]))
            counts.append(len(piece))
            clusters.append(number)
    if not rows:
        raise UserError("there are no texts to score")
    num_bytes = sum(len(text.encode()) for text in texts)
    return _scored(np.stack(rows).astype(np.int32), np.array(counts, np.int32), np.array(clusters), num_bytes, layout)


def _scored(tokens, counts, clusters, num_bytes, layout) -> Scored:
    lengths = np.full_like(counts, tokens.shape[1]) if layout.padding == "scored" else counts
    return Scored(tokens, lengths, counts, clusters, num_bytes, layout)


def perplexity(
    network: Network,
    schedule: Schedule,
    params: dict,
    scored: Scored,
    seed: int = 0,
    num_draws: int = 16,
    batch_size: int = 64,
    progress: bool = True,
) -> Report:
    """The bound over all rows, each at `num_draws` stratified noise levels. The same seed gives the same number."""
    terms = row_bounds(network, schedule, params, scored, seed, num_draws, batch_size, progress)
    return _report(terms, scored, num_draws, seed, network)


def row_bounds(
    network: Network,
    schedule: Schedule,
    params: dict,
    scored: Scored,
    seed: int = 0,
    num_draws: int = 16,
    batch_size: int = 64,
    progress: bool = True,
) -> np.ndarray:
    """Prior, diffusion and reconstruction of each row, in nats: Float64[N 3]."""
    low, high = _ends(network, schedule)
    bind = scored.layout.binds_lengths or not isinstance(network.process, Absorbing)
    terms = []
    starts = range(0, len(scored.tokens), batch_size)
    for start in tqdm(starts, desc="scoring", unit="batch", delay=2, disable=not progress):
        at = np.arange(start, start + batch_size) % len(scored.tokens)  # one shape for all; what is over is dropped
        rows = (jax.random.key(seed), scored.tokens[at], scored.lengths[at], at)
        terms.append(np.stack(_bounds(network, params, *rows, low, high, num_draws, bind), axis=-1))
    return np.concatenate(terms)[: len(scored.tokens)].astype(np.float64)


def _ends(network: Network, schedule: Schedule) -> tuple[float, float]:
    """The noise from which the integral runs, and to which."""
    if isinstance(network.process, Absorbing):
        return 0.0, math.inf
    return float(schedule.sigma(0.0)), max(float(schedule.sigma(1.0)), UNIFORM_SIGMA)


@functools.partial(jax.jit, static_argnames=("network", "low", "high", "num_draws", "bind"))
def _bounds(network, params, key, tokens, lengths, rows, low, high, num_draws, bind):
    """The three terms of each row, averaged over the draws: Bound of Float[B]. bind: tell the network the lengths."""
    keys = draws.row_keys(key, rows)
    free = jnp.arange(tokens.shape[1]) < lengths[:, None]
    if bind:
        stats = network.stats(params, lengths=lengths)
    else:  # what follows a short text stays masked: the model's exact marginal
        tokens, stats = network.process.hide(tokens, ~free), network.stats(params)

    def one(number):
        of_draw = draws.fold(keys, number)
        level = (number + draws.uniform(draws.fold(of_draw, 0))) / num_draws
        return sigma_bound(network.process, stats, draws.fold(of_draw, 1), tokens, level, low, high, free)

    return jax.tree.map(lambda term: jnp.mean(term, axis=0), jax.lax.map(one, jnp.arange(num_draws)))


def _report(terms: np.ndarray, scored: Scored, num_draws: int, seed: int, network: Network) -> Report:
    """The ratio estimate over clusters and its standard error. terms: Float[N 3], nats a row."""
    num_tokens = int(scored.counts.sum())
    prior, diffusion, reconstruction = terms.sum(axis=0) / num_tokens
    nats = prior + diffusion + reconstruction
    of_cluster = np.bincount(scored.clusters, terms.sum(axis=1)) - nats * np.bincount(scored.clusters, scored.counts)
    count = len(of_cluster)
    error = math.sqrt(count / (count - 1) * np.sum(of_cluster**2)) / num_tokens if count > 1 else None
    bits = num_tokens / scored.num_bytes / math.log(2)
    return Report(
        nats_per_token=float(nats),
        standard_error=error,
        prior=float(prior),
        diffusion=float(diffusion),
        reconstruction=float(reconstruction),
        perplexity=math.exp(nats),
        bits_per_byte=float(nats * bits),
        bits_per_byte_error=error and error * bits,
        num_tokens=num_tokens,
        num_bytes=scored.num_bytes,
        clusters=count,
        draws=num_draws,
        seed=seed,
        lengths=_how(scored.layout, network),
    )


def _how(layout: Layout, network: Network) -> str:
    """How text shorter than a block was scored."""
    if layout.padding is not None:
        return "with its padding, as a whole block" if layout.padding == "scored" else "given its length"
    in_block = isinstance(network.process, Absorbing)
    return "in a block whose other positions stay masked" if in_block else "at its own length"
