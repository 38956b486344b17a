"""The cross-entropy of the posterior: a training loss without the weights of the bound."""

import dataclasses

from sedd.diffusion.discrete.loss import cross_entropy_loss
from sedd.training.token_objective import TokenObjective


@dataclasses.dataclass(frozen=True)
class CrossEntropy(TokenObjective):
    """-log p(x0_i | x) at stratified times, a token's own noisy state included.

    It is no bound. At each noise level its minimiser is the posterior, from which r, and with it the score of the least
    bound, follows in closed form. It weighs the levels differently: all tokens of all levels alike.
    """

    def losses(self, params, tokens, levels, keys, free, inputs):
        sigma, posterior = self.schedule.sigma(levels), self.network.posterior(params, **inputs)
        return cross_entropy_loss(self.network.process, posterior, keys, tokens, sigma, free), sigma
