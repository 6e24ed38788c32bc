"""Thoughts end within their budget with an answer, and the benchmark says so only of those that do."""

from dataclasses import replace

import pytest
from scipy.stats import binomtest

from qwq_jax.config.engine import EngineConfig
from qwq_jax.embedded import TINY_REASONER
from qwq_jax.engine.request import FinishReason
from qwq_jax.jobs.convert import convert
from tools.bench_thinking_budget import Bench, Point, closed_at, complaints, interval, measure, page, svg

PROBLEMS, BUDGETS = 8, (6, 40)
# As few compiled shapes as can be.
ENGINE = EngineConfig(
    max_sequences=8, page_size=128, max_context=256, prefill_chunk=64, max_prefill_sequences=1, compute_dtype="float32"
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    checkpoint = tmp_path_factory.mktemp("thinking_budget") / "checkpoint"
    convert(str(TINY_REASONER), str(checkpoint))
    return Bench(checkpoint, PROBLEMS, ENGINE)


@pytest.fixture(scope="module")
def measured(bench):
    return measure(bench, BUDGETS, [], ["shipped"])


@pytest.mark.slow
def test_every_request_ends_within_its_budget_with_an_answer(bench, measured):
    results, found = measured
    assert found == []
    bounded = [result for result in results if result.point.most is not None]
    assert len(bounded) == len(BUDGETS) and all(len(result.answers) == PROBLEMS for result in bounded)
    for result in bounded:
        for each in result.answers:
            ids, forced = list(each.completion.token_ids), set(each.completion.forced)
            drawn = [token for at, token in enumerate(ids[: ids.index(bench.close)]) if at not in forced]
            assert len(drawn) <= result.point.most and each.choice.content.strip()
            assert len(drawn) == result.point.most or not forced
            assert each.choice.finish_reason == "stop" and each.completion.stop_token_id is not None


@pytest.mark.slow
def test_some_thoughts_are_closed_by_force_and_some_end_in_time(bench, measured):
    closed = {
        point.most: [closed_at(each, bench.close)[1] for each in answers]
        for point, answers in ((result.point, result.answers) for result in measured[0])
    }
    assert all(closed[6]) and {True, False} == set(closed[40]) and not any(closed[None])


@pytest.mark.slow
def test_the_page_holds_every_setting(bench, measured):
    text = page(*measured, bench, "plot.svg")
    assert all(text.count(f"\n| {budget} | ") == 1 for budget in BUDGETS) and "\n| unbounded | " in text
    assert f"all {len(BUDGETS) * PROBLEMS} do." in text
    assert svg(measured[0]).count("<polyline") == 3


@pytest.mark.slow
def test_what_breaks_its_budget_is_told(bench, measured):
    results, _ = measured
    (answered,) = [each for result in results if result.point == Point(6) for each in result.answers[:1]]
    ids = answered.completion.token_ids

    def said(completion=None, choice=None) -> str:
        changed = replace(answered, completion=completion or answered.completion, choice=choice or answered.choice)
        return "; ".join(complaints(changed, bench.close))

    done = answered.completion
    assert said() == ""
    later = replace(done, token_ids=(9, *ids), forced=tuple(at + 1 for at in done.forced))
    assert "thoughts of 7 tokens are longer than 6" in said(later)
    sooner = replace(done, token_ids=ids[1:], forced=tuple(at - 1 for at in done.forced))
    assert "closed at 5 tokens, before 6" in said(sooner)
    assert "longer than 6" in said(replace(done, forced=()))
    assert "never closed" in said(replace(done, token_ids=ids[:6]))
    assert "closing is not whole" in said(replace(done, token_ids=(*ids[:6], 9, *ids[7:])))
    assert "not said to be put in" in said(replace(done, forced=done.forced[1:]))
    endless = replace(done, finish_reason=FinishReason.LENGTH)
    assert "does not end" in said(endless)
    assert complaints(replace(answered, completion=endless), bench.close, ends=False) == []
    assert "answer is empty" in said(choice=replace(answered.choice, content="\n"))


@pytest.mark.parametrize("right", [0, 3, 8])
def test_the_interval_is_wilsons(right):
    expected = binomtest(right, 8).proportion_ci(method="wilson")
    assert interval(right, 8) == pytest.approx((expected.low, expected.high), abs=1e-6)
