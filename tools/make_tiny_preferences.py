"""Write pairs of replies of a small model to arithmetic problems: of each problem a right one and a wrong one.

python tools/make_tiny_preferences.py out/tiny-preferences --count 1200 --held-out 200

Makes OUT/train.jsonl and OUT/held_out.jsonl, as `qwq-jax dpo` and `qwq-jax reward-model` read them. Replies are drawn
by the model itself, the embedded one unless another is given (and OUT/checkpoint, if it had to be converted); problems
that it solves always or never give no pair.
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

from qwq_jax.chat import ChatTokenizer
from qwq_jax.checkpoint.store import MARKER
from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.embedded import TINY_REASONER
from qwq_jax.engine.engine import Engine
from qwq_jax.engine.request import Request
from qwq_jax.jobs.convert import convert
from qwq_jax.jobs.demo import LEVELS
from qwq_jax.rl.rewards.arithmetic import Problem, Split, is_correct, problems

ENGINE = EngineConfig(max_sequences=64, page_size=32, max_context=256, compute_dtype="float32")
MAX_TOKENS = 160


def draw(checkpoint: str, asked: list[Problem], *, samples: int, seed: int) -> Iterator[tuple[int, str]]:
    """Whole replies, each with the number of its problem, in the order of both."""
    tokenizer = ChatTokenizer.from_directory(checkpoint)
    params = SamplingParams(temperature=1.0, max_tokens=MAX_TOKENS, n=samples)
    requests = [
        Request(str(i), tuple(tokenizer.apply_template(problem.messages()[:1])), params)
        for i, problem in enumerate(asked)
    ]
    engine = Engine.from_checkpoint(checkpoint, config=ENGINE, run_seed=seed)
    ended = (completion for completion in engine.generate(requests) if completion.stop_token_id is not None)
    for completion in sorted(ended, key=lambda each: (int(each.request_id), each.index)):
        yield int(completion.request_id), tokenizer.decode(completion.token_ids)


def pairs(asked: list[Problem], replies: Iterator[tuple[int, str]], *, split: Split) -> Iterator[dict]:
    """The lines of one file."""
    rng = random.Random(0)
    for index, group in itertools.groupby(replies, key=lambda reply: reply[0]):
        problem, sides = asked[index], {True: [], False: []}
        for _, text in group:
            if text.count("</think>") == 1:
                sides[is_correct(text, problem.answer)].append(text)
        if sides[True] and sides[False]:
            yield {
                "id": f"{split.value}-{index:05d}",
                "prompt": problem.question,
                "chosen": rng.choice(sides[True]),
                "rejected": rng.choice(sides[False]),
            }


def main() -> None:
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(description="Draw pairs of right and wrong replies from the embedded model.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default=str(TINY_REASONER), help="draws the replies; the embedded one unless given")
    parser.add_argument("--count", type=int, default=1200, help="problems to train on")
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--samples", type=int, default=6, help="replies to each")
    parser.add_argument("--seed", type=int, default=21)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    checkpoint = options.model
    if not (Path(checkpoint) / MARKER).exists():
        checkpoint = str(options.output / "checkpoint")
        convert(options.model, checkpoint)
    for name, split, count in (
        ("train", Split.TRAIN, options.count),
        ("held_out", Split.HELD_OUT, options.held_out),
    ):
        asked = list(itertools.islice(problems(options.seed, split=split, levels=LEVELS), count))
        replies = draw(checkpoint, asked, samples=options.samples, seed=options.seed)
        lines = list(pairs(asked, replies, split=split))
        path = options.output / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        print(f"{len(lines)} pairs of {count} problems -> {path}")


if __name__ == "__main__":
    main()
