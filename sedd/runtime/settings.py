"""The global settings of JAX that results depend on."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def jax_defaults() -> Iterator[None]:
    """Sets JAX's defaults in this thread for a block, or as a decorator for a function.

    Sets jax_enable_x64, jax_threefry_partitionable, jax_numpy_dtype_promotion and jax_numpy_rank_promotion. Unchanged
    are jax_default_matmul_precision, which trades accuracy for speed, and settings that only report errors, such as
    jax_debug_nans. Keys name their implementation (`sedd.diffusion.keyed_random.root_key`) and need no setting.
    Functions that run inside a caller's program, such as `Model.denoiser`, use the caller's settings.
    """
    with (
        jax.enable_x64(False),
        jax.threefry_partitionable(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield
