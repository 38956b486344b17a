"""Seconds and memory to load checkpoints of the published sizes, of random weights.

    python benchmarks/loading.py

Writes each checkpoint to a temporary folder, which takes up to 1.7 GB, and loads it in a process of its own. Memory is
the largest private memory of that process during `sedd.load`, over the size of the weights. Runs on Linux.
"""

import multiprocessing
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np

import sedd
from sedd import config as configs
from sedd.data.layout import Layout
from sedd.diffusion.keyed_random import root_key
from sedd.model import Model

SMALL = ["network.width=768", "network.layers=12", "network.heads=12", "data.block_length=1024"]
MEDIUM = ["network.width=1024", "network.layers=24", "network.heads=16", "data.block_length=1024"]
SCORE, UNIFORM = ["network.prediction=score", "training.noise_sampling=time"], ["process.name=uniform"]
CONSTANT, OTHERS = ["network.conditioning=constant"], ["network.prediction=denoiser", "network.conditioning=sigma"]
MODELS = {  # by name: the format, the settings, the size of the vocabulary
    "SEDD small": ("sedd", [*SMALL, *SCORE], 50257),
    "SEDD medium": ("sedd", [*MEDIUM, *SCORE], 50257),
    "MDLM": ("mdlm", [*SMALL, *CONSTANT], 50257),
    "Duo": ("duo", [*SMALL, *UNIFORM, *OTHERS], 50258),
    "UDLM, LM1B": ("udlm", [*SMALL, *UNIFORM, *OTHERS, "data.block_length=128"], 30522),
    "RADD small": ("radd", [*SMALL, *CONSTANT, "network.cond_dim=0"], 50257),
}


def main():
    print("model         parameters  seconds  memory / weights")
    for name, (form, settings, vocab_size) in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            start = multiprocessing.get_context("spawn")
            for target, arguments in ((write, (folder, form, settings, vocab_size)), (load, (folder, name))):
                process = start.Process(target=target, args=arguments)
                process.start()
                process.join()
                if process.exitcode:
                    raise SystemExit(process.exitcode)


def write(folder, form, settings, vocab_size):
    """Writes a checkpoint of random weights in a published format."""
    config = configs.override(configs.default(), settings)
    _, schedule, network = configs.build(config, vocab_size)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, root_key(0))
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    parts = dict(tokenizer=None, layout=Layout(), block_length=config.data.block_length)
    Model(config=config, network=network, params=params, schedule=schedule, **parts).save(f"{folder}/model", form)


def load(folder, name):
    """Loads a checkpoint, and prints its size, the seconds and the memory."""
    jax.devices()
    peak, before, done = [0], private_memory(), threading.Event()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], private_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = sedd.load(f"{folder}/model")
    jax.block_until_ready(model.params)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    print(
        f"{name:12} {model.network.num_parameters():11,} {seconds:8.1f} {(peak[0] - before) / size:17.2f}", flush=True
    )


def private_memory():
    """Returns the private memory of this process in bytes, without files that are mapped."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
