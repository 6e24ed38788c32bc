"""Accuracy against the thinking budget, on the embedded model: held-out problems, greedy.

    python -m tools.bench_thinking_budget --write docs/benchmarks/thinking_budget.md
    python -m tools.bench_thinking_budget --count 32 --budgets 8 32 --least 16

Each budget is `max_thinking_tokens` of a request that goes the way of a batch line; three texts that close the thoughts
are compared. Exits with 1 unless every request ends within its budget with an answer (see `complaints`).
"""

import argparse
import itertools
import math
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwq_jax.chat import THINK_CLOSE, ChatTokenizer
from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.embedded import TINY_REASONER
from qwq_jax.engine.engine import Engine
from qwq_jax.engine.request import Completion, Request
from qwq_jax.jobs.answer import chat_prompt, choice_of, hooks_of, request_from_ids
from qwq_jax.jobs.batch_file import Choice
from qwq_jax.jobs.convert import convert
from qwq_jax.jobs.demo import LEVELS
from qwq_jax.rl.rewards.arithmetic import Problem, Split, answer, is_correct, problems
from qwq_jax.runtime import start

ENGINE = EngineConfig(max_sequences=64, page_size=32, max_context=256, compute_dtype="float32")
SEED = 3  # of the problems, as in `score_tiny_reasoner`
MAX_TOKENS = 192
BUDGETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96)
LEAST = (16, 32, 48, 64)
# What closes or lengthens the thoughts; None is what every request gets.
CLOSINGS = {
    "shipped": None,
    "bare": f"\n{THINK_CLOSE}\n\n",
    "box": f"\n{THINK_CLOSE}\n\nThe answer is \\boxed{{",
}
CONTINUATIONS = {"shipped": None, "so": "so"}


@dataclass(frozen=True)
class Point:
    """One setting.

    Attributes:
        most: `max_thinking_tokens`; None: no bound.
        least: `min_thinking_tokens`.
        closing: Name in `CLOSINGS`.
        continuation: Name in `CONTINUATIONS`.
    """

    most: int | None = None
    least: int = 0
    closing: str = "shipped"
    continuation: str = "shipped"


@dataclass(frozen=True)
class Answered:
    """A problem, what was asked of the engine, and what came back: as tokens, and as users get it."""

    problem: Problem
    request: Request
    completion: Completion
    choice: Choice

    @property
    def text(self) -> str:
        """Thoughts and answer, for the verifier; without the closing tag there is no answer."""
        return f"<think>{self.choice.reasoning_content or ''}{THINK_CLOSE}{self.choice.content}"

    @property
    def right(self) -> bool:
        """Whether the boxed answer is the true one."""
        return is_correct(self.text, self.problem.answer)


@dataclass(frozen=True)
class Result:
    """A setting and its answers, by problem."""

    point: Point
    answers: list[Answered]

    def share(self, marks: Iterable[bool]) -> float:
        """Part of the answers."""
        return sum(marks) / len(self.answers)


class Bench:
    """Problems, the engine that answers them, and the tokenizer in between."""

    def __init__(self, checkpoint: Path, count: int, config: EngineConfig = ENGINE) -> None:
        self.tokenizer = ChatTokenizer.from_directory(str(checkpoint))
        self.engine = Engine.from_checkpoint(str(checkpoint), mesh=MeshConfig(), config=config)
        self.problems = distinct_problems(count)
        self.close = self.tokenizer.encode(THINK_CLOSE)[0]

    def request(self, index: int, point: Point) -> Request:
        """A problem as a request, as the jobs make it; only the closing and the continuation may be others."""
        params = SamplingParams(
            temperature=0, max_tokens=MAX_TOKENS, max_thinking_tokens=point.most, min_thinking_tokens=point.least
        )
        prompt = chat_prompt(self.problems[index].messages()[:1], None, self.tokenizer)
        request = request_from_ids(str(index), params, prompt, self.tokenizer)
        closing, continuation = CLOSINGS[point.closing], CONTINUATIONS[point.continuation]
        if request.thinking is None:
            return request
        marks = request.thinking
        if closing is not None:
            marks = replace(marks, closing=tuple(self.tokenizer.encode(closing)))
        if continuation is not None:
            marks = replace(marks, continuation=tuple(self.tokenizer.encode(continuation)))
        return replace(request, thinking=marks)

    def answers(self, point: Point) -> Result:
        """Answers all problems."""
        requests = [self.request(index, point) for index in range(len(self.problems))]
        found = {}
        for completion in self.engine.generate(requests, lambda request: hooks_of(self.tokenizer, request)):
            index = int(completion.request_id)
            choice = choice_of(completion, requests[index], self.tokenizer)
            found[index] = Answered(self.problems[index], requests[index], completion, choice)
        return Result(point, [found[index] for index in range(len(self.problems))])


def distinct_problems(count: int) -> list[Problem]:
    """Held-out problems of the levels that the model was trained on, no expression twice."""
    seen: dict[str, Problem] = {}
    stream = problems(SEED, split=Split.HELD_OUT, levels=LEVELS)
    while len(seen) < count:
        problem = next(stream)
        seen.setdefault(problem.expression, problem)
    return list(seen.values())


def closed_at(answered: Answered, close: int) -> tuple[int, bool] | None:
    """Tokens of the thoughts, what closes them left out, and whether it was put in; None: they were never closed."""
    completion, marks = answered.completion, answered.request.thinking
    if close not in completion.token_ids:
        return None
    at = completion.token_ids.index(close)
    if marks is None or at not in completion.forced:
        return at, False
    return at - marks.closing.index(close), True


def complaints(answered: Answered, close: int, *, ends: bool = True) -> list[str]:
    """What is wrong with one completion.

    Thoughts that are bounded are closed, hold at most `max_thinking_tokens` tokens (exactly so many where the closing
    was put in, which then stands there whole), and are followed by an answer that is not empty and, where `ends` asks
    for it, ends by itself. Thoughts that close by themselves hold at least `min_thinking_tokens`.
    """
    params, completion, choice = answered.request.params, answered.completion, answered.choice
    most, marks = params.max_thinking_tokens, answered.request.thinking
    closed, found = closed_at(answered, close), []
    if closed is not None and not closed[1] and closed[0] < params.min_thinking_tokens:
        found.append(f"thoughts of {closed[0]} tokens are shorter than {params.min_thinking_tokens}")
    if most is not None:
        assert marks is not None, "the thoughts of the request are bounded"
        if closed is None:
            found.append("its thoughts are never closed")
        else:
            length, forced = closed
            put_in = range(length, length + len(marks.closing))
            if length > most:
                found.append(f"thoughts of {length} tokens are longer than {most}")
            if forced and length < most:
                found.append(f"thoughts were closed at {length} tokens, before {most}")
            if forced and completion.token_ids[length : put_in.stop] != marks.closing:
                found.append("the closing is not whole")
            if forced and not set(put_in) <= set(completion.forced):
                found.append("the closing is not said to be put in")
        if not choice.content.strip():
            found.append("the answer is empty")
        if ends and completion.finish_reason.value != "stop":
            found.append(f"the answer does not end: finish_reason {completion.finish_reason.value}")
    return [f"problem {completion.request_id}, {most=}: {sentence}" for sentence in found]


def unlike(bounded: Result, free: Result, close: int) -> list[str]:
    """Where a budget changed what was drawn before it was spent, compared with thoughts that have none."""
    found = []
    for ours, theirs in zip(bounded.answers, free.answers, strict=True):
        closed, tokens = closed_at(ours, close), ours.completion.token_ids
        same = tokens[: closed[0]] if closed is not None and closed[1] else tokens
        if theirs.completion.token_ids[: len(same)] != same:
            found.append(f"problem {ours.completion.request_id}, {bounded.point}: other tokens within the budget")
    return found


def interval(right: int, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson, 1927)."""
    z = 1.959964
    middle, scale = right + z * z / 2, count + z * z
    half = z * math.sqrt(right * (count - right) / count + z * z / 4)
    return (middle - half) / scale, (middle + half) / scale


def measure(
    bench: Bench, budgets: Sequence[int], least: Sequence[int], closings: Iterable[str] = CLOSINGS
) -> tuple[list[Result], list[str]]:
    """All settings, the one without bounds first, and what is wrong with their answers."""
    points = [Point(most, closing=closing) for closing, most in itertools.product(closings, budgets)]
    points += [Point(least=few, continuation=name) for name, few in itertools.product(CONTINUATIONS, least)]
    results, found = [bench.answers(Point())], []
    for point in points:
        result = bench.answers(point)
        print(point, f"{result.share(each.right for each in result.answers):.3f}", flush=True)
        # Where another text than users get makes the model talk without end, that is counted and no complaint.
        ends = CLOSINGS[point.closing] is None
        found += [sentence for each in result.answers for sentence in complaints(each, bench.close, ends=ends)]
        if not point.least:
            found += unlike(result, results[0], bench.close)
        results.append(result)
    return results, found


HEADER = (
    "| tokens | accuracy | 95 % interval | closed by force | of these right | boxed a number | ended by itself "
    "| mean length |\n|---|---|---|---|---|---|---|---|"
)
INTRODUCTION = """# Accuracy against the thinking budget

    python -m tools.bench_thinking_budget --write docs/benchmarks/thinking_budget.md

{count} distinct held-out problems, the embedded model, greedy, float32, `max_tokens` {max_tokens}. Does every
bounded request end within `max_thinking_tokens`, its thoughts closed, with an answer that is not empty and ends by
itself? Each is checked: {kept}.
Until its budget is spent each draws the same tokens as without one, which is checked too. What closes the thoughts,
drawn or put in, is not counted in the budget.

Left alone, half of the thoughts take at most {median} tokens, the longest {longest}. This model works digit by digit
and names its result in the last line, so thoughts cut short know no result: accuracy grows with the share of thoughts
that end in time, and what follows a forced closing is mostly a wrong guess.

Of three texts that close the thoughts, `shipped` is what every request gets. This model never saw such words and often
boxes no number after them where little was thought; the other two are as in its training, and `box` also begins the
answer. That says nothing of models that read English. The problems are the same in all rows. Intervals are Wilson's.
"""


def row(result: Result, bench: Bench) -> str:
    """A line of a table."""
    answers, point = result.answers, result.point
    forced = [each for each in answers if (closed := closed_at(each, bench.close)) is not None and closed[1]]
    right = sum(each.right for each in answers)
    low, high = interval(right, len(answers))
    cells = [
        str(point.least or point.most or "unbounded"),
        f"{right / len(answers):.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{len(forced) / len(answers):.1%}",
        f"{sum(each.right for each in forced)} of {len(forced)}" if forced else "",
        f"{result.share(answer(each.text) is not None for each in answers):.1%}",
        f"{result.share(each.completion.finish_reason.value == 'stop' for each in answers):.1%}",
        f"{sum(len(each.completion.token_ids) for each in answers) / len(answers):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def page(results: list[Result], found: list[str], bench: Bench, plot: str) -> str:
    """The page."""
    free, bounded = results[0], [result for result in results if result.point.most is not None]
    total = sum(len(result.answers) for result in bounded)
    kept = f"all {total:,} do" if not found else f"{len(found)} complaints in {total:,} requests"
    others = [each for result in bounded if result.point.closing != "shipped" for each in result.answers]
    endless = sum(each.completion.finish_reason.value != "stop" for each in others)
    if endless:
        kept += f", but for {endless} of the {len(others):,}\n"
        kept += "with another closing than the shipped one, whose answers run on"
    lengths = sorted(closed[0] for each in free.answers if (closed := closed_at(each, bench.close)) is not None)
    introduction = INTRODUCTION.format(
        count=len(free.answers),
        max_tokens=MAX_TOKENS,
        kept=kept,
        median=lengths[(len(lengths) - 1) // 2],
        longest=lengths[-1],
    )
    parts = [introduction + f"\n![accuracy against max_thinking_tokens]({plot})"]
    for name in CLOSINGS:
        rows = [result for result in bounded if result.point.closing == name]
        parts.append(f"## max_thinking_tokens, closing: {name}\n\n{described(bench, rows, closing=True)}")
        parts.append("\n".join([HEADER, *(row(result, bench) for result in [*rows, free])]))
    for name in CONTINUATIONS:
        rows = [result for result in results if result.point.least and result.point.continuation == name]
        parts.append(f"## min_thinking_tokens, continuation: {name}\n\n{described(bench, rows, closing=False)}")
        parts.append("\n".join([HEADER, *(row(result, bench) for result in rows)]))
    return "\n\n".join(parts) + "\n"


def described(bench: Bench, rows: list[Result], *, closing: bool) -> str:
    """What is put in, in words and tokens, and what became of it."""
    if not rows:
        return "Not measured."
    marks = rows[0].answers[0].request.thinking
    assert marks is not None, "the thoughts of the request are bounded"
    tokens = marks.closing if closing else marks.continuation
    text = bench.tokenizer.decode(tokens, skip_special_tokens=False)
    touched = [each for result in rows for each in result.answers if each.completion.forced]
    boxed = sum(answer(each.text) is not None for each in touched)
    what = "Closed by force" if closing else "Lengthened"
    return (
        f"`{text!r}`, {len(tokens)} tokens. {what}: {len(touched):,} completions in all, of which {boxed:,} box a "
        f"number and\n{sum(each.right for each in touched):,} are right."
    )


def svg(results: list[Result]) -> str:
    """Accuracy over the budget, logarithmic, a line a closing with its intervals; dashed: without a budget."""
    bounded = [result for result in results if result.point.most is not None]
    most = max(result.point.most or 1 for result in bounded)
    left, top, width, height = 50, 24, 480, 240
    across = lambda tokens: left + width * math.log2(tokens) / math.log2(max(most, 2))  # noqa: E731
    down = lambda share: top + height * (1 - share / 0.6)  # noqa: E731
    body = []
    for share in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        y = down(share)
        body.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        body.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{share:.1f}</text>')
    for tokens in sorted({result.point.most or 1 for result in bounded}):
        body.append(f'<text x="{across(tokens):.1f}" y="{top + height + 16}" text-anchor="middle">{tokens}</text>')
    for at, (name, color) in enumerate(zip(CLOSINGS, ("#c64", "#59c", "#2a7"), strict=True)):
        places = []
        for result in (result for result in bounded if result.point.closing == name):
            right = sum(each.right for each in result.answers)
            x = across(result.point.most or 1) + 3 * (at - 1)
            low, high = (down(share) for share in interval(right, len(result.answers)))
            places.append(f"{x:.1f},{down(right / len(result.answers)):.1f}")
            body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{color}"/>')
        body.append(f'<polyline points="{" ".join(places)}" fill="none" stroke="{color}" stroke-width="2"/>')
        body.append(f'<text x="{left + 12}" y="{top + 40 + 16 * at}" fill="{color}">closing: {name}</text>')
    y = down(results[0].share(each.right for each in results[0].answers))
    body.append(
        f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#555" stroke-dasharray="4 3"/>'
    )
    body.append(f'<text x="{left + 12}" y="{y - 4:.1f}" fill="#555">unbounded</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 30}" height="{top + height + 28}" '
        'font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" fill="white"/>\n'
        f'<text x="{left}" y="14">accuracy against max_thinking_tokens, 95 % intervals</text>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def main() -> None:
    """Measures, writes or prints the page, and fails if a request broke its budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=512, help="problems")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--least", type=int, nargs="*", default=LEAST, help="points of min_thinking_tokens")
    parser.add_argument("--write", type=Path, help="a markdown file; its plot is put beside it")
    options = parser.parse_args()
    start()
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = Path(temporary) / "checkpoint"
        convert(str(TINY_REASONER), str(checkpoint))
        bench = Bench(checkpoint, options.count)
        results, found = measure(bench, options.budgets, options.least)
    plot = (options.write or Path("thinking_budget.md")).with_suffix(".svg")
    text = page(results, found, bench, plot.name)
    print(text)
    if options.write:
        options.write.write_text(text)
        plot.write_text(svg(results))
    if found:
        sys.exit("\n".join(found[:20]))


if __name__ == "__main__":
    main()
