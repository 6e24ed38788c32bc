"""Tunix's Dr.GRPO learner in a race of `tools.bench_rl`, which starts it: its own Qwen2 and sampler, on the CPU.

    /path/to/venv/bin/python -m tools.rl_peer_tunix --race race.json --record tunix.jsonl

The environment needs ``pip install google-tunix jax``, not qwq_jax. Settings: Dr.GRPO (advantages not divided by the
deviation, the loss by the longest completion), ``beta=0`` and so no reference model, one update a batch, float32, no
recomputation of activations, actor and rollout on one mesh of one device, one call of the sampler for all completions
of a step, and a cache no longer than a longest prompt with a longest completion. The sampler takes its noise from a
seed that never changes unless somebody changes it, so each step is given one.
"""

# pyright: reportMissingImports=false

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from transformers import AutoTokenizer
from tunix.models.qwen2.model import ModelConfig, Qwen2
from tunix.models.qwen2.params import create_model_from_safe_tensors
from tunix.rl.grpo.drgrpo_learner import DrGRPOConfig, DrGRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, Mode, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig, RolloutOutput

from tools.rl_race import Descent, Race, Record, check_prompts, peer_arguments

PACKAGES = ("google-tunix", "jax", "flax", "optax", "transformers")


def load(race: Race, mesh: jax.sharding.Mesh) -> Qwen2:
    """The model of the race, float32, in tunix's own class."""
    found = json.loads((Path(race.model) / "config.json").read_text())
    config = ModelConfig(
        num_layers=found["num_hidden_layers"],
        vocab_size=found["vocab_size"],
        embed_dim=found["hidden_size"],
        hidden_dim=found["intermediate_size"],
        num_heads=found["num_attention_heads"],
        head_dim=found["hidden_size"] // found["num_attention_heads"],
        num_kv_heads=found["num_key_value_heads"],
        rope_theta=int(found["rope_theta"]),
        norm_eps=found["rms_norm_eps"],
        use_tied_embedding=found["tie_word_embeddings"],
    )
    return create_model_from_safe_tensors(race.model, config, mesh, dtype=jnp.float32)


def optimizer(descent: Descent) -> optax.GradientTransformation:
    """The optimizer of the race."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if descent.warmup_steps else descent.learning_rate,
        peak_value=descent.learning_rate,
        warmup_steps=descent.warmup_steps,
        decay_steps=descent.steps,
        end_value=descent.learning_rate * descent.final_lr_ratio,
    )
    return optax.chain(
        optax.clip_by_global_norm(descent.clip_norm),
        optax.adamw(schedule, b1=descent.b1, b2=descent.b2, eps=descent.eps, weight_decay=descent.weight_decay),
    )


def rollout_configs(race: Race) -> dict[Mode, RolloutConfig]:
    """How completions are drawn to train on, and greedily to evaluate."""
    end = json.loads((Path(race.model) / "config.json").read_text())["eos_token_id"]
    shared: dict[str, Any] = {
        "max_tokens_to_generate": race.max_tokens,
        "max_prompt_length": race.max_prompt_tokens,
        "kv_cache_size": race.max_prompt_tokens + race.max_tokens,
        "eos_tokens": end if isinstance(end, list) else [end],
    }
    return {
        Mode.TRAIN: RolloutConfig(temperature=race.temperature, top_p=1.0, top_k=None, **shared),
        Mode.EVAL: RolloutConfig(temperature=0.0, top_p=None, top_k=None, **shared),
    }


def make_cluster(race: Race, rollout: dict[Mode, RolloutConfig], tokenizer: Any, micro_batch: int) -> RLCluster:
    """Actor and sampler on one device."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    training = RLTrainingConfig(
        actor_optimizer=optimizer(race.descent),
        eval_every_n_steps=race.descent.steps + 1,  # its own evaluation is that of the loss
        max_steps=race.descent.steps,
        mini_batch_size=race.prompts_per_step,
        train_micro_batch_size=micro_batch // race.group_size,
        rollout_micro_batch_size=race.prompts_per_step,
        compute_logps_micro_batch_size=race.prompts_per_step,
    )
    config = ClusterConfig(
        role_to_mesh={Role.ACTOR: mesh, Role.ROLLOUT: mesh, Role.REFERENCE: mesh},
        rollout_engine="vanilla",
        training_config=training,
        rollout_config=rollout,
    )
    return RLCluster(actor=load(race, mesh), reference=None, tokenizer=tokenizer, cluster_config=config)


def batches(race: Race, record: Record, cluster: RLCluster, train: RolloutConfig) -> Iterator[dict[str, np.ndarray]]:
    """The prompts of each step. The next are asked for when a step is over and the sampler has the new weights."""

    def answers() -> list[str]:
        return cluster.generate([question.text for question in race.held_out], mode=Mode.EVAL).text

    for begin in range(0, len(race.prompts), race.prompts_per_step):
        if begin == 0:
            record.start(answers)
        else:
            record.end_step(answers)
        train.seed = jax.random.key_data(jax.random.fold_in(jax.random.key(race.seed), begin))
        asked = race.prompts[begin : begin + race.prompts_per_step]
        yield {"prompts": np.array([each.text for each in asked]), "answer": np.array([each.answer for each in asked])}
    record.end_step(answers)


def count_tokens(cluster: RLCluster, end: int) -> list[int]:
    """A list that holds how many tokens each completion to train on has, those of the sampler's last call."""
    lengths: list[int] = []
    generate = cluster.generate

    def counted(*given: Any, mode: Mode = Mode.TRAIN, **named: Any) -> RolloutOutput:
        output = generate(*given, mode=mode, **named)
        if mode is Mode.TRAIN:
            # The token that ends a completion is drawn, but not among them.
            lengths[:] = [min(len(tokens) + 1, end) for tokens in output.tokens]
        return output

    cluster.generate = counted
    return lengths


def main() -> None:
    """Trains until the last step, or until it is stopped."""
    options = peer_arguments(__doc__, micro_batch=64)
    race = Race.read(options.race)
    if race.clip_low != race.clip_high:
        raise SystemExit(f"tunix's Dr.GRPO clips both sides alike, not by {race.clip_low} and {race.clip_high}")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    record = Record(race, options.record, PACKAGES)
    tokenizer = AutoTokenizer.from_pretrained(race.model)
    asked = [*race.prompts, *race.held_out]
    check_prompts(asked, [tokenizer.encode(question.text) for question in asked])
    rollout = rollout_configs(race)
    cluster = make_cluster(race, rollout, tokenizer, options.micro_batch)
    lengths = count_tokens(cluster, race.max_tokens)

    def reward(prompts: Any, completions: Any, answer: Any, **_: Any) -> list[float]:
        return record.draw(completions, answer, lengths)

    learner = DrGRPOLearner(
        rl_cluster=cluster,
        algo_config=DrGRPOConfig(num_generations=race.group_size, num_iterations=1, beta=0.0, epsilon=race.clip_low),
        reward_fns=[reward],
    )
    learner.train(batches(race, record, cluster, rollout[Mode.TRAIN]))


if __name__ == "__main__":
    main()
