"""`wordpieces:FILE`: the pieces of a pretrained WordPiece `tokenizer.json`, such as BERT's, that a corpus uses.

BERT has 30,522 pieces, of which a small corpus uses a thousand, and logits are computed for each. A piece keeps its
text, by which its row in the embedding table of a pretrained encoder is found.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from sedd.data.tokenizer_huggingface import HuggingFace
from sedd.errors import UserError

BATCH = 1_000_000  # characters; the library encodes the texts of a batch in parallel


def prune_wordpieces(data: bytes, texts: Iterable[str]) -> bytes:
    """Returns the `tokenizer.json` of `data` with only those pieces that the texts use, and those of `_always_kept`.

    WordPiece encodes greedily, longest match first, so that the texts are encoded as before. Other words may have more
    pieces, and become unknown only if one of their characters has no piece ("a", or "##a" inside of a word). Ids are
    consecutive, in the order of the old ones. UserError if the model is not WordPiece.
    """
    tokenizer = HuggingFace(data)
    rules = tokenizer.rules
    if rules["model"]["type"] != "WordPiece":
        raise UserError(f"the model is {rules['model']['type']}, not WordPiece; write huggingface:FILE")
    used = _used_ids(tokenizer, texts)
    kept = _always_kept(rules) | {piece for piece, number in _ids(rules).items() if number in used}
    return json.dumps(_with_pieces(rules, kept)).encode("utf-8")


def _ids(rules: dict[str, Any]) -> dict[str, int]:
    """Returns the id of each piece, in order, and then those of the added tokens that are no pieces."""
    return rules["model"]["vocab"] | {token["content"]: token["id"] for token in rules["added_tokens"]}


def _always_kept(rules: dict[str, Any]) -> set[str]:
    """Returns the added tokens, the unknown token, and all single characters and their continuations ("##a")."""
    model, added = rules["model"], (token["content"] for token in rules["added_tokens"])
    lengths = {piece: len(piece.removeprefix(model["continuing_subword_prefix"])) for piece in model["vocab"]}
    return {*added, model["unk_token"], *(piece for piece, length in lengths.items() if length == 1)}


def _with_pieces(rules: dict[str, Any], kept: set[str]) -> dict[str, Any]:
    """Returns the rules with only these pieces, and without the post-processor, which adds special tokens by id."""
    ids = {piece: number for number, piece in enumerate(piece for piece in _ids(rules) if piece in kept)}
    model = rules["model"] | {"vocab": {piece: ids[piece] for piece in rules["model"]["vocab"] if piece in kept}}
    added = [token | {"id": ids[token["content"]]} for token in rules["added_tokens"]]
    return rules | {"model": model, "added_tokens": added, "post_processor": None}


def _used_ids(tokenizer: HuggingFace, texts: Iterable[str]) -> set[int]:
    used: set[int] = set()
    for batch in _batches(texts):
        used.update(*(ids.tolist() for ids in tokenizer.encode_all(batch)))
    return used


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    yield batch
