"""How good a model is by its samples: pass@k, avg@k, maj@k, each with a confidence interval, by source.

Plain NumPy. Tasks are the sampling unit throughout: the samples of one task are not independent of each other, and an
interval from the number of samples alone would be too narrow (Miller, "Adding Error Bars to Evals", arXiv 2411.00640).
Intervals are closed formulas rather than a bootstrap: the same table every time, and none of width zero where every
task is solved.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959963984540054
"""The normal deviate that 95 % intervals reach to."""

ALL = "all"
"""The name of the row over all sources."""

MAX_SAMPLES = 1000
"""Samples of a task; of more, the number of subsets is beyond float64."""


@dataclass(frozen=True)
class Sample:
    """A reply as it was judged.

    Attributes:
        reward: The reward.
        correct: Whether it solves the task; None where no reward judges that.
        vote: The answer it gives, as text, for the majority; None where it gives none.
        tokens: Its length.
        truncated: Whether it was cut off by the limit of tokens.
    """

    reward: float
    correct: bool | None
    vote: str | None = None
    tokens: int = 0
    truncated: bool = False


@dataclass(frozen=True)
class JudgedTask:
    """A task with its samples.

    Example: ``JudgedTask("gsm8k-12", "gsm8k", (Sample(1.0, True, "42"), Sample(0.0, False, "41")), votes=True)``

    Attributes:
        task_id: Its name.
        source: Where it comes from.
        samples: At least one.
        votes: Whether answers can be counted against each other, as numbers can and programs cannot.
    """

    task_id: str
    source: str
    samples: tuple[Sample, ...]
    votes: bool = False


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks with its 95 % interval; None where one task says nothing of the spread of a reward."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """What was measured on the tasks of one source.

    Attributes:
        source: Its name.
        tasks: Number of tasks.
        samples: Number of samples of each.
        measures: By name: ``pass@k`` and ``avg@n`` in parts of 1, over the tasks whose correctness was judged,
            ``maj@k`` over those of them whose answers can vote, ``reward`` over all; one without tasks is left out.
        tokens: Mean length of a reply.
        truncated: Part of the replies that were cut off.
    """

    source: str
    tasks: int
    samples: int
    measures: Mapping[str, Estimate]
    tokens: float
    truncated: float


@dataclass(frozen=True)
class Evaluation:
    """The row over all tasks, and after it one for each source where there are several, by name."""

    rows: tuple[Row, ...]

    @property
    def total(self) -> Row:
        """The row over all tasks."""
        return self.rows[0]


@dataclass(frozen=True)
class Measure:
    """One measure of each task.

    Attributes:
        values: Float64 ``[tasks]``, from 0 to 1 unless it is the reward; NaN for tasks that it does not apply to.
        blocks: How many independent values for one task lie in its samples: the number of samples by k.
        is_share: Whether values are shares.
    """

    values: np.ndarray
    blocks: float = 1.0
    is_share: bool = True

    def estimate(self, chosen: np.ndarray) -> Estimate | None:
        """The mean over those of the chosen tasks, bool ``[tasks]``, that have a value; None if none has."""
        values = self.values[chosen & ~np.isnan(self.values)]
        if not len(values):
            return None
        return share_interval(values, blocks=self.blocks) if self.is_share else mean_interval(values)


def evaluate(tasks: Sequence[JudgedTask], ks: Sequence[int]) -> Evaluation:
    """Measures all tasks together, and the tasks of each source.

    Args:
        tasks: At least one, all with the same number of samples.
        ks: For pass@k and, above 1, maj@k.

    Raises:
        ValueError: There are no tasks, tasks differ in the number of samples, or a k is not within that number.
    """
    measures = task_measures(tasks, ks)
    sources = np.array([task.source for task in tasks])
    return Evaluation(tuple(_row(source, tasks, measures, chosen) for source, chosen in _by_source(sources)))


def compare(
    before: Sequence[JudgedTask], after: Sequence[JudgedTask], ks: Sequence[int]
) -> dict[str, dict[str, Estimate]]:
    """How much better the tasks are solved that both evaluations have, by source and name of the measure.

    Sources are those of `evaluate`: all tasks first. Intervals are those of a paired difference, much narrower than
    what the two intervals beside each other suggest.

    Raises:
        ValueError: As `evaluate`, or the two have no task in common.
    """
    earlier = {task.task_id: task for task in before}
    pairs = [(earlier[task.task_id], task) for task in after if task.task_id in earlier]
    if not pairs:
        raise ValueError("the two evaluations have no task in common, so that they cannot be compared")
    first = task_measures([pair[0] for pair in pairs], ks)
    second = task_measures([pair[1] for pair in pairs], ks)
    sources = np.array([task.source for _, task in pairs])
    return {
        source: {
            name: gain
            for name, measure in first.items()
            if name in second and (gain := _gain(measure, second[name], chosen)) is not None
        }
        for source, chosen in _by_source(sources)
    }


def task_measures(tasks: Sequence[JudgedTask], ks: Sequence[int]) -> dict[str, Measure]:
    """Every measure of every task, by name, in the order of a table's columns."""
    count = _sample_count(tasks)
    strange = next((k for k in ks if not 1 <= k <= count), None)
    if strange is not None:
        raise ValueError(f"k = {strange} is not between 1 and the number of samples, {count}")
    ks = sorted(set(ks))
    judged = np.array([all(sample.correct is not None for sample in task.samples) for task in tasks])
    votes = judged & np.array([task.votes for task in tasks])
    right = np.array([sum(sample.correct is True for sample in task.samples) for task in tasks])
    found = {f"pass@{k}": Measure(_known(pass_at_k(right, count, k), judged), count / k) for k in ks}
    found[f"avg@{count}"] = Measure(_known(right / count, judged), count)
    for k in ks:
        if k > 1:
            won = np.array([_majority(task.samples, k) if votes[i] else np.nan for i, task in enumerate(tasks)])
            found[f"maj@{k}"] = Measure(won, count / k)
    rewards = np.array([[sample.reward for sample in task.samples] for task in tasks], np.float64)
    found["reward"] = Measure(rewards.mean(axis=1), is_share=False)
    return found


def pass_at_k(correct: np.ndarray, count: int, k: int) -> np.ndarray:
    """Chance that at least one of k samples is right, estimated without bias from `count` samples of each task.

    1 - C(n - c, k) / C(n, k), which is the share of the subsets of k samples that hold a right one: Chen et al.,
    "Evaluating Large Language Models Trained on Code", arXiv 2107.03374, equation 1, as the product of its figure 3.

    Args:
        correct: Right samples c of each task, integer ``[tasks]``.
        count: Samples n of each task.
        k: From 1 to `count`.

    Returns:
        Float64 ``[tasks]``.
    """
    assert 1 <= k <= count, (k, count)
    wrong = count - np.asarray(correct)
    # C(n - c, k) / C(n, k) = prod over i < k of (n - c - i) / (n - i); a factor is 0 where too few are wrong.
    taken = np.arange(k)
    return 1.0 - np.prod(np.maximum(wrong[:, None] - taken, 0) / (count - taken), axis=1)


def majority_at_k(right: int, wrong: Sequence[int], abstained: int, k: int) -> float:
    """Chance that the right answer wins a vote of k samples drawn without replacement; a tie is broken evenly.

    The exact mean over all subsets of k samples: maj@k (self-consistency, Wang et al., arXiv 2203.11171) without the
    noise of drawing subsets. For each number t of votes for the right answer it counts the subsets in which j wrong
    answers have t votes as well and all others fewer, adding answer by answer to a table ``[j, votes]``; the right one
    wins 1 / (j + 1) of these.

    Args:
        right: Samples with the right answer.
        wrong: Samples with each of the wrong answers.
        abstained: Samples without an answer: drawn like others, without a vote.
        k: From 1 to the number of samples.
    """
    count = right + sum(wrong) + abstained
    assert 1 <= k <= count, (k, count)
    favourable = 0.0
    for t in range(1, min(right, k) + 1):
        rest = k - t
        ways = np.zeros((rest // t + 1, rest + 1))
        ways[0, 0] = 1.0
        for size in wrong:
            added = np.zeros_like(ways)
            for votes in range(min(size, t - 1, rest) + 1):
                added += _shifted(ways, votes) * math.comb(size, votes)
            if t <= min(size, rest):
                added[1:] += _shifted(ways, t)[:-1] * math.comb(size, t)
            ways = added
        silent = [math.comb(abstained, rest - voting) for voting in range(rest + 1)]
        shares = (ways @ np.array(silent, np.float64)) / np.arange(1, len(ways) + 1)
        favourable += math.comb(right, t) * float(shares.sum())
    return favourable / math.comb(count, k)


def share_interval(values: np.ndarray, *, blocks: float = 1.0) -> Estimate:
    """The mean of shares over tasks, float64 ``[tasks]``, with its 95 % interval.

    Wilson's interval with an effective sample size: the number of tasks divided by the design effect, which is the
    variance of the shares by that of as many values of 0 and 1 of the same mean (Franco et al., "Comparative Study of
    Confidence Intervals for Proportions in Complex Sample Surveys", 2019). With one sample a task it is Wilson's own.
    Two imaginary tasks, one solved and one not, join the others for the design effect alone: without them it is
    underestimated where nearly all tasks are alike. Of 30 tasks with 8 samples, where 3 % of all tasks have no
    solution, it would then cover the truth in 73 % of the cases rather than in 96 %.

    Args:
        values: From 0 to 1.
        blocks: Independent values that a task's samples hold; the effective size is at most so many a task.
    """
    return Estimate(float(np.mean(values)), *_share_limits(values, blocks))


def paired_interval(before: np.ndarray, after: np.ndarray, *, blocks: tuple[float, float] = (1.0, 1.0)) -> Estimate:
    """The mean difference of shares of the same tasks, both float64 ``[tasks]``, with its 95 % interval.

    From the two intervals and the correlation r between the shares: the lower limit lies
    sqrt(a^2 - 2 r a b + b^2) below, a from the later mean down to its limit, b from the earlier one up to its own, and
    the upper one accordingly (Newcombe, "Improved confidence intervals for the difference between binomial proportions
    based on paired data", 1998, method 10; Zou and Donner, 2008, for other intervals than Wilson's).
    """
    x, y = float(np.mean(before)), float(np.mean(after))
    x_low, x_high = _share_limits(before, blocks[0])
    y_low, y_high = _share_limits(after, blocks[1])
    r = _correlation(before, after)
    return Estimate(y - x, y - x - _joined(y - y_low, x_high - x, r), y - x + _joined(y_high - y, x - x_low, r))


def mean_interval(values: np.ndarray) -> Estimate:
    """The mean over tasks, float64 ``[tasks]``, with Student's 95 % interval; without one for a single task."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean)
    half = student_95(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def student_95(freedom: int) -> float:
    """Student's deviate for a 95 % interval, to 1e-3.

    The expansion of Abramowitz and Stegun, 26.7.5, and below 8 degrees of freedom, where it falls short, a table.
    """
    if freedom < 8:
        return (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646)[freedom - 1]
    z, nu = Z_95, freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / nu + second / nu**2 + third / nu**3


def _share_limits(values: np.ndarray, blocks: float) -> tuple[float, float]:
    count, mean = len(values), float(np.mean(values))
    imagined = np.concatenate([values, [0.0, 1.0]])
    middle = float(imagined.mean())
    size = min(count * middle * (1 - middle) / float(imagined.var()), count * blocks)
    scale = 1 + Z_95**2 / size
    center = (mean + Z_95**2 / (2 * size)) / scale
    half = Z_95 * math.sqrt(max(mean * (1 - mean), 0.0) / size + Z_95**2 / (4 * size**2)) / scale
    # Rounding must not leave the mean of equal values outside.
    return min(max(center - half, 0.0), mean), max(min(center + half, 1.0), mean)


def _sample_count(tasks: Sequence[JudgedTask]) -> int:
    if not tasks:
        raise ValueError("there is no task to evaluate")
    count = len(tasks[0].samples)
    odd = next((task for task in tasks if len(task.samples) != count), None)
    if odd is not None:
        raise ValueError(
            f"task {odd.task_id!r} has {len(odd.samples)} samples where task {tasks[0].task_id!r} has {count}"
        )
    if not 1 <= count <= MAX_SAMPLES:
        raise ValueError(f"expected from 1 to {MAX_SAMPLES} samples of a task, got {count}")
    return count


def _by_source(sources: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """All tasks, and those of each source if there are several: its name, and which they are."""
    names = sorted(set(sources.tolist()))
    apart = [(name or "(none)", sources == name) for name in names]
    return [(ALL, np.ones(len(sources), bool)), *(apart if len(names) > 1 else [])]


def _gain(before: Measure, after: Measure, chosen: np.ndarray) -> Estimate | None:
    """The mean difference over those of the chosen tasks that have both values."""
    known = chosen & ~np.isnan(before.values + after.values)
    if not known.any():
        return None
    x, y = before.values[known], after.values[known]
    return paired_interval(x, y, blocks=(before.blocks, after.blocks)) if before.is_share else mean_interval(y - x)


def _row(source: str, tasks: Sequence[JudgedTask], measures: Mapping[str, Measure], chosen: np.ndarray) -> Row:
    samples = [sample for task, wanted in zip(tasks, chosen, strict=True) if wanted for sample in task.samples]
    estimates = {name: measure.estimate(chosen) for name, measure in measures.items()}
    return Row(
        source,
        tasks=int(chosen.sum()),
        samples=len(tasks[0].samples),
        measures={name: estimate for name, estimate in estimates.items() if estimate is not None},
        tokens=sum(sample.tokens for sample in samples) / len(samples),
        truncated=sum(sample.truncated for sample in samples) / len(samples),
    )


def _majority(samples: Sequence[Sample], k: int) -> float:
    """maj@k of a task; whatever was judged right is one answer, however it was written."""
    right = sum(sample.correct is True for sample in samples)
    wrong = Counter(sample.vote for sample in samples if not sample.correct)
    abstained = wrong.pop(None, 0)
    return majority_at_k(right, list(wrong.values()), abstained, k)


def _known(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    return np.where(known, values, np.nan)


def _shifted(ways: np.ndarray, votes: int) -> np.ndarray:
    """The table after `votes` more votes of an answer that is not level with the right one."""
    moved = np.zeros_like(ways)
    moved[:, votes:] = ways[:, : ways.shape[1] - votes]
    return moved


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's, and 0 where one of the two does not vary."""
    a, b = x - x.mean(), y - y.mean()
    spread = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / spread if spread > 1e-12 else 0.0


def _joined(a: float, b: float, r: float) -> float:
    return math.sqrt(max(a * a - 2 * r * a * b + b * b, 0.0))
