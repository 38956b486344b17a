"""From text to a corpus: splits, the corpus directory, and how it is prepared."""

import itertools
import json

import numpy as np
import pytest
from small import write_files

from sedd import data
from sedd.data import corpus as corpus_file
from sedd.data import overlap, writer
from sedd.data import prepare as prepare_function
from sedd.data import source as source_file
from sedd.data.splits import SPLITS, make_rule
from sedd.data.tokenizer_bytes import Bytes
from sedd.errors import UserError
from sedd.runtime import disk


def decoded(corpus, split):
    return corpus.tokenizer.decode(corpus.tokens(split))


def documents(corpus, split):
    tokens, offsets = corpus.tokens(split), corpus.offsets(split)
    return [corpus.tokenizer.decode(tokens[a:b]) for a, b in itertools.pairwise(offsets)]


MANY = [f"Document {index}.\r\nIts text: {'é' * (index % 7)} {index**3}" for index in range(60)]
FEW = ["The first file.\n" * 20, "The second, " * 30, "ends.\0 漢字" * 20]


LONG = [f"{index} " * (199 + 90 * (index % 5)) + "é漢 " * (index % 2) for index in range(50)]


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of a thousand characters, and a record of each chunk."""
    monkeypatch.setattr(source_file, "LONGEST_PIECE", 1000)
    monkeypatch.setattr(writer, "LONGEST_PIECE", 1000)
    monkeypatch.setattr(writer, "RECORD_INTERVAL", 0.0)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A corpus of sixty documents, drawn into splits."""
    folder = tmp_path_factory.mktemp("many")
    return data.prepare(write_files(folder / "text", MANY), "bytes", folder / "corpus", seed=1)


# Splits and the corpus directory


def test_many_documents_are_drawn_into_disjoint_and_complete_splits(many):
    parts = {split: documents(many, split) for split in SPLITS}
    assert [len(parts[split]) for split in SPLITS] == [54, 3, 3]
    assert sorted(itertools.chain(*parts.values())) == sorted(text + "<|endoftext|>" for text in MANY)
    in_source = [text + "<|endoftext|>" for text in MANY]
    assert parts["train"] != [text for text in in_source if text in parts["train"]]  # nor in the order of the source
    assert many.tokenizer.end_of_text == 256 == many.vocab_size - 1
    assert (many.tokens("train") == 256).sum() == 54


def test_few_documents_are_cut_in_order(tmp_path):
    corpus = data.prepare(write_files(tmp_path / "text", FEW), "bytes", tmp_path / "corpus")
    whole = "".join(decoded(corpus, split) for split in SPLITS)
    assert whole == "".join(text + "<|endoftext|>" for text in FEW)
    sizes = [len(decoded(corpus, split).replace("<|endoftext|>", "")) for split in SPLITS]
    assert np.allclose(np.divide(sizes, sum(sizes)), [0.9, 0.05, 0.05], atol=0.002)
    assert len(documents(corpus, "train")) == 3  # the third goes on in the other splits


def test_one_document_gets_no_end_of_text(tmp_path):
    corpus = data.prepare(write_files(tmp_path / "text", ["abc " * 100]), "characters", tmp_path / "corpus")
    assert (corpus.vocab_size, corpus.tokenizer.end_of_text) == (4, None)
    assert "".join(decoded(corpus, split) for split in SPLITS) == "abc " * 100


def test_a_joiner_belongs_to_the_document_before_it(tmp_path):
    corpus = data.prepare("builtin:names", "characters", tmp_path / "corpus")
    texts = documents(corpus, "test")
    assert all(text.endswith("\n") and text.count("\n") == 1 for text in texts)
    assert corpus.num_characters("test") == sum(map(len, texts))
    assert [len(text.encode()) for text in texts] == list(corpus.document_bytes("test"))


def test_counts(many):
    for split in SPLITS:
        counts = many.meta["splits"][split]
        assert counts["documents"] == len(documents(many, split)) == len(many.document_bytes(split))
        assert counts["tokens"] == many.num_tokens(split) == len(many.tokens(split)) == many.offsets(split)[-1]
        assert counts["bytes"] == many.num_bytes(split) == many.document_bytes(split).sum()
        text = "".join(documents(many, split)).replace("<|endoftext|>", "")
        assert counts["characters"] == many.num_characters(split) == len(text) < len(text.encode()) == counts["bytes"]
    assert sum(many.num_bytes(split) for split in SPLITS) == sum(len(text.encode()) for text in MANY)
    assert sum(many.num_tokens(split) for split in SPLITS) == sum(len(text.encode()) + 1 for text in MANY)


def test_sentencepiece_learns_from_the_training_split_only(tmp_path):
    corpus = data.prepare(write_files(tmp_path / "text", MANY), "sentencepiece:300", tmp_path / "corpus")
    train = {text.removesuffix("<|endoftext|>") for text in documents(corpus, "train")}
    texts = [text for text in MANY if text in train]
    assert corpus.tokenizer.fingerprint == data.make_tokenizer("sentencepiece:300", texts, True).fingerprint
    assert corpus.tokenizer.fingerprint != data.make_tokenizer("sentencepiece:300", MANY, True).fingerprint


def test_large_vocabularies_take_four_bytes(tmp_path):
    text = "".join(map(chr, range(0x10000, 0x20000))) + "ab"
    corpus = data.prepare(write_files(tmp_path / "text", [text]), "characters", tmp_path / "corpus")
    assert corpus.tokens("train").dtype == np.uint32 and corpus.tokens("test").max() == 2**16 + 1
    assert decoded(corpus, "train") == text[: len(text) * 90 // 100]


def test_prepare_is_deterministic_and_seeded(many, tmp_path):
    def again(seed):
        return data.prepare(many.meta["source"], "bytes", tmp_path / str(seed), seed=seed)

    assert again(1).hash == many.hash
    assert again(2).hash != many.hash


def test_prepare_returns_what_is_there(many):
    written = (many.path / "meta.json").stat().st_mtime_ns
    assert data.prepare(many.meta["source"], "bytes", many.path, seed=1).hash == many.hash
    assert (many.path / "meta.json").stat().st_mtime_ns == written


def test_prepare_never_overwrites(tmp_path):
    source, out = write_files(tmp_path / "text", MANY), tmp_path / "corpus"
    model = tmp_path / "my.model"
    model.write_bytes(data.make_tokenizer("sentencepiece:300", MANY, False).backend.data)
    corpus = data.prepare(source, f"sentencepiece:{model}", out)
    for what, arguments in {"tokenizer": (source, "bytes", out), "seed": (*corpus_spec(corpus), out, 5)}.items():
        with pytest.raises(UserError, match=f"another {what}; choose another --out"):
            data.prepare(*arguments)
    model.write_bytes(data.make_tokenizer("sentencepiece:310", MANY, False).backend.data)
    with pytest.raises(UserError, match="another model"):
        data.prepare(*corpus_spec(corpus), out)
    write_files(tmp_path / "text", ["changed"])
    with pytest.raises(UserError, match="another text"):
        data.prepare(*corpus_spec(corpus), out)
    with pytest.raises(UserError, match="is not empty and holds no corpus; choose another --out"):
        data.prepare(source, "bytes", tmp_path / "text")
    assert data.open_corpus(out).hash == corpus.hash


def corpus_spec(corpus):
    return corpus.meta["source"], corpus.meta["tokenizer"]


@pytest.mark.parametrize("split", ["documents:90,5,5", "position:90,5,5"])
@pytest.mark.parametrize("stage", ["counting", "tokenising", "arranging", "hashing"])
def test_an_interrupted_preparation_goes_on(stage, split, small_pieces, tmp_path, monkeypatch):
    """Whenever it was interrupted the corpus is the same, and what was done is not done again."""
    source, out = write_files(tmp_path / "text", LONG), tmp_path / "corpora" / "mine"
    wanted = data.prepare(source, "sentencepiece:300", tmp_path / "whole", split=split)
    calls = []

    def counted(function, name, when=None):
        def run(*args, **kwargs):
            calls.append(name)
            if name == stage and len(calls) - calls.index(name) == (when or 1) and not resumed:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return run

    resumed = False
    prepare = prepare_function.__globals__
    monkeypatch.setitem(prepare, "scan", counted(prepare["scan"], "counting"))
    monkeypatch.setitem(prepare, "make_tokenizer", counted(prepare["make_tokenizer"], "making"))
    monkeypatch.setattr(writer, "_tokenise", counted(writer._tokenise, "tokenising", when=20))
    monkeypatch.setitem(prepare, "arrange", counted(prepare["arrange"], "arranging"))
    monkeypatch.setitem(prepare, "hash_of_splits", counted(prepare["hash_of_splits"], "hashing"))
    with pytest.raises(KeyboardInterrupt):
        data.prepare(source, "sentencepiece:300", out, split=split, workers=2)
    assert [path.name for path in out.parent.iterdir()] == [".mine.preparing"]
    before, resumed = calls.copy(), True
    calls.clear()
    assert data.prepare(source, "sentencepiece:300", out, split=split, workers=3).meta == wanted.meta
    assert sum(wanted.num_characters(split) for split in SPLITS) == sum(map(len, LONG))
    assert [path.name for path in out.parent.iterdir()] == ["mine"]
    assert ("counting" in calls) == ("making" in calls) == (stage == "counting")
    chunks = before.count("tokenising") + calls.count("tokenising")
    if stage == "tokenising":
        assert 15 < calls.count("tokenising") < 30  # of 37
    elif stage != "counting":
        assert calls.count("tokenising") == 0 and chunks == 37


def test_another_request_starts_over(small_pieces, tmp_path, monkeypatch):
    """A changed file, or another seed, after an interruption: nothing of the old work is in the new corpus."""
    source, out = write_files(tmp_path / "text", LONG), tmp_path / "corpus"

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setitem(prepare_function.__globals__, "hash_of_splits", interrupt)
        data.prepare(source, "bytes", out)
    write_files(tmp_path / "text", ["changed " * 500])
    wanted = data.prepare(source, "bytes", tmp_path / "wanted", seed=3)
    assert data.prepare(source, "bytes", out, seed=3).hash == wanted.hash


def test_a_mistake_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="too large"):
        data.prepare(write_files(tmp_path / "text", MANY), "sentencepiece:9000", tmp_path / "corpora" / "mine")
    assert list((tmp_path / "corpora").iterdir()) == []


def test_one_process_prepares_at_a_time(tmp_path):
    source = write_files(tmp_path / "text", MANY)
    with disk.locked(tmp_path / ".corpus.preparing"):
        with pytest.raises(UserError, match="another process is at work in"):
            data.prepare(source, "bytes", tmp_path / "corpus")
    data.prepare(source, "bytes", tmp_path / "corpus")


@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece:300"])
def test_workers_and_pieces_change_nothing(tokenizer, small_pieces, tmp_path):
    """Documents in many pieces, tokenised by any number of threads."""
    source = write_files(tmp_path / "text", LONG)
    corpora = [data.prepare(source, tokenizer, tmp_path / str(workers), workers=workers) for workers in (1, 2, 7)]
    assert len({corpus.hash for corpus in corpora}) == 1
    assert sorted(itertools.chain(*(documents(corpora[0], split) for split in SPLITS))) == sorted(
        text + "<|endoftext|>" for text in LONG
    )


# What is also in train


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_copies_of_held_out_documents_are_counted(mode, tmp_path, capsys):
    """However the parts that are compared lie, and said on stderr where they are more than a few."""
    source = {
        "train": write_files(tmp_path / "a", MANY[:40]),
        "validation": write_files(tmp_path / "b", [*MANY[30:44], MANY[30]]),
        "test": write_files(tmp_path / "c", [*MANY[44:], MANY[0][:-1]]),
    }
    corpus = data.prepare(source, "bytes", tmp_path / "corpus", mode=mode)
    tokens = sum(len(text.encode()) + 1 for text in [*MANY[30:40], MANY[30]])
    counts = {split: corpus.meta["splits"][split].get("also_in_train") for split in SPLITS}
    assert counts == {
        "train": None,
        "validation": {"documents": 11, "tokens": tokens},
        "test": {"documents": 0, "tokens": 0},
    }
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("sedd: 11 of the 15 documents of validation, with 7")
    data.prepare(source, "bytes", tmp_path / "corpus", mode=mode)
    assert capsys.readouterr().err.splitlines() == said


@pytest.mark.parametrize("part", [1, 7, 64, 2**16])
def test_documents_are_compared_whole_and_in_order(part, tmp_path, monkeypatch):
    """Against sets of documents, of a few ids so that many are alike, and some empty; read in parts of any size."""
    monkeypatch.setattr(overlap, "PART", part)
    random, found = np.random.default_rng(0), {}
    for split, number in (("train", 200), ("validation", 60), ("test", 40)):
        found[split] = [tuple(random.integers(0, 3, random.integers(0, 6)).tolist()) for _ in range(number)]
    found["train"].append((1, 2) * 50)
    found["test"] += [(1, 2) * 50, (1, 2) * 49]
    for split, texts in found.items():
        np.concatenate(texts).astype("<u2").tofile(tmp_path / f"{split}.tokens")
        np.append(0, np.cumsum([*map(len, texts)])).astype("<i8").tofile(tmp_path / f"{split}.offsets")
    copies = {split: [text for text in texts if text and text in found["train"]] for split, texts in found.items()}
    assert overlap.also_in_train(tmp_path, found, np.dtype("<u2")) == {
        split: {"documents": len(copies[split]), "tokens": sum(map(len, copies[split]))} for split in SPLITS[1:]
    }


# Rules


def test_proportions_of_documents(tmp_path):
    source = write_files(tmp_path / "text", MANY)
    corpus = data.prepare(source, "bytes", tmp_path / "corpus", split="documents:0.5,0.5")
    assert corpus.splits == ("train", "validation") and corpus.meta["split"] == "documents:0.5,0.5"
    assert [corpus.meta["splits"][split]["documents"] for split in corpus.splits] == [30, 30]
    assert sorted(documents(corpus, "train") + documents(corpus, "validation")) == sorted(
        text + "<|endoftext|>" for text in MANY
    )


def test_positions_cut_any_number_of_documents(tmp_path):
    """As text8 is: contiguous parts of the characters, in order, however many documents there are."""
    source = write_files(tmp_path / "text", MANY)
    corpus = data.prepare(source, "bytes", tmp_path / "corpus", split="position:80,10,10")
    whole = "".join(decoded(corpus, split) for split in SPLITS)
    assert whole == "".join(text + "<|endoftext|>" for text in MANY)
    sizes = [len(decoded(corpus, split).replace("<|endoftext|>", "")) for split in SPLITS]
    assert np.allclose(np.divide(sizes, sum(sizes)), [0.8, 0.1, 0.1], atol=0.002)


def test_the_last_documents(tmp_path):
    source = write_files(tmp_path / "text", MANY)
    corpus = data.prepare(source, "bytes", tmp_path / "one", split="last:7")
    assert corpus.splits == ("train", "validation")
    assert sorted(documents(corpus, "validation")) == sorted(text + "<|endoftext|>" for text in MANY[-7:])
    corpus = data.prepare(source, "bytes", tmp_path / "two", split="last:7,2")
    assert sorted(documents(corpus, "validation")) == sorted(text + "<|endoftext|>" for text in MANY[-9:-2])
    assert sorted(documents(corpus, "test")) == sorted(text + "<|endoftext|>" for text in MANY[-2:])


@pytest.mark.parametrize(
    "spec", ["documents:0.9,0.05,0.05", "position:90,5,5", "last:1234567", "documents:0.12345678,2"]
)
def test_a_rule_is_recorded_to_the_last_digit(spec):
    assert make_rule(spec).spec == spec


def test_a_source_for_each_split(tmp_path):
    sources = {
        "test": write_files(tmp_path / "c", MANY[:5]),
        "train": write_files(tmp_path / "a", MANY[5:9]),
    }
    corpus = data.prepare(sources, "characters", tmp_path / "corpus")
    assert corpus.splits == ("train", "test") and corpus.meta["split"] is None
    assert sorted(documents(corpus, "test")) == sorted(text + "<|endoftext|>" for text in MANY[:5])
    assert sorted(documents(corpus, "train")) == sorted(text + "<|endoftext|>" for text in MANY[5:9])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(split="half"), "there is no split 'half'; write documents:0.9,0.05,0.05, position:90,5,5 or last:100000"),
        (dict(split="documents:a,b"), "there is no split"),
        (dict(split="documents:-1,2"), "there is no split"),
        (dict(split="documents:0,0"), "there is no split"),
        (dict(split="documents:4,3,2,1"), "there is no split"),
        (dict(split="last:1.5"), "there is no split"),
        (dict(split="last:1,2,3"), "there is no split"),
        (dict(split="documents:1,0,1"), "the validation split of .* would be empty with documents:1,0,1"),
        (dict(split="documents:0.999,0.001"), "the validation split of .* would be empty"),
        (dict(split="last:60"), "the train split of .* would be empty with last:60"),
        (dict(split="last:0"), "there is no split"),
        (dict(mode="woven"), "there is no mode 'woven'; choose packed or padded"),
        (dict(padding="scored"), "a packed corpus has no padding"),
        (dict(mode="padded", padding="some"), "either scored or ignored"),
        (dict(workers=0), "at least one worker"),
    ],
)
def test_wrong_rules_are_one_clear_line(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        data.prepare(write_files(tmp_path / "text", MANY), "bytes", tmp_path / "corpus", **arguments)
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["text"]


def test_wrong_sources_for_splits(tmp_path):
    source = write_files(tmp_path / "text", MANY)
    with pytest.raises(UserError, match="nothing to split"):
        data.prepare({"train": source}, "bytes", tmp_path / "corpus", split="last:3")
    for wrong in ({"test": source}, {"train": source, "tset": source}):
        with pytest.raises(UserError, match="needs one for train"):
            data.prepare(wrong, "bytes", tmp_path / "corpus")


def test_a_text_too_short_to_split(tmp_path):
    with pytest.raises(UserError, match="the validation split of text:.* would be empty with position:90,5,5"):
        data.prepare(write_files(tmp_path / "text", ["a", "b"]), "sentencepiece:300", tmp_path / "corpus")


# The corpus


def test_a_corpus_is_read_only_and_knows_its_splits(many):
    with pytest.raises(ValueError, match="read-only"):
        many.tokens("train")[0] = 1
    counts = (many.num_bytes, many.num_characters, many.num_tokens)
    for read in (many.tokens, many.offsets, many.document_bytes, *counts):
        with pytest.raises(UserError, match="no split 'valid'; there are train, validation, test"):
            read("valid")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "test.tokens").write_bytes(b"abc"), "is damaged: test.tokens is missing or incomplete"),
        (lambda path: (path / "train.offsets").unlink(), "is damaged: train.offsets is missing or incomplete"),
        (lambda path: (path / "train.byte_offsets").write_bytes(b"abc"), "train.byte_offsets is missing or incomplete"),
        (lambda path: (path / "meta.json").write_text("[]"), "is not a corpus"),
        (lambda path: (path / "meta.json").unlink(), "is not a corpus"),
        (lambda path: (path / "meta.json").write_text('{"format": 99}'), "has corpus format 99"),
        (
            lambda path: (path / "meta.json").write_text('{"format": 2}'),
            "format 2, this sedd reads 3.* prepare it again",
        ),
        (lambda path: (path / "tokenizer" / "tokenizer.json").unlink(), "there is no tokenizer"),
    ],
)
def test_a_damaged_corpus_is_refused(damage, message, tmp_path):
    corpus = data.prepare(write_files(tmp_path / "text", FEW), "bytes", tmp_path / "corpus")
    damage(corpus.path)
    with pytest.raises(UserError, match=message):
        data.open_corpus(corpus.path)


def test_an_id_outside_the_vocabulary_is_refused_when_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Bytes, "size", 150)  # as a library might say
    with pytest.raises(UserError, match="has the id 195, outside its vocabulary of 151 tokens; choose another tok"):
        data.prepare(write_files(tmp_path / "text", MANY), "bytes", tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_an_id_outside_the_vocabulary_is_refused_when_it_is_read(mode, tmp_path, monkeypatch):
    """Where a corpus is opened, and of what is behind the part that is looked at then, in batches and in blocks."""
    corpus = data.prepare(write_files(tmp_path / "text", MANY), "bytes", tmp_path / "corpus", mode=mode)
    for split in ("train", "validation"):
        np.full(corpus.num_tokens(split), 400, "<u2").tofile(corpus.path / f"{split}.tokens")
    wrong = "corpus has the id 400, outside its vocabulary of 257 tokens; remove it and prepare it again"
    with pytest.raises(UserError, match=wrong):
        data.open_corpus(corpus.path)
    monkeypatch.setattr(corpus_file, "NUM_CHECKED", 0)
    corpus = data.open_corpus(corpus.path)
    for read in (lambda: data.batch(corpus, 8, 4, 0, 0), lambda: data.blocks(corpus, "validation", 8)):
        with pytest.raises(UserError, match=wrong):
            read()
    assert data.blocks(corpus, "test", 8).tokens.max() <= 256


def test_a_missing_corpus(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        data.open_corpus(tmp_path / "nothing")


def test_meta_is_plain_json(many):
    meta = json.loads((many.path / "meta.json").read_text())
    assert meta == many.meta and meta["mode"] == "packed" and meta["vocab_size"] == 257 and len(meta["hash"]) == 64
