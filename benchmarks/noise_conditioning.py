"""Conditions a network of the absorbing process on the noise of the sampler's time or of the row's own mask ratio.

    python benchmarks/noise_conditioning.py --model=runs/mine

Takes blocks of the test split of the model's corpus, which must be packed, with --free tokens free at random positions
and the others given. Two costs, in nats per free token: of unmasking one token a call in random order, where the
sampler's noise is that of the time at which the token is unmasked; and of Tweedie in T steps, the discrete-time bound
of that chain, where it is that of the grid. Both kinds of conditioning are evaluated on the same rows. Prints the mean
difference, mask ratio minus time, with its standard error over blocks.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

import sedd
from sedd.diffusion import keyed_random

MAX_TIME = 1 - 2.0**-20  # a time of 1 has infinite noise


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--free", default="1,2,4,8,16,32", help="numbers of free tokens")
    parser.add_argument(
        "--steps", default="8,32", help="numbers of Tweedie steps, with all or a quarter of the tokens free"
    )
    parser.add_argument("--blocks", type=int, default=256)
    parser.add_argument("--draws", type=int, default=8, help="number of draws of each block")
    args = parser.parse_args()
    model = sedd.load(args.model)
    length = model.block_length
    tokens = sedd.open_corpus(model.config.data.corpus).tokens("test")
    tokens = np.array(tokens[: len(tokens) // length * length], np.int32).reshape(-1, length)[: args.blocks]
    print(f"{len(tokens)} blocks of {length}; nats per free token, conditioned on")
    print("                         time  mask ratio  difference")
    for free in map(int, args.free.split(",")):
        report(f"random order, {free:4}", random_order(model, tokens, free, args.draws))
    for steps in map(int, args.steps.split(",")):
        for free in (length // 4, length):
            report(f"Tweedie {steps:4}, {free:4}", tweedie(model, tokens, free, steps, max(1, args.draws // 2)))


def report(label: str, costs: np.ndarray):
    """Prints a row of the table. costs: Float[2 N], conditioned on time and on the mask ratio."""
    difference = costs[1] - costs[0]
    error = np.std(difference, ddof=1) / len(difference) ** 0.5
    columns = f"{costs[0].mean():10.4f} {costs[1].mean():11.4f}  {difference.mean():+.4f}"
    print(f"{label} {columns} ± {error:.4f}", flush=True)


def random_order(model, tokens, free, num_draws):
    """Returns the cost of unmasking one token a call. Float[2 N].

    With exactly k of n free tokens masked, the sampler's time is the k-th of n uniform ones: Beta(k, n + 1 - k).
    """
    random, costs = np.random.default_rng(0), []
    for draw in range(num_draws):
        ranks = shuffled(draw, tokens, free)
        level = (np.arange(len(tokens)) + 0.5 + draw / num_draws) % len(tokens) / len(tokens)
        masked = 1 + random.permutation((level * free).astype(int))
        time = np.minimum(random.beta(masked, free + 1 - masked), MAX_TIME)
        costs.append(masked_nats(model, tokens, ranks < masked[:, None], -np.log1p(-time)) / masked)
    return np.mean(costs, axis=0)


def tweedie(model, tokens, free, steps, num_draws):
    """Returns the cost of Tweedie's steps, each of which unmasks all masked tokens with one probability. Float[2 N]."""
    grid = sedd.Tweedie(model.process, model.schedule, steps).plan(None, None)
    mask_ratio = -np.expm1(-np.append(np.asarray(grid.sigma, np.float64), 0.0))
    random, costs = np.random.default_rng(0), 0.0
    for draw in range(num_draws):
        ranks = shuffled(draw, tokens, free)
        for step in range(steps):
            masked = (ranks < free) & (random.random(tokens.shape) < mask_ratio[step] / mask_ratio[0])
            unmasked = 1 - mask_ratio[step + 1] / mask_ratio[step]
            cost = masked_nats(model, tokens, masked, np.full(len(tokens), grid.sigma[step]))
            costs += unmasked * cost / free / num_draws
    return costs


def shuffled(draw, tokens, free):
    """Returns a random rank of each position of a row, Int[N L]. Those of free positions are below `free`."""
    keys = keyed_random.row_keys(keyed_random.fold(keyed_random.root_key(0), draw), jnp.arange(len(tokens)))
    return np.asarray(keyed_random.ranks(keys, jnp.ones(tokens.shape, bool)))


def masked_nats(model, tokens, masked, sigma):
    """Returns the nats of the masked tokens, conditioned on sigma and on the mask ratio.

    masked: Bool[N L]; sigma: Float[N]. Returns Float[2 N].
    """
    nats = _masked_nats(model.network, model.process, model.params, tokens, masked, jnp.asarray(sigma, jnp.float32))
    return np.asarray(nats, np.float64)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _masked_nats(network, process, params, tokens, masked, sigma):
    x = process.mask_tokens(tokens, masked)
    denoiser = network.denoiser(params)

    def nats(sigma):
        log_r = jnp.take_along_axis(denoiser(x, sigma, None), tokens[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(masked, log_r, 0.0), axis=-1)

    return jax.lax.map(nats, jnp.stack([sigma, process.sigma_from_mask_ratio(x)]))


if __name__ == "__main__":
    main()
