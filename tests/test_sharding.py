"""Where arrays lie while a step runs: what the compiler makes of the production step, for eight devices."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sedd import config as configs
from sedd import parallel
from sedd.data.batches import Batch
from sedd.network import sharding, trunk
from sedd.network.attention import attend
from sedd.training.objective import Objective
from sedd.training.optimizer import make_optimizer
from sedd.training.step import make_step

SHAPE = ("network.width=64", "network.layers=2", "network.heads=8", "network.cond_dim=32", "network.scan=true")
SHAPE += ("network.dtype=float32", "data.block_length=32", "training.batch_size=32", "optimizer.name=adamw")
VOCABULARY = 300  # padded to 384


@pytest.fixture
def fresh(monkeypatch):
    """As if all arrays were large; and nothing comes from the cache, which would keep the compiler's warnings."""
    monkeypatch.setattr(parallel, "WHOLE", 64)
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


def compiled(base, sizes, *settings, vocabulary=VOCABULARY):
    """The production step as it is compiled for a mesh over the first devices; no array is made."""
    config = configs.override(base(), [*SHAPE, *settings])
    config.mesh.update(dict(zip(parallel.AXES, sizes)))
    _, schedule, network = configs.build(config, vocabulary)
    training = config.training
    objective = Objective(network, schedule, training.batch_size, training.noise_sampling, training.min_time)
    mesh = parallel.make_mesh(config, jax.devices()[: math.prod(sizes)])
    init, step, _ = make_step(config, objective, make_optimizer(config.optimizer, training.steps), mesh)
    tokens = jax.ShapeDtypeStruct((training.batch_size, config.data.block_length), jnp.int32)
    return step.lower(jax.eval_shape(init), Batch(tokens, None)).compile()


def exchanged(step):
    """What devices send one another: (operation, numbers in the largest array that it gives)."""
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    for line in step.as_text().splitlines():
        if found := re.match(rf"\s*(?:ROOT )?\S+ = (.*?) ({kinds})(?:-start)?\(", line):
            shapes = re.findall(r"\[([\d,]*)\]", found[1])
            yield found[2], max(math.prod(int(size) for size in shape.split(",") if size) for shape in shapes)


MORE = [(8, 1, 1), (1, 8, 1), (1, 4, 2), (4, 1, 2), (1, 1, 8)]
BASES = [configs.paper, configs.default]  # noise by times and by counts, free scores and log r


@pytest.mark.parametrize("sizes", [(2, 2, 2), *(pytest.param(more, marks=pytest.mark.slow) for more in MORE)], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_nothing_is_gathered_for_want_of_a_better_way(fresh, capfd, base, sizes):
    """The compiler says "Involuntary full rematerialization" where it knows no way from one layout to the next."""
    compiled(base, sizes)
    assert "Involuntary" not in capfd.readouterr().err


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="later compilers know a way for the control too")
def test_the_compiler_would_say_so(fresh, capfd, monkeypatch):
    """The control: looking tokens up in an embedding whose width is split."""

    def constrain_all_but_the_embedding(x, *axes):
        return x if axes == (sharding.MODEL_AXIS,) else sharding.constrain_sharding(x, *axes)

    monkeypatch.setattr(trunk, "constrain_sharding", constrain_all_but_the_embedding)
    compiled(configs.paper, (2, 2, 2))
    assert "Involuntary" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_devices_exchange_weights_and_no_logits(fresh, monkeypatch, base, sizes):
    """Nothing is larger than the largest weight, and nothing is laid out anew: the batch stays where it is.

    The control: where the network sees no mesh, the same step moves activations, which are far larger here.
    """
    largest = 384 * 64
    found = list(exchanged(compiled(base, sizes)))
    assert {"all-gather", "all-reduce"} <= {kind for kind, _ in found}
    assert "all-to-all" not in dict(found) and max(size for _, size in found) <= largest
    monkeypatch.setattr(sharding, "has_mesh", lambda: False)
    assert max(size for _, size in exchanged(compiled(base, sizes))) > 2 * largest


def test_pairs_of_rows_stay_where_they_are(fresh):
    """With noise by counts, data parallel: gradients are summed, and of the rows only their losses are gathered."""
    for kind, size in exchanged(compiled(configs.default, (8, 1, 1))):
        assert kind == "all-reduce" or (kind == "all-gather" and size <= 32), (kind, size)


def test_a_mesh_of_other_axes_says_nothing():
    """Outside of any mesh, under one that someone else has named, and mapped over devices, arrays stay as they are."""
    x = jnp.ones((8, 4))
    assert sharding.constrain_sharding(x, sharding.BATCH_AXES) is x
    with jax.sharding.use_abstract_mesh(parallel.data_mesh(jax.devices()[:2]).abstract_mesh):
        assert jax.make_jaxpr(lambda x: sharding.constrain_sharding(x, sharding.BATCH_AXES))(x).eqns
    with jax.sharding.use_abstract_mesh(jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,)).abstract_mesh):
        assert sharding.constrain_sharding(x, sharding.BATCH_AXES) is x
    mapped = jax.make_jaxpr(jax.pmap(lambda x: sharding.constrain_sharding(x, sharding.BATCH_AXES)))(x)
    assert "sharding_constraint" not in str(mapped)


def test_splash_attention_is_split_by_rows_and_heads():
    """The kernel, which no compiler can split, runs on each device on its own; the result is that of XLA's."""
    mesh = parallel.make_mesh(configs.override(configs.default(), ["mesh.fsdp=2", "mesh.model=2"]))
    q, k, v = jax.random.normal(jax.random.key(0), (3, 4, 128, 2, 16))
    lengths = jnp.array([128, 5, 64, 100])
    place = NamedSharding(mesh, P(sharding.BATCH_AXES, None, sharding.MODEL_AXIS))

    def split(q, k, v, lengths):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return attend("splash", q, k, v, lengths)

    step = jax.jit(split, in_shardings=(place, place, place, NamedSharding(mesh, P(sharding.BATCH_AXES))))
    found = step(q, k, v, lengths)
    assert found.sharding.is_equivalent_to(place, 4) and not list(exchanged(step.lower(q, k, v, lengths).compile()))
    valid = np.arange(128) < lengths[:, None]
    np.testing.assert_allclose(found[valid], attend("xla", q, k, v, lengths)[valid], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_papers_medium_network_shrinks_with_fsdp(capsys):
    """Parameters and the state of the optimiser on a device fall as 1/n; printed for docs/scale.md.

    A row a device: what else the step needs there falls to the activations of that row, and the weights of a layer.
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
    assert needed[8] < needed[1] / 4
