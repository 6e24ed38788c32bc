"""The jitted update: gradients over micro-batches, normalised once by the tokens of all of them, then the optimizer."""

from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from qwq_jax.train.batch import TrainBatch
from qwq_jax.train.state import Params, TrainState

Sums = dict[str, jax.Array]  # over trained tokens; divided by their number when all micro-batches are in
Loss = Callable[[Params, TrainBatch], tuple[jax.Array, Sums]]  # micro-batch [B, T] -> sum of the loss, sums to report
TrainStep = Callable[[TrainState, TrainBatch], tuple[TrainState, dict[str, jax.Array]]]


def trained_tokens(batch: TrainBatch) -> jax.Array:
    """How many targets count, over all micro-batches and devices: float32, at least 1."""
    return jnp.maximum(jnp.sum(batch.loss_mask, dtype=jnp.int32), 1).astype(jnp.float32)


class Gradients(NamedTuple):
    """What a pass over a batch gives: gradients by parameter, the value of the loss, and the reported means."""

    params: Params
    value: jax.Array
    means: Sums


def accumulate_gradients(loss: Loss, params: Params, batch: TrainBatch, *, denominator: jax.Array) -> Gradients:
    """Differentiates ``sum(loss) / denominator`` over the micro-batches of `batch`.

    The denominator is of the whole batch, not of each micro-batch: a mean of means would weigh tokens by the company
    they keep. Activations exist for one micro-batch at a time; sums are float32 whatever the parameters are.
    """

    def sums_of(micro: TrainBatch) -> Gradients:
        (value, sums), grads = jax.value_and_grad(loss, has_aux=True)(params, micro)
        return jax.tree.map(lambda x: x.astype(jnp.float32), Gradients(grads, value, sums))

    first = jax.tree.map(lambda x: x[0], batch)
    total = sums_of(first)
    if batch.tokens.shape[0] > 1:
        rest = jax.tree.map(lambda x: x[1:], batch)
        total, _ = jax.lax.scan(lambda total, micro: (jax.tree.map(jnp.add, total, sums_of(micro)), None), total, rest)
    return jax.tree.map(lambda x: x / denominator, total)


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    shardings: TrainState,
    denominator: Callable[[TrainBatch], jax.Array] = trained_tokens,
) -> TrainStep:
    """Builds ``step(state, batch [A, B, T]) -> (state, metrics)``; `state` is donated: do not use it again.

    The new state lies as `shardings`, those of the old one, say; left to the compiler it might move, and compile again.
    Metrics: ``loss``, ``grad_norm`` (before clipping), ``tokens`` (trained), and the means of what `loss` reports.
    """

    def step(state: TrainState, batch: TrainBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        gradients = accumulate_gradients(loss, state.params, batch, denominator=denominator(batch))
        grads = jax.tree.map(lambda grad, param: grad.astype(param.dtype), gradients.params, state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = cast(Params, optax.apply_updates(state.params, updates))
        metrics = {
            "loss": gradients.value,
            "grad_norm": optax.tree.norm(grads),
            "tokens": jnp.sum(batch.loss_mask, dtype=jnp.int32),
            **gradients.means,
        }
        return TrainState(params=params, opt_state=opt_state, step=state.step + 1), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_eval_step(loss: Loss) -> Callable[[Params, TrainBatch], tuple[jax.Array, jax.Array]]:
    """Builds ``evaluate(params, batch [A, B, T]) -> (sum of the loss, trained tokens)``."""

    def evaluate(params: Params, batch: TrainBatch) -> tuple[jax.Array, jax.Array]:
        values = jax.lax.map(lambda micro: loss(params, micro)[0], batch)
        return jnp.sum(values), jnp.sum(batch.loss_mask, dtype=jnp.int32)

    return jax.jit(evaluate)
