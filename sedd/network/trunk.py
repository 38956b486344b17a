"""The trunk: a diffusion transformer from hidden states to hidden states.

Bidirectional attention with rotary positions; each layer is modulated by a conditioning vector, which the network makes
from sigma (adaLN-zero; Peebles and Xie, arXiv 2212.09748). With a vector of size 0 nothing is modulated, and the norms
have biases (RADD; Ou et al., arXiv 2406.03736).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sedd.network.attention import attend
from sedd.network.layers import Linear, Norm, dropout, gelu, modulation, one_line, rotary

REMAT = {  # the part of a layer that the backward pass recomputes -> the policy for what is saved
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names("dot"),  # recomputes all but the outputs of the linear maps
}


class Block(nn.Module):
    """One layer: attention and MLP, each modulated and gated. (h, ...) -> (h, None), as `nn.scan` requires."""

    heads: int
    dropout: float
    dtype: str
    attention: str

    @nn.compact
    def __call__(self, h, layer, added, condition, keys, lengths, positions, mask):
        """layer: its number; added: Float[B L W], the layer's own input; the rest as of `Trunk`."""
        h = h if added is None else h + added
        batch, length, width = h.shape
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation(condition[:, None], width, 6)
        bias = not condition.shape[-1]  # of the norms; else the shifts are theirs

        x = Norm(bias, name="norm_attention")(h, shift_a, scale_a)
        x = Linear((3, width), use_bias=False, dtype=self.dtype, split="out", name="qkv")(x)
        with jax.named_scope("attention"):
            q, k, v = jnp.moveaxis(x.reshape(batch, length, 3, self.heads, width // self.heads), 2, 0)
            q, k = rotary(q, positions), rotary(k, positions)
            x = attend(self.attention, q, k, v, lengths, mask).reshape(batch, length, width)
        x = Linear(width, use_bias=False, dtype=self.dtype, split="in", name="out")(x)
        h = h + gate_a * dropout(x.astype(jnp.float32), self.dropout, keys, 2 * layer)

        x = Norm(bias, name="norm_mlp")(h, shift_m, scale_m)
        x = Linear(4 * width, dtype=self.dtype, split="out", name="up")(x)
        x = Linear(width, dtype=self.dtype, split="in", name="down")(gelu(x))
        h = h + gate_m * dropout(x.astype(jnp.float32), self.dropout, keys, 2 * layer + 1)
        return h, None


class Trunk(nn.Module):
    """A stack of `layers` Blocks. Hashable, and compared by its hyperparameters.

    scan: the layers are scanned, else unrolled; dtype: of linear maps and attention; remat: a key of REMAT; attention:
    a key of `attention.ATTENTION`; long_skips: the input of each layer of the first half is added to that of its mirror
    image in the second, as in a U-Net (TEncDM, arXiv 2402.19097, section 4.3). ValueError if the width of a head is not
    an even number, or for scanned layers with long skips.
    """

    width: int
    layers: int
    heads: int
    dropout: float = 0.0
    dtype: str = "float32"
    scan: bool = False
    remat: str = "none"
    attention: str = "xla"
    long_skips: bool = False

    def __post_init__(self):
        if self.long_skips and self.scan:
            raise ValueError("network.long_skips needs network.scan=False: scanned layers have no mirror images")
        if self.width % (2 * self.heads):
            raise ValueError(f"network.width ({self.width}) must be a multiple of twice network.heads ({self.heads})")
        super().__post_init__()

    @nn.compact
    def __call__(self, h, condition, keys=None, lengths=None, positions=None, mask=None, added=None):
        """Maps hidden states to hidden states. Float32[B L W], Float32[B C] -> Float32[B L W].

        keys: Key[B] for dropout; None: no dropout. lengths: Int[B], number of valid positions of each row; None: L.
        positions: Int[B L] or Int[1 L], of the rotary embedding; None: 0 .. L - 1. mask: Bool[B L L] or Bool[1 L L],
        True where a query (second axis) may attend to a key (last axis), in addition to `lengths`; outputs of a query
        with no key are unspecified. added: Float32[layers B L W], added to the hidden states before each layer.
        """
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, prevent_cse=not self.scan, policy=REMAT[self.remat])
        sizes = dict(heads=self.heads, dropout=self.dropout, dtype=self.dtype, attention=self.attention)
        shared = (condition, keys, lengths, positions, mask)
        if self.scan:
            axes = (0, 0, *[nn.broadcast] * len(shared))
            layers = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=axes, length=self.layers
            )
            return layers(name="blocks", **sizes)(h, jnp.arange(self.layers), added, *shared)[0]
        inputs = []
        for layer in range(self.layers):
            if self.long_skips and layer >= (self.layers + 1) // 2:
                h = h + inputs.pop()
            elif self.long_skips and layer < self.layers // 2:
                inputs.append(h)
            of_layer = None if added is None else added[layer]
            h, _ = block(name=f"block_{layer}", **sizes)(h, layer, of_layer, *shared)
        return h

    __repr__ = one_line


def unrolled(params: dict) -> dict:
    """Returns parameters of a network with unrolled layers, from those of one with scanned or unrolled layers."""
    trunk = dict(params["trunk"])
    if "blocks" not in trunk:
        return params
    blocks = trunk.pop("blocks")
    layers = len(jax.tree.leaves(blocks)[0])
    return params | {
        "trunk": trunk | {f"block_{layer}": jax.tree.map(lambda leaf: leaf[layer], blocks) for layer in range(layers)}
    }


def scanned(params: dict) -> dict:
    """Returns parameters of a network with scanned layers, the inverse of `unrolled`."""
    trunk = dict(params["trunk"])
    names = sorted((name for name in trunk if name.startswith("block_")), key=lambda name: int(name.split("_")[1]))
    if not names:
        return params
    blocks = [trunk.pop(name) for name in names]
    return params | {"trunk": trunk | {"blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)}}
