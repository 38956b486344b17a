"""The config: strict, with one clear line for each mistake."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sedd import config as configs
from sedd.errors import UserError
from sedd.training.objective import Objective

EXPERIMENTS = sorted((Path(__file__).parent.parent / "experiments").glob("*.py"))


def test_overrides_take_the_type_of_the_default():
    config = configs.override(
        configs.default(), ["optimizer.learning_rate=1", "network.scan=true", "data.vocab_size=27"]
    )
    assert config.optimizer.learning_rate == 1.0 and config.network.scan is True and config.data.vocab_size == 27
    assert configs.override(config, ["data.vocab_size=none"]).data.vocab_size is None
    assert configs.override(config, ["data.corpus=data/10"]).data.corpus == "data/10"


@pytest.mark.parametrize(
    "setting, message",
    [
        ("optimizer.lerning_rate=1", "the nearest is optimizer.learning_rate"),
        ("learning_rate=1", "the nearest is optimizer.learning_rate"),
        ("training.steps", "has no value"),
        ("training.steps=many", "must be of type int"),
        ("training.steps=1.5", "must be of type int"),
        ("training.steps=0", "must be positive"),
        ("network.scan=1", "must be of type bool"),
        ("process.name=masking", "one of absorbing, uniform"),
        ("network.prediction=x0", "one of denoiser, score"),
        ("process.name=uniform", "choose times"),
        ("training.batch_size=63", "even number of rows"),
        ("training.accumulation=3", "multiple of training.accumulation"),
        ("network.heads=3", "multiple of twice"),
        ("network.dropout=1.0", r"in \[0, 1\)"),
    ],
)
def test_mistakes(setting, message):
    with pytest.raises(UserError, match=message) as caught:
        configs.override(configs.default(), [setting])
    assert "\n" not in str(caught.value)


def test_config_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        configs.load_config(tmp_path / "absent.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match="get_config"):
        configs.load_config(tmp_path / "empty.py")


def test_json_round_trip():
    config = configs.override(configs.default(), ["training.steps=5"])
    assert configs.from_dict(json.loads(json.dumps(config.to_dict()))).to_dict() == config.to_dict()


def test_every_key_of_the_default_is_read():
    """No flag that nothing reads: each key's name stands in the package's code outside of the config itself."""
    package = Path(configs.__file__).parent
    code = "".join(file.read_text() for file in package.rglob("*.py"))
    for group, members in configs.default().items():
        for name in members:
            assert code.count(name) > 1, f"{group}.{name}"


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_experiments_build_and_trace(file):
    """Each builds, and the loss and gradient of one batch trace; its header has the lines that people look for."""
    config = configs.load_config(file)
    _, schedule, network = configs.build(config, config.data.vocab_size or 1280)
    training = config.training
    objective = Objective(network, schedule, training.batch_size, training.levels, training.min_time)
    params = jax.eval_shape(network.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((training.batch_size, config.data.block_length), jnp.int32)
    rows = jnp.arange(training.batch_size)
    jax.eval_shape(jax.grad(lambda p, t: objective(p, t, rows, jax.random.key(0)).sum()), params, tokens)
    header = file.read_text().split('"""')[1]
    assert all(word in header for word in ("Data", "Commands", "Hardware", "Result"))
