"""Protocols: which text is scored, at which noise levels, and with which terms. Numbers of two protocols differ.

    clean        each token scored once, nothing added or dropped, a bound with all its terms
    sedd-paper   Lou, Meng and Ermon, arXiv 2310.16834, section 5 and the data loader of its authors
    mdlm         Sahoo et al., arXiv 2406.07524, and its authors' code
    duo          Sahoo et al., arXiv 2506.10892, zero-shot, and its authors' code
    bd3lm        Arriola et al., arXiv 2503.09573, zero-shot, and its authors' code, autoregressive models included

All but the first reproduce the numbers of those papers, for comparison with their tables. They concatenate documents in
groups of 1,000 and drop the tokens at the end of a group that do not fill a block; they integrate from t = 1e-3, and
leave out the prior and the noise below. Of an autoregressive model nothing is left out. Detokenisers belong to the
source (`sedd.data.source_benchmarks`). The default split is that of their zero-shot tables.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sedd.data.corpus import Corpus
from sedd.data.source import Source
from sedd.diffusion.bounds import Bound
from sedd.diffusion.schedule import LogLinear
from sedd.errors import UserError
from sedd.evaluation.text import ScoringRows, documents, from_corpus, from_rows, from_source, from_texts
from sedd.trained import Trained

GROUP_SIZE = 1000  # documents that the data loaders of these papers concatenate at a time


@dataclasses.dataclass(frozen=True)
class Protocol:
    """An evaluation protocol."""

    name: str
    split: str  # default: that of the zero-shot tables
    draws: int | None  # noise levels a block; None: the config's evaluation.draws
    is_bound: bool = False  # all text and all terms; the fields below are for the other protocols
    eps: float = 1e-3  # the earliest time
    strata: int = 1  # consecutive rows whose times are stratified over [eps, 1] together
    tightened: bool = True  # the number is that of tightened scores, else of unnormalised ones
    own_schedule: bool = False  # the model's schedule, else log-linear
    schedule_eps: float = 1e-3  # of the log-linear schedule
    shards: int = 1  # contiguous parts of the documents, each cut on its own
    append_eos: bool = True  # an end-of-text id after each document
    wrap_with_eos: bool = False  # one before and one after each block, also scored
    given: int = 0  # tokens at the start of each block that are given, not scored

    def __str__(self) -> str:
        return self.name

    def bound(self, trained: Trained) -> Bound:
        """Returns the bound, or the loss of a paper. UserError for a model that has no such loss."""
        if self.is_bound:
            return trained.network.bound(trained.schedule)
        schedule = trained.schedule if self.own_schedule else LogLinear(self.schedule_eps)
        return trained.network.loss_at_times(schedule, self.eps, self.strata)


CLEAN = Protocol("clean", split="test", draws=None, is_bound=True)
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        CLEAN,
        Protocol("sedd-paper", split="test", draws=1000, tightened=False, own_schedule=True, shards=8),
        Protocol("mdlm", split="validation", draws=1, strata=64, wrap_with_eos=True),
        Protocol("duo", split="validation", draws=1, strata=16, append_eos=False, wrap_with_eos=True),
        Protocol(
            "bd3lm",
            split="validation",
            draws=1,
            strata=64,
            append_eos=False,
            wrap_with_eos=True,
            given=1,
            schedule_eps=1e-6,
        ),
    )
}


def get_protocol(name: str) -> Protocol:
    """Returns the protocol of that name. UserError for an unknown name."""
    if name not in PROTOCOLS:
        raise UserError(f"there is no protocol {name!r}; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def scoring_rows(
    protocol: Protocol, text: Corpus | Source | Sequence[str], split: str, trained: Trained
) -> ScoringRows:
    """Returns the rows of a text under a protocol, for a model.

    UserError where nothing is left to score, or for a padded layout with a protocol that packs text.
    """
    if protocol.is_bound:
        if isinstance(text, Corpus):
            return from_corpus(text, split, trained.block_length)
        return from_source(text, trained) if isinstance(text, Source) else from_texts(text, trained)
    if trained.layout.padded:
        raise UserError(f"the protocol {protocol} packs text, but the model was trained on padded documents; use clean")
    tokenizer, block_length = trained.require_tokenizer(), trained.block_length
    ids, data = documents(text, split, tokenizer)
    rows = grouped(ids, block_length, protocol, tokenizer.end_of_text)
    if not len(rows):
        raise UserError(
            f"the protocol {protocol} leaves nothing of {sum(map(len, ids))} tokens in {len(ids)} documents: tokens "
            f"that do not fill a block of {block_length} at the end of a group of documents are dropped; use clean"
        )
    return from_rows(rows, trained.layout, data, len(ids), protocol.given)


def grouped(documents: Sequence[np.ndarray], block_length: int, protocol: Protocol, end: int | None) -> np.ndarray:
    """The blocks of a protocol, Int32[N L]: documents split into shards, joined in groups of 1,000, cut into blocks.

    Tokens at the end of a group that do not fill a block are dropped. documents: Int[T_i] each; end: the end-of-text
    id, None where the tokenizer has none, and then none is added. Vocabularies such as GPT-2's have one id for the
    beginning and the end of a text.
    """
    has_end = [] if end is None else [end]
    wrap = has_end if protocol.wrap_with_eos else []
    after = has_end if protocol.append_eos else []
    inner = block_length - 2 * len(wrap)
    blocks = [np.zeros((0, block_length), np.int32)]
    if inner < 1:
        return blocks[0]
    for shard in np.array_split(np.arange(len(documents)), protocol.shards):
        for start in range(0, len(shard), GROUP_SIZE):
            parts = [np.append(documents[number], after) for number in shard[start : start + GROUP_SIZE]]
            joined = np.concatenate(parts).astype(np.int32)
            joined = joined[: len(joined) // inner * inner].reshape(-1, inner)
            blocks.append(np.pad(joined, ((0, 0), (len(wrap),) * 2), constant_values=(*wrap, 0)[0]))
    return np.concatenate(blocks)
