"""Judges of texts: whoever can say how many nats a text costs, such as a large autoregressive model.

The number of a judge depends on its rules as much as on the texts, so that a judge has its rules in its name. Those of
`open_judge` are: the judge reads the text, by its own tokenizer, not our tokens. Its first token has nothing before it;
where the tokenizer has a BOS token that is put first, and all the tokens of the text are scored, else all but the
first. A text longer than the model's window is read in windows that overlap by half or more; each token is scored once,
with at least half a window before it. An end of text among our tokens is the judge's own. Parameters and arithmetic are
float32, whatever the files hold.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from sedd.data.tokenizers import END_OF_TEXT
from sedd.errors import UserError
from sedd.runtime.disk import absolute

LONGEST = 4096  # tokens of a window at the most, whatever the model can read
AT_ONCE = 2048  # tokens in one call of the network, if a window is no longer: their logits are held all at once

# What a network says: (ids Int64[B L], there Bool[B L]) -> Float32[B L - 1], the nats of each token but the first of
# its row given those before it. `there` is false at padding, which follows the tokens.
Nats = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class ScoredTexts:
    """What a judge says of N texts."""

    nats: np.ndarray  # Float64[N], the negative log-likelihood of each, in all
    tokens: np.ndarray  # Int[N], how many of the judge's own tokens that is the sum over


class Scorer(Protocol):
    """Any callable like this is a judge. Reports call it by its `name`, or else by its `__name__`."""

    def __call__(self, texts: list[str]) -> ScoredTexts: ...


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """An autoregressive model as a judge.

    encode: the ids of each text, what stands before the first token among them; window: the most tokens of a call.
    """

    name: str
    encode: Callable[[list[str]], list[np.ndarray]]
    nats: Nats
    window: int

    def __call__(self, texts: list[str]) -> ScoredTexts:
        return scored(self.encode(texts), self.nats, self.window)


def open_scorer(path: str | Path) -> LanguageModel:
    """The judge that a local folder holds: a causal language model and its tokenizer in the Hugging Face format.

    Nothing is fetched, and no code of the folder's is run. It is put on a GPU where torch sees one.

    Raises:
      UserError: the folder holds none, or one that is damaged or sees what follows; or a package is missing.
    """
    folder = Path(absolute(path))
    if not holds_language_model(folder):
        wanted = "a config.json with a model_type, beside weights and tokenizer"
        raise UserError(f"{folder} holds no causal language model in the Hugging Face format: {wanted}")
    tokenizer, model = _loaded(folder)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST
    return language_model(folder.resolve().name, tokenizer, _nats(model), min(longest, LONGEST))


def holds_language_model(folder: Path) -> bool:
    """Whether a folder looks like a model in the Hugging Face format: its config.json names a model_type."""
    try:
        return "model_type" in json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def language_model(name: str, tokenizer: Any, nats: Nats, window: int) -> LanguageModel:
    """The judge of these parts, its rules in its name. tokenizer: as the library transformers has them.

    Raises:
      UserError: the model sees what follows a token, so that its numbers are no likelihood; or the tokenizer is empty,
        which is what the library makes of missing files.
    """
    if not is_causal(nats):
        raise UserError(f"{name} sees what follows a token; a judge must be a causal language model, such as GPT-2")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token
    before = [] if bos is None else [bos]

    def encode(texts):
        ended = [text if eos is None else text.replace(END_OF_TEXT, eos) for text in texts]
        rows = tokenizer(ended, add_special_tokens=False, verbose=False)["input_ids"]
        return [np.array(before + row, np.int64) for row in rows]

    if len(encode(["text"])[0]) == len(before):
        raise UserError(f"{name} has no tokenizer, or an empty one; put the files of the model's own there")
    rule = "from the second token on" if bos is None else "BOS first"
    return LanguageModel(f"{name} ({rule}, windows of {window})", encode, nats, window)


def is_causal(nats: Nats) -> bool:
    """Whether the nats of a token do not depend on what follows it, tried on two rows with other ends."""
    ids = np.zeros((2, 4), np.int64)
    ids[1, 3] = 1
    one, other = nats(ids, np.ones_like(ids, bool))[:, :2]
    return np.allclose(one, other, rtol=1e-4, atol=1e-4)


def windows(length: int, size: int) -> list[tuple[int, int, int]]:
    """How a row of `length` tokens is read in windows of at most `size`: (start, first, stop) of each.

    Tokens start .. stop - 1 are seen, of which first .. stop - 1 are scored: in all, each but token 0 once. Every
    window but a single short one is full.
    """
    stop = min(size, length)
    found = [(0, 1, stop)] if length > 1 else []
    while stop < length:
        first, stop = stop, min(stop + size // 2, length)
        found.append((stop - size, first, stop))
    return found


def scored(rows: Sequence[np.ndarray], nats: Nats, size: int) -> ScoredTexts:
    """The nats of all tokens of each row but its first, in windows of at most `size`. rows: Int64[L_i]."""
    todo = [(number, *window) for number, row in enumerate(rows) for window in windows(len(row), size)]
    todo.sort(key=lambda one: one[1] - one[3])  # the longest first: what does not fit into memory fails at once
    totals = np.zeros(len(rows))
    done = 0
    with tqdm(total=len(todo), desc="judging", unit="window", delay=2) as bar:
        while done < len(todo):
            _, start, _, stop = todo[done]
            batch = todo[done : done + max(1, AT_ONCE // (stop - start))]
            ids = np.zeros((len(batch), stop - start), np.int64)
            there = np.zeros(ids.shape, bool)
            for place, (number, start, _, stop) in enumerate(batch):
                ids[place, : stop - start] = rows[number][start:stop]
                there[place, : stop - start] = True
            of_token = np.asarray(nats(ids, there), np.float64)
            for place, (number, start, first, stop) in enumerate(batch):
                totals[number] += of_token[place, first - start - 1 : stop - start - 1].sum()
            done += len(batch)
            bar.update(len(batch))
    return ScoredTexts(totals, np.array([max(0, len(row) - 1) for row in rows]))


def _loaded(folder: Path) -> tuple[Any, Any]:
    """The tokenizer and the model of a folder."""
    try:
        import torch
        import transformers
    except ImportError:
        raise UserError("a judge needs torch and transformers: pip install 'sedd[judge]'") from None
    local = dict(local_files_only=True, trust_remote_code=False)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
        kind = transformers.AutoModelForCausalLM
        model, about = kind.from_pretrained(folder, output_loading_info=True, **local)
    except Exception as error:  # whatever the library raises
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{folder} cannot be read as a causal language model: {reason}") from error
    if about["missing_keys"]:  # the library would draw them at random
        raise UserError(f"the weights in {folder} lack {min(about['missing_keys'])}; give a causal language model")
    return tokenizer, model.float().eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _nats(model: Any) -> Nats:
    """The nats of each token but the first given those before it, under a model of the library transformers."""
    import torch

    size = model.get_input_embeddings().num_embeddings

    @torch.inference_mode()
    def nats(ids, there):
        if ids.max() >= size:
            raise UserError(f"the judge's tokenizer has ids beyond its model's {size}; the two do not belong together")
        ids = torch.from_numpy(ids).to(model.device)
        there = torch.from_numpy(there).to(model.device, torch.int64)
        logits = model(input_ids=ids, attention_mask=there, use_cache=False).logits[:, :-1]
        of_token = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return of_token.view(len(ids), -1).cpu().numpy()

    return nats
