"""Speed of samplers, relative to a lower bound and to the analytic sampler of the reference.

    git clone https://github.com/louaaron/Score-Entropy-Discrete-Diffusion reference
    pip install torch einops omegaconf huggingface_hub
    python benchmarks/sampling.py --reference=reference                # random weights, three sizes, both programs
    python benchmarks/sampling.py --sizes= --model=runs/quickstart     # a trained model; no torch, no checkout

The first writes random weights in the published format, which both programs read, compares their log scores, and
samples with each unconditionally: absorbing process, log-linear noise, float32, all cores. The reference needs flash
attention, which requires a GPU: torch's scaled_dot_product_attention replaces it. Without --reference only this package
runs. The second compares unmasking samplers with Tweedie in --steps steps.

The floor of a sampler is its number of network calls times the time of one call, trunk and head at the positions that
the sampler evaluates. Compilation is excluded. Our times are the median of --repeats; the reference runs once, after
three warm-up steps.
"""

import argparse
import dataclasses
import functools
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from reference import Architecture, Reference, cores

import sedd
from sedd.diffusion import sampling
from sedd.diffusion.discrete.samplers import Tweedie
from sedd.diffusion.discrete.unmasking import Counts, FirstHitting
from sedd.diffusion.keyed_random import root_key

SIZES = "8x128x128x3x1024:128 8x128x128x3x1024:1024 4x256x256x4x32000:64"
COLUMNS = "sampler          calls   seconds  tokens/s  floor, s  of floor"


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of a batch, a network and a sampler, as in 8x128x128x3x1024:128."""

    batch: int
    length: int
    width: int
    layers: int
    vocab_size: int
    steps: int

    @classmethod
    def parse(cls, text: str) -> "Size":
        return cls(*map(int, text.replace(":", "x").split("x")))

    @property
    def architecture(self) -> Architecture:
        return Architecture(self.width, self.layers, self.length, self.vocab_size)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="checkout of louaaron/Score-Entropy-Discrete-Diffusion")
    parser.add_argument("--sizes", default=SIZES, help="each rows x tokens x width x layers x vocabulary : steps")
    parser.add_argument("--model", help="a trained model (absorbing process)")
    parser.add_argument("--steps", type=int, default=1024, help="number of Tweedie steps, with --model")
    parser.add_argument("--batch", type=int, default=8, help="rows of a batch, with --model")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"Python {platform.python_version()}, JAX {jax.__version__}, {cores()} cores, {jax.devices()[0].device_kind}")
    if args.reference:
        import torch

        print(f"torch {torch.__version__}")
    for size in map(Size.parse, args.sizes.split()):
        random_weights(size, args.reference, args.repeats)
    if args.model:
        model = sedd.load(args.model)
        print(f"\n{args.model}: {args.batch} x {model.block_length} tokens, V {model.process.vocab_size}")
        compare(model, args.batch, args.steps, args.repeats, {})


def random_weights(size: Size, reference: Path | None, repeats: int):
    """Compares the programs on random weights of one size."""
    print(
        f"\n{size.batch} x {size.length} tokens, width {size.width}, {size.layers} layers, V {size.vocab_size}, "
        f"T {size.steps}",
        flush=True,
    )
    random = np.random.default_rng(0)
    weights = size.architecture.random_weights(random)
    with tempfile.TemporaryDirectory() as folder:
        size.architecture.save(folder, weights)
        model = sedd.load(folder)
    peers = {}
    if reference:
        peer = Reference(reference, size.architecture, weights)
        tokens = random.integers(0, size.vocab_size + 1, (size.batch, size.length))
        sigma = np.linspace(0.1, 3.0, size.batch, dtype=np.float32)
        ours, theirs = np.asarray(model.log_score(tokens, sigma)), peer.log_score(tokens, sigma)
        difference = np.max(np.abs(ours - theirs))
        print(f"log scores of the two programs differ by {difference:.1e} at most, of {np.max(np.abs(theirs)):.1f}")
        peers["reference"] = (size.steps + 1, reference_seconds(peer, size))  # with its final denoising step
    compare(model, size.batch, size.steps, repeats, peers)


def compare(model: sedd.Model, batch: int, steps: int, repeats: int, peers: dict[str, tuple[int, float]]):
    """Prints a table of our samplers. peers: calls and seconds of others; speeds are relative to the first row."""
    process, length = model.process, model.block_length
    tweedie, counts = (kind(process, model.schedule, steps) for kind in (Tweedie, Counts))
    ours = {
        f"tweedie {steps}": (tweedie, tweedie.head_width(length)),
        f"counts {steps}": (counts, counts.head_width(length)),
        "first_hitting": (FirstHitting(process), 1),
    }
    first = None

    def row(name: str, calls: int, seconds: float, floor: float | None):
        nonlocal first
        first = first or (name, seconds)
        rest = "" if floor is None else f"{floor:8.3f}  {seconds / floor:8.2f}"
        line = f"{name:15} {calls:6}  {seconds:8.3f}  {batch * length / seconds:8.0f}  {rest:18}"
        print(f"{line}  {first[1] / seconds:6.2f} x {first[0]}", flush=True)

    print(COLUMNS)
    for name, (calls, seconds) in peers.items():
        row(name, calls, seconds, None)
    blank = jnp.zeros((batch, length), jnp.int32), jnp.ones((batch, length), bool)
    for name, (sampler, width) in ours.items():
        run = functools.partial(_sample, model.network, model.all_params, root_key(0), sampler, *blank)
        calls, seconds = int(run().calls), timed(run, repeats)
        row(name, calls, seconds, calls * bare_call(model, batch, length, width, repeats))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _sample(network, params, key, sampler: sampling.Sampler, tokens, free) -> sampling.Sampled:
    return sampling.sample(key, network.denoiser(params), sampler, tokens, free)


def bare_call(model: sedd.Model, batch: int, length: int, width: int, repeats: int) -> float:
    """Returns the seconds of one network call, from tokens to logits at `width` positions of each row.

    Averages over a loop, as in samplers: a single call would also include the allocation of its logits.
    """
    calls = 4
    tokens = jnp.full((batch, length), model.process.mask_id, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(width), (batch, width)) if width < length else None
    run = functools.partial(_calls, model.network, model.all_params, tokens, positions, calls)
    run()
    return timed(run, 2 * repeats) / calls


@functools.partial(jax.jit, static_argnums=(0, 4))
def _calls(network, params, tokens, positions, calls: int):
    def body(_, tokens):
        sigma = jnp.ones(tokens.shape[0])
        hidden, condition = network.hidden(params, tokens, sigma)
        if positions is not None:
            hidden = jnp.take_along_axis(hidden, positions[..., None], axis=1)
        logits = network.logits(params, hidden, condition[:, None])
        logits = jax.lax.optimization_barrier(logits)  # all are computed, though only one is read
        return jnp.where(jnp.isnan(logits[0, 0, 0]), 0, tokens)

    return jax.lax.fori_loop(0, calls, body, tokens)


def timed(run: Callable, repeats: int) -> float:
    """Returns the median of `repeats` run times, in seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def reference_seconds(peer: Reference, size: Size) -> float:
    """Returns the seconds in which the reference samples one batch."""
    import sampling  # of the reference

    def sample(steps: int):
        shape = (size.batch, size.length)
        return sampling.get_pc_sampler(peer.graph, peer.noise, shape, "analytic", steps)(peer.network)

    sample(3)
    start = time.perf_counter()
    sample(size.steps)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
