"""What a draw of one of many states costs, next to the least it could: one logsumexp over the states.

    python benchmarks/draws.py --states=50257

Draws a batch in each way, in turn and many times, and prints milliseconds of processor time a token, the least seen,
and their ratio to the logsumexp. JAX's default mode is fast and wrong: it never draws a state of less than about 1e-7.
"""

import argparse
import time

import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random


def flat(mode: str):
    """JAX's own: Gumbel noise for every state."""
    return lambda keys, weights: jax.vmap(lambda key, row: jax.random.categorical(key, row, mode=mode))(keys, weights)


WAYS = {
    "logsumexp alone": lambda keys, weights: jax.nn.logsumexp(weights, axis=-1),
    "draws.categorical": keyed_random.categorical,
    "flat, default mode": flat("low"),
    'flat, mode="high"': flat("high"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=50257)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    keys = keyed_random.row_keys(keyed_random.root_key(0), jnp.arange(args.batch))
    weights = 3.5 * jax.random.normal(keyed_random.root_key(1), (args.batch, args.states))
    ways = {name: jax.jit(way) for name, way in WAYS.items()}
    least = dict.fromkeys(ways, float("inf"))
    for turn in range(args.rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            jax.block_until_ready(way(keys, weights))
            if turn > 0:  # the first compiles
                least[name] = min(least[name], time.process_time() - start)
    floor = least["logsumexp alone"]
    print(f"{args.states} states, batch {args.batch}, on {jax.default_backend()}")
    for name, seconds in least.items():
        print(f"{name:20} {1000 * seconds / args.batch:8.4f} ms a token {seconds / floor:8.2f}")


if __name__ == "__main__":
    main()
