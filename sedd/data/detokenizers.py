"""The field's detokenisers: the tokenised text of a benchmark turned back into text, as those who report on it do.

Each is a table of replacements, made one after another. What comes out is, character for character, what the functions
of the same names give in the published code of SEDD (arXiv 2310.16834) and MDLM (arXiv 2406.07524), quirks included: a
figure compares with theirs only where it is of the same text.
"""

import re

Rule = tuple[str | re.Pattern[str], str]  # what is replaced, all of it from left to right, and by what


def detokenized(text: str, rules: tuple[Rule, ...]) -> str:
    """The text after all of these replacements, in their order."""
    for found, instead in rules:
        text = text.replace(found, instead) if isinstance(found, str) else found.sub(instead, text)
    return text


def _trimmed(left: str, right: str) -> Rule:
    """White space just inside a pair of brackets or quotes goes, however much there is."""
    return re.compile(rf"{re.escape(left)}\s*([^{re.escape(right)}]*?)\s*{re.escape(right)}"), rf"{left}\1{right}"


def _unspaced(left: str, right: str) -> Rule:
    """One space on either side just inside an innermost pair goes, where both are there."""
    inside = rf"[^{re.escape(left + right)}]+"
    return re.compile(rf"{re.escape(left)} ({inside}) {re.escape(right)}"), rf"{left}\1{right}"


WIKITEXT: tuple[Rule, ...] = (
    ("s '", "s'"),
    # Handed down from Megatron-LM, where the slashes were to delimit the pattern. Here they are characters, so it finds
    # nothing in ordinary text, and where it does find "/' 7/" it writes its own pattern there. Kept as it is.
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
    (" N ", " 1 "),  # of "N N" the first only: the space between them belongs to one match
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
    (re.compile(r" (\w+) \. "), r" \1. "),  # a full stop behind a word; not behind a bracket or a quote
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
