"""Parts of a text, by a tokenizer of the library `tokenizers`, without what it does at the ends of a text only.

Some put a space before a text, some drop the spaces at its ends, and some have other pieces for the first or the last
part of a word ("un" and "##able"). A part of a text is encoded between letters that are pieces of their own, and their
ids are cut off: what stands at the ends of a text is done to them. Tokenizers of bytes have no such piece; theirs are
the rules without the steps that add or drop spaces.
"""

import functools
import json
from typing import Any, NamedTuple

import numpy as np

FRAMES = [chr(code) for code in range(0xA500, 0xA60C)]  # syllables of Vai: letters without case, accents or parts


class Rules(NamedTuple):
    """A tokenizer of the library, and the letters between which it gets a text."""

    tokenizer: Any
    before: str = ""
    after: str = ""
    own: np.ndarray | None = None  # Int32[V], what its ids are in the given tokenizer, -1 for a letter of the frame

    def frame(self, text: str) -> str:
        """The text as the tokenizer gets it."""
        return self.before + text + self.after

    def within(self, ids: list[int]) -> tuple[np.ndarray | None, int]:
        """The ids between the letters, Int32[L], and the index of the first.

        None where the letters cannot be found: the text holds them too, or its word is unknown to the tokenizer.
        """
        ids = np.array(ids, np.int32)
        if self.own is None:
            return ids, 0
        ids = self.own[ids]
        letters = np.flatnonzero(ids < 0)
        if len(letters) != len(self.before + self.after):
            return None, 0
        start, stop = letters[0] + 1 if self.before else 0, letters[-1] if self.after else len(ids)
        return ids[start:stop], start


def marks_ends(tokenizer: Any) -> bool:
    """Whether a text's first and last ids may be others than those of the same words inside of a text."""
    rules = json.loads(tokenizer.to_str())
    if _of_bytes(rules):
        return any(_inner(rules, *ends) != rules for ends in ((True, False), (False, True)))
    return rules["model"]["type"] != "WordLevel"  # whose words have no parts


def rules_inside(tokenizer: Any) -> dict[tuple[bool, bool], Rules]:
    """The rules for a part of a text, by whether the text begins with it, and whether it ends with it."""
    rules = json.loads(tokenizer.to_str())
    made = functools.partial(_made, type(tokenizer))
    if _of_bytes(rules):
        return {ends: Rules(made(_inner(rules, *ends))) for ends in ((True, False), (False, True), (False, False))}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    used = set().union(*vocabulary)
    letter = next(letter for letter in FRAMES if letter not in used)
    framed = made(_with_letter(rules, letter, max(vocabulary.values()) + 1))
    numbers = framed.get_vocab(with_added_tokens=True)
    own = np.full(max(numbers.values()) + 1, -1, np.int32)
    for token, number in numbers.items():
        own[number] = vocabulary.get(token, -1)
    edges = {(True, False): ("", letter), (False, True): (letter, ""), (False, False): (letter, letter)}
    return {ends: Rules(framed, *letters, own) for ends, letters in edges.items()}


def _of_bytes(rules: dict) -> bool:
    return '"ByteLevel"' in json.dumps([rules["normalizer"], rules["pre_tokenizer"]])


def _inner(rules: dict, opens: bool, closes: bool) -> dict:
    """Rules that add and drop no space at an end that is none of the text."""

    def edited(step):
        if step.get("type") == "Prepend" and not opens:
            return {"type": "Sequence", "normalizers": []}
        ends = {"add_prefix_space": opens, "strip_left": opens, "strip_right": closes}
        return step | {name: step[name] and keeps for name, keeps in ends.items() if name in step}

    steps = {name: rules[name] for name in ("normalizer", "pre_tokenizer")}
    return rules | json.loads(json.dumps(steps), object_hook=edited)


def _with_letter(rules: dict, letter: str, number: int) -> dict:
    """Rules to which a letter is a piece, wherever in a word it stands."""
    model = rules["model"]
    if model["type"] == "Unigram":
        return rules | {"model": model | {"vocab": [*model["vocab"], [letter, 0.0]]}}
    first, last = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    forms = dict.fromkeys((letter, first + letter, letter + last, first + letter + last))
    more = {form: number + index for index, form in enumerate(forms)}
    return rules | {"model": model | {"vocab": model["vocab"] | more}}


def _made(kind: type, rules: dict) -> Any:
    tokenizer = kind.from_str(json.dumps(rules))
    tokenizer.encode_special_tokens = True  # which the file does not hold
    return tokenizer
