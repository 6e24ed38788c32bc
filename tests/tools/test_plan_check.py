"""What plans are checked with reads a CPU's programs rightly, and predicts by what was measured before."""

import pytest

from tools import plan_check
from tools.plan_check import Case, Compiled, compare, decoding, times_in_turns, training


@pytest.mark.slow
def test_a_training_step_has_the_products_of_its_passes() -> None:
    case = Case("step", 256, 2, 2, 64)
    compiled = training(case)
    model, tokens = case.model, 2 * 64
    products = 2 * tokens * (model.num_parameters - model.vocab_size * model.hidden_size)
    head = 2 * tokens * model.vocab_size * model.hidden_size
    # Forward and the two products of backward; layers (and the head's chunks) once more, as nothing of them is kept.
    assert 3 * (products + head) < compiled.cost.flops < 4.5 * (products + head)
    assert times_in_turns([compiled], 1)[0] > 0


@pytest.mark.slow
def test_a_window_counts_as_its_steps_and_reads_the_weights_once() -> None:
    small, large = (Case("decode", 256, layers, 8, 64) for layers in (2, 6))
    fewer, more = decoding(small), decoding(large)
    assert fewer.steps == 16 and times_in_turns([fewer], 1)[0] > 0
    added = large.model.num_parameters - small.model.num_parameters
    assert 2 * 8 * added < more.cost.flops - fewer.cost.flops < 1.2 * 2 * 8 * added
    assert 4 * added < more.cost.moved - fewer.cost.moved < 2.5 * 4 * added


def test_the_first_of_a_kind_calibrates_and_the_rest_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {1: (1e9, 1e-2), 2: (2e9, 3e-2), 3: (4e9, 5e-2)}  # products, and seconds that a step takes
    monkeypatch.setattr(plan_check, "training", lambda case: Compiled(_cost(costs[case.layers][0]), lambda: None))
    taken = [seconds for _, seconds in costs.values()]
    monkeypatch.setattr(plan_check, "times_in_turns", lambda programs, repetitions: taken)
    machine = plan_check.machine_of(bandwidth=1e12, flops=1e12)
    lines, worst = compare(tuple(Case("step", 64, layers, 1, 1) for layers in costs), machine, 1)
    # Ten seconds a teraflop, ten times what the roofline says: the others should take 20 and 40 ms.
    assert "calibrates: x 10.00" in lines[0] and "0.67 of measured" in lines[1] and "0.80 of measured" in lines[2]
    assert worst == pytest.approx(1 / 3)


def test_programs_run_in_turns_and_each_has_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []

    def program(name: str, seconds: list[float]) -> Compiled:
        def run() -> None:
            order.append(name)
            now[0] += seconds.pop(0)

        return Compiled(_cost(0), run, steps=2)

    monkeypatch.setattr(plan_check.time, "perf_counter", lambda: now[0])
    # The first of each is the quickest, and only warms up.
    assert times_in_turns([program("a", [1, 8, 6]), program("b", [2, 10, 12])], 2) == [3, 5]
    assert order == ["a", "b"] * 3


def _cost(flops: float) -> plan_check.ProgramCost:
    return plan_check.ProgramCost(0, 0, 0, flops, 0)
