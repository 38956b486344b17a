"""The cost of sampling from a categorical distribution over many states, relative to one logsumexp over the states.

    python benchmarks/categorical.py --states=50257

Draws a batch with each method, in turn and many times. Prints milliseconds of processor time per token, the minimum
over rounds, and the ratio to the logsumexp, which is a lower bound. JAX's default mode is fast and wrong: it never
draws a state of probability below about 1e-7.
"""

import argparse
import time

import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random


def gumbel(mode: str):
    """Returns `jax.random.categorical` with this mode: Gumbel noise for every state."""
    return lambda keys, weights: jax.vmap(lambda key, row: jax.random.categorical(key, row, mode=mode))(keys, weights)


METHODS = {
    "logsumexp only": lambda keys, weights: jax.nn.logsumexp(weights, axis=-1),
    "keyed_random.categorical": keyed_random.categorical,
    'Gumbel, mode="low" (default)': gumbel("low"),
    'Gumbel, mode="high"': gumbel("high"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=50257)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    keys = keyed_random.row_keys(keyed_random.root_key(0), jnp.arange(args.batch))
    weights = 3.5 * jax.random.normal(keyed_random.root_key(1), (args.batch, args.states))
    methods = {name: jax.jit(method) for name, method in METHODS.items()}
    minimum = dict.fromkeys(methods, float("inf"))
    for round_number in range(args.rounds + 1):
        for name, method in methods.items():
            start = time.process_time()
            jax.block_until_ready(method(keys, weights))
            if round_number > 0:  # the first round compiles
                minimum[name] = min(minimum[name], time.process_time() - start)
    floor = minimum["logsumexp only"]
    print(f"{args.states} states, batch {args.batch}, on {jax.default_backend()}")
    for name, seconds in minimum.items():
        print(f"{name:28} {1000 * seconds / args.batch:8.4f} ms per token {seconds / floor:8.2f}")


if __name__ == "__main__":
    main()
