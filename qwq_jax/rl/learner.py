"""The devices' side of learning: log-probabilities, gradients over micro-batches, updates, and weights for the engine.

Every micro-batch has one shape, so each function is compiled once; how many there are in an update is up to the
lengths of its completions.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qwq_jax.config.lora import LoraConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.objective import ObjectiveConfig
from qwq_jax.logprobs import token_logprobs
from qwq_jax.model.attention import causal_attend
from qwq_jax.model.lora import merge
from qwq_jax.model.params import bind, unstack
from qwq_jax.model.spec import model_spec, stacked_spec
from qwq_jax.rl.experience import RowPlan
from qwq_jax.rl.loss import LossTerms, policy_loss, policy_tokens, report
from qwq_jax.sharding import Layout, zigzag
from qwq_jax.train.batch import TrainBatch, place_rows
from qwq_jax.train.packing import PackedRows, Segment
from qwq_jax.train.state import Params, TrainState

MicroLoss = Callable[[Params, TrainBatch], LossTerms]
Scorer = Callable[[Params, Sequence[Segment]], list[np.ndarray]]
"""From all parameters and some sequences to float32 ``[n_i]``, a number for each of their trained tokens."""


@dataclass(frozen=True)
class ForwardConfig:
    """How the policy is computed in training.

    Attributes:
        compute_dtype: Of activations and the weights they meet.
        temperature: That of the rollout: divides the logits of every log-probability.
        logprob_chunk: Positions of a row whose logits exist at one time.
        remat: Whether the backward pass computes activations again.
    """

    compute_dtype: Literal["float32", "bfloat16"]
    temperature: float
    logprob_chunk: int
    remat: bool = True


def forward(
    model: ModelConfig, layout: Layout, config: ForwardConfig, lora: LoraConfig | None = None
) -> Callable[[Params, TrainBatch], tuple[jax.Array, jax.Array]]:
    """Builds ``(params, batch [B, T]) -> (log-probabilities, entropies)`` of the targets, float32 ``[B, T]``."""

    def run(params: Params, batch: TrainBatch) -> tuple[jax.Array, jax.Array]:
        bound = bind(model, params, dtype=config.compute_dtype, remat=config.remat, lora=lora)
        hidden, _ = bound(batch.tokens, batch.positions, causal_attend(batch.segment_ids, layout), layout=layout)
        found = token_logprobs(
            layout.as_rows(hidden),
            bound.head_matrix(),
            layout.as_rows(batch.targets),
            chunk=config.logprob_chunk,
            temperature=config.temperature,
        )
        logp, entropy = map(layout.from_rows, found)
        return logp, entropy

    return run


def make_policy_loss(
    model: ModelConfig,
    layout: Layout,
    config: ForwardConfig,
    *,
    objective: ObjectiveConfig,
    lora: LoraConfig | None = None,
) -> MicroLoss:
    """The loss of the policy over one micro-batch, of all its parameters."""
    run = forward(model, layout, config, lora)

    def loss(params: Params, batch: TrainBatch) -> LossTerms:
        logp, entropy = run(params, batch)
        return policy_loss(objective, logp=logp, entropy=entropy, tokens=policy_tokens(batch))

    return loss


class Total(NamedTuple):
    """Sums over the micro-batches of an update so far: gradients by parameter, and what is reported."""

    gradients: Params
    terms: LossTerms


@dataclass(frozen=True)
class Updater:
    """Gradients of micro-batches added up, and then one step of the optimizer.

    Attributes:
        zero: ``(state, batch, frozen) -> Total`` of no micro-batch.
        add: ``(Total, params, batch, frozen) -> Total``, which is donated.
        apply: ``(state, Total) -> (state, gradient norm)``; the state is donated.
    """

    zero: Callable[[TrainState, TrainBatch, Params | None], Total]
    add: Callable[[Total, Params, TrainBatch, Params | None], Total]
    apply: Callable[[TrainState, Total], tuple[TrainState, jax.Array]]

    def update(
        self, state: TrainState, batches: Iterable[TrainBatch], frozen: Params | None = None
    ) -> tuple[TrainState, dict[str, float]]:
        """One update. `state` is donated: do not use it again.

        Returns:
            The new state, and ``loss``, ``grad_norm`` (before clipping), ``tokens`` and what the loss reports.

        Raises:
            ValueError: The loss or its gradient is not a number any more.
        """
        total: Total | None = None
        for batch in batches:
            total = self.zero(state, batch, frozen) if total is None else total
            total = self.add(total, state.params, batch, frozen)
        assert total is not None, "an update of nothing"
        terms = total.terms
        state, norm = self.apply(state, total)
        value, sums, peaks, norm = jax.device_get((terms.value, terms.sums, terms.peaks, norm))
        if not np.isfinite(value + norm):
            raise ValueError(f"the loss is {value}, its gradient {norm}; try a lower optimizer.learning_rate")
        tokens = float(sums["count"])
        return state, {"loss": float(value), "grad_norm": float(norm), "tokens": tokens, **report(sums, peaks)}


def make_updater(loss: MicroLoss, optimizer: optax.GradientTransformation, *, shardings: TrainState) -> Updater:
    """Builds the functions of `Updater`; new states lie as `shardings`."""

    def zero(state: TrainState, batch: TrainBatch, frozen: Params | None) -> Total:
        described = jax.eval_shape(loss, {**(frozen or {}), **state.params}, batch)
        gradients = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.params)
        return Total(gradients, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), described))

    def add(total: Total, params: Params, batch: TrainBatch, frozen: Params | None) -> Total:
        def of_trained(trained: Params) -> tuple[jax.Array, LossTerms]:
            terms = loss({**(frozen or {}), **trained}, batch)
            return terms.value, terms

        gradients, terms = jax.grad(of_trained, has_aux=True)(params)
        added = jax.tree.map(lambda sum, x: sum + x.astype(jnp.float32), total.gradients, gradients)
        return Total(
            added,
            LossTerms(
                value=total.terms.value + terms.value,
                sums=jax.tree.map(jnp.add, total.terms.sums, terms.sums),
                peaks=jax.tree.map(jnp.maximum, total.terms.peaks, terms.peaks),
            ),
        )

    def apply(state: TrainState, total: Total) -> tuple[TrainState, jax.Array]:
        gradients = jax.tree.map(lambda x, param: x.astype(param.dtype), total.gradients, state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = cast(Params, optax.apply_updates(state.params, updates))
        return TrainState(params=params, opt_state=opt_state, step=state.step + 1), optax.tree.norm(gradients)

    places: Any = Total(shardings.params, None)  # pyright: ignore[reportArgumentType]
    return Updater(
        zero=jax.jit(zero, out_shardings=places),
        add=jax.jit(add, donate_argnums=0, out_shardings=places),
        apply=jax.jit(apply, donate_argnums=0, out_shardings=(shardings, None)),
    )


@dataclass(frozen=True)
class Rows:
    """How sequences become micro-batches on the devices.

    Attributes:
        row_length: Slots of a row.
        rows_per_micro_batch: Rows of each.
        layout: Of training.
    """

    row_length: int
    rows_per_micro_batch: int
    layout: Layout

    def plan(self, segments: Sequence[Segment]) -> RowPlan:
        """Where each sequence goes."""
        return RowPlan.of(segments, row_length=self.row_length, rows_per_micro_batch=self.rows_per_micro_batch)

    def place(self, packed: PackedRows) -> TrainBatch:
        """One micro-batch ``[B, T]`` on the devices."""
        return place_rows(packed, self.layout)

    def micro_batches(self, segments: Sequence[Segment]) -> Iterable[TrainBatch]:
        """All micro-batches of some sequences, one after the other."""
        return map(self.place, self.plan(segments).micro_batches(segments))


@dataclass(frozen=True)
class RowScorer:
    """A `Scorer` that packs its sequences into rows.

    Attributes:
        program: Jitted ``(params, batch [B, T]) -> [B, T]``, the result whole on every device.
        rows: How sequences become micro-batches.
    """

    program: Any
    rows: Rows

    def __call__(self, params: Params, segments: Sequence[Segment]) -> list[np.ndarray]:
        """Numbers for the trained tokens of each sequence, in order."""
        plan = self.rows.plan(segments)
        arrays = [self.program(params, self.rows.place(packed)) for packed in plan.micro_batches(segments)]
        found = map(np.asarray, arrays)
        if (parts := self.rows.layout.size("tokens")) > 1:
            # Back from the order in which devices share the tokens of a row.
            places = np.argsort(zigzag(self.rows.row_length, parts))
            found = (array[:, places] for array in found)
        return plan.unpack(segments, found)


def make_scorer(run: Callable[[Params, TrainBatch], Any], rows: Rows) -> RowScorer:
    """Builds a scorer from ``run(params, batch) -> [B, T]``."""
    replicated = rows.layout.sharding((None, None))
    # Whole everywhere, so that every process can read it.
    return RowScorer(jax.jit(run, out_shardings=replicated), rows)


def make_sync(model: ModelConfig, layout: Layout, *, dtype: Any, lora: LoraConfig | None = None) -> Any:
    """Builds the jitted ``(params, frozen) -> params of an engine``.

    Adapters are merged, and there is one array a layer, on the DECODE layout. Layers are moved while they are still one
    array: an exchange a layer would be so many programs for the compiler, and small ones for the network.
    """
    spec = model_spec(model, dtype)
    places = {path: layout.sharding(array.axes, array.shape) for path, array in spec.items()}

    def arrange(params: Params, frozen: Params | None) -> Params:
        if lora is not None:
            assert frozen is not None
            params = merge(frozen, params, lora)
        params = {
            path: jax.lax.with_sharding_constraint(
                params[path].astype(array.dtype), layout.sharding(array.axes, array.shape)
            )
            for path, array in stacked_spec(spec, model.num_layers).items()
        }
        return unstack(params, model.num_layers)

    return jax.jit(arrange, out_shardings=places)


def means(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of several updates: means, of ``max_...`` the largest, of ``tokens`` the sum."""
    found = {name: float(np.mean([record[name] for record in records])) for name in records[0]}
    peaks = {name: max(record[name] for record in records) for name in found if name.startswith("max_")}
    sums = {name: sum(record[name] for record in records) for name in found if name == "tokens"}
    return found | peaks | sums
