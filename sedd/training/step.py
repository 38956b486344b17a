"""The training state and the sharded training step."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from sedd.data.batches import Batch
from sedd.diffusion import keyed_random
from sedd.runtime import parallel, trees
from sedd.training.objective import Losses, Objective
from sedd.training.optimizer import learning_rate


@flax.struct.dataclass
class TrainState:
    """The state that a step updates. ema: the moving average of the parameters, or None."""

    step: jax.Array
    params: dict
    ema: dict | None
    optimizer: optax.OptState

    @property
    def eval_params(self) -> dict:
        """The parameters for evaluation and sampling: the EMA, if there is one."""
        return self.params if self.ema is None else self.ema


def init_state(
    config: ConfigDict, objective: Objective, optimizer: optax.GradientTransformation, params: dict | None = None
) -> TrainState:
    """Returns the state before the first step, from `params` or initial parameters. A pure function, to be jitted."""
    params = objective.init(keyed_random.root_key(config.training.seed)) if params is None else params
    ema = jax.tree.map(jnp.copy, params) if config.training.ema_decay else None
    return TrainState(jnp.int32(0), params, ema, optimizer.init(params))


def make_step(
    config: ConfigDict, objective: Objective, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[Callable[..., TrainState], Callable[[TrainState, Batch, dict], tuple[TrainState, dict]], TrainState]:
    """Returns the jitted functions `init` and `step`, and the shardings of the state.

    init takes the initial parameters, or nothing. step takes the state, which is donated, the global batch, and the
    parameters that nothing trains (as of `Trained.frozen`); it returns the new state and the metrics: loss and terms
    (nats per scored token), gradient_norm (of the loss summed over positions, averaged over rows), learning_rate,
    tokens (valid ones), losses (`Losses` of each row) and gradients (the norm of each by its path). If loss or
    gradient_norm is not finite, only the step number changes.
    """
    training = config.training
    rate = learning_rate(config.optimizer, config.optimizer.learning_rate, training.steps)

    def init(params=None):
        return init_state(config, objective, optimizer, params)

    def step(state, batch, frozen):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for the sharding constraints of the network
            key = keyed_random.fold(keyed_random.root_key(training.seed), state.step)
            loss, losses, gradient = _loss_and_gradient(objective, training, mesh, state.params, frozen, batch, key)
            metrics = _metrics(loss, losses, gradient, batch) | {"learning_rate": rate(state.step)}
            finite = jnp.isfinite(loss) & jnp.isfinite(metrics["gradient_norm"])
            return _updated(state, gradient, optimizer, training.ema_decay, finite), metrics

    shardings = parallel.shardings(mesh, jax.eval_shape(init))
    whole = NamedSharding(mesh, P())
    in_shardings, out_shardings = (shardings, parallel.batch_sharding(mesh), whole), (shardings, whole)
    jitted_step = jax.jit(step, donate_argnums=0, in_shardings=in_shardings, out_shardings=out_shardings)
    return jax.jit(init, out_shardings=shardings), jitted_step, shardings


def _loss_and_gradient(objective, training, mesh, params, frozen, batch, key) -> tuple[jax.Array, Losses, dict]:
    """The loss, its mean over the rows; the losses of each row; and the gradient, summed over the microbatches."""

    def mean_loss(params, batch, rows):
        losses = objective(trees.merged(params, frozen), batch, rows, key)
        return jnp.sum(losses.loss) / training.batch_size, losses

    def add(total, microbatch):
        (loss, losses), gradient = jax.value_and_grad(mean_loss, has_aux=True)(params, *microbatch)
        return jax.tree.map(jnp.add, total, (loss, gradient)), losses

    rows = (batch, jnp.arange(training.batch_size))
    if training.accumulation == 1:
        (loss, losses), gradient = jax.value_and_grad(mean_loss, has_aux=True)(params, *rows)
        return loss, losses, gradient
    microbatches = jax.tree.map(lambda array: array.reshape(training.accumulation, -1, *array.shape[1:]), rows)
    microbatches = jax.lax.with_sharding_constraint(microbatches, NamedSharding(mesh, P(None, parallel.BATCH_AXES)))
    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    (loss, gradient), losses = jax.lax.scan(add, zero, microbatches)
    return loss, jax.tree.map(lambda rows: rows.reshape(-1), losses), gradient


def _metrics(loss: jax.Array, losses: Losses, gradient: dict, batch: Batch) -> dict:
    """The metrics of a step, but for its learning rate."""
    count = jnp.mean(losses.count, dtype=jnp.float32)  # scored tokens of a row
    return {
        "loss": loss / count,
        "terms": {name: jnp.mean(term) / count for name, term in losses.terms.items()},
        "gradient_norm": optax.tree.norm(gradient),
        "tokens": batch.tokens.size if batch.lengths is None else jnp.sum(batch.lengths),
        "losses": losses,
        "gradients": jax.tree.map(jnp.linalg.norm, trees.named(gradient)),
    }


def _updated(state: TrainState, gradient: dict, optimizer, ema_decay: float, finite: jax.Array) -> TrainState:
    """The state after a step; unless `finite`, with the step number alone changed."""

    def update(params, ema, moments):
        updates, moments = optimizer.update(gradient, moments, params)
        params = optax.apply_updates(params, updates)
        ema = None if ema is None else update_ema(ema, params, state.step + 1, ema_decay)
        return params, ema, moments

    # A choice between the arrays would need the old ones to the end: a copy of each on CPUs, and twice the passes.
    kept = (state.params, state.ema, state.optimizer)
    return TrainState(state.step + 1, *jax.lax.cond(finite, update, lambda *kept: kept, *kept))


def update_ema(ema: dict, params: dict, updates: jax.Array, decay: float) -> dict:
    """Returns the EMA after update n = `updates`, with the reference's warmup: decay min(decay, (1 + n) / (10 + n))."""
    warm = jnp.minimum(decay, (1 + updates) / (10 + updates))
    return jax.tree.map(lambda old, new: old - (1 - warm) * (old - new), ema, params)
