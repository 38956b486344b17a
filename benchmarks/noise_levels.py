"""What training sees at each noise level: the mean, the spread and the gradient of both losses on a trained model.

    python benchmarks/noise_levels.py --model=runs/mine

Takes rows of the training split of the model's corpus and corrupts them at several noise levels. The bound's loss, the
score entropy or the squared error of latents, is that of a unit of corruption probability, as times of the log-linear
schedule weigh it; the cross-entropy that of the posterior. For each loss: nats per token, their standard deviation over
rows, the root mean square of the gradient norms of single rows, and the norm of the mean gradient. The losses of a row
are summed over its tokens, as in training, so that the norms are in the unit of `optimizer.clip_norm`.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sedd
from sedd.data.batches import batches
from sedd.diffusion import keyed_random
from sedd.diffusion.discrete import loss as discrete
from sedd.diffusion.gaussian import loss as gaussian

SCHEDULE = sedd.LogLinear(1e-6)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--levels", default=".001,.01,.05,.2,.4,.6,.8,.95,.999", help="corruption probabilities")
    parser.add_argument("--rows", type=int, default=128)
    args = parser.parse_args()
    model = sedd.load(args.model)
    if model.frozen:
        parser.error("a model with an encoder has losses of its own: benchmarks/encodings.py")
    batch = next(batches(sedd.open_corpus(model.config.data.corpus), model.block_length, args.rows, 0))
    tokens, lengths = jax.tree.map(jnp.asarray, batch)
    lengths = jnp.full(args.rows, tokens.shape[1]) if lengths is None else lengths
    bound = "squared error" if model.network.process.over_latents else "score entropy"
    normalised = model.network.has_logits and not model.network.has_unnormalised_scores
    losses = [bound, "cross-entropy"] if normalised else [bound]
    print(" " * 9 + "".join(f"{name:>19}, nats a token | gradient norms" for name in losses))
    print("1 - alpha" + len(losses) * "              mean       spread | of a row, of all")
    for level in map(float, args.levels.split(",")):
        columns = [statistics(model, name, tokens, lengths, level) for name in losses]
        print(f"{level:<9}" + "".join(f"{m:18.4f} {s:12.3f} |{r:9.2f} {g:7.2f}" for m, s, r, g in columns), flush=True)


def statistics(model, name, tokens, lengths, level):
    """Returns the mean and the spread of a loss, the RMS of the rows' gradient norms, and that of the mean gradient."""
    uses_lengths = model.layout.masks_padding
    values, squares, gradient = _statistics(model.network, name, uses_lengths, model.params, tokens, lengths, level)
    per_token = np.asarray(values, np.float64) / np.asarray(lengths)
    return per_token.mean(), per_token.std(), np.sqrt(np.mean(squares)), float(optax.tree.norm(gradient))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _statistics(network, name, uses_lengths, params, tokens, lengths, level):
    keys = keyed_random.row_keys(keyed_random.root_key(0), jnp.arange(len(tokens)))
    sigma = -jnp.log1p(-level)

    def loss(params, row):
        key, x0, length = jax.tree.map(lambda leaf: leaf[None], row)
        free, lengths = jnp.arange(x0.shape[1])[None] < length[:, None], length if uses_lengths else None
        at, time = sigma[None], SCHEDULE.time(sigma)[None]
        if network.process.over_latents:
            z0, stats = network.clean(params, x0), network.stats(params, x0, lengths=lengths)
            if name == "cross-entropy":
                return gaussian.cross_entropy_loss(network.process, stats, key, z0, at, free).sum()
            return gaussian.denoising_loss(network.process, SCHEDULE, stats, key, z0, time, free).sum()
        if name == "cross-entropy":
            posterior = network.posterior(params, lengths=lengths)
            return discrete.cross_entropy_loss(network.process, posterior, key, x0, at, free).sum()
        stats = network.stats(params, lengths=lengths)
        return discrete.denoising_loss(network.process, SCHEDULE, stats, key, x0, time, free).sum()

    def add(total, row):
        value, gradient = jax.value_and_grad(loss)(params, row)
        total = jax.tree.map(lambda one, other: one + other / len(tokens), total, gradient)
        return total, (value, optax.tree.norm(gradient) ** 2)

    zero = jax.tree.map(jnp.zeros_like, params)
    gradient, (values, squares) = jax.lax.scan(add, zero, (keys, tokens, lengths))
    return values, squares, gradient


if __name__ == "__main__":
    main()
