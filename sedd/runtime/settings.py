"""The global settings of JAX on which numbers depend."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def jax_defaults() -> Iterator[None]:
    """A block, or as a decorator a function, in which they have JAX's defaults, so that results do not depend on them.

    jax_enable_x64, jax_threefry_partitionable, jax_numpy_dtype_promotion and jax_numpy_rank_promotion, in this thread.
    Left as they are: jax_default_matmul_precision, which trades accuracy for speed, and the settings that only look for
    faults. Keys name their implementation (`sedd.diffusion.keyed_random.root_key`), and need no setting. Functions that
    run inside a caller's program, such as `Model.denoiser`, keep to the caller's settings.
    """
    with (
        jax.enable_x64(False),
        jax.threefry_partitionable(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield
