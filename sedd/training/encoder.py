"""What a run needs of a frozen encoder: its arrays, and statistics of its states that are kept with the corpus."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from sedd.codecs import frozen
from sedd.codecs.encoder import Encoder
from sedd.codecs.frozen import Normalisation, Statistics
from sedd.codecs.pretrained_encoder import PretrainedEncoder, read_encoder
from sedd.data.batches import batch
from sedd.data.corpus import Corpus
from sedd.data.tokenizers import vocabulary_of
from sedd.errors import UserError
from sedd.runtime import processes

ROWS, ROWS_AT_ONCE = 2048, 32  # of training batches, for the statistics; those of a small text repeat


def read_for(config: ConfigDict, corpus: Corpus) -> PretrainedEncoder:
    """Reads the encoder of a config, and records its digest and the width of the latents in the config.

    UserError if it is not the one that the config names, or if it cannot take the rows of the corpus.
    """
    codec, length = config.codec, config.data.block_length
    pretrained = read_encoder(codec.encoder)
    check_digest(pretrained, codec)
    longest = length + (pretrained.start is not None)
    if pretrained.max_length is not None and longest > pretrained.max_length and not codec.static:
        raise UserError(
            f"config: data.block_length={length} is too long for {codec.encoder}, which takes {pretrained.max_length} "
            f"tokens, its start token included; choose at most {pretrained.max_length - (longest - length)}"
        )
    codec.digest, codec.width = pretrained.digest, codec.width or pretrained.module.width
    return pretrained


def check_digest(pretrained: PretrainedEncoder, codec: ConfigDict):
    """UserError if an encoder is not the one with which a model was trained."""
    if codec.digest not in ("none", pretrained.digest):
        raise UserError(
            f"the encoder {codec.encoder} has the digest {pretrained.digest}, and the model needs {codec.digest}: it "
            "is another one, or a file was changed; restore it"
        )


def frozen_params(config: ConfigDict, corpus: Corpus, codec: Encoder, pretrained: PretrainedEncoder, folder) -> dict:
    """The parameters of a run that nothing trains. folder: of the run, whose normalisation it has once it is begun."""
    tokenizer = corpus.tokenizer
    arrays = frozen.encoder_arrays(pretrained, vocabulary_of(tokenizer), tokenizer.end_of_text)
    file = folder / frozen.FILE
    if file.exists():
        normalisation = frozen.load_npz(file, Normalisation)
        if len(normalisation.basis) != codec.encoder.width:
            raise UserError(f"{file} is of a run with another encoder; choose another --workdir")
    else:
        statistics = _statistics(config, corpus, codec, arrays)
        normalisation = Normalisation(statistics.mean.astype(np.float32), statistics.basis(config.codec.width))
    normalisation = Normalisation(*map(processes.broadcast_array_from_first, normalisation))
    return {"codec": frozen.normalised(pretrained, arrays, normalisation)}


def _statistics(config: ConfigDict, corpus: Corpus, codec: Encoder, arrays: dict) -> Statistics:
    """The statistics of the states of the corpus: those that it keeps, else computed, and kept if it can be written."""
    settings, length = config.codec, config.data.block_length
    name = f"encoder-{settings.digest}{'-static' * settings.static}-{length}.npz"
    file = epath.Path(corpus.path) / name
    if file.exists():
        return frozen.load_npz(file, Statistics)
    statistics = _measure(codec, jax.device_put(arrays), corpus, length)
    if processes.is_first():
        with contextlib.suppress(OSError):
            frozen.save_npz(file, statistics)
    return statistics


def _measure(codec: Encoder, arrays: dict, corpus: Corpus, length: int) -> Statistics:
    """The mean and the covariance over the ordinary tokens of ROWS rows of the training text."""
    sums, center = None, None
    batches = range(ROWS // ROWS_AT_ONCE)
    for number in tqdm(batches, desc="encoding", unit="batch", delay=2, disable=not processes.is_first()):
        tokens = batch(corpus, length, ROWS_AT_ONCE, seed=0, k=number).tokens
        if center is None:
            count_first, total, _ = _moments(codec, arrays, tokens, jnp.zeros(codec.encoder.width))
            center = total / jnp.maximum(count_first, 1)
        moments = [np.asarray(moment, np.float64) for moment in _moments(codec, arrays, tokens, center)]
        sums = moments if sums is None else [one + other for one, other in zip(sums, moments)]
    assert sums is not None and center is not None
    number_of_tokens, first, second = sums
    if number_of_tokens < 2:
        raise UserError(f"{corpus.path} has no ordinary tokens to encode; prepare one with text")
    first, second = first / number_of_tokens, second / number_of_tokens
    return Statistics(np.asarray(center, np.float64) + first, second - np.outer(first, first))


@functools.partial(jax.jit, static_argnums=0)
def _moments(codec: Encoder, arrays: dict, tokens: jax.Array, center: jax.Array) -> tuple[jax.Array, ...]:
    """The number of ordinary tokens, the sum of their states less `center`, and that of the outer products."""
    states, padding, is_special = codec.states(arrays, tokens)
    ordinary = ~padding & ~jnp.any(is_special, axis=-1)
    deviations = jnp.where(ordinary[..., None], states - center, 0.0).reshape(-1, states.shape[-1])
    return jnp.sum(ordinary), jnp.sum(deviations, axis=0), deviations.T @ deviations
