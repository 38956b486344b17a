"""Memory and compute of a run, derived from its config: no compilation, no arrays, no devices.

The parameters, the bytes of the state and the floating-point operations are exact counts. The memory of the backward
pass is an estimate, good to a factor of two.
"""

import dataclasses
import math

import jax
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from sedd import config as configs
from sedd.network.adapters import FREQUENCIES
from sedd.runtime import parallel
from sedd.training.objective import Objective
from sedd.training.objectives import make_objective
from sedd.training.optimizer import make_optimizer
from sedd.training.step import init_state


@dataclasses.dataclass(frozen=True)
class RunEstimate:
    """Memory and compute of a run. Bytes are per device; FLOPs are of all devices together.

    FLOPs: two for each multiply-add of matrix products and attention, in the forward pass, the backward pass (twice as
    many) and the recomputation of layers. Those of the optimiser are not counted.
    """

    parameters: int
    inner_parameters: int  # without the embedding and the head's outputs
    rows: int  # of one step
    block_length: int
    steps: int
    accumulation: int
    mesh: dict[str, int]
    layout: dict[str, tuple[int, int]]  # of parameters: "replicated" or the mesh axes -> arrays, bytes in all
    params_bytes: int
    ema_bytes: int
    optimizer_bytes: int
    frozen_bytes: int  # parameters that are not trained
    gradient_bytes: int
    activation_bytes: int  # estimated
    step_flops: int

    @property
    def tokens_per_step(self) -> int:
        """Positions of one step, padding included."""
        return self.rows * self.block_length

    @property
    def state_bytes(self) -> int:
        """Parameters, their EMA and the state of the optimiser."""
        return self.params_bytes + self.ema_bytes + self.optimizer_bytes

    @property
    def total_bytes(self) -> int:
        """Estimated peak memory of a device."""
        return self.state_bytes + self.frozen_bytes + self.gradient_bytes + self.activation_bytes

    @property
    def run_flops(self) -> int:
        return self.steps * self.step_flops

    def __str__(self) -> str:
        parts = self.mesh["data"] * self.mesh["fsdp"]
        microbatch = self.rows // self.accumulation // parts
        tokens = self.steps * self.tokens_per_step
        layout = "; ".join(f"{how}: {count} arrays, {_size(size)}" for how, (count, size) in self.layout.items())
        return (
            f"parameters {self.parameters:,}, {self.inner_parameters:,} without embedding and head\n"
            f"a step     {self.rows:,} rows of {self.block_length:,} = {self.tokens_per_step:,} tokens, "
            f"{_number(self.step_flops)} FLOPs\n"
            f"the run    {self.steps:,} steps, {tokens:,} tokens, {_number(self.run_flops)} FLOPs\n"
            f"mesh       {', '.join(f'{axis} {size}' for axis, size in self.mesh.items())}; "
            f"{microbatch:,} rows per device and microbatch, {self.accumulation} microbatches per step\n"
            f"parameters {layout}\n"
            f"a device   parameters {_size(self.params_bytes)}, EMA {_size(self.ema_bytes)}, "
            f"optimiser {_size(self.optimizer_bytes)}, gradients {_size(self.gradient_bytes)}"
            f"{f', not trained {_size(self.frozen_bytes)}' if self.frozen_bytes else ''}\n"
            f"           and about {_size(self.activation_bytes)} for the backward pass: "
            f"an estimate of {_size(self.total_bytes)} in all, good to a factor of two"
        )


def estimate(config: ConfigDict, vocab_size: int, devices: int) -> RunEstimate:
    """Estimates the run that `config` describes, on `devices` devices. UserError if its mesh does not fit them."""
    config = configs.validate(config)
    training, length = config.training, config.data.block_length
    _, schedule, network = configs.build(config, vocab_size)
    sizes = parallel.mesh_sizes(config, devices)
    mesh = AbstractMesh(sizes, parallel.AXES, axis_types=(AxisType.Auto,) * len(sizes))
    objective = make_objective(config, network, schedule)
    optimizer = make_optimizer(config.optimizer, training.steps)
    state = jax.eval_shape(lambda: init_state(config, objective, optimizer))
    shardings = parallel.shardings(mesh, state)
    held = {
        part: _bytes_per_device(getattr(state, part), getattr(shardings, part))
        for part in ("params", "ema", "optimizer")
    }
    parameters = network.num_parameters()
    rows = training.batch_size // training.accumulation // (sizes[0] * sizes[1])
    return RunEstimate(
        parameters=parameters,
        inner_parameters=parameters - network.outer_parameters,
        rows=training.batch_size,
        block_length=length,
        steps=training.steps,
        accumulation=training.accumulation,
        mesh=dict(zip(parallel.AXES, sizes)),
        layout=_layout(state.params, shardings.params),
        params_bytes=held["params"],
        ema_bytes=held["ema"],
        optimizer_bytes=held["optimizer"],
        frozen_bytes=4 * network.num_frozen,
        gradient_bytes=held["params"] * (1 if training.accumulation == 1 else 2),
        activation_bytes=activation_bytes(objective, rows, length, sizes[2]),
        step_flops=step_flops(objective, training.batch_size, length),
    )


def step_flops(objective: Objective, rows: int, length: int, recomputed: bool = True) -> int:
    """FLOPs of one step over `rows` rows of `length` tokens.

    recomputed: includes the recomputation of `network.remat`. Without it the result is the model FLOPs, from which the
    model FLOPs utilisation (MFU) is computed.
    """
    network, sites = objective.network, objective.head_positions(rows, length)
    trunk, width, cond_dim = network.trunk, network.trunk.width, network.cond_dim
    inner = network.trunk_length(length)
    attention = trunk.layers * rows * inner * 4 * inner * width  # scores and values
    maps = trunk.layers * rows * (inner * 24 * width**2 + 12 * cond_dim * width)  # qkv, out, up, down; modulation
    conditioning = 2 * rows * cond_dim * (FREQUENCIES + cond_dim)
    outer = 2 * sites * (network.outer_products + 2 * width * cond_dim)
    recomputation = {"none": 0, "dots": attention, "full": attention + maps}[trunk.remat]
    forward = attention + maps + conditioning + outer
    memory = forward // 2 if network.self_conditioned else 0  # of every other step, without its gradient
    of_network = (3 * forward + memory + (recomputation if recomputed else 0)) * objective.trains_network
    trained, frozen = (2 * rows * length * products for products in network.codec_products(length))
    return of_network + 3 * trained * objective.trains_codec + frozen


def activation_bytes(objective: Objective, rows: int, length: int, model: int = 1) -> int:
    """Estimated bytes that the backward pass of `rows` rows needs on a device. model: devices that share the heads."""
    network, sites = objective.network, objective.head_positions(rows, length)
    inner = network.trunk_length(length)
    tokens = rows * inner
    trunk, width, size = network.trunk, network.trunk.width, 2 if network.trunk.dtype == "bfloat16" else 4
    # A layer, per token: in float32 the residual stream, its norm, and the branch before and after its gate, each
    # twice, with the dropout masks; in the trunk's dtype the inputs of all matrices, q, k and v, and the rotated q and
    # k; and the attention's logits and weights, in float32 and in the trunk's dtype, which only XLA's attention stores.
    replicated = (2 * 4 * 4 + 2 * bool(trunk.dropout) + 2 * size) * width
    sharded = (5 + 1 + 8) * size * width + (trunk.attention == "xla") * trunk.heads * inner * (8 + size)
    layer = tokens * (replicated + sharded // model)
    # Recomputed layers save the residual stream ("dots": and the outputs of their linear maps); one layer is live.
    maps = tokens * (2 + 7 / model) * size * width
    saved = {"none": layer, "dots": tokens * 4 * width + int(maps), "full": tokens * 4 * width}[trunk.remat]
    layers = trunk.layers * saved + (layer if trunk.remat != "none" else 0)
    # The head: its inputs, in float32, and arrays of the logits that are held at a time.
    logits = network.wide_arrays * 4 * network.logits_at_once(sites, model)
    head = sites * 4 * (3 * width + network.cond_dim) + logits
    return layers + head


def _bytes_per_device(tree, shardings) -> int:
    """Bytes of a tree on one device."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings))
    return sum(math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, sharding in leaves)


def _layout(shapes: dict, shardings: dict) -> dict[str, tuple[int, int]]:
    """Number and total bytes of the arrays, by the mesh axes that shard them."""
    layout: dict[str, tuple[int, int]] = {}
    for leaf, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings)):
        axes = [axis for axis in sharding.spec if axis is not None and sharding.mesh.shape[axis] > 1]
        how = f"sharded over {' and '.join(sorted(axes))}" if axes else "replicated"
        count, size = layout.get(how, (0, 0))
        layout[how] = (count + 1, size + math.prod(leaf.shape) * leaf.dtype.itemsize)
    return layout


def _size(count: float) -> str:
    """Formats a number of bytes: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def _number(count: int) -> str:
    """Formats a number: 1.23e15."""
    return f"{count:.2e}".replace("e+", "e")
