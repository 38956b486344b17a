"""Evaluation during training: the bound on the validation split, and samples."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sedd.data.batches import check_block_length, row_lengths
from sedd.data.corpus import Corpus
from sedd.data.layout import Layout
from sedd.diffusion.discrete.process import Absorbing
from sedd.diffusion.schedule import Schedule
from sedd.errors import UserError
from sedd.evaluation.perplexity import perplexity
from sedd.evaluation.text import from_corpus
from sedd.generation.generate import Generator
from sedd.network.network import Network
from sedd.training.metrics import BOUND


@dataclasses.dataclass(frozen=True)
class Validator:
    """Evaluates parameters during training."""

    config: ConfigDict
    corpus: Corpus
    layout: Layout
    schedule: Schedule
    network: Network
    mesh: Mesh

    def bound(self, params: dict, on_batch: Callable[[], None]) -> dict[str, float]:
        """Returns the bound on the validation split, as in metrics.jsonl. on_batch: called after each batch."""
        scored = from_corpus(self.corpus, "validation", self.config.data.block_length)
        draws = self.config.evaluation.draws
        settings = dict(num_draws=draws, mesh=self.mesh, progress=False, on_batch=on_batch)
        report, _ = perplexity(self.network, self.schedule, params, scored, **settings)
        assert report.bits_per_byte is not None  # the number of bytes of a corpus is known
        return {BOUND: report.nats_per_token, "validation_bits_per_byte": report.bits_per_byte}

    def samples(self, params: dict, on_step: Callable[[], None]) -> tuple[list[str], list[np.ndarray]]:
        """Returns `evaluation.samples` texts, sampled with the same random numbers each time, and their tokens, Int[L].

        on_step: called after each step of the sampler.
        """
        if not self.config.evaluation.samples:
            return [], []
        block, seed = self.config.data.block_length, self.config.training.seed
        generator = Generator(self.network, params, self.schedule, self.corpus.tokenizer, self.layout, block)
        sampler = (
            "counts" if isinstance(self.network.process, Absorbing) else "tweedie"
        )  # the same distribution, fewer calls
        settings = dict(sampler=sampler, seed=seed, watch=lambda *_: on_step())
        drawn = generator.sample(self.config.evaluation.samples, **settings)
        assert drawn.texts is not None  # the generator has a tokenizer
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
    """Returns the layout of the corpus, as it is saved with a model: with its row lengths if padding is masked."""
    if not corpus.layout.masks_padding:
        return corpus.layout
    return dataclasses.replace(corpus.layout, row_lengths=row_lengths(corpus, block_length))
