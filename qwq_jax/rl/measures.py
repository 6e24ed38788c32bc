"""The numbers of a run by the names that they have in ``metrics.jsonl``: what they are called, and how written."""

import math
from collections.abc import Iterable, Mapping
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
                if 1e3 <= abs(value) < 1e6:
                    return f"{value:,.0f}"
                return f"{value:.3g}" if 1e-3 <= abs(value) < 1e3 or not value else f"{value:.1e}"


HELD_OUT = Measure("held-out accuracy", ("eval_accuracy",), Form.SHARE)
"""Of all sources; that of each is called ``eval_accuracy/SOURCE``."""

MEASURES = (
    Measure("reward", ("reward",)),
    Measure("accuracy", ("accuracy",), Form.SHARE),
    HELD_OUT,
    Measure("held-out reward", ("eval_reward",)),
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

PHASES = ("rollout", "reward", "update", "sync", "evaluation", "save")
"""What a step's time goes to, in this order: a record has the seconds of each as ``seconds_rollout`` and so on."""

_SECONDS = "seconds_"


def phase_seconds(record: Mapping[str, float]) -> dict[str, float]:
    """The seconds of each phase that a record names; those that are not in `PHASES` come last."""
    named = [name.removeprefix(_SECONDS) for name in record if name.startswith(_SECONDS)]
    order = [phase for phase in PHASES if phase in named] + [phase for phase in named if phase not in PHASES]
    return {phase: record[_SECONDS + phase] for phase in order}


def mean_phases(records: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Mean seconds of each phase over the records that name any."""
    found = [seconds for record in records if (seconds := phase_seconds(record))]
    names = dict.fromkeys(phase for phase in PHASES if any(phase in seconds for seconds in found))
    names |= dict.fromkeys(phase for seconds in found for phase in seconds)
    return {name: sum(seconds.get(name, 0.0) for seconds in found) / len(found) for name in names}
