"""A corpus and a network that are small enough to train in a test; and unusual global settings of JAX."""

import contextlib
import dataclasses
import os
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import sedd
from sedd import config as configs
from sedd.data.layout import Layout
from sedd.data.prepare import prepare
from sedd.diffusion.discrete.score import ArrayColumns
from sedd.runtime import parallel
from sedd.trained import Trained
from sedd.training.objectives import make_objective
from sedd.training.optimizer import make_optimizer

ENCODERS = Path(__file__).parent / "encoders"  # small ones of random parameters
NETWORK = ("network.width=16", "network.layers=2", "network.heads=2", "network.cond_dim=8")
ADAMW = ("optimizer.name=adamw", "optimizer.learning_rate=0.01", "optimizer.warmup_steps=2")  # compiles twice as fast
SETTINGS = (*NETWORK, *ADAMW, "data.block_length=16", "training.batch_size=8", "training.steps=6")
MUON = ("optimizer.name=muon", "optimizer.learning_rate=0.02")  # as in the default

# The environment of commands that run longer than they compile: one device, and code that is optimised.
_FLAGS = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
OPTIMISED = {**os.environ, "XLA_FLAGS": " ".join(_FLAGS).replace("optimization_level=0", "optimization_level=1")}

# Global settings of JAX that may change numbers or raise errors, each with a value other than its default.
JAX_SETTINGS = {
    "prng rbg": lambda: jax.default_prng_impl("rbg"),
    "prng unsafe_rbg": lambda: jax.default_prng_impl("unsafe_rbg"),
    "threefry not partitionable": lambda: jax.threefry_partitionable(False),
    "x64": lambda: jax.enable_x64(True),
    "strict dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "strict ranks": lambda: jax.numpy_rank_promotion("raise"),
}


@contextlib.contextmanager
def unusual_jax_settings(*names):
    """A block under these settings of JAX; by default under all."""
    with contextlib.ExitStack() as stack:
        for name in names or JAX_SETTINGS:
            stack.enter_context(JAX_SETTINGS[name]())
        yield


def write_files(folder, texts):
    """Writes a file for each text; returns the spec of their source."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, text in enumerate(texts):
        (folder / f"{index:03}.txt").write_bytes(text.encode("utf-8"))
    return f"text:{folder}/*.txt"


def small_corpus(folder, tokenizer="characters"):
    """Prepares sixty short documents."""
    tables = [", ".join(str(number * factor) for factor in range(1, 10)) for number in range(60)]
    texts = [f"the {number} times table: {table}.\n" for number, table in enumerate(tables)]
    return prepare(write_files(folder / "texts", texts), tokenizer, folder / "corpus")


def small_config(corpus, *settings):
    """The default config with a small network, on the corpus, then overridden by the settings."""
    return configs.override(configs.default(), [f"data.corpus={corpus.path}", *SETTINGS, *settings])


def untrained_model(corpus, *settings):
    """A model that is not trained. Its head is 0, so that a denoiser predicts the uniform distribution."""
    return model_of(small_config(corpus, *settings), corpus.tokenizer, lambda init: jax.jit(init)(jax.random.key(0)))


def model_of(config, tokenizer, make_params, layout=Layout()):
    """The model of a config and a tokenizer. make_params: of the function that initialises them."""
    _, schedule, network = configs.build(config, tokenizer.vocab_size)
    return sedd.Model(
        config=config,
        network=network,
        params=make_params(network.init),
        schedule=schedule,
        tokenizer=tokenizer,
        layout=layout,
        block_length=config.data.block_length,
    )


def shaken(model):
    """The model with perturbed parameters, so that all of them count and its distribution is not uniform."""
    params = jax.tree.map(lambda leaf: leaf + 0.1 * np.cos(np.arange(leaf.size)).reshape(leaf.shape), model.params)
    return dataclasses.replace(model, params=params)


def trained_of(network, schedule, params, block_length, tokenizer=None, layout=Layout()):
    """A Trained, by position."""
    return Trained(
        network=network,
        params=params,
        schedule=schedule,
        tokenizer=tokenizer,
        layout=layout,
        block_length=block_length,
    )


def without_network(tokenizer, process, block_length, layout=Layout()):
    """A Trained that encodes text, but whose network cannot be called."""
    network = types.SimpleNamespace(
        process=process, vocab_size=process and process.vocab_size, block_of_generation=None
    )
    return trained_of(network, None, None, block_length, tokenizer, layout)


def parts(config, corpus, devices=None):
    """The objective, the optimiser and the mesh of a config, over the first `devices` devices or all."""
    _, schedule, network = configs.build(config, corpus.vocab_size)
    objective = make_objective(config, network, schedule)
    mesh = parallel.make_mesh(config, jax.devices()[:devices])
    return objective, make_optimizer(config.optimizer, config.training.steps), mesh


def name_of(value):
    """The name of a function, or the value itself as text: an id of a test, which must not contain an address."""
    return getattr(value, "__name__", str(value))


def encoder_corpus(folder, name="bert"):
    """Prepares eighty short documents, padded, with the tokenizer of an encoder of tests/encoders."""
    words = ["the", "cat", "bad", "a", "b", "c", "d", "e"]
    texts = [" ".join(words[(number * step) % 8] for step in range(1, 3 + number % 8)) for number in range(80)]
    source = write_files(folder / "texts", texts)
    tokenizer = f"huggingface:{ENCODERS / name}/tokenizer.json"
    return prepare(source, tokenizer, folder / "corpus", mode="padded", padding="scored")


def encoder_config(corpus, *settings, name="bert"):
    """The config of a small network over the states of an encoder of tests/encoders."""
    of_encoder = ("process.name=gaussian", "codec.name=encoder", f"codec.encoder={ENCODERS / name}")
    return small_config(corpus, *of_encoder, "codec.decoder_layers=1", *settings)


def columns_with_mask(self, params, hidden, condition, in_chunks=False):
    """The logits with that of the mask in the normaliser: a column after its own, which is left out."""
    logits = self.logits(params, hidden, condition)
    return ArrayColumns(jnp.concatenate([logits, logits[..., -1:]], axis=-1))
