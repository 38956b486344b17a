"""The reference, louaaron/Score-Entropy-Discrete-Diffusion, as `sampling.py` and `training.py` compare with it.

Networks of its architecture with random weights, in the published format, which both programs read; its network and its
training step, unchanged but for two parts. Flash attention, which runs on GPUs only, is replaced by torch's
`scaled_dot_product_attention`; autocast, which the reference always requests, is to float32 or to bfloat16.

    python benchmarks/reference.py reference 256x4x256x256x16 float32 cpu

prints the peak memory of its training step in GB; `training.py --memory` calls it. It does not import JAX.
"""

import dataclasses
import json
import os
import sys
import types
import warnings
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

COND_DIM, FREQUENCIES, HEAD_DIM = 128, 256, 64  # of the published models
WARMUP_STEPS = 2  # of a training step: its first calls compile and allocate
OPTIM = dict(optimizer="AdamW", lr=3e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0, warmup=2500, grad_clip=1.0)
EMA = 0.9999


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes of a network of the reference: absorbing process, log-linear noise."""

    width: int
    layers: int
    length: int
    vocab_size: int

    @property
    def heads(self) -> int:
        return max(1, self.width // HEAD_DIM)

    def config(self, dropout: float = 0.0) -> dict:
        """Returns the config.json of a published model of this size."""
        return {
            "tokens": self.vocab_size,
            "graph": {"type": "absorb"},
            "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20.0},
            "training": {"ema": EMA},
            "optim": OPTIM,
            "model": {
                "hidden_size": self.width,
                "cond_dim": COND_DIM,
                "length": self.length,
                "n_blocks": self.layers,
                "n_heads": self.heads,
                "scale_by_sigma": True,
                "dropout": dropout,
            },
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the tensors of such a model by name."""
        width, states = self.width, self.vocab_size + 1
        shapes = {"vocab_embed.embedding": (states, width)}

        def linear(name, into, out, bias=True):
            shapes[f"{name}.weight"] = (out, into)
            if bias:
                shapes[f"{name}.bias"] = (out,)

        linear("sigma_map.mlp.0", FREQUENCIES, COND_DIM)
        linear("sigma_map.mlp.2", COND_DIM, COND_DIM)
        for block in (f"blocks.{layer}" for layer in range(self.layers)):
            shapes |= {f"{block}.norm1.weight": (width,), f"{block}.norm2.weight": (width,)}
            linear(f"{block}.attn_qkv", width, 3 * width, bias=False)
            linear(f"{block}.attn_out", width, width, bias=False)
            linear(f"{block}.mlp.0", width, 4 * width)
            linear(f"{block}.mlp.2", 4 * width, width)
            linear(f"{block}.adaLN_modulation", COND_DIM, 6 * width)
        shapes["output_layer.norm_final.weight"] = (width,)
        linear("output_layer.linear", width, states)
        linear("output_layer.adaLN_modulation", COND_DIM, 2 * width)
        return shapes

    def random_weights(self, random: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns random tensors by name, none of them 0: a new network of the reference ignores the noise level."""
        return {
            name: (random.standard_normal(shape) * (0.05 if len(shape) == 1 else shape[-1] ** -0.5)).astype(np.float32)
            for name, shape in self.shapes().items()
        }

    def save(self, folder: str | Path, weights: dict[str, np.ndarray]):
        """Writes a model in the published format, which `sedd.load` reads."""
        (Path(folder) / "config.json").write_text(json.dumps(self.config()))
        save_file(weights, Path(folder) / "model.safetensors")


class Reference:
    """The reference's network, process and noise schedule, with these weights, by default its own initial ones.

    device: "cpu" or "cuda"; dtype: "float32" or "bfloat16", of autocast. float32 is TF32 on GPUs, as it is in JAX.
    """

    def __init__(
        self,
        checkout: Path,
        architecture: Architecture,
        weights: dict[str, np.ndarray] | None = None,
        dropout: float = 0.0,
        device: str = "cpu",
        dtype: str = "float32",
    ):
        if not (checkout / "graph_lib.py").is_file():
            sys.exit(f"{checkout} is not a checkout of louaaron/Score-Entropy-Discrete-Diffusion")
        warnings.filterwarnings("ignore", module="torch|model|graph_lib")  # deprecated names in the reference
        import torch

        torch.set_num_threads(cores())
        if device == "cuda":
            torch.set_float32_matmul_precision("high")
        install_fake_flash_attention(torch)
        install_autocast(torch, device, dtype == "bfloat16")
        if str(checkout) not in sys.path:
            sys.path.insert(0, str(checkout))
        import graph_lib
        import noise_lib
        from model import SEDD
        from omegaconf import OmegaConf

        self.torch, self.device, self.config = torch, device, OmegaConf.create(architecture.config(dropout))
        self.graph, self.noise = graph_lib.Absorbing(architecture.vocab_size), noise_lib.LogLinearNoise().to(device)
        self.network = SEDD(self.config).to(device).eval()
        self.num_parameters = sum(parameter.numel() for parameter in self.network.parameters())
        if weights is None:
            return
        tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
        left = self.network.load_state_dict(tensors, strict=False)
        if left.unexpected_keys or left.missing_keys != ["rotary_emb.inv_freq"]:
            sys.exit(f"{checkout} has other parameters than the published models: {left}")

    def tensor(self, array: np.ndarray):
        """Returns an array on the device."""
        return self.torch.from_numpy(array).to(self.device)

    def log_score(self, tokens: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        """Int[B L], Float[B] -> Float[B L S]."""
        with self.torch.no_grad():
            return self.network(self.tensor(tokens), self.tensor(sigma)).cpu().numpy()


class ReferenceTraining(Reference):
    """The reference's training step, as in its run_train.py on one device, on one batch. tokens: Int64[B L]."""

    def __init__(self, checkout: Path, architecture: Architecture, tokens: np.ndarray, **options):
        super().__init__(checkout, architecture, **options)
        import losses
        from model.ema import ExponentialMovingAverage

        parameters = [*self.network.parameters(), *self.noise.parameters()]
        self._tokens, self.loss = self.tensor(tokens), None
        self._loss = losses.get_loss_fn(self.noise, self.graph, train=False)
        self._step = losses.get_step_fn(self.noise, self.graph, True, losses.optimization_manager(self.config), accum=1)
        self._state = dict(
            model=self.network,
            optimizer=losses.get_optimizer(self.config, parameters),
            scaler=self.torch.amp.GradScaler(self.device, enabled=self.device == "cuda"),  # on a CPU it disables itself
            ema=ExponentialMovingAverage(self.network.parameters(), decay=self.config.training.ema),
            step=0,
        )

    def train(self, steps: int):
        """Takes training steps. Returns when the last one is done."""
        for _ in range(steps):
            self.loss = self._step(self._state, self._tokens)
        self._wait()

    def evaluate(self, batches: int, draws: int):
        """Takes `draws` draws of the loss of the batch without gradients, `batches` times."""
        with self.torch.no_grad():
            for _ in range(batches * draws):
                self._loss(self.network, self._tokens)
        self._wait()

    def loss_and_gradient_norm(self, tokens: np.ndarray, noisy: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, float]:
        """The loss of each row at the times t, without dropout, and the norm of the gradient of their mean.

        tokens, noisy: Int64[B L]; t: Float[B]. Returns Float[B], in nats a row, and the norm.
        """
        loss = self._loss(self.network, self.tensor(tokens), t=self.tensor(t), perturbed_batch=self.tensor(noisy))
        gradient = self.torch.autograd.grad(loss.mean(), list(self.network.parameters()))
        norm = self.torch.stack([part.square().sum() for part in gradient]).sum().sqrt()
        return loss.detach().cpu().numpy(), float(norm)

    def peak_memory(self) -> float:
        """Peak memory in GB: on a GPU of torch's allocator, else of the process."""
        return self.torch.cuda.max_memory_allocated() / 1e9 if self.device == "cuda" else process_peak()

    def _wait(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def process_peak() -> float:
    """Peak resident memory of this process in GB. Runs on Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1]) / 1e9


def random_tokens(architecture: Architecture, rows: int) -> np.ndarray:
    """Returns a batch of uniform tokens, none of them masked. Int64[B L]."""
    return np.random.default_rng(0).integers(0, architecture.vocab_size, (rows, architecture.length))


def install_autocast(torch, device: str, in_bfloat16: bool):
    """Makes the autocast of the reference, which is for GPUs, one of this device: to bfloat16, or disabled."""

    def autocast(enabled: bool = True, dtype=torch.bfloat16):
        return torch.autocast(device, dtype=dtype, enabled=enabled and in_bfloat16)

    torch.cuda.amp.autocast = autocast


def install_fake_flash_attention(torch):
    """Installs torch versions of the two functions of flash_attn that the reference calls, for equal lengths."""

    def attention(qkv, bounds, length, dropout, causal):
        """qkv: Float[B*L 3 H K] -> Float[B*L H K]."""
        q, k, v = qkv.unflatten(0, (-1, length)).permute(2, 0, 3, 1, 4)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
        return out.transpose(1, 2).flatten(0, 1)

    def rotate(qkv, cos, sin):
        """Rotary positions for queries and keys, in place. qkv: Float[B L 3 H K]; cos, sin: Float[L K/2]."""
        first, second = qkv[:, :, :2].chunk(2, dim=-1)
        cos, sin = cos[:, None, None], sin[:, None, None]
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        qkv[:, :, :2] = rotated
        return qkv

    names = ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.layers", "flash_attn.layers.rotary")
    package, interface, layers, rotary = (types.ModuleType(name) for name in names)
    interface.flash_attn_varlen_qkvpacked_func, rotary.apply_rotary_emb_qkv_ = attention, rotate
    package.flash_attn_interface, package.layers, layers.rotary = interface, layers, rotary
    sys.modules.update(zip(names, (package, interface, layers, rotary)))


def main():
    checkout, size, dtype, device = sys.argv[1:]
    *sizes, rows = map(int, size.split("x"))
    architecture = Architecture(*sizes)
    tokens = random_tokens(architecture, rows)
    training = ReferenceTraining(Path(checkout), architecture, tokens, dropout=0.1, device=device, dtype=dtype)
    training.train(WARMUP_STEPS + 1)
    print(training.peak_memory())


if __name__ == "__main__":
    main()
