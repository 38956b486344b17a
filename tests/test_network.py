"""The network computes the same function under scanning, rematerialisation, padding and any choice of positions."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd.diffusion import keyed_random
from sedd.diffusion.discrete.loss import count_loss
from sedd.diffusion.discrete.process import Absorbing, Uniform
from sedd.diffusion.discrete.score import score_stats
from sedd.errors import UserError
from sedd.network.adapters import padded
from sedd.network.attention import attend, check_platform, check_sizes
from sedd.network.layers import Linear
from sedd.network.token_network import TokenNetwork, _masked_of_groups
from sedd.network.trunk import Trunk, scanned, unrolled

B, L, V = 4, 12, 37
NETWORK = TokenNetwork(
    Absorbing(V), "denoiser", Trunk(width=16, layers=3, heads=2), sigma_range=(1e-3, 7.0), cond_dim=8
)


def with_trunk(network, **changes):
    return dataclasses.replace(network, trunk=network.trunk.clone(**changes))


def random_params(network, seed=1):
    """Random parameters, without the zeros of initialisation, so that every path affects the output."""
    random, shapes = np.random.default_rng(seed), jax.eval_shape(network.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.3, leaf.shape), leaf.dtype), shapes)


@pytest.fixture
def noisy():
    """x, sigma and x0 with masks."""
    x0 = jax.random.randint(jax.random.key(2), (B, L), 0, V)
    sigma = jnp.array([0.1, 0.5, 1.0, 3.0])
    return Absorbing(V).corrupt(keyed_random.row_keys(jax.random.key(3), jnp.arange(B)), x0, sigma[:, None]), sigma, x0


def test_layers_are_unrolled_as_they_were_scanned():
    params = random_params(NETWORK)
    assert set(scanned(params)["trunk"]["blocks"]) == set(params["trunk"]["block_0"])
    for one in (unrolled(scanned(params)), unrolled(params)):
        jax.tree.map(np.testing.assert_array_equal, one, params)
    jax.tree.map(np.testing.assert_array_equal, scanned(scanned(params)), scanned(params))


@pytest.mark.parametrize("scan, remat", [(True, "full"), (True, "dots"), (True, "none"), (False, "full")])
@pytest.mark.slow
def test_scanned_and_rematerialised_layers_are_the_same_function(noisy, scan, remat):
    """Values and gradients, with dropout: the dropout masks are independent of how the layers are compiled."""
    params, (x, sigma, x0) = random_params(NETWORK), noisy
    keys = keyed_random.row_keys(jax.random.key(4), jnp.arange(B))

    def loss(params, **changes):
        network = with_trunk(NETWORK, dropout=0.2, **changes)
        return jnp.sum(network.stats(params, keys)(x, sigma, x0).log_sum * (x == V)) + jnp.sum(
            network.log_score(params, x, sigma)[..., 0]
        )

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    other = scanned(params) if scan else params
    actual, actual_gradient = jax.jit(jax.value_and_grad(lambda params: loss(params, scan=scan, remat=remat)))(other)
    np.testing.assert_allclose(actual, value, rtol=1e-5)
    expected = scanned(gradient) if scan else gradient
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), actual_gradient, expected)


def test_dropout_depends_only_on_the_key_of_the_example(noisy):
    """A row drops the same entries at any index of any batch. Control: another key drops others."""
    network, (x, sigma, x0) = with_trunk(NETWORK, layers=1, dropout=0.5), noisy
    params = random_params(network)
    keys = keyed_random.row_keys(jax.random.key(4), jnp.arange(B))
    target = jax.jit(lambda keys, *row: network.stats(params, keys)(*row).target)
    alone = target(keys[2:3], x[2:3], sigma[2:3], x0[2:3])
    np.testing.assert_allclose(alone[0], target(keys, x, sigma, x0)[2], rtol=1e-5, atol=1e-6)
    assert not np.allclose(target(keys[1:2], x[2:3], sigma[2:3], x0[2:3]), alone)


@pytest.mark.parametrize("process", [Absorbing(V), Uniform(V)], ids=["absorbing", "uniform"])
@pytest.mark.parametrize("prediction", ["denoiser", "score"])
def test_denoiser_at_some_positions_equals_denoiser_at_all_positions(noisy, process, prediction):
    x, sigma, _ = noisy
    x = jnp.minimum(x, process.num_states - 1)
    network = dataclasses.replace(NETWORK, process=process, prediction=prediction)
    denoiser = jax.jit(network.denoiser(random_params(network)))
    positions = jnp.array([[3, 0], [1, 1], [11, 5], [2, 7]])
    some = denoiser(x, sigma, positions)
    np.testing.assert_allclose(
        some, jnp.take_along_axis(denoiser(x, sigma, None), positions[..., None], axis=1), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(jnp.exp(some).sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["denoiser", pytest.param("score", marks=pytest.mark.slow)])
def test_loss_with_head_at_masked_positions_equals_loss_with_head_everywhere(prediction):
    """Pairs that mask L + 1 of 2 L positions: the same loss and gradient as with the head at all positions."""
    network = dataclasses.replace(with_trunk(NETWORK, layers=1), prediction=prediction)
    params = random_params(network)
    x0 = jax.random.randint(jax.random.key(2), (B, L), 0, V)
    keys = keyed_random.row_keys(jax.random.key(3), jnp.arange(B))
    k = jnp.array([1, L, 5, L - 4])

    def loss(params, masked_pairs):
        stats = network.stats(params, masked_pairs=masked_pairs)
        return jnp.sum(count_loss(network.process, stats, keys, x0, k))

    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (value, gradient), (packed, packed_gradient) = both(params, False), both(params, True)
    np.testing.assert_allclose(packed, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), packed_gradient, gradient)
    all_scores = f"f32[{B},{L},{network.process.num_states}]"
    assert all_scores in str(jax.make_jaxpr(lambda params: loss(params, False))(params))
    assert all_scores not in str(jax.make_jaxpr(lambda params: loss(params, True))(params))


@pytest.mark.parametrize("room", [1, -1], ids=["fits", "overflows"])
def test_loss_with_a_capacity_of_masks_equals_loss_with_head_everywhere(noisy, room):
    """The same loss and gradient, and no array of all logits. Control: a packed head that lacks one mask's room."""
    (x, sigma, x0), network = noisy, dataclasses.replace(with_trunk(NETWORK, layers=1), prediction="score")
    params, capacity = random_params(network), int(jnp.sum(x == V)) + room

    def loss(params, **packing):
        stats = network.stats(params, **packing)(x, sigma, x0)
        return jnp.sum(network.process.score_entropy(stats, x, x0, sigma[:, None]))

    packed = functools.partial(loss, capacity=capacity)
    actual, expected = jax.jit(jax.value_and_grad(packed))(params), jax.jit(jax.value_and_grad(loss))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), actual, expected)
    all_scores = f"f32[{B},{L},{network.process.num_states}]"
    assert all_scores in str(jax.make_jaxpr(loss)(params)) and all_scores not in str(jax.make_jaxpr(packed)(params))
    gather, scatter = _masked_of_groups(x == V, 1, capacity)
    assert jnp.array_equal(scatter(gather(jnp.ones((B, L)))) * (x == V), x == V) == (room > 0)


@pytest.mark.parametrize("process", [Absorbing(V), Uniform(V)], ids=["absorbing", "uniform"])
def test_tightened_statistics_follow_the_unnormalised_ones(noisy, process):
    """Along a leading axis of size two. With the head at masked positions only, those masked in x0 too are left out."""
    (x, _, x0), sigma = noisy, jnp.array([0.2, 1.0, 2.0, 6.0])
    network = dataclasses.replace(with_trunk(NETWORK, layers=1), process=process, prediction="score")
    params, pairs = random_params(network, seed=3), isinstance(process, Absorbing)
    x = jnp.minimum(x, process.num_states - 1)
    if pairs:  # nine tokens after three that are masked in x0 too, in rows that mask k and 10 - k of them
        x0, masks = x0.at[:, :3].set(V), jnp.array([3, 7, 9, 1])
        x = jnp.where(jnp.arange(L) >= L - masks[:, None], V, x0)

    @jax.jit
    def forms(params):
        log_score = network.log_score(params, x, sigma)
        by_hand = [score_stats(score, x, x0) for score in (log_score, process.tightened(log_score, sigma[:, None]))]
        actual = [network.stats(params, tightened=True, masked_pairs=way)(x, sigma, x0) for way in {False, pairs}]
        return jax.tree.map(lambda *both: jnp.stack(both), *by_hand), actual

    by_hand, actual = forms(params)
    computed = (x == V) & (x0 != V) if pairs else jnp.ones(x.shape, bool)

    def agree(one, other):
        assert one.shape == (2, B, L)
        np.testing.assert_allclose(one[:, computed], other[:, computed], rtol=1e-4, atol=1e-4)

    for stats in actual:
        jax.tree.map(agree, stats, by_hand)
    assert np.abs(by_hand.log_sum[0] - by_hand.log_sum[1])[computed].max() > 0.1


def test_positions_beyond_the_length_do_not_affect_valid_ones(noisy):
    """A row with a valid length has the outputs of the shorter row alone."""
    x, sigma, _ = noisy
    params = random_params(NETWORK)
    lengths = jnp.array([5, 12, 5, 12])
    batched = jax.jit(NETWORK.denoiser(params, lengths))(x, sigma, None)
    without_lengths = jax.jit(NETWORK.denoiser(params))
    for row, length in enumerate(lengths):
        alone = without_lengths(x[row : row + 1, :length], sigma[row : row + 1], None)
        np.testing.assert_allclose(batched[row, :length], alone[0], rtol=1e-4, atol=1e-4)
    assert not np.allclose(batched[0, :5], without_lengths(x, sigma, None)[0, :5], atol=1e-2)


def test_padding_of_the_vocabulary_does_not_affect_the_output(noisy):
    """The output is independent of the padded rows and columns, which round sizes up to a multiple of 128."""
    x, sigma, _ = noisy
    params = random_params(NETWORK)
    assert params["trunk"]["embedding"].shape[0] == padded(V + 1) == 128
    changed = jax.tree.map(jnp.copy, params)
    changed["trunk"]["embedding"] = params["trunk"]["embedding"].at[V + 1 :].set(1e6)
    changed["head"]["out"]["kernel"] = params["head"]["out"]["kernel"].at[:, V + 1 :].set(1e6)
    changed["head"]["out"]["bias"] = params["head"]["out"]["bias"].at[V + 1 :].set(1e6)
    np.testing.assert_array_equal(NETWORK.log_score(changed, x, sigma), NETWORK.log_score(params, x, sigma))


def test_log_score_of_a_denoiser_equals_that_of_the_process(noisy):
    """At masked positions: r_y / (e^sigma - 1), and 0 in the log score of the mask itself."""
    x, sigma, _ = noisy
    params = random_params(NETWORK)
    actual = NETWORK.log_score(params, x, sigma)
    log_clean = NETWORK.denoiser(params)(x, sigma, None)
    expected = log_clean - jnp.log(jnp.expm1(sigma))[:, None, None]
    masked = np.asarray(x == V)
    np.testing.assert_allclose(actual[..., :V][masked], expected[masked], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(actual[..., V])[masked], 0)


def test_bfloat16_trunk_keeps_parameters_and_outputs_in_float32(noisy):
    """The outputs differ from those of float32 by the precision of bfloat16."""
    x, sigma, _ = noisy
    params = random_params(NETWORK)
    half = with_trunk(NETWORK, dtype="bfloat16")
    shapes = jax.eval_shape(half.init, jax.random.key(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"float32"}
    actual, expected = half.log_score(params, x, sigma), NETWORK.log_score(params, x, sigma)
    assert actual.dtype == jnp.float32 and not np.array_equal(actual, expected)
    assert np.abs(actual - expected).max() < 0.3 and np.abs(actual - expected).mean() < 0.03


def test_initial_network_predicts_the_uniform_distribution(noisy):
    """The head is initialised to zero."""
    x, sigma, _ = noisy
    network = with_trunk(NETWORK, layers=1)
    log_clean = jax.jit(lambda: network.denoiser(network.init(jax.random.key(0)))(x, sigma, None))()
    np.testing.assert_allclose(log_clean, -np.log(V), rtol=1e-6)


def test_sigma_is_clipped_to_the_range_of_training(noisy):
    x, _, _ = noisy
    denoiser = NETWORK.denoiser(random_params(NETWORK))
    at = [denoiser(x, jnp.full(B, sigma), None) for sigma in (0.0, 1e-3, 7.0, np.inf)]
    np.testing.assert_array_equal(at[0], at[1])
    np.testing.assert_array_equal(at[2], at[3])
    assert not np.allclose(at[0], at[2])


def test_invalid_networks_are_refused():
    with pytest.raises(ValueError, match="network.prediction must be one of denoiser, posterior, score, not 'noise'"):
        dataclasses.replace(NETWORK, prediction="noise")
    with pytest.raises(ValueError, match="network.width .16. must be a multiple of twice network.heads .3."):
        Trunk(width=16, layers=3, heads=3)


def test_networks_with_equal_hyperparameters_are_equal():
    """So that a jitted function is traced once for both. Their text is one line, as results record it."""
    network, traces = with_trunk(NETWORK), []

    @functools.partial(jax.jit, static_argnums=0)
    def width(network):
        traces.append(network)
        return jnp.float32(network.trunk.width)

    assert network == NETWORK and network.trunk is not NETWORK.trunk and hash(network) == hash(NETWORK)
    assert width(network) == width(NETWORK) == 16 and len(traces) == 1
    other = with_trunk(NETWORK, layers=4)
    assert other != NETWORK and width(other) == 16 and len(traces) == 2
    assert repr(network) == repr(NETWORK) != repr(other) and "\n" not in repr(network)
    trunk = (
        "Trunk(width=16, layers=3, heads=2, dropout=0.0, dtype='float32', scan=False, remat='none', attention='xla', "
        "long_skips=False)"
    )
    assert f"prediction='denoiser', trunk={trunk}, sigma_range=" in repr(network)


def test_network_says_whether_its_scores_are_unnormalised():
    networks = {prediction: dataclasses.replace(NETWORK, prediction=prediction) for prediction in ("denoiser", "score")}
    assert {name: network.has_unnormalised_scores for name, network in networks.items()} == {
        "denoiser": False,
        "score": True,
    }


@pytest.mark.parametrize("shape", [(2, 128, 2, 64), pytest.param((1, 384, 2, 128), marks=pytest.mark.slow)])
@pytest.mark.parametrize("padded_rows", [False, True])
def test_splash_attention_equals_xla_attention(shape, padded_rows):
    """Values and gradients at valid positions, interpreted; keys beyond the length of a row are masked."""
    q, k, v, weight = jax.random.normal(jax.random.key(0), (4, *shape))
    lengths = jnp.array([shape[1], 50][-shape[0] :]) if padded_rows else None
    valid = jnp.ones(shape[:2], bool) if lengths is None else jnp.arange(shape[1]) < lengths[:, None]

    def weighted(implementation, q, k, v, lengths=lengths):
        out = attend(implementation, q, k, v, lengths)
        return jnp.sum(jnp.where(valid[..., None, None], out * weight, 0.0)), out

    both = jax.jit(jax.value_and_grad(weighted, (1, 2, 3), has_aux=True), static_argnums=0)
    ((_, actual), gradient), ((_, expected), expected_gradient) = both("splash", q, k, v), both("xla", q, k, v)
    np.testing.assert_allclose(actual[valid], expected[valid], rtol=1e-4, atol=1e-5)
    for one, other in zip(gradient, expected_gradient):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    if padded_rows:  # the control
        assert np.abs(attend("splash", q, k, v)[valid] - expected[valid]).max() > 0.1


@pytest.mark.parametrize("head", [64, 128])
def test_splash_attention_is_lowered_for_tpus(monkeypatch, head):
    """Lowers a kernel for the forward pass and two for the backward pass, and runs none of them."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    x, lengths = jax.ShapeDtypeStruct((2, 1024, 4, head), jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.int32)
    gradient = jax.grad(lambda *args: jnp.sum(attend("splash", *args).astype(jnp.float32)), (0, 1, 2))
    lowered = jax.jit(gradient).trace(x, x, x, lengths).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") == 3


@pytest.mark.slow
def test_splash_attention_in_recomputed_layers_equals_xla_attention():
    network = with_trunk(NETWORK, layers=2, scan=True, remat="dots")
    x, sigma = jax.random.randint(jax.random.key(2), (2, 128), 0, V), jnp.array([0.5, 2.0])
    params = random_params(network)

    def loss(params, attention):
        stats = with_trunk(network, attention=attention).stats(params, lengths=jnp.array([100, 128]))
        return jnp.sum(jnp.where(jnp.arange(128) < 100, stats(jnp.full_like(x, V), sigma, x).target, 0.0))

    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (value, gradient), (expected, expected_gradient) = both(params, "splash"), both(params, "xla")
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-2), gradient, expected_gradient)


def test_unsupported_attention_is_refused(noisy):
    """Platforms and sizes that an implementation does not support: one line, before compilation."""
    x, sigma, _ = noisy
    network = with_trunk(NETWORK, attention="cudnn", dtype="bfloat16")
    with pytest.raises(UserError, match="attention=cudnn does not run on cpu devices; set network.attention=xla"):
        network.log_score(random_params(NETWORK), x, sigma)
    with pytest.raises(ValueError, match="a multiple of 128, not 12"):
        with_trunk(NETWORK, attention="splash").log_score(random_params(NETWORK), x, sigma)
    check_sizes("cudnn", "bfloat16", 64, 100)
    for dtype, head in [("float32", 64), ("bfloat16", 260)]:
        with pytest.raises(ValueError, match="cudnn"):
            check_sizes("cudnn", dtype, head, 128)


def test_splash_attention_without_its_kernel_is_refused(monkeypatch):
    """One line that says what to do, before compilation. Control: other implementations are unaffected."""
    missing = "jax.experimental.pallas.ops.tpu.splash_attention"
    for name in [missing, *(name for name in sys.modules if name.startswith(f"{missing}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    message = "needs the splash attention kernel, .* set network.attention=xla, or install a version of JAX that has it"
    with pytest.raises(UserError, match=message) as error:
        check_platform("splash", "cpu")
    assert "\n" not in str(error.value)
    q = jnp.ones((1, 128, 2, 16))
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda q: attend("splash", q, q, q), q)
    check_platform("xla", "cpu")
    np.testing.assert_allclose(attend("xla", q, q, q), q, rtol=1e-6)


def test_qkv_kernel_with_three_axes_equals_one_matrix():
    """The initial parameters equal those of a matrix [D, 3 D]; the product and its gradients equal JAX's."""
    x, weight = jax.random.normal(jax.random.key(0), (B, L, 16)), jax.random.normal(jax.random.key(1), (B, L, 48))
    split, flat = (Linear(features, use_bias=False) for features in ((3, 16), 48))
    params, matrix = (layer.init(jax.random.key(2), x)["params"]["kernel"] for layer in (split, flat))
    np.testing.assert_array_equal(params.reshape(16, 48), matrix)

    @jax.jit
    def plain(x, kernel):
        return jnp.sum((x.reshape(-1, 16) @ kernel).reshape(B, L, 48) * weight)

    def ours(x, kernel):
        return jnp.sum(split.apply({"params": {"kernel": kernel}}, x).reshape(B, L, 48) * weight)

    grad_x, grad_kernel = jax.jit(jax.grad(ours, (0, 1)))(x, params)
    expected_x, expected_kernel = jax.grad(plain, (0, 1))(x, matrix)
    np.testing.assert_allclose(ours(x, params), plain(x, matrix), rtol=1e-6)
    np.testing.assert_allclose(grad_x, expected_x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad_kernel.reshape(16, 48), expected_kernel, rtol=1e-5, atol=1e-6)


def test_gradients_of_weights_are_not_rounded_to_bfloat16():
    """They are summed in float32, on each device and over devices, also if the trunk computes in bfloat16."""
    x, weight = (jax.random.normal(jax.random.key(0), shape, jnp.bfloat16) for shape in ((64, 16), (64, 3, 16)))
    layer = Linear((3, 16), dtype="bfloat16")
    params = layer.init(jax.random.key(1), x)
    gradient = jax.jit(lambda params, x, weight: jax.vjp(lambda params: layer.apply(params, x), params)[1](weight))
    kernel = gradient(params, x, weight)[0]["params"]["kernel"]
    assert kernel.dtype == jnp.float32 and np.mean(kernel != kernel.astype(jnp.bfloat16)) > 0.5
