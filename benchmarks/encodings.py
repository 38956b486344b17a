"""A model over the states of a frozen encoder: its decoder and its network against noise, and its answers by step.

    python benchmarks/encodings.py --model=runs/mine

Prints three tables, on rows of the validation split of the model's corpus:

 * at times of the schedule, the share of tokens that the decoder names right from noisy latents, and the mean squared
   error of the network's mean, without and with memory of its first answer (a fraction of the latents' variance of 1);
 * for several numbers of steps, the mean square of the network's answers at ten steps of a sample, which TEncDM takes
   for the sign of too many steps (arXiv 2402.19097, section 5.5); and that of the latents of text;
 * the bound and its terms for several noise levels `low` at which it passes to the tokens.

Padding is left out of the first two.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

import sedd
from sedd.data.batches import blocks
from sedd.diffusion import keyed_random
from sedd.diffusion.sampling import advance, begin
from sedd.generation.samplers import SamplerContext, named_sampler
from sedd.network.latent_network import with_memory

TIMES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.25, 0.4, 0.6, 0.8)
LOWS = (0.2, 0.4, 0.8, 1.6, 2.4, 3.2, 4.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", default="10,50,200", help="numbers of steps of the third table; none: skip it")
    parser.add_argument("--sampler", default="tencdm")
    parser.add_argument("--lows", default=",".join(map(str, LOWS)), help="noise levels of the bound; none: skip it")
    args = parser.parse_args()
    model = sedd.load(args.model)
    corpus = sedd.open_corpus(model.config.data.corpus)
    tokens, lengths, _ = blocks(corpus, "validation", model.block_length)
    tokens, scored = tokens[: args.rows], np.arange(tokens.shape[1]) < lengths[: args.rows, None]
    by_time(model, jnp.asarray(tokens), jnp.asarray(scored))
    if args.steps != "none":
        by_step(model, [int(steps) for steps in args.steps.split(",")], args.sampler, min(args.rows, 64))
    if args.lows != "none":
        by_low(model, corpus, map(float, args.lows.split(",")))


def by_time(model, tokens, scored):
    """Prints token accuracy and squared errors by time."""
    z0 = jax.jit(model.network.clean)(model.all_params, tokens)
    print(f"the mean square of the latents of text is {float(jnp.mean(z0[scored] ** 2)):.3f}")
    print(" time   sigma   token accuracy   squared error, with memory")
    for t in TIMES:
        sigma = model.schedule.sigma(jnp.full(len(tokens), t))
        accuracy, error, again = _at(model.network, model.all_params, tokens, scored, z0, sigma)
        print(
            f"{t:5.2f} {float(sigma[0]):7.4f} {float(accuracy):16.4f} {float(error):15.3f} {float(again):12.3f}",
            flush=True,
        )


@functools.partial(jax.jit, static_argnums=0)
def _at(network, params, tokens, scored, z0, sigma):
    """The accuracy of the decoder and two squared errors of the network at noise sigma."""
    keys = keyed_random.row_keys(keyed_random.root_key(0), jnp.arange(len(tokens)))
    z = network.process.perturb(keys, z0, sigma)
    right = network.codec.tokens(params["codec"], z) == tokens
    mean = network.mean_denoiser(params)
    first = mean(x := sedd.Latent(z, jnp.zeros_like(z)), sigma)
    second = mean(with_memory(x, first, None), sigma) if network.self_conditioned else first
    errors = (jnp.mean((z0 - answer) ** 2, axis=-1) for answer in (first, second))
    return tuple(jnp.sum(jnp.where(scored, term, 0)) / jnp.sum(scored) for term in (right, *errors))


def by_step(model, counts, name, rows):
    """Prints the mean square of the answers by step."""
    for steps in counts:
        context = SamplerContext(model.process, model.schedule, steps, model.block_length)
        squares = np.asarray(
            _squares(model.network, named_sampler(name, context), rows, model.block_length, model.all_params)
        )
        shown = squares[np.linspace(0, steps - 1, min(steps, 10)).round().astype(int)]
        print(
            f"{steps:4} steps of {name}, mean square of the answers: " + " ".join(f"{square:.3f}" for square in shown)
        )


@functools.partial(jax.jit, static_argnums=range(4))
def _squares(network, sampler, rows, length, params):
    """The mean square of the answer of each step. Float[steps]."""
    given = jnp.zeros((rows, length, network.process.width))
    task, progress = begin(keyed_random.root_key(0), sampler, given, jnp.ones((rows, length), bool))
    denoiser = network.denoiser(params)

    def step(progress, until):
        progress = advance(task, progress, denoiser, sampler, until)
        return progress, jnp.mean(progress.x.estimate**2)

    return jax.lax.scan(step, progress, jnp.arange(1, task.steps + 1))[1]


def by_low(model, corpus, lows):
    """Prints the bound by the noise at which it passes to the tokens, and the best."""
    reports = {low: model.perplexity(corpus, split="validation", low=low, progress=False) for low in lows}
    print("  low   nats per token    prior  diffusion  reconstruction")
    for low, report in reports.items():
        terms = f"{report.prior:8.4f} {report.diffusion:10.3f} {report.reconstruction:15.3f}"
        print(f"{low:5.2f} {report.nats_per_token:8.3f} ± {report.standard_error:.3f} {terms}")
    print(f"the best: evaluation.low={min(reports, key=lambda low: reports[low].nats_per_token)}")


if __name__ == "__main__":
    main()
