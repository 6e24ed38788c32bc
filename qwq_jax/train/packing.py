"""Several sequences in one row: which go together, and the arrays that keep them apart. Plain numpy, no JAX.

A sequence of ``n`` tokens fills ``n - 1`` slots: slot ``t`` holds token ``t`` as input and token ``t + 1`` as target,
so the last token is never an input and every slot has a target of its own sequence.
"""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Segment:
    """One sequence to train on.

    For the prompt ``[5, 6]`` and the completion ``[7, 2]``: ``tokens = [5, 6, 7, 2]``, ``trained = [0, 0, 1, 1]``.

    Attributes:
        tokens: int32 ``[n]``, at least two.
        trained: bool ``[n]``, true where the token is a target of the loss. The first token never can be.
        columns: float32 ``[n]`` each, further values that belong to the tokens as targets (advantages, old log-probs).
    """

    tokens: np.ndarray
    trained: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def slots(self) -> int:
        """Slots the sequence fills in a row."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class PackedRows:
    """Rows of packed sequences; every array is ``[B, T]``.

    The segment above and then ``[8, 9]`` (9 trained) in a row of six slots::

        tokens       5  6  7  8  0  0
        targets      6  7  2  9  0  0
        loss_mask    0  1  1  1  0  0
        positions    0  1  2  0  0  0
        segment_ids  1  1  1  2  0  0

    Attributes:
        tokens: int32 inputs.
        targets: int32, the token after each input.
        loss_mask: bool, the targets that count.
        positions: int32, from 0 in each segment.
        segment_ids: int32, from 1 in each row; 0 is padding.
        columns: float32, aligned with `targets`.
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)


def plan_rows(slots: Sequence[int], *, row_length: int, open_rows: int = 64) -> list[list[int]]:
    """Assigns sequences to rows by best fit in order of arrival, and returns the indices in each row.

    Deterministic, and local: a sequence lands among the last few rows, so that shuffled input gives shuffled rows. Of
    more than `open_rows` unfinished rows the fullest is closed.

    Raises:
        ValueError: A sequence is longer than a row.
    """
    rows: list[list[int]] = []
    unfinished: list[
        tuple[int, int]
    ] = []  # (free slots, row), sorted: the tightest fit is the first that is large enough
    for index, needed in enumerate(slots):
        if needed > row_length:
            raise ValueError(f"sequence {index} needs {needed} slots, and a row has {row_length}")
        found = bisect.bisect_left(unfinished, (needed, -1))
        if found < len(unfinished):
            free, row = unfinished.pop(found)
        else:
            free, row = row_length, len(rows)
            rows.append([])
        rows[row].append(index)
        if free > needed:
            bisect.insort(unfinished, (free - needed, row))
        if len(unfinished) > open_rows:
            unfinished.pop(0)
    return rows


def fill_rows(rows: Sequence[Sequence[Segment]], *, row_length: int, pad: int = 0) -> PackedRows:
    """Lays the segments of each row one after the other; what is left is padding, which no segment sees."""
    shape = (len(rows), row_length)
    packed = PackedRows(
        tokens=np.full(shape, pad, np.int32),
        targets=np.full(shape, pad, np.int32),
        loss_mask=np.zeros(shape, np.bool_),
        positions=np.zeros(shape, np.int32),
        segment_ids=np.zeros(shape, np.int32),
        columns={name: np.zeros(shape, np.float32) for row in rows for segment in row for name in segment.columns},
    )
    for r, row in enumerate(rows):
        start = 0
        for number, segment in enumerate(row, start=1):
            end = start + segment.slots
            assert end <= row_length, (start, segment.slots, row_length)
            packed.tokens[r, start:end] = segment.tokens[:-1]
            packed.targets[r, start:end] = segment.tokens[1:]
            packed.loss_mask[r, start:end] = segment.trained[1:]
            packed.positions[r, start:end] = np.arange(segment.slots)
            packed.segment_ids[r, start:end] = number
            for name, values in segment.columns.items():
                packed.columns[name][r, start:end] = values[1:]
            start = end
    return packed
