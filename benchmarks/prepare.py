"""Speed and memory of `sedd prepare`, and its result after an interruption.

    python benchmarks/prepare.py --megabytes=200

Generates text in a temporary folder, prepares it with one thread and with one thread per core, kills a third
preparation half-way (SIGKILL) and resumes it. Prints seconds, megabytes of text a second and peak memory of each, and
compares the hashes of the corpora.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import sedd
from sedd.data.sources import open_source

WORDS = 30_000  # number of words; the distribution is Zipf's
FILE = 10_000_000  # characters


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--tokenizer", default="sentencepiece:8000")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = generate(folder / "text", args.megabytes)
        print(f"{size / 1e6:.0f} MB of text, --tokenizer={args.tokenizer}", flush=True)
        hashes = set()
        for workers in sorted({1, os.cpu_count()}):
            out = folder / f"workers{workers}"
            seconds, memory = measured(command(folder, out, args.tokenizer, workers))
            hashes.add(sedd.open_corpus(out).hash)
            report(f"{workers} workers", seconds, memory, size)
        out = folder / "killed"
        killed_after, memory = measured(command(folder, out, args.tokenizer, os.cpu_count()), until=seconds / 2)
        report("killed half-way", killed_after, memory, None)
        seconds, memory = measured(command(folder, out, args.tokenizer, os.cpu_count()))
        hashes.add(sedd.open_corpus(out).hash)
        report("resumed", seconds, memory, None)
        print("the corpora are identical" if len(hashes) == 1 else f"THE CORPORA DIFFER: {hashes}")


def generate(folder: Path, megabytes: int) -> int:
    """Writes JSON lines with documents of about a thousand characters. Returns the bytes of their text."""
    folder.mkdir()
    random = np.random.default_rng(0)
    names = sorted({word.lower() for piece in open_source("builtin:names") for word in piece.text.split()})
    words = np.array([*names, *("".join(pair) for pair in random.choice(names, (WORDS, 2)))][:WORDS])
    weights = 1 / np.arange(2, WORDS + 2)
    size = 0
    for number in range(megabytes * 1_000_000 // FILE):
        text = " ".join(random.choice(words, FILE // 6, p=weights / weights.sum()))[:FILE]
        with open(folder / f"{number:04}.jsonl", "w") as file:
            for start in range(0, len(text), 1000):
                file.write(json.dumps({"text": text[start : start + 1000]}) + "\n")
        size += len(text)
    return size


def command(folder: Path, out: Path, tokenizer: str, workers: int) -> list[str]:
    source = f"--source=jsonl:{folder}/text/*.jsonl:text"
    return [
        *(sys.executable, "-m", "sedd.cli", "prepare"),
        *(source, f"--tokenizer={tokenizer}", f"--out={out}", f"--workers={workers}"),
    ]


def measured(argv: list[str], until: float | None = None) -> tuple[float, int]:
    """Returns seconds and peak bytes of memory (Linux) of a process, which is killed after `until` seconds."""
    start, memory = time.monotonic(), 0
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (until is None or time.monotonic() - start < until):
        status = Path(f"/proc/{process.pid}/status").read_text()
        memory = max([memory, *(int(kilobytes) * 1024 for kilobytes in re.findall(r"VmHWM:\s*(\d+)", status))])
        time.sleep(0.05)
    if process.returncode is None:
        process.kill()
        process.wait()
    elif process.returncode:
        sys.exit(f"{' '.join(argv)} failed")
    return time.monotonic() - start, memory


def report(label: str, seconds: float, memory: int, size: int | None):
    rate = "" if size is None else f"{size / 1e6 / seconds:6.2f} MB of text a second"
    print(f"{label:16} {seconds:6.1f} s  {memory / 1e6:6.0f} MB of memory at peak  {rate}", flush=True)


if __name__ == "__main__":
    main()
