"""Which noise to tell a network of the absorbing process: the sampler's, or what the row's own masked share says.

    python benchmarks/noise_conditioning.py --model=runs/mine

Takes blocks of the test split of the model's corpus, which must be packed, with so many free tokens at random positions
and the others given. Two costs, in nats a free token: of revealing one token a call in random order, where the
sampler's noise is that of the time at which the token is uncovered, the masked share of the free tokens; and of Tweedie
in T steps, the discrete-time bound of that very chain, where it is that of the grid. Both ways of telling see the same
rows. Prints the mean difference with its standard error over blocks.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

import sedd
from sedd.diffusion import keyed_random

LAST = 1 - 2.0**-20  # a time of 1 has infinite noise


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--free", default="1,2,4,8,16,32", help="how many tokens are free")
    parser.add_argument("--steps", default="8,32", help="of Tweedie, with all tokens free and with a quarter of them")
    parser.add_argument("--blocks", type=int, default=256)
    parser.add_argument("--draws", type=int, default=8, help="of each block")
    args = parser.parse_args()
    model = sedd.load(args.model)
    length = model.block_length
    tokens = sedd.open_corpus(model.config.data.corpus).tokens("test")
    tokens = np.array(tokens[: len(tokens) // length * length], np.int32).reshape(-1, length)[: args.blocks]
    print(f"{len(tokens)} blocks of {length}; nats a free token, told")
    print("of                  sampler's   the row's  difference")
    for free in map(int, args.free.split(",")):
        report(f"random order, {free:4}", revealing(model, tokens, free, args.draws))
    for steps in map(int, args.steps.split(",")):
        for free in (length // 4, length):
            report(f"Tweedie {steps:4}, {free:4}", leaping(model, tokens, free, steps, max(1, args.draws // 2)))


def report(what: str, costs: np.ndarray):
    """costs: Float[2 N], of both ways of telling."""
    gain = costs[1] - costs[0]
    error = np.std(gain, ddof=1) / len(gain) ** 0.5
    print(f"{what} {costs[0].mean():10.4f} {costs[1].mean():11.4f}  {gain.mean():+.4f} ± {error:.4f}", flush=True)


def revealing(model, tokens, free, num_draws):
    """Of one token a call, as exactly k of the free ones are masked: the times of n tokens are uniform, the k-th of
    them Beta(k, n + 1 - k)."""
    random, costs = np.random.default_rng(0), []
    for draw in range(num_draws):
        ranks = shuffled(draw, tokens, free)
        level = (np.arange(len(tokens)) + 0.5 + draw / num_draws) % len(tokens) / len(tokens)
        masked = 1 + random.permutation((level * free).astype(int))
        time = np.minimum(random.beta(masked, free + 1 - masked), LAST)
        costs.append(asked(model, tokens, ranks < masked[:, None], -np.log1p(-time)) / masked)
    return np.mean(costs, axis=0)


def leaping(model, tokens, free, steps, num_draws):
    """Of the grid's steps: a step uncovers each masked token with one probability, whatever it is."""
    grid = sedd.Tweedie(model.process, model.schedule, steps).plan(None, None)
    share = -np.expm1(-np.append(np.asarray(grid.sigma, np.float64), 0.0))
    random, costs = np.random.default_rng(0), 0.0
    for draw in range(num_draws):
        ranks = shuffled(draw, tokens, free)
        for step in range(steps):
            masked = (ranks < free) & (random.random(tokens.shape) < share[step] / share[0])
            uncovered = 1 - share[step + 1] / share[step]
            cost = asked(model, tokens, masked, np.full(len(tokens), grid.sigma[step]))
            costs += uncovered * cost / free / num_draws
    return costs


def shuffled(draw, tokens, free):
    """A random order of each row's positions. Int[N L]; those below `free` are free, and in random order themselves."""
    keys = keyed_random.row_keys(keyed_random.fold(keyed_random.root_key(0), draw), jnp.arange(len(tokens)))
    return np.asarray(keyed_random.ranks(keys, jnp.ones(tokens.shape, bool)))


def asked(model, tokens, masked, sigma):
    """The nats of the masked tokens, told sigma and told the share. Bool[N L], Float[N] -> Float[2 N]."""
    found = _asked(model.network, model.process, model.params, tokens, masked, jnp.asarray(sigma, jnp.float32))
    return np.asarray(found, np.float64)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _asked(network, process, params, tokens, masked, sigma):
    x = process.mask_tokens(tokens, masked)
    denoiser = network.denoiser(params)

    def nats(told):
        log_r = jnp.take_along_axis(denoiser(x, told, None), tokens[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(masked, log_r, 0.0), axis=-1)

    return jax.lax.map(nats, jnp.stack([sigma, process.sigma_from_mask_ratio(x)]))


if __name__ == "__main__":
    main()
