"""Encoding of parts of a text: around blanks, of long documents and before answers."""

import functools
import io
import itertools

import numpy as np
import pytest
import sentencepiece
import tokenizers as library
from small import without_network, write_files
from test_protocols import random_model
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from sedd import data
from sedd.data import source as source_file
from sedd.data import writer
from sedd.data.source import Source
from sedd.data.tokenizer_huggingface import HuggingFace
from sedd.data.tokenizer_sentencepiece import SentencePiece
from sedd.data.tokenizers import Ends, Tokenizer, make_tokenizer
from sedd.diffusion.discrete.process import Absorbing
from sedd.evaluation.answers import answers_to
from sedd.evaluation.text import from_source
from sedd.generation import prompts

NAMES = [piece.text.lower() for piece in itertools.islice(data.open_source("builtin:names"), 200)]
WORDS = sorted({word for name in NAMES for word in name.split() if word.isalpha()})
INSIDE = Ends(False, False)


def sentencepiece_backend(**options):
    """Returns a model; by default it puts a space before a text, drops spaces at its ends and merges others."""
    train, model = sentencepiece.SentencePieceTrainer.train, io.BytesIO()
    train(sentence_iterator=iter(NAMES), model_writer=model, minloglevel=2, **{"vocab_size": 120, **options})
    return SentencePiece(model.getvalue())


def huggingface_backend(model, trainer, before=None, normalizer=None, decoder=None):
    tokenizer = library.Tokenizer(model)
    for name, step in (("pre_tokenizer", before), ("normalizer", normalizer), ("decoder", decoder)):
        if step is not None:
            setattr(tokenizer, name, step)
    tokenizer.train_from_iterator(NAMES, trainer)
    return HuggingFace(tokenizer.to_str().encode())


def metaspace(scheme):
    bpe = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], show_progress=False)
    space = dict(prepend_scheme=scheme)
    return huggingface_backend(
        models.BPE(unk_token="<unk>"), bpe, pre_tokenizers.Metaspace(**space), decoder=decoders.Metaspace(**space)
    )


def llama():
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return huggingface_backend(
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
    return huggingface_backend(
        models.Unigram(),
        trainers.UnigramTrainer(**options),
        pre_tokenizers.Sequence(words),
        normalizers.Sequence(spaces),
        decoders.Metaspace(),
    )


def bert():
    options = dict(vocab_size=150, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    words = pre_tokenizers.BertPreTokenizer()
    return huggingface_backend(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(**options),
        words,
        normalizers.BertNormalizer(),
        decoders.WordPiece(),
    )


def word_ends():
    options = dict(vocab_size=150, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False)
    model, words = models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"), pre_tokenizers.WhitespaceSplit()
    return huggingface_backend(model, trainers.BpeTrainer(**options), words, decoder=decoders.BPEDecoder("</w>"))


def byte_level(prefix=False, normalizer=None):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = dict(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False)
    before = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    return huggingface_backend(models.BPE(), trainers.BpeTrainer(**options), before, normalizer, decoders.ByteLevel())


KINDS = {
    "sentencepiece": sentencepiece_backend,
    "identity": lambda: sentencepiece_backend(
        vocab_size=380, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False
    ),
    "sentencepiece bpe": lambda: sentencepiece_backend(model_type="bpe"),
    "no prefix": lambda: sentencepiece_backend(add_dummy_prefix=False),
    "newlines": lambda: sentencepiece_backend(user_defined_symbols=["\n"]),
    "space behind": lambda: sentencepiece_backend(treat_whitespace_as_suffix=True),
    "first": lambda: metaspace("first"),
    "always": lambda: metaspace("always"),
    "llama": llama,
    "t5": t5,
    "bert": bert,
    "word ends": word_ends,
    "bytes with a space": lambda: byte_level(prefix=True),
    "stripped bytes": lambda: byte_level(normalizer=normalizers.Strip()),
    "bytes": byte_level,
}
# These have no token for a space, which is lost if it is cut off its word: before it (-1) or after it (0).
SPACE = {"bert": -1, "word ends": 0}


@functools.cache
def tokenizer_of(kind):
    backend = KINDS[kind]()
    return Tokenizer("sentencepiece" if isinstance(backend, SentencePiece) else "huggingface", backend, True)


def round_trip(kind, text):
    """Returns the decoded ids of a text: some tokenizers add a space at one end."""
    before, after = {"space behind": ("", " "), "bytes with a space": (" ", "")}.get(kind, ("", ""))
    return before + text + after


@pytest.mark.parametrize("kind", KINDS)
def test_parts_decode_to_the_text(kind):
    """For random cuts. Control: parts encoded as separate texts do not, if there are rules for the ends of a text."""
    tokenizer, random = tokenizer_of(kind), np.random.default_rng(0)
    wrong = 0
    for _ in range(30):
        text = " ".join(random.choice(WORDS, 4))
        allowed = [at for at in range(1, len(text)) if kind not in SPACE or text[at + SPACE[kind]] != " "]
        cuts = [0, *np.sort(random.choice(allowed, 2, replace=False)).tolist(), len(text)]
        parts = [text[start:stop] for start, stop in itertools.pairwise(cuts)]
        ends = [Ends(closes=False), INSIDE, Ends(opens=False)]
        ids = np.concatenate([tokenizer.encode(part, end) for part, end in zip(parts, ends, strict=True)])
        assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode(text)) == round_trip(kind, text)
        wrong += tokenizer.decode(np.concatenate([tokenizer.encode(part) for part in parts])) != round_trip(kind, text)
    assert (wrong > 0) == tokenizer.backend.marks_ends == (kind != "bytes")
    assert tokenizer.encode("", INSIDE).size == tokenizer.encode("", Ends(closes=False)).size == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_decodes_to_its_text(kind):
    """Parts of words are not encoded as words, and a space next to a blank is left to it if tokens include spaces."""
    tokenizer = tokenizer_of(kind)
    row = prompts.of_template("latin sm<blank:1>all with <blank:2> acute", tokenizer)
    assert np.diff(np.flatnonzero(row.free))[-1] == 1 and row.free.sum() == 3
    decoded = tokenizer.decode(row.tokens[~row.free])
    assert decoded == round_trip(kind, "latin small with acute")  # one of the two spaces is left to a blank
    row = prompts.of_template("<blank:1>able", tokenizer)
    assert row.free.tolist() == [True] + [False] * (len(row.tokens) - 1)
    assert np.array_equal(row.tokens[1:], tokenizer.encode("able", Ends(opens=False)))
    ids = np.concatenate([tokenizer.encode("un", Ends(closes=False)), row.tokens[1:]])
    assert tokenizer.decode(ids) == round_trip(kind, "unable")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("first", "always", "llama")])
def test_a_long_text_has_the_same_ids_when_encoded_in_parts(kind, monkeypatch):
    """The cuts are after newlines and before spaces. The excluded tokenizers have tokens across the cuts."""
    text = "\n".join(NAMES[:40]) + "\n\n  " + " ".join(WORDS) + " "
    expected = tokenizer_of(kind).encode(text)
    monkeypatch.setattr(source_file, "LONGEST_PIECE", 100)
    assert len(list(source_file.split_document(text))) > 10
    assert np.array_equal(tokenizer_of(kind).encode(text), expected)


@pytest.mark.parametrize("kind", ["identity", "llama"])
def test_the_pieces_of_a_long_document_are_encoded_as_one_text(kind, tmp_path, monkeypatch):
    """In a corpus, and in a source that is scored; each document is a separate text."""
    for file in (source_file, writer):
        monkeypatch.setattr(file, "LONGEST_PIECE", 100)
    texts = [" ".join(np.roll(WORDS, shift)) + "\n" for shift in range(3)]
    expected = "".join(text + "<|endoftext|>" for text in texts)
    scored = from_source(Source("texts", None, lambda: iter(texts)), without_network(tokenizer_of(kind), None, 50))
    assert tokenizer_of(kind).decode(scored.tokens.ravel()[: scored.counts.sum()]) == expected
    (tmp_path / "tokenizer").write_bytes(tokenizer_of(kind).backend.data)
    spec, source = f"{tokenizer_of(kind).kind}:{tmp_path}/tokenizer", write_files(tmp_path / "text", texts)
    corpus = data.prepare(source, spec, tmp_path / "corpus", split="position:98,1,1")
    assert "".join(corpus.tokenizer.decode(corpus.tokens(split)) for split in corpus.splits) == expected


def test_trained_tokenizers_have_no_rules_for_the_ends_of_a_text():
    """The ids are the same next to a blank and at the beginning of a text."""
    for spec in ("bytes", "characters", "sentencepiece:300"):
        tokenizer = make_tokenizer(spec, NAMES, True)
        assert not getattr(tokenizer.backend, "marks_ends", False)
        assert np.array_equal(tokenizer.encode(" letter ", INSIDE), tokenizer.encode(" letter "))


def test_infilling_keeps_the_given_parts_of_a_word():
    """With the default settings of SentencePiece, for a template and for prefix and suffix."""
    tokenizer = tokenizer_of("sentencepiece")
    given = [*tokenizer.encode("la"), *tokenizer.encode("in", Ends(opens=False))]
    assert tokenizer.decode(np.array(given)) == "lain"
    row = prompts.between("la", "in", 6, tokenizer)
    assert row.tokens[~row.free].tolist() == given and len(row.tokens) == 6
    samples = random_model(tokenizer=tokenizer).infill("la<blank:2>in", steps=2)
    assert samples.tokens[0][samples.given[0]].tolist() == given
    assert samples.texts[0].startswith("la") and samples.texts[0].endswith("in")


@pytest.mark.parametrize("kind", ["word ends", "space behind"])
def test_a_context_before_an_answer_is_not_encoded_as_the_end_of_a_text(kind):
    """Otherwise its last token would differ, and count as part of the answer."""
    tokenizer, num_words = tokenizer_of(kind), 0
    for word in WORDS:
        given, ids = tokenizer.encode(f"a {word[:2]}", Ends(closes=False)), tokenizer.encode(f"a {word}")
        if len(word) < 3 or not np.array_equal(given, ids[: len(given)]):
            continue  # a token spans the boundary
        answers = answers_to(
            f"a {word[:2]}", [word[2:]], without_network(tokenizer, Absorbing(tokenizer.vocab_size), 20)
        )
        assert np.flatnonzero(answers.free[0]).tolist() == list(range(len(given), len(ids)))
        num_words += 1
    assert num_words > 5


def test_a_special_token_in_a_text_is_encoded_as_text():
    """If the model itself encodes a special token, the text is cut, and no space is added at the cuts."""
    scores = [("</s>", 0.0), ("<unk>", 0.0), *((sign, -3.0) for sign in "<>/s\u2581ab")]
    unigram = library.Tokenizer(models.Unigram(scores, unk_id=1))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    unigram.decoder = decoders.Metaspace()
    unigram.add_special_tokens(["</s>", "<unk>"])
    tokenizer = Tokenizer("huggingface", HuggingFace(unigram.to_str().encode()), True)
    for text in ("a</s>b", "</s>", "a </s></s> b"):
        ids = tokenizer.encode(text)
        assert 0 not in ids and tokenizer.decode(ids) == text
