"""A model as the lm-evaluation-harness asks for it (the package `lm_eval`).

    lm_eval.simple_evaluate(model=Harness("runs/mine"), tasks=["lambada_openai"])          # in Python
    python -m sedd.harness --model sedd --model_args pretrained=runs/mine --tasks lambada_openai

The second is lm_eval's own command with this model registered. What the numbers mean is said at each method.
"""

import dataclasses
import functools
import itertools
import logging
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sedd import prompts
from sedd.data.tokenizers import Ends
from sedd.diffusion.pickers import Margin, Picker
from sedd.diffusion.process import Absorbing
from sedd.diffusion.unmasking import Adaptive
from sedd.errors import UserError
from sedd.evaluation.conditional import METHODS, Answers, answers_to, log_likelihoods
from sedd.evaluation.perplexity import perplexity
from sedd.evaluation.text import from_texts
from sedd.generation import Generator
from sedd.loading import load, with_tokenizer
from sedd.model import Model, check_draws
from sedd.prompts import Prompt
from sedd.runtime import streams

try:
    import lm_eval.models  # noqa: F401, before this model: lm_eval adds its own only where there is none
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import simple_parse_args_string

    from sedd import harness_settings as settings
except ImportError:
    if __name__ == "__main__":
        sys.exit("sedd: error: the harness needs the package lm_eval: pip install 'sedd[harness]'")
    raise UserError("the harness needs the package lm_eval: pip install 'sedd[harness]'") from None

OWN = ("pretrained", "tokenizer", "method", "draws", "seed", "max_gen_toks")  # the arguments of Harness
AT_ONCE = 64  # questions between two marks of the progress
GREEDY_TOP_P = 1e-6  # the top_p that leaves of each law the likeliest token only


class GenerationRequest(NamedTuple):
    """How a continuation is wanted; hashable."""

    count: int  # of tokens
    sampling: tuple[tuple[str, Any], ...]  # the settings of Generator.draw


@dataclasses.dataclass(frozen=True)
class Greedy(Adaptive):
    """Reveals one masked token a call, that of the largest margin, as its likeliest value: nothing is drawn."""

    picker: Picker = Margin()

    def step(self, keys, denoiser, x, entry):
        log_clean = denoiser(x, self.process.sigma_from_mask_ratio(x), None)
        likeliest = jnp.argmax(log_clean, axis=-1).astype(x.dtype)
        return jnp.where(self.choose(log_clean, x, entry), likeliest, x)


@register_model("sedd")
class Harness(LM):
    """A model for lm_eval: its likelihoods of answers and of documents, and its continuations.

    pretrained: what `sedd.load` takes, or a Model; tokenizer: for what has none, as `sedd.load` takes it; method,
    draws, seed: as in `Model.log_likelihood`; draws is also the noise levels a block of `loglikelihood_rolling`; None
    is the default of each. max_gen_toks: the tokens of a continuation where a task does not say. UserError for a model
    without tokenizer.

    others: what lm_eval passes to any model, and what its flags and its other models' arguments say. Nothing depends on
    them: rows are grouped here, and the device is JAX's to choose. UserError for one that would change something, such
    as a dtype that is not the model's.
    """

    def __init__(
        self,
        pretrained: str | Path | Model | None = None,
        tokenizer: str | None = None,
        method: str | None = None,
        draws: int | None = None,
        seed: int | None = None,
        max_gen_toks: int | None = None,
        **others,
    ):
        super().__init__()
        self.method, draws = method or "auto", settings.whole("draws", draws, None)
        if draws is not None:
            check_draws(draws)
        self.seed, self.max_gen_toks = settings.whole("seed", seed, 0), settings.whole("max_gen_toks", max_gen_toks, 64)
        if self.method not in METHODS:
            raise UserError(f"there is no method {method!r}; there are {', '.join(METHODS)}")
        if not pretrained:
            raise UserError("name the model, as in --model_args pretrained=runs/mine")
        model = pretrained if isinstance(pretrained, Model) else load(pretrained)
        accepted = {"dtype": ("auto", model.config.network.dtype), "max_length": (model.block_length,)}
        settings.check_model_args(others, OWN, accepted)
        self.model = with_tokenizer(model, tokenizer) if tokenizer else model
        if self.model.tokenizer is None:
            raise UserError(
                "this model has no tokenizer; name the one it was trained with, as in tokenizer=gpt2:FOLDER"
            )
        self.noise = {"seed": self.seed} | ({} if draws is None else {"num_draws": draws})

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> "Harness":
        """What lm_eval makes of --model_args, and of flags such as --device, which those may repeat."""
        return cls(**{**(additional_config or {}), **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "Harness":
        """The same, of arguments in a text."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """UserError: the models know text."""
        raise UserError("the models of this package have no chat template; leave out --apply_chat_template")

    @property
    def tokenizer_name(self) -> str:
        """What lm_eval tells tokenizers apart by."""
        return self.model.tokenizer.fingerprint

    def get_model_info(self) -> dict:
        """What lm_eval writes into its results: how the numbers were estimated."""
        about = {"method": self.method, "block_length": self.model.block_length, "tokenizer": self.tokenizer_name}
        return about | {"lengths": "given" if self.model.layout.masks_padding else "open"} | self.noise

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """log p(continuation | context) of each request, in nats, and whether it is what greedy decoding gives.

        The number is `Model.log_likelihood`'s by its method: exact, or from below. Options of a question are scored by
        one method and with the same noise. White space at the end of a context passes to the continuation. A context
        that does not fit into the block loses its oldest tokens. UserError, before anything is scored, for a
        continuation that is longer than the block, and for a context that a Uniform model was not trained to be told.

        Greedy decoding is that of `generate_until`, told how many tokens the continuation has.
        """
        groups = itertools.groupby(requests, key=lambda request: (request.doc_id, request.args[0]))
        questions = self._questions([[request.args for request in group] for _, group in groups])
        model, found = self.model, []
        score = functools.partial(log_likelihoods, model.network, model.schedule, model.params)
        for start in tqdm(range(0, len(questions), AT_ONCE), desc="scoring", unit=f"{AT_ONCE} questions", delay=2):
            group = questions[start : start + AT_ONCE]
            likelihoods = [one for answers in group for one in score(answers, self.method, **self.noise)]
            for likelihood, greedy in zip(likelihoods, self._are_greedy(group), strict=True):
                found.append((likelihood.nats, greedy))
                self.cache_hook.add_partial("loglikelihood", requests[len(found) - 1].args, found[-1])
        return found

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """A lower bound on log p of each document, in nats: what `Model.perplexity` makes of a task's documents.

        Of a model of padded documents whose padding is ignored, given their lengths.

        One that is longer than a block is cut into blocks, none of which sees another, so that each token is scored
        once. An empty document has 0.
        """
        found = []
        for _, group in itertools.groupby(requests, key=lambda request: request.task_name):
            found += self._of_documents([request.args[0] for request in group])
        return found

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Fills in `max_gen_toks` or `max_new_tokens` tokens after each context, and cuts them at the first of `until`.

        A context that leaves no room for them loses its oldest tokens. With `do_sample` false, or neither it nor a
        temperature, or at temperature 0, nothing is drawn: one position a call is revealed, that of the largest margin,
        as its likeliest token. A Uniform process, which has no such order, draws from `seed` with the likeliest tokens
        only. Else the settings are those of `Model.infill`: temperature, top_p, seed, sampler, steps. UserError for any
        other that would change something, as num_beams=2 would and num_beams=1 does not.
        """
        asked = [settings.generation(request.args[1], self.max_gen_toks) for request in requests]
        wishes = [self._wish(one) for one in asked]
        for wish in dict.fromkeys(wishes):  # before anything is drawn
            self._generator.check(**dict(wish.sampling))
        whole = [request.args[0] for request in requests]
        contexts = [self._truncate_left(context, [""], self._room - wish.count) for context, wish in zip(whole, wishes)]
        self._warn_of(contexts, whole)
        texts = [""] * len(requests)
        for wish in dict.fromkeys(wishes):
            at = [number for number, other in enumerate(wishes) if other == wish]
            filled = self._continued([contexts[number] for number in at], wish)
            for number, (context, ids) in zip(at, filled, strict=True):
                texts[number] = self._until(context, ids, asked[number].until)
                self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
        return texts

    def _questions(self, groups: list[list[tuple[str, str]]]) -> list[Answers]:
        """Of groups of (context, continuation) with one context each."""
        model, questions = self.model, []
        whole = [group[0][0].rstrip() for group in groups]
        contexts = []
        for context, group in zip(whole, groups):
            texts = [before[len(context) :] + continuation for before, continuation in group]
            contexts.append(self._truncate_left(context, texts, self._room))
            layout = (model.tokenizer, model.process, model.block_length, model.layout)
            questions.append(answers_to(contexts[-1], texts, *layout))
        self._warn_of(contexts, whole)
        return questions

    def _of_documents(self, texts: list[str]) -> list[float]:
        """The bound on log p of each document of a task."""
        model, full = self.model, [number for number, text in enumerate(texts) if text]
        nats = np.zeros(len(texts))
        if full:
            scored = from_texts([texts[number] for number in full], model.tokenizer, model.block_length, model.layout)
            noise = {"num_draws": model.config.evaluation.draws} | self.noise
            _, terms = perplexity(model.network, model.schedule, model.params, scored, **noise)
            nats[full] = -np.bincount(terms.clusters, terms.rows, minlength=len(full))
        return nats.tolist()

    def _are_greedy(self, questions: list[Answers]) -> list[bool]:
        """Whether greedy decoding of the free tokens of each row gives them back."""
        rows = [row for answers in questions for row in _rows(answers)]
        # By the number of free tokens: rows that run together then take as many calls.
        order = np.argsort([np.sum(~row.given) for row in rows], kind="stable")
        decoded = self._drawn([rows[number] for number in order], self._greedy)
        found = {number: ids[: len(rows[number].tokens)] for number, ids in zip(order, decoded, strict=True)}
        return [bool(np.array_equal(found[number], row.tokens)) for number, row in enumerate(rows)]

    def _continued(self, contexts: list[str], wish: GenerationRequest) -> list[tuple[np.ndarray, np.ndarray]]:
        """The tokens of each context, and those after it."""
        known = [prompts.of_text(context, self.model.tokenizer, Ends(closes=False)) for context in contexts]
        rows = [self._in_block(prompts.joined(context, prompts.blank(wish.count))) for context in known]
        filled = self._drawn(rows, wish.sampling)
        stops = [len(context.tokens) + wish.count for context in known]
        found = zip(known, filled, stops, strict=True)
        return [(context.tokens, ids[len(context.tokens) : stop]) for context, ids, stop in found]

    def _in_block(self, row: Prompt) -> Prompt:
        """A row as `answers_to` has it: it ends where lengths are told, else what follows is masked and stays so."""
        model = self.model
        if model.layout.masks_padding:
            return prompts.as_document(row, model.layout, model.block_length, model.tokenizer.end_of_text)
        if not isinstance(model.process, Absorbing):
            return row
        rest = model.block_length - len(row.tokens)
        return prompts.joined(row, Prompt(np.full(rest, model.process.mask, np.int32), np.ones(rest, bool)))

    def _drawn(self, rows: list[Prompt], sampling: tuple[tuple[str, Any], ...]) -> np.ndarray:
        """The tokens of the rows once they are filled in: Int32[N L]."""
        return self._generator.generate(rows, **dict(sampling)).tokens

    @property
    def _generator(self) -> Generator:
        """That of the model without its tokenizer: the rows hold masks, which have no text."""
        return dataclasses.replace(self.model.generator, tokenizer=None)

    @property
    def _greedy(self) -> tuple[tuple[str, Any], ...]:
        """The settings of Generator.draw."""
        process = self.model.process
        if isinstance(process, Absorbing):
            return (("sampler", Greedy(process)),)
        return ("top_p", GREEDY_TOP_P), ("seed", self.seed)

    def _wish(self, asked: settings.Request) -> GenerationRequest:
        """The continuation that a task's generation settings ask for."""
        if not 1 <= asked.count < self._room:
            raise UserError(
                f"{asked.count} new tokens leave no room for a context in the model's block of "
                f"{self.model.block_length}; set fewer, as in --gen_kwargs max_gen_toks={self._room // 2}"
            )
        if asked.sampling is None:
            return GenerationRequest(asked.count, self._greedy)
        return GenerationRequest(asked.count, tuple(({"seed": self.seed} | asked.sampling).items()))

    def _until(self, context: np.ndarray, ids: np.ndarray, stops: list[str]) -> str:
        """The text of ids that follow a context, up to an end of text, and to the first of what stops it."""
        ended = np.flatnonzero(ids == self.model.tokenizer.end_of_text)
        text = self.model.tokenizer.decode(ids[: ended[0]] if len(ended) else ids, after=context)
        return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]

    def _truncate_left(self, context: str, texts: list[str], room: int) -> str:
        """A context, or its end where there is no room for all of it and each of the texts, in tokens."""
        encode = self.model.tokenizer.encode
        most = max(len(encode(context + text)) for text in texts)
        if most <= room:
            return context
        longest = max(texts, key=lambda text: len(encode(text)))
        spare = room - len(encode(longest))
        if spare < 0:
            raise UserError(
                f"the continuation {longest[:40]!r} has {len(encode(longest))} tokens, more than the model's block of "
                f"{self.model.block_length}; leave the task out, or take a model of longer blocks"
            )
        ids = encode(context)
        context = self.model.tokenizer.decode(ids[max(0, len(ids) - spare) :]).lstrip("\ufffd")  # part of a character
        while any(len(encode(context + text)) > room for text in texts):  # cut elsewhere, it may have more tokens
            context = context[1:]
        return context

    @property
    def _room(self) -> int:
        """The most tokens of a text."""
        return self.model.block_length - self.model.layout.masks_padding

    def _warn_of(self, contexts: list[str], whole: list[str]):
        """One line, if contexts lost their oldest tokens."""
        cut = sum(context != before for context, before in zip(contexts, whole, strict=True))
        if cut:
            block = f"the model's block of {self.model.block_length} tokens"
            logging.getLogger(__name__).warning(
                f"{cut} of {len(whole)} contexts did not fit into {block}; cut on the left"
            )


def _rows(answers: Answers) -> list[Prompt]:
    """Each answer as something to fill in; tokens holds what it is."""
    whole = np.full(len(answers.tokens), answers.tokens.shape[1])
    lengths = whole if answers.lengths is None else answers.lengths
    rows = zip(answers.tokens, ~answers.free, lengths)
    return [Prompt(tokens[:length], given[:length]) for tokens, given, length in rows]


def main() -> int:
    """lm_eval's own command, for which `--model sedd` is this one. Returns the exit status."""
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
