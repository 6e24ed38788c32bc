"""The problems, their worked solutions, the split and the verifier."""

import itertools
import json
import re

import pytest

from qwq_jax.rl.rewards.arithmetic import LEVELS, Split, answer, is_correct, problems, solve, split_of
from tools import make_tiny_reasoner_data


def take(count, seed=0, split=Split.TRAIN, **options):
    return list(itertools.islice(problems(seed, split=split, **options), count))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("word_share", [0.0, 1.0])
def test_answers_are_right_and_found_by_the_verifier(level, word_share):
    for problem in take(300, levels=(level,), word_share=word_share):
        assert problem.answer == eval(problem.expression) >= 0
        assert problem.level == level
        user, assistant = problem.messages()
        assert user == {"role": "user", "content": problem.question}
        assert assistant["content"].startswith("<think>\n")
        assert is_correct(assistant["content"], problem.answer)
        assert is_correct(assistant["content"].removeprefix("<think>\n"), problem.answer)
        assert not is_correct(assistant["content"], problem.answer + 1)


def test_every_column_of_the_working_is_true():
    """Each "ones 12-7=5" holds, with the carry the column before it left, and the columns spell the result."""
    for problem in take(500):
        for step in re.findall(r"^\d+ [-+*] \d+:\n.*?so \d+$", problem.reasoning, re.MULTILINE | re.DOTALL):
            carried = 0
            columns = re.findall(r"^[a-z-]+ (\S+)=(\d+)(?:, (?:carry|borrow) (\d))?$", step, re.MULTILINE)
            for left, right, carry in columns:
                assert eval(left) == int(right)
                assert (f"{'-' if '-' in left else '+'}{carried}" in left) if carried else True
                carried = int(carry or 0)
            digits = [right[-1] for _, right, _ in columns[:-1]] + [columns[-1][1]]
            assert int("".join(reversed(digits))) == int(step.rpartition("so ")[2])


def test_worked_examples():
    assert solve((("+", 104), ("-", 67))) == (
        "104 - 67:\nones 14-7=7, borrow 1\ntens 10-1-6=3, borrow 1\nhundreds 1-1-0=0\nso 37",
        37,
    )
    assert solve((("+", 62), ("*", 6), ("+", 9))) == (
        "62 * 6 + 9\n62 * 6:\nones 2*6=12, carry 1\ntens 6*6+1=37\nso 372\n"
        "372 + 9:\nones 2+9=11, carry 1\ntens 7+0+1=8\nhundreds 3+0=3\nso 381",
        381,
    )


def test_the_stream_is_a_function_of_its_arguments():
    assert take(50, seed=3) == take(50, seed=3)
    assert take(50, seed=3) != take(50, seed=4)


def test_the_splits_share_no_expression():
    train = {problem.expression for problem in take(5000)}
    held_out = {problem.expression for problem in take(2000, seed=1, split=Split.HELD_OUT)}
    assert not train & held_out
    assert all(split_of(expression) is Split.HELD_OUT for expression in held_out)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"12-5=7 </think> The answer is \boxed{7}.", 7),
        (r"<think>x</think>\boxed{1} or rather \boxed{-2}", -2),
        (r"\boxed{5}", 5),
        (r"\boxed{5}</think> none", None),
        (r"<think>\boxed{5}", None),
        (r"</think>\boxed{ 12 }", 12),
        (r"</think>\boxed{1.5}", None),
        (r"</think>\boxed{}", None),
        (r"</think>\boxed{007}", 7),
        ("", None),
    ],
)
def test_the_verifier_reads_the_last_box_after_the_thoughts(text, expected):
    assert answer(text) == expected
    assert is_correct(text, 7) is (expected == 7)


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match=r"levels must be some of \(1, 2, 3, 4\), not \(5,\)"):
        take(1, levels=(5,))
    with pytest.raises(ValueError, match="levels"):
        take(1, levels=())
    with pytest.raises(ValueError, match="word_share must lie between 0 and 1, not 1.5"):
        take(1, word_share=1.5)
    with pytest.raises(ValueError, match=r"operations must be some of \('\+', '-', '\*'\), not \('/',\)"):
        take(1, operations=("/",))
    with pytest.raises(ValueError, match="multiplication comes in word problems only"):
        take(1, operations=("*",), word_share=0.0)


def test_operations_that_are_not_asked_for_are_left_out_and_the_others_unchanged():
    everything = take(400)
    for operations in (("+",), ("+", "-"), ("*",)):
        chosen = [each for each in everything if set(each.expression.split()[1::2]) <= set(operations)]
        assert 20 < len(chosen) < 400
        assert take(len(chosen), operations=operations) == chosen


def test_the_data_file(tmp_path, monkeypatch):
    path = tmp_path / "data" / "held_out.jsonl"
    arguments = ["tool", str(path), "--count", "200", "--seed", "2", "--split", "held-out", "--levels", "1", "3"]
    monkeypatch.setattr("sys.argv", arguments)
    make_tiny_reasoner_data.main()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == [f"held-out-{i:05d}" for i in range(200)]
    assert all(is_correct(line["messages"][1]["content"], line["answer"]) for line in lines)
    assert {line["level"] for line in lines} == {1, 3}
    assert len({line["messages"][0]["content"] for line in lines}) == 200
