"""The Model: parameters with their config and tokenizer, to sample, infill, score and save."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from safetensors.numpy import save as save_arrays

from sedd import config as configs
from sedd import pretrained
from sedd.codecs.frozen import FILE, save_normalisation
from sedd.config_checks import MIN_LOW
from sedd.data.corpus import Corpus
from sedd.data.source import Source
from sedd.diffusion.denoiser import Denoiser, clamped
from sedd.errors import UserError
from sedd.evaluation.answers import answers_to
from sedd.evaluation.conditional import LogLikelihood, log_likelihoods
from sedd.evaluation.perplexity import perplexity
from sedd.evaluation.protocols import get_protocol, scoring_rows
from sedd.evaluation.report import Comparison, Report, Terms, make_comparison
from sedd.evaluation.resumable_draws import KEPT
from sedd.evaluation.scorers import ScoredTexts
from sedd.evaluation.text import check_compatible, from_texts
from sedd.generation import prompts
from sedd.generation.generate import Samples, generate, sample
from sedd.generation.options import MAX_STEPS, SamplingOptions
from sedd.generation.rows import Row, as_document, check_size
from sedd.network.latent_network import LatentNetwork
from sedd.network.network import Network
from sedd.network.token_network import TokenNetwork
from sedd.runtime import disk, folders, processes, storage
from sedd.runtime.settings import jax_defaults
from sedd.runtime.trees import fingerprint, named
from sedd.seeds import check_seed
from sedd.trained import Trained
from sedd.version import __version__

MAX_DRAWS = 2**20
WEIGHTS = "weights.safetensors"  # of an exported model
EXPORT = "export"  # the format of this project


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Model(Trained):
    """A trained model, and what people do with it.

    params: the EMA parameters if the run keeps them; config: that of the training run.
    """

    config: ConfigDict

    @jax_defaults()
    def log_score(
        self,
        tokens: jax.Array,
        sigma: jax.Array,
        lengths: jax.Array | None = None,
        given: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the log concrete score, Float32[B L S]: 0 at the current token, with a column for the mask.

        tokens: Int[B L]; sigma: Float[B], total noise that the network is conditioned on, not clipped; lengths: Int[B],
        valid tokens per row, for a model of padded documents with ignored padding; given: Bool[B L], True at clean
        tokens, for a model with `network.given_embedding`.
        """
        if self.process.over_latents:
            raise UserError("a model of latents has no concrete score; use denoiser")
        arrays = (None if array is None else jnp.asarray(array) for array in (tokens, sigma, lengths, given))
        return _log_score(self.network, self.all_params, *arrays)

    def denoiser(
        self, tokens: jax.Array | None = None, given: jax.Array | None = None, lengths: jax.Array | None = None
    ) -> Denoiser:
        """Returns the Denoiser, for custom samplers. It closes over the parameters: call this inside jit.

        tokens: Int[B L] with given: Bool[B L], tokens that the denoiser sees clean at every step; a network with
        `network.given_embedding` is also conditioned on `given`. lengths: Int[B], valid tokens per row.
        UserError if only one of tokens and given is passed, or for a model that does not infill.
        """
        if (tokens is None) != (given is None):
            raise UserError("denoiser: pass both tokens and given, or neither")
        if given is not None and not self.network.infills:
            raise UserError("denoiser: the encoding of a given token depends on all others; leave out tokens and given")
        flags = jnp.asarray(given) if self.network.given_embedding and given is not None else None
        denoiser = self.network.denoiser(self.all_params, lengths, flags)
        if given is None:
            return denoiser
        return clamped(denoiser, self.network.clean(self.all_params, jnp.asarray(tokens)), ~jnp.asarray(given))

    def sample(self, num_samples: int = 1, length: int | None = None, **options: Any) -> Samples:
        """Samples texts unconditionally.

        length: tokens per text. The default is the block length, or for padded documents with ignored padding a length
        drawn from those of the training corpus. A model of packed text samples texts longer than a block
        semi-autoregressively, each block with its first half given; a uniform model then adds Gibbs corrector steps,
        as in `infill`. options: of `sedd.generation.options.SamplingOptions`: steps, sampler, temperature, top_p,
        seed, batch_size, trace, watch. UserError for an invalid argument, before compilation.
        """
        return sample(self, num_samples, length, SamplingOptions(**options))

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
        **options: Any,
    ) -> Samples:
        """Samples the free positions of texts, conditioned on the given tokens, which do not change.

        The input is one of three: one or several templates with blanks of n tokens anywhere, as in
        "The <blank:8> sat on the <blank:5>."; a prefix and a suffix of a text of `length` tokens (default: the block
        length); or arrays, tokens: Int[N L] or Int[L] with given: Bool of the same shape. Each row of input gets
        `num_samples` samples.

        Conditioning is exact for Absorbing, and for Uniform and Gaussian trained with `network.given_embedding`. Other
        models treat given tokens as noisy at high noise levels. Of a Gaussian one the embeddings of given tokens are
        written back after each step, which leaves a bias. Of a uniform one the samplers `euler`, `tweedie` and
        `trapezoidal`, if given by name, then add a Gibbs corrector with one more network call per step. The remaining
        bias is described in `sedd.diffusion.discrete.correctors`.

        A text ends at the first end-of-text token after the last given token. A row of arrays without free positions
        is returned unchanged. options: as in `sample`. UserError for an invalid argument, before compilation.
        """
        inputs = [
            template is not None,
            prefix is not None or suffix is not None,
            not (tokens is None and given is None),
        ]
        if sum(inputs) != 1:
            raise UserError("infill takes a template, or a prefix and a suffix, or tokens with given")
        if length is not None and not inputs[1]:
            raise UserError("length goes with a prefix and a suffix; a template or an array has its own")
        if num_samples < 1:
            raise UserError(f"the number of samples must be at least 1, not {num_samples}")
        if inputs[2]:
            rows = prompts.of_arrays(tokens, given, self.vocab_size)
        else:
            texts = [template] if isinstance(template, str) else template
            rows = self._of_texts(texts, prefix or "", suffix or "", length)
        check_size(num_samples * len(rows), max((len(row.tokens) for row in rows), default=0))
        rows = [row for row in rows for _ in range(num_samples)]
        return generate(self, rows, SamplingOptions(**options))

    def perplexity(self, texts_or_corpus: str | Sequence[str] | Corpus | Source, **settings) -> Report:
        """Estimates the NLL bound (negative ELBO) of texts, each a document, of a split of a corpus, or of a source.

        Returns a Report: bound, perplexity, bits per byte, with standard errors. settings: split, of a corpus (that of
        the protocol, else "test"); protocol, a name in `sedd.evaluation.protocols` ("clean"); draws, noise levels per
        block (that of the protocol, else `config.evaluation.draws`); low, of a Gaussian model the sigma at which the
        bound passes to the tokens (`config.evaluation.low`); steps, of an absorbing model: the bound is that of
        sampling in this number of steps (`DiscreteTimeBound`), not of continuous time; seed, of the noise (0);
        batch_size, blocks per batch, which does not change the result; out, a folder that keeps the scores, from which
        an interrupted evaluation resumes; progress, True to show it.

        UserError if there is no text to score, or if the corpus has another tokenizer than the model.
        """
        return self._score(texts_or_corpus, **settings)[0]

    def compare(self, other: "Model", texts_or_corpus: str | Sequence[str] | Corpus | Source, **settings) -> Comparison:
        """Compares the `perplexity` of two models on the same rows with the same noise.

        Returns both reports and their difference with its standard error.
        settings: as in `perplexity`. UserError unless the models have the same tokenizer, block length and layout.
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
        outs = (None, None) if out is None else (out / "first", out / "second")
        protocol = get_protocol(settings.get("protocol", "clean"))
        for model in (self, other):
            model._network_for(settings.get("low"), settings.get("steps"))
        if settings.get("draws") is None:
            settings["draws"] = protocol.draws or self.config.evaluation.draws
        with folders.locked_by_first(out):
            models = zip((self, other), outs)
            scores = [model._score(texts_or_corpus, out=folder, **settings) for model, folder in models]
            comparison = make_comparison(*scores)
            if out is not None and processes.is_first():
                with storage.user_errors(out, KEPT):
                    disk.write_text_atomic(out / "comparison.json", comparison.to_json() + "\n")
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
        """Returns log p(answer | given) in nats: exact if that is affordable, else a lower bound. A list for a list.

        The scored tokens are those of given + answer after the common prefix with the tokens of `given`. Answers in a
        list share their noise. The text after the answer is marginalised out; only a model of padded documents with
        ignored padding is conditioned on the length, so that there the text ends with the answer. method, draws: see
        `sedd.evaluation.conditional`. UserError for an empty answer, or for more tokens than a block.
        """
        check_draws(draws)
        texts = [answer] if isinstance(answer, str) else list(answer)
        results = log_likelihoods(self, answers_to(given, texts, self), method, draws, seed)
        return results[0] if isinstance(answer, str) else results

    def score_texts(self, texts: Sequence[str]) -> ScoredTexts:
        """Returns the NLL bound of each text in nats, and its number of tokens, to score samples of other models.

        An empty text has 0 nats and 0 tokens.
        """
        nats, counts = np.zeros(len(texts)), np.zeros(len(texts), int)
        nonempty = np.array([bool(text) for text in texts])
        if nonempty.any():
            documents = [text for text in texts if text]
            rows = from_texts(documents, self, has_eos_markers=True)
            draws = self.config.evaluation.draws
            _, terms = perplexity(self, rows, num_draws=draws, progress=False)
            nats[nonempty] = np.bincount(terms.clusters, terms.rows)
            counts[nonempty] = np.bincount(terms.clusters, terms.counts)
        return ScoredTexts(nats, counts)

    def save(self, directory: str | Path, format: str = EXPORT):
        """Exports weights, config and tokenizer to a folder that `load` reads.

        format: that of published checkpoints, which their authors' code reads too: sedd, mdlm, duo, udlm, radd,
        bd3lm or masked_lm; or EXPORT, that of this project. Atomic: a write that fails leaves no file. With several
        processes all of them call it, and process 0 writes. UserError if the folder is not empty, or if the format
        cannot hold the model.
        """
        directory = storage.folder_of(directory)
        write = self._write if format == EXPORT else pretrained.writer(format, self, self.config)
        with folders.locked_by_first(directory), processes.together():
            if processes.is_first():
                with folders.filled(directory):
                    write(directory)

    def _write(self, directory: epath.Path):
        if self.tokenizer is not None:
            self.tokenizer.save(directory / "tokenizer")
        about = {
            "format": configs.FORMAT,
            "sedd": __version__,
            "config": self.config.to_dict(),
            "vocab_size": self.vocab_size,
            "layout": self.layout.to_json(),
        }
        if self.frozen:
            save_normalisation(directory / FILE, self.frozen)
        (directory / WEIGHTS).write_bytes(save_arrays(named(jax.device_get(self.params))))
        (directory / "config.json").write_text(
            json.dumps(about, indent=2) + "\n"
        )  # written last: it marks a complete export

    def _score(
        self,
        texts_or_corpus: str | Sequence[str] | Corpus | Source,
        split: str | None = None,
        protocol: str = "clean",
        draws: int | None = None,
        low: float | None = None,
        steps: int | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        out: str | Path | None = None,
        progress: bool = True,
    ) -> tuple[Report, Terms]:
        check_seed(seed)
        rules = get_protocol(protocol)
        draws = draws if draws is not None else rules.draws or self.config.evaluation.draws
        check_draws(draws)
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
        data = [texts_or_corpus] if isinstance(texts_or_corpus, str) else texts_or_corpus
        if split is not None and not isinstance(data, Corpus):
            raise UserError(f"there is no split {split!r}: a corpus has splits, a source or a list of texts has none")
        if steps is not None and not rules.is_bound:
            raise UserError(f"steps goes with the protocol clean; {protocol} has a loss of its own")
        trained: Trained = dataclasses.replace(self, network=self._network_for(low, steps))
        if isinstance(data, Corpus):
            check_compatible(data, self)
            trained = dataclasses.replace(trained, tokenizer=data.tokenizer)
        tokenizer = trained.require_tokenizer()
        rows = scoring_rows(rules, data, split or rules.split, trained)
        about = {"model": fingerprint(self.params), "tokenizer": tokenizer.fingerprint, "config": self.config.to_dict()}
        settings: dict[str, Any] = {"about": about, "folder": out and storage.folder_of(out)}
        settings |= {"batch_size": batch_size, "progress": progress}
        return perplexity(trained, rows, rules, draws, seed, **settings)

    def _network_for(self, low: float | None, steps: int | None) -> Network:
        """The network with the bound of these settings of `perplexity`. UserError for one that has no such bound."""
        network = self.network
        if low is not None:
            if not isinstance(network, LatentNetwork):
                raise UserError("low is a noise level of the bound of Gaussian models; leave it out")
            high = float(self.schedule.sigma(1.0))
            if not MIN_LOW <= low < high:
                raise UserError(f"low must be a sigma from {MIN_LOW:g} to below that of the schedule's end, {high:.3g}")
            network = dataclasses.replace(network, bound_low=low)
        if steps is not None:
            if not isinstance(network, TokenNetwork) or self.process.mask_id is None:
                raise UserError("steps is a bound in discrete time of absorbing models; leave it out")
            if network.block_of_generation == 1:
                raise UserError("steps is not for an autoregressive model, whose likelihood is exact; leave it out")
            if not 1 <= steps <= MAX_STEPS:
                raise UserError(f"steps must be at least 1 and at most {MAX_STEPS:,}, not {steps}")
            network = dataclasses.replace(network, bound_steps=steps)
        return network

    def _of_texts(self, templates: Sequence[str] | None, prefix: str, suffix: str, length: int | None) -> list[Row]:
        """Returns prompts from templates, or from a prefix and a suffix, formatted like documents of training."""
        tokenizer, in_order = self.require_tokenizer(), self.network.block_of_generation is not None
        if templates is not None:
            rows = [prompts.of_template(text, tokenizer) for text in templates]
        else:
            length = self.block_length if length is None else length
            end = int(self.layout.padded and not in_order)  # the end-of-text token is part of the length
            rows = [prompts.between(prefix, suffix, length - end, tokenizer)]
        if in_order:
            return rows  # the end of the text is generated too
        return [as_document(row, self.layout, self.block_length, tokenizer.end_of_text) for row in rows]


def check_draws(draws: int):
    """Raises UserError for a number of draws that is not in 1 .. MAX_DRAWS, before memory is allocated."""
    if not 1 <= draws <= MAX_DRAWS:
        raise UserError(f"draws must be at least 1 and at most {MAX_DRAWS:,}, not {draws}")


@functools.partial(jax.jit, static_argnums=0)
def _log_score(network, params, tokens, sigma, lengths, given):
    return network.log_score(params, tokens, sigma, lengths, given)
