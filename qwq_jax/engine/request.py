"""What goes into the engine and what comes out of it: token ids, never text.

`Request` in, `Completion` out; between the two each of a request's `n` samples is one `Sequence`, the only mutable
thing the scheduler keeps about it.  Nothing here knows JAX, pages or devices.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np

from qwq_jax.config.sampling import SamplingParams


class FinishReason(StrEnum):
    """Why a sequence ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class ThinkingTokens:
    """How a model's thoughts end, in tokens.

    Attributes:
        close: The token that ends them, `</think>`.
        closing: What is put in when `max_thinking_tokens` are spent; holds `close`.
        continuation: What replaces a `close` that comes before `min_thinking_tokens`, such as a line break and "Wait".
    """

    close: int
    closing: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """One prompt to be answered `params.n` times.

    >>> Request("sum-1", (9906, 11), SamplingParams(max_tokens=8, temperature=0.0))
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    thinking: ThinkingTokens | None = None
    """Needed where `params` bounds the thoughts; the completion is taken to begin inside them."""


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of one generated token, and of the likeliest tokens in its place (best first)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """Sample `index` of request `request_id`.

    `token_ids` are exactly the tokens drawn, the one that ended the sequence included; `stop_token_id` is that token if
    it was an end or stop token, and None after a stop string or at the length limit.  `logprobs`, when the request
    asked for them, has one entry for each token.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_token_id: int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class NewToken:
    """One token as it is drawn, for those who stream."""

    request_id: str
    index: int
    token: TokenLogprob


class StopChecker(Protocol):
    """Looks at one sequence's tokens as they are drawn and says when its text has reached a stop string."""

    def push(self, token_id: int) -> bool:
        """Take the next token; True ends the sequence with this token."""
        ...


class TokenMask(Protocol):
    """Says which tokens may come next in one sequence, by a grammar for example."""

    @property
    def active(self) -> bool:
        """Whether it forbids anything now; a grammar of the answer waits until the thoughts have ended."""
        ...

    def fill(self, bits: np.ndarray) -> None:
        """Write the allowed tokens into `[ceil(V / 32)]` uint32: token t is bit t % 32 of word t // 32."""
        ...

    def push(self, token_id: int) -> None:
        """Take the token that was drawn, or put in."""
        ...


@dataclass(frozen=True)
class Hooks:
    """What watches one sequence from outside the engine, which knows token ids only."""

    stop: StopChecker | None = None
    mask: TokenMask | None = None


HooksFactory = Callable[[Request], Hooks]
"""Called once for each sample of a request."""


@dataclass(eq=False)
class Sequence:
    """One sample in flight.

    `tokens` is the prompt and everything drawn so far; the keys and values of the first `computed` of them are in
    `pages` of replica `replica`.  A preempted sequence goes back to `computed == 0` without pages, and keeps its
    tokens: they are its prompt now.
    """

    request: Request
    index: int
    arrival: int
    seed: int
    limit: int
    """The greatest number of tokens, prompt included."""
    stop_token_ids: frozenset[int] = frozenset()
    hooks: Hooks = Hooks()
    tokens: list[int] = field(init=False)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    replica: int | None = None
    row: int | None = None
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_token_ids)

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not in the cache yet; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> list[int]:
        """The tokens drawn so far."""
        return self.tokens[len(self.request.prompt_token_ids) :]

    def push(self, drawn: TokenLogprob) -> FinishReason | None:
        """Append a drawn token, and say whether the sequence ends with it."""
        self.tokens.append(drawn.token_id)
        if self.request.params.logprobs:
            self.logprobs.append(drawn)
        stopped_by_text = self.hooks.stop is not None and self.hooks.stop.push(drawn.token_id)
        if drawn.token_id in self.stop_token_ids or stopped_by_text:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= self.limit else None

    def completion(self, reason: FinishReason) -> Completion:
        """Freeze the sequence as it stands."""
        last = self.tokens[-1]
        return Completion(
            self.request.request_id,
            self.index,
            tuple(self.generated),
            reason,
            stop_token_id=last if reason is FinishReason.STOP and last in self.stop_token_ids else None,
            logprobs=tuple(self.logprobs) if self.request.params.logprobs else None,
        )


def sample_seed(params: SamplingParams, request_id: str, index: int, run_seed: int) -> int:
    """The uint32 seed of sample `index`.

    It depends on the request's own seed, or else on the run's seed and the request's name, so that a request resumed in
    another run, batch or mesh draws the same tokens.
    """
    origin = f"seed {params.seed}" if params.seed is not None else f"run {run_seed} {request_id}"
    digest = hashlib.blake2b(f"{origin} sample {index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
