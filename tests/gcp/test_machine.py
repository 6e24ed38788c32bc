"""Every state of a record, with everything that can be seen, at every time that matters."""

import itertools
from dataclasses import replace

import pytest

from gcp.cloud import Refusal, Resource, State
from gcp.machine import FIRST_WAIT, LONGEST_WAIT, POLL, Conclude, Create, Delete, Seen, Stop, Wait, back_off, decide
from gcp.record import Outcome
from tests.gcp.memory import a_job, a_record

DONE = Outcome(kind="done", detail="", at=0.0)
NOW = 5000.0


def seen_of(state: State | None, **changes: object) -> Seen:
    resource = None if state is None else Resource("job-abc123-1", "a", state, refusal=changes.pop("why", None))
    return Seen(resource=resource, **changes)


def asked(**changes: object):
    return a_record(phase="asked", attempt=1, asked_at=NOW - 10, **changes)


ALL_SEEN = [
    seen_of(state, refusal=refusal, outcome=outcome, heard=heard)
    for state, refusal, outcome, heard in itertools.product(
        [None, *State], [None, *Refusal], [None, DONE], [None, NOW - 5, NOW - 50_000]
    )
]
ALL_SEEN += [Seen(unanswered=refusal, outcome=outcome) for refusal, outcome in itertools.product(Refusal, [None, DONE])]
ALL_RECORDS = [
    a_record(phase=phase, attempt=1, asked_at=NOW - 10, created_resource=created, active_at=active, **counts)
    for phase, created, active, counts in itertools.product(
        ["resting", "asked", "leaving", "over"],
        [False, True],
        [None, NOW - 10_000],
        [{}, {"failures": 3}, {"preemptions": 101}, {"dry_zones": 5}, {"not_before": NOW + 1}],
    )
]


@pytest.mark.parametrize("now", [NOW, 1e6], ids=["before the deadline", "after it"])
def test_whatever_is_seen(now):
    """What no step may do, over all of them."""
    for record, seen in itertools.product(ALL_RECORDS, ALL_SEEN):
        step = decide(record, seen, now)
        after = step.record
        if isinstance(step.action, Create):
            assert record.phase == after.phase == "asked", "written down before it is asked for"
            assert seen.resource is None and seen.unanswered is None and not after.created_resource
            assert seen.outcome is None and now < record.deadline, "nothing is made for a run that is over"
        if isinstance(step.action, Delete):
            assert after.phase == "leaving" and seen.resource is not None
        if after.phase == "over" and record.phase != "over":
            assert seen.outcome is not None and (record.phase == "resting" or seen.resource is None)
        if record.phase in ("asked", "leaving") and after.phase == "resting":
            assert seen.resource is None, "an attempt is left only when its resource is gone"
            assert seen.unanswered is None, "and was looked for"
            assert all(each.end is not None for each in after.intervals)
        if after.attempt != record.attempt:
            assert record.phase == "resting" and now >= record.not_before and seen.outcome is None
        if now >= record.deadline and seen.outcome is None and record.phase != "over":
            assert isinstance(step.action, Conclude) and step.action.kind == "deadline"
        if isinstance(step.action, Stop):
            assert after.phase == "over"
        # A step that changes nothing and waits for nothing would spin.
        if step.record == record and isinstance(step.action, Wait):
            assert step.action.seconds > 0


def test_a_resource_is_asked_for_after_it_is_written_down():
    first = decide(a_record(), Seen(), NOW)
    assert first.record.phase == "asked" and first.record.attempt == 1 and first.action == Wait(0.0)
    assert decide(first.record, Seen(), NOW).action == Create()


def test_one_that_is_there_already_is_taken_for_the_one_asked_for():
    step = decide(asked(), seen_of(State.WAITING), NOW)
    assert step.record.created_resource and isinstance(step.action, Wait)


@pytest.mark.parametrize("state", [State.LOST, State.DELETING, None])
def test_preemption(state):
    step = decide(asked(created_resource=True), seen_of(state), NOW)
    assert step.record.phase == "leaving" and step.record.preemptions == 1 and step.record.failures == 0
    assert step.record.not_before == NOW + FIRST_WAIT
    assert step.record.next_zone_index == 0


def test_a_suspended_resource_that_was_there_before_does_not_block_the_next():
    left = decide(asked(), seen_of(State.LOST), NOW).record
    gone = decide(left, Seen(), NOW).record
    again = decide(gone, Seen(), NOW + 1000).record
    assert again.resource != left.resource


@pytest.mark.parametrize("refusal", [Refusal.STOCK_OUT, Refusal.QUOTA])
def test_no_room_tries_the_next_zone_at_once_and_all_again_later(refusal):
    record = asked()
    waits, zones = [], []
    for _ in range(4):
        left = decide(record, seen_of(State.FAILED, why=refusal), NOW).record
        waits.append(left.not_before - NOW)
        record = decide(left, Seen(), NOW).record
        zones.append(record.zone)
        record = record.changed(phase="asked", attempt=record.attempt + 1, created_resource=False)
    assert zones == ["b", "a", "b", "a"]
    assert waits == [0.0, FIRST_WAIT, 0.0, 2 * FIRST_WAIT]
    assert record.preemptions == record.failures == 0, "nobody's fault"


def test_a_queue_that_does_not_move_is_left_for_another_zone():
    patience = a_job().wait_minutes * 60
    still = asked(created_resource=True).changed(asked_at=NOW - patience - 1)
    assert decide(still, seen_of(State.WAITING), NOW).record.phase == "leaving"
    alone = still.changed(job=a_job(zones=("a",)))
    assert decide(alone, seen_of(State.WAITING), NOW).record.phase == "asked"


def test_what_the_cloud_calls_wrong_is_not_tried_again():
    step = decide(asked(), Seen(refusal=Refusal.BAD_REQUEST, detail="no such accelerator type"), NOW)
    assert step.action == Conclude("bad-input", "no such accelerator type")


def test_no_answer_is_followed_by_a_look():
    step = decide(asked(), Seen(refusal=Refusal.TRANSIENT), NOW)
    assert isinstance(step.action, Wait) and step.record == asked()


@pytest.mark.parametrize("refusal", Refusal)
def test_a_look_that_is_refused_is_final_only_where_nothing_was_seen_before(refusal):
    seen = Seen(unanswered=refusal, detail="the API is not enabled")
    step = decide(asked(), seen, NOW)
    assert step.record == asked()
    if refusal is Refusal.BAD_REQUEST:
        assert step.action == Conclude("bad-input", "the API is not enabled")
    else:
        assert isinstance(step.action, Wait)
    assert isinstance(decide(asked(created_resource=True), seen, NOW).action, Wait)
    assert isinstance(decide(asked(), replace(seen, made=True), NOW).action, Wait), "it may be there"


@pytest.mark.parametrize("field", ["preemptions", "failures"])
def test_each_budget_ends_the_run_by_itself(field):
    job = a_job(preemptions=3, failures=1)
    allowed = getattr(job, field)
    within = a_record(job, phase="leaving", attempt=1).changed(**{field: allowed})
    assert decide(within, Seen(), NOW).record.phase == "resting"
    beyond = within.changed(**{field: allowed + 1})
    action = decide(beyond, Seen(), NOW).action
    assert isinstance(action, Conclude) and action.kind == "failed"


def test_vms_that_say_nothing_are_a_failure():
    job = a_job(boot_minutes=10.0, idle_minutes=20.0)
    active = asked(created_resource=True, active_at=NOW - 601).changed(job=job)
    assert decide(active, seen_of(State.ACTIVE), NOW).record.failures == 1
    assert decide(active, seen_of(State.ACTIVE, heard=NOW - 601), NOW).record.failures == 0
    assert decide(active, seen_of(State.ACTIVE, heard=NOW - 1201), NOW + 0).record.phase == "asked"
    assert decide(active.changed(active_at=NOW - 5000), seen_of(State.ACTIVE, heard=NOW - 1201), NOW).record.failures


def test_who_is_waited_for_while_a_job_saves():
    def action(
        kind: str = "cancelled", state: State = State.ACTIVE, *, after: float = 60.0, **changes: object
    ) -> object:
        outcome = Outcome(kind=kind, detail="", at=NOW)
        seen = seen_of(state, outcome=outcome, **({"heard": NOW - 30} | changes))
        return decide(a_record(phase="leaving", attempt=1, created_resource=True), seen, NOW + after).action

    assert [action(kind) for kind in ("cancelled", "deadline", "idle")] == [Wait(POLL)] * 3
    assert action(after=115.0) == Wait(5.0) and action(after=120.0) == Delete()
    assert action(heard=None) == action(heard=NOW - 100) == Delete(), "nobody is there to save"
    assert action(ended=True) == Delete()
    assert action("done") == action(state=State.LOST) == Delete()


def test_back_off_doubles_up_to_a_bound():
    assert [back_off(count) for count in (1, 2, 3)] == [10.0, 20.0, 40.0]
    assert back_off(1000) == LONGEST_WAIT
