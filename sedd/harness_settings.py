"""Translates flags and task settings of the lm-evaluation-harness to arguments of this package.

They are written for other models. Those without an effect here are accepted, and any other is a UserError of one line.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from lm_eval.models.utils import normalize_gen_kwargs

from sedd.errors import UserError
from sedd.generation.options import FLAGS, SamplingOptions

_ANY = object()
# Arguments of lm_eval's other models, and their values that have no effect here. An empty value has none either.
_MODEL: dict[str, Any] = {
    **dict.fromkeys(("batch_size", "max_batch_size", "device", "trust_remote_code", "logits_cache"), _ANY),
    **dict.fromkeys(("use_fast_tokenizer", "parallelize", "device_map", "low_cpu_mem_usage", "offload_folder"), _ANY),
    **dict.fromkeys(("max_memory_per_gpu", "max_cpu_memory"), _ANY),
    **dict.fromkeys(("add_bos_token", "truncation", "autogptq", "gptqmodel", "enable_thinking"), (False,)),
    **dict.fromkeys(("peft", "delta", "subfolder", "gguf_file", "think_end_token", "chat_template_args"), ()),
    "backend": ("default", "causal"),
    "revision": ("main",),
    "softmax_dtype": ("auto", "float32"),
}
_GENERATION: dict[str, Any] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "n", "best_of"), (1,)),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), (1,)),
    **dict.fromkeys(("no_repeat_ngram_size", "presence_penalty", "frequency_penalty", "diversity_penalty"), (0,)),
    **dict.fromkeys(
        ("early_stopping", "length_penalty", "use_cache", "pad_token_id"), _ANY
    ),  # for beam search and memory
}
_SAMPLING_ONLY: dict[str, Any] = {"top_k": (0, -1), "min_p": (0,), "typical_p": (1,)}  # any value when greedy
# The options of sampling that a task can set.
SAMPLING = {name: FLAGS[name].metadata["kind"] for name in ("temperature", "top_p", "seed", "sampler", "steps")}
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # in order of precedence

_Default = TypeVar("_Default", int, None)


class Request(NamedTuple):
    """Settings of the generation of a continuation."""

    num_tokens: int
    until: list[str]  # stop strings
    sampling: dict[str, Any] | None  # arguments of Model.infill; None: greedy decoding


class GenerationRequest(NamedTuple):
    """The length and sampling options of a continuation; hashable."""

    num_tokens: int
    sampling: SamplingOptions


def check_model_args(others: Mapping[str, Any], own: Sequence[str], accepted: Mapping[str, tuple]):
    """UserError for an argument that would have an effect, and for an unknown one.

    others: the arguments to check; own: the names of those of `Harness`; accepted: further values that are accepted,
    since they are those of this model.
    """
    table = {**_MODEL, **accepted}
    for name, value in others.items():
        if not _is_neutral(name, value, table):
            raise _refused("--model_args", name, value, [*own, *table], name in table and table[name])


def generation(settings: Mapping[str, Any], max_gen_toks: int) -> Request:
    """Translates the generation settings of a task. UserError for a setting that is not supported.

    max_gen_toks: the number of tokens where the settings have none.
    """
    known = ("until", "do_sample", *_LIMITS, *SAMPLING)
    given = {name: value for name, value in settings.items() if not _is_empty(value)}
    limits = [name for name in _LIMITS if name in given]
    given |= {name: _of_kind(name, given[name], int) for name in limits}
    given |= {name: _of_kind(name, given[name], kind) for name, kind in SAMPLING.items() if name in given}
    if given.get("do_sample", False) not in (True, False):
        raise UserError(f"do_sample is true or false, not {given['do_sample']!r}")
    given |= {"do_sample": bool(given["do_sample"])} if "do_sample" in given else {}
    normal = normalize_gen_kwargs(given, max_gen_toks)
    samples = normal["do_sample"] and normal.get("temperature", 1.0) != 0
    table = _GENERATION | (_SAMPLING_ONLY if samples else dict.fromkeys(_SAMPLING_ONLY, _ANY))
    for name, value in given.items():
        if name not in known and not _is_neutral(name, value, table):
            raise _refused("generate_until", name, value, [*known, *table], name in table and table[name])
    until = [str(stop) for stop in normal["until"] if not _is_empty(stop)]
    sampling = {name: given[name] for name in SAMPLING if name in given} if samples else None
    return Request(normal["max_gen_toks"], until, sampling)


def whole_number(name: str, value: Any, default: _Default) -> int | _Default:
    """Converts an argument of lm_eval to an int; an empty one becomes the default. UserError for any other value."""
    return default if _is_empty(value) else _of_kind(name, value, int)


def _of_kind(name: str, value: Any, kind: type) -> Any:
    try:
        converted = kind(value)
    except (TypeError, ValueError, OverflowError):
        converted = None
    if converted is None or (kind is int and isinstance(value, float) and converted != value):
        raise UserError(f"{name} must be {'a whole number' if kind is int else 'a number'}, not {value!r}")
    return converted


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value == "")


def _is_neutral(name: str, value: Any, table: Mapping[str, Any]) -> bool:
    values = table.get(name)
    return values is _ANY or (values is not None and (_is_empty(value) or value in values))


def _refused(what: str, name: str, value: Any, known: list[str], values: Any) -> UserError:
    if values:
        return UserError(f"{what} takes no {name}={value}, only {' or '.join(map(str, values))}; leave it out")
    if values == ():
        return UserError(f"{what} takes no {name}={value}; leave it out")
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return UserError(f"{what} takes no {name}={value}; the nearest is {near}")
