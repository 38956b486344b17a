"""Tokenizers: losslessness, fingerprints, end-of-text ids, pretrained files and errors."""

import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sentencepiece
import tokenizers as huggingface
from small import write_files

from sedd.data import load_tokenizer, make_tokenizer, open_source, prepare
from sedd.data import tokenizer_sentencepiece as sentencepiece_file
from sedd.data.tokenizers import FORMS, pretrained_data
from sedd.errors import UserError

TEXTS = [piece.text for piece in itertools.islice(open_source("builtin:names"), 400)]
HARD = [
    "", " ", "  two  spaces  ", "\n\n\n", "\t\ttabs", "CR\r\nLF", "nul\0nul", "😀 emoji", "漢字 かな", "ﬁ ligature ﬂ",
    "e\u0301 \u00e9", "\ufeff\u00a0\u3000\u2028\x85", "</s> <unk> <0x41>", "<|endoftext|>", "x" * 50,
]  # fmt: skip
SPECS = ["bytes", "characters", "sentencepiece:400"]
END = "<|endoftext|>"


def byte_level(special=(END,)):
    """Returns a Hugging Face tokenizer like GPT-2's, of 300 tokens, the special ones first."""
    tokenizer = huggingface.Tokenizer(huggingface.models.BPE())
    tokenizer.pre_tokenizer = huggingface.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = huggingface.decoders.ByteLevel()
    options = {"special_tokens": list(special), "show_progress": False, "vocab_size": 300}
    options["initial_alphabet"] = huggingface.pre_tokenizers.ByteLevel.alphabet()
    trainer = huggingface.trainers.BpeTrainer(**options)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def write_gpt2(folder, names=("vocab.json", "merges.txt")):
    """Writes the two files of such a tokenizer, the special token last as in GPT-2; returns the merges."""
    about = json.loads(byte_level(special=()).to_str())["model"]
    folder.mkdir(exist_ok=True)
    (folder / names[0]).write_text(json.dumps(about["vocab"] | {END: 300}))
    (folder / names[1]).write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in about["merges"]))
    return about["merges"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The specs of pretrained tokenizers."""
    folder = tmp_path_factory.mktemp("pretrained")
    byte_level().save(str(folder / "tokenizer.json"))
    write_gpt2(folder)
    return {"huggingface": f"huggingface:{folder}/tokenizer.json", "gpt2": f"gpt2:{folder}"}


@pytest.fixture(scope="module", params=itertools.product([*SPECS, "huggingface", "gpt2"], (False, True)), ids=str)
def tokenizer(request, pretrained):
    spec, end_of_text = request.param
    return make_tokenizer(pretrained.get(spec, spec), TEXTS, end_of_text, held_out=HARD)


@pytest.mark.parametrize("text", [*HARD, *TEXTS[:2]])
def test_decoding_inverts_encoding(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert np.all((ids >= 0) & (ids < tokenizer.backend.size))
    assert tokenizer.end_of_text not in ids and tokenizer.backend.end_of_text not in ids
    assert tokenizer.decode(ids) == text


def test_encoding_in_batches_and_threads_gives_the_same_ids(tokenizer):
    texts = [*HARD, *TEXTS]
    expected = [tokenizer.encode(text) for text in texts]
    fresh = type(tokenizer)(tokenizer.kind, type(tokenizer.backend)(tokenizer.backend.data), tokenizer.has_end_of_text)
    with ThreadPoolExecutor(8) as threads:
        for all_ids in threads.map(lambda _: fresh.encode_all(texts), range(10)):
            assert all(ids.dtype == np.int32 for ids in all_ids)
            assert all(map(np.array_equal, all_ids, expected))
    assert tokenizer.encode_all([]) == []


def test_a_long_text_is_encoded_in_parts(tokenizer, monkeypatch):
    text = "".join(TEXTS)
    expected = tokenizer.encode(text)
    calls = []
    encode_all = type(tokenizer.backend).encode_all
    monkeypatch.setattr(
        type(tokenizer.backend), "encode_all", lambda self, one: calls.extend(one) or encode_all(self, one)
    )
    monkeypatch.setattr("sedd.data.source.LONGEST_PIECE", 100)
    ids = tokenizer.encode(text)
    assert "".join(calls) == text and max(map(len, calls)) <= 100 < len(calls)
    assert tokenizer.decode(ids) == text and np.array_equal(ids, expected)  # the cuts are after newlines


@pytest.mark.parametrize("end_of_text", [False, True])
@pytest.mark.parametrize(("spec", "size"), [("bytes", 256), ("characters", 29), ("sentencepiece:400", 400)])
def test_end_of_text_adds_one_id_after_the_last(spec, size, end_of_text):
    tokenizer = make_tokenizer(spec, TEXTS, end_of_text)
    assert tokenizer.vocab_size == size + end_of_text
    assert tokenizer.end_of_text == (size if end_of_text else None)
    if end_of_text:
        ids = [size, *tokenizer.encode("THE CAT"), size, size]
        assert tokenizer.decode(ids) == "<|endoftext|>THE CAT<|endoftext|><|endoftext|>"


def test_a_pretrained_end_of_text_adds_no_id(pretrained):
    for spec, size, end in ((pretrained["huggingface"], 300, 0), (pretrained["gpt2"], 301, 300)):
        with_end, without = (make_tokenizer(spec, [], end_of_text) for end_of_text in (True, False))
        assert (with_end.vocab_size, with_end.end_of_text) == (size, end)
        assert (without.vocab_size, without.end_of_text) == (size, None)
        ids = [end, *with_end.encode("THE CAT"), end]
        assert with_end.decode(ids) == without.decode(ids) == END + "THE CAT" + END


def test_a_pretrained_tokenizer_without_end_of_text_gets_one_more_id(tmp_path):
    byte_level(special=()).save(str(tmp_path / "a.json"))
    tokenizer = make_tokenizer(f"huggingface:{tmp_path}/a.json", [], end_of_text=True)
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (301, 300)
    assert tokenizer.decode([300, *tokenizer.encode("A"), 300]) == END + "A" + END


@pytest.mark.parametrize(
    ("special", "end"),
    [
        (("<eos>", "</s>"), "</s>"),
        (("[SEP]", "<s>", "<eos>"), "<eos>"),
        (("[CLS]", "[SEP]"), "[SEP]"),
        (("<s>",), None),
    ],
)
def test_the_first_known_special_token_ends_a_text(special, end, tmp_path):
    original = byte_level(special)
    original.add_tokens([END])  # not special
    original.save(str(tmp_path / "a.json"))
    backend = make_tokenizer(f"huggingface:{tmp_path}/a.json", [], end_of_text=True).backend
    assert backend.end_of_text == (None if end is None else special.index(end))


def test_a_pretrained_sentencepiece_model_may_have_an_end_of_text(tmp_path):
    with open(tmp_path / "a.model", "wb") as model:
        train = sentencepiece.SentencePieceTrainer.train
        train(sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=100, minloglevel=2)
    tokenizer = make_tokenizer(f"sentencepiece:{tmp_path}/a.model", [], end_of_text=True)
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (100, 2)
    assert 2 not in tokenizer.encode("THE </s> CAT") and tokenizer.decode([2, *tokenizer.encode("A")]) == END + "A"


def test_text_is_never_encoded_as_special_tokens(tmp_path):
    """Even if the model has the token as a word, or the normaliser creates it. Control: the library encodes it so."""
    model = huggingface.models
    scores = [("</s>", 0.0), ("<unk>", 0.0), ("[MASK]", 0.0), *((sign, -3.0) for sign in "<>/s[MASK]ab ")]
    words = {
        token: index for index, token in enumerate(["</s>", "<unk>", "[MASK]", "a", "b", "<", "/s>", "[", "MASK]"])
    }
    models = {"unigram": model.Unigram(scores, unk_id=1), "words": model.WordLevel(words, unk_token="<unk>")}
    for name, original in ((name, huggingface.Tokenizer(one)) for name, one in models.items()):
        original.normalizer = huggingface.normalizers.NFKC()
        if name == "words":
            original.pre_tokenizer = huggingface.pre_tokenizers.WhitespaceSplit()
        original.add_special_tokens(["</s>", "<unk>", "[MASK]"])
        original.save(str(tmp_path / name))
        tokenizer = make_tokenizer(f"huggingface:{tmp_path}/{name}", [], end_of_text=True)
        assert tokenizer.end_of_text == 0
        original.encode_special_tokens = True
        for text in ("a </s> b", "</s>", "a </s> [MASK] </s>", "a ＜/s＞ b", "</s> </s> \n" * 20):
            assert 0 in original.encode(text, add_special_tokens=False).ids
            ids = np.concatenate([tokenizer.encode(text), *tokenizer.encode_all([text, "a"])])
            assert not np.isin(ids, [0, 2]).any() and len(ids) > 3
    original = huggingface.Tokenizer(model.WordLevel({"</s>": 0, "§": 1, "<unk>": 2}, unk_token="<unk>"))
    original.add_special_tokens(["§"])
    original.save(str(tmp_path / "sign"))
    with pytest.raises(UserError, match="encodes the character '§' as a special token; leave it out"):
        make_tokenizer(f"huggingface:{tmp_path}/sign", [], end_of_text=True).encode("§")


def test_truncation_and_padding_of_a_pretrained_tokenizer_are_off(tmp_path):
    original = byte_level()
    original.enable_truncation(3)
    original.enable_padding(length=10)
    original.post_processor = huggingface.processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    original.save(str(tmp_path / "a.json"))
    tokenizer = make_tokenizer(f"huggingface:{tmp_path}/a.json", [], end_of_text=True)
    for text in ("A", "THE QUICK BROWN FOX", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text and 0 not in tokenizer.encode(text)


def test_sampling_of_a_pretrained_tokenizer_is_off(tmp_path):
    """Two corpora of the same text are equal. Control: the library samples."""
    original = byte_level()
    original.model.dropout = 0.5
    original.save(str(tmp_path / "a.json"))
    text = " ".join(TEXTS[:20])
    assert len({tuple(original.encode(text).ids) for _ in range(5)}) == 5
    corpora = [
        prepare(write_files(tmp_path / "text", TEXTS[:60]), f"huggingface:{tmp_path}/a.json", tmp_path / name)
        for name in ("one", "two")
    ]
    assert corpora[0].hash == corpora[1].hash
    original.model.dropout = None
    assert corpora[0].tokenizer.encode(text).tolist() == original.encode(text).ids


@pytest.mark.parametrize("written", [400, 5, 301])
def test_ids_are_those_of_the_library(written, tmp_path):
    """The id of an added token in the file is too large, not the next one, or that of another token."""
    original = byte_level(special=())
    original.add_special_tokens([END, "<s>"])
    about = json.loads(original.to_str())
    about["added_tokens"][0]["id"] = written
    (tmp_path / "a.json").write_text(json.dumps(about))
    spec = f"huggingface:{tmp_path}/a.json"
    end = huggingface.Tokenizer.from_str(json.dumps(about)).token_to_id(END)
    tokenizer = make_tokenizer(spec, [], end_of_text=True)
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (end, 302) and end in (300, 301)
    corpus = prepare(write_files(tmp_path / "text", TEXTS[:60]), spec, tmp_path / "corpus")
    assert [corpus.tokens(split).max() for split in corpus.splits] == [end] * 3
    assert (corpus.tokens("train") == end).sum() == corpus.meta["splits"]["train"]["documents"]


def test_gpt2_files_of_either_name_give_the_same_tokenizer(tmp_path):
    merges = write_gpt2(tmp_path / "a")
    write_gpt2(tmp_path / "b", ("encoder.json", "vocab.bpe"))
    (tmp_path / "b" / "vocab.bpe").write_bytes((tmp_path / "b" / "vocab.bpe").read_bytes().replace(b"\n", b"\r\n"))
    assert pretrained_data(f"gpt2:{tmp_path}/a") == pretrained_data(f"gpt2:{tmp_path}/b")
    tokenizer = make_tokenizer(f"gpt2:{tmp_path}/a", [], end_of_text=True)
    vocab = json.loads((tmp_path / "a" / "vocab.json").read_text())
    assert list(tokenizer.encode("".join(merges[0]).replace("Ġ", " "))) == [vocab["".join(merges[0])]]
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").kind == "huggingface"


def test_decoding_an_id_outside_the_vocabulary_is_an_error(tokenizer):
    for invalid in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match="ids must be from 0"):
            tokenizer.decode([0, invalid])


def test_a_loaded_tokenizer_equals_the_saved_one(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.fingerprint, loaded.end_of_text) == (tokenizer.fingerprint, tokenizer.end_of_text)
    for text in [*HARD, *TEXTS]:
        assert np.array_equal(loaded.encode(text), tokenizer.encode(text))


def test_a_saved_tokenizer_with_a_different_end_of_text_is_refused(tmp_path):
    """For example if a different version of a library reads the file differently."""
    make_tokenizer("bytes", [], end_of_text=True).save(tmp_path)
    about = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(about.replace("256", "5"))
    with pytest.raises(UserError, match="is damaged; prepare the corpus or export the model again"):
        load_tokenizer(tmp_path)


def test_different_tokenizers_have_different_fingerprints():
    specs = [*SPECS, "sentencepiece:350"]
    tokenizers = [make_tokenizer(spec, TEXTS, end_of_text) for spec in specs for end_of_text in (False, True)]
    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == len(tokenizers)
    assert make_tokenizer(SPECS[2], TEXTS, True).fingerprint == tokenizers[5].fingerprint  # training is deterministic


def test_only_characters_depends_on_held_out_text():
    def fingerprints(held_out):
        return [make_tokenizer(spec, TEXTS, True, held_out).fingerprint for spec in SPECS]

    assert [a == b for a, b in zip(fingerprints([]), fingerprints(["zzz"]), strict=True)] == [True, False, True]


def test_sentencepiece_encodes_a_space_that_no_training_text_has():
    tokenizer = make_tokenizer("sentencepiece:264", ["abcabcabcéx\n" * 30], end_of_text=False)
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"


def test_sentencepiece_decodes_its_space_symbol_to_a_space():
    tokenizer = make_tokenizer("sentencepiece:350", TEXTS, end_of_text=False)
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


def test_sentencepiece_has_tokens_for_newlines_and_indentation():
    code = [f"def {name.split()[-1].lower()}():\n        return {index}\n" for index, name in enumerate(TEXTS)]
    tokenizer = make_tokenizer("sentencepiece:350", code, end_of_text=False)
    newlines = tokenizer.encode("\n\n\n")
    assert len(newlines) == 3 and tokenizer.backend._processor.id_to_piece(int(newlines[0])) == "\n"
    assert len(tokenizer.encode("        ")) < 8


def test_a_large_text_is_sampled_up_to_a_number_of_characters():
    """Independent of the position and the length of lines. Control: the first lines have another mean position."""
    cost = sentencepiece_file.LINE_COST
    lines = [str(number) + "x" * (number % 2 * 100) for number in range(10_000)]
    sample = sentencepiece_file._sample(iter(lines), 100_000)
    assert sample == sentencepiece_file._sample(iter(lines), 100_000) and len(set(sample)) == len(sample)
    assert 99_000 < sum(len(line) + cost for line in sample) <= 100_000
    numbers = np.array([int(line.rstrip("x")) for line in sample])
    error = 10_000 / np.sqrt(12 * len(numbers))
    assert abs(numbers.mean() - 5000) < 5 * error < abs(np.arange(len(numbers)).mean() - 5000)
    assert abs((numbers % 2).mean() - 0.5) < 5 * 0.5 / np.sqrt(len(numbers)) and np.all(np.diff(numbers) > 0)
    assert sentencepiece_file._sample(iter(lines), 10**7) == lines


def test_sentencepiece_learns_from_a_sample_of_a_large_text(monkeypatch):
    monkeypatch.setattr(sentencepiece_file, "MAX_TRAINING_TEXT", 20_000)
    sampled = make_tokenizer("sentencepiece:350", TEXTS, end_of_text=False)
    assert sampled.fingerprint == make_tokenizer("sentencepiece:350", TEXTS, end_of_text=False).fingerprint
    monkeypatch.undo()
    assert sampled.fingerprint != make_tokenizer("sentencepiece:350", TEXTS, end_of_text=False).fingerprint


def test_a_pretrained_sentencepiece_model_is_used_unchanged(tmp_path):
    trained = make_tokenizer("sentencepiece:350", TEXTS, end_of_text=True)
    (tmp_path / "my.model").write_bytes(trained.backend.data)
    pretrained = make_tokenizer(f"sentencepiece:{tmp_path / 'my.model'}", [], end_of_text=True)
    assert pretrained.fingerprint == trained.fingerprint


@pytest.fixture
def damaged(tmp_path):
    """A folder of damaged tokenizer files."""
    (tmp_path / "nonsense").write_bytes(b"nonsense\n")
    (tmp_path / "list.json").write_text("[1]")
    for name in ("merge", "pair", "bytes", "json"):
        write_gpt2(tmp_path / name)
    (tmp_path / "merge" / "merges.txt").write_text("#version: 0.2\nZ Z\n")
    (tmp_path / "pair" / "merges.txt").write_text("A\n")
    (tmp_path / "bytes" / "vocab.json").write_text('{"A": 0, "B": 1}')
    (tmp_path / "bytes" / "merges.txt").write_text("")
    (tmp_path / "json" / "vocab.json").write_text('{"A": 0')
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("words", "unknown tokenizer 'words'; write bytes, characters, sentencepiece:SIZE, .*, gpt2:FOLDER$"),
        ("bytes:300", "unknown tokenizer 'bytes:300'"),
        ("sentencepiece", "unknown tokenizer 'sentencepiece'; .*sentencepiece:SIZE, sentencepiece:FILE"),
        ("huggingface:", "unknown tokenizer 'huggingface:'"),
        ("sentencepiece:no/such.model", "there is no tokenizer file 'no/such.model'"),
        ("huggingface:no/such.json", "there is no tokenizer file 'no/such.json'"),
        ("huggingface:{}", "there is no tokenizer file"),
        ("huggingface:{}/nonsense", "nonsense: the tokenizer file is not a tokenizer.json"),
        ("huggingface:{}/list.json", "list.json: the tokenizer file is not a tokenizer.json"),
        ("sentencepiece:{}/nonsense", "nonsense: the tokenizer file is not a SentencePiece model"),
        ("gpt2:{}", "no GPT-2 tokenizer in '.*'; it needs vocab.json and merges.txt or encoder.json and vocab.bpe"),
        ("gpt2:{}/merge", "damaged: vocab.json lacks a token of the merge 'Z Z' in merges.txt"),
        ("gpt2:{}/pair", "damaged: vocab.json lacks a token of the merge 'A' in merges.txt"),
        ("gpt2:{}/bytes", "damaged: vocab.json lacks 254 of the 256 bytes"),
        ("gpt2:{}/json", "the GPT-2 tokenizer in '.*' is damaged: Expecting"),
        ("sentencepiece:8000", r"too large for this text; choose sentencepiece:\d+ or smaller"),
        ("sentencepiece:100", r"too small for this text; choose sentencepiece:\d+ or larger"),
        ("sentencepiece:0", "cannot be trained"),
    ],
)
def test_an_invalid_spec_gives_a_one_line_error(spec, message, damaged):
    with pytest.raises(UserError, match=message) as error:
        make_tokenizer(spec.format(damaged), TEXTS, end_of_text=True)
    assert "\n" not in str(error.value)


def test_pretrained_data_is_the_data_of_the_backend(pretrained, damaged):
    assert [pretrained_data(spec) for spec in SPECS] == [None, None, None] and len(FORMS) == 7
    for spec in pretrained.values():
        assert pretrained_data(spec) == make_tokenizer(spec, [], True).backend.data
    with pytest.raises(UserError, match="not a tokenizer.json"):  # before any text is read
        pretrained_data(f"huggingface:{damaged}/nonsense")


def test_a_missing_package_gives_a_one_line_error(pretrained, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for spec in pretrained.values():
        with pytest.raises(UserError, match=r"needs the package tokenizers: pip install 'sedd\[tokenizers\]'"):
            make_tokenizer(spec, [], end_of_text=True)


@pytest.mark.parametrize(("message", "spec"), [("too large", "sentencepiece:8000"), ("too small", "sentencepiece:100")])
def test_the_size_that_the_error_proposes_is_valid(message, spec):
    with pytest.raises(UserError, match=message) as error:
        make_tokenizer(spec, TEXTS, end_of_text=False)
    proposed = str(error.value).partition("choose ")[2].split()[0]
    assert f"sentencepiece:{make_tokenizer(proposed, TEXTS, end_of_text=False).vocab_size}" == proposed


def test_unknown_characters_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"'é' \(U\+00E9\) is not in the alphabet"):
        make_tokenizer("characters", TEXTS, end_of_text=True).encode("THE é")
    with pytest.raises(UserError, match="there is no tokenizer in"):
        load_tokenizer(tmp_path)
    make_tokenizer("characters", TEXTS, end_of_text=True).save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"abc")
    with pytest.raises(UserError, match="is damaged"):
        load_tokenizer(tmp_path)
