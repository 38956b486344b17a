"""Text in: sources, tokenizers, the prepared corpus and its batches. NumPy only; nothing here knows of JAX."""

from sedd.data.batches import batch, batches, blocks, check_block_length
from sedd.data.corpus import Corpus, open_corpus
from sedd.data.prepare import prepare
from sedd.data.source import Source
from sedd.data.sources import open_source
from sedd.data.splits import SPLITS
from sedd.data.tokenizers import Tokenizer, load_tokenizer, make_tokenizer

__all__ = [
    "SPLITS",
    "Corpus",
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
]
