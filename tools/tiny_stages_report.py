"""What the two stages in their tiny form achieved, from what their runs wrote; fails where they fell short.

    python -m tools.tiny_stages_report out/tiny-stages --write docs/benchmarks/tiny_stages.md

Stage 2 has to raise the reward of its own held-out tasks, and may cost at most two points of the accuracy on those of
stage 1.
"""

import argparse
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from etils import epath

from qwq_jax.rl.evaluate import JudgedTask
from qwq_jax.rl.heldout import read_judged
from qwq_jax.train.metrics import METRICS, read_records
from tools.tiny_grpo_report import conclude

RULE = "rule"
"""The source of stage 2's own tasks."""

MOST_LOST = 0.02


@dataclass(frozen=True)
class Standing:
    """A model on held-out tasks.

    Attributes:
        accuracy: By source, of stage 1's tasks; ``all`` for all of them.
        reward: Mean reward of stage 2's own; None where they were not asked.
        kept: Share of these that were answered rightly and by their rule.
    """

    accuracy: dict[str, float]
    reward: float | None
    kept: float | None


def standing(path: Path) -> Standing:
    """Reads one evaluation."""
    tasks, _ = read_judged(epath.Path(path))
    first = [task for task in tasks if task.source != RULE]
    own = [task for task in tasks if task.source == RULE]
    sources = sorted({task.source for task in first})
    accuracy = {source: _accuracy(task for task in first if task.source == source) for source in sources}
    reward = statistics.fmean(sample.reward for task in own for sample in task.samples) if own else None
    return Standing(accuracy | {"all": _accuracy(first)}, reward, _accuracy(own) if own else None)


def _accuracy(tasks: Iterable[JudgedTask]) -> float:
    return statistics.fmean(bool(sample.correct) for task in tasks for sample in task.samples)


def ends(run: Path) -> tuple[Standing, Standing]:
    """Before the first step of a run and after its last."""
    evaluations = sorted((run / "evaluations").glob("*.json"))
    if len(evaluations) < 2:
        raise SystemExit(f"{run}: expected evaluations before and after a run, found {len(evaluations)}")
    return standing(evaluations[0]), standing(evaluations[-1])


def seconds(run: Path) -> float:
    """What the steps of a run took."""
    return sum(record.get("seconds", 0.0) for record in read_records(run / METRICS))


def table(root: Path) -> tuple[str, list[str]]:
    """The report as Markdown, and what fell short."""
    start, middle = ends(root / "stage-1")
    second, end = ends(root / "stage-2")
    assert second.reward is not None and end.reward is not None and second.kept is not None and end.kept is not None
    rows = [
        f"| {source} | {start.accuracy[source]:.1%} | {middle.accuracy[source]:.1%} | {end.accuracy[source]:.1%} |"
        for source in start.accuracy
    ]
    lines = [
        "| held-out tasks | cold start | after stage 1 | after stage 2 |",
        "|---|---|---|---|",
        *rows,
        f"| rule, with the right answer | - | {second.kept:.1%} | {end.kept:.1%} |",
        f"| rule, reward | - | {second.reward:.3f} | {end.reward:.3f} |",
        "",
        f"Steps of stage 1 took {seconds(root / 'stage-1'):.0f} s, those of stage 2 {seconds(root / 'stage-2'):.0f} s.",
    ]
    lost = middle.accuracy["all"] - end.accuracy["all"]
    short = []
    if end.reward <= second.reward:
        short.append(f"stage 2 did not raise its reward: {second.reward:.3f} before, {end.reward:.3f} after")
    if lost > MOST_LOST:
        short.append(f"stage 2 cost {lost:.1%} of stage 1's accuracy, more than {MOST_LOST:.0%}")
    if middle.accuracy["all"] <= start.accuracy["all"]:
        short.append("stage 1 did not raise its accuracy")
    return "\n".join(lines) + "\n", short


HEAD = """\
# Two stages, as QwQ was trained, in their tiny form

`make tiny-stages`, on two cores: a cold start, a reward model, mathematics and programs by outcome, then rules and the
reward model. Programs ran in the sandbox. The tasks are in `tools/make_tiny_stages.py`, the settings in
`configs/rl/tiny_stages/`.

"""


def main() -> None:
    """Parse the command line; print the table, and say what fell short."""
    parser = argparse.ArgumentParser(description="What the two stages in their tiny form achieved.")
    parser.add_argument("root", type=Path)
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    text, short = table(options.root)
    conclude(text, short, head=HEAD, path=options.write)


if __name__ == "__main__":
    main()
