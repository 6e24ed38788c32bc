"""Reward models: a decoder with one output a token, trained on preferences, and scoring replies of a policy.

The score of a conversation is the output at its last token, the one that ends the reply's turn. As a checkpoint a
reward model is like any other, with ``score.kernel`` `[D]` in place of the output head: ``export`` makes transformers'
``Qwen2ForSequenceClassification`` with one label of it, and ``convert`` reads those.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np

from qwq_jax.chat import ChatTokenizer
from qwq_jax.checkpoint.directory import explained
from qwq_jax.checkpoint.store import Checkpoint, open_checkpoint
from qwq_jax.config.frozen import Frozen
from qwq_jax.config.json_line import load_json_line
from qwq_jax.config.load import build
from qwq_jax.config.lora import LoraConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.preference import BradleyTerryConfig
from qwq_jax.config.rewards import RewardModelConfig
from qwq_jax.model.attention import causal_attend
from qwq_jax.model.params import bind
from qwq_jax.rl.learner import Rows, Scorer, make_scorer
from qwq_jax.rl.pair_training import reported
from qwq_jax.rl.preference import bradley_terry_loss, pair_totals
from qwq_jax.rl.preference_data import scored_segment
from qwq_jax.sharding import Layout
from qwq_jax.train.batch import TrainBatch
from qwq_jax.train.state import Params
from qwq_jax.train.step import Loss, Sums
from qwq_jax.train.weights import abstract_params, checkpoint_weights

HEAD = "score.kernel"
# The output head of a language model, which a reward model does without.
_TAKEN_OFF = "head.kernel"
# Beside the weights: how the model was trained to read.
READING_FILE = "reward_model.json"
# Of tokenizer.json, what does not change the tokens of a text.
_NO_TOKENS = {"version", "truncation", "padding"}


class _Reading(Frozen):
    thoughts: bool


def with_scalar_head(config: ModelConfig) -> ModelConfig:
    """The architecture of a reward model that grows from a language model, or goes on from a reward model."""
    return config.model_copy(update={"scalar_head": True})


def reward_weights(checkpoint: Checkpoint, *, dtype: Any, layout: Layout) -> Params:
    """Stacked parameters of a reward model; one that grows from a language model begins with a head of zeros.

    With it all first scores are 0, whatever the model knows, and every seed has the same beginning.
    """
    params = checkpoint_weights(checkpoint, dtype=dtype, layout=layout)
    if checkpoint.config.scalar_head:
        return params
    described = abstract_params(with_scalar_head(checkpoint.config), dtype=dtype, layout=layout)[HEAD]
    zeros = jax.jit(lambda: jnp.zeros(described.shape, described.dtype), out_shardings=described.sharding)
    return {name: array for name, array in params.items() if name != _TAKEN_OFF} | {HEAD: zeros()}


def make_values(
    model: ModelConfig,
    layout: Layout,
    *,
    compute_dtype: Literal["float32", "bfloat16"],
    remat: bool = False,
    lora: LoraConfig | None = None,
) -> Callable[[Params, TrainBatch], jax.Array]:
    """Builds ``(params, batch [B, T]) -> float32 [B, T]``: what the model says of the text up to each token."""

    def run(params: Params, batch: TrainBatch) -> jax.Array:
        bound = bind(model, params, dtype=compute_dtype, remat=remat, lora=lora)
        hidden, _ = bound(batch.tokens, batch.positions, causal_attend(batch.segment_ids, layout), layout=layout)
        return bound.scores(hidden)

    return run


def make_reward_loss(values: Callable[[Params, TrainBatch], jax.Array], objective: BradleyTerryConfig) -> Loss:
    """Builds ``loss(params, batch [B, T]) -> (sum over pairs, sums to report)`` of `reward_pair`'s sequences."""

    def loss(params: Params, batch: TrainBatch) -> tuple[jax.Array, Sums]:
        scores = pair_totals(values(params, batch), mask=batch.loss_mask, segment_ids=batch.segment_ids)
        margins = pair_totals(batch.columns["margin"], mask=batch.loss_mask, segment_ids=batch.segment_ids)
        return reported(bradley_terry_loss(scores, margin=margins.chosen, centring=objective.centring))

    return loss


def reading_file(objective: BradleyTerryConfig) -> dict[str, bytes]:
    """The file beside the weights that says what the model reads of a reply."""
    return {READING_FILE: (_Reading(thoughts=objective.thoughts).model_dump_json() + "\n").encode()}


@dataclass(frozen=True)
class RewardModelScorer:
    """A reward model on the devices, for a policy with the same tokenizer.

    Attributes:
        params: Stacked parameters.
        score: Compiled once, for rows of one shape.
        longest: Tokens of a row.
    """

    params: Params
    score: Scorer
    longest: int

    @classmethod
    def open(
        cls,
        config: RewardModelConfig,
        rows: Rows,
        *,
        policy: ChatTokenizer,
        compute_dtype: Literal["float32", "bfloat16"],
    ) -> Self:
        """Loads the model of a reward onto the layout of `rows`, in the type that it is computed in.

        Raises:
            ValueError: There is no reward model, or it has another tokenizer than the policy, reads replies otherwise
                than the reward says, or has too few positions.
        """
        checkpoint = open_checkpoint(config.checkpoint)
        _check_scores(checkpoint, config, policy)
        model = checkpoint.config
        if rows.row_length > model.max_context:
            raise ValueError(
                f"{config.checkpoint} has {model.max_context} positions, and conversations may take {rows.row_length}"
            )
        params = checkpoint_weights(checkpoint, dtype=compute_dtype, layout=rows.layout)
        values = make_values(model, rows.layout, compute_dtype=compute_dtype)
        return cls(params, make_scorer(values, rows), rows.row_length)

    def scores(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> np.ndarray:
        """Scores of pairs of prompt and reply, as token ids: float32 ``[N]``.

        A reply too long for a row, as an answer can be whose own tokens are more than were drawn, is read as far as it
        fits, and its last token.

        Raises:
            ValueError: A prompt does not fit a row with two tokens of a reply.
        """
        if not pairs:
            return np.zeros(0, np.float32)
        segments = []
        for prompt, reply in pairs:
            room = self.longest - len(prompt)
            if room < 2:
                raise ValueError(f"a prompt of {len(prompt)} tokens does not fit the {self.longest} of a row")
            segments.append(scored_segment(prompt, reply if len(reply) <= room else [*reply[: room - 1], reply[-1]]))
        return np.concatenate(self.score(self.params, segments)).astype(np.float32)


def _check_scores(checkpoint: Checkpoint, config: RewardModelConfig, policy: ChatTokenizer) -> None:
    """Raises a ValueError unless the checkpoint can score replies of this policy."""
    path = config.checkpoint
    if not checkpoint.config.scalar_head:
        raise ValueError(f"{path} is a language model, not a reward model: train one with qwq-jax reward-model")
    own = ChatTokenizer.from_directory(checkpoint.tokenizer_dir)
    different = "tokenizer" if _tokens(own) != _tokens(policy) else "chat template"
    if different == "tokenizer" or own.template != policy.template:
        raise ValueError(
            f"{path} has another {different} than the policy in {policy.directory}, whose tokens it is to read: take a "
            "reward model that was trained with the policy's"
        )
    if policy.vocab_size > checkpoint.config.vocab_size:
        raise ValueError(f"{path} has {checkpoint.config.vocab_size} tokens, and the tokenizer {policy.vocab_size}")
    if READING_FILE in checkpoint.manifest.files:
        reads = _read_reading(checkpoint).thoughts
        if reads is not config.thoughts:
            told = "with their thoughts" if reads else "without their thoughts"
            raise ValueError(f"{path} was trained on replies {told}: set thoughts = {str(reads).lower()}")


def _read_reading(checkpoint: Checkpoint) -> _Reading:
    where = f"{checkpoint.path}/{READING_FILE}"
    with explained(f"cannot read {where}"):
        raw = checkpoint.directory.read(READING_FILE)
    try:
        content = load_json_line(raw)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return build(_Reading, content, source=where)


def _tokens(tokenizer: ChatTokenizer) -> dict[str, Any]:
    """All that decides the tokens of a text."""
    content = json.loads(tokenizer.tokenizer.to_str())
    return {name: value for name, value in content.items() if name not in _NO_TOKENS}
