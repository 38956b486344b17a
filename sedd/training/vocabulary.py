"""Weights of a model for the tokens of another corpus: the rows of tokens that both vocabularies have are copied."""

import sys

import numpy as np

from sedd.data.tokenizers import Tokenizer
from sedd.errors import UserError
from sedd.network.network import Network
from sedd.runtime import processes
from sedd.runtime.trees import named


def translated(weights: dict, initial: dict, network: Network, old: Tokenizer, new: Tokenizer, origin: str) -> dict:
    """Returns `weights`, trained with the tokenizer `old`, for the tokenizer `new`: a dict by path.

    Tokens are the same if they have the same text, or both end a text; the mask is always the same. A token of `new`
    alone keeps its values of `initial`, the initial parameters of `network`. origin: of the weights, for messages.
    UserError if the vocabularies have no token in common.
    """
    theirs, ours = old.vocabulary, new.vocabulary
    common = [(theirs[text], ours[text]) for text in ours if text in theirs]
    if not common:
        raise UserError(f"{origin} has no token in common with the corpus; choose another --init_from")
    if processes.is_first():
        print(f"sedd: {len(common):,} of {new.vocab_size:,} tokens of the corpus start as in {origin}", file=sys.stderr)
    if network.process.mask_id is not None and network.vocab_size < network.columns:
        common.append((old.vocab_size, new.vocab_size))
    before, after = np.array(common).T
    found, start = dict(named(weights)), named(initial)
    for path, axis in network.token_axes.items():
        array = np.moveaxis(np.array(start[path]), axis, 0)
        array[after] = np.moveaxis(np.asarray(found[path]), axis, 0)[before]
        found[path] = np.moveaxis(array, 0, axis)
    return found
