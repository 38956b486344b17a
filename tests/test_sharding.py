"""Shardings and communication of the compiled training step on eight devices."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small import name_of

from sedd import config as configs
from sedd.data.batches import Batch
from sedd.network import adapters, sharding
from sedd.network.attention import attend
from sedd.runtime import parallel
from sedd.training.objectives import make_objective
from sedd.training.optimizer import make_optimizer
from sedd.training.step import make_step

SHAPE = ("network.width=64", "network.layers=2", "network.heads=8", "network.cond_dim=32", "network.scan=true")
SHAPE += ("network.dtype=float32", "data.block_length=32", "training.batch_size=32", "optimizer.name=adamw")
VOCABULARY = 300  # padded to 384


@pytest.fixture
def fresh(monkeypatch):
    """Shards small arrays too, and disables the compilation cache, which would suppress the compiler's warnings."""
    monkeypatch.setattr(parallel, "MIN_SHARD_BYTES", 64)
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


def compiled(base, sizes, *settings, vocabulary=VOCABULARY):
    """Compiles the training step for a mesh over the first devices; creates no arrays."""
    config = configs.override(base(), [*SHAPE, *settings])
    config.mesh.update(dict(zip(parallel.AXES, sizes)))
    _, schedule, network = configs.build(config, vocabulary)
    objective = make_objective(config, network, schedule)
    mesh = parallel.make_mesh(config, jax.devices()[: math.prod(sizes)])
    init, step, _ = make_step(config, objective, make_optimizer(config.optimizer, config.training.steps), mesh)
    tokens = jax.ShapeDtypeStruct((config.training.batch_size, config.data.block_length), jnp.int32)
    return step.lower(jax.eval_shape(init), Batch(tokens, None), {}).compile()


def exchanged(step):
    """Yields each collective: (operation, number of elements of its largest output)."""
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    for line in step.as_text().splitlines():
        if found := re.match(rf"\s*(?:ROOT )?\S+ = (.*?) ({kinds})(?:-start)?\(", line):
            shapes = re.findall(r"\[([\d,]*)\]", found[1])
            yield found[2], max(math.prod(int(size) for size in shape.split(",") if size) for shape in shapes)


# Both recipes: times and mask counts, unnormalised scores and log r.
SLOW_MESHES = [(configs.paper, sizes) for sizes in ((2, 2, 2), (1, 8, 1), (4, 1, 2))] + [(configs.default, (1, 4, 2))]
MESHES = [(configs.default, (2, 2, 2)), *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW_MESHES)]


@pytest.mark.parametrize("base, sizes", MESHES, ids=name_of)
def test_no_array_is_fully_rematerialised(fresh, capfd, base, sizes):
    """The compiler prints "Involuntary full rematerialization" if it cannot convert one sharding to another."""
    compiled(base, sizes)
    assert "Involuntary" not in capfd.readouterr().err


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="later compilers convert the control too")
def test_compiler_reports_full_rematerialisation(fresh, capfd, monkeypatch):
    """The control: looking up tokens in an embedding whose width is sharded."""

    def constrain_all_but_the_embedding(x, *axes):
        return x if axes == (parallel.MODEL_AXIS,) else sharding.constrain_sharding(x, *axes)

    monkeypatch.setattr(adapters, "constrain_sharding", constrain_all_but_the_embedding)
    compiled(configs.paper, (2, 2, 2))
    assert "Involuntary" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("base, sizes", [(configs.paper, (1, 8, 1)), (configs.default, (2, 2, 2))], ids=name_of)
def test_devices_exchange_weights_but_no_activations(fresh, monkeypatch, base, sizes):
    """No collective is larger than the largest weight, and there is no all-to-all: the batch is not resharded.

    The control: without the network's constraints the same step moves activations, which are far larger here.
    """
    largest = 384 * 64
    collectives = list(exchanged(compiled(base, sizes)))
    assert {"all-gather", "all-reduce"} <= {kind for kind, _ in collectives}
    assert "all-to-all" not in dict(collectives) and max(size for _, size in collectives) <= largest
    monkeypatch.setattr(sharding, "has_mesh", lambda: False)
    assert max(size for _, size in exchanged(compiled(base, sizes))) > 2 * largest


def test_data_parallel_step_exchanges_only_gradients_and_losses(fresh):
    """With mask counts: gradients are summed, and of the rows only the losses are gathered."""
    for kind, size in exchanged(compiled(configs.default, (8, 1, 1))):
        assert kind == "all-reduce" or (kind == "all-gather" and size <= 32), (kind, size)


def test_no_constraints_without_the_axes_of_the_mesh():
    """Without a mesh, under a mesh of other axes and under `jax.pmap`, arrays are not constrained."""
    x = jnp.ones((8, 4))
    assert sharding.constrain_sharding(x, parallel.BATCH_AXES) is x
    with jax.sharding.use_abstract_mesh(parallel.data_mesh(jax.devices()[:2]).abstract_mesh):
        assert jax.make_jaxpr(lambda x: sharding.constrain_sharding(x, parallel.BATCH_AXES))(x).eqns
    with jax.sharding.use_abstract_mesh(jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,)).abstract_mesh):
        assert sharding.constrain_sharding(x, parallel.BATCH_AXES) is x
    mapped = jax.make_jaxpr(jax.pmap(lambda x: sharding.constrain_sharding(x, parallel.BATCH_AXES)))(x)
    assert "sharding_constraint" not in str(mapped)


def test_splash_attention_is_sharded_by_rows_and_heads():
    """Each device runs the kernel on its own rows and heads; the result equals that of XLA attention."""
    mesh = parallel.make_mesh(configs.override(configs.default(), ["mesh.fsdp=2", "mesh.model=2"]))
    q, k, v = jax.random.normal(jax.random.key(0), (3, 4, 128, 2, 16))
    lengths = jnp.array([128, 5, 64, 100])
    expected = NamedSharding(mesh, P(parallel.BATCH_AXES, None, parallel.MODEL_AXIS))

    def split(q, k, v, lengths):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return attend("splash", q, k, v, lengths)

    step = jax.jit(split, in_shardings=(expected, expected, expected, NamedSharding(mesh, P(parallel.BATCH_AXES))))
    out = step(q, k, v, lengths)
    assert out.sharding.is_equivalent_to(expected, 4) and not list(exchanged(step.lower(q, k, v, lengths).compile()))
    valid = np.arange(128) < lengths[:, None]
    np.testing.assert_allclose(out[valid], attend("xla", q, k, v, lengths)[valid], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_state_of_the_medium_network_shrinks_with_fsdp(capsys):
    """Parameters and optimiser state per device are 1/n of the total; printed for docs/scale.md.

    With one row per device the other memory falls to the activations of that row, the weights of one layer, and the
    embedding and the head's kernel with their gradients, which a device gathers whole.
    """
    settings = ("network.width=1024", "network.layers=24", "network.heads=16", "network.remat=full")
    settings += ("network.cond_dim=128", "network.dtype=bfloat16", "data.block_length=1024", "training.batch_size=8")
    held, needed = {}, {}
    for devices in (1, 2, 4, 8):
        memory = compiled(configs.paper, (1, devices, 1), *settings, vocabulary=50257).memory_analysis()
        held[devices], needed[devices] = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        with capsys.disabled():
            print(f"\nfsdp {devices}: state {held[devices] / 2**30:.3f} GiB, {needed[devices] / 2**30:.3f} GiB more")
        assert held[devices] == pytest.approx(held[1] / devices, rel=0.01)
    assert 4 * 4 * 424_477_010 < held[1] < 1.01 * 4 * 4 * 424_477_010
    gathered = 4 * 4 * 50304 * 1024
    assert needed[8] < needed[1] / 8 + gathered
