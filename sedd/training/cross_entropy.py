"""The cross-entropy of the posterior: a training loss without the large weights of the bound."""

import dataclasses

from sedd.diffusion.discrete.loss import cross_entropy_loss
from sedd.training.token_objective import TokenObjective

MAX_WEIGHT = 4.0  # reached where less than 1 token in 16 is corrupted; measured in docs/measurements.md


@dataclasses.dataclass(frozen=True)
class CrossEntropy(TokenObjective):
    """-log p(x0_i | x) at stratified times, a token's own noisy state included, weighted by at most MAX_WEIGHT.

    It is no bound. At each noise level its minimiser is the posterior, from which r, and with it the score of the least
    bound, follows in closed form. It weighs the levels differently: see `cross_entropy_loss`.
    """

    def losses(self, params, tokens, levels, keys, free, inputs, key):
        sigma, posterior = self.schedule.sigma(levels), self.network.posterior(params, **inputs)
        loss = cross_entropy_loss(self.network.process, posterior, keys, tokens, sigma, free, MAX_WEIGHT)
        return {"loss": loss}, sigma
