"""The quality of samples, for what a bound cannot say: how likely another model finds them, and how varied they are.

Neither number means anything alone. Text that repeats itself has a low generative perplexity, noise a high entropy, and
a sampler can move along the line from one to the other (arXiv 2409.02908 shows how far, for a fault in float32 alone).
So a Quality always shows both. Entropy and distinct n-grams depend on the length of a sample and on how many there are,
and perplexity on the judge: compare like with like, and hold them against the same numbers of held-out text.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sedd.data.tokenizers import Tokenizer
from sedd.errors import UserError
from sedd.evaluation.scorers import Scorer
from sedd.evaluation.statistics import Estimate, exponential, ratio, with_error
from sedd.evaluation.text import encode_with_eos_markers
from sedd.runtime.disk import absolute


@dataclasses.dataclass(frozen=True)
class Quality:
    """Of N samples. Nats throughout; the errors are over samples, and None where there is but one.

    distinct: of n-grams for n = 1, 2, 3; None where no sample has n tokens. What a judge says is None without one, and
    in its own tokens.
    """

    num_samples: int
    num_tokens: int
    unigram_entropy: float  # the mean over samples
    unigram_entropy_error: float | None
    distinct: tuple[float | None, ...]
    judge: str | None = None
    judge_tokens: int | None = None
    nats_per_token: float | None = None
    standard_error: float | None = None
    generative_perplexity: float | None = None  # exp of the nats per token, all samples together

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
        if self.judge is not None:
            value = self.generative_perplexity
            spread = value and self.standard_error and value * self.standard_error
            perplexity = "beyond all numbers" if value is None else with_error(value, spread, 2)
            nats = with_error(self.nats_per_token, self.standard_error)
            said = f"{nats} nats per token, {self.judge_tokens:,} tokens of {self.judge}"
            lines.insert(0, f"generative perplexity {perplexity}; {said}")
        return "\n".join(lines)


def quality(texts: Sequence[str] | None, tokens: Sequence[np.ndarray], judge: Scorer | None = None) -> Quality:
    """Measures samples. texts: None where there are none, which only a judge needs; tokens: Int[L_i] of each sample.

    Raises:
      UserError: there is nothing to measure, or the judge gives no finite number for each text.
    """
    if texts is not None and len(texts) != len(tokens):
        raise UserError(f"there are {len(texts)} texts and the tokens of {len(tokens)}; give both of each sample")
    num_tokens = sum(map(len, tokens))
    if num_tokens == 0:
        raise UserError("the samples hold no tokens; there is nothing to measure")
    entropy = _over_samples(unigram_entropy(tokens), np.ones(len(tokens)))
    said = {} if judge is None else _judged(texts, judge)
    return Quality(
        num_samples=len(tokens),
        num_tokens=num_tokens,
        unigram_entropy=entropy.value,
        unigram_entropy_error=entropy.standard_error,
        distinct=tuple(distinct(tokens, n) for n in (1, 2, 3)),
        **said,
    )


def unigram_entropy(tokens: Sequence[np.ndarray]) -> np.ndarray:
    """The entropy of the token frequencies within each sequence, Int[L_i] -> Float64[N], in nats; 0 of an empty one.

    At most log L_i, and below the entropy of the language because a sequence is short.
    """
    return np.array([_entropy(np.unique(row, return_counts=True)[1]) for row in tokens])


def distinct(tokens: Sequence[np.ndarray], n: int) -> float | None:
    """Distinct n-grams over all n-grams, over all samples together; None where no sample has n tokens. Int[L_i]."""
    rows = [np.asarray(row) for row in tokens if len(row) >= n]
    if not rows:
        return None
    grams = np.concatenate([np.lib.stride_tricks.sliding_window_view(row, n) for row in rows])
    return len(np.unique(grams, axis=0)) / len(grams)


def read_samples(path: str | Path, tokenizer: Tokenizer | None = None) -> tuple[list[str] | None, list[np.ndarray]]:
    """The texts, and the tokens Int64[L_i], of the JSON lines that `sedd sample --json` writes.

    texts: None where the model had no tokenizer. tokenizer: encodes the texts anew, so that the samples of several
    programs are measured in the same tokens; needed for lines that have no tokens.

    Raises:
      UserError: there is no such file, or a line of it is no such object, or cut off.
    """
    try:
        lines = Path(absolute(path)).read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as samples: {getattr(error, 'strerror', None) or error}") from None
    whole = lines[-1] == ""  # the last line has its end
    lines = lines[:-1] if whole else lines
    if not lines:
        raise UserError(f"{path} is empty; sedd sample --json prints what belongs there")
    found = []
    for number, line in enumerate(lines, 1):
        cut = number == len(lines) and not whole
        found.append(_sample(line, f"{path}, line {number}", cut, tokenizer))
    texts = [text for text, _ in found]
    if None in texts and any(text is not None for text in texts):
        raise UserError(f"{path}, line {texts.index(None) + 1} has no text, and others have; keep them apart")
    return None if None in texts else texts, [ids for _, ids in found]


def _sample(line: str, where: str, cut: bool, tokenizer: Tokenizer | None) -> tuple[str | None, np.ndarray]:
    """The text and the tokens of a line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        if cut:
            raise UserError(f"{where}, the last, is cut off; delete it, or draw the samples again") from None
        raise UserError(f"{where} is no JSON object; there must be one for each sample") from None
    wrong = UserError(f"{where} is no sample: an object with a text and its tokens, a list of ids from 0")
    if not isinstance(record, dict) or not isinstance(record.get("text"), str | None):
        raise wrong
    text, ids = record.get("text"), record.get("tokens")
    if tokenizer is not None:
        if text is None:
            raise UserError(f"{where} has no text to encode; leave the tokenizer out")
        return text, encode_with_eos_markers(text, tokenizer, where).astype(np.int64)
    if ids is None and text is not None:
        raise UserError(f"{where} has no tokens; name a tokenizer that encodes the texts")
    length = record.get("length", len(ids) if isinstance(ids, list) else 0)  # what follows is not of the text
    if not _are_ids(ids) or type(length) is not int or not 0 <= length <= len(ids):
        raise wrong
    return text, np.array(ids[:length], np.int64)


def _are_ids(ids: object) -> bool:
    return isinstance(ids, list) and all(type(token) is int and 0 <= token < 2**31 for token in ids)


def _entropy(counts: np.ndarray) -> float:
    shares = counts / counts.sum()
    return float(np.sum(shares * np.log(1 / shares)))


def _judged(texts: Sequence[str] | None, judge: Scorer) -> dict:
    """What a judge says, as the fields of a Quality."""
    if texts is None:
        raise UserError("a judge reads texts, and these samples have none; their model has no tokenizer")
    name = getattr(judge, "name", None) or getattr(judge, "__name__", type(judge).__name__)
    said = judge(list(texts))
    nats, sizes = np.asarray(said.nats, np.float64), np.asarray(said.tokens)
    if nats.shape != (len(texts),) or sizes.shape != nats.shape:
        raise UserError(f"the judge {name} was asked of {len(texts)} texts and spoke of {nats.shape}, {sizes.shape}")
    if not np.isfinite(nats).all():
        wrong = int(np.argmin(np.isfinite(nats)))
        raise UserError(f"the judge {name} gives text {wrong + 1} {nats[wrong]} nats; it must be finite")
    if sizes.sum() == 0:
        raise UserError(f"the judge {name} finds no tokens to score; the texts are too short for it")
    nats_per_token = _over_samples(nats, sizes)
    return {
        "judge": name,
        "judge_tokens": int(sizes.sum()),
        "nats_per_token": nats_per_token.value,
        "standard_error": nats_per_token.standard_error,
        "generative_perplexity": exponential(nats_per_token.value),
    }


def _over_samples(totals: np.ndarray, sizes: np.ndarray) -> Estimate:
    """The ratio of the sums, each sample a cluster. Float[N], Float[N]."""
    return ratio(totals, sizes, np.arange(len(totals)))
