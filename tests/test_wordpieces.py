"""`wordpieces:FILE`: the pieces of a pretrained WordPiece tokenizer that the training texts use."""

import hashlib
import itertools
import json

import pytest
import tokenizers as huggingface
from small import write_files

from sedd.data import load_tokenizer, make_tokenizer, open_source, prepare
from sedd.data import tokenizer_wordpieces as wordpieces_file
from sedd.data.tokenizer_huggingface import HuggingFace
from sedd.data.tokenizers import pretrained_data, pretrained_tokenizer
from sedd.errors import UserError

NAMES = [piece.text for piece in itertools.islice(open_source("builtin:names"), 600)]
TEXTS = [*NAMES[:200:2], "漢字, na\u00efve ☃", "x" * 101, "[SEP] <blank>", ""]  # with unknown words, and an added token
OTHERS = [*NAMES[200:], "qzjx", "字漢", "[CLS] is text", "unaffable"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A tokenizer.json like BERT's, with a vocabulary trained on all names; its special tokens are not the first."""
    trained = huggingface.Tokenizer(huggingface.models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = huggingface.normalizers.BertNormalizer(lowercase=True)
    trained.pre_tokenizer = huggingface.pre_tokenizers.BertPreTokenizer()
    trained.decoder = huggingface.decoders.WordPiece()
    alphabet = ["漢", "字", *"abcdefghijklmnopqrstuvwxyz"]
    options = {"vocab_size": 600, "initial_alphabet": alphabet, "show_progress": False}
    trained.train_from_iterator(NAMES, huggingface.trainers.WordPieceTrainer(**options))
    rules = json.loads(trained.to_str())
    pieces = [*rules["model"]["vocab"], *(f"##{letter}" for letter in alphabet)]
    order = dict.fromkeys([*pieces[:300], *SPECIAL, *pieces[300:]])
    rules["model"]["vocab"] = {piece: number for number, piece in enumerate(order)}
    tokenizer = huggingface.Tokenizer.from_str(json.dumps(rules))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(["<blank>", "<unused>"])  # outside of the model's vocabulary
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = huggingface.processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.enable_padding(length=8, pad_id=tokenizer.token_to_id("[PAD]"))
    tokenizer.enable_truncation(8)
    path = tmp_path_factory.mktemp("wordpieces") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def vocabulary(backend):
    """The text of each id."""
    pieces = {number: piece for piece, number in backend.vocabulary.items()}
    assert sorted(pieces) == list(range(backend.size))
    return [pieces[number] for number in range(backend.size)]


def pieces_of(backend, texts):
    """The texts of the pieces of each text."""
    pieces = vocabulary(backend)
    return [[pieces[number] for number in ids] for ids in backend.encode_all(texts)]


@pytest.fixture(scope="module")
def backends(file):
    """The whole and the pruned backend."""
    whole = make_tokenizer(f"huggingface:{file}", [], end_of_text=True)
    pruned = make_tokenizer(f"wordpieces:{file}", TEXTS, end_of_text=True, held_out=OTHERS)
    return whole.backend, pruned.backend


def test_training_texts_have_the_same_pieces(backends):
    whole, pruned = backends
    expected = pieces_of(whole, TEXTS)
    assert pieces_of(pruned, TEXTS) == expected
    assert {"[UNK]", "<blank>"} <= set().union(*expected)
    assert pieces_of(pruned, OTHERS) != pieces_of(whole, OTHERS)


def test_without_any_used_piece_the_pieces_differ(backends):
    """Control: the encoding depends on each piece that is kept for the texts."""
    rules, expected = backends[1].rules, pieces_of(backends[1], TEXTS)
    used = set().union(*expected) - {"[UNK]", "<blank>"}
    assert len(used) > 50
    for piece in used:
        fewer = wordpieces_file._with_pieces(rules, backends[1].vocabulary.keys() - {piece})
        assert pieces_of(HuggingFace(json.dumps(fewer).encode()), TEXTS) != expected


def test_used_pieces_characters_and_added_tokens_are_kept_in_order(backends):
    whole, pruned = map(vocabulary, backends)
    used = set().union(*pieces_of(backends[0], TEXTS))
    characters = {piece for piece in whole if len(piece.removeprefix("##")) == 1}
    kept = used | characters | {*SPECIAL, "<blank>", "<unused>"}
    assert {"漢", "##q"} <= characters
    assert pruned == [piece for piece in whole if piece in kept] and len(pruned) < len(whole) / 2


def test_all_else_is_that_of_the_whole_tokenizer(backends):
    whole, pruned = backends
    assert vocabulary(pruned)[pruned.end_of_text] == "[SEP]" and pruned.end_of_text != whole.end_of_text
    before, after = whole.rules, pruned.rules
    assert after["post_processor"] is None and before["post_processor"]
    for name in before.keys() - {"model", "added_tokens", "post_processor"}:
        assert after[name] == before[name]


def test_other_texts_have_no_more_unknown_words(backends):
    """Control: without the characters that the training texts do not use, they have more."""
    whole, pruned = ([backend.decode(ids) for ids in backend.encode_all(OTHERS)] for backend in backends)
    assert pruned == whole
    used = set().union(*pieces_of(backends[0], TEXTS), SPECIAL, ["<blank>", "<unused>"])
    fewer = HuggingFace(json.dumps(wordpieces_file._with_pieces(backends[0].rules, used)).encode())
    unknown = [sum(pieces.count("[UNK]") for pieces in pieces_of(one, OTHERS)) for one in (*backends, fewer)]
    assert 0 < unknown[0] == unknown[1] < unknown[2]


def test_the_pruned_tokenizer_depends_on_the_training_texts_only(file, monkeypatch):
    def data(texts, held_out=()):
        return make_tokenizer(f"wordpieces:{file}", iter(texts), True, iter(held_out)).backend.data

    expected = data(TEXTS)
    assert data(TEXTS, held_out=OTHERS) == data(TEXTS[::-1]) == expected != data(OTHERS)
    monkeypatch.setattr(wordpieces_file, "BATCH", 20)
    assert data(TEXTS) == expected
    assert wordpieces_file.prune_wordpieces(expected, TEXTS) == expected


def test_a_corpus_has_the_pruned_tokenizer(file, tmp_path):
    texts = {"train": NAMES[:100], "test": NAMES[100:120]}
    source = {split: write_files(tmp_path / split, texts) for split, texts in texts.items()}
    options = {"mode": "padded", "padding": "scored"}
    corpus = prepare(source, f"wordpieces:{file}", tmp_path / "corpus", **options)
    assert prepare(source, f"wordpieces:{file}", tmp_path / "corpus", **options).meta == corpus.meta
    assert corpus.meta["model_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    saved = load_tokenizer(tmp_path / "corpus" / "tokenizer")
    assert saved == make_tokenizer(f"wordpieces:{file}", NAMES[:100], end_of_text=True)
    assert saved.kind == "huggingface" and saved.vocab_size == corpus.meta["vocab_size"] < 400


def test_a_file_of_another_model_gives_a_one_line_error(file, tmp_path):
    huggingface.Tokenizer(huggingface.models.BPE()).save(str(tmp_path / "bpe.json"))
    for spec, message in (
        (f"wordpieces:{tmp_path}/bpe.json", "bpe.json: the model is BPE, not WordPiece; write huggingface:FILE$"),
        ("wordpieces:no/such.json", "there is no tokenizer file 'no/such.json'"),
        ("wordpieces", "unknown tokenizer 'wordpieces'; write .*wordpieces:FILE"),
    ):
        with pytest.raises(UserError, match=message):
            pretrained_data(spec)  # before any text is read
    with pytest.raises(UserError, match="is trained on text; name a pretrained one: .*huggingface:FILE, gpt2:FOLDER$"):
        pretrained_tokenizer(f"wordpieces:{file}")
