"""Output of a command if stdout or stderr is full, closed or ASCII."""

import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sedd.runtime import streams

TEXT = "Grüße, 漢字\n"


class Full(io.StringIO):
    """A stream on a full disk. room: number of writes that succeed."""

    def __init__(self, room=0):
        super().__init__()
        self.room = room

    def write(self, text):
        self.room -= 1
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(text)


class Broken(io.StringIO):
    """A pipe without a reader."""

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a program, by default one that prints three times, with a stdout. Returns exit status and stderr."""
    monkeypatch.chdir(tmp_path)

    def run_with(stdout, stderr=None, program=None):
        stderr = io.StringIO() if stderr is None else stderr
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        status = streams.run(program or (lambda: [print(TEXT, end="") for _ in range(3)] and 0))
        assert (sys.stdout, sys.stderr) == (stdout, stderr)
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        return status, stderr.getvalue() if isinstance(stderr, io.StringIO) else None

    return run_with


@pytest.mark.parametrize("room", [0, 1])
def test_results_go_to_a_file_if_stdout_is_full(run, room):
    """All of them, including those written before the disk was full."""
    status, err = run(Full(room))
    (file,) = Path().glob("sedd-results-*.txt")
    assert file.read_text(encoding="utf-8") == 3 * TEXT
    assert (status, err) == (
        2,
        f"sedd: error: stdout cannot be written (No space left on device); the results are in {file.absolute()}\n",
    )


def test_results_go_to_stderr_if_no_file_can_be_written(run, monkeypatch):
    monkeypatch.setattr(streams.tempfile, "mkstemp", lambda *_: Full().write(""))
    status, err = run(Full())
    assert status == 2 and err.endswith(f"the results are these\n{3 * TEXT}\n") and not list(Path().iterdir())


def test_results_are_saved_after_an_exception(run):
    def program():
        print(TEXT, end="")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(Full(), program=program)
    assert [file.read_text(encoding="utf-8") for file in Path().iterdir()] == [TEXT]


def test_a_reader_that_ends_early_ends_the_program(run):
    assert run(Broken()) == (0, "") and not list(Path().iterdir())


def test_characters_that_an_encoding_lacks_are_replaced(run):
    ascii = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert run(ascii) == (0, "")
    assert ascii.buffer.getvalue().decode() == 3 * "Gr??e, ??\n"


@pytest.mark.parametrize("stderr", [Full(), Broken()])
def test_errors_of_stderr_are_ignored(run, stderr):
    def program():
        print("progress", file=sys.stderr)
        print(TEXT, end="")
        return 0

    results = io.StringIO()
    assert run(results, stderr, program) == (0, "") and results.getvalue() == TEXT


def test_a_closed_stdout_is_refused_before_the_program_starts(run):
    status, err = run(None, program=lambda: 1 / 0)
    assert (status, err) == (2, "sedd: error: stdout is closed; send the results somewhere, as in > FILE\n")


@pytest.mark.parametrize("code, status, err", [(None, 0, ""), (3, 3, ""), ("why", 1, "why\n")])
def test_the_exit_status_is_that_of_the_program(run, code, status, err):
    assert run(io.StringIO(), program=lambda: sys.exit(code)) == (status, err)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_full_and_closed_file_descriptors(tmp_path):
    """stdout full or closed, stderr also closed: no traceback, also not at exit of the interpreter."""
    code = """
import os, sys
import streams
def program():
    print("result", flush=True)
    with open("file", "w") as file:  # must not get a closed descriptor 0, 1 or 2
        print("progress", file=sys.stderr)
        os.write(2, b"progress\\n")
        file.write("text")
    return 0
sys.exit(streams.run(program))
"""
    (tmp_path / "program.py").write_text(code)
    redirections = ("> /dev/full", ">&-", "<&- 2>&-")
    runs = [f"{sys.executable} program.py {redirection}; echo $? >&2" for redirection in redirections]
    environment = {**os.environ, "PYTHONPATH": str(Path(streams.__file__).parent)}  # so that no JAX is imported
    command = ["bash", "-c", "; ".join(runs)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    full, closed = [line for line in done.stderr.splitlines() if line.startswith("sedd")]
    assert "the results are in" in full and "stdout is closed" in closed
    assert re.findall(r"^\d$", done.stderr, re.M) == ["2", "2", "0"] and "Exception" not in done.stderr
    assert done.stdout == "result\n" and (tmp_path / "file").read_text() == "text"
