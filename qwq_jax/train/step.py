"""The jitted update: gradients over micro-batches, normalised once by the tokens of all of them, then the optimizer.

What is trained is `TrainState.params`. Parameters that are not, such as the model under LoRA's adapters, come beside it
as `frozen`: a loss receives both in one dict, and only the trained ones have gradients, moments and new values.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import optax

from qwq_jax.train.batch import TrainBatch
from qwq_jax.train.state import Params, TrainState

Sums = dict[str, jax.Array]  # over trained tokens; divided by their number when all micro-batches are in
Loss = Callable[[Params, TrainBatch], tuple[jax.Array, Sums]]  # micro-batch [B, T] -> sum of the loss, sums to report


class TrainStep(Protocol):
    """One update; see `make_train_step`."""

    def __call__(
        self, state: TrainState, batch: TrainBatch, frozen: Params | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """From a state to the next one, and what to report."""
        ...


class EvalStep(Protocol):
    """Losses without an update; see `make_eval_step`."""

    def __call__(self, params: Params, batch: TrainBatch, frozen: Params | None = None) -> tuple[jax.Array, jax.Array]:
        """The sum of the loss, and the trained tokens."""
        ...


def trained_tokens(batch: TrainBatch) -> jax.Array:
    """How many targets count, over all micro-batches and devices: float32, at least 1."""
    return jnp.maximum(jnp.sum(batch.loss_mask, dtype=jnp.int32), 1).astype(jnp.float32)


class Gradients(NamedTuple):
    """What a pass over a batch gives: gradients by parameter, the value of the loss, and the reported means."""

    params: Params
    value: jax.Array
    means: Sums


def with_frozen(loss: Loss, frozen: Params | None) -> Loss:
    """The loss as a function of the trained parameters alone; it still receives those of `frozen` too."""
    if frozen is None:
        return loss

    def of_trained(params: Params, batch: TrainBatch) -> tuple[jax.Array, Sums]:
        assert frozen.keys().isdisjoint(params), "a parameter is trained and frozen"
        return loss({**frozen, **params}, batch)

    return of_trained


def accumulate_gradients(
    loss: Loss, params: Params, batch: TrainBatch, *, denominator: jax.Array, frozen: Params | None = None
) -> Gradients:
    """Differentiates ``sum(loss) / denominator`` with respect to `params`, over the micro-batches of `batch`.

    The denominator is of the whole batch, not of each micro-batch: a mean of means would weigh tokens by the company
    they keep. Activations exist for one micro-batch at a time; sums are float32 whatever the parameters are.
    """
    loss = with_frozen(loss, frozen)

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
    """Builds ``step(state, batch [A, B, T], frozen=None) -> (state, metrics)``; `frozen` stays the caller's.

    `state` is donated: do not use it again. The new one lies as `shardings`, those of the old one, say; left to the
    compiler it might move, and compile again.
    Metrics: ``loss``, ``grad_norm`` (before clipping), ``tokens`` (trained), and the means of what `loss` reports.
    """

    def step(
        state: TrainState, batch: TrainBatch, frozen: Params | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        gradients = accumulate_gradients(loss, state.params, batch, denominator=denominator(batch), frozen=frozen)
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


def make_eval_step(loss: Loss) -> EvalStep:
    """Builds ``evaluate(params, batch [A, B, T], frozen=None) -> (sum of the loss, trained tokens)``."""

    def evaluate(params: Params, batch: TrainBatch, frozen: Params | None = None) -> tuple[jax.Array, jax.Array]:
        values = jax.lax.map(lambda micro: with_frozen(loss, frozen)(params, micro)[0], batch)
        return jnp.sum(values), jnp.sum(batch.loss_mask, dtype=jnp.int32)

    return jax.jit(evaluate)
