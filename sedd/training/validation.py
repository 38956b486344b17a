"""Evaluation during training: the bound on the validation split, and samples."""

from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from sedd.data.corpus import Corpus
from sedd.evaluation.perplexity import perplexity
from sedd.evaluation.text import from_corpus
from sedd.generation.generate import sample
from sedd.generation.options import SamplingOptions
from sedd.generation.samplers import default_sampler
from sedd.trained import Trained
from sedd.training.metrics import BOUND


def validation_bound(
    trained: Trained, corpus: Corpus, num_draws: int, mesh: Mesh, on_batch: Callable[[], None]
) -> dict[str, float]:
    """Returns the bound on the validation split, as in metrics.jsonl. on_batch: called after each batch."""
    scored = from_corpus(corpus, "validation", trained.block_length)
    report, _ = perplexity(trained, scored, num_draws=num_draws, mesh=mesh, progress=False, on_batch=on_batch)
    assert report.bits_per_byte is not None  # the number of bytes of a corpus is known
    return {BOUND: report.nats_per_token, "validation_bits_per_byte": report.bits_per_byte}


def validation_samples(
    trained: Trained, num_samples: int, seed: int, on_step: Callable[[], None]
) -> tuple[list[str], list[np.ndarray]]:
    """Returns texts, sampled with the same random numbers each time, and their tokens, Int[L].

    on_step: called after each step of the sampler.
    """
    if not num_samples:
        return [], []
    options = SamplingOptions(sampler=default_sampler(trained.process), seed=seed, watch=lambda *_: on_step())
    drawn = sample(trained, num_samples, options=options)
    assert drawn.texts is not None  # the corpus has a tokenizer
    return drawn.texts, [row[row >= 0] for row in drawn.tokens]
