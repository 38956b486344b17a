"""The quality of samples: generative perplexity under a scoring model, and diversity.

Neither number means anything alone. Text that repeats itself has a low generative perplexity, noise a high entropy, and
a sampler can trade one for the other (arXiv 2409.02908 shows how far, for a float32 error alone). A Quality therefore
always has both. Entropy and distinct n-grams depend on the length and the number of samples, perplexity on the scoring
model: compare equal settings only, and compare with the same numbers of held-out text.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from sedd.data.tokenizers import Tokenizer
from sedd.errors import UserError
from sedd.evaluation.scorers import Scorer
from sedd.evaluation.statistics import Estimate, exponential, ratio, with_error
from sedd.evaluation.text import encode_with_eos_markers
from sedd.runtime.disk import absolute


@dataclasses.dataclass(frozen=True)
class Quality:
    """The quality of N samples, in nats. Errors are over samples, and None for a single sample.

    distinct: distinct n-grams over all n-grams for n = 1, 2, 3; None where no sample has n tokens. The fields from
    `scorer` on are None without a scoring model; scorer_tokens and nats_per_token count its tokens.
    """

    num_samples: int
    num_tokens: int
    unigram_entropy: float  # the mean over samples
    unigram_entropy_error: float | None
    distinct: tuple[float | None, ...]
    scorer: str | None = None
    scorer_tokens: int | None = None
    nats_per_token: float | None = None
    standard_error: float | None = None
    generative_perplexity: float | None = (
        None  # exp(nats_per_token), over all samples together; None where it overflows
    )

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        entropy = with_error(self.unigram_entropy, self.unigram_entropy_error)
        kinds = zip(("tokens", "pairs", "triples"), self.distinct)
        distinct = ", ".join(f"{share:.3f} of {kind}" for kind, share in kinds if share is not None)
        lines = [
            f"unigram entropy       {entropy} nats; samples of {self.num_tokens / self.num_samples:,.0f} tokens",
            f"distinct n-grams      {distinct}",
            f"measured              {self.num_samples:,} samples, {self.num_tokens:,} tokens; "
            "± is one standard error over samples",
        ]
        if self.scorer is not None:
            assert self.nats_per_token is not None  # both are set together
            value = self.generative_perplexity
            error = value and self.standard_error and value * self.standard_error
            perplexity = "inf" if value is None else with_error(value, error, 2)
            nats = with_error(self.nats_per_token, self.standard_error)
            details = f"{nats} nats per token, {self.scorer_tokens:,} tokens of {self.scorer}"
            lines.insert(0, f"generative perplexity {perplexity}; {details}")
        return "\n".join(lines)


def quality(texts: Sequence[str] | None, tokens: Sequence[np.ndarray], scorer: Scorer | None = None) -> Quality:
    """Measures samples.

    texts: of each sample; may be None without a scorer; tokens: Int[L_i] of each sample. UserError where there is
    nothing to measure, or the scorer returns a number that is not finite.
    """
    if texts is not None and len(texts) != len(tokens):
        raise UserError(f"there are {len(texts)} texts and the tokens of {len(tokens)} samples; give both for each")
    num_tokens = sum(map(len, tokens))
    if num_tokens == 0:
        raise UserError("the samples hold no tokens; there is nothing to measure")
    entropy = _over_samples(unigram_entropy(tokens), np.ones(len(tokens)))
    scores = {} if scorer is None else _scored(texts, scorer)
    return Quality(
        num_samples=len(tokens),
        num_tokens=num_tokens,
        unigram_entropy=entropy.value,
        unigram_entropy_error=entropy.standard_error,
        distinct=tuple(distinct(tokens, n) for n in (1, 2, 3)),
        **scores,
    )


def unigram_entropy(tokens: Sequence[np.ndarray]) -> np.ndarray:
    """Entropy of the token frequencies within each sequence, Int[L_i] -> Float64[N], nats; 0 for an empty sequence.

    It is at most log L_i, so that short sequences lie below the entropy of the language.
    """
    return np.array([_entropy(np.unique(row, return_counts=True)[1]) for row in tokens])


def distinct(tokens: Sequence[np.ndarray], n: int) -> float | None:
    """Distinct n-grams over all n-grams, of all samples together; None where no sample has n tokens. Int[L_i]."""
    rows = [np.asarray(row) for row in tokens if len(row) >= n]
    if not rows:
        return None
    grams = np.concatenate([np.lib.stride_tricks.sliding_window_view(row, n) for row in rows])
    return len(np.unique(grams, axis=0)) / len(grams)


def read_samples(path: str | Path, tokenizer: Tokenizer | None = None) -> tuple[list[str] | None, list[np.ndarray]]:
    """Reads the JSON lines that `sedd sample --json` writes. Returns the texts and the tokens, Int64[L_i] each.

    The texts are None where the model had no tokenizer. tokenizer: encodes the texts again, so that samples of several
    programs are measured in the same tokens; needed for lines without tokens. UserError for a file that cannot be read,
    and for a line that is truncated or not such an object.
    """
    try:
        lines = Path(absolute(path)).read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as samples: {getattr(error, 'strerror', None) or error}") from None
    complete = lines[-1] == ""  # the last line ends with a newline
    lines = lines[:-1] if complete else lines
    if not lines:
        raise UserError(f"{path} is empty; write samples to it with sedd sample --json")
    samples = []
    for number, line in enumerate(lines, 1):
        truncated = number == len(lines) and not complete
        samples.append(_sample(line, f"{path}, line {number}", truncated, tokenizer))
    texts = [text for text, _ in samples if text is not None]
    if texts and len(texts) < len(samples):
        without = next(number for number, (text, _) in enumerate(samples, 1) if text is None)
        raise UserError(f"{path}, line {without} has no text, and others have; keep them apart")
    return texts or None, [ids for _, ids in samples]


def _sample(line: str, where: str, truncated: bool, tokenizer: Tokenizer | None) -> tuple[str | None, np.ndarray]:
    """Returns the text and the tokens of a line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        if truncated:
            raise UserError(f"{where}, the last, is cut off; delete it, or draw the samples again") from None
        raise UserError(f"{where} is no JSON object; there must be one for each sample") from None
    invalid = UserError(f"{where} is no sample: an object with a text and its tokens, a list of ids from 0")
    if not isinstance(record, dict) or not isinstance(record.get("text"), str | None):
        raise invalid
    text, ids = record.get("text"), record.get("tokens")
    if tokenizer is not None:
        if text is None:
            raise UserError(f"{where} has no text to encode; leave the tokenizer out")
        return text, encode_with_eos_markers(text, tokenizer, where).astype(np.int64)
    if ids is None and text is not None:
        raise UserError(f"{where} has no tokens; name a tokenizer that encodes the texts")
    if not _are_ids(ids):
        raise invalid
    length = record.get("length", len(ids))  # later tokens are padding
    if type(length) is not int or not 0 <= length <= len(ids):
        raise invalid
    return text, np.array(ids[:length], np.int64)


def _are_ids(ids: object) -> TypeGuard[list[int]]:
    return isinstance(ids, list) and all(type(token) is int and 0 <= token < 2**31 for token in ids)


def _entropy(counts: np.ndarray) -> float:
    shares = counts / counts.sum()
    return float(np.sum(shares * np.log(1 / shares)))


def _scored(texts: Sequence[str] | None, scorer: Scorer) -> dict[str, Any]:
    """Scores the texts. Returns the fields of a Quality from `scorer` on."""
    if texts is None:
        raise UserError("a scoring model reads texts, and these samples have none; their model has no tokenizer")
    name = getattr(scorer, "name", None) or getattr(scorer, "__name__", type(scorer).__name__)
    scored = scorer(list(texts))
    nats, sizes = np.asarray(scored.nats, np.float64), np.asarray(scored.tokens)
    if nats.shape != (len(texts),) or sizes.shape != nats.shape:
        raise UserError(
            f"the scoring model {name} returned nats of shape {nats.shape} and tokens of shape {sizes.shape} for "
            f"{len(texts)} texts"
        )
    if not np.isfinite(nats).all():
        first = int(np.argmin(np.isfinite(nats)))
        raise UserError(f"the scoring model {name} gives text {first + 1} {nats[first]} nats; it must be finite")
    if sizes.sum() == 0:
        raise UserError(f"the scoring model {name} finds no tokens to score; the texts are too short for it")
    nats_per_token = _over_samples(nats, sizes)
    return {
        "scorer": name,
        "scorer_tokens": int(sizes.sum()),
        "nats_per_token": nats_per_token.value,
        "standard_error": nats_per_token.standard_error,
        "generative_perplexity": exponential(nats_per_token.value),
    }


def _over_samples(totals: np.ndarray, sizes: np.ndarray) -> Estimate:
    """sum(totals) / sum(sizes) with each sample a cluster. Float[N], Float[N]."""
    return ratio(totals, sizes, np.arange(len(totals)))
