"""What learns from a batch: the policy with its reference and its critic, and how its weights come to the engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from qwq_jax.config.objective import ObjectiveConfig
from qwq_jax.rl.critic import Critic
from qwq_jax.rl.experience import Experience, advantages_of, gather, segments_of, split
from qwq_jax.rl.learner import Rows, RowScorer, Updater, means
from qwq_jax.rl.rollout import Group
from qwq_jax.train.packing import Segment
from qwq_jax.train.state import Params, TrainState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RlState:
    """A pytree: all that learning changes.

    Attributes:
        policy: The trained parameters of the policy.
        critic: Those of the critic; None without one.
    """

    policy: TrainState
    critic: TrainState | None = None

    @property
    def updates(self) -> int:
        """Updates of the policy so far."""
        return int(self.policy.step)


@dataclass(frozen=True)
class LearnConfig:
    """How a batch is trained on.

    Attributes:
        objective: What is maximised.
        updates: Updates that it is divided into.
        passes: How often all of it is trained on.
        longest: Most tokens of a completion.
        old_logprobs: Whether the log-probabilities before the update are computed apart.
        critic_first: Of so many steps only the critic learns.
    """

    objective: ObjectiveConfig
    updates: int = 1
    passes: int = 1
    longest: int = 4096
    old_logprobs: bool = False
    critic_first: int = 0


@dataclass(frozen=True)
class Policy:
    """The policy on the devices.

    Attributes:
        updater: Gradients and updates.
        rows: How sequences become micro-batches.
        score: Log-probabilities of trained tokens by all parameters of the policy.
        score_reference: The same of the reference.
        sync: Parameters for an engine.
        frozen: Parameters beside those that are trained; None without adapters.
        reference: Parameters of the reference; None if the objective needs none.
        critic: None if the objective needs none.
    """

    updater: Updater
    rows: Rows
    score: RowScorer
    score_reference: RowScorer
    sync: Callable[[Params, Params | None], Params]
    frozen: Params | None = None
    reference: Params | None = field(default=None, repr=False)
    critic: Critic | None = None

    def engine_params(self, state: RlState) -> Params:
        """The weights as an engine takes them."""
        return self.sync(state.policy.params, self.frozen)

    def learn(
        self, state: RlState, groups: Sequence[Group], config: LearnConfig, *, step: int
    ) -> tuple[RlState, dict[str, float]]:
        """Trains on the batch of a step, which count from 1. `state` is donated: do not use it again.

        Returns:
            The new state, and what there is to report: of rewards and lengths over all completions, of ratios and
            entropy over those that were computed (see `segments_of`). A batch without any changes nothing.
        """
        experience = gather(groups, config.objective)
        columns = self._columns(state, experience, config)
        policy, critic, records = state.policy, state.critic, []
        for _ in range(config.passes):
            for indices in split(experience, config.updates):
                segments = segments_of(
                    experience, indices, columns=columns, objective=config.objective, longest=config.longest
                )
                if not segments:
                    continue
                record: dict[str, float] = {}
                if step > config.critic_first:
                    policy, record = self.updater.update(policy, self.rows.micro_batches(segments), self.frozen)
                if self.critic is not None and critic is not None:
                    critic, said = self.critic.learn(critic, segments)
                    record |= said
                records.append(record)
        measures = batch_measures(experience) | (means(records) if records else {}) | {"updates": float(len(records))}
        return RlState(policy, critic), measures

    def _columns(
        self, state: RlState, experience: Experience, config: LearnConfig
    ) -> Mapping[str, Sequence[np.ndarray]]:
        """What stands beside the trained tokens of each completion."""
        objective = config.objective
        plain = [Segment(*experience.sequence(i)) for i in range(len(experience.samples))]
        columns: dict[str, Sequence[np.ndarray]] = {}
        if config.old_logprobs:
            columns["old_logp"] = self.score({**(self.frozen or {}), **state.policy.params}, plain)
        if objective.uses_reference:
            assert self.reference is not None
            columns["ref_logp"] = self.score_reference(self.reference, plain)
        if self.critic is not None:
            assert state.critic is not None
            columns["old_values"] = self.critic.values(state.critic, plain)
        advantages = advantages_of(
            experience,
            objective,
            old_logp=columns.get("old_logp"),
            ref_logp=columns.get("ref_logp"),
            values=columns.get("old_values"),
        )
        if advantages.returns is not None:
            columns["returns"] = advantages.returns
        return {**columns, "advantages": advantages.tokens}


def batch_measures(experience: Experience) -> dict[str, float]:
    """What a batch says of the policy that drew it: reward, accuracy, lengths, and each reward by its name."""
    samples, rewards = experience.samples, experience.rewards
    judged = [sample.graded.correct for sample in samples if sample.graded.correct is not None]
    found = {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "length": float(np.mean([sample.reply.tokens for sample in samples])),
        "truncated": float(np.mean([sample.reply.truncated for sample in samples])),
        "informative": float(
            np.mean([np.ptp(rewards[experience.groups == group]) > 0 for group in np.unique(experience.groups)])
        ),
        "prompts": float(len(np.unique(experience.groups))),
        "rewards_failed": float(np.mean([bool(sample.graded.failed) for sample in samples])),
    }
    if judged:
        found["accuracy"] = float(np.mean(judged))
    for name in sorted({name for sample in samples for name in sample.graded.parts}):
        parts = [sample.graded.parts[name].value for sample in samples if name in sample.graded.parts]
        found[f"reward/{name}"] = float(np.mean(parts))
    return found
