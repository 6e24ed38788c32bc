"""Guesses at a sequence's next tokens: what followed the last time its latest tokens occurred.

Reasoning repeats itself (numbers, formulas, the question), so the guesses often hold, and a step that checks several
costs a memory-bound device hardly more than one that draws one. (Prompt lookup decoding; arXiv 2304.04487 does the same
with given references.)
"""

from collections.abc import Sequence
from itertools import cycle, islice

_LONGEST, _SHORTEST = 4, 2


class PromptLookup:
    """The places in one growing sequence where each run of two to four tokens last occurred."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._seen = _SHORTEST

    def propose(self, tokens: Sequence[int], count: int) -> tuple[int, ...]:
        """`count` guesses at what follows `tokens`, which must continue those of the last call; none if they are new.

        A place so near to the end that it is followed by fewer tokens is the beginning of a loop, which goes on.

        >>> PromptLookup().propose([1, 2, 3, 4, 1, 2], 6)
        (3, 4, 1, 2, 3, 4)
        """
        for end in range(self._seen, len(tokens)):
            for size in range(_SHORTEST, min(_LONGEST, end) + 1):
                self._after[tuple(tokens[end - size : end])] = end
        self._seen = max(self._seen, len(tokens))
        for size in range(min(_LONGEST, len(tokens)), _SHORTEST - 1, -1):
            start = self._after.get(tuple(tokens[-size:]))
            if start is not None:
                return tuple(islice(cycle(tokens[start : start + count]), count))
        return ()
