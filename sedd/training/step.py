"""The training state, and the one sharded step."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from sedd import parallel
from sedd.data.batches import Batch
from sedd.diffusion import keyed_random
from sedd.training.objective import Objective
from sedd.training.optimizer import learning_rate


@flax.struct.dataclass
class TrainState:
    """All that training changes. ema: the average of the parameters, or None."""

    step: jax.Array
    params: dict
    ema: dict | None
    optimizer: optax.OptState

    @property
    def eval_params(self) -> dict:
        """The parameters to evaluate and sample with."""
        return self.params if self.ema is None else self.ema


def init_state(
    config: ConfigDict, objective: Objective, optimizer: optax.GradientTransformation, params: dict | None = None
) -> TrainState:
    """The state before the first step, a pure function to be jitted with its shardings; from fresh parameters, or
    from those told."""
    params = objective.network.init(keyed_random.root_key(config.training.seed)) if params is None else params
    ema = jax.tree.map(jnp.copy, params) if config.training.ema_decay else None
    return TrainState(jnp.int32(0), params, ema, optimizer.init(params))


def make_step(
    config: ConfigDict, objective: Objective, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[Callable[..., TrainState], Callable[[TrainState, Batch], tuple[TrainState, dict]], TrainState]:
    """The jitted functions that make the state and that take a step, and the state's shardings.

    The first takes the parameters to start from, or nothing. The step takes the state, which is donated, and the whole
    batch; it returns the new state and the metrics: loss (nats per token that is scored), gradient_norm (of the loss
    summed over positions, averaged over rows), learning_rate, tokens (that count), and `parts`: loss and noise of each
    row, Float[B], and the norm of each gradient by its path. Where loss or gradient_norm are not finite nothing
    changes but the step.
    """
    training = config.training
    rate = learning_rate(config.optimizer, config.optimizer.learning_rate, training.steps)

    def loss_and_gradient(params, batch, key):
        def of_rows(params, batch, rows):
            loss = objective(params, batch.tokens, rows, key, batch.lengths)
            return jnp.sum(loss) / training.batch_size, loss

        def add(total, microbatch):
            (loss, of_each), gradient = jax.value_and_grad(of_rows, has_aux=True)(params, *microbatch)
            return jax.tree.map(jnp.add, total, (loss, gradient)), of_each

        whole = (batch, jnp.arange(training.batch_size))
        if training.accumulation == 1:
            (loss, of_each), gradient = jax.value_and_grad(of_rows, has_aux=True)(params, *whole)
            return loss, gradient, of_each
        parts = jax.tree.map(lambda array: array.reshape(training.accumulation, -1, *array.shape[1:]), whole)
        parts = jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, P(None, ("data", "fsdp"))))
        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        (loss, gradient), of_each = jax.lax.scan(add, zero, parts)
        return loss, gradient, of_each.reshape(-1)

    def step(state, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # the network lays out what it computes
            return advanced(state, batch)

    def advanced(state, batch):
        key = keyed_random.fold(keyed_random.root_key(training.seed), state.step)
        loss, gradient, of_each = loss_and_gradient(state.params, batch, key)
        updates, moments = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = None if state.ema is None else update_ema(state.ema, params, state.step + 1, training.ema_decay)
        metrics = {
            "loss": loss / _scored_per_row(objective, batch, key),
            "gradient_norm": optax.tree.norm(gradient),
            "learning_rate": rate(state.step),
            "tokens": batch.tokens.size if batch.lengths is None else jnp.sum(batch.lengths),
            "parts": {
                "rows": of_each,
                "sigma": objective.sigma(jnp.arange(training.batch_size), key, batch.tokens.shape[1], batch.lengths),
                "gradients": jax.tree.map(jnp.linalg.norm, parallel.named(gradient)),
            },
        }
        finite = jnp.isfinite(loss) & jnp.isfinite(metrics["gradient_norm"])
        old, new = (state.params, state.ema, state.optimizer), (params, ema, moments)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
        return TrainState(state.step + 1, *kept), metrics

    def init(params=None):
        return init_state(config, objective, optimizer, params)

    where = parallel.shardings(mesh, jax.eval_shape(init))
    whole = NamedSharding(mesh, P())
    init = jax.jit(init, out_shardings=where)
    step = jax.jit(
        step, donate_argnums=0, in_shardings=(where, parallel.batch_sharding(mesh)), out_shardings=(where, whole)
    )
    return init, step, where


def _scored_per_row(objective: Objective, batch: Batch, key: jax.Array) -> jax.Array | int:
    """How many tokens of a row are scored, on average over the batch: those that count and are not given."""
    rows, length = batch.tokens.shape
    free, _ = objective.free_and_given(jnp.arange(rows), key, length, batch.lengths)
    return length if free is None else jnp.mean(jnp.sum(free, axis=-1), dtype=jnp.float32)


def update_ema(ema: dict, params: dict, updates: jax.Array, decay: float) -> dict:
    """The exponential average after so many updates, with the reference's warm-up: min(decay, (1 + n) / (10 + n))."""
    decay = jnp.minimum(decay, (1 + updates) / (10 + updates))
    return jax.tree.map(lambda old, new: old - (1 - decay) * (old - new), ema, params)
