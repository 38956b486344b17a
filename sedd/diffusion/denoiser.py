"""The function types at which networks and samplers meet, and the functions that make one of another.

    Denoiser:     (x: State, sigma: Float[B], positions: Int[B P] | None) -> log_clean: Float[B P V]
    MeanDenoiser: (x: Latent, sigma: Float[B]) -> E[z0 | z]: Float[B L D]

A Denoiser returns the distribution of each clean token given the noisy state, normalised over the V clean tokens, at
every sigma including 0 and infinity; positions None means all L. Of noisy tokens it is that given all the others,

    log_clean[b, p, v] = log r_i(v),   r_i(v) = p(x0_i = v | the noisy x without i, at sigma),   i = positions[b, p],

and for the absorbing process its outputs at positions that are not masked are unspecified. Of noisy latents it is
p(x0_i = v | z), the position's own latent included. A MeanDenoiser returns the mean of the clean latents given the
noisy ones. Neither type depends on a network.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp


class Latent(NamedTuple):
    """Noisy latents, and the memory of a network that is conditioned on its own last answer (self-conditioning)."""

    z: jax.Array  # Float[B L D]
    estimate: jax.Array  # Float[B L D], the last E[z0 | z], 0 before the first call


State = jax.Array | Latent  # what diffuses: Int[B L], tokens, or Latent; every leaf has the leading axes [B L]
Clean = jax.Array  # Int[B L], tokens, or Float[B L D], latents without noise

Denoiser = Callable[[State, jax.Array, jax.Array | None], jax.Array]
MeanDenoiser = Callable[[Latent, jax.Array], jax.Array]

_State = TypeVar("_State")


def keep(x: _State, given: Clean, free: jax.Array) -> _State:
    """The state with the clean values at the given positions, in every leaf. free: Bool[B L], False where given.

    So a given latent has no noise, and the memory of it is the latent itself.
    """

    def kept(leaf):
        leaf = jnp.asarray(leaf)
        where = jnp.reshape(free, (*jnp.shape(free), *[1] * (leaf.ndim - 2)))
        return jnp.where(where, leaf, jnp.asarray(given, leaf.dtype))

    return jax.tree.map(kept, x)


def mean_from(denoiser: Denoiser, table: jax.Array) -> MeanDenoiser:
    """The MeanDenoiser of a Denoiser over embeddings: the average of the table, Float[V D], under its distribution.

    Score interpolation (Dieleman et al., arXiv 2211.15089, section 3.1).
    """

    def mean(x, sigma):
        return jnp.exp(denoiser(x, sigma, None)) @ table

    return mean


# Denoiser -> Denoiser: every modification of a model's predictions. Samplers are independent of them.


def clamped(denoiser: Callable[..., jax.Array], given: Clean, free: jax.Array) -> Callable[..., jax.Array]:
    """Evaluates a Denoiser or a MeanDenoiser with the given positions of x clean. Arguments as of `keep`."""

    def inner(x, *others):
        return denoiser(keep(x, given, free), *others)

    return inner


def condition_on_mask_ratio(process, denoiser: Denoiser, lengths: jax.Array | None = None) -> Denoiser:
    """Replaces sigma by `process.sigma_from_mask_ratio(x)`, the noise level of x itself (absorbing process only).

    Applied inside `in_block`, it counts the masks of the full block, as likelihoods do. lengths: Int[B], the valid
    lengths. A trained network is better so conditioned, whatever the sampler: the bound of Tweedie's own steps is lower
    too, by .001 to .008 nats a token on two small networks (benchmarks/noise_conditioning.py).
    """

    def inner(x, sigma, positions=None):
        return denoiser(x, process.sigma_from_mask_ratio(x, lengths), positions)

    return inner


def in_block(denoiser: Denoiser, block: int, mask: int) -> Denoiser:
    """Pads shorter sequences with masks to the full block length (absorbing process only).

    The predicted distribution of the first positions is then the model's exact marginal.
    """

    def inner(x, sigma, positions=None):
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[-1]), x.shape)
        x = jnp.pad(x, ((0, 0), (0, block - x.shape[-1])), constant_values=mask)
        return denoiser(x, sigma, positions)

    return inner


def edited(denoiser: Denoiser, edit: Callable[[jax.Array], jax.Array]) -> Denoiser:
    """Modifies the distribution over clean tokens: edit(log_clean: Float[B P V]) -> log weights, normalised here.

    For the absorbing process an edit does not change the rate of unmasking. For the uniform process, whose moves depend
    on the predicted distribution, it changes the target distribution.
    """

    def inner(x, sigma, positions=None):
        return jax.nn.log_softmax(edit(denoiser(x, sigma, positions)), axis=-1)

    return inner


def temperature(log_clean: jax.Array, value: jax.Array | float) -> jax.Array:
    """The log of the weights r^(1 / value)."""
    return log_clean / value


def nucleus(log_clean: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """Keeps the most likely tokens whose total mass is at least `top_p` (Holtzman et al., arXiv 1904.09751).

    Bisects for the threshold instead of sorting the vocabulary: 32 sums, which determine it to within 2^-32 of the
    largest probability. At top_p = 1 all tokens are kept.
    """
    p = jnp.exp(log_clean)

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        enough = jnp.sum(jnp.where(p >= middle, p, 0.0), axis=-1, keepdims=True) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    high = jnp.max(p, axis=-1, keepdims=True)
    low, _ = jax.lax.fori_loop(0, 32, halve, (jnp.zeros_like(high), high))
    return jnp.where((p >= low) | (top_p >= 1), log_clean, -jnp.inf)
