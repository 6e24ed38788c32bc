"""What follows from the exit codes of all workers. A round is one start of the job on all of them."""

from dataclasses import dataclass

DONE, BAD_INPUT, INTERRUPTED = 0, 2, 42
# Of a worker that was not heard of, or whose VM started again in the middle of a round.
LOST = 255
FIRST_WAIT, LONGEST_WAIT = 10.0, 600.0


@dataclass(frozen=True)
class Verdict:
    """The end of a round.

    Attributes:
        kind: ``done``, ``bad-input``, ``failed`` or ``interrupted``.
        again: Whether another round follows.
        wait: Seconds before it.
        detail: For people.
    """

    kind: str
    again: bool
    wait: float
    detail: str


def kind_of(codes: "dict[int, int]") -> "tuple[str, str]":
    """Sorts a round by the codes of its workers, and names the worker that decided.

    When one fails, the others stop with 42: the failure is what happened.

    Example:
        >>> kind_of({0: 42, 1: 1, 2: 42})
        ('failed', 'worker 1 exited with 1')
    """
    for worker, code in sorted(codes.items()):
        if code == BAD_INPUT:
            return "bad-input", f"worker {worker} exited with {code}; its log says what is wrong"
    for worker, code in sorted(codes.items()):
        if code not in (DONE, INTERRUPTED):
            return "failed", f"worker {worker} exited with {code}"
    stopped = [worker for worker, code in sorted(codes.items()) if code == INTERRUPTED]
    if stopped:
        return "interrupted", f"worker {stopped[0]} was interrupted"
    return "done", "all workers are done"


def rule(codes: "dict[int, int]", *, failures: int, allowed: int, interruptions: int, bearable: int) -> Verdict:
    """Decides what follows a round.

    Args:
        codes: Exit code by worker.
        failures: Of earlier rounds and resources.
        allowed: How many failures are borne.
        interruptions: Of earlier rounds.
        bearable: How many interruptions are borne.
    """
    kind, detail = kind_of(codes)
    if kind == "failed":
        if failures + 1 > allowed:
            return Verdict("failed", False, 0.0, f"{detail}; {failures + 1} failures, {allowed} are borne")
        return Verdict(kind, True, min(FIRST_WAIT * 2**failures, LONGEST_WAIT), detail)
    if kind == "interrupted":
        if interruptions + 1 > bearable:
            return Verdict("failed", False, 0.0, f"{detail}; {interruptions + 1} interruptions, {bearable} are borne")
        return Verdict(kind, True, 0.0, detail)
    return Verdict(kind, False, 0.0, detail)
