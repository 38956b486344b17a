"""The published detokenisers, which turn the tokenised text of a benchmark back into plain text.

Each is a table of replacements, applied in order. The result equals, character for character, that of the functions of
the same names in the published code of SEDD (arXiv 2310.16834) and MDLM (arXiv 2406.07524), quirks included:
perplexities are comparable only on the same text.
"""

import re

Rule = tuple[str | re.Pattern[str], str]  # pattern, of which every match is replaced from left to right; replacement


def detokenized(text: str, rules: tuple[Rule, ...]) -> str:
    """Returns the text after all replacements, applied in order."""
    for pattern, replacement in rules:
        text = text.replace(pattern, replacement) if isinstance(pattern, str) else pattern.sub(replacement, text)
    return text


def _trimmed(left: str, right: str) -> Rule:
    """Returns the rule that removes all white space just inside a pair of brackets or quotes."""
    return re.compile(rf"{re.escape(left)}\s*([^{re.escape(right)}]*?)\s*{re.escape(right)}"), rf"{left}\1{right}"


def _unspaced(left: str, right: str) -> Rule:
    """Returns the rule that removes one space on either side just inside an innermost pair, if both are present."""
    inside = rf"[^{re.escape(left + right)}]+"
    return re.compile(rf"{re.escape(left)} ({inside}) {re.escape(right)}"), rf"{left}\1{right}"


WIKITEXT: tuple[Rule, ...] = (
    ("s '", "s'"),
    # From Megatron-LM, where the slashes were meant to delimit the pattern. Here they are literal, so that the rule
    # matches nothing in ordinary text, and replaces "/' 7/" by the pattern itself. Kept to equal the published code.
    (re.compile("/' [0-9]/"), "/'[0-9]/"),
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    *(_trimmed(left, right) for left, right in ("()", "[]", "{}", '""', "''")),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),  # of "N N" only the first: the space between them belongs to one match
    (" 's", "'s"),
)

PTB: tuple[Rule, ...] = (
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    ("\\/", "/"),
    (re.compile("(?<= )N(?= )"), "1"),  # every one of "N N N"; a number that ends a row stays N
    ("$ 1", "$1"),
    ("# 1", "#1"),
    ("<unk>", "?"),
)

LM1B: tuple[Rule, ...] = (
    ("http : / / ", "http://"),
    ("https : / / ", "https://"),
    (re.compile(r" '(?=\w)"), "'"),
    (re.compile(r" (\w+) \. "), r" \1. "),  # a full stop after a word, not after a bracket or a quote
    (re.compile(r" (\w+) \.$"), r" \1."),
    (" ? ", "? "),
    (re.compile(r" \?$"), "?"),
    (" ! ", "! "),
    (re.compile(r" !$"), "!"),
    *((f" {mark} ", f"{mark} ") for mark in ",:;"),
    (" / ", "/"),
    *(_unspaced(left, right) for left, right in ('""', "''", "()", "[]")),
    ("$ ", "$"),
    ("£ ", "£"),
)

LAMBADA: tuple[Rule, ...] = (
    ("\N{LEFT DOUBLE QUOTATION MARK}", '"'),
    ("\N{RIGHT DOUBLE QUOTATION MARK}", '"'),
    (re.compile(r"\s+\Z"), ""),
    (re.compile(r"\A\s*"), "\n"),
)

SCIENTIFIC_PAPERS = WIKITEXT + LM1B
