"""The order of training: which examples form each step, fixed before the first one, and a reader with a position.

An example is what has to lie within one row, side by side: one sequence, or the two of a pair. The plan is a function
of the examples' lengths, the seed and the batch shape. It knows nothing of devices or processes, so a run on another
mesh, or resumed, sees the same steps.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import grain

from qwq_jax.train.packing import PackedRows, Segment, fill_rows, plan_rows

Example = Sequence[Segment]
StepPlan = list[list[list[int]]]  # for each step its rows, for each row the indices of its examples


def plan_steps(slots: Sequence[int], *, row_length: int, rows_per_step: int, seed: int, steps: int) -> StepPlan:
    """As many passes over the examples as `steps` steps need, each in an order of its own; `slots` are their lengths.

    A row holds examples of one pass, a step may hold rows of two. A shorter plan is the beginning of a longer one.
    """
    rows: list[list[int]] = []
    order = grain.MapDataset.range(len(slots)).seed(seed).shuffle().repeat()
    start = 0
    while len(rows) < steps * rows_per_step:
        indices = [cast(int, order[i]) for i in range(start, start + len(slots))]
        planned = plan_rows([slots[i] for i in indices], row_length=row_length)
        rows.extend([indices[i] for i in row] for row in planned)
        start += len(slots)
    return [rows[i : i + rows_per_step] for i in range(0, steps * rows_per_step, rows_per_step)]


def one_pass(examples: Sequence[Example], *, row_length: int, rows_per_batch: int) -> list[PackedRows]:
    """Batches that hold every example once, in order; the last is filled up with empty rows."""
    rows = plan_rows([slots_of(example) for example in examples], row_length=row_length)
    rows += [[]] * (-len(rows) % rows_per_batch)
    starts = range(0, len(rows), rows_per_batch)
    return [fill_examples(examples, rows[i : i + rows_per_batch], row_length=row_length) for i in starts]


def fill_examples(examples: Sequence[Example], rows: Sequence[Sequence[int]], *, row_length: int) -> PackedRows:
    """Lays out the examples of each row, given by their indices."""
    return fill_rows([[segment for i in row for segment in examples[i]] for row in rows], row_length=row_length)


def slots_of(example: Example) -> int:
    """Slots that an example fills in a row."""
    return sum(segment.slots for segment in example)


class BatchStream:
    """Iterates over the packed rows of each step, prefetched by grain; `state` and `set_state` are its position."""

    def __init__(self, examples: Sequence[Example], plan: StepPlan, *, row_length: int) -> None:
        """Starts before the first step of `plan`."""
        fill = partial(fill_examples, examples, row_length=row_length)
        dataset = grain.MapDataset.source(plan).map(fill)
        self._iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))

    def __iter__(self) -> Iterator[PackedRows]:
        """Goes on from the current position."""
        return self

    def __next__(self) -> PackedRows:
        """The rows of the next step."""
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        """The position: after the steps handed out, whatever has been prefetched."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `state` returned."""
        self._iterator.set_state(state)
