"""The arrays of an encoder that nothing trains: its weights, and how its states are normalised."""

import io
import zipfile
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from etils import epath

from sedd.codecs.pretrained_encoder import PretrainedEncoder
from sedd.errors import UserError
from sedd.runtime import disk

_Arrays = TypeVar("_Arrays")

FILE = "encoder.npz"  # of the normalisation, in a run and in an export
DEAD = 1e-3  # a coordinate whose standard deviation is below this share of the median has no information


class Statistics(NamedTuple):
    """Of the hidden states of the ordinary tokens of a corpus."""

    mean: np.ndarray  # Float64[H]
    covariance: np.ndarray  # Float64[H H]

    def basis(self, width: int) -> np.ndarray:
        """What centred states are multiplied with, so that a coordinate has unit variance. Float32[H D].

        With width H each coordinate is divided by its standard deviation; with fewer, they are the principal components
        of these. Coordinates and components without variance are 0. width: at most H.
        """
        std = np.sqrt(np.maximum(np.diag(self.covariance), 0.0))  # rounding makes that of a constant negative
        scale = np.where(std > DEAD * np.median(std), 1 / np.maximum(std, 1e-30), 0.0)
        if width == len(std):
            return np.diag(scale).astype(np.float32)
        variances, components = np.linalg.eigh(self.covariance * np.outer(scale, scale))
        variances, components = variances[::-1][:width], components[:, ::-1][:, :width]
        gain = np.where(variances > DEAD**2 * variances[0], 1 / np.sqrt(np.maximum(variances, 1e-30)), 0.0)
        return (scale[:, None] * components * gain).astype(np.float32)


class Normalisation(NamedTuple):
    """What a run keeps of the statistics. Float32[H] and Float32[H D]."""

    mean: np.ndarray
    basis: np.ndarray


def encoder_arrays(pretrained: PretrainedEncoder, vocabulary: dict[str, int], end: int | None) -> dict:
    """The arrays that `Encoder.states` takes.

    vocabulary: ids of the corpus by the text of the token; end: its end-of-text id. UserError if there is none, or if
    the encoder does not have a token of the corpus.
    """
    if end is None:
        raise UserError("an encoder needs text with end-of-text ids; prepare the corpus again with its tokenizer.json")
    if missing := vocabulary.keys() - pretrained.vocabulary.keys():
        raise UserError(
            f"the encoder lacks {len(missing)} tokens of the corpus, such as {min(missing)!r}; prepare the corpus with "
            "the encoder's tokenizer.json, as huggingface:FILE or wordpieces:FILE"
        )
    ids = np.zeros(max(vocabulary.values()) + 1, np.int32)
    for text, number in vocabulary.items():
        ids[number] = pretrained.vocabulary[text]
    special = sorted(vocabulary[text] for text in pretrained.special.keys() & vocabulary.keys())
    arrays = {
        "encoder": pretrained.params,
        "ids": ids,
        "end": np.int32(end),
        "special_ids": np.array(special, np.int32),
    }
    return arrays if pretrained.start is None else arrays | {"start": np.int32(pretrained.start)}


def normalised(pretrained: PretrainedEncoder, arrays: dict, normalisation: Normalisation) -> dict:
    """The arrays that `Encoder.encode` takes, those of `encoder_arrays` included."""
    special = _special(pretrained, arrays["ids"][arrays["special_ids"]], normalisation.basis)
    return {**arrays, **normalisation._asdict(), "special": special}


def _special(pretrained: PretrainedEncoder, ids: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """The latents of special tokens: their static embeddings, of norm sqrt(D); that of padding is 0. Float32[K D]."""
    if not len(ids):
        return np.zeros((0, basis.shape[1]), np.float32)
    embeddings = pretrained.module.apply({"params": pretrained.params}, jnp.asarray(ids)[None], method="static")
    latents = np.asarray(embeddings)[0]
    latents = latents if basis.shape[0] == basis.shape[1] else latents @ basis
    latents *= basis.shape[1] ** 0.5 / np.maximum(np.linalg.norm(latents, axis=-1, keepdims=True), 1e-30)
    return np.where((ids == pretrained.padding)[:, None], 0.0, latents).astype(np.float32)


def save_normalisation(file: epath.Path, frozen: dict):
    """Writes what a model keeps of its frozen parameters; its config names the rest."""
    save_npz(file, Normalisation(*(np.asarray(frozen["codec"][name]) for name in Normalisation._fields)))


def save_npz(file: epath.Path, arrays: NamedTuple):
    """Writes the arrays of a named tuple to an .npz file, atomically."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays._asdict())
    disk.write_bytes_atomic(file, buffer.getvalue())


def load_npz(file: epath.Path, kind: Callable[..., _Arrays]) -> _Arrays:
    """Reads what `save_npz` wrote. UserError if the file is missing or damaged."""
    try:
        with np.load(io.BytesIO(file.read_bytes())) as arrays:
            return kind(**arrays)
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile):
        raise UserError(f"{file} is missing or damaged; restore it") from None
