import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwq_jax.train.packing import Segment, fill_rows, plan_rows


def segment(tokens, trained, **columns):
    values = {name: np.array(value, np.float32) for name, value in columns.items()}
    return Segment(np.array(tokens, np.int32), np.array(trained, np.bool_), values)


def test_the_example_of_the_docstring():
    rows = [
        [segment([5, 6, 7, 2], [0, 0, 1, 1], advantage=[0, 0, 3, 4]), segment([8, 9], [0, 1], advantage=[0, 5])],
        [],
    ]
    packed = fill_rows(rows, row_length=6)
    assert packed.tokens.tolist() == [[5, 6, 7, 8, 0, 0], [0] * 6]
    assert packed.targets.tolist() == [[6, 7, 2, 9, 0, 0], [0] * 6]
    assert packed.loss_mask.astype(int).tolist() == [[0, 1, 1, 1, 0, 0], [0] * 6]
    assert packed.positions.tolist() == [[0, 1, 2, 0, 0, 0], [0] * 6]
    assert packed.segment_ids.tolist() == [[1, 1, 1, 2, 0, 0], [0] * 6]
    assert packed.columns["advantage"].tolist() == [[0, 3, 4, 5, 0, 0], [0] * 6]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=80), st.integers(30, 50), st.integers(1, 8))
def test_every_sequence_lands_once_and_no_row_overflows(slots, row_length, open_rows):
    rows = plan_rows(slots, row_length=row_length, open_rows=open_rows)
    assert sorted(index for row in rows for index in row) == list(range(len(slots)))
    assert all(sum(slots[i] for i in row) <= row_length for row in rows)
    assert rows == plan_rows(slots, row_length=row_length, open_rows=open_rows)


def test_rows_are_nearly_full(rng):
    slots = rng.integers(40, 200, 2000).tolist()
    rows = plan_rows(slots, row_length=512)
    assert sum(slots) / (len(rows) * 512) > 0.95


def test_a_sequence_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="sequence 1 needs 9 slots, and a row has 8"):
        plan_rows([3, 9], row_length=8)
