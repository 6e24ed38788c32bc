"""Completions, groups, an engine and a judge that say what a test wants them to: the loop without devices."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from qwq_jax.engine.engine import StepOutput
from qwq_jax.engine.request import Completion, FinishReason, Request, TokenLogprob
from qwq_jax.rl.prompts import Prompt
from qwq_jax.rl.rewards.graded import Graded
from qwq_jax.rl.rollout import Group, Sample
from qwq_jax.rl.types import Reply, Score, Task

END = 2


class Letters:
    """A tokenizer of letters: token 97 is "a"; the end token is no text."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids if i > END)


def make_prompt(number: int, tokens: Sequence[int] = (65, 66), difficulty: float | None = None) -> Prompt:
    task = Task(f"t{number}", ({"role": "user", "content": str(number)},), "letters", {"answer": "a"}, difficulty)
    return Prompt(task, tuple(tokens))


def make_completion(
    tokens: Sequence[int], *, name: str = "0", index: int = 0, forced: Sequence[int] = ()
) -> Completion:
    """Tokens with a log-probability each; cut off unless they end with the end token."""
    ended = tokens[-1] == END
    return Completion(
        name,
        index,
        tuple(tokens),
        FinishReason.STOP if ended else FinishReason.LENGTH,
        stop_token_id=END if ended else None,
        logprobs=tuple(TokenLogprob(token, -0.01 * (i + 1) - index) for i, token in enumerate(tokens)),
        forced=tuple(forced),
    )


def make_sample(
    tokens: Sequence[int],
    value: float,
    *,
    index: int = 0,
    forced: Sequence[int] = (),
    correct: bool | None = None,
    parts: Mapping[str, Score] | None = None,
    failed: tuple[str, ...] = (),
) -> Sample:
    completion = make_completion(tokens, index=index, forced=forced)
    text = Letters().decode(tokens)
    reply = Reply(text, None, text, len(tokens), truncated=completion.stop_token_id is None)
    return Sample(completion, reply, Graded(value, correct, parts or {}, failed))


def make_group(number: int, *samples: Sample, prompt: Sequence[int] = (65, 66)) -> Group:
    return Group(make_prompt(number, prompt), samples)


def random_groups(
    seed: int, *, groups: int = 6, size: int = 4, vocabulary: int = 100, longest: int = 12
) -> list[Group]:
    """Ragged completions of ragged prompts: some cut off, some with tokens that were put in, one group all alike."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(groups):
        samples = []
        for index in range(size):
            length = int(rng.integers(2, longest))
            tokens = rng.integers(END + 1, vocabulary, length).tolist()
            if rng.random() < 0.7:
                tokens[-1] = END
            forced = [1] if length > 5 and rng.random() < 0.3 else []
            value = 0.7 if number == groups - 1 else float(rng.choice([0.0, 0.3, 0.7, 1.0]))
            samples.append(make_sample(tokens, value, index=index, forced=forced))
        prompt = rng.integers(END + 1, vocabulary, int(rng.integers(1, 6))).tolist()
        made.append(make_group(number, *samples, prompt=prompt))
    return made


class ScriptedEngine:
    """Answers with `tokens(request_id, index)`, the last request first, one completion a step."""

    def __init__(self, tokens: Callable[[str, int], Sequence[int]]) -> None:
        self._tokens = tokens
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.steps = 0

    def run(self, requests: Iterable[Request]) -> Iterator[StepOutput]:
        pending = list(requests)
        self.requests += pending
        for request in reversed(pending):
            for index in reversed(range(request.params.n)):
                self.steps += 1
                tokens = self._tokens(request.request_id, index)
                yield StepOutput(completions=(make_completion(tokens, name=request.request_id, index=index),))

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)


class ScriptedJudge:
    """Scores with `value(task_id, reply)`; claims are numbers in the order of submission."""

    def __init__(self, value: Callable[[str, Reply], float]) -> None:
        self._value = value
        self.submitted: list[Graded] = []
        self.steps_at: list[int] = []
        self.engine: ScriptedEngine | None = None

    def submit(self, prompt: Prompt, completion: Completion, reply: Reply) -> int:
        self.submitted.append(Graded(self._value(prompt.task.task_id, reply), None))
        self.steps_at.append(0 if self.engine is None else self.engine.steps)
        return len(self.submitted) - 1

    def results(self, claims: Sequence[int]) -> list[Graded]:
        return [self.submitted[claim] for claim in claims]
