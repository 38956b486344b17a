"""A table of embeddings from the co-occurrences of a corpus, for `codec.table`.

    python benchmarks/cooccurrence_table.py --corpus=data/mine --width=8 --out=table.npy

Its rows are the first left singular vectors of the positive pointwise mutual information of tokens at most `--window`
positions apart in the training text, each scaled by the root of its singular value (Levy and Goldberg, 2014). Rows of
tokens that do not occur are random.
"""

import argparse

import numpy as np

import sedd


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    corpus = sedd.open_corpus(args.corpus)
    information = positive_information(np.asarray(corpus.tokens("train")), corpus.vocab_size, args.window)
    vectors, values, _ = np.linalg.svd(information)
    table = vectors[:, : args.width] * np.sqrt(values[: args.width])
    absent = ~np.any(table, axis=-1)
    table[absent] = table[~absent].std() * np.random.default_rng(0).normal(size=(absent.sum(), args.width))
    np.save(args.out, table.astype(np.float32))
    share = np.sum(values[: args.width] ** 2) / np.sum(values**2)
    print(f"{len(table):,} rows of {args.width}; {share:.2f} of the squared information")


def positive_information(tokens, vocab_size, window):
    """Returns max(0, log p(u, v) / (p(u) p(v))) of tokens within the window. Int[T] -> Float[V V]."""
    counts = np.zeros((vocab_size, vocab_size))
    for distance in range(1, window + 1):
        np.add.at(counts, (tokens[:-distance], tokens[distance:]), 1.0)
    joint = (counts + counts.T) / (2 * counts.sum())
    independent = np.outer(joint.sum(0), joint.sum(1))
    seen = joint > 0
    return np.maximum(0.0, np.log(np.where(seen, joint, 1.0) / np.where(seen, independent, 1.0)))


if __name__ == "__main__":
    main()
