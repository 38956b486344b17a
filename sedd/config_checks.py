"""What a config may hold: the values of each setting, and the combinations of settings that make sense."""

from collections.abc import Callable

from ml_collections import ConfigDict

from sedd.codecs.decoder import CORRUPTIONS, DECODERS
from sedd.codecs.embeddings import LEARNED, RANDOM, ROUNDINGS
from sedd.diffusion.discrete.process import Absorbing, Process, Uniform
from sedd.diffusion.schedule import Cosine, Geometric, LinearBeta, LogLinear, LogSNR, Power, Schedule, Sqrt, Tan
from sedd.errors import UserError
from sedd.network.adapters import CONDITIONING, CONSTANT
from sedd.network.attention import ATTENTION, check_sizes
from sedd.network.latent_predictions import DENOISER, MEANS
from sedd.network.masked_lm import ARCHITECTURES, DIT
from sedd.network.predictions import PREDICTIONS
from sedd.network.trunk import REMAT
from sedd.recipes import DEFAULT, EMBEDDINGS, ENCODER, GAUSSIAN, kind_of, resolved
from sedd.seeds import check_seed

PROCESSES: dict[str, type[Process]] = {"absorbing": Absorbing, "uniform": Uniform}  # over tokens
SCHEDULES: dict[str, Callable[[ConfigDict], Schedule]] = {
    "loglinear": lambda config: LogLinear(config.eps),
    "geometric": lambda config: Geometric(config.sigma_min, config.sigma_max),
    "power": lambda config: Power(config.low, config.high, config.power),
    "sqrt": lambda config: Sqrt(config.low, config.high),
    "tan": lambda config: Tan(config.d, config.start, config.end),
    "cosine": lambda config: Cosine(config.start, config.end),
    "linear_beta": lambda config: LinearBeta(config.beta_min, config.beta_max),
    "log_snr": lambda config: LogSNR.between(config.low, config.high),
}
# Settings of a masked language model, of a network of latents, and those of `codec` of one kind of latents only.
OF_MASKED = ("architecture", "mask_token", "start_token")
OF_LATENTS = ("soft_tokens", "self_conditioning", "estimate_layers", "evidence_snr")
_OF_EMBEDDINGS = ("table", "normalised", "rounding")
_OF_ENCODER = tuple(name for name in DEFAULT["codec"] if name not in ("name", "width", *_OF_EMBEDDINGS))
MIN_LOW, MIN_HIGH, MAX_HIGH = 1e-3, 4.0, 40.0  # limits of sigma(0) and sigma(1) for Gaussian noise
_CHOICES = {
    "process.name": (*PROCESSES, GAUSSIAN),
    "network.architecture": (DIT, *ARCHITECTURES),
    "codec.name": (EMBEDDINGS, ENCODER),
    "codec.rounding": ROUNDINGS,
    "codec.decoder": DECODERS,
    "codec.corruption": tuple(CORRUPTIONS),
    "schedule.name": tuple(SCHEDULES),
    "network.prediction": tuple(dict.fromkeys((*PREDICTIONS, DENOISER, *MEANS))),
    "network.conditioning": tuple(CONDITIONING),
    "network.dtype": ("float32", "bfloat16"),
    "network.remat": tuple(REMAT),
    "network.attention": tuple(ATTENTION),
    "training.loss": ("bound", "cross_entropy", "regression", "denoising", "decoder"),
    "training.noise_sampling": ("time", "mask_count"),
    "optimizer.name": ("adamw", "muon"),
    "optimizer.decay": ("constant", "linear"),
}
_POSITIVE = {
    "codec": ("decoder_layers",),
    "network": ("width", "layers", "heads", "embedding_std"),
    "data": ("block_length",),
    "training": ("steps", "batch_size", "accumulation"),
    "optimizer": ("learning_rate", "adam_learning_rate", "warmup_steps", "clip_norm"),
    "checkpoint": ("every", "keep"),
    "evaluation": ("draws",),
}
_NOT_NEGATIVE = (
    "network.block_size",
    "network.cond_dim",
    "network.evidence_snr",
    "evaluation.low",
    "training.max_skipped_steps",
    "optimizer.weight_decay",
    "checkpoint.keep_every",
    "evaluation.every",
    "evaluation.samples",
    "metrics.profile",
)


def validate(config: ConfigDict) -> ConfigDict:
    """Returns the config, `resolved`. UserError for an invalid value or combination of values."""
    if config.process.name in _CHOICES["process.name"]:
        config = resolved(config)
    _validate_values(config)
    try:
        schedule = SCHEDULES[config.schedule.name](config.schedule)
    except ValueError as error:
        raise UserError(f"config: {error}") from None
    _validate_sizes(config)
    _validate_architecture(config)
    if config.network.block_size:
        _validate_blocks(config)
    if config.process.name == GAUSSIAN:
        _validate_latents(config, schedule)
    else:
        _validate_tokens(config)
    return config


def _validate_values(config: ConfigDict):
    """UserError for a value that its setting cannot have."""

    def get(key):
        group, name = key.split(".")
        return config[group][name]

    for key, choices in _CHOICES.items():
        if get(key) not in choices:
            raise UserError(f"config: {key} must be one of {', '.join(choices)}, not {get(key)}")
    for group, members in config.items():
        for name, value in members.items():
            if type(value) in (int, float) and name != "seed" and not abs(value) < 2**31:
                raise UserError(f"config: {group}.{name} must be less than 2**31, not {value}")
    for group, names in _POSITIVE.items():
        for name in names:
            if config[group][name] <= 0:
                raise UserError(f"config: {group}.{name} must be positive, not {config[group][name]}")
    for key in _NOT_NEGATIVE:
        if get(key) < 0:
            raise UserError(f"config: {key} must not be negative, and is {get(key)}")
    for key in ("network.dropout", "training.ema_decay"):
        if not 0 <= get(key) < 1:
            raise UserError(f"config: {key} must lie in [0, 1), not {get(key)}")
    check_seed(config.training.seed, "config: training.seed")
    if not 0 < config.training.min_time < 1:
        raise UserError(f"config: training.min_time must lie in (0, 1), not {config.training.min_time}")


def _validate_sizes(config: ConfigDict):
    """UserError for settings, of any process, that do not go together."""
    training, network = config.training, config.network
    if config.checkpoint.keep_best and not config.evaluation.every:
        raise UserError("config: checkpoint.keep_best needs validation bounds; set evaluation.every")
    if training.batch_size % training.accumulation:
        raise UserError("config: training.batch_size must be a multiple of training.accumulation")
    if network.long_skips and network.scan:
        raise UserError("config: network.long_skips needs network.scan=False: scanned layers have no mirror images")
    if network.estimate_layers and not network.self_conditioning:
        raise UserError("config: network.estimate_layers needs network.self_conditioning=True")
    if not network.cond_dim and (config.process.name == GAUSSIAN or network.conditioning != CONSTANT):
        raise UserError(
            f"config: network.cond_dim=0 needs network.conditioning={CONSTANT} and tokens: absorbing or uniform"
        )
    if network.width % (2 * network.heads):
        raise UserError("config: network.width must be a multiple of twice network.heads")
    try:
        check_sizes(network.attention, network.dtype, network.width // network.heads, config.data.block_length)
    except ValueError as error:
        raise UserError(f"config: {error}, or choose xla") from None


def _validate_architecture(config: ConfigDict):
    """UserError for settings that the architecture does not have."""
    network, masked = config.network, " or ".join(ARCHITECTURES)
    if network.architecture == DIT:
        _check_unset(config, ("network.mask_token", "network.start_token"), f"network.architecture={masked}")
        return
    kind = f"config: network.architecture={network.architecture}"
    if config.process.name != "absorbing" or network.prediction != "denoiser":
        raise UserError(f"{kind} needs process.name=absorbing and network.prediction=denoiser")
    for_dit = ("block_size", "cond_dim", "embedding_std", "scan", "long_skips")
    _check_unset(config, tuple(f"network.{name}" for name in for_dit), f"network.architecture={DIT}")
    if network.attention == "splash":
        raise UserError(f"{kind} has an attention mask, which network.attention=splash does not take; choose xla")
    constants = ARCHITECTURES[network.architecture]
    longest = constants["positions"] - constants["position_offset"] - 1
    if config.data.block_length > longest:
        raise UserError(f"{kind} takes rows of at most {longest} tokens after the start token; lower data.block_length")


def _validate_blocks(config: ConfigDict):
    """UserError for settings that do not go with blocks that are generated from left to right."""
    network, size, length = config.network, config.network.block_size, config.data.block_length
    kind = f"config: network.block_size={size}"
    if config.process.name != "absorbing" or network.architecture != DIT or network.prediction != "denoiser":
        raise UserError(
            f"{kind} needs process.name=absorbing, network.architecture={DIT} and network.prediction=denoiser"
        )
    if network.conditioning != CONSTANT:
        raise UserError(f"{kind} needs network.conditioning={CONSTANT}: each block has a noise level of its own")
    if config.training.loss != "bound":
        raise UserError(f"{kind} needs training.loss=bound")
    if length % size or size == length:
        raise UserError(
            f"{kind} must divide data.block_length={length}, and be less; network.block_size=0 is one block a row"
        )
    if network.attention == "splash":
        raise UserError(f"{kind} has an attention mask, which network.attention=splash does not take; choose xla")


def _validate_tokens(config: ConfigDict):
    """UserError for a combination without sense of settings of a jump process."""
    training, network, uniform = config.training, config.network, config.process.name == "uniform"
    if network.given_embedding and not uniform:
        raise UserError(
            "config: network.given_embedding is for process.name=uniform; the absorbing process needs none, since a "
            "given token is one that is not masked"
        )
    if network.prediction not in PREDICTIONS:
        raise UserError(f"config: network.prediction={network.prediction} is for process.name=gaussian")
    prediction = PREDICTIONS[network.prediction]
    if training.loss not in ("bound", "cross_entropy"):
        raise UserError(f"config: training.loss={training.loss} is for process.name=gaussian; choose bound")
    if not uniform and not prediction.with_mask:
        raise UserError(
            f"config: network.prediction={network.prediction} is for process.name=uniform; of a masked token the "
            "denoiser is the posterior"
        )
    if training.loss == "cross_entropy":
        if prediction.unnormalised:
            raise UserError(
                f"config: training.loss=cross_entropy needs normalised predictions, which {network.prediction} has "
                "not; choose training.loss=bound"
            )
        if training.noise_sampling != "time":
            raise UserError("config: training.loss=cross_entropy needs training.noise_sampling=time")
    if training.noise_sampling == "mask_count":
        if config.process.name != "absorbing":
            raise UserError("config: training.noise_sampling=mask_count is for process.name=absorbing; choose time")
        if training.batch_size // training.accumulation % 2:
            raise UserError(
                "config: training.noise_sampling=mask_count needs an even number of rows in each microbatch"
            )
    keys = [f"codec.{name}" for name in config.codec] + [f"network.{name}" for name in OF_LATENTS]
    _check_unset(config, (*keys, "evaluation.low"), "process.name=gaussian, which has latents of tokens")


def _check_unset(config: ConfigDict, keys: tuple[str, ...], of_what: str):
    """UserError if one of the settings, which are of other models only, is not at its default."""
    for key in keys:
        group, name = key.split(".")
        if config[group][name] != DEFAULT[group][name]:
            raise UserError(f"config: {key} is for {of_what}")


def _validate_latents(config: ConfigDict, schedule: Schedule):
    """UserError for a combination without sense of settings of Gaussian diffusion."""
    if config.training.noise_sampling != "time":
        raise UserError("config: process.name=gaussian needs training.noise_sampling=time")
    if config.network.prediction not in (DENOISER, *MEANS):
        raise UserError(
            f"config: network.prediction={config.network.prediction} is for tokens; process.name=gaussian has "
            f"{', '.join((DENOISER, *MEANS))}"
        )
    low, high = float(schedule.sigma(0.0)), float(schedule.sigma(1.0))
    if not MIN_HIGH <= high <= MAX_HIGH:
        raise UserError(
            f"config: schedule.name={config.schedule.name} ends at sigma {high:.3g}; Gaussian noise starts sampling "
            f"from N(0, I), which needs {MIN_HIGH:g} to {MAX_HIGH:g}"
        )
    if config.evaluation.low and not MIN_LOW <= config.evaluation.low < high:
        raise UserError(f"config: evaluation.low must be a sigma from {MIN_LOW:g} to below {high:.3g}, or 0: a default")
    if kind_of(config) == ENCODER:
        _validate_encoder(config)
    else:
        _validate_embeddings(config, low)


def _validate_embeddings(config: ConfigDict, low: float):
    """UserError for a combination without sense of settings of embeddings. low: the schedule's least sigma."""
    training, network, codec = config.training, config.network, config.codec
    predicts_tokens = network.prediction == DENOISER
    _check_unset(config, tuple(f"codec.{name}" for name in _OF_ENCODER), "codec.name=encoder")
    if codec.width < 1:
        raise UserError(f"config: codec.width must be positive, not {codec.width}")
    if training.loss not in ("bound", "cross_entropy", "regression"):
        raise UserError(f"config: training.loss={training.loss} is for codec.name=encoder; choose cross_entropy")
    if training.loss == "cross_entropy" and not predicts_tokens:
        raise UserError(
            f"config: training.loss=cross_entropy needs network.prediction={DENOISER}; with {network.prediction} "
            "choose regression or bound"
        )
    if training.loss == "regression" and predicts_tokens:
        raise UserError("config: training.loss=regression needs network.prediction=x0, eps or v; choose cross_entropy")
    if network.evidence_snr and not predicts_tokens:
        raise UserError(f"config: network.evidence_snr needs network.prediction={DENOISER}")
    if codec.table not in (LEARNED, RANDOM) and not codec.table.endswith(".npy"):
        raise UserError(f"config: codec.table must be learned, random or the path of an .npy file, not {codec.table}")
    if codec.table == LEARNED and not codec.normalised and training.loss != "regression":
        raise UserError(
            "config: a learned table with codec.normalised=False is for training.loss=regression, whose rounding holds "
            "it; another loss makes its rows grow without limit"
        )
    if low < MIN_LOW and training.loss != "cross_entropy":
        raise UserError(
            f"config: schedule.name={config.schedule.name} begins at sigma {low:.3g}; training.loss={training.loss} "
            f"scores tokens there, and needs at least {MIN_LOW:g}"
        )


def _validate_encoder(config: ConfigDict):
    """UserError for a combination without sense of settings of a frozen encoder."""
    training, network, codec = config.training, config.network, config.codec
    embeddings = (*(f"codec.{name}" for name in _OF_EMBEDDINGS), "network.evidence_snr", "network.given_embedding")
    _check_unset(config, embeddings, "codec.name=embeddings, which has a latent for each token")
    if network.soft_tokens or network.prediction == DENOISER:
        setting = "soft_tokens" if network.soft_tokens else "prediction"
        raise UserError(
            f"config: network.{setting}={network[setting]} is for codec.name=embeddings; the states of an encoder are "
            f"predicted as {', '.join(MEANS)}, without soft tokens"
        )
    if codec.encoder == "none":
        raise UserError(
            "config: codec.name=encoder needs codec.encoder, the folder of a BERT, RoBERTa or T5 in Hugging Face's "
            "format, or its name on the hub"
        )
    if codec.width < 0:
        raise UserError(f"config: codec.width must not be negative, and is {codec.width}")
    if training.loss not in ("regression", "denoising", "decoder"):
        raise UserError(
            f"config: training.loss={training.loss} is for codec.name=embeddings; choose regression, or one of its "
            "parts, denoising and decoder"
        )
    if training.loss == "decoder" and config.evaluation.every:
        raise UserError("config: training.loss=decoder trains no model that can be evaluated; set evaluation.every=0")
    if not 0 <= codec.corruption_start <= codec.corruption_end <= 1:
        raise UserError("config: codec.corruption_start and codec.corruption_end must be times, 0 <= start <= end <= 1")
