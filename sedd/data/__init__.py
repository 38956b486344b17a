"""Data: text sources, tokenizers, the prepared corpus and its batches. NumPy only, without JAX."""

from sedd.data.batches import Batch, batch, batches, blocks, check_block_length, row_lengths
from sedd.data.corpus import Corpus, open_corpus
from sedd.data.layout import Layout
from sedd.data.prepare import prepare
from sedd.data.source import Source
from sedd.data.sources import open_source
from sedd.data.splits import SPLITS
from sedd.data.tokenizers import Tokenizer, load_tokenizer, make_tokenizer

__all__ = [
    "SPLITS",
    "Batch",
    "Corpus",
    "Layout",
    "Source",
    "Tokenizer",
    "batch",
    "batches",
    "blocks",
    "check_block_length",
    "load_tokenizer",
    "make_tokenizer",
    "open_corpus",
    "open_source",
    "prepare",
    "row_lengths",
]
