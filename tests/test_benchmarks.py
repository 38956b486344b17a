"""Benchmarks: the rows of files as published, the detokenisers, and one-line errors."""

import gzip
import json
import random
import tracemalloc

import pytest

from sedd import data
from sedd.data import files
from sedd.data.detokenizers import LAMBADA, LM1B, PTB, SCIENTIFIC_PAPERS, WIKITEXT, detokenized
from sedd.data.source_benchmarks import BENCHMARKS
from sedd.errors import UserError

WIKI = [
    " ",
    " = Valkyria <unk> III = ",
    " ",
    ' The game \'s story , a " side @-@ story " , sold 1 @,@ 500 ( 1 @.@ 5 % ) . ',
]
ARTICLE = ["the set ( @xmath0 ) of 's ' papers .", "", 'it is " new " : $ 5 .']


def json_lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# Of each benchmark, a file as published and its rows.
PUBLISHED = {
    "wikitext": (
        "\n".join([*WIKI, "", "end"]),
        ["", " = Valkyria <unk> III =\n", "", ' The game\'s story, a "side-story", sold 1,500 (1.5 %).\n', "", "end"],
    ),
    "ptb": (
        " no it was n't black monday \n\n mr. <unk> 's N N shares at $ N \n",
        ["no it wasn't black monday", "", "mr. ?'s 1 1 shares at $ N"],
    ),
    "lm1b": (
        'He said : " It \'s here . "\n  Why ?\nIt cost £ 5 .\n',
        ['He said: "It\'s here."', "Why?", "It cost £5."],
    ),
    "lambada": (
        json_lines({"text": " “well,” she said.\n"}, {"text": ""}, {"id": 1, "text": "漢 é"}),
        ['\n"well," she said.', "\n", "\n漢 é"],
    ),
    "ag_news": (
        '"3","Oil , up","It\\ ""rose"" ."\n"1", " x","two\nlines"\n',
        ['Oil , up It\\ "rose" .', " x two\nlines"],
    ),
    "scientific_papers": (
        json_lines({"article_text": ARTICLE, "abstract_text": []}, {"article_text": []}),
        ["the set (@xmath0) of's' papers .\n\nit is \"new\": $5.", ""],
    ),
}


def rows_of(spec):
    """Returns all rows of a source, empty ones too."""
    return list(data.open_source(spec).read())


# Detokenisers


@pytest.mark.parametrize(
    ("rules", "tokenised", "text"),
    [
        (WIKITEXT, " = = = Rock ' n ' roll = = = \n", " === Rock 'n' roll ===\n"),
        (
            WIKITEXT,
            "the players ' 2 @,@ 000 [ sic ] , { \t\n x } ; at 5 ° C \n y",
            "the players' 2,000 [sic], {x}; at 5°C\ny",
        ),
        (WIKITEXT, "Who ? I ! a : b . N N N c 's", "Who? I! a: b. 1 N 1 c's"),
        (WIKITEXT, "it 's ' 7 days '", "it's' 7 days'"),
        (PTB, "N N N N N N N N N N N N N N N a N", "N 1 1 1 1 1 1 1 1 1 1 1 1 1 1 a N"),
        (PTB, "the banks ' $ N loss of # N \\/ <unk> 's \n is n't", "the banks' $1 loss of #1 / ?'s\nisn't"),
        (PTB, "a \n b", "a\nb"),
        (LM1B, "http : / / a / b , https : / / c", "http://a/b, https://c"),
        (LM1B, "I 'm 'gone ' to ( the ) . x . y . z .\n", "I'm'gone ' to (the) . x. y . z.\n"),
        (LM1B, '" a " b " and [ d ] ( e [ f ] ) ; $ 5 ! g !', '"a" b " and [d] (e [f]); $5! g!'),
        (LAMBADA, "\u2028\t“ a ” ‘b’ \x1f\n", '\n" a " ‘b’'),
        (LAMBADA, " \n ", "\n"),
        (SCIENTIFIC_PAPERS, "a ( b ) @xmath0 's $ x .", "a (b) @xmath0's $x."),
    ],
)
def test_detokenisers_agree_with_results_by_hand(rules, tokenised, text):
    assert detokenized(tokenised, rules) == text


def test_replacements_are_applied_in_order():
    """Control: in the reversed order the result differs."""
    text = "= = = = a ' s '"
    assert detokenized(text, WIKITEXT) == "==== a's'" and detokenized(text, WIKITEXT[::-1]) == "== == a 's'"


def test_the_rule_from_megatron_matches_only_itself():
    without = tuple(rule for rule in WIKITEXT if "[0-9]" not in rule[1])
    assert len(without) == len(WIKITEXT) - 1
    for text in ("the ' 7 days '", "' 7", "9 / ' 7 / '", *WIKI):
        assert detokenized(text, WIKITEXT) == detokenized(text, without)
    assert detokenized("x /' 7/ y", WIKITEXT) == "x /'[0-9]/ y" != detokenized("x /' 7/ y", without)


@pytest.mark.parametrize("rules", [PTB, LAMBADA])
def test_ptb_and_lambada_detokenisers_are_idempotent(rules):
    words = ["a", "s", "'", "'s", "n't", "<unk>", "“", "”", ".", "\t"]
    texts = [" ".join(random.Random(seed).choices(words, k=12)) for seed in range(300)]
    once = [detokenized(text, rules) for text in texts]
    assert [detokenized(text, rules) for text in once] == once != texts


def test_wikitext_detokeniser_is_not_idempotent():
    once = detokenized("a N N b", WIKITEXT)
    assert once == "a 1 N b" != detokenized(once, WIKITEXT)


# Rows


def test_every_benchmark_is_tested():
    assert PUBLISHED.keys() == BENCHMARKS.keys()


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_published_files_give_the_expected_rows(name, suffix, tmp_path):
    content, rows = PUBLISHED[name]
    content = content.encode()
    (tmp_path / f"a.1{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    (tmp_path / f"a.2{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    source = data.open_source(f"{name}:{tmp_path}/a.*")
    assert list(source.read()) == list(source.read()) == 2 * rows
    assert source.spec == f"{name}:{tmp_path}/a.*" and len(source.files) == 2
    joiner = {"wikitext": "", "ptb": "\n", "lm1b": "\n"}.get(name)
    assert source.joiner == joiner
    assert list(source) == [(row + (joiner or ""), True) for row in 2 * rows if row]


def test_a_long_row_is_yielded_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("sedd.data.source.LONGEST_PIECE", 100)
    article = [f"sentence {number} , and so on ." for number in range(50)]
    (tmp_path / "a").write_text(json_lines({"article_text": article}))
    (row,) = rows_of(f"scientific_papers:{tmp_path}/a")
    pieces = list(data.open_source(f"scientific_papers:{tmp_path}/a"))
    assert len(pieces) > 10 and "".join(piece.text for piece in pieces) == row
    assert "sentence 1, and so on .\nsentence 2," in row and row.endswith("so on.")


def test_text8_is_one_document_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 777)
    text = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=20_000))
    (tmp_path / "text8.gz").write_bytes(gzip.compress(text.encode()))
    source = data.open_source(f"text8:{tmp_path}/text8.gz")
    (document,) = source.read()
    parts = list(document)
    assert "".join(parts) == text and max(map(len, parts)) <= 777 and source.joiner is None
    corpus = data.prepare(source.spec, "characters", tmp_path / "corpus", split="position:90,5,5")
    assert [corpus.num_tokens(split) for split in corpus.splits] == [18_000, 1000, 1000]
    assert "".join(corpus.tokenizer.decode(corpus.tokens(split)) for split in corpus.splits) == text
    assert corpus.vocab_size == 27 and corpus.tokenizer.end_of_text is None


def test_text8_is_read_in_little_memory(tmp_path):
    """31 MB of text, small when compressed. Control: the text as one string."""
    (tmp_path / "text8.gz").write_bytes(gzip.compress(b"a line of text " * 2**21, 1))
    (document,) = data.open_source(f"text8:{tmp_path}/text8.gz").read()

    def peak(read):
        tracemalloc.start()
        assert read() == 15 * 2**21
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak_bytes

    assert peak(lambda: sum(map(len, document))) < 10e6
    (document,) = data.open_source(f"text8:{tmp_path}/text8.gz").read()
    assert peak(lambda: len("".join(document))) > 30e6


@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_are_yielded_before_the_end_of_the_file_is_read(name, tmp_path, monkeypatch):
    """All rows are yielded before the invalid byte at the end of the file raises."""
    monkeypatch.setattr(files, "CHUNK", 64)
    content, rows = PUBLISHED[name]
    (tmp_path / "a").write_bytes(content.encode().replace(b"end", b"end\n") + b"caf\xe9")
    read_rows = []
    with pytest.raises(UserError, match="a is not UTF-8"):
        read_rows.extend(data.open_source(f"{name}:{tmp_path}/a").read())
    assert [row.strip() for row in read_rows] == [row.strip() for row in rows]


# In a corpus


@pytest.mark.parametrize("tokenizer", ["bytes", "characters"])
def test_a_corpus_keeps_the_detokenised_rows(tokenizer, tmp_path):
    """No id separates rows that include their line ends, and the counts are those of the detokenised text."""
    lines = [f" = Café {number} = \n \n It 's 漢 , <unk> . \n" for number in range(40)]
    (tmp_path / "wiki.raw").write_text("".join(lines))
    spec = f"wikitext:{tmp_path}/wiki.raw"
    corpus = data.prepare(spec, tokenizer, tmp_path / "corpus", split="position:80,10,10")
    text = "".join(rows_of(spec))
    assert text.startswith(" = Café 0 =\n It's 漢, <unk>.\n = Café 1 =\n") and text.count("\n") == 80
    decoded = [corpus.tokenizer.decode(corpus.tokens(split)) for split in corpus.splits]
    assert "".join(decoded) == text and corpus.tokenizer.end_of_text is None
    assert [corpus.num_characters(split) for split in corpus.splits] == [len(part) for part in decoded]
    assert [corpus.num_bytes(split) for split in corpus.splits] == [len(part.encode()) for part in decoded]
    assert len(text.encode()) == len(text) + 40 * (1 + 2)


@pytest.mark.parametrize(
    ("name", "line", "end"), [("ptb", " row N {} \n", "\n"), ("ag_news", '"1","row","{}"\n', "<|endoftext|>")]
)
def test_rows_end_with_a_newline_or_with_an_id(name, line, end, tmp_path):
    (tmp_path / "a").write_text("".join(map(line.format, range(50))))
    corpus = data.prepare(f"{name}:{tmp_path}/a", "bytes", tmp_path / "corpus")
    rows = rows_of(corpus.meta["source"])
    decoded = "".join(corpus.tokenizer.decode(corpus.tokens(split)) for split in corpus.splits)
    assert sorted(decoded.split(end)) == sorted([*rows, ""]) and len(rows) == 50
    newlines = 50 if end == "\n" else 0  # newlines are text, ids are not
    assert sum(corpus.num_characters(split) for split in corpus.splits) == sum(map(len, rows)) + newlines


@pytest.mark.parametrize("name", ["wikitext", "ptb", "lm1b"])
def test_lines_of_running_text_stay_in_order(name, tmp_path):
    """Control: those of One Billion Words, which were shuffled before publication, do not."""
    for split in ("train", "test"):
        (tmp_path / split).write_text("".join(f"row {number} of {split}\n" for number in range(60)))
    sources = {split: f"{name}:{tmp_path}/{split}" for split in ("train", "test")}
    corpus = data.prepare(sources, "bytes", tmp_path / "corpus")
    in_order = [corpus.tokenizer.decode(corpus.tokens(split)) == (tmp_path / split).read_text() for split in sources]
    assert in_order == [name != "lm1b"] * 2


def test_splits_may_have_different_joiners(tmp_path):
    """An end-of-text id follows only the documents of a source without a joiner."""
    (tmp_path / "ag").write_text("".join(f'"1","row","{number}"\n' for number in range(50)))
    (tmp_path / "wiki").write_text("".join(f" row {number} \n" for number in range(50)))
    corpus = data.prepare(
        {"train": f"ag_news:{tmp_path}/ag", "test": f"wikitext:{tmp_path}/wiki"}, "bytes", tmp_path / "c"
    )
    train, test = (corpus.tokenizer.decode(corpus.tokens(split)) for split in corpus.splits)
    assert train.count("<|endoftext|>") == 50 and test == "".join(rows_of(f"wikitext:{tmp_path}/wiki"))


# Errors

INVALID_FILES = {
    "empty": b"",
    "latin": b"good\ncaf\xe9 noir",
    "no.json": b'{"text": "a"}\n\n{"text": \n',
    "list.json": b'["text"]\n',
    "other.json": b'{"text": "a", "article_text": ["b"]}\n{"texts": "a", "article": "b"}\n',
    "numbers.json": b'{"text": 1, "article_text": "b"}\n',
    "mixed.json": b'{"text": null, "article_text": ["a", 1]}\n',
    "half.json": b'{"text": "\\ud800x", "article_text": ["a\\udfff"]}\n',
    "two.csv": b'"1","a","b"\n"2","a"\n',
    "header.csv": b"class,title,description\n1,a,b\n",
    "quotes.csv": b'"1","a","b\n',
    "letters": b"anarchism Originated",
    "lines": b"anarchism originated\n",
    "accents": b"a" * 20 + "é".encode(),
}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wikitext:{}/wiki.none", "no file matches '.*wiki.none'.*; change the pattern after 'wikitext:'"),
        ("wikitext:{}/latin", "latin is not UTF-8: the byte at position 8 is invalid; convert it"),
        *((f"{name}:{{}}/empty", "empty has no rows; leave the file out") for name in BENCHMARKS),
        ("lambada:{}/no.json", "no.json, line 3 is not JSON .*; give a file of JSON lines"),
        ("lambada:{}/list.json", "list.json, line 1 is not a JSON object with fields, but of type list"),
        ("lambada:{}/other.json", "other.json, line 2: no field 'text'; there are texts, article"),
        ("lambada:{}/numbers.json", "numbers.json, line 1: the field 'text' is of type int, not text"),
        ("lambada:{}/mixed.json", "mixed.json, line 1: the field 'text' is of type NoneType, not text"),
        ("lambada:{}/half.json", r"half.json, line 1: the text contains '\\ud800', not a character"),
        ("scientific_papers:{}/other.json", "other.json, line 2: no field 'article_text'; there are article, texts"),
        ("scientific_papers:{}/numbers.json", "line 1: the field 'article_text' is not a list of texts; give a file"),
        ("scientific_papers:{}/mixed.json", "mixed.json, line 1: the field 'article_text' is not a list of texts"),
        ("scientific_papers:{}/half.json", r"half.json, line 1: the text contains '\\udfff', not a character"),
        ("ag_news:{}/two.csv", r"two.csv, line 2: 2 columns, not 3 \(class, title, description\); correct it"),
        ("ag_news:{}/header.csv", "header.csv, line 1: the class 'class' is not a number; remove the row if it is a"),
        ("ag_news:{}/quotes.csv", "quotes.csv, line 1: unexpected end of data; correct the quotes"),
        ("text8:{}/letters", "letters is not text8: the character at position 10 is 'O', not a to z or space"),
        ("text8:{}/lines", r"lines is not text8: the character at position 20 is '\\n', not a to z"),
        ("text8:{}/accents", r"accents is not text8: the character at position 20 is '\\xe9', not a to z"),
        ("text8:{}/l*", "matches 4 files, but text8 is a single file; change the pattern"),
    ],
)
def test_an_invalid_file_gives_a_one_line_error(spec, message, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 7)
    for name, content in INVALID_FILES.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        for _ in data.open_source(spec.format(tmp_path)):
            pass
    assert "\n" not in str(error.value)
