"""A picture of the learned embeddings of a Gaussian model: words by part of speech, on their two main components.

    python benchmarks/embedding_map.py --model=runs/gaussian --out=embeddings.png

Takes the tokens that are whole words of the model's corpus, the most frequent first, and projects their rows of the
table to the two directions of the largest variance. Parts of speech are those of a list of words below, which covers
the restaurant descriptions of E2E; words that are not in it are grey. Prints the share of each word's nearest
neighbour, by the distance of the rows, that is of its own part of speech, and that of random neighbours.
"""

import argparse

import jax
import numpy as np

import sedd

PARTS = {
    "determiner, pronoun": "the a an it its this that they their you there which who",
    "preposition, conjunction": "in near at by of on with from for to along and but or as next beside between",
    "verb": "is has are serves offers located provides can be have rated called named priced located serving offering",
    "adjective": "family friendly cheap high low average moderate expensive child kid good excellent adult kids",
    "cuisine": "Italian Chinese English French Indian Japanese Fast",
    "noun": "restaurant pub coffee shop food price range rating customer city centre riverside area venue",
    "number, sign": "1 3 5 20 25 30 £ . , ; three five out",
}


def words_of(model, count):
    """The ids and the spelling of the most frequent tokens that are whole words or signs."""
    corpus = sedd.open_corpus(model.config.data.corpus)
    frequent = np.argsort(-np.bincount(corpus.tokens("train"), minlength=model.vocab_size), kind="stable")
    spelling = {int(number): model.tokenizer.decode(np.array([number])).strip() for number in frequent}
    known = {word for words in PARTS.values() for word in words.split()}
    chosen, seen = [], set()
    for number in map(int, frequent):
        word = spelling[number]
        if word and word not in seen and (word in known or (len(word) > 2 and word.isalpha())):
            chosen.append(number)
            seen.add(word)
    return chosen[:count], [spelling[number] for number in chosen[:count]]


def neighbours(rows, parts):
    """The share of words whose nearest neighbour is of their part of speech, and that of random pairs of words."""
    labelled = np.flatnonzero([part is not None for part in parts])
    labels = np.array([parts[at] for at in labelled])
    distance = np.linalg.norm(rows[labelled][:, None] - rows[labelled][None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    same = labels[:, None] == labels[None]
    others = ~np.eye(len(labels), dtype=bool)
    return float(np.mean(labels[distance.argmin(1)] == labels)), float(same[others].mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--words", type=int, default=120)
    parser.add_argument("--out", default="embeddings.png")
    args = parser.parse_args()
    model = sedd.load(args.model)
    numbers, words = words_of(model, args.words)
    rows = np.asarray(jax.device_get(model.network.codec.rows(model.params["codec"])))[numbers]
    part_of = {word: part for part, listed in PARTS.items() for word in listed.split()}
    parts = [part_of.get(word) for word in words]
    share, chance = neighbours(rows, parts)
    print(f"nearest neighbour of the same part of speech: {share:.2f} of the words, {chance:.2f} by chance")
    centred = rows - rows.mean(0)
    places = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    for number, part in enumerate((*PARTS, None)):
        at = np.flatnonzero([one == part for one in parts])
        color = "0.6" if part is None else f"C{number}"
        axes.scatter(*places[at].T, s=6, color=color, label=part or "other")
        for index in at:
            axes.annotate(
                words[index], places[index], color=color, fontsize=7, xytext=(2, 1), textcoords="offset points"
            )
    axes.set(xticks=[], yticks=[])
    axes.legend(frameon=False, fontsize=7)
    figure.savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
