"""Preparation of a corpus: splits, copies of held-out documents, the corpus directory and resumption."""

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


SIXTY_TEXTS = [f"Document {index}.\r\nIts text: {'é' * (index % 7)} {index**3}" for index in range(60)]
THREE_TEXTS = ["The first file.\n" * 20, "The second, " * 30, "ends.\0 漢字" * 20]


LONG_TEXTS = [f"{index} " * (199 + 90 * (index % 5)) + "é漢 " * (index % 2) for index in range(50)]


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 1000 characters, and a record of the progress after each chunk."""
    monkeypatch.setattr(source_file, "LONGEST_PIECE", 1000)
    monkeypatch.setattr(writer, "LONGEST_PIECE", 1000)
    monkeypatch.setattr(writer, "RECORD_INTERVAL", 0.0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A corpus of 60 documents, drawn into splits."""
    folder = tmp_path_factory.mktemp("sixty")
    return data.prepare(write_files(folder / "text", SIXTY_TEXTS), "bytes", folder / "corpus", seed=1)


# Splits and the corpus directory


@pytest.mark.smoke
def test_documents_are_drawn_into_disjoint_and_complete_splits(prepared):
    parts = {split: documents(prepared, split) for split in SPLITS}
    assert [len(parts[split]) for split in SPLITS] == [54, 3, 3]
    assert sorted(itertools.chain(*parts.values())) == sorted(text + "<|endoftext|>" for text in SIXTY_TEXTS)
    in_source = [text + "<|endoftext|>" for text in SIXTY_TEXTS]
    assert parts["train"] != [text for text in in_source if text in parts["train"]]  # not in the order of the source
    assert prepared.tokenizer.end_of_text == 256 == prepared.vocab_size - 1
    assert (prepared.tokens("train") == 256).sum() == 54


def test_few_documents_are_cut_in_order(tmp_path):
    corpus = data.prepare(write_files(tmp_path / "text", THREE_TEXTS), "bytes", tmp_path / "corpus")
    joined = "".join(decoded(corpus, split) for split in SPLITS)
    assert joined == "".join(text + "<|endoftext|>" for text in THREE_TEXTS)
    sizes = [len(decoded(corpus, split).replace("<|endoftext|>", "")) for split in SPLITS]
    assert np.allclose(np.divide(sizes, sum(sizes)), [0.9, 0.05, 0.05], atol=0.002)
    assert len(documents(corpus, "train")) == 3  # the third continues in the other splits


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


@pytest.mark.smoke
def test_counts_match_the_decoded_text(prepared):
    for split in SPLITS:
        counts = prepared.meta["splits"][split]
        assert counts["documents"] == len(documents(prepared, split)) == len(prepared.document_bytes(split))
        assert (
            counts["tokens"] == prepared.num_tokens(split) == len(prepared.tokens(split)) == prepared.offsets(split)[-1]
        )
        assert counts["bytes"] == prepared.num_bytes(split) == prepared.document_bytes(split).sum()
        text = "".join(documents(prepared, split)).replace("<|endoftext|>", "")
        assert (
            counts["characters"] == prepared.num_characters(split) == len(text) < len(text.encode()) == counts["bytes"]
        )
    assert sum(prepared.num_bytes(split) for split in SPLITS) == sum(len(text.encode()) for text in SIXTY_TEXTS)
    assert sum(prepared.num_tokens(split) for split in SPLITS) == sum(len(text.encode()) + 1 for text in SIXTY_TEXTS)


def test_sentencepiece_learns_from_the_training_split_only(tmp_path):
    corpus = data.prepare(write_files(tmp_path / "text", SIXTY_TEXTS), "sentencepiece:300", tmp_path / "corpus")
    train = {text.removesuffix("<|endoftext|>") for text in documents(corpus, "train")}
    texts = [text for text in SIXTY_TEXTS if text in train]
    assert corpus.tokenizer.fingerprint == data.make_tokenizer("sentencepiece:300", texts, True).fingerprint
    assert corpus.tokenizer.fingerprint != data.make_tokenizer("sentencepiece:300", SIXTY_TEXTS, True).fingerprint


def test_large_vocabularies_take_four_bytes(tmp_path):
    text = "".join(map(chr, range(0x10000, 0x20000))) + "ab"
    corpus = data.prepare(write_files(tmp_path / "text", [text]), "characters", tmp_path / "corpus")
    assert corpus.tokens("train").dtype == np.uint32 and corpus.tokens("test").max() == 2**16 + 1
    assert decoded(corpus, "train") == text[: len(text) * 90 // 100]


def test_prepare_is_deterministic_and_seeded(prepared, tmp_path):
    def prepare(seed):
        return data.prepare(prepared.meta["source"], "bytes", tmp_path / str(seed), seed=seed)

    assert prepare(1).hash == prepared.hash
    assert prepare(2).hash != prepared.hash


def test_prepare_returns_an_existing_corpus_unchanged(prepared):
    modified = (prepared.path / "meta.json").stat().st_mtime_ns
    assert data.prepare(prepared.meta["source"], "bytes", prepared.path, seed=1).hash == prepared.hash
    assert (prepared.path / "meta.json").stat().st_mtime_ns == modified


def test_prepare_never_overwrites_a_different_corpus(tmp_path):
    source, out = write_files(tmp_path / "text", SIXTY_TEXTS), tmp_path / "corpus"
    model = tmp_path / "my.model"
    model.write_bytes(data.make_tokenizer("sentencepiece:300", SIXTY_TEXTS, False).backend.data)
    corpus = data.prepare(source, f"sentencepiece:{model}", out)
    for what, arguments in {"tokenizer": (source, "bytes", out), "seed": (*corpus_spec(corpus), out, 5)}.items():
        with pytest.raises(UserError, match=f"another {what}; choose another --out"):
            data.prepare(*arguments)
    model.write_bytes(data.make_tokenizer("sentencepiece:310", SIXTY_TEXTS, False).backend.data)
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
def test_an_interrupted_preparation_resumes(stage, split, small_pieces, tmp_path, monkeypatch):
    """The corpus is independent of the stage of the interruption, and completed work is not repeated."""
    source, out = write_files(tmp_path / "text", LONG_TEXTS), tmp_path / "corpora" / "mine"
    expected = data.prepare(source, "sentencepiece:300", tmp_path / "expected", split=split)
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
    assert data.prepare(source, "sentencepiece:300", out, split=split, workers=3).meta == expected.meta
    assert sum(expected.num_characters(split) for split in SPLITS) == sum(map(len, LONG_TEXTS))
    assert [path.name for path in out.parent.iterdir()] == ["mine"]
    assert ("counting" in calls) == ("making" in calls) == (stage == "counting")
    chunks = before.count("tokenising") + calls.count("tokenising")
    if stage == "tokenising":
        assert 15 < calls.count("tokenising") < 30  # of 37
    elif stage != "counting":
        assert calls.count("tokenising") == 0 and chunks == 37


def test_a_different_request_discards_interrupted_work(small_pieces, tmp_path, monkeypatch):
    """After an interruption and a change of a file and the seed, the corpus has none of the earlier work."""
    source, out = write_files(tmp_path / "text", LONG_TEXTS), tmp_path / "corpus"

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setitem(prepare_function.__globals__, "hash_of_splits", interrupt)
        data.prepare(source, "bytes", out)
    write_files(tmp_path / "text", ["changed " * 500])
    expected = data.prepare(source, "bytes", tmp_path / "expected", seed=3)
    assert data.prepare(source, "bytes", out, seed=3).hash == expected.hash


def test_an_error_leaves_no_files(tmp_path):
    with pytest.raises(UserError, match="too large"):
        data.prepare(write_files(tmp_path / "text", SIXTY_TEXTS), "sentencepiece:9000", tmp_path / "corpora" / "mine")
    assert list((tmp_path / "corpora").iterdir()) == []


def test_two_processes_cannot_prepare_the_same_corpus(tmp_path):
    source = write_files(tmp_path / "text", SIXTY_TEXTS)
    with disk.locked(tmp_path / ".corpus.preparing"):
        with pytest.raises(UserError, match="another process is at work in"):
            data.prepare(source, "bytes", tmp_path / "corpus")
    data.prepare(source, "bytes", tmp_path / "corpus")


@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece:300"])
def test_corpus_is_independent_of_the_number_of_workers(tokenizer, small_pieces, tmp_path):
    """Documents in many pieces, tokenised by 1, 2 and 7 threads."""
    source = write_files(tmp_path / "text", LONG_TEXTS)
    corpora = [data.prepare(source, tokenizer, tmp_path / str(workers), workers=workers) for workers in (1, 2, 7)]
    assert len({corpus.hash for corpus in corpora}) == 1
    assert sorted(itertools.chain(*(documents(corpora[0], split) for split in SPLITS))) == sorted(
        text + "<|endoftext|>" for text in LONG_TEXTS
    )


# Held-out documents that are also in train


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_copies_of_held_out_documents_are_counted(mode, tmp_path, capsys):
    """In both modes; a line on stderr warns of a split with more than 1 % of its tokens in copies."""
    source = {
        "train": write_files(tmp_path / "a", SIXTY_TEXTS[:40]),
        "validation": write_files(tmp_path / "b", [*SIXTY_TEXTS[30:44], SIXTY_TEXTS[30]]),
        "test": write_files(tmp_path / "c", [*SIXTY_TEXTS[44:], SIXTY_TEXTS[0][:-1]]),
    }
    corpus = data.prepare(source, "bytes", tmp_path / "corpus", mode=mode)
    tokens = sum(len(text.encode()) + 1 for text in [*SIXTY_TEXTS[30:40], SIXTY_TEXTS[30]])
    counts = {split: corpus.meta["splits"][split].get("also_in_train") for split in SPLITS}
    assert counts == {
        "train": None,
        "validation": {"documents": 11, "tokens": tokens},
        "test": {"documents": 0, "tokens": 0},
    }
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and warnings[0].startswith("sedd: 11 of the 15 documents of validation, with 7")
    data.prepare(source, "bytes", tmp_path / "corpus", mode=mode)
    assert capsys.readouterr().err.splitlines() == warnings


@pytest.mark.parametrize("part", [1, 7, 64, 2**16])
def test_copies_have_the_same_ids_in_the_same_order(part, tmp_path, monkeypatch):
    """Agrees with a search in Python. Documents of 0 to 5 ids out of 3 have many copies; the parts have any size."""
    monkeypatch.setattr(overlap, "PART", part)
    random, splits = np.random.default_rng(0), {}
    for split, number in (("train", 200), ("validation", 60), ("test", 40)):
        splits[split] = [tuple(random.integers(0, 3, random.integers(0, 6)).tolist()) for _ in range(number)]
    splits["train"].append((1, 2) * 50)
    splits["test"] += [(1, 2) * 50, (1, 2) * 49]
    for split, texts in splits.items():
        np.concatenate(texts).astype("<u2").tofile(tmp_path / f"{split}.tokens")
        np.append(0, np.cumsum([*map(len, texts)])).astype("<i8").tofile(tmp_path / f"{split}.offsets")
    copies = {split: [text for text in texts if text and text in splits["train"]] for split, texts in splits.items()}
    assert overlap.also_in_train(tmp_path, splits, np.dtype("<u2")) == {
        split: {"documents": len(copies[split]), "tokens": sum(map(len, copies[split]))} for split in SPLITS[1:]
    }


# Rules


def test_documents_rule_splits_in_the_given_proportions(tmp_path):
    source = write_files(tmp_path / "text", SIXTY_TEXTS)
    corpus = data.prepare(source, "bytes", tmp_path / "corpus", split="documents:0.5,0.5")
    assert corpus.splits == ("train", "validation") and corpus.meta["split"] == "documents:0.5,0.5"
    assert [corpus.meta["splits"][split]["documents"] for split in corpus.splits] == [30, 30]
    assert sorted(documents(corpus, "train") + documents(corpus, "validation")) == sorted(
        text + "<|endoftext|>" for text in SIXTY_TEXTS
    )


def test_position_rule_cuts_the_text_in_order(tmp_path):
    """As for text8: contiguous parts of the characters, for any number of documents."""
    source = write_files(tmp_path / "text", SIXTY_TEXTS)
    corpus = data.prepare(source, "bytes", tmp_path / "corpus", split="position:80,10,10")
    joined = "".join(decoded(corpus, split) for split in SPLITS)
    assert joined == "".join(text + "<|endoftext|>" for text in SIXTY_TEXTS)
    sizes = [len(decoded(corpus, split).replace("<|endoftext|>", "")) for split in SPLITS]
    assert np.allclose(np.divide(sizes, sum(sizes)), [0.8, 0.1, 0.1], atol=0.002)


def test_last_rule_holds_out_the_last_documents(tmp_path):
    source = write_files(tmp_path / "text", SIXTY_TEXTS)
    corpus = data.prepare(source, "bytes", tmp_path / "one", split="last:7")
    assert corpus.splits == ("train", "validation")
    assert sorted(documents(corpus, "validation")) == sorted(text + "<|endoftext|>" for text in SIXTY_TEXTS[-7:])
    corpus = data.prepare(source, "bytes", tmp_path / "two", split="last:7,2")
    assert sorted(documents(corpus, "validation")) == sorted(text + "<|endoftext|>" for text in SIXTY_TEXTS[-9:-2])
    assert sorted(documents(corpus, "test")) == sorted(text + "<|endoftext|>" for text in SIXTY_TEXTS[-2:])


@pytest.mark.parametrize(
    "spec", ["documents:0.9,0.05,0.05", "position:90,5,5", "last:1234567", "documents:0.12345678,2"]
)
def test_a_rule_keeps_all_digits_of_its_spec(spec):
    assert make_rule(spec).spec == spec


def test_each_split_can_have_a_separate_source(tmp_path):
    sources = {
        "test": write_files(tmp_path / "c", SIXTY_TEXTS[:5]),
        "train": write_files(tmp_path / "a", SIXTY_TEXTS[5:9]),
    }
    corpus = data.prepare(sources, "characters", tmp_path / "corpus")
    assert corpus.splits == ("train", "test") and corpus.meta["split"] is None
    assert sorted(documents(corpus, "test")) == sorted(text + "<|endoftext|>" for text in SIXTY_TEXTS[:5])
    assert sorted(documents(corpus, "train")) == sorted(text + "<|endoftext|>" for text in SIXTY_TEXTS[5:9])


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
def test_invalid_rules_give_one_line_errors(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        data.prepare(write_files(tmp_path / "text", SIXTY_TEXTS), "bytes", tmp_path / "corpus", **arguments)
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["text"]


def test_invalid_sources_for_splits_are_refused(tmp_path):
    source = write_files(tmp_path / "text", SIXTY_TEXTS)
    with pytest.raises(UserError, match="nothing to split"):
        data.prepare({"train": source}, "bytes", tmp_path / "corpus", split="last:3")
    for sources in ({"test": source}, {"train": source, "tset": source}):
        with pytest.raises(UserError, match="needs one for train"):
            data.prepare(sources, "bytes", tmp_path / "corpus")


def test_a_text_too_short_to_split_is_refused(tmp_path):
    with pytest.raises(UserError, match="the validation split of text:.* would be empty with position:90,5,5"):
        data.prepare(write_files(tmp_path / "text", ["a", "b"]), "sentencepiece:300", tmp_path / "corpus")


# The corpus


def test_a_corpus_is_read_only_and_refuses_unknown_splits(prepared):
    with pytest.raises(ValueError, match="read-only"):
        prepared.tokens("train")[0] = 1
    counts = (prepared.num_bytes, prepared.num_characters, prepared.num_tokens)
    for read in (prepared.tokens, prepared.offsets, prepared.document_bytes, *counts):
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
    corpus = data.prepare(write_files(tmp_path / "text", THREE_TEXTS), "bytes", tmp_path / "corpus")
    damage(corpus.path)
    with pytest.raises(UserError, match=message):
        data.open_corpus(corpus.path)


def test_an_id_outside_the_vocabulary_is_refused_when_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Bytes, "size", 150)  # as of a library with a wrong size
    with pytest.raises(UserError, match="has the id 195, outside its vocabulary of 151 tokens; choose another tok"):
        data.prepare(write_files(tmp_path / "text", SIXTY_TEXTS), "bytes", tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_an_id_outside_the_vocabulary_is_refused_when_it_is_read(mode, tmp_path, monkeypatch):
    """`open_corpus` checks the first ids; `batch` and `blocks` check those that they read."""
    corpus = data.prepare(write_files(tmp_path / "text", SIXTY_TEXTS), "bytes", tmp_path / "corpus", mode=mode)
    for split in ("train", "validation"):
        np.full(corpus.num_tokens(split), 400, "<u2").tofile(corpus.path / f"{split}.tokens")
    message = "corpus has the id 400, outside its vocabulary of 257 tokens; remove it and prepare it again"
    with pytest.raises(UserError, match=message):
        data.open_corpus(corpus.path)
    monkeypatch.setattr(corpus_file, "NUM_CHECKED", 0)
    corpus = data.open_corpus(corpus.path)
    for read in (lambda: data.batch(corpus, 8, 4, 0, 0), lambda: data.blocks(corpus, "validation", 8)):
        with pytest.raises(UserError, match=message):
            read()
    assert data.blocks(corpus, "test", 8)[0].max() <= 256


def test_a_missing_corpus_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        data.open_corpus(tmp_path / "nothing")


def test_meta_is_plain_json(prepared):
    meta = json.loads((prepared.path / "meta.json").read_text())
    assert meta == prepared.meta and meta["mode"] == "packed" and meta["vocab_size"] == 257 and len(meta["hash"]) == 64
