"""What follows from exit codes."""

import pytest

from gcp.worker.rounds import LONGEST_WAIT, LOST, kind_of, rule

BUDGETS = {"failures": 0, "allowed": 2, "interruptions": 0, "bearable": 100}


@pytest.mark.parametrize(
    ("codes", "kind"),
    [
        ({0: 0, 1: 0}, "done"),
        ({0: 42, 1: 42}, "interrupted"),
        ({0: 42, 1: 0}, "interrupted"),
        ({0: 42, 1: 1}, "failed"),
        ({0: 134, 1: 42}, "failed"),
        ({0: 0, 1: 137}, "failed"),
        ({0: 42, 1: LOST}, "failed"),
        ({0: 42, 1: 2}, "bad-input"),
        ({0: 1, 1: 2}, "bad-input"),
    ],
)
def test_kinds(codes, kind):
    assert kind_of(codes)[0] == kind


def test_only_restarts_that_can_help():
    assert not rule({0: 0}, **BUDGETS).again
    assert not rule({0: 2}, **BUDGETS).again
    assert rule({0: 42}, **BUDGETS).again
    assert rule({0: 1}, **BUDGETS).again


def test_failures_and_interruptions_have_budgets_of_their_own():
    spent = BUDGETS | {"failures": 2}
    assert not rule({0: 1}, **spent).again
    assert rule({0: 42}, **spent).again
    worn = BUDGETS | {"interruptions": 100}
    assert not rule({0: 42}, **worn).again
    assert rule({0: 1}, **worn).again


def test_waits_grow():
    waits = [rule({0: 1}, **BUDGETS | {"failures": count, "allowed": 99}).wait for count in range(12)]
    assert waits[:3] == [10.0, 20.0, 40.0] and waits[-1] == LONGEST_WAIT
