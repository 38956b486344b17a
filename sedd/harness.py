"""Adapter for the lm-evaluation-harness (the package `lm_eval`).

    lm_eval.simple_evaluate(model=Harness("runs/mine"), tasks=["lambada_openai"])          # in Python
    python -m sedd.harness --model sedd --model_args pretrained=runs/mine --tasks lambada_openai

The second is lm_eval's own command with this model registered. Each method documents what its number is.
"""

import dataclasses
import functools
import itertools
import logging
import sys
from pathlib import Path
from typing import cast

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sedd.data.tokenizers import Ends, Tokenizer
from sedd.diffusion.discrete.pickers import Margin, Picker
from sedd.diffusion.discrete.process import Absorbing
from sedd.diffusion.discrete.unmasking import Adaptive
from sedd.errors import UserError
from sedd.evaluation.answers import answers_to
from sedd.evaluation.conditional import METHODS, log_likelihoods
from sedd.evaluation.perplexity import perplexity
from sedd.evaluation.text import from_texts
from sedd.generation import prompts
from sedd.generation.generate import generate, sampler_for
from sedd.generation.options import SamplingOptions
from sedd.generation.rows import Row, Rows, as_document, joined
from sedd.loading import load, with_tokenizer
from sedd.model import Model, check_draws
from sedd.runtime import streams

try:
    import lm_eval.models  # noqa: F401, first: lm_eval registers its own models only while the registry is empty
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import simple_parse_args_string

    from sedd import harness_settings as settings
    from sedd.harness_settings import GenerationRequest
except ImportError:
    if __name__ == "__main__":
        sys.exit("sedd: error: the harness needs the package lm_eval: pip install 'sedd[harness]'")
    raise UserError("the harness needs the package lm_eval: pip install 'sedd[harness]'") from None

OWN = ("pretrained", "tokenizer", "encoder", "method", "draws", "seed", "max_gen_toks")  # the arguments of Harness
QUESTIONS_PER_UPDATE = 64  # of the progress bar
GREEDY_TOP_P = 1e-6  # top_p that keeps only the most likely token of every distribution


@dataclasses.dataclass(frozen=True)
class Greedy(Adaptive):
    """Unmasks one token a network call, the one of the largest margin, with its most likely value. Deterministic."""

    picker: Picker = Margin()

    def step(self, keys, denoiser, x, entry):
        log_clean = denoiser(x, self.process.sigma_from_mask_ratio(x), None)
        most_likely = jnp.argmax(log_clean, axis=-1).astype(x.dtype)
        return jnp.where(self.choose(log_clean, x, entry), most_likely, x)


@register_model("sedd")
class Harness(LM):
    """A Model for lm_eval: log-likelihoods of continuations and of documents, and generation.

    pretrained: an argument of `sedd.load`, or a Model; tokenizer, encoder: as in `sedd.load`; method, draws,
    seed: as in `Model.log_likelihood`, where draws is also the number of noise levels a block of
    `loglikelihood_rolling`; None selects the default. max_gen_toks: the length of a continuation where the task sets
    none. UserError for invalid arguments, and for a model without tokenizer.

    others: arguments that lm_eval passes to every model, and those of its flags and other models. They have no effect:
    rows are batched here, and JAX chooses the device. UserError for one that would have an effect, such as a dtype that
    is not the model's.
    """

    def __init__(
        self,
        pretrained: str | Path | Model | None = None,
        tokenizer: str | None = None,
        encoder: str | None = None,
        method: str | None = None,
        draws: int | None = None,
        seed: int | None = None,
        max_gen_toks: int | None = None,
        **others,
    ):
        super().__init__()
        self.method, draws = method or "auto", settings.whole_number("draws", draws, None)
        if draws is not None:
            check_draws(draws)
        self.seed = settings.whole_number("seed", seed, 0)
        self.max_gen_toks = settings.whole_number("max_gen_toks", max_gen_toks, 64)
        if self.method not in METHODS:
            raise UserError(f"there is no method {method!r}; there are {', '.join(METHODS)}")
        if not pretrained:
            raise UserError("name the model, as in --model_args pretrained=runs/mine")
        if isinstance(pretrained, Model):
            model = with_tokenizer(pretrained, tokenizer) if tokenizer else pretrained
        else:
            model = load(pretrained, tokenizer or None, encoder)  # lm_eval passes an empty name
        accepted = {"dtype": ("auto", model.config.network.dtype), "max_length": (model.block_length,)}
        settings.check_model_args(others, OWN, accepted)
        self.model = model
        if self.model.tokenizer is None:
            raise UserError(
                "this model has no tokenizer; name the one it was trained with, as in tokenizer=gpt2:FOLDER"
            )
        self.noise = {"seed": self.seed} | ({} if draws is None else {"num_draws": draws})

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> "Harness":
        """Called by lm_eval with --model_args, and with flags such as --device, which --model_args override."""
        return cls(**{**(additional_config or {}), **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "Harness":
        """The same for arguments in a string."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """UserError: these models have no chat template."""
        raise UserError("the models of this package have no chat template; leave out --apply_chat_template")

    @property
    def tokenizer_name(self) -> str:
        """The identity of the tokenizer, for lm_eval's caches."""
        return self._tokenizer.fingerprint

    def get_model_info(self) -> dict:
        """The settings of the estimator, which lm_eval writes into its results."""
        about = {"method": self.method, "block_length": self.model.block_length, "tokenizer": self.tokenizer_name}
        return about | {"lengths": "given" if self.model.layout.masks_padding else "open"} | self.noise

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Returns log p(continuation | context) of each request, nats, and True if greedy decoding gives it.

        The number is that of `Model.log_likelihood` with this method: exact, or a lower bound. The options of a
        question are scored by one method with the same noise. White space at the end of a context moves to the
        continuation. A context that does not fit into the block is truncated on the left. UserError, before any
        scoring, for a continuation longer than the block, and for a context with a Uniform model that has no
        given_embedding.

        Greedy decoding is that of `generate_until`, given the number of tokens of the continuation.
        """
        groups = itertools.groupby(requests, key=lambda request: (request.doc_id, request.args[0]))
        questions = self._questions([[request.args for request in group] for _, group in groups])
        model, results = self.model, []
        score = functools.partial(log_likelihoods, model)
        size = QUESTIONS_PER_UPDATE
        for start in tqdm(range(0, len(questions), size), desc="scoring", unit=f"{size} questions", delay=2):
            batch = questions[start : start + size]
            likelihoods = [one for answers in batch for one in score(answers, self.method, **self.noise)]
            for likelihood, greedy in zip(likelihoods, self._are_greedy(batch), strict=True):
                results.append((likelihood.nats, greedy))
                self.cache_hook.add_partial("loglikelihood", requests[len(results) - 1].args, results[-1])
        return results

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Returns a lower bound on log p of each document, nats: that of `Model.perplexity` for a task's documents.

        A document longer than a block is cut into independent blocks, so that each token is scored once. An empty
        document has 0. A model trained on padded documents with padding ignored is conditioned on their lengths.
        """
        results: list[float] = []
        for _, group in itertools.groupby(requests, key=lambda request: request.task_name):
            results += self._document_bounds([request.args[0] for request in group])
        return results

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Infills `max_gen_toks` or `max_new_tokens` tokens after each context, and cuts at the first of `until`.

        A context that leaves no room for them is truncated on the left. With `do_sample` false, with neither it nor a
        temperature, or at temperature 0, decoding is greedy: each network call unmasks the position of the largest
        margin with its most likely token. A Uniform process has no such order, and samples the most likely tokens only,
        with `seed`. Otherwise the settings are those of `Model.infill`: temperature, top_p, seed, sampler, steps.
        UserError for any other setting that would have an effect, such as num_beams=2.
        """
        requested = [settings.generation(request.args[1], self.max_gen_toks) for request in requests]
        generations = [self._generation(one) for one in requested]
        for generation in dict.fromkeys(generations):  # before any sampling
            sampler_for(self.model, generation.sampling)
        full = [request.args[0] for request in requests]
        contexts = [
            self._truncate_left(context, [""], self._room - generation.num_tokens)
            for context, generation in zip(full, generations)
        ]
        self._warn_of_truncation(contexts, full)
        texts = [""] * len(requests)
        for generation in dict.fromkeys(generations):
            at = [number for number, other in enumerate(generations) if other == generation]
            continuations = self._continuations([contexts[number] for number in at], generation)
            for number, (context, ids) in zip(at, continuations, strict=True):
                texts[number] = self._until(context, ids, requested[number].until)
                self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
        return texts

    def _questions(self, groups: list[list[tuple[str, str]]]) -> list[Rows]:
        """Answers for groups of (context, continuation), one context a group."""
        questions = []
        full = [group[0][0].rstrip() for group in groups]
        contexts = []
        for context, group in zip(full, groups):
            texts = [before[len(context) :] + continuation for before, continuation in group]
            contexts.append(self._truncate_left(context, texts, self._room))
            questions.append(answers_to(contexts[-1], texts, self.model))
        self._warn_of_truncation(contexts, full)
        return questions

    def _document_bounds(self, texts: list[str]) -> list[float]:
        """The lower bound on log p of each document of a task, nats."""
        model, nonempty = self.model, [number for number, text in enumerate(texts) if text]
        nats = np.zeros(len(texts))
        if nonempty:
            documents = [texts[number] for number in nonempty]
            scored = from_texts(documents, model)
            noise = {"num_draws": model.config.evaluation.draws} | self.noise
            _, terms = perplexity(model, scored, **noise)
            nats[nonempty] = -np.bincount(terms.clusters, terms.rows, minlength=len(nonempty))
        return nats.tolist()

    def _are_greedy(self, questions: list[Rows]) -> list[bool]:
        """True for each row whose free tokens greedy decoding reproduces."""
        rows = [row for answers in questions for row in _rows(answers)]
        # Sorted by the number of free tokens, so that the rows of a batch take equally many network calls.
        order = np.argsort([np.sum(row.free) for row in rows], kind="stable")
        decoded = self._infill([rows[number] for number in order], self._greedy)
        ids_of = {number: ids[: len(rows[number].tokens)] for number, ids in zip(order, decoded, strict=True)}
        return [bool(np.array_equal(ids_of[number], row.tokens)) for number, row in enumerate(rows)]

    def _continuations(self, contexts: list[str], generation: GenerationRequest) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns the tokens of each context, and those of its continuation."""
        given = [prompts.of_text(context, self._tokenizer, Ends(closes=False)) for context in contexts]
        rows = [self._in_block(joined(context, prompts.blank(generation.num_tokens))) for context in given]
        filled = self._infill(rows, generation.sampling)
        stops = [len(context.tokens) + generation.num_tokens for context in given]
        parts = zip(given, filled, stops, strict=True)
        return [(context.tokens, ids[len(context.tokens) : stop]) for context, ids, stop in parts]

    def _in_block(self, row: Row) -> Row:
        """Extends a row as `answers_to` does: with an end of text if the network takes lengths, else with masks."""
        model = self.model
        if model.layout.masks_padding:
            end = self._tokenizer.end_of_text
            assert end is not None  # every padded corpus has one
            return as_document(row, model.layout, model.block_length, end)
        if model.uses_lengths:
            return row
        rest = model.block_length - len(row.tokens)
        return joined(row, Row(np.full(rest, model.process.mask_id, np.int32), np.zeros(rest, bool)))

    def _infill(self, rows: list[Row], options: SamplingOptions) -> np.ndarray:
        """Returns the tokens of the infilled rows, Int32[N L]."""
        without_tokenizer = dataclasses.replace(self.model, tokenizer=None)  # rows hold masks, which have no text
        return generate(without_tokenizer, rows, options).tokens

    @property
    def _tokenizer(self) -> Tokenizer:
        assert self.model.tokenizer is not None  # the constructor checks it
        return self.model.tokenizer

    @property
    def _greedy(self) -> SamplingOptions:
        """The options of greedy decoding."""
        process = self.model.process
        if process.mask_id is None:
            return SamplingOptions(top_p=GREEDY_TOP_P, seed=self.seed)
        return SamplingOptions(sampler=Greedy(cast(Absorbing, process)))

    def _generation(self, requested: settings.Request) -> GenerationRequest:
        """The continuation that a task's generation settings request. UserError if it leaves no room for a context."""
        if not 1 <= requested.num_tokens < self._room:
            raise UserError(
                f"{requested.num_tokens} new tokens leave no room for a context in the model's block of "
                f"{self.model.block_length}; set fewer, as in --gen_kwargs max_gen_toks={self._room // 2}"
            )
        if requested.sampling is None:
            return GenerationRequest(requested.num_tokens, self._greedy)
        return GenerationRequest(requested.num_tokens, SamplingOptions(**({"seed": self.seed} | requested.sampling)))

    def _until(self, context: np.ndarray, ids: np.ndarray, stops: list[str]) -> str:
        """Decodes ids that follow a context, up to an end of text and the first of the stop strings."""
        ends = np.flatnonzero(ids == self._tokenizer.end_of_text)
        text = self._tokenizer.decode(ids[: ends[0]] if len(ends) else ids, after=context)
        return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]

    def _truncate_left(self, context: str, texts: list[str], room: int) -> str:
        """Returns the longest end of a context that fits into `room` tokens together with each of the texts."""
        encode = self._tokenizer.encode
        if max(len(encode(context + text)) for text in texts) <= room:
            return context
        longest = max(texts, key=lambda text: len(encode(text)))
        spare = room - len(encode(longest))
        if spare < 0:
            raise UserError(
                f"the continuation {longest[:40]!r} has {len(encode(longest))} tokens, more than the model's block of "
                f"{self.model.block_length}; leave the task out, or take a model of longer blocks"
            )
        ids = encode(context)
        context = self._tokenizer.decode(ids[max(0, len(ids) - spare) :]).lstrip("\ufffd")  # part of a character
        while any(len(encode(context + text)) > room for text in texts):  # after the cut it may have more tokens
            context = context[1:]
        return context

    @property
    def _room(self) -> int:
        """The maximal number of tokens of a text."""
        return self.model.block_length - self.model.layout.masks_padding

    def _warn_of_truncation(self, contexts: list[str], full: list[str]):
        """Logs one warning if contexts were truncated."""
        cut = sum(context != before for context, before in zip(contexts, full, strict=True))
        if cut:
            block = f"the model's block of {self.model.block_length} tokens"
            logging.getLogger(__name__).warning(
                f"{cut} of {len(full)} contexts did not fit into {block}; cut on the left"
            )


def _rows(answers: Rows) -> list[Row]:
    """Answers as prompts whose free positions are the answers. The prompts' tokens hold the answers."""
    return [Row(tokens[:length], free[:length]) for tokens, free, length in zip(*answers)]


def main() -> int:
    """Runs lm_eval's own command, with `--model sedd` registered. Returns the exit status."""
    return streams.run(_main)


def _main() -> int:
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print(f"sedd: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
