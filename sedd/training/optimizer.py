"""The optimisers: the paper's AdamW, and Muon for the trunk's matrices with Adam for the rest."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from sedd.runtime.trees import name_of

DECODER = "codec/decoder/"  # trained beside the network, from which its gradient is apart: clipped by itself


def make_optimizer(config: ConfigDict, steps: int, loss: str | None = None) -> optax.GradientTransformation:
    """Returns the optimiser that `config` (the group `optimizer`) describes, for a run of `steps` steps.

    loss: `training.loss`; of "denoising" and "decoder" the parameters without a gradient stay as they are.
    """
    betas = dict(b1=config.b1, b2=config.b2)
    if config.name == "adamw":
        rate = learning_rate(config, config.learning_rate, steps)
        update = optax.adamw(rate, weight_decay=config.weight_decay, **betas)
    else:
        update = optax.contrib.muon(
            learning_rate(config, config.learning_rate, steps),
            adam_learning_rate=learning_rate(config, config.adam_learning_rate, steps),
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=_matrices,
        )
    clip = _clip(config.clip_norm)
    clips = optax.chain(optax.masked(clip, _outside(DECODER)), optax.masked(clip, _inside(DECODER)))
    if loss not in _FIXED:
        return optax.chain(clips, update)
    return optax.chain(clips, update, optax.masked(optax.set_to_zero(), _FIXED[loss]))  # weight decay too


def _clip(max_norm: float) -> optax.GradientTransformation:
    """optax's clip_by_global_norm by a product: XLA for CPUs would compute its quotient in a pass of its own."""

    def update(gradient, state, params=None):
        scale = jnp.minimum(1.0, max_norm / optax.tree.norm(gradient))
        return jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), gradient), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _inside(prefix: str) -> Callable[[dict], dict]:
    """Returns the function that marks the parameters whose paths begin with `prefix`."""
    return lambda params: jax.tree_util.tree_map_with_path(lambda path, _: name_of(path).startswith(prefix), params)


def _outside(prefix: str) -> Callable[[dict], dict]:
    """Returns the function that marks all others."""
    return lambda params: jax.tree.map(lambda inside: not inside, _inside(prefix)(params))


_FIXED = {"denoising": _inside(DECODER), "decoder": _outside(DECODER)}  # what a loss leaves out, by `training.loss`


def learning_rate(config: ConfigDict, peak: float, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Returns the schedule: linear warmup 1/warmup, 2/warmup, ... to the peak, then constant or linear decay to 0."""

    def rate(count):
        warm = jnp.minimum((count + 1) / config.warmup_steps, 1.0)
        if config.decay == "constant":
            return peak * warm
        remaining = (steps - count) / max(1, steps - config.warmup_steps)
        return peak * warm * jnp.clip(remaining, 0.0, 1.0)

    return rate


def _matrices(params: dict) -> dict:
    """Returns Muon's matrix axes of the trunk's kernels, per layer if scanned; None for parameters that Adam updates.

    Without this, optax would give every 2-D array to Muon, the embedding too, and every scanned kernel to Adam. The
    kernel of queries, keys and values is one matrix, [W, 3 W], although it is stored with the 3 as a separate axis.
    """

    def one(path, leaf):
        name = name_of(path)
        if not name.endswith("kernel") or name in ("head/out/kernel", f"{DECODER}out/kernel"):
            return None
        if name.endswith("estimates/kernel"):  # one matrix for each layer, its middle axis
            return optax.contrib.MuonDimensionNumbers(-3, (-1,))
        columns = 2 if name.endswith("qkv/kernel") else 1
        return optax.contrib.MuonDimensionNumbers(-columns - 1, tuple(range(-columns, 0)))

    return jax.tree_util.tree_map_with_path(one, params)
