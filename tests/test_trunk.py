"""The trunk by itself: positions, attention masks and inputs of single layers, scanned or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd.errors import UserError
from sedd.network.attention import attend
from sedd.network.layers import Norm, gelu
from sedd.network.trunk import Trunk

B, L, W, LAYERS = 2, 6, 16, 2
TRUNK = Trunk(width=W, layers=LAYERS, heads=2)
LENGTHS = np.array([4, 6])
POSITIONS = np.array([[3, 0, 7, 1, 2, 9], [0, 1, 2, 6, 7, 8]])
CAUSAL = np.tril(np.ones((1, L, L), bool))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


H, CONDITION, ADDED = normal(0, B, L, W), normal(1, B, 8), normal(2, LAYERS, B, L, W)


@pytest.fixture(scope="module")
def params():
    """Random parameters, without the zeros of initialisation, so that every path affects the output."""
    shapes = jax.eval_shape(TRUNK.init, jax.random.key(0), H, CONDITION)["params"]
    random = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * random.normal(size=leaf.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def run(params):
    """The trunk as a function of hidden states and its optional arguments."""
    return jax.jit(lambda h, **named: TRUNK.apply({"params": params}, h, CONDITION, **named))


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def distance(actual, expected):
    return np.abs(actual - expected).max(-1).min()


def test_outputs_depend_only_on_differences_of_positions(run):
    """The default is 0 .. L - 1; each row may be shifted by itself. Control: doubled differences."""
    expected, order = run(H), np.arange(L)[None]
    close(run(H, positions=order), expected)
    close(run(H, positions=order + np.array([[5], [100]])), expected)
    assert distance(run(H, positions=2 * order), expected) > 1e-2


def test_states_permuted_with_their_positions_give_permuted_outputs(run):
    """Control: permuted without their positions they give others."""
    order, expected = np.array([4, 1, 5, 0, 3, 2]), run(H)
    close(run(H[:, order], positions=order[None]), expected[:, order])
    assert distance(run(H[:, order]), expected[:, order]) > 1e-2


def test_mask_of_valid_keys_equals_lengths(run):
    """A mask and lengths both hold. Control: without either, outputs change in the shorter row."""
    valid = np.broadcast_to((np.arange(L) < LENGTHS[:, None])[:, None], (B, L, L))
    close(run(H, mask=valid), run(H, lengths=LENGTHS))
    close(run(H, mask=CAUSAL & valid), run(H, mask=CAUSAL, lengths=LENGTHS))
    assert distance(run(H)[:1], run(H, lengths=LENGTHS)[:1]) > 1e-2


def test_causal_mask_makes_outputs_independent_of_later_states(run):
    """Control: without the mask every output changes."""
    changed = H.at[:, 3:].set(-H[:, 3:])
    np.testing.assert_array_equal(run(changed, mask=CAUSAL)[:, :3], run(H, mask=CAUSAL)[:, :3])
    assert distance(run(changed), run(H)) > 1e-2


def test_inputs_of_layers_are_added_before_each_layer(run, params):
    """Zeros change nothing; an input of the first layer is added to the hidden states, that of the second after it."""
    close(run(H, added=jnp.zeros_like(ADDED)), run(H))
    only_first = ADDED.at[1].set(0.0)
    close(run(H, added=only_first), run(H + ADDED[0]))
    apply = jax.jit(Trunk(W, layers=1, heads=2).apply)
    first, second = ({"params": {"block_0": params[f"block_{layer}"]}} for layer in range(LAYERS))
    close(run(H, added=ADDED), apply(second, apply(first, H + ADDED[0], CONDITION) + ADDED[1], CONDITION))
    assert distance(run(H, added=ADDED), run(H, added=only_first)) > 1e-2


@pytest.mark.parametrize("remat", ["none", "full"])
def test_scanned_layers_take_the_same_arguments(params, remat):
    """Values, and gradients of the hidden states and of the added inputs, as of unrolled layers."""
    named = dict(lengths=LENGTHS, positions=POSITIONS, mask=CAUSAL)
    stacked = {
        "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[f"block_{i}"] for i in range(LAYERS)))
    }
    scanned = TRUNK.clone(scan=True, remat=remat)

    def outcome(trunk, params):
        def loss(h, added):
            out = trunk.apply({"params": params}, h, CONDITION, added=added, **named)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(H, ADDED)

    jax.tree.map(close, outcome(scanned, stacked), outcome(TRUNK, params))


def test_splash_attention_with_a_mask_is_refused():
    q = jnp.ones((1, 128, 2, 16))
    with pytest.raises(UserError, match="attention=splash takes no attention mask; set network.attention=xla"):
        attend("splash", q, q, q, mask=jnp.ones((1, 128, 128), bool))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("rows", [(1, 1), (B, 1), (B, L)], ids=["one", "of rows", "of positions"])
def test_norm_and_gelu_have_the_values_and_gradients_of_their_formulas(dtype, rows):
    """In 64-bit mode too float32 stays float32. Control: the gradient without the terms of mean and variance."""
    with jax.enable_x64():
        x, shift, scale = jnp.asarray(normal(5, B, L, W), dtype), normal(6, *rows, W), normal(7, *rows, W)
        params = {"params": {"scale": normal(8, W), "bias": normal(9, W)}}
        kind = jnp.float64 if dtype == jnp.float64 else jnp.float32

        def of_norm(x, shift, scale, params):
            return gelu(Norm(bias=True).apply(params, x, shift, scale))

        def by_hand(x, shift, scale, params, fixed=lambda array: array):
            x = x.astype(kind)
            mean, var = fixed(x.mean(-1, keepdims=True)), fixed(x.var(-1, keepdims=True))
            unit = (x - mean) / jnp.sqrt(var + 1e-5)
            x = (unit * params["params"]["scale"] + params["params"]["bias"]) * (1 + scale) + shift
            return 0.5 * x * (1 + jnp.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))

        def gradients(function, **named):
            def loss(*inputs):
                return jnp.sum(function(*inputs, **named) * normal(10, B, L, W))

            return jax.grad(loss, argnums=range(4))(x, shift, scale, params)

        assert of_norm(x, shift, scale, params).dtype == kind
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == jnp.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
        np.testing.assert_allclose(of_norm(x, shift, scale, params), by_hand(x, shift, scale, params), **tolerance)
        actual, expected = gradients(of_norm), gradients(by_hand)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), actual, expected)
        wrong = gradients(by_hand, fixed=jax.lax.stop_gradient)
        assert np.abs(np.asarray(wrong[0] - expected[0], float)).max() > 0.1
