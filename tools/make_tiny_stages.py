"""Write the data of QwQ's two stages in their tiny form: sums, small programs, and sums with a rule for the answer.

    python tools/make_tiny_stages.py out/tiny-stages

- OUT/cold_start.jsonl: conversations to begin with, as chat JSONL. They show what a program and an answer by a rule
  look like; every other answer breaks its rule, as those of a model do that was never trained to keep rules.
- OUT/programs.jsonl, OUT/programs_held_out.jsonl: tasks of stage 1, to be judged by running what the model wrote.
- OUT/rules.jsonl, OUT/rules_held_out.jsonl: tasks of stage 2, to be judged by their rule and their answer.

No program and no sum of one split ever appears in the other. The same command writes the same bytes.
"""

import argparse
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwq_jax.rl.rewards import arithmetic
from qwq_jax.rl.rewards.arithmetic import Problem, Split, split_of

LEVELS = (1, 2)
"""Of the sums that carry a rule."""

# One program in so many is held out, by a hash of its expression.
HELD_OUT_ONE_IN = 5
TESTS_A_PROGRAM = 4

_OPERANDS = {
    "a": "a",
    "b": "b",
    "twice a": "2 * a",
    "twice b": "2 * b",
    "a squared": "a * a",
    "b squared": "b * b",
    "a plus one": "(a + 1)",
    "b plus one": "(b + 1)",
    "a less one": "(a - 1)",
    "b less one": "(b - 1)",
}
_OPERATIONS = {
    "the sum of {} and {}": "{} + {}",
    "the difference of {} and {}": "{} - {}",
    "the product of {} and {}": "{} * {}",
    "the larger of {} and {}": "max({}, {})",
    "the smaller of {} and {}": "min({}, {})",
}


@dataclass(frozen=True)
class Rule:
    """What is asked of an answer, how it is checked, and an answer that keeps it."""

    request: str
    check: dict[str, Any]
    keep: Callable[[int], str]


RULES = (
    Rule("Start with Sum:", {"rule": "starts", "start": "Sum:"}, "Sum: \\boxed{{{}}}.".format),
    Rule("End with Done.", {"rule": "ends", "end": "Done."}, "The answer is \\boxed{{{}}}. Done.".format),
    Rule("Use one word.", {"rule": "words", "most": 1}, "\\boxed{{{}}}".format),
    Rule("Use two lines.", {"rule": "lines", "least": 2, "most": 2}, "The answer is\n\\boxed{{{}}}.".format),
)
PLAIN = "The answer is \\boxed{{{}}}.".format


@dataclass(frozen=True)
class Program:
    """A program that reads a and b: what it prints, in words and in Python."""

    words: str
    expression: str

    @property
    def question(self) -> str:
        """The task."""
        return f"Write Python that reads a and b and prints {self.words}."

    @property
    def reply(self) -> str:
        """The program, with a thought before it."""
        code = f"a, b = map(int, input().split())\nprint({self.expression})"
        return f"<think>\n{self.words}: {self.expression}\n</think>\n\n```python\n{code}\n```"

    @property
    def split(self) -> Split:
        """Its split, for ever."""
        return split_of(self.expression, HELD_OUT_ONE_IN)

    def tests(self) -> list[dict[str, str]]:
        """What is read and what has to be written."""
        rng = random.Random(self.expression)
        pairs = [(rng.randint(-20, 20), rng.randint(-20, 20)) for _ in range(TESTS_A_PROGRAM)]
        known = {"max": max, "min": min}
        # The expressions are those of this module.
        results = [eval(self.expression, {"__builtins__": known}, {"a": a, "b": b}) for a, b in pairs]  # noqa: S307
        return [{"stdin": f"{a} {b}\n", "stdout": f"{result}\n"} for (a, b), result in zip(pairs, results, strict=True)]


def programs() -> list[Program]:
    """All of them, in one order."""
    return [
        Program(words.format(x, y), code.format(_OPERANDS[x], _OPERANDS[y]))
        for (words, code), x, y in itertools.product(_OPERATIONS.items(), _OPERANDS, _OPERANDS)
        if x != y
    ]


def program_tasks(split: Split) -> Iterator[dict[str, Any]]:
    """Tasks of stage 1."""
    for index, program in enumerate(programs()):
        if program.split is split:
            yield {"id": f"program-{index}", "prompt": program.question, "source": "program", "tests": program.tests()}


def ruled(seed: int, split: Split) -> Iterator[tuple[Problem, Rule]]:
    """Sums, each with a rule; of those that are held out none comes twice."""
    rng, seen = random.Random(seed), set()
    for problem in arithmetic.problems(seed, split=split, levels=LEVELS):
        if split is Split.HELD_OUT and problem.expression in seen:
            continue
        seen.add(problem.expression)
        yield problem, rng.choice(RULES)


def rule_tasks(seed: int, split: Split, count: int) -> Iterator[dict[str, Any]]:
    """Tasks of stage 2."""
    for index, (problem, rule) in enumerate(itertools.islice(ruled(seed, split), count)):
        yield {
            "id": f"rule-{split.value}-{index}",
            "prompt": f"{problem.question} {rule.request}",
            "source": "rule",
            "answer": str(problem.answer),
            "instructions": [rule.check],
        }


def cold_start(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Conversations: half of them programs, a quarter sums, a quarter sums whose rule is kept or not."""
    rng = random.Random(seed)
    sums = arithmetic.problems(seed, split=Split.TRAIN, levels=(1, 2, 3))
    with_rule = ruled(seed + 1, Split.TRAIN)
    writable = [program for program in programs() if program.split is Split.TRAIN]
    for index in range(count):
        match rng.choice(("sum", "program", "program", "rule")):
            case "program":
                program = rng.choice(writable)
                question, reply = program.question, program.reply
            case "rule":
                problem, rule = next(with_rule)
                answer = rng.choice((rule.keep, PLAIN))(problem.answer)
                question = f"{problem.question} {rule.request}"
                reply = f"<think>\n{problem.reasoning}\n</think>\n\n{answer}"
            case _:
                question, reply = (message["content"] for message in next(sums).messages())
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        yield {"custom_id": f"cold-{index:05d}", "messages": messages}


def write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Writes a file, complete or not at all."""
    partial, listed = path.with_name(path.name + ".tmp"), list(lines)
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in listed)
    partial.replace(path)
    print(f"{len(listed)} lines -> {path}")


def main() -> None:
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(description="Write the data of the two stages in their tiny form.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--cold-start", type=int, default=30000, metavar="COUNT")
    parser.add_argument("--rules", type=int, default=8000, metavar="COUNT")
    parser.add_argument("--held-out", type=int, default=200, metavar="COUNT", help="tasks with a rule")
    parser.add_argument("--seed", type=int, default=31)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    write(options.output / "cold_start.jsonl", cold_start(options.seed, options.cold_start))
    write(options.output / "programs.jsonl", program_tasks(Split.TRAIN))
    write(options.output / "programs_held_out.jsonl", program_tasks(Split.HELD_OUT))
    write(options.output / "rules.jsonl", rule_tasks(options.seed + 2, Split.TRAIN, options.rules))
    write(options.output / "rules_held_out.jsonl", rule_tasks(options.seed + 3, Split.HELD_OUT, options.held_out))


if __name__ == "__main__":
    main()
