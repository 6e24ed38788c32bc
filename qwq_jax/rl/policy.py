"""What learns from a batch: the policy with its reference, and how its weights come to the engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qwq_jax.config.objective import ObjectiveConfig
from qwq_jax.rl.experience import Experience, advantages_of, gather, segments_of, split
from qwq_jax.rl.learner import Rows, Updater, means
from qwq_jax.rl.rollout import Group
from qwq_jax.train.packing import Segment
from qwq_jax.train.state import Params, TrainState

Scorer = Callable[[Params, Sequence[Segment]], list[np.ndarray]]


@dataclass(frozen=True)
class LearnConfig:
    """How a batch is trained on.

    Attributes:
        objective: What is maximised.
        updates: Updates that it is divided into.
        passes: How often all of it is trained on.
        longest: Most tokens of a completion.
        old_logprobs: Whether the log-probabilities before the update are computed apart.
    """

    objective: ObjectiveConfig
    updates: int = 1
    passes: int = 1
    longest: int = 4096
    old_logprobs: bool = False


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
    """

    updater: Updater
    rows: Rows
    score: Scorer
    score_reference: Scorer
    sync: Callable[[Params, Params | None], Params]
    frozen: Params | None = None
    reference: Params | None = field(default=None, repr=False)

    def engine_params(self, state: TrainState) -> Params:
        """The weights as an engine takes them."""
        return self.sync(state.params, self.frozen)

    def learn(
        self, state: TrainState, groups: Sequence[Group], config: LearnConfig
    ) -> tuple[TrainState, dict[str, float]]:
        """Trains on a batch. `state` is donated: do not use it again.

        Returns:
            The new state, and what there is to report. A batch in which no completion counts changes nothing.
        """
        experience = gather(groups, config.objective)
        columns = self._columns(state, experience, config)
        records: list[dict[str, float]] = []
        for _ in range(config.passes):
            for indices in split(experience, config.updates):
                segments = segments_of(
                    experience, indices, columns=columns, objective=config.objective, longest=config.longest
                )
                if segments:
                    batches = self.rows.micro_batches(segments)
                    state, record = self.updater.update(state, batches, self.frozen)
                    records.append(record)
        return state, batch_measures(experience) | (means(records) if records else {}) | {"updates": len(records)}

    def _columns(
        self, state: TrainState, experience: Experience, config: LearnConfig
    ) -> Mapping[str, Sequence[np.ndarray]]:
        """What stands beside the trained tokens of each completion."""
        objective = config.objective
        plain = [Segment(*experience.sequence(i)) for i in range(len(experience.samples))]
        columns: dict[str, Sequence[np.ndarray]] = {}
        if config.old_logprobs:
            columns["old_logp"] = self.score({**(self.frozen or {}), **state.params}, plain)
        if objective.uses_reference:
            assert self.reference is not None
            columns["ref_logp"] = self.score_reference(self.reference, plain)
        advantages = advantages_of(
            experience, objective, old_logp=columns.get("old_logp"), ref_logp=columns.get("ref_logp")
        )
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
        "rewards_failed": float(np.mean([bool(sample.graded.failed) for sample in samples])),
    }
    if judged:
        found["accuracy"] = float(np.mean(judged))
    for name in sorted({name for sample in samples for name in sample.graded.parts}):
        parts = [sample.graded.parts[name].value for sample in samples if name in sample.graded.parts]
        found[f"reward/{name}"] = float(np.mean(parts))
    return found
