"""One race of reinforcement learning: what every side is given, and the record that it keeps. Standard library only.

`tools.bench_rl` writes a `Race` as JSON. Each side is a process of its own that reads it and writes one JSON line a
step, as `qwq-jax rl` does into its ``metrics.jsonl``::

    {"versions": {"trl": "1.16.0", ...}}
    {"step": 0, "eval_accuracy": 0.5}
    {"step": 1, "seconds": 9.1, "accuracy": 0.38, "length": 60.7}
    {"step": 5, "seconds": 14.0, "seconds_evaluation": 4.1, "eval_accuracy": 0.52, ...}

``seconds`` is all of a step, its evaluation included; who reads it takes that out. The peers run where qwq_jax's own
dependencies are not installed, so of qwq_jax only the verifier is imported, which needs none.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from qwq_jax.rl.rewards.arithmetic import is_correct

# The prompt ends in it, so that a completion begins inside the thoughts; a whole reply has it.
OPENING = "<think>\n"


@dataclass(frozen=True)
class Question:
    r"""A prompt and its answer.

    Example: ``Question([{"role": "user", "content": "What is 6 x 7?"}], "<|im_start|>user\nWhat ...", [508, ...], 42)``

    Attributes:
        messages: The conversation.
        text: The same through the chat template, up to where the reply begins.
        token_ids: Of the text.
        answer: The integer that has to be boxed.
    """

    messages: list[dict[str, str]]
    text: str
    token_ids: list[int]
    answer: int


@dataclass(frozen=True)
class Descent:
    """The optimizer: AdamW behind a clip by global norm, with a linear warm-up from 0 and half a cosine after it.

    Attributes:
        learning_rate: The peak.
        warmup_steps: Steps from 0 to the peak.
        final_lr_ratio: The last learning rate as a part of the peak.
        steps: Steps that the schedule is planned for.
        b1: Decay of the mean of gradients.
        b2: Decay of the mean of their squares.
        eps: Added to the root of the latter.
        weight_decay: Decoupled.
        clip_norm: Longest gradient.
    """

    learning_rate: float
    warmup_steps: int
    final_lr_ratio: float
    steps: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float


@dataclass(frozen=True)
class Race:
    """What all sides are given.

    Attributes:
        model: A Hugging Face directory.
        prompts: To train on, in order; `prompts_per_step` a step.
        held_out: To be answered greedily every `eval_every` steps.
        prompts_per_step: Prompts of a step.
        group_size: Completions of a prompt.
        max_prompt_tokens: No prompt is longer.
        max_tokens: Longest completion.
        temperature: Of the completions to train on.
        clip_low: How far the ratio of probabilities pays off below 1.
        clip_high: How far above.
        descent: The optimizer.
        eval_every: Steps between evaluations; there is one before the first step.
        seed: Of the sampling.
        threads: Threads of each side.
    """

    model: str
    prompts: list[Question] = field(repr=False)
    held_out: list[Question] = field(repr=False)
    prompts_per_step: int
    group_size: int
    max_prompt_tokens: int
    max_tokens: int
    temperature: float
    clip_low: float
    clip_high: float
    descent: Descent
    eval_every: int
    seed: int
    threads: int

    @property
    def samples_per_step(self) -> int:
        """Completions of a step."""
        return self.prompts_per_step * self.group_size

    @property
    def last_step(self) -> int:
        """Steps that there are prompts for."""
        return len(self.prompts) // self.prompts_per_step

    def write(self, path: Path) -> None:
        """Writes it as JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads what `write` wrote."""
        found = json.loads(path.read_text())
        questions = {name: [Question(**each) for each in found[name]] for name in ("prompts", "held_out")}
        return cls(**{**found, **questions, "descent": Descent(**found["descent"])})


def correct(completion: str, answer: int) -> bool:
    """Whether a completion, whose prompt opened the thoughts, ends in the right boxed integer."""
    return is_correct(OPENING + completion, answer)


class Record:
    """The clock and the log of one side that is not ours.

    Args:
        race: What is run.
        path: The file of the records.
        packages: Of these the versions are noted.
    """

    def __init__(self, race: Race, path: Path, packages: Sequence[str]) -> None:
        self._race = race
        self._path = path
        self._drawn: list[tuple[int, bool]] = []
        self._step = 0
        self._write({"versions": {name: version(name) for name in packages}})
        self._begun = time.perf_counter()

    def start(self, answers: Callable[[], Sequence[str]]) -> None:
        """Evaluates before the first step, and starts the clock; `answers` gives the replies to `Race.held_out`."""
        self._write({"step": 0, "eval_accuracy": self._accuracy(answers())})
        self._begun = time.perf_counter()

    def draw(self, texts: Sequence[str], answers: Sequence[int], lengths: Sequence[int]) -> list[float]:
        """Rewards of completions drawn in this step, with their lengths in tokens."""
        verdicts = [correct(text, int(answer)) for text, answer in zip(texts, answers, strict=True)]
        self._drawn += zip(lengths, verdicts, strict=True)
        return [float(verdict) for verdict in verdicts]

    def end_step(self, answers: Callable[[], Sequence[str]]) -> None:
        """A step is over, weights updated; evaluates if it is time to, and starts the clock again."""
        self._step += 1
        expected = self._race.samples_per_step
        assert len(self._drawn) == expected, f"{len(self._drawn)} completions in step {self._step}, not {expected}"
        lengths, verdicts = zip(*self._drawn, strict=True)
        found = {"step": self._step, "accuracy": sum(verdicts) / expected, "length": sum(lengths) / expected}
        if self._step % self._race.eval_every == 0:
            begun = time.perf_counter()
            found["eval_accuracy"] = self._accuracy(answers())
            found["seconds_evaluation"] = time.perf_counter() - begun
        self._drawn = []
        self._write(found | {"seconds": time.perf_counter() - self._begun})
        self._begun = time.perf_counter()

    def _accuracy(self, texts: Sequence[str]) -> float:
        pairs = zip(texts, self._race.held_out, strict=True)
        return sum(correct(text, question.answer) for text, question in pairs) / len(self._race.held_out)

    def _write(self, record: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def check_prompts(questions: Sequence[Question], found: Sequence[Sequence[int]]) -> None:
    """Exits unless a peer's own tokenizer makes the same prompts."""
    for question, ids in zip(questions, found, strict=True):
        if list(ids) != question.token_ids:
            raise SystemExit(f"not the same prompt: {question.token_ids} here, {list(ids)} there")


def peer_arguments(description: str | None, *, micro_batch: int) -> argparse.Namespace:
    """The command line of a peer: ``--race FILE --record FILE --micro-batch N``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--race", type=Path, required=True, help="what tools.bench_rl wrote")
    parser.add_argument("--record", type=Path, required=True, help="JSON lines are appended here")
    parser.add_argument("--micro-batch", type=int, default=micro_batch, help="completions in one forward and backward")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser.parse_args()


def use_threads(threads: int) -> None:
    """Confines this process, and those it starts, to so many processors."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
