"""Fits a tiny model to pairs, without files: the loop of the job in a few lines."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.train import OptimizerConfig
from qwq_jax.rl.pair_training import pairs_of
from qwq_jax.rl.preference_data import PairOfSegments
from qwq_jax.sharding import Layout, make_mesh, train_layout
from qwq_jax.train.batch import place_batch
from qwq_jax.train.optimizer import make_optimizer, make_schedule
from qwq_jax.train.state import Params, init_state
from qwq_jax.train.step import Loss, make_train_step
from qwq_jax.train.stream import one_pass

# One layer, which compiles in half the time of two.
SMALL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=64,
    rope_theta=10_000.0,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    max_position_embeddings=128,
)


def one_device() -> Layout:
    return train_layout(make_mesh(MeshConfig()))


def fit(
    loss: Loss,
    params: Params,
    pairs: Sequence[PairOfSegments],
    *,
    steps: int,
    rows: tuple[int, int],
    learning_rate: float,
) -> tuple[Params, list[float]]:
    """The parameters after some steps of ``(rows, row_length)``, pass after pass in one order, and the losses."""
    rows_per_step, row_length = rows
    config = OptimizerConfig(learning_rate=learning_rate, final_lr_ratio=0.02, warmup_steps=5)
    optimizer = make_optimizer(config, schedule=make_schedule(config, steps=steps))
    placed = {name: jax.device_put(jnp.copy(x), one_device().sharding((None,) * x.ndim)) for name, x in params.items()}
    state = init_state(placed, optimizer)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(loss, optimizer, shardings=shardings, denominator=pairs_of)
    packed = one_pass(pairs, row_length=row_length, rows_per_batch=rows_per_step)
    batches = [place_batch(rows, accumulation=1, layout=one_device()) for rows in packed]
    losses = []
    for i in range(steps):
        state, metrics = step(state, batches[i % len(batches)])
        losses.append(metrics["loss"])
    return state.params, [float(value) for value in losses]
