"""Every setting with its default, and the recipe of each kind of model: the values of the settings that are None."""

from typing import Any

from ml_collections import ConfigDict

GAUSSIAN, EMBEDDINGS, ENCODER = "gaussian", "embeddings", "encoder"  # the process over latents, and its codecs
BLOCKS = "blocks"  # the kind of models with network.block_size
RECIPES: dict[str, dict] = {  # by process, or for a frozen encoder or blocks their own; see docs/measurements.md
    "absorbing": {
        "schedule.name": "loglinear",
        "network.prediction": "denoiser",
        "network.conditioning": "sigma",
        "training.loss": "bound",
        "training.noise_sampling": "mask_count",
    },
    "blocks": {
        "schedule.name": "loglinear",
        "network.prediction": "denoiser",
        "network.conditioning": "constant",
        "training.loss": "bound",
        "training.noise_sampling": "mask_count",
    },
    "uniform": {
        "schedule.name": "loglinear",
        "network.prediction": "posterior",
        "network.conditioning": "log_snr",
        "training.loss": "cross_entropy",
        "training.noise_sampling": "time",
    },
    "gaussian": {
        "codec.width": 8,
        "schedule.name": "power",
        "network.prediction": "denoiser",
        "network.conditioning": "log_snr",
        "network.soft_tokens": True,
        "training.loss": "cross_entropy",
        "training.noise_sampling": "time",
    },
    "encoder": {
        "codec.width": 0,
        "schedule.name": "tan",
        "network.prediction": "x0",
        "network.conditioning": "log_snr",
        "network.soft_tokens": False,
        "training.loss": "regression",
        "training.noise_sampling": "time",
    },
}
OPTIONAL = {key: str for recipe in RECIPES.values() for key in recipe} | {  # the types of the settings that are None
    "codec.width": int,
    "network.soft_tokens": bool,
    "data.vocab_size": int,
}
DEFAULT: dict[str, dict[str, Any]] = {
    "process": {"name": "absorbing"},  # or "uniform"; or "gaussian", over latents of the tokens
    "codec": {  # gaussian: what the latents are
        "name": "embeddings",  # of the tokens; or the states of a frozen "encoder"
        "width": None,  # of a latent; encoder: 0, all of its coordinates, or a number of principal components
        "table": "learned",  # or not trained: "random", as initialised, or FILE.npy, an array of a row for each token
        "normalised": True,  # rows of one norm at any width; else free rows, which loss=regression holds
        "rounding": "evidence",  # of latents to tokens: by density, or by a "head" as published
        "encoder": "none",  # encoder: the folder of a BERT, RoBERTa or T5 in Hugging Face's format, or its name there
        "digest": "none",  # encoder: of its files; a run records it
        "static": False,  # encoder: its embeddings of the tokens alone, without their context
        "decoder": "transformer",  # encoder: from latents to tokens; or "mlp"
        "decoder_layers": 3,  # encoder: of the transformer
        "corruption": "noise",  # encoder: of what the decoder is trained on; or "additive", or "none"
        "corruption_start": 1e-3,  # encoder: the times of the noise
        "corruption_end": 0.15,
    },
    "schedule": {
        "name": None,
        "eps": 1e-3,  # loglinear: the probability that a token is clean at t = 1
        "sigma_min": 1e-4,  # geometric
        "sigma_max": 20.0,  # geometric
        "low": 0.01,  # power, sqrt and log_snr: 1 - alpha at t = 0
        "high": 0.9999,  # power, sqrt and log_snr: 1 - alpha at t = 1
        "power": 3.0,  # power: that of 1 - alpha that grows linearly with t
        "d": 9.0,  # tan
        "start": 1e-3,  # tan and cosine: the share of the angle that is left out at t = 0
        "end": 1e-3,  # tan and cosine: at t = 1
        "beta_min": 0.1,  # linear_beta
        "beta_max": 20.0,  # linear_beta
    },
    "network": {
        "prediction": None,  # "denoiser", "score" as in the paper; uniform: "posterior"; gaussian: "x0", "eps", "v"
        "conditioning": None,  # the noise level as "sigma", as in the paper, or as "log_snr"; "constant": none
        "architecture": "dit",  # absorbing: also that of "bert" or "roberta", which is not conditioned on the noise
        "block_size": 0,  # absorbing: tokens of a block, in order; 1: autoregressive; 0: those of a row
        "mask_token": -1,  # bert, roberta: the id of [MASK] or <mask>; -1: that of the published models
        "start_token": -1,  # bert, roberta: the id of [CLS] or <s>, which precedes each row; -1: likewise
        "width": 128,
        "layers": 4,
        "heads": 4,
        "cond_dim": 128,  # width of the embedding of sigma; 0: none, and no modulation (conditioning "constant")
        "embedding_std": 0.5,  # at initialisation; in the paper 1 / sqrt(3 width)
        "dropout": 0.0,
        "dtype": "float32",  # of the linear layers and attention of the trunk; the rest is float32
        "scan": False,  # compile one layer and scan over the layers
        "remat": "none",  # rematerialise nothing, "full" layers, or all of a layer but its "dots"
        "attention": "xla",  # or "cudnn" on GPUs, "splash" on TPUs
        "given_embedding": False,  # uniform, gaussian: embed which tokens are given, so that infilling is exact
        "long_skips": False,  # add the inputs of the first half of the layers to those of the second
        "soft_tokens": None,  # gaussian: the network also takes each token's distribution by its own latent
        "self_conditioning": True,  # gaussian: the network also takes its last answer
        "estimate_layers": False,  # gaussian: it takes the last answer in front of each layer
        "evidence_snr": 0.0,  # gaussian: SNR at which half of the own latent's evidence is added to the logits; 0: none
    },
    "data": {
        "corpus": "data/names",
        "block_length": 32,
        "vocab_size": None,  # None: that of the corpus; else it must equal that
    },
    "training": {
        "steps": 800,
        "batch_size": 64,  # rows per update, over all devices and microbatches
        "accumulation": 1,  # microbatches per update
        "seed": 0,
        "ema_decay": 0.0,  # 0: no EMA of the parameters
        "loss": None,  # the "bound", the "cross_entropy" of the posterior; gaussian: "regression", as published;
        # encoder: its parts alone, "denoising" and "decoder"
        "noise_sampling": None,  # absorbing: "mask_count", in antithetic pairs; or "time", as in the paper
        "min_time": 1e-3,  # noise_sampling=time: the smallest time
        "max_skipped_steps": 0,  # skipped updates with a non-finite loss or gradient; one more stops the run
    },
    "optimizer": {
        "name": "muon",  # for the matrices of the trunk, with Adam for the rest; or "adamw", as in the paper
        "learning_rate": 0.02,
        "adam_learning_rate": 0.03,  # muon: of the parameters that Adam updates
        "b1": 0.9,  # Adam
        "b2": 0.98,  # Adam
        "weight_decay": 0.0,
        "warmup_steps": 30,
        "decay": "linear",  # to 0 at the last step, or "constant"
        "clip_norm": 32.0,  # largest gradient norm, of the loss summed over positions and averaged over rows
    },
    "mesh": {"data": -1, "fsdp": 1, "model": 1},  # devices along each axis; -1: all remaining devices
    "checkpoint": {
        "every": 500,  # steps between checkpoints
        "keep": 2,  # number of newest checkpoints to keep
        "keep_every": 0,  # also keep those at multiples of this step; 0: none
        "keep_best": False,  # also keep the one with the best bound; a new best bound writes a checkpoint
    },
    "evaluation": {
        "every": 0,  # steps between validation bounds and samples during training; 0: none
        "draws": 16,  # noise levels per block
        "low": 0.0,  # gaussian: the noise sigma at which the bound passes to the tokens; 0: a default
        "samples": 2,  # texts sampled each time during training
    },
    "metrics": {
        "tensorboard": False,  # also write TensorBoard event files (pip install 'sedd[tensorboard]')
        "profile": 0,  # steps to trace with the JAX profiler, after the first ten; 0: none
    },
}


def kind_of(config: ConfigDict) -> str:
    """Returns the key in RECIPES of the kind of model that a config describes."""
    if (config.process.name, config.codec.name) == (GAUSSIAN, ENCODER):
        return ENCODER
    return BLOCKS if config.process.name == "absorbing" and config.network.block_size else config.process.name


def resolved(config: ConfigDict) -> ConfigDict:
    """Returns a copy in which the settings that are None have the values of the recipe."""
    config = ConfigDict(config.to_dict()).lock()
    for key, value in RECIPES[kind_of(config)].items():
        group, name = key.split(".")
        if config[group][name] is None:
            config[group][name] = value
    return config
