"""PPO's critic: the model's decoder with one output a token, the reward that it expects from there on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qwq_jax.config.lora import LoraConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.model.attention import causal_attend
from qwq_jax.model.params import bind
from qwq_jax.rl.learner import ForwardConfig, MicroLoss, Rows, Scorer, Updater, make_scorer, make_updater
from qwq_jax.rl.loss import LossTerms, value_loss
from qwq_jax.sharding import Layout
from qwq_jax.train.batch import TrainBatch
from qwq_jax.train.packing import Segment
from qwq_jax.train.state import Params, TrainState

VALUE_HEAD = "value_head.kernel"
"""`[D]` float32."""

UNUSED = "head.kernel"
"""The output projection, which a critic has no use for: never trained, and there for the model's sake."""


@dataclass(frozen=True)
class Critic:
    """The critic on the devices.

    Attributes:
        updater: Gradients and updates.
        score: Values at the trained tokens, before each is drawn.
        rows: How sequences become micro-batches.
        frozen: Parameters beside those that are trained.
    """

    updater: Updater
    score: Scorer
    rows: Rows
    frozen: Params

    def values(self, state: TrainState, segments: Sequence[Segment]) -> list[Any]:
        """What the critic expects, float32 `[n_i]` at the trained tokens of each sequence."""
        return self.score({**self.frozen, **state.params}, segments)

    def learn(self, state: TrainState, segments: Sequence[Segment]) -> tuple[TrainState, dict[str, float]]:
        """One update, on sequences with ``old_values``, ``returns`` and ``weights``. `state` is donated."""
        state, record = self.updater.update(state, self.rows.micro_batches(segments), self.frozen)
        renamed = {"loss": "value_loss", "grad_norm": "value_grad_norm"}
        return state, {renamed.get(name, name): value for name, value in record.items() if name != "tokens"}


def make_critic(
    model: ModelConfig,
    config: ForwardConfig,
    rows: Rows,
    optimizer: optax.GradientTransformation,
    *,
    target: TrainState,
    frozen: Params,
    lora: LoraConfig | None,
    clip: float,
) -> Critic:
    """The functions of a critic; `clip` is how far a value may move from that before the update."""

    def values(params: Params, batch: TrainBatch) -> jax.Array:
        return token_values(model, rows.layout, config, params, batch, lora=lora)

    def loss(params: Params, batch: TrainBatch) -> LossTerms:
        columns = batch.columns
        return value_loss(
            values(params, batch),
            old_values=columns["old_values"],
            returns=columns["returns"],
            weights=columns["weights"],
            mask=batch.loss_mask,
            clip=clip,
        )

    micro: MicroLoss = loss
    shardings = jax.tree.map(lambda x: x.sharding, target)
    return Critic(make_updater(micro, optimizer, shardings=shardings), make_scorer(values, rows), rows, frozen)


def token_values(
    model: ModelConfig,
    layout: Layout,
    config: ForwardConfig,
    params: Params,
    batch: TrainBatch,
    *,
    lora: LoraConfig | None = None,
) -> jax.Array:
    """The value before each target, float32 `[B, T]`: final hidden state times the value head."""
    decoder = {path: array for path, array in params.items() if path != VALUE_HEAD}
    bound = bind(model, decoder, dtype=config.compute_dtype, remat=config.remat, lora=lora)
    hidden, _ = bound(batch.tokens, batch.positions, causal_attend(batch.segment_ids, layout), layout=layout)
    return jnp.einsum("btd,d->bt", hidden.astype(jnp.float32), params[VALUE_HEAD].astype(jnp.float32))


def abstract_value_head(model: ModelConfig, layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
    """The head before it exists."""
    shape = (model.hidden_size,)
    return {VALUE_HEAD: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout.sharding((None,), shape))}


def value_head(model: ModelConfig, layout: Layout) -> Params:
    """A head that expects nothing yet."""
    described = abstract_value_head(model, layout)
    places = {path: array.sharding for path, array in described.items()}
    return jax.jit(lambda: {p: jnp.zeros(x.shape, x.dtype) for p, x in described.items()}, out_shardings=places)()


def split_decoder(params: Mapping[str, jax.Array]) -> tuple[Params, Params]:
    """The parameters of a model that a critic trains, and the one that it has no use for, if it has it."""
    used = {path: array for path, array in params.items() if path != UNUSED}
    return used, {path: array for path, array in params.items() if path == UNUSED}
