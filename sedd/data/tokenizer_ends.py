"""Encodes parts of a text with the library `tokenizers`, without its rules for the ends of a text.

Some tokenizers put a space before a text, some drop spaces at its ends, and some have different tokens for the first or
the last part of a word ("un" and "##able"). A part of a text is therefore encoded between frame letters, which are
tokens of their own and to which the rules for the ends apply; their ids are removed. For byte-level tokenizers, which
have no such token, the steps that add or drop spaces are removed from the rules instead.
"""

import functools
import json
from typing import Any, NamedTuple

import numpy as np

FRAME_LETTERS = [chr(code) for code in range(0xA500, 0xA60C)]  # Vai syllables: no case, accents or decompositions


class Rules(NamedTuple):
    """A tokenizer of the library, and the frame letters before and after each text."""

    tokenizer: Any
    before: str = ""
    after: str = ""
    original_ids: np.ndarray | None = None  # Int32[V], ids in the pretrained tokenizer, -1 for the frame letter

    def frame(self, text: str) -> str:
        """Returns the text between the frame letters."""
        return self.before + text + self.after

    def unframe(self, framed_ids: list[int]) -> tuple[np.ndarray | None, int]:
        """Returns the ids between the frame letters, Int32[L], and the index of the first.

        None if the frame letters are not found: the text contains them, or the tokenizer does not know the framed word.
        """
        ids = np.array(framed_ids, np.int32)
        if self.original_ids is None:
            return ids, 0
        ids = self.original_ids[ids]
        letters = np.flatnonzero(ids < 0)
        if len(letters) != len(self.before + self.after):
            return None, 0
        start, stop = int(letters[0]) + 1 if self.before else 0, int(letters[-1]) if self.after else len(ids)
        return ids[start:stop], start


def marks_ends(tokenizer: Any) -> bool:
    """Returns whether a text's first and last ids may differ from those of the same words inside of a text."""
    rules = json.loads(tokenizer.to_str())
    if _is_byte_level(rules):
        return any(_without_end_rules(rules, *ends) != rules for ends in ((True, False), (False, True)))
    return rules["model"]["type"] != "WordLevel"  # it has no parts of words


def rules_inside(tokenizer: Any) -> dict[tuple[bool, bool], Rules]:
    """Returns the rules for parts of a text, by (the part begins the text, the part ends the text)."""
    rules = json.loads(tokenizer.to_str())
    build = functools.partial(_build, type(tokenizer))
    if _is_byte_level(rules):
        parts = ((True, False), (False, True), (False, False))
        return {ends: Rules(build(_without_end_rules(rules, *ends))) for ends in parts}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    used = set().union(*vocabulary)
    letter = next(letter for letter in FRAME_LETTERS if letter not in used)
    framed = build(_with_letter(rules, letter, max(vocabulary.values()) + 1))
    framed_ids = framed.get_vocab(with_added_tokens=True)
    original_ids = np.full(max(framed_ids.values()) + 1, -1, np.int32)
    for token, framed_id in framed_ids.items():
        original_ids[framed_id] = vocabulary.get(token, -1)
    frames = {(True, False): ("", letter), (False, True): (letter, ""), (False, False): (letter, letter)}
    return {ends: Rules(framed, *letters, original_ids) for ends, letters in frames.items()}


def _is_byte_level(rules: dict) -> bool:
    return '"ByteLevel"' in json.dumps([rules["normalizer"], rules["pre_tokenizer"]])


def _without_end_rules(rules: dict, opens: bool, closes: bool) -> dict:
    """Returns rules that add or drop spaces only at those ends of a part that are ends of the text."""

    def edited(step):
        if step.get("type") == "Prepend" and not opens:
            return {"type": "Sequence", "normalizers": []}
        ends = {"add_prefix_space": opens, "strip_left": opens, "strip_right": closes}
        return step | {name: step[name] and is_end for name, is_end in ends.items() if name in step}

    steps = {name: rules[name] for name in ("normalizer", "pre_tokenizer")}
    return rules | json.loads(json.dumps(steps), object_hook=edited)


def _with_letter(rules: dict, letter: str, number: int) -> dict:
    """Returns rules with a token for the letter at any position in a word. number: the id of its first form."""
    model = rules["model"]
    if model["type"] == "Unigram":
        return rules | {"model": model | {"vocab": [*model["vocab"], [letter, 0.0]]}}
    first, last = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    forms = dict.fromkeys((letter, first + letter, letter + last, first + letter + last))
    added = {form: number + index for index, form in enumerate(forms)}
    return rules | {"model": model | {"vocab": model["vocab"] | added}}


def _build(kind: Any, rules: dict) -> Any:
    """Returns a tokenizer of these rules. kind: the library's class."""
    tokenizer = kind.from_str(json.dumps(rules))
    tokenizer.encode_special_tokens = True  # a setting that is not part of the rules
    return tokenizer
