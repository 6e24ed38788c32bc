"""One device step as arrays: what the scheduler's decision looks like to the runner.

numpy only.  Every array has a leading replica axis `R`; a replica's rows are its `Bd` decode rows, which own the first
`Bd` flat token positions, followed by `Bp` prefill rows, whose chunks lie back to back in the `Tp` positions after.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qwq_jax.engine.pages import pages_for
from qwq_jax.engine.request import Sequence

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class EngineShape:
    """The sizes that the scheduler, the arrays and the compiled step agree on.

    All but `replicas` and `max_context` count for one replica: `num_pages` pages of `page_size` tokens, `max_sequences`
    decode rows, and `prefill_chunk` prompt tokens of at most `max_prefill_sequences` sequences in one step.
    """

    replicas: int
    max_sequences: int
    max_context: int
    num_pages: int
    page_size: int
    prefill_chunk: int
    max_prefill_sequences: int

    @property
    def context(self) -> int:
        """The most tokens that one sequence can hold: within the context, and within the pages of one replica."""
        return min(self.max_context, self.num_pages * self.page_size)

    @property
    def rows(self) -> int:
        """Rows of one replica in a step; also the number of tokens it samples."""
        return self.max_sequences + self.max_prefill_sequences

    @property
    def max_table_width(self) -> int:
        """Pages of the longest sequence."""
        return pages_for(self.context, self.page_size)

    def table_width(self, kv_length: int) -> int:
        """The smallest power of two pages that holds `kv_length` tokens."""
        return 1 << max(pages_for(kv_length, self.page_size) - 1, 0).bit_length()


@dataclass(frozen=True)
class Work:
    """Tokens `start : start + length` of one sequence, to be computed in this step."""

    sequence: Sequence
    start: int
    length: int

    @property
    def samples(self) -> bool:
        """Whether the last of them is the sequence's last, so that the next token can be drawn."""
        return self.start + self.length == len(self.sequence.tokens)


@dataclass(frozen=True)
class Schedule:
    """For each replica, the sequences that decode one token and the chunks of prompts."""

    decode: tuple[tuple[Work, ...], ...]
    prefill: tuple[tuple[Work, ...], ...]

    @property
    def empty(self) -> bool:
        """Nothing to do."""
        return not any(self.decode) and not any(self.prefill)


@dataclass(frozen=True)
class SamplingPlan:
    """How each sampled position is drawn; all `[R, S]`."""

    temperature: np.ndarray
    top_p: np.ndarray
    top_k: np.ndarray
    min_p: np.ndarray
    seed: np.ndarray
    position: np.ndarray
    """Index of the drawn token in its sequence: together with the seed it fixes the random numbers."""


@dataclass(frozen=True)
class StepPlan:
    """One step, with `T = Bd + prefill_tokens` flat tokens and `S = Bd + Bp` rows a replica.

    `prefill_tokens`, the table width `W` and `want_top` choose the compiled program; the rest is data.
    A row with `kv_length` 0 is empty.  `query_start[r, b]` is the flat position of row b's first token, and
    `query_start[r, b + 1]` bounds the last prefill row; rows read `kv_length` tokens, this step's own included.
    """

    prefill_tokens: int
    want_top: bool
    tokens: np.ndarray
    """[R, T] int32"""
    positions: np.ndarray
    """[R, T] int32"""
    page_table: np.ndarray
    """[R, S, W] int32, page numbers of the replica"""
    kv_length: np.ndarray
    """[R, S] int32"""
    query_start: np.ndarray
    """[R, S + 1] int32"""
    sample_index: np.ndarray
    """[R, S] int32, flat positions"""
    sampling: SamplingPlan

    @property
    def table_width(self) -> int:
        """W."""
        return self.page_table.shape[-1]


@dataclass(frozen=True)
class StepResult:
    """The tokens drawn, `[R, S]`; `top_*` are `[R, S, MAX_TOP_LOGPROBS]` if the plan wanted them."""

    tokens: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None


class Runner(Protocol):
    """Whatever carries out a step: the devices, or a test's stand-in."""

    @property
    def shape(self) -> EngineShape:
        """The sizes it was built for."""
        ...

    @property
    def compiles(self) -> int:
        """How many programs it has compiled."""
        ...

    def step(self, plan: StepPlan) -> StepResult:
        """Compute the tokens, append their keys and values to the pages, draw the next tokens."""
        ...


class StepBuilder:
    """Turns schedules into plans.

    It keeps each decode row's page table between steps, so a step costs the host time by rows and new pages, not by
    tokens in the cache.
    """

    def __init__(self, shape: EngineShape) -> None:
        self._shape = shape
        self._tables = np.zeros((shape.replicas, shape.max_sequences, shape.max_table_width), np.int32)
        self._owners: dict[tuple[int, int], tuple[int, int, int]] = {}

    def build(self, schedule: Schedule) -> StepPlan:
        """Lay out one step."""
        shape = self._shape
        prefill_tokens = shape.prefill_chunk if any(schedule.prefill) else 0
        flat = shape.max_sequences + prefill_tokens
        tokens = np.zeros((shape.replicas, flat), np.int32)
        positions = np.zeros((shape.replicas, flat), np.int32)
        kv_length = np.zeros((shape.replicas, shape.rows), np.int32)
        query_start = np.full((shape.replicas, shape.rows + 1), shape.max_sequences, np.int32)
        query_start[:, : shape.max_sequences] = np.arange(shape.max_sequences)
        sample_index = np.zeros((shape.replicas, shape.rows), np.int32)
        sample_index[:, : shape.max_sequences] = np.arange(shape.max_sequences)
        source = np.tile(np.minimum(np.arange(shape.rows), shape.max_sequences - 1), (shape.replicas, 1))
        sampled: list[tuple[int, int, Sequence]] = []
        for replica, works in enumerate(schedule.decode):
            for work in works:
                row = self._update_table(work.sequence)
                tokens[replica, row] = work.sequence.tokens[work.start]
                positions[replica, row] = work.start
                kv_length[replica, row] = work.start + 1
                sampled.append((replica, row, work.sequence))
        for replica, works in enumerate(schedule.prefill):
            begin = shape.max_sequences
            for slot, work in enumerate(works, start=shape.max_sequences):
                source[replica, slot] = self._update_table(work.sequence)
                end, stop = begin + work.length, work.start + work.length
                tokens[replica, begin:end] = work.sequence.tokens[work.start : stop]
                positions[replica, begin:end] = np.arange(work.start, stop)
                kv_length[replica, slot] = stop
                query_start[replica, slot] = begin
                query_start[replica, slot + 1 :] = end
                sample_index[replica, slot] = end - 1
                if work.samples:
                    sampled.append((replica, slot, work.sequence))
                begin = end
        width = min(shape.table_width(int(kv_length.max())), shape.max_table_width)
        return StepPlan(
            prefill_tokens,
            any(sequence.request.params.top_logprobs for _, _, sequence in sampled),
            tokens,
            positions,
            np.take_along_axis(self._tables[:, :, :width], source[:, :, None], axis=1),
            kv_length,
            query_start,
            sample_index,
            self._sampling(sampled),
        )

    def _update_table(self, sequence: Sequence) -> int:
        replica, row = sequence.replica, sequence.row
        assert replica is not None and row is not None, "only admitted sequences are scheduled"
        arrival, preemptions, filled = self._owners.get((replica, row), (-1, 0, 0))
        if (arrival, preemptions) != (sequence.arrival, sequence.preemptions):
            filled = 0
        count = len(sequence.pages)
        if filled < count:
            self._tables[replica, row, filled:count] = sequence.pages[filled:]
            self._owners[replica, row] = (sequence.arrival, sequence.preemptions, count)
        return row

    def _sampling(self, sampled: list[tuple[int, int, Sequence]]) -> SamplingPlan:
        size = (self._shape.replicas, self._shape.rows)
        plan = SamplingPlan(
            temperature=np.zeros(size, np.float32),
            top_p=np.ones(size, np.float32),
            top_k=np.zeros(size, np.int32),
            min_p=np.zeros(size, np.float32),
            seed=np.zeros(size, np.uint32),
            position=np.zeros(size, np.int32),
        )
        for replica, slot, sequence in sampled:
            params = sequence.request.params
            plan.temperature[replica, slot] = params.temperature
            plan.top_p[replica, slot] = params.top_p
            plan.top_k[replica, slot] = params.top_k
            plan.min_p[replica, slot] = params.min_p
            plan.seed[replica, slot] = sequence.seed
            plan.position[replica, slot] = len(sequence.tokens)
        return plan
