"""What is asked of a model while it trains: the bound on the validation split, and a few texts."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sedd.data.batches import check_block_length, row_lengths
from sedd.data.corpus import Corpus
from sedd.data.layout import Layout
from sedd.diffusion.process import Absorbing
from sedd.diffusion.schedule import Schedule
from sedd.errors import UserError
from sedd.evaluation.perplexity import perplexity
from sedd.evaluation.text import from_corpus
from sedd.generation import Generator
from sedd.network.network import Network
from sedd.training.metrics import BOUND


@dataclasses.dataclass(frozen=True)
class Validator:
    """All that evaluation during training takes besides the parameters."""

    config: ConfigDict
    corpus: Corpus
    layout: Layout
    schedule: Schedule
    network: Network
    mesh: Mesh

    def bound(self, params: dict, on_batch: Callable[[], None]) -> dict[str, float]:
        """The bound on the validation split, as a record of the metrics. on_batch: called after each batch of rows."""
        scored = from_corpus(self.corpus, "validation", self.config.data.block_length)
        draws = self.config.evaluation.draws
        settings = dict(num_draws=draws, mesh=self.mesh, progress=False, on_batch=on_batch)
        report, _ = perplexity(self.network, self.schedule, params, scored, **settings)
        return {BOUND: report.nats_per_token, "validation_bits_per_byte": report.bits_per_byte}

    def samples(self, params: dict, on_step: Callable[[], None]) -> tuple[list[str], list[np.ndarray]]:
        """`evaluation.samples` texts, drawn with the same noise each time, and their tokens, Int[L] each.

        on_step: called after each step of the sampler.
        """
        if not self.config.evaluation.samples:
            return [], []
        block, seed = self.config.data.block_length, self.config.training.seed
        generator = Generator(self.network, params, self.schedule, self.corpus.tokenizer, self.layout, block)
        sampler = "counts" if isinstance(self.network.process, Absorbing) else "tweedie"  # one law, fewer calls
        settings = dict(sampler=sampler, seed=seed, watch=lambda *_: on_step())
        drawn = generator.sample(self.config.evaluation.samples, **settings)
        return drawn.texts, [row[row >= 0] for row in drawn.tokens]


def check_split(corpus: Corpus, block_length: int):
    """UserError unless there is a validation split to evaluate on."""
    if "validation" not in corpus.splits:
        raise UserError(
            f"config: evaluation.every needs a validation split, and {corpus.path} has none; "
            "set evaluation.every=0, or prepare a corpus with one"
        )
    check_block_length(corpus, "validation", block_length)


def layout_of(corpus: Corpus, block_length: int) -> Layout:
    """The corpus' layout, as a model remembers it: with the lengths to draw texts at where it is told lengths."""
    if not corpus.layout.masks_padding:
        return corpus.layout
    return dataclasses.replace(corpus.layout, row_lengths=row_lengths(corpus, block_length))
