"""Bounds on the length of thoughts: closed when their budget is spent, continued when they end too soon.

A reasoning model's accuracy grows with the tokens that it thinks; to replace a premature end by "Wait" lengthens the
thoughts, to put the end in shortens them (budget forcing: s1, arXiv 2501.19393, section 3.1).
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ThinkingTokens:
    """How a model's thoughts end, in tokens.

    Attributes:
        close: The token that ends them, `</think>`.
        closing: What is put in when `max_thinking_tokens` are spent; holds `close`.
        open: The token that begins them, where the model may leave them out; None where the prompt has begun them.
        continuation: What replaces a `close` that comes before `min_thinking_tokens`, such as a line break and "Wait".
    """

    close: int
    closing: tuple[int, ...]
    continuation: tuple[int, ...]
    open: int | None = None


class Growing(Protocol):
    """The part of a sequence that decides whether there is room to put tokens in."""

    tokens: list[int]
    limit: int


@dataclass(frozen=True)
class Forced:
    """Tokens to be put in, `instead` of the one that was drawn or after it."""

    tokens: tuple[int, ...]
    instead: bool


@dataclass(eq=False)
class Thoughts:
    """The thoughts of one sequence, which begin with its completion.

    Attributes:
        marks: The token ids.
        start: Length of the prompt.
        shortest: Thoughts that end before so many tokens are continued.
        longest: Thoughts of so many tokens are closed; None: no bound.
        open: Whether the sequence still thinks.
    """

    marks: ThinkingTokens
    start: int
    shortest: int = 0
    longest: int | None = None
    open: bool = True

    @property
    def boundary(self) -> int | None:
        """The length of the sequence at which open thoughts are closed."""
        return self.start + self.longest if self.open and self.longest is not None else None

    def push(self, token: int, ends: bool, sequence: Growing) -> Forced | None:
        """Look at a token drawn as the next of the sequence, which does not hold it yet.

        Args:
            token: The token.
            ends: Whether it would end the sequence.
            sequence: It; nothing is put in where no room for an answer, or within `longest`, would be left.
        """
        if not self.open:
            return None
        length = len(sequence.tokens)
        if length == self.start and self.marks.open is not None and token != self.marks.open:
            self.open = False
            return None
        room = sequence.limit - length
        if token == self.marks.close or ends:
            # The token itself is dropped, so it does not count.
            room = min(room, room if self.longest is None else self.start + self.longest - length)
            if length - self.start < self.shortest and len(self.marks.continuation) < room:
                return Forced(self.marks.continuation, instead=True)
            self.open = False
            return None
        if self.longest is not None and length + 1 - self.start >= self.longest:
            self.open = False
            return Forced(self.marks.closing, instead=False)
        return None
