"""Memory and time of a training step on 8 to 1024 chips, from arithmetic alone: nothing is compiled, no chip is needed.

    python benchmarks/plan.py
    python benchmarks/plan.py --models=large --chips=64,256,1024 --rows=2048

For each model, kind of chip and number of chips it finds the mesh, the microbatches and the recomputation with the
shortest step time of all that fit, and prints a table. The assumptions are printed below the table.
"""

import argparse
import dataclasses
import itertools
import math
from collections.abc import Iterator

from sedd import config as configs
from sedd.network.adapters import padded
from sedd.network.trunk import REMAT, Trunk
from sedd.runtime.accelerators import CHIPS, Chip
from sedd.training.estimate import activation_bytes, estimate, step_flops
from sedd.training.objective import Objective
from sedd.training.objectives import make_objective

MODELS = {"small": (768, 12, 12), "medium": (1024, 24, 16), "large": (2048, 24, 32)}  # width, layers, heads
# Number of chips that links connect, and bandwidth of each chip to chips beyond, in bytes a second: TPUs from the pages
# cited in sedd/runtime/accelerators.py (the pod's data-centre network divided by its chips), GPUs with a network card
# each, of 200 or 400 Gbit/s.
KINDS = {
    "TPU v5 lite": (256, 3.1e9),
    "TPU v5p": (6144, 6.2e9),
    "TPU v6 lite": (256, 12.5e9),
    "NVIDIA A100-SXM4-80GB": (8, 25e9),
    "NVIDIA H100 80GB HBM3": (8, 50e9),
    "NVIDIA B200": (8, 50e9),
}
VOCABULARY, LENGTH, STEPS = 50257, 1024, 400_000
MAX_MEMORY_SHARE = 0.6  # an estimate is within a factor of two, and the compiler needs some memory too
NOTE = """
Updates of {rows} rows of {length} tokens, vocabulary of {vocabulary}; the paper's recipe, attention by {attention},
layers scanned. Milliseconds: computing at {mfu:.0%} of the peak; gathering weights and summing their gradients at
{links:.0%} of the rate of links and network, while the previous layer computes; sums of activations, which block. The
latency of collectives is not included. Hours: of {steps:,} updates. GiB: on each chip, an estimate; a plan uses at most
{memory_share:.0%} of its memory."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Mesh, microbatches and recomputation of a step, and its times on each device."""

    mesh: tuple[int, int, int]
    accumulation: int
    remat: str
    compute: float  # seconds
    weights: float  # seconds, for gathering them and summing their gradients
    sums: float  # seconds, for sums of activations over `model`

    @property
    def seconds(self) -> float:
        """Seconds of a step: weights are sent while the previous layer computes; sums block."""
        return max(self.compute, self.weights) + self.sums


def config_of(model: str, args: argparse.Namespace):
    """Returns the paper's recipe with the sizes of the model."""
    config = configs.paper()
    config.network.width, config.network.layers, config.network.heads = MODELS[model]
    config.network.update(scan=True, attention=args.attention)
    config.training.update(batch_size=args.rows, steps=STEPS)
    return config


def plans(model: str, kind: str, chips: int, args: argparse.Namespace) -> Iterator[Plan]:
    """Yields all plans that fit. fsdp and model stay within the chips that links connect."""
    config = config_of(model, args)
    _, schedule, network = configs.build(config, VOCABULARY)
    powers, reach = [2**k for k in range(11)], min(KINDS[kind][0], chips)
    for fsdp, split, accumulation in itertools.product(powers, powers, powers):
        data, rest = divmod(chips, fsdp * split)
        if rest or fsdp * split > reach or network.trunk.heads % split or args.rows % (accumulation * data * fsdp):
            continue
        for remat in REMAT:
            objective = make_objective(
                config, dataclasses.replace(network, trunk=network.trunk.clone(remat=remat)), schedule
            )
            plan = plan_of(objective, kind, (data, fsdp, split), accumulation, args)
            if plan is not None:
                yield plan


def plan_of(
    objective: Objective, kind: str, mesh: tuple[int, int, int], accumulation: int, args: argparse.Namespace
) -> Plan | None:
    """Returns the plan for a mesh and a number of microbatches; None if it does not fit into the memory."""
    chip, (data, fsdp, split), network = CHIPS[kind], mesh, objective.network
    rows = args.rows // (accumulation * data * fsdp)
    trunk = network.trunk
    inner = 12 * trunk.layers * trunk.width * (trunk.width + network.cond_dim // 2)
    outer = 2 * padded(network.process.num_states) * trunk.width
    copies = 4 + (1 if accumulation == 1 else 2)  # parameters, EMA, two moments; gradients, and their sum
    state_bytes = 4 * copies * (inner + outer) / (fsdp * split)
    if state_bytes + activation_bytes(objective, rows, LENGTH, split) > MAX_MEMORY_SHARE * chip.memory:
        return None
    return Plan(
        mesh,
        accumulation,
        trunk.remat,
        compute=step_flops(objective, args.rows, LENGTH) / (math.prod(mesh) * args.mfu * chip.flops),
        weights=accumulation * weight_seconds(kind, inner, outer, mesh, args.links),
        sums=accumulation * activation_seconds(chip, trunk, rows, split, args.links),
    )


def weight_seconds(kind: str, inner: int, outer: int, mesh: tuple[int, int, int], share: float) -> float:
    """Returns the seconds of a microbatch for weights and gradients.

    Weights are gathered over fsdp for the forward and the backward pass, the trunk's in bfloat16. Gradients in float32
    are scattered over fsdp and summed over data, first among chips that links connect. share: of the link rate.
    """
    chip, (joined, network), (data, fsdp, split) = CHIPS[kind], KINDS[kind], mesh
    gathered = 2 * (2 * inner + 4 * outer) + 4 * (inner + outer)
    inside = min(data, max(1, joined // (fsdp * split)))
    slice_ = 2 * 4 * (inner + outer) / (fsdp * split)
    links = gathered / split * (1 - 1 / fsdp) + slice_ * (1 - 1 / inside)
    return links / (share * chip.links) + slice_ / inside * (1 - inside / data) / (share * network)


def activation_seconds(chip: Chip, trunk: Trunk, rows: int, split: int, share: float) -> float:
    """Returns the seconds of a microbatch for sums over model: 2 forward, 2 backward, 2 of recomputation in a layer."""
    sums = trunk.layers * (6 if trunk.remat == "full" else 4)
    return sums * 2 * rows * LENGTH * trunk.width * 2 * (1 - 1 / split) / (share * chip.links)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="small,medium", help=", ".join(MODELS))
    parser.add_argument("--kinds", default="TPU v5 lite,TPU v6 lite,NVIDIA H100 80GB HBM3", help=", ".join(KINDS))
    parser.add_argument("--chips", default="8,64,256")
    parser.add_argument("--rows", type=int, default=512, help="rows of an update (the paper's)")
    parser.add_argument("--attention", default="xla")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak FLOPs while computing")
    parser.add_argument("--links", type=float, default=0.5, help="share of the rate of links and network")
    args = parser.parse_args()
    heads = ["model", "chips", "data fsdp model", "rows x times", "remat", "GiB"]
    heads += ["compute", "weights", "sums", "step", "hours"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for model, kind, chips in itertools.product(args.models.split(","), args.kinds.split(","), args.chips.split(",")):
        print(row_of(model, kind, int(chips), args), flush=True)
    print(NOTE.format(length=LENGTH, vocabulary=VOCABULARY, steps=STEPS, memory_share=MAX_MEMORY_SHARE, **vars(args)))


def row_of(model: str, kind: str, chips: int, args: argparse.Namespace) -> str:
    """Returns the fastest plan as a row of the table, with the memory that `sedd train --dry_run` estimates."""
    name = f"| {model} | {chips} {kind.removeprefix('NVIDIA ')} |"
    best = min(plans(model, kind, chips, args), key=lambda plan: (plan.seconds, plan.mesh[1:]), default=None)
    if best is None:
        return f"{name} nothing fits | | | | | | | | |"
    config = config_of(model, args)
    config.network.remat, config.training.accumulation = best.remat, best.accumulation
    config.mesh.update(dict(zip(("data", "fsdp", "model"), best.mesh)))
    memory = estimate(config, VOCABULARY, chips).total_bytes
    rows = args.rows // best.accumulation // best.mesh[0] // best.mesh[1]
    times = " | ".join(f"{1e3 * part:,.1f}" for part in (best.compute, best.weights, best.sums, best.seconds))
    return (
        f"{name} {' '.join(map(str, best.mesh))} | {rows} x {best.accumulation} | {best.remat} | "
        f"{memory / 2**30:.1f} | {times} | {best.seconds * STEPS / 3600:,.0f} |"
    )


if __name__ == "__main__":
    main()
