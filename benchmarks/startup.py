"""Start-up time: the import, the command line, and a run's first step, with and without compiled programs on disk.

    python benchmarks/startup.py

Each figure is the wall time of a process of its own, the median of --repeats. The run is the first step of `sedd
quickstart`'s config on text that every Python installation has, its folder and checkpoint included.
JAX_COMPILATION_CACHE_DIR names the folder of compiled programs; on TPUs and GPUs sedd has one by default.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = Path(__file__).parent.parent / "experiments" / "quickstart.py"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    python, sedd = [sys.executable, "-c"], [sys.executable, "-m", "sedd"]
    with tempfile.TemporaryDirectory() as folder:
        corpus = f"{folder}/corpus"
        run([*sedd, "prepare", "--source=builtin:names", "--tokenizer=bytes", f"--out={corpus}"])
        print("command                                   seconds")
        report("import jax", args.repeats, lambda _: run([*python, "import jax"]))
        report("import sedd", args.repeats, lambda _: run([*python, "import sedd"]))
        report("sedd --help", args.repeats, lambda _: run([*sedd, "--help"]))
        train = [*sedd, "train", f"--config={CONFIG}", f"--config.data.corpus={corpus}", "--config.training.steps=1"]

        def first_step(compiled: str) -> float:
            with tempfile.TemporaryDirectory() as workdir:
                return run([*train, f"--workdir={workdir}/run"], compiled)

        report("first step, nothing compiled", args.repeats, lambda number: first_step(f"{folder}/compiled{number}"))
        report("first step, compiled before", args.repeats, lambda _: first_step(f"{folder}/compiled0"))


def run(command: list[str], compiled: str | None = None) -> float:
    """Runs a command. Returns its wall time in seconds."""
    environment = os.environ | ({} if compiled is None else {"JAX_COMPILATION_CACHE_DIR": compiled})
    start = time.perf_counter()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return time.perf_counter() - start


def report(name: str, repeats: int, measure):
    """Prints the median of measure(number), seconds."""
    print(f"{name:40} {statistics.median(measure(number) for number in range(repeats)):8.1f}", flush=True)


if __name__ == "__main__":
    main()
