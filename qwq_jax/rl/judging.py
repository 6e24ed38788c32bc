"""The rewards of a run: those of worker processes, shared out between the hosts, and reward models on the devices."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from qwq_jax.chat import THINK_CLOSE, ChatTokenizer
from qwq_jax.config.rewards import RewardModelConfig, VerifierConfig, reward_name
from qwq_jax.engine.request import Completion
from qwq_jax.rl.prompts import Prompt
from qwq_jax.rl.replies import opens_thinking
from qwq_jax.rl.rewards.graded import Graded, judges, with_values
from qwq_jax.rl.rewards.pool import RewardPool
from qwq_jax.rl.types import Reply, Score

# Thoughts that end before they begin.
_CLOSING = f"\n{THINK_CLOSE}\n\n"


class ModelScorer(Protocol):
    """A reward model on the devices."""

    def scores(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> np.ndarray:
        """Float32 ``[N]``, of pairs of prompt and reply, as token ids."""
        ...


@dataclass(frozen=True)
class Claim:
    """A reply that is being judged; its future is with the process that judges it."""

    prompt: Prompt
    completion: Completion
    reply: Reply
    future: Future[Graded] | None


class SharedJudge:
    """Judges the replies of a run. Every process calls it alike; each has a part of the replies judged.

    Args:
        configs: All rewards.
        pool: Those of worker processes.
        models: Reward models by the name of their reward.
        tokenizer: Of the policy and of the reward models.
    """

    def __init__(
        self,
        configs: Sequence[VerifierConfig | RewardModelConfig],
        pool: RewardPool,
        models: Mapping[str, ModelScorer],
        tokenizer: ChatTokenizer,
    ) -> None:
        self._configs = configs
        self._pool = pool
        self._models = models
        self._tokenizer = tokenizer
        self._count = 0

    def submit(self, prompt: Prompt, completion: Completion, reply: Reply) -> Claim:
        """Takes a reply; all processes submit the same ones in the same order."""
        mine = self._count % jax.process_count() == jax.process_index()
        self._count += 1
        return Claim(prompt, completion, reply, self._pool.submit(prompt.task, reply) if mine else None)

    def results(self, claims: Sequence[Claim]) -> list[Graded]:
        """Waits for the results, the same on every process, in the order of the claims."""
        graded = exchange([claim.future and claim.future.result() for claim in claims])
        for config in self._configs:
            if not isinstance(config, RewardModelConfig):
                continue
            name, model = reward_name(config), self._models[reward_name(config)]
            chosen = [i for i, claim in enumerate(claims) if judges(config, claim.prompt.task)]
            values = model.scores([self._read(config, claims[i]) for i in chosen]) if chosen else ()
            for i, value in zip(chosen, values, strict=True):
                graded[i] = with_values(graded[i], self._configs, claims[i].prompt.task, {name: float(value)})
        return graded

    def _read(self, config: RewardModelConfig, claim: Claim) -> tuple[Sequence[int], Sequence[int]]:
        """The prompt and what the reward model reads after it: all that was drawn, or only the answer."""
        prompt, drawn = claim.prompt.token_ids, claim.completion
        if config.thoughts or claim.reply.thought is None:
            return prompt, drawn.token_ids
        closing = _CLOSING if opens_thinking(prompt, self._tokenizer) else ""
        answer = self._tokenizer.encode(closing + claim.reply.answer)
        return prompt, answer if drawn.stop_token_id is None else [*answer, drawn.stop_token_id]


def exchange(mine: Sequence[Graded | None]) -> list[Graded]:
    """Puts together what the processes know, of which each has a part."""
    if jax.process_count() == 1:
        assert None not in mine
        return [graded for graded in mine if graded is not None]
    text = json.dumps({i: dataclasses.asdict(graded) for i, graded in enumerate(mine) if graded is not None}).encode()
    sizes = multihost_utils.process_allgather(np.array(len(text)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    found: dict[int, Graded] = {}
    for row, size in zip(multihost_utils.process_allgather(padded), sizes, strict=True):
        found |= {int(i): _graded(value) for i, value in json.loads(row[:size].tobytes()).items()}
    return [found[i] for i in range(len(mine))]


def _graded(value: dict[str, Any]) -> Graded:
    parts = {name: Score(**score) for name, score in value["parts"].items()}
    return Graded(value["value"], value["correct"], parts, tuple(value["failed"]), tuple(value["missing"]))
