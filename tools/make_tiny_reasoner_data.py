"""Write chat-format JSONL of arithmetic problems with worked solutions, for training and for held-out evaluation.

python tools/make_tiny_reasoner_data.py out/tiny-reasoner/train.jsonl --count 60000 --seed 1
python tools/make_tiny_reasoner_data.py out/tiny-reasoner/held_out.jsonl --count 512 --seed 2 --split held-out

Each line: {"custom_id": "train-00000", "messages": [user, assistant], "answer": 432, "level": 2}. No expression of one
split ever appears in the other, whatever the seeds.
"""

import argparse
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

from qwq_jax.rl.rewards import arithmetic
from qwq_jax.rl.rewards.arithmetic import Split


def records(count: int, *, seed: int, split: Split, levels: tuple[int, ...]) -> Iterator[dict]:
    """The lines of one file; a held-out file repeats no problem."""
    stream = arithmetic.problems(seed, split=split, levels=levels)
    if split is Split.HELD_OUT:
        stream = _without_repeats(stream)
    for index, problem in enumerate(itertools.islice(stream, count)):
        yield {
            "custom_id": f"{split.value}-{index:05d}",
            "messages": problem.messages(),
            "answer": problem.answer,
            "level": problem.level,
        }


def _without_repeats(stream: Iterator[arithmetic.Problem]) -> Iterator[arithmetic.Problem]:
    seen: set[str] = set()
    for problem in stream:
        if problem.expression not in seen:
            seen.add(problem.expression)
            yield problem


def main() -> None:
    """Parse the command line and write the file, complete or not at all."""
    parser = argparse.ArgumentParser(description="Write worked arithmetic problems as chat JSONL.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--split", type=Split, choices=list(Split), default=Split.TRAIN)
    parser.add_argument("--levels", type=int, nargs="+", choices=arithmetic.LEVELS, default=list(arithmetic.LEVELS))
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    partial = options.output.with_name(options.output.name + ".tmp")
    with partial.open("w", encoding="utf-8") as file:
        for record in records(options.count, seed=options.seed, split=options.split, levels=tuple(options.levels)):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(partial, options.output)
    print(f"{options.count} {options.split.value} problems -> {options.output}")


if __name__ == "__main__":
    main()
