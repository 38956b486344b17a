"""Folders and paths: locks, names of folders, path resolution, and errors of the disk and of memory."""

import contextlib
import errno
import json
import os
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import small_config, small_corpus, untrained_model, write_files

import sedd
from sedd import config as configs
from sedd.cli import main
from sedd.data.sources import open_source
from sedd.runtime import disk, folders, storage
from sedd.training.checkpoint import Checkpoints, restore_params, steps_saved
from sedd.training.fit import fit
from sedd.training.step import TrainState

HOSTILE = "lr[0.1] *?%23#~:,=;&'\"é日"
TEXT = ["the 7 times table: 7, 14, 21, 28. " * 100]
SETTINGS = dict(split="validation", draws=2, batch_size=8, progress=False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def model(corpus):
    return untrained_model(corpus)


def refusal(call, *args, **settings):
    """Returns the one line of a UserError."""
    with pytest.raises(sedd.UserError) as caught:
        call(*args, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@contextlib.contextmanager
def max_file_size(size):
    """A disk on which a file has at most `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_second_job_in_a_folder_is_refused(corpus, model, tmp_path, capsys):
    """By every command that writes a folder; no file is left."""
    folder, source = tmp_path / "r", write_files(tmp_path / "text", TEXT)
    model.save(tmp_path / "model")
    calls = [
        lambda: model.perplexity(corpus, out=folder, **SETTINGS),
        lambda: model.compare(model, corpus, out=folder, **SETTINGS),
        lambda: model.save(folder),
        lambda: fit(small_config(corpus), folder),
    ]
    sweep = ["sweep", f"--model={tmp_path}/model", f"--out={folder}"]
    several = ["eval", f"--model={tmp_path}/model", "--protocol=clean,mdlm", f"--out={folder}"]
    with folders.locked(storage.folder_of(folder)):
        for call in calls:
            assert f"another process is at work in {folder} (process {os.getpid()} on " in refusal(call)
        for command in (sweep, several):
            assert main(command) == 2 and "another process is at work in" in capsys.readouterr().err
        assert os.listdir(folder) == [disk.LOCK]
    with disk.locked(tmp_path / ".r.preparing"):
        assert "another process is at work" in refusal(sedd.prepare, source, "bytes", folder, split="position:80,10,10")
    assert os.listdir(folder) == []


def test_a_folder_belongs_to_the_job_whose_description_it_holds(tmp_path):
    """An empty folder belongs to none; lock, probe and partial files do not count."""
    file = storage.folder_of(tmp_path / "r") / "job.json"

    def description(differences=()):
        return folders.existing_description(
            file, "job", "--out", lambda file: {"name": file.name}, lambda _: differences
        )

    assert description() is None
    (tmp_path / "r").mkdir()
    for name in (disk.LOCK, "job.json.part", f"{storage.PROBE}1"):
        (tmp_path / "r" / name).touch()
    assert description() is None
    (tmp_path / "r/letter.txt").touch()
    assert refusal(description) == f"{tmp_path}/r is not empty and holds no job; choose another --out"
    file.touch()
    assert description() == {"name": "job.json"}
    message = f"{tmp_path}/r holds another job: its seed differs, its text differs; choose another --out"
    assert refusal(description, ["its seed differs", "its text differs"]) == message
    disk.clear(file.parent)
    assert os.listdir(tmp_path / "r") == [disk.LOCK]


def test_the_lock_file_of_a_killed_job_does_not_block(corpus, model, tmp_path):
    """The next job removes it."""
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / disk.LOCK).write_text("process 1 on another machine")
    model.perplexity(corpus, out=tmp_path / "r", **SETTINGS)
    assert sorted(os.listdir(tmp_path / "r")) == ["draws.f32", "job.json", "report.json"]


def twice(records):
    return np.concatenate([records, records])


def in_another_order(records):
    """The file after two jobs that start at the same row append to it."""
    return np.concatenate([records[:4], records[:4], records[4:-4]])


@pytest.mark.parametrize("fault, message", [(twice, "and this evaluation has"), (in_another_order, "of row 4; remove")])
def test_a_record_that_two_jobs_wrote_is_refused(corpus, model, tmp_path, fault, message):
    """It would give a wrong number. Control: the file of one job is accepted."""
    report = model.perplexity(corpus, out=tmp_path / "r", **SETTINGS)
    assert model.perplexity(corpus, out=tmp_path / "r", **SETTINGS) == report
    file = tmp_path / "r/draws.f32"
    records = np.fromfile(file, np.float32).reshape(report.rows, -1)
    fault(records).tofile(file)
    assert message in refusal(model.perplexity, corpus, out=tmp_path / "r", **SETTINGS)


def state_of(value, step):
    params = {"layer": {"kernel": jnp.full((4, 3), value), "bias": jnp.arange(3.0)}}
    return TrainState(jnp.int32(step), params, None, {"count": jnp.int32(step)})


LIKE = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state_of(0.0, 0))
NAMES = [HOSTILE, "**", "[!a]", "a.orbax-checkpoint-tmp", "7", " ", "a" * 200]


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_in_a_folder_of_any_name(tmp_path, name):
    """They are restored, and older ones removed; a name is not read as a pattern."""
    (tmp_path / "laa/1.orbax-checkpoint-tmp").mkdir(parents=True)  # would match the pattern [!a]
    folder = storage.folder_of(tmp_path / name)
    config = configs.default().checkpoint
    config.keep = 1
    with Checkpoints(folder, config) as saved:
        saved.save(state_of(1.0, 1))
    with Checkpoints(folder, config) as saved:
        assert int(saved.restore(LIKE).step) == 1
        saved.save(state_of(2.0, 2))
    assert steps_saved(folder) == [2]
    assert float(restore_params(folder, LIKE.params, ema=False)["layer"]["kernel"][0, 0]) == 2.0


@pytest.mark.parametrize("name", ["a\\b", "a\nb", "a\tb", "a\udcffb", "gs://bucket/lr[0.1]", "gs://bucket/a*"])
def test_names_that_a_library_misreads_are_refused(corpus, tmp_path, monkeypatch, name):
    """Before the first step; in a bucket also patterns, which would remove objects of other folders."""
    monkeypatch.chdir(tmp_path)
    assert "in the name of a folder is misread; choose another name" in refusal(fit, small_config(corpus), name)
    assert os.listdir(tmp_path) == []


def test_a_source_is_a_pattern_only_if_no_file_has_that_name(tmp_path):
    for name in ("data[1].txt", "data1.txt"):
        (tmp_path / name).write_text(name)
    for name in ("data[1].txt", "data1.txt"):
        assert [path.name for path in open_source(f"text:{tmp_path}/{name}").files] == [name]
    (tmp_path / "data[1].txt").unlink()
    assert [path.name for path in open_source(f"text:{tmp_path}/data[1].txt").files] == ["data1.txt"]


@pytest.mark.slow
def test_a_run_in_a_folder_of_any_name_finds_its_corpus_from_anywhere(tmp_path, monkeypatch, capsys):
    """The corpus is given as a relative path. If it was moved, the error is one line."""
    home = tmp_path / "home"
    (home / HOSTILE).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / HOSTILE)
    corpus = small_corpus(tmp_path)
    os.rename(corpus.path, "mine")
    config = small_config(sedd.open_corpus("mine"), "data.corpus=mine")
    fit(config, f"~/{HOSTILE}/run")
    monkeypatch.chdir(tmp_path)
    run = f"~/{HOSTILE}/run"
    assert main(["eval", f"--model={run}", "--draws=2", f"--out=~/{HOSTILE}/result", "--batch_size=8"]) == 0
    assert (home / HOSTILE / "result/profile.png").is_file() and not (tmp_path / "~").exists()
    model = sedd.load(run)
    model.save("~/exported")
    same = sedd.load(home / "exported")
    jax.tree.map(np.testing.assert_array_equal, same.params, model.params)
    os.rename(home / HOSTILE / "mine", home / "moved")
    capsys.readouterr()
    assert main(["eval", f"--model={run}", "--draws=2"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert f"{HOSTILE}/mine" in line and line.endswith("give its folder as --data=FOLDER")


def test_paths_are_resolved_in_one_way(tmp_path, monkeypatch):
    """`~` is the home, also in Python and in tokenizers, corpora, samples and judges; a bucket is no folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert disk.absolute("~/a/../b") == disk.absolute("b") == f"{tmp_path}/b"
    assert disk.absolute("./~") == f"{tmp_path}/~" and disk.absolute("gs://a/b") == "gs://a/b"
    assert "a path is empty" in refusal(sedd.load, "")
    assert "there is no user absent" in refusal(sedd.load, "~absent/x")
    assert "pathlib drops a slash" in refusal(sedd.load, tmp_path.__class__("gs://bucket/run"))
    write_files(tmp_path / "text", TEXT)
    corpus = sedd.prepare("text:~/text/*.txt", "bytes", "~/corpus", split="position:80,10,10")
    assert corpus.path == tmp_path / "corpus" and sedd.open_corpus("~/corpus").hash == corpus.hash
    corpus.tokenizer.save("~/tokenizer")
    assert sorted(os.listdir(tmp_path)) == ["corpus", "text", "tokenizer"]


def test_calls_resume_after_a_full_disk(corpus, model, tmp_path):
    """The error is one line; later the same call resumes, and its result is the same."""
    report = model.perplexity(corpus, **SETTINGS)
    with max_file_size(1500):
        line = refusal(model.perplexity, corpus, out=tmp_path / "r", **SETTINGS)
        assert "(File too large); make room there" in line and line.endswith("what is scored is kept")
        assert "make room there" in refusal(model.save, tmp_path / "model")
        source = write_files(tmp_path / "text", ["short"])
    assert (tmp_path / "r/draws.f32").stat().st_size > 0 and os.listdir(tmp_path / "model") == []
    assert model.perplexity(corpus, out=tmp_path / "r", **SETTINGS) == report
    model.save(tmp_path / "model")
    source = write_files(tmp_path / "text", TEXT)
    with max_file_size(1500):
        line = refusal(sedd.prepare, source, "bytes", tmp_path / "corpus", split="position:80,10,10")
        assert "make room there" in line and line.endswith("what is done is kept")
    assert (tmp_path / ".corpus.preparing/scan.json").is_file()
    sedd.prepare(source, "bytes", tmp_path / "corpus", split="position:80,10,10")
    assert not (tmp_path / ".corpus.preparing").exists()


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path):
    """The write fails in a thread of Orbax; the error is raised at the end at the latest."""
    folder = storage.folder_of(tmp_path / "checkpoints")
    config = configs.default().checkpoint
    with Checkpoints(folder, config) as saved:
        saved.save(state_of(1.0, 1))
    with max_file_size(64), pytest.raises(sedd.UserError, match="could not be written .*; earlier ones are kept"):
        with Checkpoints(folder, config) as saved:
            saved.save(state_of(2.0, 2))
    assert os.listdir(folder) == ["1"]
    with Checkpoints(folder, config) as saved:
        assert int(saved.restore(LIKE).step) == 1
        saved.save(state_of(2.0, 2))
    assert steps_saved(folder) == [1, 2]


def test_a_file_in_place_of_a_folder_is_an_error(corpus, model, tmp_path, capsys):
    """One line and status 2, before sampling or scoring."""
    (tmp_path / "file").write_text("mine")
    source = write_files(tmp_path / "text", TEXT)
    model.save(tmp_path / "model")
    flags = [f"--config.data.corpus={corpus.path}", "--config.data.block_length=16"]
    for command in (
        ["prepare", f"--source={source}", "--tokenizer=bytes", f"--out={tmp_path}/file/corpus"],
        ["train", f"--workdir={tmp_path}/file/run", *flags],
        ["eval", f"--model={tmp_path}/model", f"--out={tmp_path}/file/report"],
        ["sweep", f"--model={tmp_path}/model", f"--out={tmp_path}/file"],
        ["sample", f"--model={tmp_path}/model", f"--html={tmp_path}/file/page.html"],
    ):
        assert main(command) == 2, command
        out, err = capsys.readouterr()
        (line,) = [line for line in err.splitlines() if line.startswith("sedd: error: ")]
        assert f"{tmp_path}/file" in line and "Traceback" not in err and out == ""
    assert "something else is in the way" in refusal(model.save, tmp_path / "file/model")
    assert (tmp_path / "file").read_text() == "mine"


def too_much(_):
    return jnp.zeros(10**13).block_until_ready()


def read_only(path):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


def no_memory(_):
    raise MemoryError("Unable to allocate 5 GiB")


@pytest.mark.parametrize(
    "fault, message",
    [
        (too_much, "the memory of the devices is too small"),
        (no_memory, "this machine's memory is too small (Unable to allocate 5 GiB)"),
        (read_only, "model cannot be used (Read-only file system); choose another place"),
    ],
)
def test_errors_of_disk_and_memory_are_one_line(monkeypatch, capsys, fault, message):
    """Those of memory name the setting to change; other exceptions are not caught."""
    monkeypatch.setattr("sedd.loading.load", lambda path, *_: fault(path))
    flags = {"sample": ["--model=model"], "train": ["--init_from=model", "--workdir=none"]}
    for command, words in (("sample", "--batch_size"), ("train", "training.accumulation, or set network.remat")):
        assert main([command, *flags[command]]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("sedd: error: ") and message in line and (words in line or fault is read_only)
    monkeypatch.setattr("sedd.loading.load", lambda path, *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["sample", "--model=model"])


def test_a_file_is_written_atomically(tmp_path):
    """A failed write leaves the older file."""
    disk.write_text_atomic(tmp_path / "a.json", json.dumps({"a": 1}))
    with max_file_size(64), pytest.raises(OSError):
        disk.write_text_atomic(tmp_path / "a.json", "x" * 100)
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1} and os.listdir(tmp_path) == ["a.json"]
