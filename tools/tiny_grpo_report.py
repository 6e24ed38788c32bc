r"""What `configs/rl/tiny_grpo.toml` achieved with several seeds, from what the runs wrote; fails where they fell short.

    python -m tools.tiny_grpo_report out/rl/tiny_grpo-{0,1,2} --flipped out/rl/tiny_grpo-flipped \
        --write docs/benchmarks/tiny_grpo.md

`make tiny-grpo` runs them before. The mean of the seeds has to end at nine held-out problems in ten or more, each run
within ten minutes, and with the sign of its reward turned the run has to lose what it could.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwq_jax.train.metrics import METRICS, read_records

MOST_BEFORE, LEAST_AFTER, MOST_SECONDS = 0.6, 0.9, 600.0


@dataclass(frozen=True)
class Run:
    """A run: held-out accuracy by step, and what its steps took."""

    name: str
    accuracy: dict[int, float]
    seconds: float

    @property
    def ends(self) -> tuple[float, float]:
        """Before the first step and after the last."""
        return self.accuracy[0], self.accuracy[max(self.accuracy)]


def read(path: Path) -> Run:
    """Reads what a run wrote; SystemExit where there is none."""
    if not (path / METRICS).is_file():
        raise SystemExit(f"{path / METRICS}: no such file; expected the output of a run")
    records = read_records(path / METRICS)
    accuracy = {int(each["step"]): each["eval_accuracy"] for each in records if "eval_accuracy" in each}
    return Run(path.name, accuracy, sum(each.get("seconds", 0.0) for each in records))


def table(runs: Sequence[Run], flipped: Run | None) -> tuple[str, list[str]]:
    """The report as Markdown, and what fell short."""
    everything = [*runs, *([flipped] if flipped else [])]
    steps = sorted(set().union(*(run.accuracy for run in everything)))
    head = "| run | " + " | ".join(f"step {step}" for step in steps) + " | seconds |"
    rows = []
    for run in everything:
        cells = (f"{run.accuracy[step]:.1%}" if step in run.accuracy else "" for step in steps)
        rows.append(f"| {run.name} | {' | '.join(cells)} | {run.seconds:.0f} |")
    before, after = (statistics.fmean(run.ends[i] for run in runs) for i in (0, 1))
    lines = [
        head,
        "|---" * (len(steps) + 2) + "|",
        *rows,
        "",
        f"Mean of the seeds: {before:.1%} before, {after:.1%} after.",
    ]
    short = []
    if before > MOST_BEFORE:
        short.append(f"the runs begin at {before:.1%}, above {MOST_BEFORE:.0%}")
    if after < LEAST_AFTER:
        short.append(f"the runs end at {after:.1%}, below {LEAST_AFTER:.0%}")
    short += [f"{run.name} took {run.seconds:.0f} s" for run in runs if run.seconds > MOST_SECONDS]
    if flipped is not None and flipped.ends[1] >= flipped.ends[0]:
        short.append(f"{flipped.name} did not fall: {flipped.ends[0]:.1%} before, {flipped.ends[1]:.1%} after")
    return "\n".join(lines) + "\n", short


HEAD = """\
# The tiny recipe

`make tiny-grpo`, on two cores: `configs/rl/tiny_grpo.toml` with several seeds, and once with the sign of the reward
turned. Accuracy is that of greedy answers to 256 held-out sums and stories; no expression of them is trained on.
Seconds are those of all steps with their evaluations, without the start of the process and the first evaluation.

"""


def conclude(text: str, short: Sequence[str], *, head: str, path: Path | None) -> None:
    """Prints a report, and writes it under its head if nothing fell short; SystemExit says what did."""
    print(text)
    if short:
        raise SystemExit("; ".join(short))
    if path is not None:
        path.write_text(head + text, encoding="utf-8")


def main() -> None:
    """Parse the command line; print the table, and say what fell short."""
    parser = argparse.ArgumentParser(description="What the tiny recipe achieved with several seeds.")
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--flipped", type=Path)
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    text, short = table([read(path) for path in options.runs], read(options.flipped) if options.flipped else None)
    conclude(text, short, head=HEAD, path=options.write)


if __name__ == "__main__":
    main()
