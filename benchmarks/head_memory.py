"""Memory of the head's logits in a training step, by the compiler's analysis: nothing is run.

    python benchmarks/head_memory.py                         # the paper's small network, 8 rows of 1,024 tokens

For each process and prediction it compiles a step three times, with scanned and recomputed layers: with a trivial loss
of the trunk's outputs, with all logits in arrays, and with the statistics in chunks of the vocabulary
(`sedd.network.chunked_head`), and prints the temporary memory of each, in MiB.
"""

import argparse

import jax
import jax.numpy as jnp

from sedd import config as configs
from sedd.data.batches import Batch
from sedd.diffusion.keyed_random import root_key
from sedd.network import token_network
from sedd.training.objectives import make_objective

UNIFORM = "process.name=uniform"
MODELS = {  # by name: the settings
    "absorbing, denoiser, mask counts": [],
    "absorbing, score, times": ["network.prediction=score", "training.noise_sampling=time"],
    "uniform, posterior, cross-entropy": [UNIFORM],
    "uniform, denoiser, bound": [UNIFORM, "network.prediction=denoiser", "training.loss=bound"],
    "uniform, score, bound": [UNIFORM, "network.prediction=score", "training.loss=bound"],
}
SIZES = ["network.scan=True", "network.remat=full", "network.width=768", "network.layers=12", "network.heads=12"]
DENSE, CHUNKED = 2**62, 0  # logits from which on they are taken in chunks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--vocab_size", type=int, default=50257)
    args = parser.parse_args()
    print(f"JAX {jax.__version__}, {args.rows} x {args.length} tokens, V {args.vocab_size:,}; MiB of temporary arrays")
    print(f"{'':34} {'no loss':>9} {'arrays':>9} {'chunks':>9}  added by chunks / arrays")
    for name, settings in MODELS.items():
        least = temporaries(args, settings, None)
        dense, chunked = (temporaries(args, settings, limit) for limit in (DENSE, CHUNKED))
        share = (chunked - least) / (dense - least)
        print(f"{name:34} {least:9,.0f} {dense:9,.0f} {chunked:9,.0f}  {share:.3f}", flush=True)


def temporaries(args: argparse.Namespace, settings: list[str], max_dense: int | None) -> float:
    """Returns the MiB of a step. max_dense: the most logits of an array; None: with a trivial loss."""
    of_data = [f"data.block_length={args.length}", f"training.batch_size={args.rows}"]
    config = configs.override(configs.default(), [*SIZES, *of_data, *settings])
    _, schedule, network = configs.build(config, args.vocab_size)
    objective, key = make_objective(config, network, schedule), root_key(0)

    def loss(params, tokens):
        if max_dense is None:
            return jnp.sum(network.hidden(params, tokens, jnp.ones(args.rows))[0] ** 2)
        return jnp.sum(objective(params, Batch(tokens, None), jnp.arange(args.rows), key).loss)

    token_network.MAX_DENSE_LOGITS = max_dense or 0
    shapes = jax.eval_shape(network.init, key), jax.ShapeDtypeStruct((args.rows, args.length), jnp.int32)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


if __name__ == "__main__":
    main()
