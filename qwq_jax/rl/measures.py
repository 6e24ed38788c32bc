"""The numbers of a run by the names that they have in ``metrics.jsonl``: what they are called, and how written."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Form(Enum):
    """How a number is written."""

    NUMBER = "number"
    SHARE = "share"
    """In percent."""
    COUNT = "count"
    """Without decimals, in groups of three digits."""


@dataclass(frozen=True)
class Measure:
    """A number to look at.

    Attributes:
        label: For people.
        names: In a record; the sum of those that it has.
        form: How it is written.
    """

    label: str
    names: tuple[str, ...]
    form: Form = Form.NUMBER

    def of(self, record: Mapping[str, float]) -> float | None:
        """Its value in a record; None where that says nothing of it, or nothing finite."""
        found = [record[name] for name in self.names if name in record]
        return sum(found) if found and all(map(math.isfinite, found)) else None

    def written(self, value: float) -> str:
        """A value for people."""
        match self.form:
            case Form.SHARE:
                return f"{value:.1%}"
            case Form.COUNT:
                return f"{value:,.0f}"
            case Form.NUMBER:
                return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 or not value else f"{value:.1e}"


MEASURES = (
    Measure("reward", ("reward",)),
    Measure("accuracy", ("accuracy",), Form.SHARE),
    Measure("held-out accuracy", ("eval_accuracy",), Form.SHARE),
    Measure("length", ("length",), Form.COUNT),
    Measure("truncated", ("truncated",), Form.SHARE),
    Measure("entropy", ("entropy",)),
    Measure("KL to reference", ("reference_kl",)),
    Measure("KL of update", ("update_kl",)),
    Measure("clipped", ("clip_low", "clip_high", "clip_delta"), Form.SHARE),
    Measure("engine - trainer", ("rollout_gap",)),
    Measure("gradient norm", ("grad_norm",)),
    Measure("tokens/s", ("tokens_per_second",), Form.COUNT),
)
"""What the dashboard and the report show, in this order, as far as a run has it."""

PHASES = ("rollout", "reward", "update", "sync", "save")
"""What a step's time goes to: a record has the seconds of each as ``seconds_rollout`` and so on."""


def phase_seconds(record: Mapping[str, float]) -> dict[str, float]:
    """The seconds of each phase that a record names."""
    return {phase: record[f"seconds_{phase}"] for phase in PHASES if f"seconds_{phase}" in record}
