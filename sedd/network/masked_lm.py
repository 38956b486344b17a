"""BERT or RoBERTa with the head of its pretraining, as the network of an absorbing process.

A masked language model predicts the masked tokens of a text of which some share is masked. It is a Denoiser that takes
no noise level, the start of DiffusionBERT (He et al., arXiv 2211.15029) and a relative of MDLM without time
conditioning (Sahoo et al., arXiv 2406.07524).
"""

import dataclasses
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random
from sedd.errors import UserError
from sedd.network.bert import Bert, layer_norm
from sedd.network.layers import ACTIVATIONS, Linear
from sedd.network.network import apply
from sedd.network.sharding import constrain_sharding
from sedd.network.token_network import TokenNetwork
from sedd.runtime.parallel import MODEL_AXIS

DIT = "dit"  # the other architecture: a diffusion transformer, `TokenNetwork`
MLP = 4  # hidden units of the MLP by width
ARCHITECTURES: dict[str, dict] = {  # the fields of `Bert` that published models of any size have in common
    "bert": {"positions": 512, "position_offset": 0, "types": 2, "eps": 1e-12, "activation": "gelu"},
    "roberta": {"positions": 514, "position_offset": 2, "types": 1, "eps": 1e-5, "activation": "gelu"},
}
SPECIAL = {  # the ids of the mask and of the start token of published models
    "bert": (103, 101),
    "roberta": (50264, 0),
}
NEVER = -1e9  # a logit whose probability is 0 in float32; finite, so that no statistic is NaN


class MaskedHead(nn.Module):
    """What maps hidden states to logits, by the rows of the embedding table.

    mask_token: the token that no text has, whose logit is NEVER; eps and activation: as of `Bert`.
    """

    mask_token: int
    eps: float
    activation: str

    @nn.compact
    def __call__(self, hidden: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """hidden: Float[... P W]; table: Float32[V W].

        Returns the inputs, Float32[... P W], the kernel, Float32[W V], and the bias, Float32[V], of the logits.
        """
        rows, width = table.shape
        x = ACTIVATIONS[self.activation](Linear(width, name="dense")(hidden.reshape(-1, width)))
        x = layer_norm(self.eps, "norm")(x).reshape(hidden.shape)
        bias = self.param("bias", nn.initializers.zeros, (rows,), jnp.float32).at[self.mask_token].set(NEVER)
        return x, constrain_sharding(table, MODEL_AXIS).T, bias


@dataclasses.dataclass(frozen=True)
class MaskedLanguageModel(TokenNetwork):
    """A network of the absorbing process that predicts the clean tokens, and is not conditioned on the noise level.

    The mask state is embedded as the token `mask_token`, which no text has and which has probability 0. Each row comes
    after the token `start_token`, whose output is dropped. Embedding and head share their table.
    """

    trunk: Bert
    cond_dim: int = 0
    mask_token: int = dataclasses.field(kw_only=True)
    start_token: int = dataclasses.field(kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.process.mask_id is None or self.prediction != "denoiser":
            raise ValueError("a masked language model is for the absorbing process, with network.prediction=denoiser")
        for name in ("mask_token", "start_token"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise UserError(
                    f"config: network.{name}={getattr(self, name)} is no token of a vocabulary of {self.vocab_size}"
                )

    @property
    def outer_parameters(self):
        return self.vocab_size * (self.trunk.width + 1)

    @property
    def outer_products(self):
        return (self.vocab_size + self.trunk.width) * self.trunk.width

    @property
    def num_padding(self):
        return 0

    @property
    def token_axes(self):
        return {"trunk/embedding": 0, "head/bias": 0}

    @property
    def masked_head(self) -> MaskedHead:
        return MaskedHead(self.mask_token, self.trunk.eps, self.trunk.activation)

    def init(self, key):
        tokens, hidden = jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2, self.trunk.width), jnp.float32)
        for_trunk, for_head = jax.random.split(keyed_random.threefry(key))
        trunk = self.trunk.init(for_trunk, tokens, jnp.ones((1, 2), bool))["params"]
        return {"trunk": trunk, "head": self.masked_head.init(for_head, hidden, trunk["embedding"])["params"]}

    def hidden(self, params, x, sigma, keys=None, lengths=None, given=None, context=None):
        self._checked(given)
        valid = jnp.ones(x.shape, bool)
        if lengths is not None:
            valid = jnp.arange(x.shape[1])[None] < lengths[:, None]
        tokens = jnp.where(x == self.process.mask_id, self.mask_token, x)
        before = ((0, 0), (1, 0))
        tokens = jnp.pad(tokens, before, constant_values=self.start_token)
        hidden = apply(self.trunk, params["trunk"], tokens, jnp.pad(valid, before, constant_values=True), keys)
        return hidden[:, 1:], jnp.zeros((len(x), 0), jnp.float32)

    def head_parts(self, params, hidden, condition):
        return cast(tuple, apply(self.masked_head, params["head"], hidden, params["trunk"]["embedding"]))

    def logits(self, params, hidden, condition):
        x, kernel, bias = self.head_parts(params, hidden, condition)
        return x @ kernel + jnp.broadcast_to(bias, (*x.shape[:-1], len(bias)))
