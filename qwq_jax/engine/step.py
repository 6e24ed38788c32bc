"""One device step as arrays: what the scheduler's decision looks like to the runner.

numpy only.  Every array has a leading replica axis `R`.  A step has `D` decode rows a replica, row d that of the
sequence with row d, and `Bp` rows for chunks of prompts, which lie back to back in `Tp` flat positions.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from qwq_jax.engine.pages import pages_for
from qwq_jax.engine.request import Sequence

MAX_TOP_LOGPROBS = 20
# Stop ids of a row: most have one or two, and a program for all of OpenAI's 64 and the model's own.
FEW_STOPS, MANY_STOPS = 8, 128
# Below these sizes a program of its own is not worth its compilation.
_FEWEST_ROWS, _NARROWEST_TABLE, _SMALLEST_CHUNK = 8, 8, 32


@dataclass(frozen=True)
class EngineShape:
    """The sizes that the scheduler, the arrays and the compiled step agree on.

    All but `replicas` and `max_context` count for one replica: `num_pages` pages of `page_size` tokens, `max_sequences`
    decode rows, and `prefill_chunk` prompt tokens of at most `max_prefill_sequences` sequences in one step.
    `decode_window` is the most tokens that a sequence draws before the host looks, `drafts` the most that are guessed,
    and `growth` the ratio of the lengths of chunks, up to 4 that of the numbers of decode rows, and its square that of
    the widths of tables, that get programs.
    `scaled_logprobs` are reported at the temperature of the request.
    """

    replicas: int
    max_sequences: int
    max_context: int
    num_pages: int
    page_size: int
    prefill_chunk: int
    max_prefill_sequences: int
    vocab_size: int
    decode_window: int = 1
    drafts: int = 0
    prefix_cache: bool = True
    growth: int = 2
    scaled_logprobs: bool = False

    @property
    def context(self) -> int:
        """The most tokens that one sequence can hold: within the context, and within the pages of one replica."""
        return min(self.max_context, self.num_pages * self.page_size)

    @property
    def max_table_width(self) -> int:
        """Pages of the longest sequence."""
        return pages_for(self.context, self.page_size)

    @property
    def table_widths(self) -> tuple[int, ...]:
        """Widths of page tables, each with programs of its own, the narrowest first."""
        return _sizes(self.max_table_width, _NARROWEST_TABLE, self.growth**2)

    @property
    def row_counts(self) -> tuple[int, ...]:
        """Numbers of decode rows, each with programs of its own, the smallest first."""
        return _sizes(self.max_sequences, _FEWEST_ROWS, min(self.growth, 4))

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Numbers of flat positions for chunks of prompts, each with programs of its own, the smallest first."""
        return _sizes(self.prefill_chunk, _SMALLEST_CHUNK, self.growth)


def _sizes(largest: int, smallest: int, growth: int) -> tuple[int, ...]:
    sizes, smallest = [largest], min(smallest, largest)
    while sizes[-1] > smallest:
        sizes.append(max(smallest, -(-sizes[-1] // growth)))
    return tuple(reversed(sizes))


def smallest_of(sizes: tuple[int, ...], needed: int) -> int:
    """The first of these sizes, which ascend, that is enough."""
    return next(size for size in sizes if size >= needed)


class Program(NamedTuple):
    """What chooses a compiled step: sizes, and the parts that most steps do without.

    Attributes:
        decode_rows: D.
        prefill_tokens: Tp; 0 where the step has no prompts.
        table_width: Pages a row.
        drafts: Guessed tokens a row, which the step checks; 0 for the window of tokens drawn one after another.
        stop_ids: Stop ids a row.
        bias: Biased tokens a row.
        history: Tokens of a row that penalties look back on.
        top: The likeliest tokens are wanted.
        floor: Some row must not end yet.
        mask: Some row's next token is restricted.
        score: Log-probabilities of the prompts' own tokens are wanted.
    """

    decode_rows: int
    prefill_tokens: int
    table_width: int
    drafts: int = 0
    stop_ids: int = FEW_STOPS
    bias: int = 0
    history: int = 0
    top: bool = False
    floor: bool = False
    mask: bool = False
    score: bool = False


@dataclass(frozen=True)
class Work:
    """Tokens from `start` on of one sequence, to be computed in this step.

    `length` of them; `draws` tokens are drawn after them, or one after each where it decodes.  `known` says whether the
    host knows the token at `start`; otherwise the devices do, from the step before, in the sequence's row, or in
    `origin` where it has changed rows since.  `drafts` are guesses at the tokens after it.
    """

    sequence: Sequence
    start: int
    length: int
    draws: int
    known: bool = True
    drafts: tuple[int, ...] = ()
    origin: int | None = None

    @property
    def first_draw(self) -> int:
        """Position in its sequence of the first token drawn; that of no token where none is."""
        if not self.draws:
            return self.sequence.limit
        return self.start + (self.length if self.draws == 1 and not self.drafts else 1)


@dataclass(frozen=True)
class Schedule:
    """For each replica, the sequences that decode and the chunks of prompts."""

    decode: tuple[tuple[Work, ...], ...]
    prefill: tuple[tuple[Work, ...], ...]

    @property
    def empty(self) -> bool:
        """Nothing to do."""
        return not any(self.decode) and not any(self.prefill)

    @property
    def works(self) -> Iterator[Work]:
        """All of it."""
        for works in (*self.decode, *self.prefill):
            yield from works

    @property
    def placed(self) -> Iterator[tuple[int, int, Work]]:
        """The prompts' chunks with their replica and their place among its chunks."""
        for replica, works in enumerate(self.prefill):
            yield from ((replica, slot, work) for slot, work in enumerate(works))


@dataclass(frozen=True)
class StepPlan:
    """One step: its program, and its arrays by name (`arrays_of` in `arrays.py` lists them)."""

    program: Program
    arrays: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Draws:
    """Tokens drawn for rows: `[R, ..., rows]`, `top_*` with a last axis of MAX_TOP_LOGPROBS if the plan wanted them."""

    tokens: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None


@dataclass(frozen=True)
class StepResult:
    """What a step brought.

    Attributes:
        decode: `[R, steps, D]` the window's tokens; what follows a row's end is arbitrary. With drafts `[R, T]`, one a
            flat position.
        prefill: `[R, Bp]`, one a chunk; arbitrary for those that draw none. None without chunks.
        scored: `[R, Tp]` the log-probabilities of the tokens after each flat position of the chunks, if wanted.
    """

    decode: Draws
    prefill: Draws | None = None
    scored: Draws | None = None


class Runner(Protocol):
    """Whatever carries out steps, in the order in which they are submitted: the devices, or a test's stand-in."""

    @property
    def shape(self) -> EngineShape:
        """The sizes it was built for."""
        ...

    @property
    def compiles(self) -> int:
        """How many programs it has compiled."""
        ...

    def warm_up(self, programs: tuple[Program, ...], progress: Callable[[int], None]) -> None:
        """Compile programs ahead of need; `progress` is told how many are ready."""
        ...

    def release(self) -> None:
        """Leave the memory of weights and cache to others until `replace_weights`."""
        ...

    def replace_weights(self, params: Any) -> None:
        """Compute with these from the next step on."""
        ...

    def submit(self, plan: StepPlan) -> Any:
        """Start a step: compute the tokens, append their keys and values to the pages, draw the next tokens."""
        ...

    def collect(self, ticket: Any) -> StepResult:
        """Wait for what `submit` started."""
        ...
