"""A distribution over words with latents: its exact Gaussian denoiser, and distributions over latents on a grid.

On a grid of two latents of size 1 everything is exact but for the grid: expectations over noisy latents, and the
distribution over words of a sampler whose step adds noise to each latent independently.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from oracle import Joint, states

from sedd.diffusion.denoiser import Latent, mean_from
from sedd.diffusion.gaussian.guidance import nearest
from sedd.diffusion.gaussian.process import Gaussian

LINE = np.array([[-1.3], [0.1], [1.2]])  # embeddings of three tokens, of size 1
PLANE = np.array([[1.3, -0.4], [-0.8, -1.1], [0.1, 1.2], [-1.0, 0.9]])  # of four tokens, of size 2
AXIS = np.linspace(-6, 6, 145)  # the values of a latent on the grid


@dataclasses.dataclass(frozen=True, eq=False)
class Embedded:
    """A joint distribution of tokens, and a table of their embeddings, Float[V D]."""

    joint: Joint
    table: np.ndarray

    @property
    def process(self):
        return Gaussian(self.table.shape[1])

    @property
    def words(self):
        """Every sequence of tokens. Int[W L]."""
        return states(len(self.table), self.joint.p.ndim)

    @property
    def codes(self):
        """The clean latents of every sequence. Float[W L D]."""
        return self.table[self.words]

    def nearest(self, z0):
        """The number of the sequence whose tokens have the nearest embeddings. Float[B L D] -> Int[B]."""
        tokens = nearest(z0, jnp.asarray(self.table, z0.dtype))
        return tokens @ (len(self.table) ** jnp.arange(tokens.shape[-1])[::-1])

    def log_posterior(self, z, sigma, given=False):
        """log p(w | z) of each sequence w. Float[B L D], Float[B] -> Float[B W].

        given: Bool[... L], True where z is a clean embedding, which no other token has.
        """
        table = jnp.asarray(self.table, z.dtype)
        evidence = self.process.log_evidence(z, table, sigma[:, None])
        distance = jnp.sum((z[..., None, :] - table) ** 2, axis=-1)
        evidence = jnp.where(jnp.asarray(given)[..., None], jnp.where(distance < 1e-6, 0.0, -jnp.inf), evidence)
        words, log_p = jnp.asarray(self.words), jnp.log(jnp.asarray(self.joint.p.ravel(), z.dtype))
        return jax.nn.log_softmax(log_p + sum(evidence[:, i][:, words[:, i]] for i in range(words.shape[1])), axis=-1)

    def denoiser(self, given=False):
        """The exact Denoiser, log p(x0_i = v | z), conditioned on which latents are given."""

        def denoiser(x, sigma, positions=None):
            p = jnp.exp(self.log_posterior(x.z, sigma, given))
            return jnp.log(jnp.einsum("bw,wlv->blv", p, jax.nn.one_hot(self.words, len(self.table), dtype=p.dtype)))

        return denoiser

    def mean(self, given=False):
        """The exact MeanDenoiser, E[z0 | z], conditioned on which latents are given."""
        return lambda x, sigma: mean_from(self.denoiser(given), jnp.asarray(self.table, x.z.dtype))(x, sigma)


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """A joint distribution of tokens, and latents of each sequence that depend on all of its tokens.

    codes: Float[W L D]. The noisy latents are a mixture of W Gaussians.
    """

    joint: Joint
    codes: np.ndarray

    @classmethod
    def of(cls, joint, table, mixing=0.5):
        """Each latent is the embedding of its token and, in the share `mixing`, that of its neighbour."""
        codes = table[states(len(table), joint.p.ndim)]
        return cls(joint, codes + mixing * np.roll(codes, 1, axis=1))

    @property
    def process(self):
        return Gaussian(self.codes.shape[-1])

    @property
    def words(self):
        """Every sequence of tokens. Int[W L]."""
        return states(self.joint.p.shape[0], self.joint.p.ndim)

    def log_posterior(self, z, sigma):
        """log p(w | z) of each sequence w. Float[B L D], Float[B] -> Float[B W]."""
        codes = jnp.asarray(self.codes, z.dtype)
        row = codes.reshape(len(codes), -1)
        evidence = Gaussian(row.shape[1]).log_evidence(z.reshape(len(z), -1), row, sigma)
        return jax.nn.log_softmax(jnp.log(jnp.asarray(self.joint.p.ravel(), z.dtype)) + evidence, axis=-1)

    def mean(self):
        """The exact MeanDenoiser."""

        def mean(x, sigma):
            return jnp.einsum(
                "bw,wld->bld", jnp.exp(self.log_posterior(x.z, sigma)), jnp.asarray(self.codes, x.z.dtype)
            )

        return mean

    def log_tokens(self, z, sigma):
        """What an exact decoder returns, log p(x0_i = v | z). Float[B L D], Float[B] -> Float[B L V]."""
        of_token = jax.nn.one_hot(self.words, self.joint.p.shape[0], dtype=z.dtype)
        return jnp.log(jnp.einsum("bw,wlv->blv", jnp.exp(self.log_posterior(z, sigma)), of_token))

    def nearest(self, z0):
        """The number of the sequence with the nearest latents. Float[B L D] -> Int[B]."""
        return nearest(z0.reshape(len(z0), -1), jnp.asarray(self.codes.reshape(len(self.codes), -1), z0.dtype))


def grid():
    """All pairs of values of two latents, and their weights as points of the plane. Float[N 2], Float[]."""
    z = np.stack(np.meshgrid(AXIS, AXIS, indexing="ij"), axis=-1).reshape(-1, 2)
    return jnp.asarray(z), (AXIS[1] - AXIS[0]) ** 2


def density(embedded, sigma):
    """q(z | w) of each sequence of two tokens, at each point of the grid. Float[W N]."""
    z, _ = grid()
    q = -jnp.expm1(-sigma)
    square = jnp.sum((z - jnp.exp(-sigma / 2) * embedded.codes[:, None, :, 0]) ** 2, axis=-1)
    return jnp.exp(-square / (2 * q)) / (2 * jnp.pi * q)


@functools.partial(jax.jit, static_argnames=("sampler", "mean", "embedded"))
def sampler_distribution(sampler, mean, embedded, given=None, free=None):
    """The distribution over sequences of a grid sampler that adds noise, two latents of which are free. Float[W].

    given: Int[L] tokens, and free: Bool[L]; None: two tokens, both free.
    """
    length = embedded.joint.p.ndim
    free = jnp.ones(length, bool) if free is None else free
    at = jnp.argsort(~free, stable=True)[:2]
    clean = jnp.zeros((length, 1)) if given is None else jnp.asarray(embedded.table)[given]
    z, _ = grid()
    x = jnp.broadcast_to(clean, (len(z), length, 1)).at[:, at, 0].set(z)
    state = Latent(x, jnp.zeros_like(x))

    def estimates(entry):
        at_sites = jax.tree.map(lambda leaf: jnp.reshape(leaf, (1, 1)), entry)
        means, std = sampler.moments(mean(state, jnp.full(len(z), entry.sigma)), x, at_sites)
        return means[:, at, 0], jnp.reshape(std, ())

    def step(p, entry):
        means, std = estimates(entry)
        kernel = jax.nn.softmax(-((jnp.asarray(AXIS) - means[..., None]) ** 2) / (2 * std**2), axis=-1)
        return (kernel[:, 0].T @ (p[:, None] * kernel[:, 1])).ravel(), None

    plan = sampler.plan(None, None)
    p = jax.nn.softmax(-jnp.sum(z**2, axis=-1) / 2)
    p, _ = jax.lax.scan(step, p, jax.tree.map(lambda leaf: leaf[:-1], plan))
    means, _ = estimates(jax.tree.map(lambda leaf: leaf[-1], plan))
    number = embedded.nearest(jnp.broadcast_to(clean, (len(z), length, 1)).at[:, at, 0].set(means))
    return jnp.zeros(embedded.joint.p.size).at[number].add(p)
