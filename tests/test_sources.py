"""Sources: their documents, their memory while reading, and their errors."""

import ast
import csv
import gzip
import json
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
import zstandard

from sedd.data import files, open_source
from sedd.errors import UserError

HARD = ["first\r\nline", " padded ", 'a "quoted", one', "漢字 é 😀\u2028\x85", "x" * 200_000, "last\n"]


def documents(spec):
    """Returns the documents of a source, their pieces joined."""
    joined, parts = [], []
    for text, ends in open_source(spec):
        parts.append(text)
        if ends:
            joined.append("".join(parts))
            parts = []
    assert not parts
    return joined


def write_csv(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(rows)])


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps({"id": index, "text": text}) + "\n" for index, text in enumerate(rows)))


def write_parquet(path, rows, **options):
    table = pyarrow.table({"id": range(len(rows)), "text": pyarrow.array(rows, pyarrow.string())})
    pyarrow.parquet.write_table(table, path, **options)


WRITERS = {"csv": write_csv, "jsonl": write_jsonl, "parquet": write_parquet}


class Tiny(tfds.core.GeneratorBasedBuilder):
    """A data set of numbered texts."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        fields = dict.fromkeys(["text", "other", "broken"], tfds.features.Text()) | {"number": np.int32}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(fields))

    def _split_generators(self, _):
        return {"train": self._generate_examples(600), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        for number in range(count):
            yield number, {"text": f"text {number} é", "other": "", "broken": b"caf\xe9", "number": number}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """A folder with the prepared data set `tiny`."""
    folder = tmp_path_factory.mktemp("datasets")
    Tiny(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


# Documents


def test_text_files_are_documents_sorted_by_path(tmp_path):
    texts = {"b/deep/1.txt": "third\r\n", "b/2.txt": "", "b/3.txt": "\ufefffourth", "a/1.txt": "first", "a/2.md": "no"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode("utf-8"))
    source = open_source(f"text:{tmp_path}/**/*.txt")
    assert documents(source.spec) == ["first", "\ufefffourth", "third\r\n"]  # the empty file is skipped
    assert list(source) == list(source) and source.joiner is None
    assert [str(path.relative_to(tmp_path)) for path in source.files] == sorted(texts)[:1] + sorted(texts)[2:]


def test_a_pattern_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert documents("text:~/*.txt") == ["here"]


def test_lines_are_documents_without_their_ends(tmp_path):
    (tmp_path / "a").write_bytes("\ufeffone\r\n\n two \x85\u2028 2\rtwo\nlast".encode())
    assert documents(f"lines:{tmp_path}/a") == ["one", " two \x85\u2028 2\rtwo", "last"]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_column_or_field_holds_the_documents(kind, tmp_path):
    WRITERS[kind](tmp_path / "a", HARD)
    WRITERS[kind](tmp_path / "b", ["", "again"])
    source = open_source(f"{kind}:{tmp_path}/[ab]:text")
    assert documents(source.spec) == [*HARD, "again"] and source.joiner is None
    assert source.files == (tmp_path / "a", tmp_path / "b")


def test_csv_with_a_byte_order_mark_quoted_names_and_blank_lines(tmp_path):
    (tmp_path / "a.csv").write_bytes('\ufeff"mr","ref"\r\n\r\n"x[1], y","An ""x"".\r\nTwo"\r\n,\n'.encode())
    assert documents(f"csv:{tmp_path}/a.csv:ref") == ['An "x".\r\nTwo']
    assert documents(f"csv:{tmp_path}/a.csv:mr") == ["x[1], y"]


def test_jsonl_with_blank_lines_and_escapes(tmp_path):
    (tmp_path / "a").write_bytes(b'\xef\xbb\xbf{"a:b": 1, "text": "\\ud83d\\ude00\\n"}\r\n\n{"text": "b"}')
    assert documents(f"jsonl:{tmp_path}/a:text") == ["😀\n", "b"]


@pytest.mark.parametrize("kind", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())])
def test_parquet_reads_all_text_types_and_many_row_groups(kind, tmp_path):
    texts = [f"text {number % 100}" for number in range(1000)]
    table = pyarrow.table({"text": pyarrow.array(texts).cast(kind), "other": range(1000)})
    pyarrow.parquet.write_table(table, tmp_path / "a", row_group_size=150)
    assert documents(f"parquet:{tmp_path}/a:text") == texts


def test_tfds_reads_splits_slices_and_fields(datasets):
    folder = datasets / "tiny" / "1.0.0"
    train = documents(f"tfds:{folder}")
    assert sorted(train) == sorted(f"text {number} é" for number in range(600))
    assert documents(f"tfds:{folder}:train:text") == train == documents(f"tfds:{folder}::text")
    assert documents(f"tfds:{folder}:train[:10%]") == train[:60] == documents(f"tfds:{folder}:train[:10%]:text")
    assert len(documents(f"tfds:{folder}:test")) == 3
    assert [path.name.split("-")[1][:5] for path in open_source(f"tfds:{folder}").files] == ["test.", "train"]


def test_tfds_reads_a_data_set_by_name_without_tensorflow(datasets):
    """In a separate process, since TensorFlow Datasets reads TFDS_DATA_DIR once."""
    code = "import sys, sedd.data as d; print(len(list(d.open_source('tfds:tiny:test'))), 'tensorflow' in sys.modules)"
    environment = os.environ | {"TFDS_DATA_DIR": str(datasets)}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["3", "False"]


def test_names_are_those_of_unicode_14():
    names = documents("builtin:names")
    assert (len(names), sum(map(len, names))) == (26540, 724088)
    assert open_source("builtin:names").joiner == "\n" and "GREEK SMALL LETTER OMEGA WITH TONOS\n" in names


@pytest.mark.slow
def test_functions_are_short_and_distinct():
    functions = [text.removesuffix("\n\n\n") for text in documents("builtin:functions")]
    assert 4000 < len(functions) < 9000  # 6626 of Python 3.11.7
    assert open_source("builtin:functions").joiner == "\n\n\n" and max(map(len, functions)) <= 200
    for function in functions[::20]:
        (node,) = ast.parse(function).body
        assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node) is None
    long_lines = [line.strip() for text in functions for line in set(text.split("\n")) if len(line.strip()) > 40]
    assert len(set(functions)) == len(functions) and len(set(long_lines)) == len(long_lines)


# Compression and streaming


def compressed(suffix, *members):
    """Returns the concatenated members, each compressed separately."""
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    return b"".join(map(compress, members))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_give_the_same_documents(suffix, tmp_path):
    text = "".join(f"{number} é\n" for number in range(100_000))
    data = text.encode()
    (tmp_path / f"a.txt{suffix}").write_bytes(compressed(suffix, data[:1001], data[1001:500_000], b"", data[500_000:]))
    (tmp_path / "b.txt").write_bytes(data)
    assert documents(f"text:{tmp_path}/a*") == documents(f"text:{tmp_path}/b*") == [text]
    assert documents(f"lines:{tmp_path}/a*") == text.splitlines()
    (tmp_path / f"c.csv{suffix}").write_bytes(compressed(suffix, b"text\nhello\n"))
    (tmp_path / f"d.jsonl{suffix}").write_bytes(compressed(suffix, b'{"text": "hello"}\n'))
    assert documents(f"csv:{tmp_path}/c*:text") == documents(f"jsonl:{tmp_path}/d*:text") == ["hello"]


@pytest.mark.parametrize("log", [28, 31])
def test_zstd_files_with_long_windows_are_read(log, tmp_path):
    """As written by `zstd --long`; with skippable frames around it, and a frame of an ordinary window after it."""
    skipped = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"
    frame = b"\x28\xb5\x2f\xfd\x00" + bytes([(log - 10) << 3]) + (3 << 3 | 1).to_bytes(3, "little") + b"one"
    assert zstandard.get_frame_parameters(frame).window_size == 2**log
    (tmp_path / "a.zst").write_bytes(skipped + frame + skipped + compressed(".zst", b" two"))
    assert documents(f"text:{tmp_path}/a.zst") == ["one two"]


def test_sizes_beyond_the_default_limits_of_libraries_are_read(tmp_path):
    """A field of CSV, the digits of a JSON number in another field, and the metadata of a Parquet file."""
    csv.field_size_limit(2**17)
    (tmp_path / "news.csv").write_text(f'1,title,"{"a" * 2**18}"\n')
    assert documents(f"ag_news:{tmp_path}/news.csv") == ["title " + "a" * 2**18]
    (tmp_path / "a.jsonl").write_text(f'{{"n": {"9" * 5000}, "text": "hello"}}\n')
    assert documents(f"jsonl:{tmp_path}/a.jsonl:text") == ["hello"]
    schema = pyarrow.schema({"text": pyarrow.string()})
    with pyarrow.parquet.ParquetWriter(tmp_path / "a.parquet", schema, store_schema=False) as file:
        file.write_table(pyarrow.table({"text": ["hello"]}))
        file.add_key_value_metadata({"about": "ten bytes."})
    small = (tmp_path / "a.parquet").read_bytes()
    size = int.from_bytes(small[-8:-4], "little")
    varint = bytes([0x81, 0xC2, 0xD7, 0x2F])  # 100,000,001
    footer = small[-8 - size : -8].replace(b"\x0aten bytes.", varint + b"a" * 100_000_001)
    (tmp_path / "a.parquet").write_bytes(small[: -8 - size] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(OSError, match="size limit"):
        pyarrow.parquet.ParquetFile(tmp_path / "a.parquet")
    assert documents(f"parquet:{tmp_path}/a.parquet:text") == ["hello"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_compressed_file_is_refused(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    noise = np.random.default_rng(0).integers(97, 123, 100_000, np.uint8).tobytes()
    path.write_bytes(intact := compressed(suffix, noise, b"second member"))
    assert len(documents(f"text:{path}")[0]) == 100_013
    flipped = intact[:100] + bytes([intact[100] ^ 255]) + intact[101:] if suffix == ".gz" else b"nonsense" + intact
    for damaged in (intact[:-3], intact[:30_000], intact[:-21], intact + b"trailing", b"no archive", flipped):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"a{suffix} is damaged or not a {suffix} file") as error:
            documents(f"text:{path}")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_long_text_is_read_in_small_pieces(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr("sedd.data.source.LONGEST_PIECE", 1000)
    monkeypatch.setattr(files, "CHUNK", 777)
    text = "".join(f"Line {number} of é漢😀.\n" for number in range(1000))
    (tmp_path / f"a{suffix}").write_bytes(compressed(suffix, text.encode()) if suffix else text.encode())
    pieces = list(open_source(f"text:{tmp_path}/a*"))
    assert "".join(piece.text for piece in pieces) == text
    assert max(len(piece.text) for piece in pieces) <= 1000 and all(piece.text.endswith("\n") for piece in pieces)
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    (document,) = open_source(f"text:{tmp_path}/a*").read()
    assert max(map(len, document)) <= 777


def test_reading_a_file_in_parts_takes_little_memory(tmp_path):
    """157 MB of text, a few kilobytes when compressed. Control: the text as one string."""
    frame = zstandard.ZstdCompressor().compress(b"a line of text\n" * 2**20)
    (tmp_path / "a.zst").write_bytes(frame * 10)
    source = open_source(f"text:{tmp_path}/a.zst")

    def peak(read):
        tracemalloc.start()
        assert read() == 10 * 15 * 2**20
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak_bytes

    streamed = peak(lambda: sum(len(piece.text) for piece in source))
    joined = peak(lambda: len("".join([piece.text for piece in source])))
    assert streamed < 50e6 < 150e6 < joined


# Errors

FILES = {
    "latin.txt": b"good\ncaf\xe9 noir",
    "cut.txt": "é".encode()[:1],
    "empty": b"",
    "blank.jsonl": b"\n \n",
    "a.jsonl": b'{"title": "a", "texts": "b", "n": 1, "none": null}\n{"title": "\\ud800x"}\n',
    "wrong.jsonl": b'{"text": "a"}\n\n{"text": \n',
    "list.jsonl": b'["text"]\n',
    "a.csv": b"id,title,texts\n1,a,b\n2,a\n",
    "many.csv": ",".join(f"c{number}" for number in range(20)).encode(),
    "quotes.csv": b'text\n"a"b\n',
    "open.csv": b'text\n"a\n',
    "header.csv": b"text,id\n",
    "no.parquet": b"PAR1 nonsense",
}


@pytest.fixture(scope="module")
def invalid_files(tmp_path_factory, datasets):
    """A folder of invalid files."""
    folder = tmp_path_factory.mktemp("invalid")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    write_parquet(folder / "a.parquet", ["a"] * 100 + [None])
    write_parquet(folder / "empty.parquet", [])
    latin = pyarrow.array([b"a", b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": latin}), folder / "latin.parquet")
    write_parquet(folder / "cut.parquet", HARD * 10)
    (folder / "cut.parquet").write_bytes((folder / "cut.parquet").read_bytes()[:-30])
    (folder / "tiny").symlink_to(datasets / "tiny" / "1.0.0")
    (folder / "records").mkdir()
    for path in (folder / "tiny").glob("*.json"):
        (folder / "records" / path.name).write_text(path.read_text().replace("array_record", "tfrecord"))
    return folder


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "web:all",
            r"unknown source 'web:all'; write text:GLOB, .*builtin:functions",
        ),
        ("builtin:poems", "unknown source 'builtin:poems'"),
        ("", "unknown source ''"),
        ("text:{}/none/*.txt", "no file matches '.*none/.*change the pattern after 'text:'"),
        ("text:{}/latin.txt", "latin.txt is not UTF-8: the byte at position 8 is invalid; convert it"),
        ("lines:{}/latin.txt", "latin.txt is not UTF-8: the byte at position 8 is invalid; convert it"),
        ("text:{}/cut.txt", "cut.txt is not UTF-8: the byte at position 0 is invalid"),
        ("jsonl:{}/a.jsonl", "does not say which field holds the text; write jsonl:GLOB:FIELD"),
        ("csv:{}/a.csv:", "does not say which column holds the text; write csv:GLOB:COLUMN"),
        ("jsonl:{}/a.jsonl:text", r"a.jsonl, line 1: no field 'text'; there are texts, title, none, n"),
        ("jsonl:{}/a.jsonl:n", "a.jsonl, line 1: the field 'n' is of type int, not text"),
        (
            "jsonl:{}/a.jsonl:none",
            "a.jsonl, line 1: the field 'none' is null; leave the row out, or write an empty text",
        ),
        ("jsonl:{}/a.jsonl:title", r"a.jsonl, line 2: the field 'title' contains '\\ud800', not a character"),
        ("jsonl:{}/wrong.jsonl:text", "wrong.jsonl, line 3 is not JSON"),
        ("jsonl:{}/list.jsonl:text", "list.jsonl, line 1 is not a JSON object with fields, but of type list"),
        ("jsonl:{}/empty:text", "empty has no lines; leave the file out"),
        ("jsonl:{}/blank.jsonl:text", "blank.jsonl has no lines"),
        ("csv:{}/a.csv:text", "a.csv, the header: no column 'text'; there are texts, title, id"),
        ("csv:{}/many.csv:d", "there are (c[0-9]+, ){{10}}...$"),
        ("csv:{}/a.csv:title", "a.csv, line 3: 2 fields, but the header has 3"),
        ("csv:{}/quotes.csv:text", "quotes.csv, line 2: .*; correct the quotes"),
        ("csv:{}/open.csv:text", "open.csv, line 2: unexpected end of data; correct the quotes"),
        ("csv:{}/empty:text", "empty is empty: it has no header"),
        ("csv:{}/header.csv:text", "header.csv has no rows below its header"),
        ("parquet:{}/a.parquet:texts", "a.parquet: no column 'texts'; there are text, id"),
        ("parquet:{}/a.parquet:id", "a.parquet: the column 'id' is of type int64, not text"),
        ("parquet:{}/a.parquet:text", "a.parquet, row 101: the column 'text' is null"),
        ("parquet:{}/latin.parquet:text", "latin.parquet, row 2: the column 'text' is not UTF-8"),
        ("parquet:{}/empty.parquet:text", "empty.parquet has no rows"),
        ("parquet:{}/no.parquet:text", "no.parquet is damaged or not a Parquet file"),
        ("parquet:{}/cut.parquet:text", "cut.parquet is damaged or not a Parquet file"),
        ("tfds:", r"names no data set; write tfds:NAME\[:SPLIT\[:FIELD\]\]"),
        ("tfds:no_such_data", "tfds:no_such_data: no data set of that name and no such folder"),
        ("tfds:../x y", r"tfds:../x y: "),
        ("tfds:{}", "holds no readable dataset_info.json; name the folder of a version"),
        ("tfds:tiny", 'tfds:tiny is not prepared in .*; prepare it with file_format="array_record"'),
        ("tfds:{}/records", 'records is stored as tfrecord; prepare it with file_format="array_record"'),
        ("tfds:{}/tiny:valid", "tiny: no split 'valid'; there are train, test"),
        ("tfds:{}/tiny:train[oo]", r"tiny: no split 'train\[oo\]'; there are train, test"),
        ("tfds:{}/tiny:train:texts", "tiny: no field 'texts'; there are text, other"),
        ("tfds:{}/tiny:train:number", "tiny:train:number, record 1: the field 'number' is of type int, not text"),
        ("tfds:{}/tiny:train:broken", "record 1: the field 'broken' is not UTF-8 at byte 3"),
    ],
)
def test_an_invalid_source_gives_a_one_line_error(spec, message, invalid_files):
    with pytest.raises(UserError, match=message.replace("{{", "{").replace("}}", "}")) as error:
        documents(spec.format(invalid_files))
    assert "\n" not in str(error.value)


def test_the_position_of_an_invalid_byte_is_exact(tmp_path, monkeypatch):
    """Also after the first part, where a part ends within a character, and in a compressed file."""
    monkeypatch.setattr(files, "CHUNK", 10)
    for good in ("a" * 25, "é" * 15, "aé" * 15, "a" * 29 + "漢"):
        data = good.encode() + b"\xff" + b"more"
        (tmp_path / "a").write_bytes(data)
        (tmp_path / "a.gz").write_bytes(gzip.compress(data))
        with pytest.raises(UserError, match=f"a is not UTF-8: the byte at position {len(data) - 5} is invalid"):
            documents(f"text:{tmp_path}/a")
        with pytest.raises(UserError, match=f"position {len(data) - 5} of its text is invalid"):
            documents(f"text:{tmp_path}/a.gz")


def test_a_deleted_file_gives_a_one_line_error(tmp_path):
    (tmp_path / "a").write_text("a")
    source = open_source(f"text:{tmp_path}/a")
    (tmp_path / "a").unlink()
    with pytest.raises(UserError, match="a cannot be read: No such file"):
        list(source)
