"""What goes into the engine and what comes out of it: token ids, never text.

`Request` in, `Completion` out; between the two each of a request's `n` samples is one `Sequence`, the only mutable
thing the scheduler keeps about it.  Nothing here knows JAX, pages or devices.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np

from qwq_jax.config.sampling import SamplingParams
from qwq_jax.engine.lookup import PromptLookup
from qwq_jax.engine.thoughts import ThinkingTokens, Thoughts


class FinishReason(StrEnum):
    """Why a sequence ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


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
    """The log-probability of one token, and of the likeliest tokens in its place (best first).

    NaN in a `NewToken` whose request does not want it.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """Sample `index` of request `request_id`.

    `token_ids` are exactly the tokens drawn, the one that ended the sequence included; `stop_token_id` is that token if
    it was an end or stop token, and None after a stop string or at the length limit.  `logprobs`, when the request
    asked for them, has one entry for each token; `prompt_logprobs`, with sample 0, one for each prompt token, of which
    the first has none.  `forced` are the indices of tokens that were not drawn but put in, to end thoughts or to
    lengthen them.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_token_id: int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    forced: tuple[int, ...] = ()


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

    `tokens` is the prompt and everything drawn so far that has been seen; `ahead` more are being drawn on the devices.
    The keys and values of the first `computed` tokens are in `pages` of replica `replica`, or will be when the devices
    have done what they were told.  A preempted sequence goes back to `computed == 0` without pages, and keeps its
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
    thoughts: Thoughts | None = None
    tokens: list[int] = field(init=False)
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    """One a generated token if the request wants them; None where a token that was put in has not been scored yet."""
    prompt_logprobs: list[TokenLogprob | None] | None = None
    forced: list[int] = field(default_factory=list)
    """Which generated tokens were put in rather than drawn."""
    computed: int = 0
    ahead: int = 0
    epoch: int = 0
    """Grows when what the devices are drawing for this sequence is no longer wanted."""
    pages: list[int] = field(default_factory=list)
    replica: int | None = None
    row: int | None = None
    preemptions: int = 0
    registered: int = 0
    """How many of its pages the prefix cache knows."""
    digests: list[bytes] = field(default_factory=list)
    lookup: PromptLookup = field(default_factory=PromptLookup)
    sent: int = 0
    """How many generated tokens have been handed on."""

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_token_ids)
        if self.request.params.prompt_logprobs is not None and self.index == 0:
            self.prompt_logprobs = list[TokenLogprob | None]([None] * len(self.tokens))

    @property
    def length(self) -> int:
        """Tokens, those that the devices are drawing included, as if none of these ended the sequence."""
        return len(self.tokens) + self.ahead

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not in the cache yet; 1 while decoding."""
        return self.length - self.computed

    @property
    def horizon(self) -> int:
        """How many tokens may be drawn before the host has to see them; 0: it has to see those under way first."""
        if self.hooks.mask is not None:
            return 0 if self.ahead else 1
        boundary = self.thoughts.boundary if self.thoughts is not None else None
        return min(self.limit, self.limit if boundary is None else boundary) - self.length

    @property
    def step_by_step(self) -> bool:
        """Whether its next step cannot be prepared before the last one's token is known."""
        params = self.request.params
        return self.hooks.mask is not None or params.penalised

    @property
    def generated(self) -> list[int]:
        """The tokens drawn so far."""
        return self.tokens[len(self.request.prompt_token_ids) :]

    def push(self, drawn: TokenLogprob) -> FinishReason | None:
        """Take a drawn token, and whatever has to be put in after or instead of it.

        Returns:
            Why the sequence ends with it; None if it goes on.  A change of `epoch` says that what was drawn after this
            token does not follow from it any more.
        """
        premature = drawn.token_id in self.stop_token_ids
        forced = self.thoughts.push(drawn.token_id, premature, self) if self.thoughts is not None else None
        if forced is not None and forced.instead:
            self._force(forced.tokens)
            return None
        reason = self._append(drawn.token_id, drawn)
        if reason is None and forced is not None:
            self._force(forced.tokens)
        return reason

    @property
    def first_unscored(self) -> int | None:
        """Position of the first token whose log-probability is wanted and unknown."""
        start = len(self.request.prompt_token_ids)
        prompt = (at for at, entry in enumerate(self.prompt_logprobs or ()) if at and entry is None)
        forced = (start + at for at in self.forced if self.logprobs and self.logprobs[at] is None)
        return next(prompt, next(forced, None))

    def wants_score(self, position: int) -> bool:
        """Whether the log-probability of the token at a position is wanted and unknown."""
        entries, index = self._entries(position)
        return index < len(entries) and entries[index] is None

    def score(self, position: int, scored: TokenLogprob) -> None:
        """Note the log-probability of the token at a position."""
        entries, index = self._entries(position)
        entries[index] = scored

    def take_new(self) -> list[TokenLogprob]:
        """The generated tokens not taken yet; where log-probabilities are wanted, as far as these are known."""
        start, wanted = len(self.request.prompt_token_ids), self.request.params.logprobs
        new: list[TokenLogprob] = []
        for token in self.tokens[start + self.sent :]:
            entry = self.logprobs[self.sent] if wanted else TokenLogprob(token, math.nan)
            if entry is None:
                break
            new.append(entry)
            self.sent += 1
        return new

    def completion(self, reason: FinishReason) -> Completion:
        """Freeze the sequence as it stands."""
        last = self.tokens[-1]
        return Completion(
            self.request.request_id,
            self.index,
            tuple(self.generated),
            reason,
            stop_token_id=last if reason is FinishReason.STOP and last in self.stop_token_ids else None,
            logprobs=_complete(self.logprobs) if self.request.params.logprobs else None,
            prompt_logprobs=None if self.prompt_logprobs is None else tuple(self.prompt_logprobs),
            forced=tuple(self.forced),
        )

    def _entries(self, position: int) -> tuple[list[TokenLogprob | None], int]:
        start = len(self.request.prompt_token_ids)
        if position < start:
            return self.prompt_logprobs or [], position
        return self.logprobs, position - start

    def _append(self, token: int, drawn: TokenLogprob | None) -> FinishReason | None:
        self.tokens.append(token)
        if self.request.params.logprobs:
            self.logprobs.append(drawn)
        if self.hooks.mask is not None:
            self.hooks.mask.push(token)
        count = len(self.tokens) - len(self.request.prompt_token_ids)
        stopped = self.hooks.stop is not None and self.hooks.stop.push(token)
        stopped = stopped and count >= self.request.params.min_tokens
        if token in self.stop_token_ids or stopped:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= self.limit else None

    def _force(self, tokens: tuple[int, ...]) -> None:
        """Put tokens in; they have to be computed like a prompt, and whatever is being drawn is not wanted any more."""
        kept = len(self.tokens)
        for token in tokens:
            self.forced.append(len(self.tokens) - len(self.request.prompt_token_ids))
            self._append(token, None)
        # The token before the first one put in is computed again where the latter's log-probability is wanted.
        self.computed = min(self.computed, kept - 1 if self.request.params.logprobs else kept)
        self.ahead = 0
        self.epoch += 1


def _complete(entries: list[TokenLogprob | None]) -> tuple[TokenLogprob, ...]:
    known = tuple(entry for entry in entries if entry is not None)
    assert len(known) == len(entries), "a token was not scored"
    return known


def sample_seed(params: SamplingParams, request_id: str, index: int, run_seed: int) -> int:
    """The uint32 seed of sample `index`.

    It depends on the request's own seed, or else on the run's seed and the request's name, so that a request resumed in
    another run, batch or mesh draws the same tokens.
    """
    origin = f"seed {params.seed}" if params.seed is not None else f"run {run_seed} {request_id}"
    digest = hashlib.blake2b(f"{origin} sample {index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
