"""What became of the sides of a race of reinforcement learning, read from their records, and the report of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from qwq_jax.config.rl import RlConfig

# Samples a second of ours over those of each peer.
WANTED = 3.0


@dataclass(frozen=True)
class Goal:
    """What is measured of a side, and when it is enough.

    Attributes:
        target: Held-out accuracy to reach; None measures speed alone.
        skipped: First steps, which compile and warm up.
        measured: Steps after them whose speed counts.
        limit: Seconds of training after which the target counts as not reached.
    """

    target: float | None
    skipped: int
    measured: int
    limit: float


@dataclass(frozen=True)
class Outcome:
    """What became of a side.

    Attributes:
        name: Of the side.
        records: Its lines, by step.
        versions: Of what it is made of.
        process_seconds: From the start of its process to the evaluation that reached the target, without evaluations
            but that before the first step; None if it did not.
        failure: Why it ended early, if it did.
        note: How it was set up.
        speed_alone: Whether it was ended as soon as its speed was known.
    """

    name: str
    records: list[dict[str, float]] = field(repr=False)
    versions: dict[str, str] = field(default_factory=dict)
    process_seconds: float | None = None
    failure: str | None = None
    note: str = ""
    speed_alone: bool = False

    @classmethod
    def read(cls, name: str, path: Path) -> Self:
        """Reads the lines of a side so far; one that is not yet whole is left for later."""
        text = path.read_text() if path.exists() else ""
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        versions = next((line["versions"] for line in lines if "versions" in line), {})
        return cls(name, [line for line in lines if "step" in line], versions)

    @property
    def steps(self) -> list[dict[str, float]]:
        """The records of steps, without that of the evaluation before them."""
        return [record for record in self.records if record["step"] > 0]

    @property
    def best(self) -> float:
        """The best accuracy on held-out problems."""
        return max((record.get("eval_accuracy", 0.0) for record in self.records), default=0.0)

    @property
    def first(self) -> float | None:
        """The accuracy on held-out problems before the first step."""
        return next((record["eval_accuracy"] for record in self.records if record["step"] == 0), None)

    def reached(self, target: float) -> int | None:
        """The step after which the target was reached."""
        found = (record for record in self.records if record.get("eval_accuracy", 0.0) >= target)
        return next((int(record["step"]) for record in found), None)

    def training_seconds(self, last: int | None = None) -> float:
        """Seconds of all steps, or of those to `last`, without evaluations."""
        return sum(training_seconds(record) for record in self.steps if last is None or record["step"] <= last)

    def measured(self, goal: Goal) -> list[dict[str, float]]:
        """The steps whose speed counts; empty until all are there."""
        found = self.steps[goal.skipped : goal.skipped + goal.measured]
        return found if len(found) == goal.measured else []

    def enough(self, goal: Goal) -> bool:
        """Whether all that is asked of it is known."""
        if not self.measured(goal):
            return False
        return goal.target is None or self.reached(goal.target) is not None or self.training_seconds() > goal.limit


def training_seconds(record: Mapping[str, float]) -> float:
    """Seconds of a step without its evaluation."""
    return record["seconds"] - record.get("seconds_evaluation", 0.0)


@dataclass(frozen=True)
class Pace:
    """The speed of a side over the measured steps.

    Attributes:
        samples: Completions a second, drawn and trained on.
        tokens: Tokens of completions a second.
        length: Mean of the completions in tokens.
    """

    samples: float
    tokens: float
    length: float

    @classmethod
    def of(cls, steps: Sequence[Mapping[str, float]], samples_per_step: int) -> Self:
        """Takes the mean over steps, as somebody who waits for them would."""
        seconds = sum(map(training_seconds, steps))
        length = sum(step["length"] for step in steps) / len(steps)
        samples = len(steps) * samples_per_step / seconds
        return cls(samples, samples * length, length)


@dataclass(frozen=True)
class Setting:
    """What the report says of how it was measured.

    Attributes:
        command: That made it.
        config: Of our side.
        goal: What was measured.
        threads: Processors of each side.
        load: Load average when it began.
        eval_every: Steps between evaluations.
        versions: Of our side.
        device: What all sides run on.
    """

    command: str
    config: RlConfig
    goal: Goal
    threads: int
    load: float
    eval_every: int
    versions: Mapping[str, str]
    device: str = "a CPU"

    @property
    def samples(self) -> int:
        """Completions of a step."""
        return self.config.rollout.samples_per_step


def our_pace(setting: Setting, outcomes: Sequence[Outcome]) -> float | None:
    """Samples a second of our slowest run; `outcomes` are ours, the peers, and perhaps ours again."""
    ours = [outcome.measured(setting.goal) for outcome in outcomes if is_ours(outcome)]
    return min(Pace.of(steps, setting.samples).samples for steps in ours) if ours and all(ours) else None


def is_ours(outcome: Outcome) -> bool:
    """Whether it is a run of ours."""
    return outcome.name.startswith("qwq_jax")


def row(setting: Setting, outcome: Outcome, ours: float | None) -> str:
    """A row of the table."""
    steps = outcome.measured(setting.goal)
    cells = [outcome.name]
    if steps:
        pace = Pace.of(steps, setting.samples)
        over = "1" if is_ours(outcome) else "-" if ours is None else f"{ours / pace.samples:.2f}"
        cells += [f"{pace.samples:.1f}", over, f"{pace.tokens:.0f}", f"{pace.length:.1f}"]
    else:
        cells += ["-"] * 4
    return "| " + " | ".join([*cells, *arrival(setting, outcome)]) + " |"


def arrival(setting: Setting, outcome: Outcome) -> list[str]:
    """Steps and seconds to the target, and accuracies."""
    target = setting.goal.target
    assert target is not None
    step = outcome.reached(target)
    if not outcome.steps or outcome.speed_alone:
        found = ["-"] * 3
    elif step is None or outcome.process_seconds is None:
        found = ["-", f"not in {outcome.training_seconds():.0f} s", "-"]
    else:
        found = [str(step), f"{outcome.training_seconds(step):.0f}", f"{outcome.process_seconds:.0f}"]
    first = "-" if outcome.first is None else f"{outcome.first:.1%}"
    return [*found, first, f"{outcome.best:.1%}" if outcome.records else "-"]


def verdicts(setting: Setting, outcomes: Sequence[Outcome]) -> list[str]:
    """What is found of each peer, in a sentence."""
    ours, target = our_pace(setting, outcomes), setting.goal.target
    assert target is not None
    found = []
    for peer in outcomes:
        if is_ours(peer):
            continue
        if peer.failure is not None or ours is None:
            found.append(f"**{peer.name}: {peer.failure or 'nothing to compare it with'}**")
            continue
        times = ours / Pace.of(peer.measured(setting.goal), setting.samples).samples
        fast = "at least" if times >= WANTED else "less than"
        found.append(
            f"{peer.name}: qwq_jax makes {times:.2f} times as many samples a second, {fast} {WANTED:g}; "
            + sooner(outcomes[0], peer, target)
        )
    return found


def sooner(ours: Outcome, peer: Outcome, target: float) -> str:
    """Who reaches the target first."""
    mine, theirs = ours.reached(target), peer.reached(target)
    if mine is None:
        return f"qwq_jax does not reach {target:.0%}: best {ours.best:.1%}"
    seconds = ours.training_seconds(mine)
    if theirs is None:
        trained = peer.training_seconds()
        if trained < seconds:
            return f"it was stopped after {trained:.0f} s, before qwq_jax's {seconds:.0f} s: nobody knows who is first"
        return f"{target:.0%} after {seconds:.0f} s, not reached by it in {trained:.0f} s, best {peer.best:.1%}"
    there = peer.training_seconds(theirs)
    word = "sooner" if seconds < there else "NOT sooner"
    return f"{target:.0%} after {seconds:.0f} s, {word} than it with {there:.0f} s"


def equal(setting: Setting, outcomes: Sequence[Outcome]) -> list[str]:
    """What is the same for all sides, and what is not."""
    config = setting.config
    rollout, optimizer, objective = config.rollout, config.optimizer, config.objective
    notes = "; ".join(f"{outcome.name} {outcome.note}" for outcome in outcomes if outcome.note)
    return [
        f"Equal: weights in float32, {rollout.prompts_per_step} prompts a step in one order (the ids that each peer's "
        f"own tokenizer makes of them were compared with ours), {rollout.group_size} completions of each of at most "
        f"{rollout.max_tokens} tokens, temperature {rollout.temperature:g} without top-p and top-k, reward 1 for the "
        "right integer in the last box after the thoughts, by the same function, and 0 otherwise.",
        "Equal: Dr.GRPO's loss, advantage the reward minus the mean of its group, summed over tokens and divided by "
        f"completions times {rollout.max_tokens}; ratios clipped to {objective.clip_low:g} and "
        f"{objective.clip_high:g}, which one update a batch never reaches; no KL, no reference model.",
        f"Equal: AdamW ({optimizer.b1:g}, {optimizer.b2:g}, {optimizer.eps:g}, no decay), gradients clipped to "
        f"{optimizer.clip_norm:g}, learning rate {optimizer.learning_rate:g} after {optimizer.warmup_steps} steps, "
        f"then a cosine to {optimizer.final_lr_ratio:g} of it at step {config.updates}.",
        "Not equal: random numbers, so that completions differ from the first step on, and lengths with them; tunix's "
        "sampler cuts off the token that ends a completion, so that it is not trained on; qwq_jax weighs each token by "
        "the ratio of trainer to engine, which is 1 up to rounding, and judges replies in two more processes on the "
        "same processors.",
        f"{notes or 'No peer'}; qwq_jax {config.rows_per_micro_batch} packed rows of {config.row_length} tokens"
        f"{', and makes a device of each processor' if config.mesh.size > 1 else ''}. Peers "
        "recompute no activations; TRL draws by `generate` with its default cache, tunix by its own sampler with a "
        "cache of the longest prompt and completion.",
    ]


def markdown(setting: Setting, outcomes: Sequence[Outcome]) -> str:
    """The report."""
    goal, ours = setting.goal, our_pace(setting, outcomes)
    versions = [setting.versions, *(outcome.versions for outcome in outcomes if outcome.versions)]
    first, last = goal.skipped + 1, goal.skipped + goal.measured
    lines = [
        f"# Reinforcement learning beside TRL and tunix, on {setting.device}",
        "",
        f"    {setting.command}",
        "",
        f"{setting.config.model} on {setting.samples} completions a step, at most {setting.threads} processors, "
        f"one after the other; load average {setting.load:.1f} when it began (1 a busy core).",
        *(f"{', '.join(f'{name} {number}' for name, number in each.items())}." for each in versions),
        "",
        f"Speed is that of steps {first} to {last} of each, compilation before them. Held-out problems are answered "
        f"greedily before the first step and every {setting.eval_every}; the time to {goal.target:.0%} is that of all "
        "steps before, compilation included and evaluation not; that of the process also counts imports, loading and "
        "the evaluation before the first step.",
        "",
        "| | samples/s | qwq_jax over it | tokens/s | tokens of a completion | steps "
        f"to {goal.target:.0%} | seconds of training | of the process | held out before | best |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(row(setting, outcome, ours) for outcome in outcomes),
        "",
        *(f"- {sentence}" for sentence in [*verdicts(setting, outcomes), *equal(setting, outcomes)]),
    ]
    return "\n".join(lines) + "\n"


def as_json(setting: Setting, outcomes: Sequence[Outcome]) -> str:
    """All records, and what was compared."""
    found: dict[str, Any] = {
        "command": setting.command,
        "config": setting.config.model_dump(mode="json"),
        "goal": vars(setting.goal),
        "load": setting.load,
        "versions": dict(setting.versions),
        "sides": [{**vars(outcome), "best": outcome.best} for outcome in outcomes],
    }
    return json.dumps(found, indent=1) + "\n"
