"""`sedd quickstart`: trains on text of the Python standard library, evaluates, samples and infills."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from sedd import config as configs
from sedd.data.prepare import prepare
from sedd.evaluation.baselines import baselines
from sedd.evaluation.statistics import with_error
from sedd.loading import train

# The template to infill, by corpus.
_TEMPLATES = {
    "names": "GREEK SMALL LETTER<blank:1> WITH TONOS\nARABIC LETTER<blank:3> FINAL FORM\n",
    "functions": "def __init__(self,<blank:2>):\n    self.<blank:4>\n\n\n",
}


def quickstart(source: str, workdir: str, settings: Sequence[str]):
    """Runs the quickstart. Results go to stdout, progress to stderr.

    source: "builtin:names" or "builtin:functions"; settings: config overrides, as in `sedd.config.override`.
    """
    name = source.removeprefix("builtin:")
    print(f"1. preparing the corpus data/{name} ({source})", file=sys.stderr)
    corpus = prepare(source, "sentencepiece:1280", Path("data") / name)
    print(f"2. training a model in {workdir}", file=sys.stderr)
    config = configs.override(configs.default(), [f"data.corpus=data/{name}", *settings])
    model = train(config, workdir)
    print("3. evaluating the bound on the held-out text", file=sys.stderr)
    report = model.perplexity(corpus)
    assert report.bits_per_byte is not None  # the corpus is text
    print(f"held-out text: {report.num_bytes:,} bytes of {name}, in bits per byte")
    print(f"  {'this model, a bound':22} {with_error(report.bits_per_byte, report.bits_per_byte_error, 3)}")
    for code, bits in baselines(corpus, "test").items():
        print(f"  {code:22} {bits:.3f}")
    print("4. sampling", file=sys.stderr)
    samples = model.sample(num_samples=2, top_p=0.9)
    assert samples.texts is not None  # the model has a tokenizer
    for number, text in enumerate(samples.texts):
        print(f"\nsample {number + 1} of a block of {model.block_length} tokens, top_p 0.9\n{text}")
    template = _TEMPLATES[name]
    infilled = model.infill(template, top_p=0.9)
    assert infilled.texts is not None
    print(f"\ninfilled from {template!r}\n{infilled.texts[0]}")
    print("\nnext:")
    flag = f"--model={shlex.quote(workdir)}"
    for line in (
        f"sedd sample {flag} --num_samples=4",
        f"sedd infill {flag} {shlex.quote(template.splitlines()[0])}",
        f"sedd eval   {flag} --split=validation",
        "sedd prepare --source='text:my/*.txt' --out=data/mine",
        "sedd train  --config.data.corpus=data/mine --workdir=runs/mine",
    ):
        print(f"  {line}")
