"""A trained model as generation and evaluation take it: a network, its parameters, and all that they are used with."""

import dataclasses

from sedd.data.layout import Layout
from sedd.data.tokenizers import Tokenizer
from sedd.diffusion.discrete.process import Process
from sedd.diffusion.gaussian.process import Gaussian
from sedd.diffusion.schedule import Schedule
from sedd.errors import UserError
from sedd.network.network import Network
from sedd.runtime.trees import merged


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Trained:
    """A network with its parameters, during training or after it.

    params: those that were trained; frozen: others of the network, such as a pretrained encoder, which are neither
    trained nor saved, {} if there are none; schedule: of the noise; tokenizer: None if unknown; layout: that of the
    training corpus, packed or padded; block_length: tokens in one call of the network.
    """

    network: Network
    params: dict
    frozen: dict = dataclasses.field(default_factory=dict)
    schedule: Schedule
    tokenizer: Tokenizer | None
    layout: Layout
    block_length: int

    @property
    def process(self) -> Process | Gaussian:
        """The process of the network."""
        return self.network.process

    @property
    def all_params(self) -> dict:
        """The parameters with which the network is called: those that were trained, and those that are frozen."""
        return merged(self.params, self.frozen)

    def placed(self, params: dict) -> "Trained":
        """Returns the model with `all_params` as placed on devices."""
        return dataclasses.replace(self, params=params, frozen={})

    @property
    def vocab_size(self) -> int:
        """V, the number of clean tokens."""
        return self.network.vocab_size

    @property
    def uses_lengths(self) -> bool:
        """True if the network is conditioned on the lengths of texts shorter than a block.

        Otherwise the positions after a text stay masked, which gives its exact marginal under the model.
        """
        return self.layout.masks_padding or self.process.mask_id is None

    @property
    def rows_at_once(self) -> int:
        """Default batch size per device, in blocks."""
        return self.network.rows_at_once(self.block_length)

    def require_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer. UserError if there is none."""
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer, so it takes no text; load it with one, or use token arrays")
        return self.tokenizer
