"""Networks that generate rows block after block: block diffusion, and the autoregressive model, its blocks one token.

The trunk, the embeddings and the head are those of `TokenNetwork`; what a position may attend to differs.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sedd.network.network import apply
from sedd.network.token_network import TokenNetwork


@dataclasses.dataclass(frozen=True)
class BlockNetwork(TokenNetwork):
    """Block diffusion: the tokens of a block given the noisy ones of their block and the clean ones before it (BD3-LM).

    The trunk runs on the noisy tokens and the clean ones side by side, at the same positions. A noisy token attends to
    its own noisy block and to the clean blocks before it, a clean one to the clean tokens up to the end of its block.
    block_size: the tokens of a block, which divides the length of a row. Arriola et al., arXiv 2503.09573, section 3.

    As a Denoiser it sees one row: the first block with a mask is the noisy one, the blocks before it are its context,
    and outputs in other blocks are unspecified.
    """

    block_size: int = dataclasses.field(kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.process.mask_id is None or self.prediction != "denoiser" or self.conditioning != "constant":
            raise ValueError(
                "network.block_size is for the absorbing process, network.prediction=denoiser and "
                "network.conditioning=constant"
            )

    @property
    def block_of_generation(self):
        return self.block_size

    def trunk_length(self, length):
        return 2 * length

    def hidden(self, params, x, sigma, keys=None, lengths=None, given=None, context=None):
        self._checked(given)
        length = x.shape[1]
        if context is not None:
            return self._hidden(params, x, jnp.arange(length)[None], context, keys, lengths)
        first = jnp.argmax(x == self.process.mask_id, axis=1)[:, None] // self.block_size * self.block_size
        at = first + jnp.arange(self.block_size)[None]  # of a short row's last block some are past its end
        noisy = jnp.take_along_axis(x, jnp.minimum(at, length - 1), axis=1)
        lengths = jnp.full(len(x), length) if lengths is None else lengths
        hidden, condition = self._hidden(params, noisy, at, x, keys, lengths)
        rows = jnp.zeros((*x.shape, hidden.shape[-1]), hidden.dtype)
        return jax.vmap(lambda row, at, hidden: row.at[at].set(hidden, mode="drop"))(rows, at, hidden), condition

    def _hidden(self, params, noisy, at, context, keys, lengths):
        """Hidden states of noisy tokens, Int[B P], given the context, Int[B L]. at: their positions, [B P] or [1 P]."""
        num_noisy, num_clean = noisy.shape[1], context.shape[1]
        places = jnp.broadcast_to(jnp.arange(num_clean), (len(at), num_clean))
        positions = jnp.concatenate([at, places], axis=1)
        mask = block_mask(positions, jnp.arange(num_noisy + num_clean) < num_noisy, self.block_size)
        if lengths is not None:
            mask = mask & (positions < lengths[:, None])[:, None]
        h = apply(self.embedding, params["trunk"], jnp.concatenate([noisy, context], axis=1))
        condition = apply(self.noise_embedding, params["trunk"], jnp.zeros(len(noisy), jnp.float32))
        hidden = apply(self.trunk, params["trunk"], h, condition, keys, None, positions, mask)
        return hidden[:, :num_noisy], condition


def block_mask(positions: jax.Array, noisy: jax.Array, size: int) -> jax.Array:
    """True where a query may attend to a key. positions: Int[B P]; noisy: Bool[P], else clean -> Bool[B P P]."""
    block = positions // size
    query, key = block[:, :, None], block[:, None, :]
    from_noisy, to_noisy = noisy[None, :, None], noisy[None, None, :]
    within = (query == key) & (from_noisy == to_noisy)
    return within | (~to_noisy & (query > key))


@dataclasses.dataclass(frozen=True)
class AutoregressiveNetwork(BlockNetwork):
    """The autoregressive model: each token given those before it, with causal attention.

    The input at a position is the token before it, at the first one the mask, so that the trunk runs on the row alone.
    """

    block_size: int = dataclasses.field(default=1, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.block_size != 1:
            raise ValueError(f"an autoregressive network has blocks of one token, not {self.block_size}")

    def trunk_length(self, length):
        return length

    def loss_at_times(self, schedule, eps, strata):
        return self.bound(schedule)  # nothing depends on a time

    def hidden(self, params, x, sigma, keys=None, lengths=None, given=None, context=None):
        self._checked(given)
        before = (x if context is None else context)[:, :-1]
        tokens = jnp.pad(before, ((0, 0), (1, 0)), constant_values=self.process.mask_id)
        h = apply(self.embedding, params["trunk"], tokens)
        condition = apply(self.noise_embedding, params["trunk"], jnp.zeros(len(x), jnp.float32))
        place = jnp.arange(x.shape[1])
        mask = (place[:, None] >= place[None])[None]
        return apply(self.trunk, params["trunk"], h, condition, keys, None, None, mask), condition
