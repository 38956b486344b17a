"""How the time and the memory of a training step grow with the length, the vocabulary, the width and the batch.

    python benchmarks/growth.py

From one size, `--base`, each of the four is varied alone. Seconds are those of the fastest of three steps; memory is
that of the compiled step's arrays beside its state, by the compiler's own analysis. The exponents are the slopes of
straight lines through the logarithms of the upper half of the values: 1 is in proportion. A series stops at the first
size that takes more than --seconds a step or more than --memory GB.
"""

import argparse
import dataclasses

import numpy as np
from step_parts import fastest
from training import COUNTS, RECIPES, Ours, Size

from sedd.runtime.settings import jax_defaults

SERIES = {
    "length": (128, 256, 512, 1024, 2048, 4096),
    "vocab_size": (256, 1024, 4096, 16384, 65536, 131072),
    "width": (64, 128, 256, 512, 1024),
    "rows": (2, 4, 8, 16, 32, 64),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Size.parse, default=Size.parse("256x2x256x1024x4"))
    parser.add_argument("--recipe", default=COUNTS, choices=tuple(RECIPES))
    parser.add_argument("--seconds", type=float, default=15, help="of a step, at most")
    parser.add_argument("--memory", type=float, default=12, help="GB, at most")
    args = parser.parse_args()
    print(f"{args.base}, {args.recipe}: width x layers x tokens of a row x vocabulary x rows")
    with jax_defaults():
        for name, values in SERIES.items():
            series(name, values, args)


def series(name: str, values: tuple[int, ...], args: argparse.Namespace):
    """Measures the sizes with these values of one field, and prints them and the exponents."""
    print(f"\n{name:>10}   seconds  memory, GB", flush=True)
    figures = []
    for value in values:
        program = Ours(dataclasses.replace(args.base, **{name: value}), "float32", args.recipe)
        memory = program.compiled().memory_analysis().temp_size_in_bytes / 1e9
        if memory > args.memory:
            print(f"{value:10,} needs {memory:.1f} GB")
            break
        program.train(1)
        figures.append((value, fastest(program.train, 1, calls=3), memory))
        print(f"{value:10,} {figures[-1][1]:9.3f} {memory:11.3f}", flush=True)
        if figures[-1][1] > args.seconds:
            print("the next would take too long")
            break
    if len(figures) > 1:
        last, *logarithms = np.log(figures[-(len(figures) + 1) // 2 :]).T
        print(" exponents" + "".join(f"{np.polyfit(last, of, 1)[0]:10.2f}" for of in logarithms))


if __name__ == "__main__":
    main()
