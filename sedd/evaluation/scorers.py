"""Scoring models: callables that return the negative log-likelihood of texts, such as a large autoregressive model.

The number depends on the conventions as much as on the texts, so that they are in the name of a scoring model. Those of
`open_scorer`: the texts are encoded by the scoring model's own tokenizer. If that has a BOS token, it precedes the text
and every token of the text is scored, else every token but the first. A text longer than the context window is read in
windows that overlap by half or more; each token is scored once, with at least half a window before it. An end-of-text
marker in a text becomes the scoring model's own EOS. Parameters and arithmetic are float32, whatever the files hold.
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

MAX_WINDOW = 4096  # tokens of a window, also for models of longer contexts
TOKENS_PER_CALL = 2048  # of the network, or one window if that is longer: bounds the memory of the logits

# (ids Int64[B L], valid Bool[B L]) -> Float32[B L - 1]: the nats of each token but the first of its row, given those
# before it. `valid` is False at padding, which follows the tokens.
Nats = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class ScoredTexts:
    """The scores of N texts."""

    nats: np.ndarray  # Float64[N], the negative log-likelihood of each text
    tokens: np.ndarray  # Int[N], the number of the scorer's tokens that it is the sum over


class Scorer(Protocol):
    """A callable that scores texts. Reports show its `name`, or else its `__name__`."""

    def __call__(self, texts: list[str]) -> ScoredTexts: ...


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """An autoregressive language model as a Scorer.

    encode: returns the ids of each text, with BOS if there is one; window: the largest number of tokens in a row.
    """

    name: str
    encode: Callable[[list[str]], list[np.ndarray]]
    nats: Nats
    window: int

    def __call__(self, texts: list[str]) -> ScoredTexts:
        return score_in_windows(self.encode(texts), self.nats, self.window)


def open_scorer(path: str | Path, name: str | None = None) -> LanguageModel:
    """Loads a causal language model and its tokenizer, in the Hugging Face format, from a local folder.

    name: in reports, by default that of the folder. Nothing is downloaded, and no code of the folder is run. The model
    is placed on a GPU if torch finds one. UserError where the folder holds no such model, or a damaged one, or one that
    is not causal, or a package is missing.
    """
    folder = Path(absolute(path))
    if not holds_language_model(folder):
        expected = "a config.json with a model_type, beside weights and tokenizer"
        raise UserError(f"{folder} holds no causal language model in the Hugging Face format: {expected}")
    tokenizer, model = _loaded(folder)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or MAX_WINDOW
    return language_model(name or folder.resolve().name, tokenizer, _nats(model), min(longest, MAX_WINDOW))


def holds_language_model(folder: Path) -> bool:
    """True if the folder has a config.json with a model_type, as models in the Hugging Face format do."""
    try:
        return "model_type" in json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def language_model(name: str, tokenizer: Any, nats: Nats, window: int) -> LanguageModel:
    """Returns the Scorer of these parts, with its conventions in its name. tokenizer: of the library transformers.

    UserError if the model is not causal, so that its numbers are no likelihood, or if the tokenizer is empty, which is
    what the library returns for missing files.
    """
    if not is_causal(nats):
        raise UserError(f"{name} is not causal; a scoring model must be a causal language model, such as GPT-2")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token
    before = [] if bos is None else [bos]

    def encode(texts):
        with_eos = [text if eos is None else text.replace(END_OF_TEXT, eos) for text in texts]
        rows = tokenizer(with_eos, add_special_tokens=False, verbose=False)["input_ids"]
        return [np.array(before + row, np.int64) for row in rows]

    if len(encode(["text"])[0]) == len(before):
        raise UserError(f"{name} has no tokenizer, or an empty one; add the model's tokenizer files")
    rule = "from the second token on" if bos is None else "BOS first"
    return LanguageModel(f"{name} ({rule}, windows of {window})", encode, nats, window)


def is_causal(nats: Nats) -> bool:
    """True if the nats of a token are independent of later tokens, tested on two rows with different last tokens."""
    ids = np.zeros((2, 4), np.int64)
    ids[1, 3] = 1
    first, second = nats(ids, np.ones_like(ids, bool))[:, :2]
    return np.allclose(first, second, rtol=1e-4, atol=1e-4)


def windows(length: int, size: int) -> list[tuple[int, int, int]]:
    """The windows (start, first, stop) of at most `size` tokens in which a row of `length` tokens is scored.

    A window reads tokens start .. stop - 1 and scores first .. stop - 1. Every token but token 0 is scored once. All
    windows have `size` tokens, except a single one for a shorter row.
    """
    stop = min(size, length)
    result = [(0, 1, stop)] if length > 1 else []
    while stop < length:
        first, stop = stop, min(stop + size // 2, length)
        result.append((stop - size, first, stop))
    return result


def score_in_windows(rows: Sequence[np.ndarray], nats: Nats, size: int) -> ScoredTexts:
    """The nats of all tokens of each row but its first, in windows of at most `size` tokens. rows: Int64[L_i]."""
    todo = [(number, *window) for number, row in enumerate(rows) for window in windows(len(row), size)]
    todo.sort(key=lambda window: window[1] - window[3])  # the longest first, so that a lack of memory shows at once
    totals = np.zeros(len(rows))
    done = 0
    with tqdm(total=len(todo), desc="scoring", unit="window", delay=2) as bar:
        while done < len(todo):
            _, start, _, stop = todo[done]
            batch = todo[done : done + max(1, TOKENS_PER_CALL // (stop - start))]
            ids = np.zeros((len(batch), stop - start), np.int64)
            valid = np.zeros(ids.shape, bool)
            for index, (number, start, _, stop) in enumerate(batch):
                ids[index, : stop - start] = rows[number][start:stop]
                valid[index, : stop - start] = True
            token_nats = np.asarray(nats(ids, valid), np.float64)
            for index, (number, start, first, stop) in enumerate(batch):
                totals[number] += token_nats[index, first - start - 1 : stop - start - 1].sum()
            done += len(batch)
            bar.update(len(batch))
    return ScoredTexts(totals, np.array([max(0, len(row) - 1) for row in rows]))


def _loaded(folder: Path) -> tuple[Any, Any]:
    """Returns the tokenizer and the model of a folder."""
    try:
        import torch
        import transformers
    except ImportError:
        raise UserError("a scoring model needs torch and transformers: pip install 'sedd[judge]'") from None
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        kind = transformers.AutoModelForCausalLM
        model, about = kind.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:  # the library raises many types
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{folder} cannot be read as a causal language model: {reason}") from error
    if about["missing_keys"]:  # the library initialises them at random
        raise UserError(f"the weights in {folder} lack {min(about['missing_keys'])}; give a causal language model")
    return tokenizer, model.float().eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _nats(model: Any) -> Nats:
    """The Nats of a model of the library transformers."""
    import torch

    size = model.get_input_embeddings().num_embeddings

    @torch.inference_mode()
    def nats(ids, valid):
        if ids.max() >= size:
            raise UserError(f"the tokenizer has ids beyond the model's {size}; the two do not belong together")
        ids = torch.from_numpy(ids).to(model.device)
        valid = torch.from_numpy(valid).to(model.device, torch.int64)
        logits = model(input_ids=ids, attention_mask=valid, use_cache=False).logits[:, :-1]
        token_nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return token_nats.view(len(ids), -1).cpu().numpy()

    return nats
