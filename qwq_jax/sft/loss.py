"""The loss of supervised fine-tuning: the negative log-probability of each trained token."""

from typing import Literal

import jax
import jax.numpy as jnp

from qwq_jax.config.lora import LoraConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.logprobs import token_logprobs
from qwq_jax.model.attention import causal_attend
from qwq_jax.model.params import bind
from qwq_jax.sharding import Layout
from qwq_jax.train.batch import TrainBatch
from qwq_jax.train.state import Params
from qwq_jax.train.step import Loss, Sums


def make_sft_loss(
    config: ModelConfig,
    layout: Layout,
    *,
    compute_dtype: Literal["float32", "bfloat16"],
    logprob_chunk: int,
    remat: bool = False,
    lora: LoraConfig | None = None,
) -> Loss:
    """Builds ``loss(params, batch [B, T]) -> (sum over trained tokens, {"entropy": sum})``.

    Logits exist for `logprob_chunk` positions of each row at a time, never for the batch; with `remat` the backward
    pass computes each layer's activations again. With `lora`, `params` holds its adapters beside the model.
    """

    def loss(params: Params, batch: TrainBatch) -> tuple[jax.Array, Sums]:
        model = bind(config, params, dtype=compute_dtype, remat=remat, lora=lora)
        attend = causal_attend(batch.segment_ids, layout)
        hidden, _ = model(batch.tokens, batch.positions, attend, layout=layout)
        rows, targets = layout.as_rows(hidden), layout.as_rows(batch.targets)
        logprob, entropy = token_logprobs(rows, model.head_matrix(), targets, chunk=logprob_chunk)
        mask = layout.as_rows(batch.loss_mask)
        return -jnp.sum(jnp.where(mask, logprob, 0.0)), {"entropy": jnp.sum(jnp.where(mask, entropy, 0.0))}

    return loss
