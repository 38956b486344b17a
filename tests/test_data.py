"""From text to batches: sources, splits, the corpus directory, and what is read from it."""

import ast
import gc
import itertools
import json
import threading

import numpy as np
import pytest

from sedd import data
from sedd.data import prepare as prepare_function
from sedd.data.splits import SPLITS
from sedd.errors import UserError


def write_files(folder, texts):
    folder.mkdir(parents=True, exist_ok=True)
    for index, text in enumerate(texts):
        (folder / f"{index:03}.txt").write_bytes(text.encode("utf-8"))
    return f"text:{folder}/*.txt"


def decoded(corpus, split):
    return corpus.tokenizer.decode(corpus.tokens(split))


def documents(corpus, split):
    tokens, offsets = corpus.tokens(split), corpus.offsets(split)
    return [corpus.tokenizer.decode(tokens[a:b]) for a, b in itertools.pairwise(offsets)]


MANY = [f"Document {index}.\r\nIts text: {'é' * (index % 7)} {index**3}" for index in range(60)]
FEW = ["The first file.\n" * 20, "The second, " * 30, "ends.\0 漢字" * 20]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A corpus of sixty documents, drawn into splits."""
    folder = tmp_path_factory.mktemp("many")
    return data.prepare(write_files(folder / "text", MANY), "bytes", folder / "corpus", seed=1)


# Sources


def test_text_files_are_documents_sorted_by_path(tmp_path):
    write_files(tmp_path / "b" / "deep", ["third\r\n", "", "fourth"])
    write_files(tmp_path / "a", ["first", "second"])
    source = data.open_source(f"text:{tmp_path}/**/*.txt")
    assert list(source) == ["first", "second", "third\r\n", "fourth"]  # the empty file is none
    assert list(source) == list(source) and source.joiner is None


def test_names():
    source = data.open_source("builtin:names")
    names = list(source)
    assert (len(names), sum(len(name) + 1 for name in names)) == (26540, 724088)
    assert source.joiner == "\n" and "GREEK SMALL LETTER OMEGA WITH TONOS" in names


def test_functions():
    source = data.open_source("builtin:functions")
    functions = list(source)
    assert 4000 < len(functions) < 9000  # 6626 of Python 3.11.7
    assert source.joiner == "\n\n\n" and max(map(len, functions)) <= 200
    for function in functions[::20]:
        (node,) = ast.parse(function).body
        assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node) is None
    long_lines = [line.strip() for text in functions for line in set(text.split("\n")) if len(line.strip()) > 40]
    assert len(set(functions)) == len(functions) and len(set(long_lines)) == len(long_lines)


@pytest.mark.parametrize("source", ["builtin:names", "builtin:functions"])
def test_held_out_text_of_a_builtin_corpus_is_not_in_the_training_text(source, tmp_path):
    corpus = data.prepare(source, "bytes", tmp_path / "corpus")
    training = set(decoded(corpus, "train").split("\n"))
    held_out = [line for split in SPLITS[1:] for line in decoded(corpus, split).split("\n") if len(line) > 40]
    assert len(held_out) > 200
    assert sum(line in training for line in held_out) < 0.05 * len(held_out)
    assert corpus.tokenizer.end_of_text is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("web:all", "unknown source 'web:all'; there are text, builtin:names, builtin:functions"),
        ("builtin:poems", "unknown source 'builtin:poems'"),
        ("text:{}/none/*.txt", "no file matches"),
        ("text:{}/*.latin", r"000.latin is not UTF-8: the byte at position 3 does not fit"),
        ("text:{}/*.empty", "holds no text"),
    ],
)
def test_a_wrong_source_is_one_clear_line(spec, message, tmp_path):
    (tmp_path / "000.latin").write_bytes(b"caf\xe9 noir")
    (tmp_path / "000.empty").touch()
    with pytest.raises(UserError, match=message):
        data.prepare(spec.format(tmp_path), "bytes", tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


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
    assert [len(text.encode()) for text in texts] == list(corpus.document_bytes("test"))


def test_counts(many):
    for split in SPLITS:
        counts = many.meta["splits"][split]
        assert counts["documents"] == len(documents(many, split)) == len(many.document_bytes(split))
        assert counts["tokens"] == many.num_tokens(split) == len(many.tokens(split)) == many.offsets(split)[-1]
        assert counts["bytes"] == many.num_bytes(split) == many.document_bytes(split).sum()
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
    model.write_bytes(data.make_tokenizer("sentencepiece:300", MANY, False).pieces.data)
    corpus = data.prepare(source, f"sentencepiece:{model}", out)
    for what, arguments in {"tokenizer": (source, "bytes", out), "seed": (*corpus_spec(corpus), out, 5)}.items():
        with pytest.raises(UserError, match=f"another {what}; choose another --out"):
            data.prepare(*arguments)
    model.write_bytes(data.make_tokenizer("sentencepiece:310", MANY, False).pieces.data)
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


def test_an_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    source, out = write_files(tmp_path / "text", MANY), tmp_path / "corpora" / "mine"
    monkeypatch.setitem(prepare_function.__globals__, "hash_of_splits", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.prepare(source, "bytes", out)
    assert list(out.parent.iterdir()) == []


def test_a_text_too_short_to_split(tmp_path):
    with pytest.raises(UserError, match="the validation split of text:.* would be empty, it is too short"):
        data.prepare(write_files(tmp_path / "text", ["a", "b"]), "sentencepiece:300", tmp_path / "corpus")


def test_a_corpus_is_read_only_and_knows_its_splits(many):
    with pytest.raises(ValueError, match="read-only"):
        many.tokens("train")[0] = 1
    for read in (many.tokens, many.offsets, many.document_bytes, many.num_bytes, many.num_tokens):
        with pytest.raises(UserError, match="no split 'valid'; there are train, validation, test"):
            read("valid")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "test.tokens").write_bytes(b"abc"), "the files of its test split are not whole"),
        (lambda path: (path / "train.offsets.npy").unlink(), "the files of its train split are not whole"),
        (lambda path: np.save(path / "train.bytes.npy", np.zeros(9)), "the files of its train split are not whole"),
        (lambda path: (path / "meta.json").write_text("[]"), "is no corpus"),
        (lambda path: (path / "meta.json").unlink(), "is no corpus"),
        (lambda path: (path / "meta.json").write_text('{"format": 99}'), "has corpus format 99"),
        (lambda path: (path / "tokenizer" / "tokenizer.json").unlink(), "there is no tokenizer"),
    ],
)
def test_a_damaged_corpus_is_refused(damage, message, tmp_path):
    corpus = data.prepare(write_files(tmp_path / "text", FEW), "bytes", tmp_path / "corpus")
    damage(corpus.path)
    with pytest.raises(UserError, match=message):
        data.open_corpus(corpus.path)


def test_a_missing_corpus(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        data.open_corpus(tmp_path / "nothing")


def test_meta_is_plain_json(many):
    meta = json.loads((many.path / "meta.json").read_text())
    assert meta == many.meta and meta["mode"] == "packed" and meta["vocab_size"] == 257 and len(meta["hash"]) == 64


# Batches


def starts_of(rows, corpus):
    """Where rows begin in a training text in which they occur once."""
    text = corpus.tokens("train").tobytes()
    return [text.index(row.astype("<u2").tobytes()) // 2 for row in rows]


def epoch_starts(corpus, block_length, seed, epoch):
    num_blocks = (corpus.num_tokens("train") - block_length + 1) // block_length
    return starts_of(data.batch(corpus, block_length, num_blocks, seed, epoch), corpus)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """A corpus in which no ten tokens occur twice."""
    folder = tmp_path_factory.mktemp("numbers")
    text = "".join(f"{number:04}," for number in range(1000, 2000))
    return data.prepare(write_files(folder / "text", [text]), "bytes", folder / "corpus")


def test_an_epoch_takes_each_block_once_from_an_offset_of_its_own(numbers):
    starts = [epoch_starts(numbers, 32, seed=3, epoch=epoch) for epoch in range(12)]
    for epoch in starts:
        assert 0 <= min(epoch) < 32
        assert sorted(epoch) == list(range(min(epoch), min(epoch) + 32 * len(epoch), 32))
        assert max(epoch) + 32 <= numbers.num_tokens("train")
    assert len({min(epoch) for epoch in starts}) > 6
    orders = {tuple(np.subtract(epoch, min(epoch))) for epoch in starts}
    assert len(orders) == 12 and tuple(sorted(next(iter(orders)))) not in orders
    assert epoch_starts(numbers, 32, seed=4, epoch=0) != starts[0]


def test_rows_do_not_depend_on_their_grouping(numbers):
    rows = np.concatenate([data.batch(numbers, 32, 5, 7, k) for k in range(80)])  # about three epochs
    assert rows.dtype == np.int32 and np.array_equal(rows[:399], np.concatenate([data.batch(numbers, 32, 399, 7, 0)]))
    reopened = data.open_corpus(numbers.path)
    assert np.array_equal(data.batch(reopened, 32, 5, 7, 79), rows[-5:])


def test_every_integer_is_a_seed(numbers):
    seeds = (-2, -1, 0, 1, 2**63, 2**64 - 3)
    assert len({data.batch(numbers, 32, 8, seed, 0).tobytes() for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("block_length", [2250, 3000, 4499, 4500])
def test_blocks_almost_as_long_as_the_text(numbers, block_length):
    assert numbers.num_tokens("train") == 4500
    starts = starts_of(data.batch(numbers, block_length, 40, 0, 0), numbers)
    assert 0 <= min(starts) and max(starts) <= 4500 - block_length
    assert len(set(starts)) > min(8, 4500 - block_length)


@pytest.mark.parametrize("start", [0, 3, 1000])
def test_the_iterator_gives_the_batches_from_its_start(numbers, start):
    iterator = data.batches(numbers, 16, 4, seed=0, start=start)
    for k, rows in enumerate(itertools.islice(iterator, 10), start):
        assert np.array_equal(rows, data.batch(numbers, 16, 4, 0, k))


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_the_prefetch_thread_ends_with_the_iterator(numbers):
    gc.collect()
    iterator = data.batches(numbers, 16, 4, seed=0)
    next(iterator)
    assert len(prefetch_threads()) == 1
    iterator.close()
    assert not prefetch_threads()
    iterator = data.batches(numbers, 16, 4, seed=0)
    next(iterator)
    del iterator
    gc.collect()
    assert not prefetch_threads()


def test_an_error_in_the_thread_reaches_the_consumer(tmp_path):
    corpus = data.prepare(write_files(tmp_path / "text", FEW), "bytes", tmp_path / "corpus")
    iterator = data.batches(corpus, 16, 4, seed=0)
    (corpus.path / "train.tokens").unlink()
    with pytest.raises(FileNotFoundError):
        list(itertools.islice(iterator, 10))
    assert not prefetch_threads()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("block_length", [1, 7, 250, 10_000])
def test_blocks_lose_no_token(numbers, split, block_length):
    rows, lengths = data.blocks(numbers, split, block_length)
    assert rows.dtype == lengths.dtype == np.int32 and rows.shape == (len(lengths), block_length)
    kept = np.concatenate([row[:length] for row, length in zip(rows, lengths, strict=True)])
    assert np.array_equal(kept, numbers.tokens(split))
    assert np.all(lengths[:-1] == block_length) and 0 < lengths[-1] <= block_length
    assert np.all(rows[-1, lengths[-1] :] == 0)


def test_block_lengths_that_cannot_be(numbers):
    data.check_block_length(numbers, "train", 4500)
    for call in (data.batch, data.batches):
        with pytest.raises(UserError, match="corpus shorter than a block: .* 4500 tokens, a block 4501"):
            call(numbers, 4501, 2, 0, 0)
    with pytest.raises(UserError, match="at least 1"):
        data.check_block_length(numbers, "test", 0)
