"""Groups of completions with their scores: the engine draws, worker processes judge while it does."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from qwq_jax.chat import ChatTokenizer
from qwq_jax.config.rl import RolloutConfig
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.engine.engine import Engine
from qwq_jax.engine.request import Completion, Request
from qwq_jax.rl.advantage import is_informative
from qwq_jax.rl.prompts import Prompt, PromptOrder
from qwq_jax.rl.replies import reply_of
from qwq_jax.rl.rewards.graded import Graded
from qwq_jax.rl.types import Reply


class Judge(Protocol):
    """Judges replies while the devices go on."""

    def submit(self, prompt: Prompt, completion: Completion, reply: Reply) -> Any:
        """Takes a reply; what it returns is a claim to the result."""
        ...

    def results(self, claims: Sequence[Any]) -> list[Graded]:
        """Waits for the results, in the order of the claims."""
        ...


@dataclass(frozen=True)
class Sample:
    """One completion.

    Attributes:
        completion: Tokens, and their log-probabilities at the temperature of the rollout.
        reply: Its text.
        graded: What it is worth.
    """

    completion: Completion
    reply: Reply
    graded: Graded

    @property
    def logprobs(self) -> np.ndarray:
        """float32 `[n]`, of each token by the engine."""
        assert self.completion.logprobs is not None
        return np.array([entry.logprob for entry in self.completion.logprobs], np.float32)

    @property
    def drawn(self) -> np.ndarray:
        """Bool `[n]`: tokens that were put in rather than drawn teach nothing."""
        drawn = np.ones(len(self.completion.token_ids), np.bool_)
        drawn[list(self.completion.forced)] = False
        return drawn


@dataclass(frozen=True)
class Group:
    """The completions of one prompt, by their index."""

    prompt: Prompt
    samples: tuple[Sample, ...]

    @property
    def rewards(self) -> list[float]:
        """One a completion."""
        return [sample.graded.value for sample in self.samples]


@dataclass(frozen=True)
class Batch:
    """What one step is trained on.

    Attributes:
        groups: In the order of the prompts.
        cursor: The number of the next prompt.
        drawn_groups: Groups drawn for it, those dropped as uninformative included.
        tokens: Tokens drawn for it.
        seconds: By phase: ``rollout`` until the last token, ``reward`` the wait for the last score after that.
    """

    groups: tuple[Group, ...]
    cursor: int
    drawn_groups: int
    tokens: int
    seconds: Mapping[str, float]


class Rollouts:
    """Draws batches.

    Args:
        engine: Holds the weights of the policy.
        tokenizer: Of the policy.
        judge: The rewards.
        config: Sizes, lengths and temperature.
    """

    def __init__(self, engine: Engine, tokenizer: ChatTokenizer, judge: Judge, config: RolloutConfig) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._judge = judge
        self._config = config

    def batch(
        self,
        order: PromptOrder,
        cursor: int,
        *,
        step: int,
        refill: bool,
        stopping: Callable[[], bool] = lambda: False,
    ) -> Batch | None:
        """The batch of a step: a pure function of weights, order, cursor and step.

        With `refill`, groups of equal rewards are dropped and others drawn in their place (DAPO, arXiv 2503.14476,
        section 3.2), a few times at most. Should all be uninformative even then, those of the last draw are returned.

        Args:
            order: The prompts.
            cursor: The number of the first.
            step: Gives the samples their seeds.
            refill: Whether uninformative groups are replaced.
            stopping: Asked after each step of the engine; then there is no batch, and nothing has changed.
        """
        wanted, groups, last = self._config.prompts_per_step, [], []
        begin, seconds, tokens = cursor, {"rollout": 0.0, "reward": 0.0}, 0
        for _ in range(1 + (self._config.max_refills if refill else 0)):
            numbers = range(cursor, cursor + wanted - len(groups))
            found = self.draw([(f"{step}/{number}", order[number]) for number in numbers], seconds, stopping)
            if found is None:
                return None
            last, cursor = found, numbers.stop
            tokens += sum(len(sample.completion.token_ids) for group in found for sample in group.samples)
            groups += [group for group in found if not refill or is_informative(group.rewards)]
            if len(groups) == wanted:
                break
        return Batch(tuple(groups or last), cursor, cursor - begin, tokens, seconds)

    def draw(
        self,
        prompts: Sequence[tuple[str, Prompt]],
        seconds: dict[str, float],
        stopping: Callable[[], bool] = lambda: False,
        *,
        params: SamplingParams | None = None,
    ) -> list[Group] | None:
        """Completions of named prompts, judged; None if `stopping` said so. Adds to `seconds` what each phase took.

        The names, with the engine's `run_seed`, seed the samples.
        """
        params = params or SamplingParams(
            temperature=self._config.temperature,
            max_tokens=self._config.max_tokens,
            n=self._config.group_size,
            logprobs=True,
        )
        named = dict(prompts)
        begun = time.perf_counter()
        found: dict[tuple[str, int], tuple[Completion, Reply, Any]] = {}
        for completion in self._completions(named, params, stopping):
            if completion is None:
                return None
            prompt = named[completion.request_id]
            reply = reply_of(completion, prompt.token_ids, self._tokenizer)
            claim = self._judge.submit(prompt, completion, reply)
            found[completion.request_id, completion.index] = completion, reply, claim
        drawn = time.perf_counter()
        keys = [(name, index) for name, _ in prompts for index in range(params.n)]
        graded = self._judge.results([found[key][2] for key in keys])
        samples = [Sample(*found[key][:2], each) for key, each in zip(keys, graded, strict=True)]
        seconds["rollout"] = seconds.get("rollout", 0.0) + drawn - begun
        seconds["reward"] = seconds.get("reward", 0.0) + time.perf_counter() - drawn
        return [
            Group(prompt, tuple(samples[i * params.n : (i + 1) * params.n])) for i, (_, prompt) in enumerate(prompts)
        ]

    def _completions(
        self, named: Mapping[str, Prompt], params: SamplingParams, stopping: Callable[[], bool]
    ) -> Iterator[Completion | None]:
        requests = [Request(name, prompt.token_ids, params) for name, prompt in named.items()]
        for output in self._engine.run(requests):
            if stopping():
                for request in requests:
                    self._engine.cancel(request.request_id)
                yield None
                return
            yield from output.completions
