"""Times the parts of a training step on a CPU, and computes the least time that each could take.

    python benchmarks/step_parts.py --sizes=512x6x256x1024x8
    python benchmarks/step_parts.py --recipe="mask counts"

The step is that of benchmarks/training.py. Its operations are timed by JAX's profiler over --steps steps and summed by
the part of the network that they come from. Operations that run at the same time are both counted; the products for
the gradients of the weights run on threads that the profiler does not see: `not traced` is the time of a step less the
sum of the others.

The floor of products is their FLOPs over the rate of a large product, that of the other parts the arrays that they have
to read and write over the bandwidth of a sum of two large arrays, both measured here.
"""

import argparse
import collections
import gzip
import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from training import COUNTS, RECIPES, Ours, Size

from sedd.runtime.settings import jax_defaults

PARTS = {  # by name: a pattern of the names of its operations; the first that matches counts
    "update": r"/cond/",
    "attention": r"/attention/",
    "dropout": r"/dropout/",
    "norms, modulation": r"/norm|modulation",
    "linear maps": r"Trunk.*/(qkv|out|up|down)/.*dot_general",
    "GELU, gates, biases": r"Trunk",
    "head, loss": r"Head|vmap|sort|reduce|select",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="512x6x256x1024x8", help="as of benchmarks/training.py")
    parser.add_argument("--recipe", default=COUNTS, choices=tuple(RECIPES))
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    flops, bandwidth = product_rate(), copy_rate()
    print(f"a large product: {flops / 1e9:.0f} GFLOP/s; a sum of large arrays: {bandwidth / 1e9:.1f} GB/s")
    for size in map(Size.parse, args.sizes.split()):
        with jax_defaults():
            report(size, Ours(size, "float32", args.recipe), args, flops, bandwidth)


def report(size: Size, program: Ours, args: argparse.Namespace, flops: float, bandwidth: float):
    """Prints the table of one size."""
    program.train(2)
    start = time.perf_counter()
    program.train(args.steps)
    step = (time.perf_counter() - start) / args.steps
    seconds = traced(program, args.steps)
    floors = {**products(size, flops), **passes(size, program, bandwidth)}
    print(f"\n{size}, {args.recipe}\npart                      ms    floor")
    for part in [*PARTS, "others"]:
        floor = f"{floors[part] * 1e3:8.0f}" if part in floors else ""
        print(f"{part:20} {seconds[part] * 1e3:7.0f} {floor}")
    print(f"{'not traced':20} {(step - sum(seconds.values())) * 1e3:7.0f}")
    print(f"{'a step':20} {step * 1e3:7.0f} {sum(floors.values()) * 1e3:8.0f}")


def products(size: Size, rate: float) -> dict[str, float]:
    """The floors of parts that are products, in seconds: forward once, twice for the gradient."""
    tokens = size.rows * size.length
    sites = size.rows * (size.length + 1) // 2  # the masked ones, of noise by times about as many
    maps = 3 * 2 * tokens * size.layers * 12 * size.width**2
    attention = 7 * 2 * tokens * size.layers * size.length * size.width  # its gradient computes the weights again
    head = 3 * 2 * sites * size.width * size.vocab_size
    return {"linear maps": maps / rate, "attention": attention / rate, "head, loss": head / rate}


def passes(size: Size, program: Ours, bandwidth: float) -> dict[str, float]:
    """The floors of parts that are passes over arrays, in seconds."""
    array = 4 * size.rows * size.length * size.width * size.layers  # of each layer
    return {
        "norms, modulation": 2 * 5 * array / bandwidth,  # forward x and y; backward x, and the gradients of both
        "GELU, gates, biases": (4 * 5 + 2 * 6) * array / bandwidth,
        "update": (5 + 4) * 4 * program.num_parameters / bandwidth,  # of parameters, moments, EMA and gradients
    }


def traced(program: Ours, steps: int) -> collections.Counter:
    """The seconds of the operations of a step by part."""
    text = program.compiled().as_text()
    names = dict(re.findall(r'%?([\w.\-]+) = [^\n]*op_name="([^"]+)"', text))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            program.train(steps)
        (file,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    seconds: collections.Counter = collections.Counter()
    for event in events:
        operation = event.get("args", {}).get("hlo_op")
        if event.get("ph") == "X" and operation and not operation.startswith(("while", "call", "conditional")):
            seconds[part_of(names.get(operation, ""))] += event["dur"] / 1e6 / steps
    return seconds


def part_of(name: str) -> str:
    """The part of an operation with this name."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name)), "others")


def product_rate(size: int = 2048) -> float:
    """FLOP/s of a product of two square matrices."""
    matrix = jnp.ones((size, size))
    return 2 * size**3 / fastest(jax.jit(jnp.matmul), matrix, matrix)


def copy_rate(size: int = 2**26) -> float:
    """Bytes a second of a sum of two arrays."""
    array = jnp.ones(size)
    return 3 * 4 * size / fastest(jax.jit(jnp.add), array, array)


def fastest(function: Callable, *arguments, calls: int = 8) -> float:
    """Seconds of the fastest of `calls` calls."""
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
