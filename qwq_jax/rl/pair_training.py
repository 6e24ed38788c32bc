"""Preference training on the devices: DPO's loss over packed rows, its reference, and held-out measures of pairs."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qwq_jax.checkpoint.directory import Directory
from qwq_jax.config.lora import LoraConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.objective import DpoConfig
from qwq_jax.rl.learner import ForwardConfig, forward
from qwq_jax.rl.loss import LossTerms
from qwq_jax.rl.preference import PairScores, count_pairs, dpo_loss, pair_totals
from qwq_jax.sharding import Layout
from qwq_jax.train.batch import TrainBatch
from qwq_jax.train.packing import PackedRows
from qwq_jax.train.state import Params
from qwq_jax.train.step import Loss, Sums, with_frozen

REFERENCE_COLUMN = "ref_logp"
REFERENCE_FILE = "reference_logprobs.bin"


def make_dpo_loss(
    model: ModelConfig,
    layout: Layout,
    config: ForwardConfig,
    *,
    objective: DpoConfig,
    lora: LoraConfig | None = None,
) -> Loss:
    """Builds ``loss(params, batch [B, T]) -> (sum over pairs, sums to report)``.

    The batch has the reference's log-probability of each trained token as its column ``ref_logp``. What is summed over
    a completion is the difference of each token's: two sums of thousands of tokens would lose it in float32.
    """
    run = forward(model, layout, config, lora)

    def loss(params: Params, batch: TrainBatch) -> tuple[jax.Array, Sums]:
        logp, _ = run(params, batch)
        log_ratios = logp - batch.columns[REFERENCE_COLUMN]
        moved = pair_totals(log_ratios, mask=batch.loss_mask, segment_ids=batch.segment_ids)
        zero = jnp.zeros_like(moved.chosen)
        return reported(dpo_loss(objective, policy=moved, reference=PairScores(zero, zero, moved.present)))

    return loss


def reported(terms: LossTerms) -> tuple[jax.Array, Sums]:
    """The value of a loss over pairs, and its sums but for their number, by which the step divides them itself."""
    return terms.value, {name: total for name, total in terms.sums.items() if name != "count"}


def pairs_of(batch: TrainBatch) -> jax.Array:
    """The denominator of a step: the pairs of all its micro-batches, float32, at least 1."""
    return count_pairs(batch.segment_ids)


def make_pair_evaluation(
    loss: Loss,
    batches: Sequence[PackedRows],
    *,
    place: Callable[[PackedRows], TrainBatch],
    frozen: Params | None,
) -> Callable[[Params], dict[str, float]]:
    """Builds ``evaluate(params) -> {"loss": ..., "accuracy": ..., ...}``, means over the pairs of the batches.

    Args:
        loss: Of a micro-batch.
        batches: Each with a pair at least.
        place: Makes micro-batches ``[A, B, T]`` of one.
        frozen: Parameters beside those that are trained.
    """

    def measure(params: Params, batch: TrainBatch, frozen: Params | None) -> dict[str, jax.Array]:
        values, sums = jax.lax.map(lambda micro: with_frozen(loss, frozen)(params, micro), batch)
        return {"pairs": pairs_of(batch), "loss": jnp.sum(values), **{name: jnp.sum(x) for name, x in sums.items()}}

    compiled = jax.jit(measure)

    def evaluate(params: Params) -> dict[str, float]:
        found = jax.device_get([compiled(params, place(batch), frozen) for batch in batches])
        totals = {name: np.sum([each[name] for each in found], dtype=np.float64) for name in found[0]}
        pairs = totals.pop("pairs")
        return {name: float(total / pairs) for name, total in totals.items()}

    return evaluate


def save_reference(directory: Directory, values: Sequence[np.ndarray], *, identity: str) -> None:
    """Writes the reference's log-probabilities, float32 ``[n_i]`` of each sequence, durably and at once."""
    directory.write(REFERENCE_FILE, identity.encode() + b"\n" + np.concatenate(values).astype("<f4").tobytes())


def load_reference(directory: Directory, lengths: Sequence[int], *, identity: str) -> list[np.ndarray] | None:
    """What `save_reference` wrote for the same identity, split by the `lengths`; None if there is nothing of it.

    Raises:
        ValueError: The file is damaged.
    """
    if REFERENCE_FILE not in directory.sizes():
        return None
    head, _, body = directory.read(REFERENCE_FILE).partition(b"\n")
    if head != identity.encode():
        return None
    if len(body) != 4 * sum(lengths):
        raise ValueError(f"{directory.path}/{REFERENCE_FILE} is damaged: delete it, and it is computed again")
    return np.split(np.frombuffer(body, "<f4"), np.cumsum(lengths)[:-1])
