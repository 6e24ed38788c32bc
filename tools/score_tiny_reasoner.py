"""Share of held-out problems that a checkpoint solves, with its standard error.

python -m tools.score_tiny_reasoner CHECKPOINT [--count 512] [--seed 3] [--samples 1] [--temperature 0.6]
    [--weights int8] [--activations int8] [--cache-dtype int8]
"""

import argparse
import itertools
import math
from dataclasses import dataclass

from qwq_jax.chat import ChatTokenizer
from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.engine.engine import Engine
from qwq_jax.engine.request import Request
from qwq_jax.jobs.demo import LEVELS
from qwq_jax.rl.rewards.arithmetic import Problem, Split, is_correct, problems

ENGINE = EngineConfig(max_sequences=64, page_size=32, max_context=256, compute_dtype="float32")


@dataclass(frozen=True)
class Score:
    """How many problems were solved.

    Attributes:
        problems: What was asked.
        marks: Of each problem, which samples were right.
        mean_length: Tokens of a completion.
    """

    problems: list[Problem]
    marks: list[list[bool]]
    mean_length: float

    @property
    def shares(self) -> list[float]:
        """Part of the samples of each problem that were right."""
        return [sum(marks) / len(marks) for marks in self.marks]

    @property
    def pass_at_1(self) -> float:
        """Chance that one sample solves a problem."""
        return sum(self.shares) / len(self.shares)


def score(
    checkpoint: str,
    count: int,
    *,
    seed: int = 3,
    samples: int = 1,
    temperature: float = 0.6,
    config: EngineConfig = ENGINE,
) -> Score:
    """Samples answers to held-out problems of the levels it was trained on, and marks them."""
    tokenizer = ChatTokenizer.from_directory(checkpoint)
    asked = list(itertools.islice(problems(seed, split=Split.HELD_OUT, levels=LEVELS), count))
    params = SamplingParams(temperature=temperature, top_p=0.95, max_tokens=160, n=samples)
    requests = [
        Request(str(i), tuple(tokenizer.apply_template(problem.messages()[:1])), params)
        for i, problem in enumerate(asked)
    ]
    engine = Engine.from_checkpoint(checkpoint, mesh=MeshConfig(), config=config)
    marks: list[list[bool]] = [[] for _ in asked]
    lengths = []
    for completion in engine.generate(requests):
        index = int(completion.request_id)
        marks[index].append(is_correct(tokenizer.decode(completion.token_ids), asked[index].answer))
        lengths.append(len(completion.token_ids))
    return Score(asked, marks, sum(lengths) / len(lengths))


def main() -> None:
    """Prints pass@1 and, for several samples, the share solved at least once."""
    parser = argparse.ArgumentParser(description="Score a checkpoint on held-out arithmetic.")
    parser.add_argument("checkpoint")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--seed", type=int, default=3, help="of the problems")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--weights", help="such as int8; see qwq_jax.config.weights")
    parser.add_argument("--activations", choices=["int8"])
    parser.add_argument("--cache-dtype")
    args = parser.parse_args()
    formats = {"weights": args.weights, "activations": args.activations, "cache_dtype": args.cache_dtype}
    result = score(
        args.checkpoint,
        args.count,
        seed=args.seed,
        samples=args.samples,
        temperature=args.temperature,
        config=EngineConfig(**{**ENGINE.model_dump(), **formats}),
    )
    shares, mean = result.shares, result.pass_at_1
    error = math.sqrt(sum((share - mean) ** 2 for share in shares)) / len(shares)
    print(f"pass@1 {mean:.3f} +- {error:.3f} ({len(shares)} problems, {args.samples} samples each)")
    if args.samples > 1:
        print(f"solved at least once in {args.samples}: {sum(map(any, result.marks)) / len(shares):.3f}")
    for level in LEVELS:
        of_level = [share for share, problem in zip(shares, result.problems, strict=True) if problem.level == level]
        print(f"level {level}: {sum(of_level) / len(of_level):.3f} of {len(of_level)}")
    print(f"mean length {result.mean_length:.0f} tokens")


if __name__ == "__main__":
    main()
