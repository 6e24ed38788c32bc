"""Share of held-out problems that a checkpoint solves, with its standard error.

python -m tools.score_tiny_reasoner CHECKPOINT [--count 512] [--seed 3] [--samples 1] [--temperature 0.6]
"""

import argparse
import itertools
import math
from collections import defaultdict

from qwq_jax.chat import ChatTokenizer
from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.engine.engine import Engine
from qwq_jax.engine.request import Request
from qwq_jax.jobs.demo import LEVELS
from qwq_jax.rl.rewards.arithmetic import Split, is_correct, problems

ENGINE = EngineConfig(max_sequences=64, page_size=32, max_context=256, compute_dtype="float32")


def main() -> None:
    """Samples, marks and prints pass@1 and, for several samples, the share solved at least once."""
    parser = argparse.ArgumentParser(description="Score a checkpoint on held-out arithmetic.")
    parser.add_argument("checkpoint")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--seed", type=int, default=3, help="of the problems")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.6)
    args = parser.parse_args()
    tokenizer = ChatTokenizer.from_directory(args.checkpoint)
    asked = list(itertools.islice(problems(args.seed, split=Split.HELD_OUT, levels=LEVELS), args.count))
    params = SamplingParams(temperature=args.temperature, top_p=0.95, max_tokens=160, n=args.samples)
    requests = [
        Request(str(i), tuple(tokenizer.apply_template(problem.messages()[:1])), params)
        for i, problem in enumerate(asked)
    ]
    engine = Engine.from_checkpoint(args.checkpoint, mesh=MeshConfig(), config=ENGINE)
    solved: defaultdict[int, list[bool]] = defaultdict(list)
    lengths = []
    for completion in engine.generate(requests):
        index = int(completion.request_id)
        solved[index].append(is_correct(tokenizer.decode(completion.token_ids), asked[index].answer))
        lengths.append(len(completion.token_ids))
    shares = [sum(marks) / len(marks) for marks in solved.values()]
    mean = sum(shares) / len(shares)
    error = math.sqrt(sum((share - mean) ** 2 for share in shares)) / len(shares)
    print(f"pass@1 {mean:.3f} +- {error:.3f} ({len(shares)} problems, {args.samples} samples each)")
    if args.samples > 1:
        print(f"solved at least once in {args.samples}: {sum(map(any, solved.values())) / len(shares):.3f}")
    for level in LEVELS:
        marks = [share for index, share in zip(solved, shares, strict=True) if asked[index].level == level]
        print(f"level {level}: {sum(marks) / len(marks):.3f} of {len(marks)}")
    print(f"mean length {sum(lengths) / len(lengths):.0f} tokens")


if __name__ == "__main__":
    main()
