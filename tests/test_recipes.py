"""The recipes of experiments/ at small size, from the command line: the bound falls, and samples look like the data."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import ttest_rel
from small import OPTIMISED

import sedd
from sedd.data.batches import blocks
from sedd.data.sources import open_source
from sedd.diffusion import keyed_random

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
SMALL = ["network.width=64", "network.layers=2", "network.heads=2", "network.dtype=float32", "evaluation.samples=1"]


def command(*args):
    done = subprocess.run(
        [sys.executable, "-m", "sedd.cli", *map(str, args)], env=OPTIMISED, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def train(experiment, corpus, workdir, *settings):
    """Trains the recipe with a small network. Returns its output and its bounds on the validation split."""
    flags = [f"--config.{setting}" for setting in (f"data.corpus={corpus}", "data.vocab_size=none", *SMALL, *settings)]
    out = command("train", f"--config={EXPERIMENTS / experiment}.py", f"--workdir={workdir}", *flags)
    records = map(json.loads, (workdir / "metrics.jsonl").open())
    return out, [record["validation_nats_per_token"] for record in records if "loss" not in record]


@pytest.mark.slow
def test_text8_recipe_learns_on_a_small_corpus(tmp_path):
    """Two megabytes of 27 characters, split by position; the paper's recipe, uniform, with unnormalised scores."""
    words = [
        word
        for name in ("names", "functions")
        for piece in open_source(f"builtin:{name}")
        for word in piece.text.lower().split()
    ]
    letters = re.sub("[^a-z]+", " ", " ".join(words))
    (tmp_path / "text8").write_text((letters * 2)[:2_000_000])
    command(
        "prepare",
        f"--source=text:{tmp_path}/text8",
        "--tokenizer=characters",
        "--split=position:90,5,5",
        f"--out={tmp_path}/corpus",
    )
    corpus = sedd.open_corpus(tmp_path / "corpus")
    assert corpus.vocab_size == 27 and corpus.num_tokens("train") == 1_800_000
    short = ["data.block_length=64", "training.batch_size=64", "training.steps=150", "optimizer.warmup_steps=50"]
    faster = ["optimizer.learning_rate=3e-3", "training.ema_decay=0.98", "evaluation.every=50", "evaluation.draws=2"]
    _, bounds = train("text8_uniform", corpus.path, tmp_path / "run", *short, *faster)
    assert len(bounds) == 3 and bounds[0] > bounds[1] > bounds[2] and bounds[2] < 0.93 * np.log(27)
    drawn = json.loads(command("sample", f"--model={tmp_path}/run", "--steps=64", "--json"))
    assert re.fullmatch("[a-z ]{64}", drawn["text"]) and " " in drawn["text"] and len(set(drawn["text"])) > 6


COLOURS = ["golden", "blue", "green", "wild"]
HOUSES = ["palace", "spice", "man", "mill"]
PLACES = ["the river", "the old market", "the city centre", "a quiet park", "the railway station"]
FOODS = ["french", "chinese", "english", "indian", "italian"]
PRICES = ["cheap", "moderately priced", "expensive"]


def descriptions(count):
    """Sentences of various lengths about restaurants, like those of E2E."""
    random = np.random.default_rng(0)

    def one():
        name = f"the {random.choice(COLOURS)} {random.choice(HOUSES)}"
        parts = [
            f"serves {random.choice(FOODS)} food",
            f"is near {random.choice(PLACES)}",
            f"is {random.choice(PRICES)}",
        ]
        chosen = random.permutation(parts)[: random.integers(1, 4)]
        return f"{name} {' and '.join(chosen)}."

    return [one() for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "experiment, share, steps, seed", [("lm1b_absorb", 0.6, 300, 1), ("lm1b_uniform", 0.85, 600, 1)]
)
def test_lm1b_recipe_learns_on_a_small_corpus(experiment, share, steps, seed, tmp_path):
    """One sentence per row, padding ignored: the bound falls, and samples have lengths of sentences and an end.

    The seeds are of networks that learn the end of texts in so few steps; others learn it later (docs/measurements.md).
    """
    (tmp_path / "sentences.txt").write_text("\n".join(descriptions(20_000)) + "\n")
    source = f"--source=lines:{tmp_path}/sentences.txt"
    command(
        "prepare",
        source,
        "--tokenizer=sentencepiece:320",
        "--mode=padded",
        "--padding=ignored",
        f"--out={tmp_path}/corpus",
    )
    corpus = sedd.open_corpus(tmp_path / "corpus")
    longest = int(np.diff(corpus.offsets("train")).max())
    short = [
        f"data.block_length={longest}",
        "training.batch_size=64",
        f"training.steps={steps}",
        f"training.seed={seed}",
        "optimizer.warmup_steps=50",
        f"evaluation.every={steps // 3}",
    ]
    faster = ["optimizer.learning_rate=3e-3", "training.ema_decay=0.98", "evaluation.draws=2"]
    out, bounds = train(experiment, corpus.path, tmp_path / "run", *short, *faster)
    assert len(bounds) == 3 and bounds[0] > bounds[1] > bounds[2] and "held-out bound" in out
    unigram = np.bincount(corpus.tokens("train"), minlength=corpus.vocab_size) + 1.0
    entropy = -np.log(unigram / unigram.sum())[corpus.tokens("validation")].mean()
    assert bounds[2] < share * entropy

    at_the_end, in_the_text = probability_of_end(sedd.load(tmp_path / "run"), corpus)
    assert ttest_rel(at_the_end, in_the_text, alternative="greater").pvalue < 1e-9
    assert at_the_end.mean() > 3 * in_the_text.mean()

    sample = ("sample", f"--model={tmp_path}/run", "--num_samples=192", "--steps=64", "--json")
    drawn = [json.loads(line)["tokens"] for line in command(*sample).splitlines()]
    lengths = [len(tokens) for tokens in drawn]
    assert len(set(lengths)) > 5 and max(lengths) <= longest
    end = corpus.tokenizer.end_of_text
    ending = np.mean([tokens[-1] == end for tokens in drawn])
    elsewhere = sum(tokens[:-1].count(end) for tokens in drawn) / (sum(lengths) - len(drawn))
    assert ending > at_the_end.mean() / 4 and ending > 3 * elsewhere  # sampling conditions on the lengths


def probability_of_end(model, corpus):
    """Returns the predicted probability of the end-of-text token at the last position of held-out rows, Float[N].

    Twice: conditioned on the length of the row, and on the block length. The rows are corrupted up to the last position
    and pure noise from there on. A network that ignores lengths gives equal results.
    """
    block, end = model.block_length, model.tokenizer.end_of_text
    rows, lengths, _ = blocks(corpus, "validation", block)
    short = lengths <= block - 8  # the end of the text is not near the end of the block
    rows, last = jnp.asarray(rows[short][:256]), jnp.asarray(lengths[short][:256])[:, None] - 1
    keys, sigma = keyed_random.row_keys(jax.random.key(0), jnp.arange(len(rows))), jnp.full(len(rows), 1.5)
    corrupted = model.process.corrupt(keyed_random.fold(keys, 0), rows, sigma[:, None])
    x = jnp.where(jnp.arange(block) < last, corrupted, model.process.prior(keyed_random.fold(keys, 1), block))

    @jax.jit
    def probability(lengths):
        return jnp.exp(model.denoiser(lengths=lengths)(x, sigma, last)[:, 0, end])

    return np.asarray(probability(last[:, 0] + 1)), np.asarray(probability(jnp.full(len(rows), block)))
