"""The step, the guard and the metrics with an objective that is not the score entropy: they know only its interface."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import small_config, small_corpus

from sedd.data.batches import Batch
from sedd.runtime import parallel
from sedd.training.guard import NONFINITE, NonFiniteGuard
from sedd.training.metrics import Metrics
from sedd.training.objective import Losses
from sedd.training.optimizer import make_optimizer
from sedd.training.step import make_step

ROWS, LENGTH = 8, 4


@dataclasses.dataclass(frozen=True)
class Mean:
    """The squared distance of a parameter from the tokens of each row, and a penalty on the parameter."""

    network = None

    def init(self, key):
        return {"mean": jnp.zeros(LENGTH)}

    def __call__(self, params, batch, rows, key):
        distance = jnp.sum((batch.tokens - params["mean"]) ** 2, axis=-1)
        penalty = jnp.full(len(rows), 0.5 * jnp.sum(params["mean"] ** 2))
        count, sigma = jnp.full(len(rows), LENGTH), jnp.log1p(rows.astype(jnp.float32))
        return Losses(distance + penalty, count, sigma, {"distance": distance, "penalty": penalty})

    def head_positions(self, rows, length):
        return rows * length


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("small"))


def trained(corpus, accumulation, tokens, steps):
    """The last state and the metrics of each step."""
    settings = ("optimizer.name=adamw", "optimizer.learning_rate=0.1", "optimizer.decay=constant")
    config = small_config(corpus, *settings, f"training.accumulation={accumulation}", f"training.steps={steps}")
    mesh = parallel.make_mesh(config, jax.devices()[:1])
    init, step, _ = make_step(config, Mean(), make_optimizer(config.optimizer, steps), mesh)
    state, records = init(), []
    for _ in range(steps):
        state, metrics = step(state, Batch(tokens, None), {})
        records.append(jax.device_get(metrics))
    return jax.device_get(state), records


def test_step_minimises_any_objective_and_reports_its_terms(corpus):
    """The minimum is known; accumulation gives the same numbers. Control: the mean without the penalty is another."""
    tokens = np.tile(np.arange(1, LENGTH + 1, dtype=np.int32) * 3, (ROWS, 1))
    state, records = trained(corpus, 1, tokens, 300)
    np.testing.assert_allclose(state.params["mean"], tokens[0] / 1.5, atol=0.05)
    assert np.abs(state.params["mean"] - tokens[0]).min() > 0.5
    first = records[0]
    np.testing.assert_allclose(first["loss"], np.sum(tokens[0] ** 2) / LENGTH)
    np.testing.assert_allclose(first["terms"]["distance"] + first["terms"]["penalty"], first["loss"])
    np.testing.assert_allclose(records[-1]["terms"]["penalty"], np.sum(state.params["mean"] ** 2) / 8, rtol=1e-2)
    assert list(first["gradients"]) == ["mean"] and first["tokens"] == ROWS * LENGTH
    _, accumulated = trained(corpus, 4, tokens, 3)
    for one, other in zip(records, accumulated):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, other)


def test_terms_and_nonfinite_rows_are_recorded(corpus, tmp_path):
    """The terms in metrics.jsonl; the rows whose loss is not finite, with their noise, in nonfinite.jsonl."""
    tokens = np.ones((ROWS, LENGTH), np.float32)
    tokens[5] = np.nan
    _, (good,) = trained(corpus, 1, np.ones((ROWS, LENGTH), np.float32), 1)
    state, (bad,) = trained(corpus, 1, tokens, 1)
    assert state.step == 1 and np.all(state.params["mean"] == 0)
    with Metrics(tmp_path, 0, 2, NonFiniteGuard(1, tmp_path)) as log:
        log.record(1, good)
        log.record(2, bad)
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["distance"] == first["loss"] == 1 and first["penalty"] == 0 and second["skipped"]
    (record,) = map(json.loads, (tmp_path / NONFINITE).read_text().splitlines())
    (row,) = record["rows"]
    assert row["example"] == ROWS + 5 and row["loss"] == "nan"
    np.testing.assert_allclose(row["sigma"], np.log(6), rtol=1e-6)
