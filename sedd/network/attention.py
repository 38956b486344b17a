"""Attention over the valid positions, by one of three implementations of the same function."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sedd.errors import UserError
from sedd.network import cpu_attention
from sedd.network.sharding import has_mesh
from sedd.runtime.parallel import BATCH_AXES, MODEL_AXIS

LANES = 128  # block size of splash attention, in positions
# The platforms of each implementation. On CPUs the splash kernel is interpreted, for tests.
_PLATFORMS = {"xla": ("cpu", "gpu", "tpu"), "cudnn": ("gpu",), "splash": ("tpu", "cpu")}


def attend(
    implementation: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k / sqrt(K)) v over the first `lengths` keys of each row. q, k, v: Float[B L H K]; lengths: Int[B].

    implementation: a key of ATTENTION. mask: Bool[B L L] or Bool[1 L L], True where a query may attend to a key.
    Outputs are unspecified at positions beyond a row's length, and for queries that may attend to no key. UserError if
    the implementation does not run on the default backend, or takes no mask.
    """
    check_platform(implementation, jax.default_backend())
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # JAX's own functions promote
        return ATTENTION[implementation](q, k, v, lengths, None if mask is None else mask[:, None])


def check_platform(implementation: str, platform: str):
    """UserError if the implementation does not run on devices of the platform, or if JAX does not have its kernel."""
    if platform not in _PLATFORMS[implementation]:
        raise UserError(
            f"network.attention={implementation} does not run on {platform} devices; set network.attention=xla"
        )
    if implementation == "splash":
        _splash_modules()


def check_sizes(implementation: str, dtype: str, head: int, length: int):
    """ValueError if the implementation does not support the sizes. head: K, the width of a head; length: L."""
    if implementation == "cudnn" and dtype != "bfloat16":
        raise ValueError("network.attention=cudnn needs network.dtype=bfloat16")
    if implementation == "cudnn" and (head % 8 or head > 256):
        raise ValueError(f"network.attention=cudnn takes heads whose width is a multiple of 8, up to 256, not {head}")
    if implementation == "splash" and length % LANES:
        raise ValueError(f"network.attention=splash takes lengths that are a multiple of {LANES}, not {length}")


def _xla(q, k, v, lengths, mask):
    if lengths is not None:
        valid = _valid(q, lengths)[:, None, None, :]
        mask = valid if mask is None else mask & valid
    if jax.default_backend() == "cpu":
        return cpu_attention.attend(q, k, v, mask)
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def _cudnn(q, k, v, lengths, mask):
    return jax.nn.dot_product_attention(q, k, v, mask=mask, key_value_seq_lengths=lengths, implementation="cudnn")


def _splash(q, k, v, lengths, mask):
    if mask is not None:
        raise UserError("network.attention=splash takes no attention mask; set network.attention=xla")
    check_sizes("splash", q.dtype.name, q.shape[-1], q.shape[1])
    if not has_mesh():
        return _splash_of_device(q, k, v, lengths)
    spec = P(BATCH_AXES, None, MODEL_AXIS)  # the compiler cannot partition the kernel
    in_specs = (spec, spec, spec, P(BATCH_AXES))
    return jax.shard_map(_splash_of_device, in_specs=in_specs, out_specs=spec, check_vma=False)(q, k, v, lengths)


def _splash_of_device(q, k, v, lengths):
    kernels, masks = _splash_modules()
    length, heads, head = q.shape[1:]
    block = max(size for size in (LANES, 2 * LANES, 4 * LANES) if length % size == 0)
    names = ("q", "kv", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([masks.FullMask((length, length))] * heads),
        block_sizes=kernels.BlockSizes(**{f"block_{name}": block for name in names}),
        head_shards=1,
        q_seq_shards=1,
        interpret=jax.default_backend() == "cpu",
    )
    # Valid positions attend to valid ones, the others to each other, so that no row of the softmax is empty.
    valid = None if lengths is None else _valid(q, lengths).astype(jnp.int32)
    segments = None if lengths is None else kernels.SegmentIds(valid, valid)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in ((q * head**-0.5).astype(q.dtype), k, v))
    return jnp.swapaxes(jax.vmap(kernel)(q, k, v, segments), 1, 2)


def _splash_modules():
    """Returns the modules of the kernel and of its masks. UserError if this JAX does not have them."""
    # Imported on use: Pallas for TPUs takes a second to import. JAX may drop its copy, which is no longer maintained.
    try:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
    except ImportError as error:
        raise UserError(
            f"network.attention=splash needs the splash attention kernel, which JAX {jax.__version__} does not have "
            f"({error}); set network.attention=xla, or install a version of JAX that has it"
        ) from None
    return splash_attention_kernel, splash_attention_mask


def _valid(x, lengths):
    """True at the first `lengths` positions of each row. x: [B L ...]; lengths: Int[B]. Bool[B L]."""
    return jnp.arange(x.shape[1])[None] < lengths[:, None]


ATTENTION = {"xla": _xla, "cudnn": _cudnn, "splash": _splash}
