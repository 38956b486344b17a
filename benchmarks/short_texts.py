"""Bounds of a text shorter than the block: at its own length, or in a full block whose other positions stay masked.

    python benchmarks/short_texts.py --model=runs/mine --lengths=4,8,16,32,64

Cuts the test split of the model's corpus, which must be packed, into texts of --lengths tokens, and bounds them both
ways with the same noise. Prints nats per token, and the mean difference with its standard error over texts.
"""

import argparse
import dataclasses

import numpy as np

import sedd
from sedd.data.layout import Layout
from sedd.evaluation.perplexity import perplexity
from sedd.evaluation.text import ScoringRows

OWN_LENGTH = Layout("padded", "ignored")  # attention excludes the padding


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--lengths", default="4,8,16,32")
    parser.add_argument("--texts", type=int, default=512, help="number of texts of each length")
    parser.add_argument("--draws", type=int, default=16)
    args = parser.parse_args()
    model = sedd.load(args.model)
    tokens = sedd.open_corpus(model.config.data.corpus).tokens("test")
    print("tokens  texts  at its own length  in a full block  difference")
    for length in map(int, args.lengths.split(",")):
        texts = np.array(tokens[: len(tokens) // length * length]).reshape(-1, length)[: args.texts]
        in_block, alone = (nats_per_token(model, texts, layout, args.draws) for layout in (Layout(), OWN_LENGTH))
        error = np.std(alone - in_block, ddof=1) / len(texts) ** 0.5
        print(
            f"{length:6} {len(texts):6} {alone.mean():18.4f} {in_block.mean():16.4f}  "
            f"{(alone - in_block).mean():+.4f} ± {error:.4f}",
            flush=True,
        )


def nats_per_token(model: sedd.Model, texts: np.ndarray, layout: Layout, num_draws: int) -> np.ndarray:
    """Returns the bound of each text in nats per token, Float[N]. texts: Int[N n]."""
    count, length = texts.shape
    tokens = np.pad(texts, ((0, 0), (0, model.block_length - length))).astype(np.int32)
    lengths = np.full(count, length, np.int32)
    rows = ScoringRows(tokens, lengths, lengths, np.arange(count), None, None, layout, {}, count)
    model = dataclasses.replace(model, layout=layout)
    _, terms = perplexity(model, rows, num_draws=num_draws, progress=False)
    return terms.rows / length


if __name__ == "__main__":
    main()
