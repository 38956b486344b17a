"""Speed and peak memory of training steps, alone or against the reference, and speed of the bound.

    git clone https://github.com/louaaron/Score-Entropy-Discrete-Diffusion reference
    pip install torch einops omegaconf huggingface_hub
    python benchmarks/training.py --reference=reference --memory --evaluate    # four sizes, both programs
    python benchmarks/training.py --sizes=256x4x256x256x16                     # this package alone; no torch

Two recipes of this package: `paper`, that of the SEDD paper (unnormalised scores, noise sampled by time), and `mask
counts`, the denoiser of the default recipe, whose head runs at masked positions only. All else is the same in both and
in the reference: network, batch of random tokens, AdamW, warm-up, gradient clipping, EMA, dropout, absorbing process,
log-linear noise, float32. The reference's loss, optimiser and EMA are its own code; its attention is torch's
scaled_dot_product_attention, since flash attention requires a GPU.

The programs take turns: each of --repeats rounds runs --steps steps of each, and waits for the last step of each only.
Speeds are medians over the rounds. A ratio is that of the same round; its minimum, median and maximum are printed.
Compilation is excluded. With --reference the programs first compute the loss and its gradient of the same noisy tokens
with the same random weights, and the differences are printed. The machine must be idle; its load average is printed.
torch's threads spin while they wait for each other, so that another process can slow down small steps of the reference
many times over. `taskset -c 0` compares on one core, where that does not happen.

--evaluate measures --draws draws of each row's bound, without gradients: by mask counts here, at random times in the
reference. --memory measures the peak memory of each training step in a process of its own, compilation included: its
peak resident memory, or on a GPU that of the allocator of JAX or torch. It needs Linux. No corpus is read.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import reference
from ml_collections import ConfigDict

import sedd
from sedd import config as configs
from sedd.data.batches import Batch
from sedd.diffusion.keyed_random import root_key, row_keys
from sedd.evaluation.scoring import bound_stats
from sedd.runtime import parallel
from sedd.runtime.settings import jax_defaults
from sedd.training.objectives import make_objective
from sedd.training.optimizer import make_optimizer
from sedd.training.step import make_step

SIZES = "256x4x256x256x16 512x6x256x1024x8 256x4x256x32000x8 768x12x256x50257x8"
PAPER, COUNTS, REFERENCE = "paper", "mask counts", "reference"
RECIPES = {PAPER: {}, COUNTS: {"network.prediction": "denoiser", "training.noise_sampling": "mask_count"}}
COLUMNS = "program       seconds  tokens/s"
RATIOS = "speed / reference: min, median, max"
CHECKED_ROWS = 2


@dataclasses.dataclass(frozen=True)
class Size(reference.Architecture):
    """Sizes of a network and a batch, as in 256x4x256x256x16."""

    rows: int

    @classmethod
    def parse(cls, text: str) -> "Size":
        return cls(*map(int, text.split("x")))

    def __str__(self):
        return "x".join(map(str, dataclasses.astuple(self)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="checkout of louaaron/Score-Entropy-Discrete-Diffusion")
    parser.add_argument("--sizes", default=SIZES, help="each width x layers x tokens of a row x vocabulary x rows")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--steps", type=int, default=3, help="steps of each program in a round")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the network's products")
    parser.add_argument("--evaluate", action="store_true", help="also measure the bound")
    parser.add_argument("--draws", type=int, default=4, help="of each row's bound, with --evaluate")
    parser.add_argument("--memory", action="store_true", help="also measure the peak memory of each training step")
    parser.add_argument("--json", type=Path, help="a file to write all figures to")
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # print the peak memory of one recipe, for --memory
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch uses the same GPU
    sizes = [Size.parse(text) for text in args.sizes.split()]
    if args.alone:
        program = Ours(sizes[0], args.dtype, args.alone)
        program.train(reference.WARMUP_STEPS + 1)
        print(program.peak_memory())
        return
    versions = {"python": platform.python_version(), "jax": jax.__version__, "sedd": sedd.__version__}
    machine = {"cores": reference.cores(), "load": os.getloadavg()[0], "device": jax.devices()[0].device_kind}
    print(
        f"Python {versions['python']}, JAX {versions['jax']}, {machine['cores']} cores, {machine['device']}, "
        f"load average {machine['load']:.1f}"
    )
    if args.reference:
        import torch

        versions["torch"] = str(torch.__version__)
        print(f"torch {torch.__version__}")
    settings = {name: getattr(args, name) for name in ("dtype", "repeats", "steps", "draws")}
    report = {"versions": versions, **machine, **settings, "sizes": {}}
    for size in sizes:
        report["sizes"][str(size)] = measure(size, args)
        if args.json:
            args.json.write_text(json.dumps(report, indent=2) + "\n")


@jax_defaults()
def measure(size: Size, args: argparse.Namespace) -> dict[str, Any]:
    """Measures one size and prints its tables. Returns the figures."""
    print(
        f"\nwidth {size.width}, {size.layers} layers, V {size.vocab_size}, {size.rows} x {size.length} tokens, "
        f"{args.dtype}",
        flush=True,
    )
    figures: dict[str, Any] = {}
    memory = peak_memory(size, args) if args.memory else {}  # first: this process has no arrays yet
    programs = make_programs(size, args)
    ours = programs[PAPER]
    figures["parameters"] = ours.num_parameters
    print(f"{ours.num_parameters:,} parameters")
    if args.reference:
        figures["check"] = check(ours, programs[REFERENCE])
    training = in_turns({name: program.train for name, program in programs.items()}, args.repeats, args.steps)
    for name, program in programs.items():
        if not math.isfinite(float(program.loss)):
            raise SystemExit(f"the loss of {name} is {program.loss}")
    print(f"\na training step of {size.rows} rows")
    figures["training"] = table(training, size, memory)
    if args.evaluate:
        draw = {name: functools.partial(program.evaluate, draws=args.draws) for name, program in programs.items()}
        print(f"\nthe bound of {size.rows} rows, {args.draws} draws")
        figures["evaluation"] = table(in_turns(draw, args.repeats, 1), size, {})
    return figures


def make_programs(size: Size, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the programs by name, in the order in which they take turns: the reference between the recipes."""
    if not args.reference:
        return {name: Ours(size, args.dtype, name) for name in RECIPES}
    weights = size.random_weights(np.random.default_rng(1))
    with tempfile.TemporaryDirectory() as folder:
        size.save(folder, weights)
        params = sedd.load(folder).params
    return {
        PAPER: Ours(size, args.dtype, PAPER, params),
        REFERENCE: reference.ReferenceTraining(
            args.reference,
            size,
            reference.random_tokens(size, size.rows),
            weights=weights,
            dropout=0.1,
            device=device(),
            dtype=args.dtype,
        ),
        COUNTS: Ours(size, args.dtype, COUNTS, params),
    }


def device() -> str:
    """Returns torch's name of JAX's device."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def settings_of(size: Size, dtype: str, recipe: str) -> ConfigDict:
    """Returns the config of a recipe: the paper's with a network and a batch of this size."""
    config = configs.paper()
    config.network.update(width=size.width, layers=size.layers, heads=size.heads, dtype=dtype)
    config.network.embedding_std = (3 * size.width) ** -0.5
    config.data.block_length, config.training.batch_size = size.length, size.rows
    for key, value in RECIPES[recipe].items():
        group, name = key.split(".")
        config[group][name] = value
    return configs.validate(config)


class Ours:
    """The training step of a recipe of this package on one batch, as a run takes it, and the bound of the batch.

    params: the initial parameters, by default random ones.
    """

    def __init__(self, size: Size, dtype: str, recipe: str, params: dict | None = None):
        config = settings_of(size, dtype, recipe)
        _, self.schedule, self.network = configs.build(config, size.vocab_size)
        mesh = parallel.make_mesh(config, jax.devices()[:1])
        objective = make_objective(config, self.network, self.schedule)
        optimizer = make_optimizer(config.optimizer, config.training.steps, config.training.loss)
        init, self._step, shardings = make_step(config, objective, optimizer, mesh)
        self.state = init() if params is None else init(parallel.put(params, shardings.params))
        self.tokens = reference.random_tokens(size, size.rows).astype(np.int32)
        rows = parallel.local_rows(mesh, size.rows)
        self._batch = parallel.shard_batch(mesh, Batch(self.tokens, None), rows, size.rows)
        self._bound, self._metrics = self.network.bound(self.schedule), None
        self.num_parameters = self.network.num_parameters()

    @property
    def loss(self) -> jax.Array:
        """The loss of the last step, nats a token."""
        return self._metrics["loss"]

    def train(self, steps: int):
        """Takes training steps. Returns when the last one is done."""
        for _ in range(steps):
            self.state, self._metrics = self._step(self.state, self._batch, {})
        jax.block_until_ready((self.state, self._metrics))

    def compiled(self) -> jax.stages.Compiled:
        """The compiled program of a step."""
        return self._step.lower(self.state, self._batch, {}).compile()

    def evaluate(self, batches: int, draws: int):
        """Takes `draws` draws of the bound of the batch, `batches` times."""
        tokens, params = self._batch.tokens, self.state.eval_params
        for batch in range(batches):
            nats = _bound_nats(self.network, self._bound, draws, params, root_key(batch), tokens)
        jax.block_until_ready(nats)

    def loss_and_gradient_norm(self, tokens: np.ndarray, noisy: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, float]:
        """As of `reference.ReferenceTraining`."""
        loss, norm = _loss_and_gradient_norm(self.network, self.schedule, self.state.params, tokens, noisy, t)
        return np.asarray(loss), float(norm)

    def peak_memory(self) -> float:
        """Peak memory in GB: on a GPU of JAX's allocator, else of the process."""
        if device() == "cuda":
            return jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 1e9
        return reference.process_peak()


@functools.partial(jax.jit, static_argnums=range(3))
def _bound_nats(network, bound, num_draws, params, key, tokens):
    stats = bound_stats(network, bound, num_draws, params, tokens)
    return bound.nats(bound.draws(stats, row_keys(key, jnp.arange(len(tokens))), tokens, num_draws))


@functools.partial(jax.jit, static_argnums=range(2))
def _loss_and_gradient_norm(network, schedule, params, tokens, noisy, t):
    """The loss of each row at the times t, Float[B], and the norm of the gradient of their mean."""

    def mean_loss(params):
        sigma = schedule.sigma(t)
        stats = network.stats(params)(noisy, sigma, tokens)
        entropy = network.process.score_entropy(stats, noisy, tokens, sigma[:, None])
        loss = jnp.sum(schedule.rate(t)[:, None] * entropy, axis=-1)
        return jnp.mean(loss), loss

    gradient, loss = jax.grad(mean_loss, has_aux=True)(params)
    return loss, optax.tree.norm(gradient)


def check(ours: Ours, theirs: reference.ReferenceTraining) -> dict[str, float]:
    """Prints how the losses and gradients of equal weights and equal noisy tokens differ. Returns the differences.

    Exits unless the numbers of parameters are equal.
    """
    if ours.num_parameters != theirs.num_parameters:
        raise SystemExit(f"the reference has {theirs.num_parameters:,} parameters")
    tokens = ours.tokens[:CHECKED_ROWS]
    t = np.linspace(0.3, 0.8, len(tokens), dtype=np.float32)
    masked = np.random.default_rng(2).random(tokens.shape) < t[:, None]
    noisy = np.where(masked, ours.network.process.mask_id, tokens)
    loss, norm = ours.loss_and_gradient_norm(tokens, noisy.astype(np.int32), t)
    their_loss, their_norm = theirs.loss_and_gradient_norm(tokens.astype(np.int64), noisy.astype(np.int64), t)
    differences = {
        "loss": float(np.max(np.abs(loss / their_loss - 1))),
        "gradient_norm": abs(norm / their_norm - 1),
    }
    print(
        f"equal weights and noisy tokens: relative differences of losses {differences['loss']:.1e} at most, "
        f"of gradient norms {differences['gradient_norm']:.1e}"
    )
    return differences


def in_turns(programs: dict[str, Callable[[int], None]], repeats: int, steps: int) -> dict[str, list[float]]:
    """Runs each program for `steps` steps, in turn, `repeats` times. Returns the seconds of a step of each round."""
    for run in programs.values():
        run(reference.WARMUP_STEPS)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, run in programs.items():
            start = time.perf_counter()
            run(steps)
            seconds[name].append((time.perf_counter() - start) / steps)
    return seconds


def table(seconds: dict[str, list[float]], size: Size, memory: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Prints a table with a row for each program. seconds: those of a step in each round. Returns its figures."""
    theirs, figures = seconds.get(REFERENCE), {}
    print(f"{COLUMNS}{'   peak, GB' if memory else ''}{f'   {RATIOS}' if theirs else ''}")
    for name in sorted(seconds, key=lambda name: name != REFERENCE):
        median = statistics.median(seconds[name])
        speed = size.rows * size.length / median
        figures[name] = {"seconds": seconds[name], "tokens_per_second": speed}
        line = f"{name:12} {median:8.4f} {speed:9.0f}"
        if memory:
            figures[name]["peak_memory_gb"] = memory[name]
            line += f" {memory[name]:10.2f}"
        if theirs:
            ratios = [their / our for their, our in zip(theirs, seconds[name])]
            figures[name]["ratios"] = ratios
            line += "   " + "  ".join(f"{of(ratios):.2f}" for of in (min, statistics.median, max))
        print(line, flush=True)
    return figures


def peak_memory(size: Size, args: argparse.Namespace) -> dict[str, float]:
    """Returns the peak memory in GB of a few training steps of each program, each in a process of its own."""
    commands = {name: [__file__, f"--sizes={size}", f"--dtype={args.dtype}", f"--alone={name}"] for name in RECIPES}
    if args.reference:
        commands[REFERENCE] = [reference.__file__, str(args.reference), str(size), args.dtype, device()]
    peaks = {}
    for name, command in commands.items():
        run = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True)
        peaks[name] = float(run.stdout.split()[-1])
    return peaks


if __name__ == "__main__":
    main()
