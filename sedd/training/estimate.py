"""What a run will take, worked out from its config alone: nothing is compiled, no array made, no device touched.

The parameters, the bytes of the state and the floating-point operations are exact counts. What the backward pass keeps
is an estimate, of the order of what a compiler makes of it.
"""

import dataclasses
import math

import jax
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from sedd import config as configs
from sedd import parallel
from sedd.network.network import Network
from sedd.network.trunk import FREQUENCIES, padded
from sedd.training.objective import Objective
from sedd.training.optimizer import make_optimizer
from sedd.training.step import init_state


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A run in numbers. Bytes are those on each device; the FLOPs are those of all devices together.

    FLOPs: two for each multiply-add of the matrix products and of attention, forward, backward (twice as many), and
    forward once more where layers are recomputed. The optimiser's own are left out.
    """

    parameters: int
    inner_parameters: int  # without the embedding and the head's matrix
    rows: int  # of one update
    block_length: int
    steps: int
    accumulation: int
    mesh: dict[str, int]
    layout: dict[
        str, tuple[int, int]
    ]  # how parameters lie: "whole" or the axes that split them -> arrays, bytes in all
    params_bytes: int
    ema_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    activation_bytes: int  # roughly
    step_flops: int

    @property
    def tokens_per_step(self) -> int:
        """Positions of one update, padding included."""
        return self.rows * self.block_length

    @property
    def state_bytes(self) -> int:
        """Parameters, their average and the optimiser's state."""
        return self.params_bytes + self.ema_bytes + self.optimizer_bytes

    @property
    def total_bytes(self) -> int:
        """The most that a device holds, roughly."""
        return self.state_bytes + self.gradient_bytes + self.activation_bytes

    @property
    def run_flops(self) -> int:
        return self.steps * self.step_flops

    def __str__(self) -> str:
        parts = self.mesh["data"] * self.mesh["fsdp"]
        at_once = self.rows // self.accumulation // parts
        tokens = self.steps * self.tokens_per_step
        splits = "; ".join(f"{how}: {count} arrays, {_size(size)}" for how, (count, size) in self.layout.items())
        return (
            f"parameters {self.parameters:,}, {self.inner_parameters:,} without embedding and head\n"
            f"a step     {self.rows:,} rows of {self.block_length:,} = {self.tokens_per_step:,} tokens, "
            f"{_number(self.step_flops)} FLOPs\n"
            f"the run    {self.steps:,} steps, {tokens:,} tokens, {_number(self.run_flops)} FLOPs\n"
            f"mesh       {', '.join(f'{axis} {size}' for axis, size in self.mesh.items())}; "
            f"{at_once:,} rows a device at once, {self.accumulation} times a step\n"
            f"parameters {splits}\n"
            f"a device   parameters {_size(self.params_bytes)}, their average {_size(self.ema_bytes)}, "
            f"optimiser {_size(self.optimizer_bytes)}, gradients {_size(self.gradient_bytes)}\n"
            f"           and about {_size(self.activation_bytes)} for the backward pass: "
            f"an estimate of {_size(self.total_bytes)} in all, good to a factor of two"
        )


def estimate(config: ConfigDict, vocab_size: int, devices: int) -> Estimate:
    """What the run that `config` describes takes on so many devices. UserError if its mesh does not fit them."""
    config = configs.validate(config)
    training, length = config.training, config.data.block_length
    _, schedule, network = configs.build(config, vocab_size)
    sizes = parallel.mesh_sizes(config, devices)
    mesh = AbstractMesh(sizes, parallel.AXES, axis_types=(AxisType.Auto,) * len(sizes))
    objective = Objective(network, schedule, training.batch_size, training.noise_sampling, training.min_time)
    optimizer = make_optimizer(config.optimizer, training.steps)
    state = jax.eval_shape(lambda: init_state(config, objective, optimizer))
    where = parallel.shardings(mesh, state)
    held = {part: _held(getattr(state, part), getattr(where, part)) for part in ("params", "ema", "optimizer")}
    parameters = network.num_parameters()
    shapes = state.params
    outer = network.process.num_states * (2 * network.width + 1)  # the embedding, and the head's matrix with its bias
    rows, paired = (
        training.batch_size // training.accumulation // (sizes[0] * sizes[1]),
        training.noise_sampling == "mask_count",
    )
    return Estimate(
        parameters=parameters,
        inner_parameters=parameters - outer,
        rows=training.batch_size,
        block_length=length,
        steps=training.steps,
        accumulation=training.accumulation,
        mesh=dict(zip(parallel.AXES, sizes)),
        layout=_layout(shapes, where.params),
        params_bytes=held["params"],
        ema_bytes=held["ema"],
        optimizer_bytes=held["optimizer"],
        gradient_bytes=held["params"] * (1 if training.accumulation == 1 else 2),
        activation_bytes=activation_bytes(network, rows, length, paired, sizes[2]),
        step_flops=step_flops(network, training.batch_size, length, paired),
    )


def step_flops(network: Network, rows: int, length: int, paired: bool, recomputed: bool = True) -> int:
    """FLOPs of one update over so many rows. paired: the head runs at the masked positions of antithetic pairs.

    recomputed: with what `network.remat` computes a second time. Without it they are the model's FLOPs, whose share of
    a chip's peak is the utilisation that papers report.
    """
    width, condition, sites = network.width, network.cond_dim, _sites(rows, length, paired)
    attention = network.layers * rows * length * 4 * length * width  # scores and values
    maps = network.layers * rows * (length * 24 * width**2 + 12 * condition * width)  # qkv, out, up, down; modulation
    told = 2 * rows * condition * (FREQUENCIES + condition)
    head = 2 * sites * width * (padded(network.process.num_states) + 2 * condition)
    again = {"none": 0, "dots": attention, "full": attention + maps}[network.remat]
    return 3 * (attention + maps + told + head) + (again if recomputed else 0)


def activation_bytes(network: Network, rows: int, length: int, paired: bool, model: int = 1) -> int:
    """About how much the backward pass of so many rows on one device needs. model: devices that share the heads."""
    width, size = network.width, 2 if network.dtype == "bfloat16" else 4
    tokens, sites = rows * length, _sites(rows, length, paired)
    # A layer, by the token: in float32 the residual stream, its norm, and the branch before and after its gate, each
    # twice, with dropout's masks; in the trunk's dtype the inputs of all matrices, q, k and v, and q and k rotated; and
    # the attention's logits and weights, in float32 and in the trunk's dtype.
    # The kernels that are not XLA's never hold the last two.
    whole = (2 * 4 * 4 + 2 * bool(network.dropout) + 2 * size) * width
    split = (5 + 1 + 8) * size * width + (network.attention == "xla") * network.heads * length * (8 + size)
    layer = tokens * (whole + split // model)
    # Recomputed layers keep the residual stream, or the results of their linear maps too, and one of them all of it.
    maps = tokens * (2 + 7 / model) * size * width
    kept = {"none": layer, "dots": tokens * 4 * width + int(maps), "full": tokens * 4 * width}[network.remat]
    trunk = network.layers * kept + (layer if network.remat != "none" else 0)
    # The head: what it takes, in float32, and three arrays of the size of the logits.
    head = sites * (4 * (3 * width + network.cond_dim) + 3 * 4 * padded(network.process.num_states) // model)
    return trunk + head


def _sites(rows: int, length: int, paired: bool) -> int:
    """At how many positions the head runs."""
    return math.ceil(rows * (length + 1) / 2) if paired else rows * length


def _held(tree, where) -> int:
    """The bytes of a tree on one device."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(where))
    return sum(math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, place in leaves)


def _layout(shapes: dict, where: dict) -> dict[str, tuple[int, int]]:
    """How many arrays are split in which way, and their bytes in all."""
    found = {}
    for leaf, place in zip(jax.tree.leaves(shapes), jax.tree.leaves(where)):
        axes = [axis for axis in place.spec if axis is not None and place.mesh.shape[axis] > 1]
        how = f"split over {' and '.join(sorted(axes))}" if axes else "whole"
        count, size = found.get(how, (0, 0))
        found[how] = (count + 1, size + math.prod(leaf.shape) * leaf.dtype.itemsize)
    return found


def _size(count: int) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def _number(count: int) -> str:
    """1.23e15"""
    return f"{count:.2e}".replace("e+", "e")
