"""The arrays of a step: which there are, how they are filled from a schedule, and how they travel as one.

numpy only.  What a sequence keeps for all its steps (its page table and how it is sampled) stays in an array by row
between steps, so a step costs the host time by its rows and their new pages.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qwq_jax.engine.pages import pages_for
from qwq_jax.engine.request import Sequence
from qwq_jax.engine.step import (
    FEW_STOPS,
    MANY_STOPS,
    EngineShape,
    Program,
    Schedule,
    StepPlan,
    Work,
    smallest_of,
)

NOBODY = -1
"""In place of a token: none; of a row: none."""

Extent = tuple[tuple[int, ...], Any]


def arrays_of(shape: EngineShape, program: Program) -> dict[str, Extent]:
    """Shape within a replica and dtype of each of a step's arrays, in the order in which they travel.

    `S` rows are sampled: the `D` decode rows, then the `Bp` chunks.

    - `page_table` `[S, W]`: page numbers of the replica.
    - `temperature`, `top_k`, `top_p`, `min_p`, `seed` `[S]`; `stop_ids` `[S, E]`, NOBODY where there are fewer.
    - `steps` `[1]`: how many tokens the window draws.
    - `token` `[D]`: the one to compute first, NOBODY where the devices have it from the step before, in row `origin`
      `[D]` of that time; `position` `[D]`; `budget` `[D]`: how many tokens the row may draw, 0 for an empty one.
    - With drafts, instead of these four: `flat_token`, `flat_position`, `flat_row` `[D (1 + drafts)]`, the
      rows' tokens back to back; `kv_length` `[D]`, this step's tokens included; `query_start` `[D + 1]`.
    - With chunks: `prompt_token`, `prompt_position` `[Tp]`; `prompt_length` `[Bp]`: tokens in the cache, the chunk's
      included, 0 for no chunk; `prompt_start` `[Bp + 1]`: first flat position of each; `into` `[Bp]`: the decode row
      that goes on with the token drawn after the chunk, NOBODY for none.
    - `bias_ids`, `bias_values` `[S, bias]`; `allowed` `[S, ceil(V / 32)]`; `floor` `[S]`: the first position that may
      end the sequence; `history` `[S, history]`, `prompt_size`, `presence`, `frequency`, `repetition` `[S]`;
      `target` `[Tp]`: the token after each flat position, NOBODY where it is not asked for.
    """
    D, Tp, drafts = program.decode_rows, program.prefill_tokens, program.drafts
    Bp = shape.max_prefill_sequences if Tp else 0
    S = D + Bp
    ints = {"page_table": (S, program.table_width), "stop_ids": (S, program.stop_ids), "top_k": (S,), "steps": (1,)}
    floats: dict[str, tuple[int, ...]] = {"temperature": (S,), "top_p": (S,), "min_p": (S,)}
    words: dict[str, tuple[int, ...]] = {"seed": (S,)}
    if drafts:
        ints |= dict.fromkeys(("flat_token", "flat_position", "flat_row"), (D * (1 + drafts),))
        ints |= {"kv_length": (D,), "query_start": (D + 1,)}
    else:
        ints |= dict.fromkeys(("token", "origin", "position", "budget"), (D,))
    if Tp:
        ints |= {"prompt_token": (Tp,), "prompt_position": (Tp,)}
        ints |= {"prompt_length": (Bp,), "prompt_start": (Bp + 1,), "into": (Bp,)}
    if program.bias:
        ints["bias_ids"], floats["bias_values"] = (S, program.bias), (S, program.bias)
    if program.history:
        ints |= {"history": (S, program.history), "prompt_size": (S,)}
        floats |= dict.fromkeys(("presence", "frequency", "repetition"), (S,))
    if program.floor:
        ints["floor"] = (S,)
    if program.score:
        ints["target"] = (Tp,)
    if program.mask:
        words["allowed"] = (S, -(-shape.vocab_size // 32))
    typed = ((ints, np.int32), (floats, np.float32), (words, np.uint32))
    return {name: (extent, dtype) for group, dtype in typed for name, extent in group.items()}


def pack(plan: StepPlan, shape: EngineShape) -> np.ndarray:
    """All arrays of a step side by side as `[R, n]` int32: one transfer costs less than many."""
    parts: list[np.ndarray] = []
    for name, (extent, dtype) in arrays_of(shape, plan.program).items():
        array = plan.arrays[name]
        assert array.dtype == dtype and array.shape == (shape.replicas, *extent), f"{name}: {array.shape} {array.dtype}"
        parts.append(np.ascontiguousarray(array).reshape(shape.replicas, -1).view(np.int32))
    return np.concatenate(parts, axis=1)


def packed_size(shape: EngineShape, program: Program) -> int:
    """N of `pack`."""
    return sum(math.prod(extent) for extent, _ in arrays_of(shape, program).values())


class StepBuilder:
    """Turns schedules into plans."""

    def __init__(self, shape: EngineShape) -> None:
        self._shape = shape
        rows = (shape.replicas, shape.max_sequences)
        self._owners: dict[tuple[int, int], tuple[int, int, int]] = {}
        self._tables = np.zeros((*rows, shape.max_table_width), np.int32)
        self._kept: dict[str, np.ndarray] = {
            "temperature": np.zeros(rows, np.float32),
            "top_p": np.ones(rows, np.float32),
            "min_p": np.zeros(rows, np.float32),
            "top_k": np.zeros(rows, np.int32),
            "seed": np.zeros(rows, np.uint32),
            "stop_ids": np.full((*rows, MANY_STOPS), NOBODY, np.int32),
        }

    def build(self, schedule: Schedule) -> StepPlan:
        """Lay out one step."""
        program = self._program(schedule)
        arrays: dict[str, np.ndarray] = {
            name: np.zeros((self._shape.replicas, *extent), dtype)
            for name, (extent, dtype) in arrays_of(self._shape, program).items()
        }
        D = program.decode_rows
        for works in schedule.decode:
            for work in works:
                self._keep(work.sequence)
        source = np.tile(np.arange(arrays["temperature"].shape[1]).clip(max=D - 1), (self._shape.replicas, 1))
        for replica, slot, work in schedule.placed:
            self._keep(work.sequence)
            source[replica, D + slot] = work.sequence.row
        replicas = np.arange(self._shape.replicas)[:, None]
        arrays["page_table"] = self._tables[:, :, : program.table_width][replicas, source]
        for name, kept in self._kept.items():
            arrays[name] = (kept[:, :, : program.stop_ids] if name == "stop_ids" else kept)[replicas, source]
        if program.history:
            arrays["repetition"][:] = 1
        if program.mask:
            arrays["allowed"][:] = 0xFFFFFFFF
        arrays["steps"][:] = max((work.draws for works in schedule.decode for work in works), default=0)
        if program.drafts:
            _fill_drafts(arrays, schedule)
        else:
            _fill_decode(arrays, schedule)
        if program.prefill_tokens:
            _fill_prefill(arrays, schedule)
        for replica, row, work in _sampled(schedule, D):
            if work.draws:  # the others are not sampled, and the sizes are not theirs
                _fill_edits(arrays, program, replica, row, work)
        return StepPlan(program, arrays)

    def _program(self, schedule: Schedule) -> Program:
        shape = self._shape
        works = tuple(schedule.works)
        rows = max((work.sequence.row or 0 for works in schedule.decode for work in works), default=0) + 1
        prompts = max(sum(work.length for work in works) for works in schedule.prefill)
        pages = max(pages_for(work.start + work.length, shape.page_size) for work in works)
        sampled = [work.sequence for work in works if work.draws]
        params = [sequence.request.params for sequence in sampled]
        penalised = [len(s.tokens) for s, p in zip(sampled, params, strict=True) if p.penalised]
        score = any(_scores(work) for work in works)
        return Program(
            # Where chunks run too, a few rows more cost nothing beside them, and a program each would.
            decode_rows=shape.max_sequences if prompts else smallest_of(shape.row_counts, rows),
            prefill_tokens=smallest_of(shape.chunk_sizes, prompts) if prompts else 0,
            table_width=smallest_of(shape.table_widths, pages),
            drafts=shape.drafts if any(work.drafts for work in works) else 0,
            stop_ids=FEW_STOPS if all(len(s.stop_token_ids) <= FEW_STOPS for s in sampled) else MANY_STOPS,
            bias=_power_of_two(max((len(p.logit_bias) for p in params), default=0)),
            history=_power_of_two(max(penalised)) if penalised else 0,
            top=any(p.top_logprobs for p in params) or score,
            floor=any(work.first_draw < _floor(work.sequence) for work in works),
            mask=any(s.hooks.mask is not None and s.hooks.mask.active for s in sampled),
            score=score,
        )

    def _keep(self, sequence: Sequence) -> None:
        """Bring what is kept for the sequence's row up to date."""
        replica, row = sequence.replica, sequence.row
        assert replica is not None and row is not None, "only admitted sequences are scheduled"
        arrival, preemptions, filled = self._owners.get((replica, row), (-1, 0, 0))
        if (arrival, preemptions) != (sequence.arrival, sequence.preemptions):
            filled = 0
            params, kept = sequence.request.params, self._kept
            kept["temperature"][replica, row] = params.temperature
            kept["top_p"][replica, row] = params.top_p
            kept["top_k"][replica, row] = params.top_k
            kept["min_p"][replica, row] = params.min_p
            kept["seed"][replica, row] = sequence.seed
            kept["stop_ids"][replica, row] = NOBODY
            kept["stop_ids"][replica, row, : len(sequence.stop_token_ids)] = sorted(sequence.stop_token_ids)
        count = len(sequence.pages)
        if filled < count:
            self._tables[replica, row, filled:count] = sequence.pages[filled:]
            self._owners[replica, row] = (sequence.arrival, sequence.preemptions, count)


def _sampled(schedule: Schedule, decode_rows: int) -> list[tuple[int, int, Work]]:
    """Each piece of work with its replica and its row among the sampled ones."""
    decode = [
        (replica, work.sequence.row or 0, work) for replica, works in enumerate(schedule.decode) for work in works
    ]
    return decode + [(replica, decode_rows + slot, work) for replica, slot, work in schedule.placed]


def _fill_decode(arrays: Mapping[str, np.ndarray], schedule: Schedule) -> None:
    arrays["origin"][:] = np.arange(arrays["origin"].shape[1])
    for replica, works in enumerate(schedule.decode):
        for work in works:
            row = work.sequence.row
            arrays["token"][replica, row] = work.sequence.tokens[work.start] if work.known else NOBODY
            if work.origin is not None:
                arrays["origin"][replica, row] = work.origin
            arrays["position"][replica, row] = work.start
            arrays["budget"][replica, row] = work.draws


def _fill_drafts(arrays: Mapping[str, np.ndarray], schedule: Schedule) -> None:
    for replica, works in enumerate(schedule.decode):
        end = 0
        by_row = {work.sequence.row: work for work in works}
        for row in range(arrays["kv_length"].shape[1]):
            arrays["query_start"][replica, row] = end
            work = by_row.get(row)
            if work is None:
                continue
            begin, end = end, end + work.length
            arrays["flat_token"][replica, begin:end] = (work.sequence.tokens[work.start], *work.drafts)
            arrays["flat_position"][replica, begin:end] = np.arange(work.start, work.start + work.length)
            arrays["flat_row"][replica, begin:end] = row
            arrays["kv_length"][replica, row] = work.start + work.length
        arrays["query_start"][replica, -1] = end


def _fill_prefill(arrays: Mapping[str, np.ndarray], schedule: Schedule) -> None:
    arrays["into"][:] = NOBODY
    for replica, works in enumerate(schedule.prefill):
        begin = 0
        for slot, work in enumerate(works):
            end, stop = begin + work.length, work.start + work.length
            arrays["prompt_token"][replica, begin:end] = work.sequence.tokens[work.start : stop]
            arrays["prompt_position"][replica, begin:end] = np.arange(work.start, stop)
            arrays["prompt_length"][replica, slot] = stop
            arrays["prompt_start"][replica, slot + 1 :] = end
            if work.draws:
                arrays["into"][replica, slot] = work.sequence.row
            if "target" in arrays:
                following = work.sequence.tokens[work.start + 1 : stop + 1] if _scores(work) else []
                padding = [NOBODY] * (work.length - len(following))
                arrays["target"][replica, begin:end] = [*following, *padding]
            begin = end


def _fill_edits(arrays: Mapping[str, np.ndarray], program: Program, replica: int, row: int, work: Work) -> None:
    """What changes the logits of a row."""
    sequence, params = work.sequence, work.sequence.request.params
    if program.bias:
        arrays["bias_ids"][replica, row] = NOBODY
        for index, (token, value) in enumerate(params.logit_bias):
            arrays["bias_ids"][replica, row, index] = token
            arrays["bias_values"][replica, row, index] = value
    if program.history:
        history = arrays["history"][replica, row]
        history[:] = NOBODY
        arrays["repetition"][replica, row] = params.repetition_penalty
        arrays["presence"][replica, row] = params.presence_penalty
        arrays["frequency"][replica, row] = params.frequency_penalty
        arrays["prompt_size"][replica, row] = len(sequence.request.prompt_token_ids)
        if params.penalised:
            history[: len(sequence.tokens)] = sequence.tokens
    if program.floor:
        arrays["floor"][replica, row] = _floor(sequence)
    mask = sequence.hooks.mask
    if program.mask and mask is not None and mask.active and work.draws:
        mask.fill(arrays["allowed"][replica, row])


def _scores(work: Work) -> bool:
    """Whether this work is a chunk of tokens whose log-probabilities are wanted: of the prompt, or put in."""
    sequence, first = work.sequence, work.start + 1
    if sequence.prompt_logprobs is None:
        if not sequence.request.params.logprobs:
            return False
        first = max(first, len(sequence.request.prompt_token_ids))  # a chunk may be thousands of tokens
    stop = min(work.start + work.length + 1, len(sequence.tokens))
    return any(sequence.wants_score(position) for position in range(first, stop))


def _floor(sequence: Sequence) -> int:
    """The first position of a token that may end the sequence."""
    return min(sequence.limit, len(sequence.request.prompt_token_ids) + sequence.request.params.min_tokens)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length() if count else 0
