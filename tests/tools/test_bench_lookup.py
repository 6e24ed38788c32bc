"""The comparison of prompt lookup runs on a model with a tokenizer, tells its best ways, and notices wrong tokens."""

from pathlib import Path

import pytest

import tools.bench_lookup as bench
from qwq_jax.embedded import TINY_REASONER
from qwq_jax.jobs.convert import convert
from tools.bench_engine import Stream
from tools.bench_lookup import TASKS, Way, measure, parse, report, take_turns


def a_way(name: str, ours: bool, lookup: int, rate: float) -> Way:
    """A way with this rate in each task's better turn."""
    return Way(
        name,
        ours,
        lookup,
        run=lambda prompt: Stream(tuple(prompt), 1, (len(prompt) - 1) / rate),
        decoded={task: [100, 100] for task in TASKS},
        seconds={task: [200 / rate, 100 / rate] for task in TASKS},
    )


def test_report_compares_the_best_of_ours_with_theirs_with_and_without_lookup():
    ways = [
        a_way("qwq_jax", True, 0, 30.0),
        a_way("transformers", False, 0, 20.0),
        a_way("qwq_jax, prompt lookup of 7", True, 7, 60.0),
        a_way("transformers, prompt lookup of 7", False, 7, 40.0),
    ]
    text = report(parse(["source", "checkpoint"]), ways, ["a note"], 0.5)
    assert "| transformers, prompt lookup of 7 | 40.0 | 40.0 |" in text and "- a note" in text
    assert (
        "sum up: qwq_jax, prompt lookup of 7 is 3.00 times transformers, 1.50 times the best of theirs "
        "(transformers, prompt lookup of 7); without lookup on either side 1.50" in text
    )


def test_turns_count_what_comes_after_the_first_tokens():
    way = a_way("qwq_jax", True, 0, 50.0)
    way.decoded.clear()
    way.seconds.clear()
    take_turns([way], "sum up", [[1, 2, 3], [4, 5, 6, 7, 8]], repetitions=2)
    assert way.decoded == {"sum up": [6, 6]} and way.best("sum up") == pytest.approx(50.0)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_tiny_run_measures_all_ways_and_tells_a_wrong_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    convert(str(TINY_REASONER), str(tmp_path / "ours"))
    folders = [str(TINY_REASONER), str(tmp_path / "ours")]
    sizes = "--texts 2 --sizes 150 400 --context 512 --tokens 8 --drafts 3 --repetitions 1".split()
    ways, notes = measure(parse([*folders, *sizes]))
    assert [way.name for way in ways][1:3] == ["transformers", "qwq_jax, prompt lookup of 3"]
    assert all(way.best(task) > 0 for way in ways for task in TASKS)
    assert all("all ways gave the same tokens for 2" in note for note in notes)
    honest = bench.our_stream

    def wrong(*args):
        stream = honest(*args)
        return Stream((stream.tokens[0] + 1, *stream.tokens[1:]), stream.first, stream.seconds)

    monkeypatch.setattr(bench, "our_stream", wrong)
    with pytest.raises(SystemExit, match="qwq_jax: greedy tokens are not the model's"):
        measure(parse([*folders, *sizes]))
