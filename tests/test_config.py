"""The config: validated, with one line for each error."""

import json
from pathlib import Path

import pytest
from etils import epath

from sedd import config as configs
from sedd.errors import UserError
from sedd.recipes import RECIPES, kind_of


def test_overrides_take_the_type_of_the_default():
    config = configs.override(
        configs.default(), ["optimizer.learning_rate=1", "network.scan=true", "data.vocab_size=27"]
    )
    assert config.optimizer.learning_rate == 1.0 and config.network.scan is True and config.data.vocab_size == 27
    assert configs.override(config, ["data.vocab_size=none"]).data.vocab_size is None
    assert configs.override(config, ["data.corpus=data/10"]).data.corpus == "data/10"
    assert repr(configs.override(config, ["training.steps=1e5"]).training.steps) == "100000"


GAUSSIAN = "process.name=gaussian"
ENCODER = (GAUSSIAN, "codec.name=encoder", "codec.encoder=folder")


@pytest.mark.parametrize(
    "setting, message",
    [
        ("optimizer.lerning_rate=1", "the nearest is optimizer.learning_rate"),
        ("learning_rate=1", "the nearest is optimizer.learning_rate"),
        ("training.steps", "has no value"),
        ("training.steps=many", "must be of type int"),
        ("training.steps=1.5", "must be of type int"),
        ("training.steps=0", "must be positive"),
        ("training.steps=1e12", r"training.steps must be less than 2\*\*31, not 1000000000000"),
        ("network.width=99999999999", r"network.width must be less than 2\*\*31"),
        ("optimizer.learning_rate=1e400", r"must be less than 2\*\*31, not inf"),
        ("network.scan=1", "must be of type bool"),
        ("network.conditioning=time", "one of sigma, log_snr"),
        ("training.loss=mse", "one of bound, cross_entropy"),
        ("network.prediction=posterior", "posterior is for process.name=uniform"),
        ("training.loss=cross_entropy", "needs training.noise_sampling=time"),
        (["training.loss=cross_entropy", "network.prediction=score"], "needs normalised predictions"),
        ("process.name=masking", "one of absorbing, uniform"),
        ("network.prediction=mean", "one of denoiser, posterior, score"),
        ("network.prediction=x0", "x0 is for process.name=gaussian"),
        ("codec.width=4", "codec.width is for process.name=gaussian"),
        ("training.loss=regression", "regression is for process.name=gaussian"),
        ([GAUSSIAN, "network.prediction=score"], "score is for tokens; process.name=gaussian has denoiser, x0, eps, v"),
        ([GAUSSIAN, "network.prediction=x0"], "with x0 choose regression or bound"),
        ([GAUSSIAN, "training.loss=regression"], "regression needs network.prediction=x0, eps or v"),
        ([GAUSSIAN, "training.noise_sampling=mask_count"], "needs training.noise_sampling=time"),
        ([GAUSSIAN, "codec.normalised=false"], "rows grow without limit"),
        ([GAUSSIAN, "codec.table=table.txt"], "learned, random or the path of an .npy file"),
        ([GAUSSIAN, "schedule.high=0.8"], r"power ends at sigma 1.61; .* needs 4 to 40"),
        ([GAUSSIAN, "schedule.name=loglinear", "training.loss=bound"], "begins at sigma 0; .* needs at least 0.001"),
        ([GAUSSIAN, "schedule.low=2"], "Power: needs 0 < low < high < 1"),
        (["process.name=uniform", "training.loss=bound", "training.noise_sampling=mask_count"], "choose time"),
        ("codec.static=true", "codec.static is for process.name=gaussian"),
        ("evaluation.low=0.1", "evaluation.low is for process.name=gaussian"),
        ("training.loss=decoder", "decoder is for process.name=gaussian"),
        ("network.estimate_layers=true", "estimate_layers is for process.name=gaussian"),
        (["network.long_skips=true", "network.scan=true"], "long_skips needs network.scan=False"),
        ([GAUSSIAN, "codec.decoder=mlp"], "codec.decoder is for codec.name=encoder"),
        ([GAUSSIAN, "training.loss=denoising"], "denoising is for codec.name=encoder"),
        ([GAUSSIAN, "codec.width=0"], "codec.width must be positive"),
        ([GAUSSIAN, "evaluation.low=10"], "a sigma from 0.001 to below 9.21"),
        ([GAUSSIAN, "network.estimate_layers=true", "network.self_conditioning=false"], "needs network.self_cond"),
        ([GAUSSIAN, "codec.name=encoder"], "needs codec.encoder, the folder of a BERT"),
        ([*ENCODER, "codec.table=random"], "codec.table is for codec.name=embeddings"),
        ([*ENCODER, "network.given_embedding=true"], "given_embedding is for codec.name=embeddings"),
        ([*ENCODER, "network.soft_tokens=true"], "soft_tokens=True is for codec.name=embeddings"),
        ([*ENCODER, "network.prediction=denoiser"], "prediction=denoiser is for codec.name=embeddings"),
        ([*ENCODER, "training.loss=bound"], "choose regression, or one of its parts, denoising and decoder"),
        ([*ENCODER, "codec.corruption=dropout"], "codec.corruption must be one of noise, additive, none"),
        ([*ENCODER, "codec.corruption_end=1.5"], "must be times"),
        ([*ENCODER, "training.loss=decoder", "evaluation.every=5"], "no model that can be evaluated"),
        ([*ENCODER, "codec.width=-1"], "codec.width must not be negative"),
        ("network.given_embedding=1", "must be of type bool"),
        (
            "network.given_embedding=true",
            "network.given_embedding is for process.name=uniform; the absorbing process needs none",
        ),
        ("training.batch_size=63", "even number of rows"),
        ("training.accumulation=3", "multiple of training.accumulation"),
        ("network.heads=3", "multiple of twice"),
        ("network.dropout=1.0", r"in \[0, 1\)"),
        ("training.min_time=0", r"in \(0, 1\)"),
        ("schedule.eps=2", r"eps must lie in \(0, 1\)"),
        ("evaluation.samples=-1", "evaluation.samples must not be negative"),
        ("evaluation.every=-1", "evaluation.every must not be negative"),
    ],
)
def test_invalid_settings_are_one_line(setting, message):
    with pytest.raises(UserError, match=message) as caught:
        configs.override(configs.default(), [setting] if isinstance(setting, str) else setting)
    assert "\n" not in str(caught.value)


def test_settings_that_are_none_follow_the_process():
    """In any order and after a file; what is set stays set, and a resolved config is complete."""
    config = configs.override(configs.default(), ["training.steps=5"])
    kinds = {name: [f"process.name={name}"] for name in RECIPES}
    kinds |= {"encoder": ENCODER, "blocks": ["network.block_size=4"]}
    recipes = {name: configs.resolved(configs.override(config, kinds[name])) for name in RECIPES}
    assert {kind_of(recipe) for recipe in recipes.values()} == RECIPES.keys()
    assert recipes["absorbing"].network.prediction == "denoiser" and recipes["absorbing"].training.loss == "bound"
    uniform = recipes["uniform"]
    assert (uniform.network.prediction, uniform.network.conditioning) == ("posterior", "log_snr")
    assert (uniform.training.loss, uniform.training.noise_sampling) == ("cross_entropy", "time")
    set_first = configs.override(config, ["network.prediction=denoiser", "process.name=uniform"])
    assert configs.resolved(set_first).network.prediction == "denoiser"
    assert configs.validate(set_first).to_dict() == configs.resolved(set_first).to_dict()
    for recipe in recipes.values():
        assert [key for key in RECIPES["uniform"] if recipe[key.split(".")[0]][key.split(".")[1]] is None] == []
        assert configs.resolved(recipe).to_dict() == recipe.to_dict()
    assert RECIPES["uniform"].keys() == RECIPES["absorbing"].keys()
    assert configs.override(uniform, ["training.loss=none"]).training.loss is None


def test_the_paper_is_one_recipe_for_both_processes():
    for name in configs.PROCESSES:
        config = configs.resolved(configs.override(configs.paper(), [f"process.name={name}"]))
        assert (config.network.prediction, config.network.conditioning) == ("score", "sigma")
        assert (config.training.loss, config.training.noise_sampling) == ("bound", "time")


def test_a_saved_config_without_new_keys_is_the_model_that_was_saved(tmp_path):
    """Earlier versions conditioned every network on sigma, and trained it with the bound."""
    config = configs.resolved(configs.override(configs.default(), ["process.name=uniform"])).to_dict()
    del config["network"]["conditioning"], config["training"]["loss"]
    (tmp_path / "config.json").write_text(json.dumps({"format": configs.FORMAT, "config": config}))
    saved = configs.from_dict(configs.read_description(epath.Path(tmp_path / "config.json"))["config"])
    assert saved.network.conditioning == "sigma" and saved.training.loss == "bound"


def test_json_round_trip_keeps_the_config():
    config = configs.override(configs.default(), ["training.steps=5"])
    assert configs.from_dict(json.loads(json.dumps(config.to_dict()))).to_dict() == config.to_dict()


def test_config_without_given_embedding_builds_a_network_without_it():
    """As saved by earlier versions."""
    saved = configs.override(configs.default(), ["process.name=uniform", "training.noise_sampling=time"]).to_dict()
    del saved["network"]["given_embedding"]
    config = configs.from_dict(saved)
    assert configs.build(config, 5)[2].given_embedding is False
    assert configs.build(configs.override(config, ["network.given_embedding=true"]), 5)[2].given_embedding is True


def test_every_key_of_the_default_is_read():
    """The name of each key occurs in the package outside of the default config."""
    package = Path(configs.__file__).parent
    code = "".join(file.read_text() for file in package.rglob("*.py"))
    for group, members in configs.default().items():
        for name in members:
            assert code.count(name) > 1, f"{group}.{name}"


def test_paper_config_has_the_published_sizes_and_optimizer():
    config = configs.validate(configs.paper())
    assert configs.build(config, 50257)[2].num_parameters() == 169_627_218
    config.network.update(width=1024, layers=24, heads=16)
    assert configs.build(config, 50257)[2].num_parameters() == 424_477_010
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.warmup_steps) == ("adamw", 3e-4, 2500)
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.999, 0.0, 1.0)
    assert (optimizer.decay, config.training.ema_decay, config.training.min_time) == ("constant", 0.9999, 1e-3)
    assert (config.training.batch_size, config.data.block_length, config.network.dropout) == (512, 1024, 0.1)
