"""Answers to a context as rows to score, one block each."""

from collections.abc import Sequence

import numpy as np

from sedd.data.tokenizers import Ends
from sedd.errors import UserError
from sedd.evaluation.text import encode
from sedd.generation.rows import Rows
from sedd.trained import Trained


def answers_to(given: str, texts: Sequence[str], trained: Trained) -> Rows:
    """Returns one row for each text: the context `given`, the text, and unknown positions up to the block length.

    For a network that takes lengths, the row ends with the text. Free are the tokens of the answer: those of given +
    text after the prefix that they share with those of `given` alone. UserError for no texts, for an empty text, where
    context and text take more tokens than a block, and for a model without a tokenizer.
    """
    tokenizer, block_length, mask = trained.require_tokenizer(), trained.block_length, trained.process.mask_id
    if not texts:
        raise UserError("there are no answers to score")
    context = encode(given, tokenizer, "the given text", Ends(closes=False)) if given else np.zeros(0, np.int32)
    shape = (len(texts), block_length)
    tokens, free = np.full(shape, 0 if mask is None else mask, np.int32), np.zeros(shape, bool)
    lengths = np.zeros(len(texts), np.int32)
    for number, text in enumerate(texts):
        if not text:
            raise UserError("an answer is empty; there is nothing to score")
        ids = encode(given + text, tokenizer, "an answer")
        lengths[number] = len(ids) + trained.layout.masks_padding
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
        if trained.layout.masks_padding:
            assert tokenizer.end_of_text is not None  # every padded corpus has one
            tokens[number, len(ids) :] = tokenizer.end_of_text
    return Rows(tokens, free, lengths if trained.uses_lengths else np.full(len(texts), block_length, np.int32))
