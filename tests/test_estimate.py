"""The estimate of a run: exact parameters, state and FLOPs, memory within a factor of two, from shapes alone."""

import dataclasses
import math
import runpy
import time
from argparse import Namespace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sedd import config as configs
from sedd.data.batches import Batch
from sedd.errors import UserError
from sedd.network import cpu_attention
from sedd.runtime import parallel
from sedd.runtime.accelerators import CHIPS, peak_flops
from sedd.training.estimate import estimate, step_flops
from sedd.training.objectives import make_objective
from sedd.training.optimizer import make_optimizer
from sedd.training.step import make_step

VOCABULARY = 1000
SHAPE = ("network.layers=2", "network.width=128", "data.block_length=64", "training.batch_size=8")


def config_of(*settings, base=configs.default):
    return configs.override(base(), [*SHAPE, *settings])


def parts(config):
    """Returns the objective and the result of `make_step`, on as many devices as the mesh needs."""
    _, schedule, network = configs.build(config, VOCABULARY)
    objective = make_objective(config, network, schedule)
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    devices = jax.devices() if config.mesh.model > 1 else jax.devices()[:1]
    return objective, make_step(config, objective, optimizer, parallel.make_mesh(config, devices))


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_estimated_bytes_of_the_state_equal_those_of_arrays(optimizer):
    """On each of eight devices, sharded over fsdp and model. Control: the full state is larger."""
    config = config_of(f"optimizer.name={optimizer}", "network.width=512", "training.ema_decay=0.9")
    config.mesh.update(fsdp=2, model=2)
    _, (init, _, _) = parts(config)
    state, estimated = init(), estimate(config, VOCABULARY, 8)
    for device in jax.devices():
        for name in ("params", "ema", "optimizer"):
            shards = [shard for leaf in jax.tree.leaves(getattr(state, name)) for shard in leaf.addressable_shards]
            assert sum(shard.data.nbytes for shard in shards if shard.device == device) == getattr(
                estimated, f"{name}_bytes"
            )
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) > 2 * estimated.state_bytes
    assert sum(size for _, size in estimated.layout.values()) == sum(
        leaf.nbytes for leaf in jax.tree.leaves(state.params)
    )


def traced_flops(objective, length):
    """FLOPs of the gradient of an unrolled network, as the compiler counts them: elementwise operations included."""
    rows, key = jnp.arange(8), jax.random.key(0)
    params = jax.eval_shape(objective.network.init, key)
    tokens = jax.ShapeDtypeStruct((8, length), jnp.int32)

    def loss(params, tokens):
        return jnp.sum(objective(params, Batch(tokens, None), rows, key).loss)

    lowered = jax.jit(jax.grad(loss)).lower(params, tokens)
    return lowered.cost_analysis()["flops"]


GAUSSIAN = ("process.name=gaussian", "network.self_conditioning=false")


@pytest.mark.parametrize(
    "settings",
    [("training.noise_sampling=mask_count",), ("training.noise_sampling=time",), GAUSSIAN],
    ids=["mask_count", "time", "gaussian"],
)
def test_estimated_flops_match_the_traced_gradient(monkeypatch, settings):
    """Without the branch of a step that has more masks than the head has room for."""
    monkeypatch.setattr(jax.lax, "cond", lambda _, fits, overflows, *operands: fits(*operands))
    config = config_of(*settings)
    objective, _ = parts(config)
    assert estimate(config, VOCABULARY, 1).step_flops == pytest.approx(traced_flops(objective, 64), rel=0.1)
    accumulated = estimate(config_of(*settings, "training.accumulation=2"), VOCABULARY, 1)
    assert accumulated.step_flops == estimate(config, VOCABULARY, 1).step_flops


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_estimated_flops_of_recomputation_match_the_traced_gradient(remat, monkeypatch):
    """The difference between the traced gradients with and without recomputation; model FLOPs exclude it.

    All rows at once: of a loop the compiler counts one iteration.
    """
    monkeypatch.setattr(cpu_attention, "MAX_WEIGHTS", 2**40)
    config = config_of("data.block_length=256")
    plain, _ = parts(config)
    network = dataclasses.replace(plain.network, trunk=plain.network.trunk.clone(remat=remat))
    recomputing = dataclasses.replace(plain, network=network)
    traced = traced_flops(recomputing, 256) - traced_flops(plain, 256)
    estimated = step_flops(recomputing, 8, 256) - step_flops(plain, 8, 256)
    assert estimated == pytest.approx(traced, rel=0.15)
    assert step_flops(recomputing, 8, 256, recomputed=False) == step_flops(plain, 8, 256)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("network.scan=true", "training.batch_size=32"),
        ("network.scan=true", "training.batch_size=32", "network.remat=full", "network.layers=6"),
        ("network.scan=true", "data.block_length=256", "network.remat=dots", "network.layers=6"),
        (
            "training.noise_sampling=time",
            "data.block_length=128",
            "network.prediction=score",
            "training.accumulation=2",
        ),
        (*GAUSSIAN, "data.block_length=128"),
    ],
    ids=["scan", "remat", "dots", "accumulation", "gaussian"],
)
def test_estimated_memory_is_within_a_factor_of_two(settings):
    """Of the memory of the compiled step. Control: estimates that ignore recomputation are not."""
    config = config_of("optimizer.name=adamw", *settings)
    _, (init, step, _) = parts(config)
    tokens = jax.ShapeDtypeStruct((config.training.batch_size, config.data.block_length), jnp.int32)
    lowered = step.lower(jax.eval_shape(init), Batch(tokens, None), {})
    memory = lowered.compile().memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert 0.5 < estimate(config, VOCABULARY, 1).total_bytes / total < 2
    if config.network.remat != "none":
        config.network.remat = "none"
        assert estimate(config, VOCABULARY, 1).total_bytes > 2 * total


@pytest.mark.parametrize(
    "settings",
    [
        GAUSSIAN,
        (*GAUSSIAN, "network.self_conditioning=true", "codec.rounding=head"),
        (*GAUSSIAN, "network.prediction=x0", "training.loss=bound", "network.soft_tokens=false"),
    ],
)
def test_inner_parameters_are_independent_of_the_vocabulary_and_the_codec(settings):
    small, wide = (
        estimate(config_of(*settings, f"codec.width={width}"), vocabulary, 1)
        for width, vocabulary in ((8, VOCABULARY), (32, 2 * VOCABULARY))
    )
    assert small.inner_parameters == wide.inner_parameters and small.parameters < wide.parameters


def test_estimate_of_the_medium_network_compiles_nothing():
    """It creates no arrays, and has the known numbers of the paper's medium network."""
    config = configs.paper()
    config.network.update(width=1024, layers=24, heads=16, remat="full")
    config.mesh.fsdp = 8
    num_arrays, begin = len(jax.live_arrays()), time.monotonic()
    estimated = estimate(config, 50257, 64)
    assert time.monotonic() - begin < 15 and len(jax.live_arrays()) == num_arrays
    assert estimated.parameters == 424_477_010 and round(estimated.inner_parameters, -5) == 321_500_000
    assert estimated.mesh == {"data": 8, "fsdp": 8, "model": 1} and estimated.tokens_per_step == 512 * 1024
    assert estimated.run_flops == 400_000 * estimated.step_flops
    assert 0.9 < estimated.step_flops / (8 * 321e6 * 512 * 1024) < 1.5  # 8 per parameter and token, attention and head
    assert estimated.params_bytes < 4 * 424_571_264 / 7
    text = str(estimated)
    assert "estimate" in text and "424,477,010" in text and "8 rows per device and microbatch" in text
    with pytest.raises(UserError, match="does not fit the 6 available devices"):
        estimate(config, 50257, 6)


def test_chips_are_found_by_their_full_names():
    """Peak rates are dense; unknown chips and partitions of a chip have none."""
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5") == 459e12 and peak_flops("TPU v4") == 275e12
    assert peak_flops("NVIDIA A10") == 125e12 and peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L4") == 121e12 and peak_flops("NVIDIA L40S") == 362e12
    for kind in ("cpu", "TPU v4 lite", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM-64GB", "Tesla V100"):
        assert peak_flops(kind) is None
    for chip in CHIPS.values():  # plausible ratios: no number is off by a factor of a thousand
        assert 50 < chip.flops / chip.bandwidth < 600 and 1e10 < chip.memory < 1e12
        assert 1e10 < chip.links < chip.bandwidth < 1e13


def test_plan_for_many_chips_fits_the_estimate():
    """The meshes of benchmarks/plan.py fit into memory by `estimate`, and more chips take less time."""
    plan = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "plan.py"))
    args = Namespace(rows=512, attention="xla", mfu=0.4, links=0.5)
    table = [plan["row_of"]("medium", "TPU v5 lite", chips, args) for chips in (8, 64, 256)]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in table]
    assert all(float(row[5]) < plan["MAX_MEMORY_SHARE"] * 16e9 / 2**30 * 1.02 for row in cells)
    steps = [float(row[9].replace(",", "")) for row in cells]
    assert steps[0] > 6 * steps[1] > 18 * steps[2]
    assert math.prod(int(size) for size in cells[1][2].split()) == 64
    assert "nothing fits" in plan["row_of"]("large", "TPU v5 lite", 1, args)
