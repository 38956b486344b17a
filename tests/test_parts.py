"""Parts of a text: beside blanks, of long documents and before answers they are encoded as parts of one text."""

import functools
import io
import itertools

import numpy as np
import pytest
import sentencepiece
import tokenizers as library
from small import write_files
from test_protocols import random_model
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from sedd import data, prompts
from sedd.data import source as source_file
from sedd.data import writer
from sedd.data.layout import Layout
from sedd.data.source import Source
from sedd.data.tokenizer_huggingface import HuggingFace
from sedd.data.tokenizer_sentencepiece import SentencePiece
from sedd.data.tokenizers import Ends, Tokenizer, make_tokenizer
from sedd.diffusion.process import Absorbing
from sedd.evaluation.conditional import answers_to
from sedd.evaluation.text import from_source

NAMES = [piece.text.lower() for piece in itertools.islice(data.open_source("builtin:names"), 200)]
WORDS = sorted({word for name in NAMES for word in name.split() if word.isalpha()})
INSIDE = Ends(False, False)


def of_sentencepiece(**options):
    """A given model: by default it puts a space before a text, and drops spaces at its ends and runs of them."""
    train, model = sentencepiece.SentencePieceTrainer.train, io.BytesIO()
    train(sentence_iterator=iter(NAMES), model_writer=model, minloglevel=2, **{"vocab_size": 120, **options})
    return SentencePiece(model.getvalue())


def of_library(model, trainer, before=None, normalizer=None, decoder=None):
    made = library.Tokenizer(model)
    for name, step in (("pre_tokenizer", before), ("normalizer", normalizer), ("decoder", decoder)):
        if step is not None:
            setattr(made, name, step)
    made.train_from_iterator(NAMES, trainer)
    return HuggingFace(made.to_str().encode())


def metaspace(scheme):
    bpe = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], show_progress=False)
    space = dict(prepend_scheme=scheme)
    return of_library(
        models.BPE(unk_token="<unk>"), bpe, pre_tokenizers.Metaspace(**space), decoder=decoders.Metaspace(**space)
    )


def llama():
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return of_library(
        models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True),
        trainers.BpeTrainer(vocab_size=350, special_tokens=special, show_progress=False),
        pre_tokenizers.Split("\u2581", "merged_with_next"),
        normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
        decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    )


def t5():
    options = dict(vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False)
    spaces = [normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(library.Regex(" {2,}"), " ")]
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    return of_library(
        models.Unigram(),
        trainers.UnigramTrainer(**options),
        pre_tokenizers.Sequence(words),
        normalizers.Sequence(spaces),
        decoders.Metaspace(),
    )


def bert():
    options = dict(vocab_size=150, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    words = pre_tokenizers.BertPreTokenizer()
    return of_library(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(**options),
        words,
        normalizers.BertNormalizer(),
        decoders.WordPiece(),
    )


def word_ends():
    options = dict(vocab_size=150, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False)
    model, words = models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"), pre_tokenizers.WhitespaceSplit()
    return of_library(model, trainers.BpeTrainer(**options), words, decoder=decoders.BPEDecoder("</w>"))


def of_bytes(prefix=False, normalizer=None):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = dict(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False)
    before = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    return of_library(models.BPE(), trainers.BpeTrainer(**options), before, normalizer, decoders.ByteLevel())


KINDS = {
    "sentencepiece": of_sentencepiece,
    "identity": lambda: of_sentencepiece(
        vocab_size=380, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False
    ),
    "sentencepiece bpe": lambda: of_sentencepiece(model_type="bpe"),
    "no prefix": lambda: of_sentencepiece(add_dummy_prefix=False),
    "newlines": lambda: of_sentencepiece(user_defined_symbols=["\n"]),
    "space behind": lambda: of_sentencepiece(treat_whitespace_as_suffix=True),
    "first": lambda: metaspace("first"),
    "always": lambda: metaspace("always"),
    "llama": llama,
    "t5": t5,
    "bert": bert,
    "word ends": word_ends,
    "bytes with a space": lambda: of_bytes(prefix=True),
    "stripped bytes": lambda: of_bytes(normalizer=normalizers.Strip()),
    "bytes": of_bytes,
}
SPACE = {"bert": -1, "word ends": 0}  # no piece is a space, which is lost where it is cut off its word: at this side


@functools.cache
def made(kind):
    pieces = KINDS[kind]()
    return Tokenizer("sentencepiece" if isinstance(pieces, SentencePiece) else "huggingface", pieces, True)


def shown(kind, text):
    """A text as it reads after a round trip: with a space at one end, where the tokenizer has it so."""
    before, after = {"space behind": ("", " "), "bytes with a space": (" ", "")}.get(kind, ("", ""))
    return before + text + after


@pytest.mark.parametrize("kind", KINDS)
def test_parts_read_as_the_whole(kind):
    """Wherever it is cut. Control: each encoded as a text of its own, by a tokenizer that has rules for the ends."""
    tokenizer, random = made(kind), np.random.default_rng(0)
    wrong = 0
    for _ in range(30):
        text = " ".join(random.choice(WORDS, 4))
        places = [at for at in range(1, len(text)) if kind not in SPACE or text[at + SPACE[kind]] != " "]
        cuts = [0, *np.sort(random.choice(places, 2, replace=False)).tolist(), len(text)]
        parts = [text[start:stop] for start, stop in itertools.pairwise(cuts)]
        ends = [Ends(closes=False), INSIDE, Ends(opens=False)]
        ids = np.concatenate([tokenizer.encode(part, end) for part, end in zip(parts, ends, strict=True)])
        assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode(text)) == shown(kind, text)
        wrong += tokenizer.decode(np.concatenate([tokenizer.encode(part) for part in parts])) != shown(kind, text)
    assert (wrong > 0) == tokenizer.backend.marks_ends == (kind != "bytes")
    assert tokenizer.encode("", INSIDE).size == tokenizer.encode("", Ends(closes=False)).size == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_reads_as_it_was_typed(kind):
    """Its halves of words are no words, and a space beside a blank is left to it where words carry theirs."""
    tokenizer = made(kind)
    row = prompts.of_template("latin sm<blank:1>all with <blank:2> acute", tokenizer)
    assert np.diff(np.flatnonzero(~row.given))[-1] == 1 and (~row.given).sum() == 3
    read = tokenizer.decode(row.tokens[row.given])
    assert read == shown(kind, "latin small with acute")  # one of the two spaces is a blank's
    row = prompts.of_template("<blank:1>able", tokenizer)
    assert row.given.tolist() == [False] + [True] * (len(row.tokens) - 1)
    assert np.array_equal(row.tokens[1:], tokenizer.encode("able", Ends(opens=False)))
    ids = np.concatenate([tokenizer.encode("un", Ends(closes=False)), row.tokens[1:]])
    assert tokenizer.decode(ids) == shown(kind, "unable")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("first", "always", "llama")])
def test_a_long_text_in_parts_has_the_ids_of_the_whole(kind, monkeypatch):
    """Cut behind newlines and before spaces. The tokenizers left out have pieces across the cuts."""
    text = "\n".join(NAMES[:40]) + "\n\n  " + " ".join(WORDS) + " "
    whole = made(kind).encode(text)
    monkeypatch.setattr(source_file, "LONGEST_PIECE", 100)
    assert len(list(source_file.pieces(text))) > 10
    assert np.array_equal(made(kind).encode(text), whole)


@pytest.mark.parametrize("kind", ["identity", "llama"])
def test_a_long_document_is_one_text(kind, tmp_path, monkeypatch):
    """In a corpus, and in a source that is scored. Each document begins anew."""
    for file in (source_file, writer):
        monkeypatch.setattr(file, "LONGEST_PIECE", 100)
    texts = [" ".join(np.roll(WORDS, shift)) + "\n" for shift in range(3)]
    wanted = "".join(text + "<|endoftext|>" for text in texts)
    scored = from_source(Source("texts", None, lambda: iter(texts)), made(kind), 50, Layout())
    assert made(kind).decode(scored.tokens.ravel()[: scored.counts.sum()]) == wanted
    (tmp_path / "tokenizer").write_bytes(made(kind).backend.data)
    spec, source = f"{made(kind).kind}:{tmp_path}/tokenizer", write_files(tmp_path / "text", texts)
    corpus = data.prepare(source, spec, tmp_path / "corpus", split="position:98,1,1")
    assert "".join(corpus.tokenizer.decode(corpus.tokens(split)) for split in corpus.splits) == wanted


def test_what_is_made_here_has_no_ends():
    """Its ids, and those of GPT-2, are the same beside a blank as at the beginning of a text."""
    for spec in ("bytes", "characters", "sentencepiece:300"):
        tokenizer = make_tokenizer(spec, NAMES, True)
        assert not getattr(tokenizer.backend, "marks_ends", False)
        assert np.array_equal(tokenizer.encode(" letter ", INSIDE), tokenizer.encode(" letter "))


def test_infilling_keeps_halves_of_a_word():
    """By the default settings of SentencePiece, with a template as with prefix and suffix."""
    tokenizer = made("sentencepiece")
    given = [*tokenizer.encode("la"), *tokenizer.encode("in", Ends(opens=False))]
    assert tokenizer.decode(np.array(given)) == "lain"
    row = prompts.between("la", "in", 6, tokenizer)
    assert row.tokens[row.given].tolist() == given and len(row.tokens) == 6
    drawn = random_model(tokenizer=tokenizer).infill("la<blank:2>in", steps=2)
    assert drawn.tokens[0][drawn.given[0]].tolist() == given
    assert drawn.texts[0].startswith("la") and drawn.texts[0].endswith("in")


@pytest.mark.parametrize("kind", ["word ends", "space behind"])
def test_what_is_given_before_an_answer_does_not_end_there(kind):
    """Else its last token would be another, and counted to the answer."""
    tokenizer, found = made(kind), 0
    for word in WORDS:
        given, ids = tokenizer.encode(f"a {word[:2]}", Ends(closes=False)), tokenizer.encode(f"a {word}")
        if len(word) < 3 or not np.array_equal(given, ids[: len(given)]):
            continue  # a piece holds what is on both sides
        answers = answers_to(f"a {word[:2]}", [word[2:]], tokenizer, Absorbing(tokenizer.vocab_size), 20, Layout())
        assert np.flatnonzero(answers.free[0]).tolist() == list(range(len(given), len(ids)))
        found += 1
    assert found > 5


def test_a_special_token_is_spelt_as_a_part():
    """Where the model itself finds one, the text is cut, and nothing is put at the cuts."""
    signs = [("</s>", 0.0), ("<unk>", 0.0), *((sign, -3.0) for sign in "<>/s\u2581ab")]
    made = library.Tokenizer(models.Unigram(signs, unk_id=1))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["</s>", "<unk>"])
    tokenizer = Tokenizer("huggingface", HuggingFace(made.to_str().encode()), True)
    for text in ("a</s>b", "</s>", "a </s></s> b"):
        ids = tokenizer.encode(text)
        assert 0 not in ids and tokenizer.decode(ids) == text
