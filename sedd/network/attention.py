"""Attention over all valid positions, by the kernel that the config names. One function, whoever computes it."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sedd.errors import UserError
from sedd.network.sharding import ROWS, SPLIT, has_mesh

LANES = 128  # splash attention works on blocks of so many positions
_ON = {"xla": ("cpu", "gpu", "tpu"), "cudnn": ("gpu",), "splash": ("tpu", "cpu")}  # on CPUs interpreted, for tests


def attend(how: str, q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """softmax(q k / sqrt(K)) v, over the first `lengths` keys of each row. q, k, v: Float[B L H K]; lengths: Int[B].

    What the queries beyond a row's length get is nobody's business. UserError where `how` does not run here.
    """
    check_platform(how, jax.default_backend())
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # JAX's own functions promote
        return ATTENTION[how](q, k, v, lengths)


def check_platform(how: str, platform: str):
    """UserError where this kind of attention does not run on devices of the platform."""
    if platform not in _ON[how]:
        raise UserError(f"network.attention={how} does not run on {platform} devices; set network.attention=xla")


def check_sizes(how: str, dtype: str, head: int, length: int):
    """ValueError where this kind of attention does not take these sizes. head: K, the width of a head."""
    if how == "cudnn" and dtype != "bfloat16":
        raise ValueError("network.attention=cudnn needs network.dtype=bfloat16")
    if how == "cudnn" and (head % 8 or head > 256):
        raise ValueError(f"network.attention=cudnn takes heads whose width is a multiple of 8, up to 256, not {head}")
    if how == "splash" and length % LANES:
        raise ValueError(f"network.attention=splash takes lengths that are a multiple of {LANES}, not {length}")


def _xla(q, k, v, lengths):
    mask = None if lengths is None else _valid(q, lengths)[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def _cudnn(q, k, v, lengths):
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")


def _splash(q, k, v, lengths):
    check_sizes("splash", q.dtype.name, q.shape[-1], q.shape[1])
    if not has_mesh():
        return _splash_of_device(q, k, v, lengths)
    split = P(ROWS, None, SPLIT)  # the compiler cannot split the kernel by itself
    return jax.shard_map(_splash_of_device, in_specs=(split, split, split, P(ROWS)), out_specs=split, check_vma=False)(
        q, k, v, lengths
    )


def _splash_of_device(q, k, v, lengths):
    # Imported by whoever uses it: Pallas for TPUs takes a second.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

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
    # Valid positions see valid ones, the others each other, so that no row of the softmax is empty.
    valid = None if lengths is None else _valid(q, lengths).astype(jnp.int32)
    segments = None if lengths is None else kernels.SegmentIds(valid, valid)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in ((q * head**-0.5).astype(q.dtype), k, v))
    return jnp.swapaxes(jax.vmap(kernel)(q, k, v, segments), 1, 2)


def _valid(x, lengths):
    """Bool[B L]"""
    return jnp.arange(x.shape[1])[None] < lengths[:, None]


ATTENTION = {"xla": _xla, "cudnn": _cudnn, "splash": _splash}
