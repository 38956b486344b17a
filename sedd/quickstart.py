"""`sedd quickstart`: trains on text that every Python installation carries, evaluates, samples and infills."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from sedd import config as configs
from sedd.data.prepare import prepare
from sedd.evaluation.baselines import baselines
from sedd.evaluation.statistics import with_error
from sedd.loading import train

# What is filled in, for each corpus.
_TEMPLATES = {
    "names": "GREEK SMALL LETTER<blank:1> WITH TONOS\nARABIC LETTER<blank:3> FINAL FORM\n",
    "functions": "def __init__(self,<blank:2>):\n    self.<blank:4>\n\n\n",
}


def quickstart(source: str, workdir: str, settings: Sequence[str]):
    """Results go to stdout, progress to stderr. settings: of the config, as `sedd.config.override` takes them."""
    name = source.removeprefix("builtin:")
    print(f"1. preparing the corpus data/{name} ({source})", file=sys.stderr)
    corpus = prepare(source, "sentencepiece:1280", Path("data") / name)
    print(f"2. training a model in {workdir}", file=sys.stderr)
    config = configs.override(configs.default(), [f"data.corpus=data/{name}", *settings])
    model = train(config, workdir)
    print("3. bounding the likelihood of the held-out text", file=sys.stderr)
    report = model.perplexity(corpus)
    print(f"held-out text: {report.num_bytes:,} bytes of {name}, in bits per byte")
    print(f"  {'this model, a bound':22} {with_error(report.bits_per_byte, report.bits_per_byte_error, 3)}")
    for code, bits in baselines(corpus, "test").items():
        print(f"  {code:22} {bits:.3f}")
    print("4. sampling", file=sys.stderr)
    for number, text in enumerate(model.sample(num_samples=2, top_p=0.9).texts):
        print(f"\nsample {number + 1} of a block of {model.block_length} tokens, top_p 0.9\n{text}")
    template = _TEMPLATES[name]
    print(f"\ninfilled from {template!r}\n{model.infill(template, top_p=0.9).texts[0]}")
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
