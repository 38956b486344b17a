"""Protocols: what is scored, at which noise, and what is left out. The same model has another number under each.

    clean        each token once, nothing added, nothing dropped, a bound with all its terms
    sedd-paper   Lou, Meng and Ermon, arXiv 2310.16834, section 5 and the data loader of its authors
    mdlm         Sahoo et al., arXiv 2406.07524, and its authors' code
    duo          Sahoo et al., arXiv 2506.10892, zero-shot, and its authors' code

The last three reproduce what those papers compute, so that a table of theirs can be compared with. They cut text into
groups of 1,000 documents, and drop what does not fill a block at the end of each; integrate from t = 1e-3; leave out
the prior and what is below. Detokenisers belong to the source (`sedd.data.source_benchmarks`); which split, the caller
may say; by default it is that of their zero-shot tables.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from sedd.data.corpus import Corpus
from sedd.data.layout import Layout
from sedd.data.source import Source
from sedd.data.tokenizers import Tokenizer
from sedd.diffusion.schedule import LogLinear, Schedule
from sedd.errors import UserError
from sedd.evaluation.text import ScoringRows, documents, from_corpus, from_rows, from_source, from_texts

GROUP = 1000  # documents that the data loaders of the three papers concatenate at a time


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One way to a number."""

    name: str
    split: str  # that of the zero-shot tables
    draws: int | None  # noise levels a block; None: the config's
    is_bound: bool = False  # all text and all terms; the settings below are for the others
    eps: float = 1e-3  # the earliest time
    strata: int = 1  # rows in a row that share out [eps, 1] among them; 1: each has its own
    tightened: bool = True  # of free scores: normalised or clipped, else as they are
    own_schedule: bool = False  # times by the model's schedule, else log-linear with eps 1e-3
    shards: int = 1  # processes that the documents are dealt to, each cutting its own
    append_eos: bool = True  # an end-of-text id after each document
    wrap_with_eos: bool = False  # one before and one after each block, scored as well

    def __str__(self) -> str:
        return self.name

    def stratum(self, rows: jax.Array) -> jax.Array:
        """Which of `strata` each row takes. Neighbours take distant ones: a cluster of them spans the levels."""
        stride = round(self.strata * 0.618) | 1  # coprime to the powers of two that `strata` are
        return rows * stride % self.strata

    def schedule(self, model: Schedule) -> Schedule:
        """The schedule of the times."""
        return model if self.own_schedule else LogLinear(1e-3)


CLEAN = Protocol("clean", split="test", draws=None, is_bound=True)
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        CLEAN,
        Protocol("sedd-paper", split="test", draws=1000, tightened=False, own_schedule=True, shards=8),
        Protocol("mdlm", split="validation", draws=1, strata=64, wrap_with_eos=True),
        Protocol("duo", split="validation", draws=1, strata=16, append_eos=False, wrap_with_eos=True),
    )
}


def get_protocol(name: str) -> Protocol:
    """The protocol of that name. UserError if there is none."""
    if name not in PROTOCOLS:
        raise UserError(f"there is no protocol {name!r}; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def scoring_rows(
    protocol: Protocol,
    text: Corpus | Source | Sequence[str],
    split: str,
    tokenizer: Tokenizer,
    block_length: int,
    layout: Layout,
) -> ScoringRows:
    """Text in rows, as the protocol has it, for a model of this layout. UserError where there is nothing to score."""
    if protocol.is_bound:
        if isinstance(text, Corpus):
            return from_corpus(text, split, block_length)
        lay = from_source if isinstance(text, Source) else from_texts
        return lay(text, tokenizer, block_length, layout)
    if layout.padded:
        raise UserError(f"the protocol {protocol} packs text, but the model was trained on padded documents; use clean")
    found, data = documents(text, split, tokenizer)
    rows = grouped(found, block_length, protocol, tokenizer.end_of_text)
    if not len(rows):
        raise UserError(
            f"the protocol {protocol} leaves nothing of {sum(map(len, found))} tokens in {len(found)} documents: what "
            f"does not fill a block of {block_length} at the end of each group of documents is dropped; use clean"
        )
    return from_rows(rows, layout, data, len(found))


def grouped(found: Sequence[np.ndarray], block_length: int, protocol: Protocol, end: int | None) -> np.ndarray:
    """The blocks of a protocol, Int32[N L]: documents dealt to shards, joined in groups of 1,000, cut.

    What does not fill a block at the end of a group is dropped. end: the end-of-text id; where the tokenizer has none,
    none is added. A vocabulary as GPT-2's has one id for the beginning and the end of a text.
    """
    has_end = [] if end is None else [end]
    wrap = has_end if protocol.wrap_with_eos else []
    after = has_end if protocol.append_eos else []
    inner = block_length - 2 * len(wrap)
    blocks = [np.zeros((0, block_length), np.int32)]
    if inner < 1:
        return blocks[0]
    for shard in np.array_split(np.arange(len(found)), protocol.shards):
        for start in range(0, len(shard), GROUP):
            parts = [np.append(found[number], after) for number in shard[start : start + GROUP]]
            joined = np.concatenate(parts).astype(np.int32)
            joined = joined[: len(joined) // inner * inner].reshape(-1, inner)
            blocks.append(np.pad(joined, ((0, 0), (len(wrap),) * 2), constant_values=(*wrap, 0)[0]))
    return np.concatenate(blocks)
