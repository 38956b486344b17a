"""Tokenizers: what they lose (nothing), what determines them, and the id that ends a text."""

import numpy as np
import pytest

from sedd.data import load_tokenizer, make_tokenizer, open_source
from sedd.data import tokenizer_sentencepiece as sentencepiece_file
from sedd.errors import UserError

TEXTS = [name + "\n" for name in list(open_source("builtin:names"))[:400]]
HARD = [
    "", " ", "  two  spaces  ", "\n\n\n", "\t\ttabs", "CR\r\nLF", "nul\0nul", "😀 emoji", "漢字 かな", "ﬁ ligature ﬂ",
    "e\u0301 \u00e9", "\ufeff\u00a0\u3000\u2028\x85", "</s> <unk> <0x41>", "<|endoftext|>", "x" * 50,
]  # fmt: skip
SPECS = ["bytes", "characters", "sentencepiece:400"]


@pytest.fixture(scope="module", params=[(spec, ends) for spec in SPECS for ends in (False, True)], ids=str)
def tokenizer(request):
    spec, end_of_text = request.param
    return make_tokenizer(spec, TEXTS, end_of_text, held_out=HARD)


@pytest.mark.parametrize("text", [*HARD, *TEXTS[:2]])
def test_nothing_is_lost(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert np.all((ids >= 0) & (ids < tokenizer.pieces.size))  # never the end-of-text id
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("end_of_text", [False, True])
@pytest.mark.parametrize(("spec", "size"), [("bytes", 256), ("characters", 29), ("sentencepiece:400", 400)])
def test_end_of_text_is_one_more_id_and_the_last(spec, size, end_of_text):
    tokenizer = make_tokenizer(spec, TEXTS, end_of_text)
    assert tokenizer.vocab_size == size + end_of_text
    assert tokenizer.end_of_text == (size if end_of_text else None)
    if end_of_text:
        ids = [size, *tokenizer.encode("THE CAT"), size, size]
        assert tokenizer.decode(ids) == "<|endoftext|>THE CAT<|endoftext|><|endoftext|>"


def test_an_id_outside_the_vocabulary_is_refused(tokenizer):
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match="ids must be from 0"):
            tokenizer.decode([0, wrong])


def test_a_saved_tokenizer_comes_back(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.fingerprint, loaded.end_of_text) == (tokenizer.fingerprint, tokenizer.end_of_text)
    for text in [*HARD, *TEXTS]:
        assert np.array_equal(loaded.encode(text), tokenizer.encode(text))


def test_the_fingerprint_tells_tokenizers_apart():
    made = [make_tokenizer(spec, TEXTS, ends) for spec in [*SPECS, "sentencepiece:350"] for ends in (False, True)]
    assert len({tokenizer.fingerprint for tokenizer in made}) == len(made)
    assert make_tokenizer(SPECS[2], TEXTS, True).fingerprint == made[5].fingerprint  # trained again, the same


def test_only_an_alphabet_learns_from_held_out_text():
    def fingerprints(held_out):
        return [make_tokenizer(spec, TEXTS, True, held_out).fingerprint for spec in SPECS]

    assert [a == b for a, b in zip(fingerprints([]), fingerprints(["zzz"]), strict=True)] == [True, False, True]


def test_sentencepiece_where_no_text_has_a_space():
    tokenizer = make_tokenizer("sentencepiece:264", ["abcabcabcéx\n" * 30], end_of_text=False)
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"


def test_sentencepiece_knows_one_sign_as_a_space():
    tokenizer = make_tokenizer("sentencepiece:350", TEXTS, end_of_text=False)
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


def test_sentencepiece_has_pieces_for_newlines_and_indentation():
    code = [f"def {name.split()[-1].lower()}():\n        return {index}\n" for index, name in enumerate(TEXTS)]
    tokenizer = make_tokenizer("sentencepiece:350", code, end_of_text=False)
    newlines = tokenizer.encode("\n\n\n")
    assert len(newlines) == 3 and tokenizer.pieces._processor.id_to_piece(int(newlines[0])) == "\n"
    assert len(tokenizer.encode("        ")) < 8


def test_sentencepiece_takes_long_texts_and_many_lines_in_parts(monkeypatch):
    tokenizer = make_tokenizer("sentencepiece:350", TEXTS, end_of_text=False)
    monkeypatch.setattr(sentencepiece_file, "LONGEST_TEXT", 7)
    assert tokenizer.decode(tokenizer.encode("".join(TEXTS))) == "".join(TEXTS)
    lines = [str(number) for number in range(1000)]
    sample = sentencepiece_file._sample(lines, 100)
    assert len(set(sample)) == 100 and sample == sentencepiece_file._sample(lines, 100)
    assert 350 < np.mean([int(line) for line in sample]) < 650  # five standard errors about the middle


def test_a_given_sentencepiece_model_is_used_as_it_is(tmp_path):
    made = make_tokenizer("sentencepiece:350", TEXTS, end_of_text=True)
    (tmp_path / "my.model").write_bytes(made.pieces.data)
    given = make_tokenizer(f"sentencepiece:{tmp_path / 'my.model'}", [], end_of_text=True)
    assert given.fingerprint == made.fingerprint


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("words", "unknown tokenizer 'words'; write bytes, characters, sentencepiece:SIZE"),
        ("bytes:300", "unknown tokenizer 'bytes:300'"),
        ("sentencepiece", "sentencepiece:SIZE or sentencepiece:FILE"),
        ("sentencepiece:no/such.model", "there is no tokenizer file 'no/such.model'"),
        ("sentencepiece:8000", r"too large for this text; choose sentencepiece:\d+ or smaller"),
        ("sentencepiece:100", r"too small for this text; choose sentencepiece:\d+ or larger"),
        ("sentencepiece:0", "cannot be trained"),
    ],
)
def test_a_wrong_spec_is_one_clear_line(spec, message):
    with pytest.raises(UserError, match=message) as error:
        make_tokenizer(spec, TEXTS, end_of_text=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("word", "size"), [("too large", -1), ("too small", +1)])
def test_the_size_that_the_error_proposes_is_good(word, size):
    with pytest.raises(UserError, match=word) as error:
        make_tokenizer("sentencepiece:8000" if size < 0 else "sentencepiece:100", TEXTS, end_of_text=False)
    proposed = str(error.value).partition("choose ")[2].split()[0]
    assert f"sentencepiece:{make_tokenizer(proposed, TEXTS, end_of_text=False).vocab_size}" == proposed


def test_other_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"'é' \(U\+00E9\) is not in the alphabet"):
        make_tokenizer("characters", TEXTS, end_of_text=True).encode("THE é")
    (tmp_path / "my.model").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="no SentencePiece model"):
        make_tokenizer(f"sentencepiece:{tmp_path / 'my.model'}", [], end_of_text=True).encode("a")
    with pytest.raises(UserError, match="there is no tokenizer in"):
        load_tokenizer(tmp_path)
    make_tokenizer("characters", TEXTS, end_of_text=True).save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"abc")
    with pytest.raises(UserError, match="is damaged"):
        load_tokenizer(tmp_path)
