"""BD3-LM (Arriola et al., arXiv 2503.09573): block diffusion, such as kuleshov-group/bd3lm-owt-block_size4."""

import numpy as np

from sedd import config as configs
from sedd.errors import UserError
from sedd.pretrained.dit import TransformersDiT

_SAMPLING = {"sampling_eps_min": 1e-3, "sampling_eps_max": 0.999}  # the range of times in training, also tensors


class Bd3lm(TransformersDiT):
    """A block as long as a row is diffusion of all of it, as in the checkpoint that training began with."""

    name, title = "bd3lm", "BD3-LM, block diffusion"
    process, masks, conditioned = "absorbing", 1, False
    fixed = (("adaln", True), ("causal", False), ("cross_attn", True))
    unread = tuple(_SAMPLING)

    def config(self, about, folder):
        size, length = about["block_size"], about["model_length"]
        if size == 1:
            raise UserError(f"{folder}: block_size=1 of {self.name} is not supported, only blocks of several tokens")
        return configs.override(super().config(about, folder), [f"network.block_size={0 if size == length else size}"])

    def about(self, config, vocab_size):
        size = config.network.block_size or config.data.block_length
        if size == 1:
            raise UserError(f"the format {self.name} cannot hold network.block_size=1, an autoregressive model")
        return super().about(config, vocab_size) | _SAMPLING | {"block_size": size, "attn_backend": "sdpa"}

    def constants(self, network):
        return super().constants(network) | {name: np.array(value, np.float32) for name, value in _SAMPLING.items()}
