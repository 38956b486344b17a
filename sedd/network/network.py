"""The network and its conversions: with parameters it is a Denoiser and a StatsFn.

This module converts the network's output into the quantities of a process. A network predicts one of

    "score"     an unnormalised log score, as in the paper (for Absorbing less the shift log(e^sigma - 1) + log V), or
    "denoiser"  log r itself, the log posterior of the clean token given all other tokens.

The training loss uses an unnormalised score as it is; bounds also use `process.tightened` of it. Samplers use
`process.clean_from_score` of it: the projection to the simplex is done here and nowhere else.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random
from sedd.diffusion.discrete.process import Absorbing, Uniform, log_expm1
from sedd.diffusion.discrete.score import Denoiser, ScoreStats, StatsFn, clean_stats, score_stats
from sedd.network.trunk import Head, Trunk, padded

PREDICTIONS = ("denoiser", "score")
MAX_ROWS, MAX_LOGITS = 64, 2**28  # of one batch on a device in evaluation and sampling, by default


@dataclasses.dataclass(frozen=True)
class Network:
    """The hyperparameters of a network; frozen and hashable, a static argument of jit.

    sigma_range: the noise levels of training; the sigma that the network is conditioned on is clipped to this range.
    given_embedding: adds a learned embedding to the given tokens, which are clean at any noise. For the uniform process
    only, where a token does not show whether it is corrupted; under the absorbing process any token but the mask is
    clean.
    """

    process: Absorbing | Uniform
    prediction: str
    width: int
    layers: int
    heads: int
    sigma_range: tuple[float, float]
    cond_dim: int = 128
    embedding_std: float = 0.5
    dropout: float = 0.0
    dtype: str = "float32"
    scan: bool = False
    remat: str = "none"
    attention: str = "xla"
    given_embedding: bool = False

    def __post_init__(self):
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"network.prediction must be one of {', '.join(PREDICTIONS)}, not {self.prediction!r}")
        if self.width % (2 * self.heads):
            raise ValueError(f"network.width ({self.width}) must be a multiple of twice network.heads ({self.heads})")
        if self.given_embedding and isinstance(self.process, Absorbing):
            raise ValueError(
                "network.given_embedding is for the uniform process; the absorbing process does not need it"
            )

    @property
    def trunk(self) -> Trunk:
        return Trunk(
            states=self.process.num_states,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            cond_dim=self.cond_dim,
            embedding_std=self.embedding_std,
            dropout=self.dropout,
            dtype=self.dtype,
            scan=self.scan,
            remat=self.remat,
            attention=self.attention,
            given_embedding=self.given_embedding,
        )

    @property
    def head(self) -> Head:
        return Head(self.process.num_states)

    def init(self, key: jax.Array) -> dict:
        """Initial parameters, float32: {"trunk": ..., "head": ...}. A pure function that can be jitted and sharded."""
        tokens, sigma = jnp.zeros((1, 2), jnp.int32), jnp.ones(1, jnp.float32)
        for_trunk, for_head = jax.random.split(keyed_random.threefry(key))
        trunk = self.trunk.init(for_trunk, tokens, sigma)
        sites = (jnp.zeros((1, 2, self.width), jnp.float32), jnp.zeros((1, 1, self.cond_dim), jnp.float32))
        return {"trunk": trunk["params"], "head": self.head.init(for_head, *sites)["params"]}

    def num_parameters(self) -> int:
        """Number of parameters, without the padding of the vocabulary."""
        params = jax.eval_shape(self.init, keyed_random.root_key(0))
        stored = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
        num_padding = padded(self.process.num_states) - self.process.num_states
        return stored - num_padding * (self.width + self.width + 1)

    def rows_at_once(self, length: int) -> int:
        """Default batch size per device for rows of `length` tokens: their logits fit into a gigabyte."""
        return max(1, min(MAX_ROWS, MAX_LOGITS // (length * self.process.num_states)))

    def denoiser(self, params: dict, lengths: jax.Array | None = None, given: jax.Array | None = None) -> Denoiser:
        """Returns the Denoiser of these parameters; the head runs at the requested positions only.

        lengths: Int[B], number of valid tokens; given: Bool[B L], True at positions that hold given, clean tokens in
        every x. Here and below: ValueError if `given` is set and the network has no `given_embedding`.
        """

        def denoise(x, sigma, positions=None):
            clipped_sigma = self._clipped(sigma)
            hidden, condition = self._hidden(params, x, clipped_sigma, lengths=lengths, given=given)
            if positions is not None:
                hidden = jnp.take_along_axis(hidden, positions[..., None], axis=1)
                x = jnp.take_along_axis(x, positions, axis=1)
            return self._log_clean(self._logits(params, hidden, condition[:, None]), x, clipped_sigma[:, None])

        return denoise

    def stats(
        self,
        params: dict,
        keys: jax.Array | None = None,
        lengths: jax.Array | None = None,
        given: jax.Array | None = None,
        masked_pairs: bool = False,
        tightened: bool = False,
    ) -> StatsFn:
        """Returns the StatsFn of these parameters. keys: Key[B] for dropout; lengths: Int[B]; given: Bool[B L].

        masked_pairs: the head runs at masked positions only, without those that are masked in x0 too. Rows 2i and
        2i + 1 together may hold at most L + 1 of them, as antithetic mask counts do. At other positions the statistics
        are 0; Absorbing does not use them. tightened: for an unnormalised score only; the statistics get a leading axis
        of size two, for the score as it is and for `process.tightened` of it.
        """

        def stats(x, sigma, x0):
            sigma = sigma.astype(jnp.float32)
            hidden, condition = self._hidden(params, x, self._clipped(sigma), keys, lengths, given)
            sites = (hidden, jnp.broadcast_to(condition[:, None], (*x.shape, self.cond_dim)), x, x0)
            sites = (*sites, jnp.broadcast_to(sigma[:, None], x.shape))
            if not masked_pairs:
                return self._stats(params, tightened, *sites)
            gather, scatter = _masked_of_pairs((x == self.process.mask_id) & (x0 != self.process.mask_id))
            return jax.tree.map(scatter, self._stats(params, tightened, *map(gather, sites)))

        return stats

    def log_score(
        self,
        params: dict,
        x: jax.Array,
        sigma: jax.Array,
        lengths: jax.Array | None = None,
        given: jax.Array | None = None,
    ) -> jax.Array:
        """The log concrete score of all states, the mask included; 0 at the current token. Float32[B L S].

        Conditioned on sigma without clipping, like the published models. For the absorbing process it is meaningful at
        masked positions only.
        """
        sigma = sigma.astype(jnp.float32)
        hidden, condition = self._hidden(params, x, sigma, lengths=lengths, given=given)
        logits = self._logits(params, hidden, condition[:, None])
        if self.prediction == "score":
            return self._unnormalised_log_score(logits, x, sigma[:, None])
        log_clean = self._log_clean(logits, x, sigma[:, None])
        log_noised = self.process.log_noised(log_clean, sigma[:, None])
        return log_noised - jnp.take_along_axis(log_noised, x[..., None], axis=-1)

    def _clipped(self, sigma):
        return jnp.clip(sigma.astype(jnp.float32), *self.sigma_range)

    def _hidden(self, params, x, sigma, keys=None, lengths=None, given=None):
        if given is not None and not self.given_embedding:
            raise ValueError(
                "this network has no embedding of given tokens; train one with network.given_embedding=True"
            )
        return self.trunk.apply({"params": params["trunk"]}, x, sigma, keys, lengths, given)

    def _logits(self, params, hidden, condition):
        return self.head.apply({"params": params["head"]}, hidden, condition)

    def _log_clean(self, logits, x, sigma):
        if self.prediction == "score":
            return self.process.clean_from_score(self._unnormalised_log_score(logits, x, sigma), sigma)
        return jax.nn.log_softmax(logits[..., : self.process.vocab_size], axis=-1)

    def _unnormalised_log_score(self, logits, x, sigma):
        if isinstance(self.process, Absorbing):
            logits = logits - (log_expm1(sigma) + math.log(self.process.vocab_size))[..., None]
        return jnp.where(jax.nn.one_hot(x, self.process.num_states, dtype=bool), 0.0, logits)

    def _stats(self, params, tightened, hidden, condition, x, x0, sigma) -> ScoreStats:
        logits = self._logits(params, hidden, condition)
        if self.prediction == "score":
            log_score = self._unnormalised_log_score(logits, x, sigma)
            if not tightened:
                return score_stats(log_score, x, x0)
            scores = (log_score, self.process.tightened(log_score, sigma))
            return jax.tree.map(lambda *both: jnp.stack(both), *(score_stats(one, x, x0) for one in scores))
        return clean_stats(self.process, self._log_clean(logits, x, sigma), x, x0, sigma)


def _masked_of_pairs(masked: jax.Array):
    """Gather and scatter between all positions and the L + 1 masked ones of each pair of rows.

    masked: Bool[B L]. Returns gather: [B L ...] -> [B/2 L+1 ...], and its inverse scatter, 0 elsewhere. A pair with
    fewer masks is filled up with positions that are not masked.
    """
    # Pair by pair under `vmap`, so that no device needs the pairs of another.
    batch, length = masked.shape
    indices = jnp.argsort(~masked.reshape(batch // 2, 2 * length), axis=-1, stable=True)[:, : length + 1]

    def gather(values):
        return jax.vmap(lambda row, at: row[at])(values.reshape(batch // 2, 2 * length, *values.shape[2:]), indices)

    def scatter(values):  # [... B/2 L+1], with or without a leading axis
        def one(row, at):
            return jnp.zeros((*row.shape[:-1], 2 * length), row.dtype).at[..., at].set(row)

        return jax.vmap(one, (-2, 0), -2)(values, indices).reshape(*values.shape[:-2], batch, length)

    return gather, scatter
