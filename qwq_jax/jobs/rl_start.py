"""How a run of reinforcement learning begins: weights, optimizer state, and the functions of the policy."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
from jax.experimental import multihost_utils

from qwq_jax.chat import ChatTokenizer
from qwq_jax.checkpoint.directory import explained, open_directory
from qwq_jax.checkpoint.store import MARKER, Checkpoint, open_checkpoint
from qwq_jax.checkpoint.train_store import TrainStore
from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.rewards import reward_name
from qwq_jax.config.rl import RlConfig
from qwq_jax.jobs.convert import convert
from qwq_jax.jobs.fine_tuning import HOSTS
from qwq_jax.model.lora import random_adapters
from qwq_jax.rl.critic import UNUSED, abstract_value_head, make_critic, split_decoder, value_head
from qwq_jax.rl.judging import ModelScorer
from qwq_jax.rl.learner import ForwardConfig, Rows, forward, make_policy_loss, make_scorer, make_sync, make_updater
from qwq_jax.rl.optimizers import Optimizers
from qwq_jax.rl.policy import Policy, RlState
from qwq_jax.rl.reward_model import RewardModelScorer
from qwq_jax.sharding import Layout, decode_layout, make_mesh, rearranged
from qwq_jax.train.metrics import METRICS
from qwq_jax.train.state import Params, abstract_state, init_state
from qwq_jax.train.weights import abstract_adapters, abstract_params, checkpoint_weights

LOG = logging.getLogger(__name__)

# Of these at least one is in the directory of a run that has begun.
OUTPUTS = {"initial", "checkpoints", "evaluations", METRICS, HOSTS}


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        config: The architecture.
        tokenizer_dir: A local directory.
        checkpoint: The weights of the policy at step 0.
    """

    config: ModelConfig
    tokenizer_dir: str
    checkpoint: Checkpoint


def open_start(config: RlConfig) -> Start:
    """Finds architecture, tokenizer and weights; a Hugging Face directory is converted into the output directory.

    Raises:
        ValueError: One of them cannot be read, or the output directory holds something else.
    """
    with explained(f"cannot write {config.output_dir}"):
        children = open_directory(config.output_dir).children()
    if children and children.isdisjoint(OUTPUTS):
        raise ValueError(f"{config.output_dir} holds something else; give an empty or new directory")
    location = config.model
    if MARKER not in open_directory(location).children():
        location = f"{config.output_dir}/initial"
        if jax.process_index() == 0:
            LOG.info("converting %s", config.model)
            convert(config.model, location)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("converted")
    checkpoint = open_checkpoint(location)
    if config.longest_sequence > checkpoint.config.max_context:
        raise ValueError(
            f"max_prompt_tokens + max_tokens = {config.longest_sequence} is beyond the "
            f"{checkpoint.config.max_context} positions of {config.model}"
        )
    return Start(checkpoint.config, config.tokenizer or checkpoint.tokenizer_dir, checkpoint)


def make_state(
    config: RlConfig, start: Start, layout: Layout, optimizers: Optimizers, *, store: TrainStore, step: int
) -> tuple[RlState, RlState]:
    """What is trained, new or as the checkpoint of `step` has it; and its description."""
    target = describe_state(config, start.config, layout, optimizers)
    if step:
        return store.restore(step, target), target
    policy = init_state(_initial(config, start, layout), optimizers.policy)
    if optimizers.critic is None:
        return RlState(policy), target
    params, _ = split_decoder(_initial(config, start, layout, critic=True))
    critic = init_state({**params, **value_head(start.config, layout)}, optimizers.critic)
    return RlState(policy, critic), target


def describe_state(config: RlConfig, model: ModelConfig, layout: Layout, optimizers: Optimizers) -> RlState:
    """What is trained before it exists: shapes, types and places."""
    described = (
        abstract_adapters(model, config.lora, layout=layout)
        if config.lora is not None
        else abstract_params(model, dtype=config.param_dtype, layout=layout)
    )
    policy = abstract_state(described, optimizers.policy)
    if optimizers.critic is None:
        return RlState(policy)
    used = {path: array for path, array in described.items() if path != UNUSED}
    return RlState(policy, abstract_state({**used, **abstract_value_head(model, layout)}, optimizers.critic))


def _initial(config: RlConfig, start: Start, layout: Layout, *, critic: bool = False) -> Params:
    """The trained parameters before the first step."""
    if config.lora is not None:
        key = jax.random.fold_in(jax.random.key(config.seed), 1) if critic else jax.random.key(config.seed)
        return random_adapters(start.config, config.lora, key, layout)
    return checkpoint_weights(start.checkpoint, dtype=config.param_dtype, layout=layout)


def make_policy(config: RlConfig, start: Start, layout: Layout, optimizers: Optimizers, *, target: RlState) -> Policy:
    """The functions of the policy on its mesh, and the weights that stay as they are."""
    policy = make_functions(config, start.config, (layout, engine_layout(config)), optimizers, target=target)
    fixed: Params | None = None
    if config.lora is not None or config.objective.uses_reference:
        # Under adapters the weights that stay are the reference too.
        fixed = checkpoint_weights(start.checkpoint, dtype=_compute_dtype(config), layout=layout)
    critic = None
    if optimizers.critic is not None:
        assert target.critic is not None and config.objective.value_clip is not None
        critic = make_critic(
            start.config,
            _forward_config(config),
            policy.rows,
            optimizers.critic,
            target=target.critic,
            frozen=_frozen_of_critic(config, start, layout, fixed),
            lora=config.lora,
            clip=config.objective.value_clip,
        )
    return replace(
        policy,
        frozen=fixed if config.lora is not None else None,
        reference=fixed if config.objective.uses_reference else None,
        critic=critic,
    )


def make_functions(
    config: RlConfig, model: ModelConfig, layouts: tuple[Layout, Layout], optimizers: Optimizers, *, target: RlState
) -> Policy:
    """The policy without any weights; the devices of `layouts`, TRAIN and DECODE, may be described ones."""
    layout, decode = layouts
    forwards = _forward_config(config)
    rows = Rows(
        row_length=config.row_length or config.rollout.max_prompt_tokens + config.rollout.max_tokens,
        rows_per_micro_batch=config.rows_per_micro_batch,
        layout=layout,
    )
    loss = make_policy_loss(model, layout, forwards, objective=config.objective, lora=config.lora)
    trained, plain = (forward(model, layout, forwards, lora) for lora in (config.lora, None))
    return Policy(
        updater=make_updater(loss, optimizers.policy, shardings=jax.tree.map(lambda x: x.sharding, target.policy)),
        rows=rows,
        score=make_scorer(lambda params, batch: trained(params, batch)[0], rows),
        score_reference=make_scorer(lambda params, batch: plain(params, batch)[0], rows),
        sync=make_sync(model, decode, dtype=_compute_dtype(config), lora=config.lora),
    )


def engine_layout(config: RlConfig, devices: Sequence[Any] | None = None) -> Layout:
    """Where the engine's weights lie; `devices` are all by default. Weights come from training in one program."""
    return decode_layout(rearranged(make_mesh(config.mesh, devices), config.decode_mesh or config.mesh))


def engine_settings(config: RlConfig) -> EngineConfig:
    """The engine of a run: in the type of the policy, with room for its longest sequence."""
    return config.engine.model_copy(
        update={
            "compute_dtype": _compute_dtype(config),
            "logprobs": "temperature",
            "max_context": config.engine.max_context or config.longest_sequence,
        }
    )


def _forward_config(config: RlConfig) -> ForwardConfig:
    return ForwardConfig(_compute_dtype(config), config.rollout.temperature, config.logprob_chunk, remat=config.remat)


def _compute_dtype(config: RlConfig) -> Literal["float32", "bfloat16"]:
    assert config.compute_dtype is not None, "the run decides it at its start"
    return config.compute_dtype


def _frozen_of_critic(config: RlConfig, start: Start, layout: Layout, fixed: Params | None) -> Params:
    """The weights under a critic's adapters; of one that trains all it uses, the output projection alone."""
    if config.lora is not None:
        assert fixed is not None
        return fixed
    if start.config.tie_word_embeddings:
        return {}
    weights = fixed or checkpoint_weights(start.checkpoint, dtype=config.param_dtype, layout=layout)
    return split_decoder(weights)[1]


def reward_scorers(config: RlConfig, tokenizer: ChatTokenizer, rows: Rows) -> dict[str, ModelScorer]:
    """The reward models of a run, by the names of their rewards.

    Raises:
        ValueError: One cannot score the replies of this policy.
    """
    assert config.compute_dtype is not None
    return {
        reward_name(reward): RewardModelScorer.open(reward, rows, policy=tokenizer, compute_dtype=config.compute_dtype)
        for reward in config.reward_models
    }
