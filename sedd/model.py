"""A model: parameters with their config and tokenizer, and what people do with them."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from safetensors.numpy import save as save_arrays

from sedd import config as configs
from sedd import prompts
from sedd.data.corpus import Corpus
from sedd.data.layout import Layout
from sedd.data.source import Source
from sedd.data.tokenizers import Tokenizer
from sedd.diffusion.process import Process
from sedd.diffusion.schedule import Schedule
from sedd.diffusion.score import Denoiser, clamped
from sedd.errors import UserError
from sedd.evaluation.conditional import LogLikelihood, answers_to, log_likelihoods
from sedd.evaluation.perplexity import perplexity
from sedd.evaluation.protocols import get_protocol, scoring_rows
from sedd.evaluation.report import Comparison, Report, Terms, make_comparison
from sedd.evaluation.scorers import ScoredTexts
from sedd.evaluation.scoring import KEPT
from sedd.evaluation.text import check_compatible, from_texts
from sedd.generation import Generator, Samples, SamplingOptions
from sedd.network.network import Network
from sedd.parallel import fingerprint, named
from sedd.prompts import Prompt
from sedd.runtime import disk, processes, storage
from sedd.runtime.settings import jax_defaults
from sedd.seeds import check_seed

MOST_DRAWS = 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A trained model.

    params: the EMA where the run keeps one; tokenizer: None where none is known; layout: how the documents lay in
    blocks that it was trained on.
    """

    config: ConfigDict
    params: dict
    tokenizer: Tokenizer | None
    process: Process
    schedule: Schedule
    network: Network
    layout: Layout = Layout()

    @property
    def block_length(self) -> int:
        """The length it was trained at, in tokens; the default of sampling and infilling."""
        return self.config.data.block_length

    @jax_defaults()
    def log_score(
        self,
        tokens: jax.Array,
        sigma: jax.Array,
        lengths: jax.Array | None = None,
        given: jax.Array | None = None,
    ) -> jax.Array:
        """The log concrete score, the mask's column too, 0 at the current token.

        tokens: Int[B L]; sigma: Float[B], the noise the network is told, unclipped; lengths: Int[B], the valid ones, of
        a model of padded documents whose padding is ignored; given: Bool[B L], the clean tokens, of a model with
        `network.given_embedding`. Returns Float32[B L S].
        """
        told = (None if array is None else jnp.asarray(array) for array in (tokens, sigma, lengths, given))
        return _log_score(self.network, self.params, *told)

    def denoiser(
        self, tokens: jax.Array | None = None, given: jax.Array | None = None, lengths: jax.Array | None = None
    ) -> Denoiser:
        """A Denoiser, for samplers of your own. It holds the parameters: make it inside jit.

        tokens: Int[B L] with given: Bool[B L], what it sees at those positions wherever a sampler has got to, and what
        a network with `network.given_embedding` is told to be given;
        lengths: Int[B], the valid ones.
        """
        if (tokens is None) != (given is None):
            raise UserError("denoiser: tokens and given go together")
        flags = jnp.asarray(given) if self.network.given_embedding and given is not None else None
        denoiser = self.network.denoiser(self.params, lengths, flags)
        return denoiser if given is None else clamped(denoiser, jnp.asarray(tokens), ~jnp.asarray(given))

    def sample(self, num_samples: int = 1, length: int | None = None, **settings: Unpack[SamplingOptions]) -> Samples:
        """Draws texts of `length` tokens, by default a whole block, or where documents were padded and their padding
        ignored, as long as those are. Longer than a block they are drawn block after block, each with its first half
        given, which only packed text can be; a uniform model then resamples on its way, as `infill` says.

        settings: `sedd.generation.Drawing`: steps, sampler, temperature, top_p, seed, batch_size, trace, watch.
        """
        return self.generator.sample(num_samples, length, **settings)

    def infill(
        self,
        template: str | Sequence[str] | None = None,
        *,
        prefix: str | None = None,
        suffix: str | None = None,
        length: int | None = None,
        tokens: np.ndarray | None = None,
        given: np.ndarray | None = None,
        num_samples: int = 1,
        **settings: Unpack[SamplingOptions],
    ) -> Samples:
        """Fills in the free positions given the others, which stay as they are.

        What is given comes in one of three ways: a template or several, with blanks of so many tokens anywhere, as in
        "The <blank:8> sat on the <blank:5>."; a prefix and a suffix in a text of `length` tokens (default: a block);
        or arrays, tokens: Int[N L] or Int[L] with given: Bool of the same shape. Each row gets `num_samples` samples.

        With Absorbing the given tokens are part of what the model conditions on exactly, and with Uniform where it was
        trained with `network.given_embedding`. Any other uniform model takes them for noise at high noise levels, so
        that `euler`, `tweedie` and `trapezoidal` by name resample on their way, at one more call a step:
        `sedd.diffusion.correctors` says what bias stays.
        The texts end at the first end-of-text token after the last given one; a row of an array in which all is given
        comes back as it is. settings: as of `sample`.
        """
        ways = [template is not None, prefix is not None or suffix is not None, tokens is not None or given is not None]
        if sum(ways) != 1:
            raise UserError("infill takes a template, or a prefix and a suffix, or tokens with given")
        if length is not None and not ways[1]:
            raise UserError("length goes with a prefix and a suffix; a template or an array has its own")
        if num_samples < 1:
            raise UserError(f"the number of samples must be at least 1, not {num_samples}")
        if ways[2]:
            rows = prompts.of_arrays(tokens, given, self.process.vocab_size)
        else:
            texts = [template] if isinstance(template, str) else template
            rows = self._of_texts(texts, prefix or "", suffix or "", length)
        prompts.check_size(num_samples * len(rows), max((len(row.tokens) for row in rows), default=0))
        rows = [row for row in rows for _ in range(num_samples)]
        return self.generator.generate(rows, **settings)

    def perplexity(self, texts_or_corpus: str | Sequence[str] | Corpus | Source, **settings) -> Report:
        """A bound on the negative log-likelihood of texts, one by one, of a corpus' split, or of a source.

        split: of a corpus, by default "test", or what the protocol has; protocol: a name of
        `sedd.evaluation.protocols`, by default "clean"; draws: noise levels a block, by default what the protocol says,
        or `config.evaluation.draws`; seed: of the noise; batch_size: blocks at a time, which changes no number; out: a
        folder that keeps what is scored and goes on from it; progress: whether to show it.

        UserError if there is nothing to score, or it was made with another tokenizer.
        """
        return self._score(texts_or_corpus, **settings)[0]

    def compare(self, other: "Model", texts_or_corpus: str | Sequence[str] | Corpus | Source, **settings) -> Comparison:
        """Both models' `perplexity` on the same rows with the same noise, and the difference with its own error.

        UserError unless they have the same tokenizer, block length and layout.
        """
        if (self.block_length, self.layout.name) != (other.block_length, other.layout.name):
            raise UserError(
                f"the models cannot be compared row by row: one has {self.layout.name} blocks of {self.block_length}, "
                f"the other {other.layout.name} blocks of {other.block_length}"
            )
        if self.tokenizer and other.tokenizer and self.tokenizer.fingerprint != other.tokenizer.fingerprint:
            raise UserError("the models cannot be compared row by row: they have different tokenizers")
        out = settings.pop("out", None)
        out = None if out is None else storage.folder_of(out)
        folders = (None, None) if out is None else (out / "first", out / "second")
        protocol = get_protocol(settings.get("protocol", "clean"))
        if settings.get("draws") is None:
            settings["draws"] = protocol.draws or self.config.evaluation.draws
        with storage.locked_by_first(out):
            found = [model._score(texts_or_corpus, out=at, **settings) for model, at in zip((self, other), folders)]
            comparison = make_comparison(*found)
            if out is not None and processes.is_first():
                with storage.user_errors(out, KEPT):
                    disk.write_json_atomic(out / "comparison.json", comparison.to_json() + "\n")
        return comparison

    def log_likelihood(
        self,
        answer: str | Sequence[str],
        given: str = "",
        *,
        method: str = "auto",
        draws: int = 64,
        seed: int = 0,
    ) -> LogLikelihood | list[LogLikelihood]:
        """log p(answer | given) in nats: exactly where that is affordable, else from below. A list gives a list.

        The tokens scored are those of given + answer beyond what they share with those of `given`. Answers in a list
        share their noise. What would follow the answer is left open, but where documents were padded and their padding
        ignored: there the text ends with the answer, as the model has to be told its length. See
        `sedd.evaluation.conditional` for the methods. UserError for an empty answer, or more tokens than a block.
        """
        check_draws(draws)
        texts = [answer] if isinstance(answer, str) else list(answer)
        answers = answers_to(given, texts, self._require_tokenizer(), self.process, self.block_length, self.layout)
        found = log_likelihoods(self.network, self.schedule, self.params, answers, method, draws, seed)
        return found[0] if isinstance(answer, str) else found

    def score_texts(self, texts: Sequence[str]) -> ScoredTexts:
        """What each text costs under this model, from above: a judge of the samples of others. An empty one is free."""
        nats, counts = np.zeros(len(texts)), np.zeros(len(texts), int)
        told = np.array([bool(text) for text in texts])
        if told.any():
            full = [text for text in texts if text]
            scored = from_texts(full, self._require_tokenizer(), self.block_length, self.layout, has_eos_markers=True)
            draws = self.config.evaluation.draws
            _, terms = perplexity(self.network, self.schedule, self.params, scored, num_draws=draws, progress=False)
            nats[told] = np.bincount(terms.clusters, terms.rows)
            counts[told] = np.bincount(terms.clusters, terms.counts)
        return ScoredTexts(nats, counts)

    def save(self, directory: str | Path):
        """Exports all that `load` needs: weights, config and tokenizer. UserError if the folder is not empty.

        What cannot be written to its end leaves nothing. With several processes all of them call it, and process 0
        writes.
        """
        directory = storage.folder_of(directory)
        with storage.locked_by_first(directory), processes.together():
            if processes.is_first():
                with storage.filled(directory):
                    self._write(directory)

    def _write(self, directory: epath.Path):
        if self.tokenizer is not None:
            self.tokenizer.save(directory / "tokenizer")
        about = {
            "format": configs.FORMAT,
            "config": self.config.to_dict(),
            "vocab_size": self.process.vocab_size,
            "layout": self.layout.to_json(),
        }
        (directory / "weights.safetensors").write_bytes(save_arrays(named(jax.device_get(self.params))))
        (directory / "config.json").write_text(json.dumps(about, indent=2) + "\n")  # last: with it, it is a model

    def _score(
        self,
        texts_or_corpus: str | Sequence[str] | Corpus | Source,
        split: str | None = None,
        protocol: str = "clean",
        draws: int | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        out: str | Path | None = None,
        progress: bool = True,
    ) -> tuple[Report, Terms]:
        check_seed(seed)
        protocol = get_protocol(protocol)
        draws = draws if draws is not None else protocol.draws or self.config.evaluation.draws
        check_draws(draws)
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
        text = [texts_or_corpus] if isinstance(texts_or_corpus, str) else texts_or_corpus
        if split is not None and not isinstance(text, Corpus):
            raise UserError(f"there is no split {split!r}: a corpus has splits, a source or a list of texts has none")
        if isinstance(text, Corpus):
            tokenizer = check_compatible(text, self.tokenizer, self.process.vocab_size, self.layout)
        else:
            tokenizer = self._require_tokenizer()
        scored = scoring_rows(protocol, text, split or protocol.split, tokenizer, self.block_length, self.layout)
        about = {"model": fingerprint(self.params), "tokenizer": tokenizer.fingerprint, "config": self.config.to_dict()}
        settings = dict(about=about, folder=out and storage.folder_of(out), batch_size=batch_size, progress=progress)
        return perplexity(self.network, self.schedule, self.params, scored, protocol, draws, seed, **settings)

    def _of_texts(self, templates: Sequence[str] | None, prefix: str, suffix: str, length: int | None) -> list[Prompt]:
        """The prompts of templates, or of a prefix and a suffix, as documents of the corpus."""
        tokenizer = self._require_tokenizer()
        if templates is not None:
            rows = [prompts.of_template(text, tokenizer) for text in templates]
        else:
            length = self.block_length if length is None else length
            end = int(self.layout.padded)  # the end-of-text token is part of the length
            rows = [prompts.between(prefix, suffix, length - end, tokenizer)]
        return [prompts.as_document(row, self.layout, self.block_length, tokenizer.end_of_text) for row in rows]

    @property
    def generator(self) -> Generator:
        """What draws its texts."""
        return Generator(self.network, self.params, self.schedule, self.tokenizer, self.layout, self.block_length)

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer, so it takes no text; load it with one, or use token arrays")
        return self.tokenizer


def check_draws(draws: int):
    """UserError, before they take any memory, for a number of draws that nothing can be estimated with."""
    if not 1 <= draws <= MOST_DRAWS:
        raise UserError(f"draws must be at least 1 and at most {MOST_DRAWS:,}, not {draws}")


@functools.partial(jax.jit, static_argnums=0)
def _log_score(network, params, tokens, sigma, lengths, given):
    return network.log_score(params, tokens, sigma, lengths, given)
