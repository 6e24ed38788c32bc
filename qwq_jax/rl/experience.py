"""From groups of judged completions to packed rows: what is trained on, and with what beside each token. No JAX."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qwq_jax.config.objective import ObjectiveConfig
from qwq_jax.rl.advantage import Advantages, is_informative, to_column, token_advantages, token_weights
from qwq_jax.rl.rollout import Group, Sample
from qwq_jax.train.packing import PackedRows, Segment, fill_rows, plan_rows


@dataclass(frozen=True)
class Experience:
    """The completions of a batch, flat, in the order of groups and samples.

    Attributes:
        prompts: Token ids of each one's prompt.
        samples: The completions.
        groups: int64 ``[N]``, the group of each.
        kept: bool ``[N]``, the completions that count.
    """

    prompts: tuple[tuple[int, ...], ...]
    samples: tuple[Sample, ...]
    groups: np.ndarray
    kept: np.ndarray

    @cached_property
    def rewards(self) -> np.ndarray:
        """The rewards, float64 ``[N]``."""
        return np.array([sample.graded.value for sample in self.samples], np.float64)

    @cached_property
    def lengths(self) -> list[int]:
        """Trained tokens of each completion."""
        return [int(sample.drawn.sum()) for sample in self.samples]

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 ``[n]`` of prompt and completion, and which of them are trained, bool ``[n]``."""
        prompt, sample = self.prompts[index], self.samples[index]
        tokens = np.array([*prompt, *sample.completion.token_ids], np.int32)
        return tokens, np.concatenate([np.zeros(len(prompt), np.bool_), sample.drawn])


def gather(groups: Sequence[Group], objective: ObjectiveConfig) -> Experience:
    """Puts the groups side by side, and decides which completions count."""
    return Experience(
        prompts=tuple(group.prompt.token_ids for group in groups for _ in group.samples),
        samples=tuple(sample for group in groups for sample in group.samples),
        groups=np.repeat(np.arange(len(groups)), [len(group.samples) for group in groups]),
        kept=np.concatenate([_counting(group, objective) for group in groups]),
    )


def _counting(group: Group, objective: ObjectiveConfig) -> np.ndarray:
    """Which completions of a group count: bool, one for each."""
    kept = np.array([not (objective.mask_truncated and sample.reply.truncated) for sample in group.samples], np.bool_)
    if objective.uninformative_groups == "drop" and not is_informative(np.array(group.rewards)[kept]):
        kept[:] = False
    return kept


def advantages_of(
    experience: Experience,
    objective: ObjectiveConfig,
    *,
    old_logp: Sequence[np.ndarray] | None,
    ref_logp: Sequence[np.ndarray] | None,
    values: Sequence[np.ndarray] | None = None,
) -> Advantages:
    """`token_advantages` of a batch; arrays are those of the trained tokens of each completion."""
    log_ratios = None
    if objective.kl == "k1_reward":
        assert old_logp is not None and ref_logp is not None
        log_ratios = [old - ref for old, ref in zip(old_logp, ref_logp, strict=True)]
    return token_advantages(
        objective,
        rewards=experience.rewards,
        groups=experience.groups,
        lengths=experience.lengths,
        log_ratios=log_ratios,
        values=values,
        kept=experience.kept,
    )


def split(experience: Experience, parts: int) -> list[np.ndarray]:
    """Indices of the completions of each update: whole groups, in order."""
    numbers = np.array_split(np.unique(experience.groups), parts)
    return [np.flatnonzero(np.isin(experience.groups, part)) for part in numbers]


def segments_of(
    experience: Experience,
    indices: Iterable[int],
    *,
    columns: Mapping[str, Sequence[np.ndarray]],
    objective: ObjectiveConfig,
    longest: int,
) -> list[Segment]:
    """One update's sequences, with the `columns` of their trained tokens, the engine's log-probabilities and weights.

    Completions that do not count are left out, and so are those that have no gradient (all of a group of equal rewards,
    where only advantages teach): they cost time and change nothing. The latter stay in the denominators.
    """
    indices = list(indices)
    lengths = [experience.lengths[i] for i in indices]
    weights = token_weights(objective.aggregation, lengths, kept=experience.kept[indices], longest=longest)
    segments = []
    for i, weight in zip(indices, weights, strict=True):
        if not weight or (objective.learns_by_advantage_alone and not columns["advantages"][i].any()):
            continue
        tokens, trained = experience.sequence(i)
        sample = experience.samples[i]
        values = {
            "weights": np.float64(weight),
            "rollout_logp": sample.logprobs[sample.drawn],
            **{name: of_each[i] for name, of_each in columns.items()},
        }
        segments.append(Segment(tokens, trained, {name: to_column(x, trained) for name, x in values.items()}))
    return segments


@dataclass(frozen=True)
class RowPlan:
    """Where each of some segments lies in rows of one length, and how the rows are divided into micro-batches.

    Attributes:
        rows: For each row the indices of its segments.
        row_length: Slots of a row.
        rows_per_micro_batch: Rows of each micro-batch; the last is filled up with empty ones.
    """

    rows: list[list[int]]
    row_length: int
    rows_per_micro_batch: int

    @classmethod
    def of(cls, segments: Sequence[Segment], *, row_length: int, rows_per_micro_batch: int) -> "RowPlan":
        """Packs the segments, the longest first."""
        order = sorted(range(len(segments)), key=lambda i: (-segments[i].slots, i))
        planned = plan_rows([segments[i].slots for i in order], row_length=row_length)
        rows = [[order[i] for i in row] for row in planned]
        return cls(rows + [[]] * (-len(rows) % rows_per_micro_batch), row_length, rows_per_micro_batch)

    def micro_batches(self, segments: Sequence[Segment]) -> Iterator[PackedRows]:
        """The rows of each micro-batch, ``[B, T]``."""
        for begin in range(0, len(self.rows), self.rows_per_micro_batch):
            rows = self.rows[begin : begin + self.rows_per_micro_batch]
            yield fill_rows([[segments[i] for i in row] for row in rows], row_length=self.row_length)

    def unpack(self, segments: Sequence[Segment], arrays: Iterable[np.ndarray]) -> list[np.ndarray]:
        """The values of the trained tokens of each segment, from one ``[B, T]`` array a micro-batch."""
        flat = np.concatenate(list(arrays))
        found: list[np.ndarray] = [np.zeros(0)] * len(segments)
        for row, indices in enumerate(self.rows):
            start = 0
            for i in indices:
                end = start + segments[i].slots
                found[i] = flat[row, start:end][segments[i].trained[1:]]
                start = end
        return found
