r"""What verifiers make of right, wrong and hostile answers: the adversarial table.

Each row is an answer known, what the model wrote, and whether that is right. Where a row looks debatable, its comment
says what decided.
"""

import json
import signal
import time
from fractions import Fraction
from pathlib import Path

import pytest
import reasoning_gym

from qwq_jax.config.rewards import ArithmeticConfig, ExactConfig, MathConfig, NumericConfig, ReasoningGymConfig, Take
from qwq_jax.rl.rewards.mathematics import MathReward, OverdueError, at_most
from qwq_jax.rl.rewards.reward import make_reward
from tests.rl.rewards.replies import reply, task


@pytest.fixture(scope="module")
def mathematics():
    return MathReward(MathConfig(seconds=4.0))


MATH = [
    # The same in other words.
    ("42", "42", True),
    ("42", "42.0", True),
    ("42", "042", True),
    ("42", "((((40 + 2))))", True),
    ("42", "42.", True),
    ("42", "$42$", True),
    ("42", r"\text{42}", True),
    ("42", r"\mathbf{42}", True),
    ("$42$", "42", True),
    (r"\boxed{42}", "42", True),
    ("-5", "\N{MINUS SIGN}5", True),
    ("1234", "1,234", True),
    ("1234", "1{,}234", True),
    ("1000000", "10^6", True),
    # Fractions and decimals.
    ("1/2", r"\frac{1}{2}", True),
    (r"\frac12", "0.5", True),
    (r"\frac{1}{2}", "2^{-1}", True),
    ("1.5", r"1\frac{1}{2}", True),
    ("3", r"\frac{9}{3}", True),
    ("1/3", "0.333333", True),
    ("1/3", "0.333", False),
    (r"\pi", "3.14", False),
    # Percentages mean either the part or the number of hundredths, units nothing.
    ("50", r"50\%", True),
    ("0.5", r"50\%", True),
    ("0.5", "50%", True),
    ("0.5", "50", False),
    ("5", r"5\text{ cm}", True),
    (r"5\text{ cm}", "5", True),
    ("90", r"90^\circ", True),
    ("5", r"\$5", True),
    # Sets, tuples and intervals.
    (r"\{1,2\}", r"\{2,1\}", True),
    ("1,2", "2,1", True),
    ("1,2", "1", False),
    ("(1,2)", "(2,1)", False),
    ("(3,1,2)", "(3,1,2)", True),
    ("(3,1,2)", "(1,2,3)", False),
    ("[0,1)", "[0,1)", True),
    ("[0,1)", "(0,1)", False),
    (r"\emptyset", "0", False),
    # Expressions and equations.
    ("x^2+2x+1", "(x+1)^2", True),
    ("x+1", "y+1", False),
    (r"\sqrt{8}", r"2\sqrt{2}", True),
    ("3", "x=3", True),
    ("x=42", "y=42", False),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", True),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", False),
    # Words: their letters are no factors.
    (r"\text{Tuesday}", "tuesday", True),
    ("Tuesday", "Tuesday", True),
    ("listen", "silent", False),
    (r"\text{no solution}", r"\text{No solution}", True),
    ("B", r"\text{(B)}", True),
    ("B", "C", False),
    # More than one answer is none.
    ("3", "1,2,3", False),
    ("3", r"3\text{ or }4", False),
    ("3", r"\pm 3", False),
    ("42", "42 43", False),
    ("42", "4 2", False),
    # Not the number.
    ("42", "x", False),
    ("42", r"\infty", False),
    ("0", r"\frac{0}{0}", False),
    ("42", r"\text{forty-two}", False),
    ("42", r"\text{}", False),
    ("5", r"5 \neq 6", False),
    ("5", "x > 5", False),
]


@pytest.mark.parametrize(("known", "written", "right"), MATH)
def test_mathematics(mathematics, known, written, right):
    score = mathematics.score(task(answer=known), reply(f"<think>hm</think>So \\boxed{{{written}}}."))
    assert (score.value, score.correct) == (float(right), right)
    assert type(score.value) is float


@pytest.mark.parametrize(
    "written",
    [
        "9^{9^{9^{9}}}",
        "9^9^9^9",
        pytest.param("(10^9)!", marks=pytest.mark.slow),
        "(" * 900 + "7" + ")" * 900,
        "7" * 100_000,
        r"\frac" * 400,
    ],
)
def test_what_cannot_be_computed_is_wrong_in_time(mathematics, written):
    started = time.monotonic()
    assert mathematics.score(task(answer="7"), reply(f"\\boxed{{{written}}}")).correct is False
    assert time.monotonic() - started < 4.0


def test_a_limit_holds_where_an_interruption_is_lost():
    """As in a callback of the garbage collector, which Python lets nothing leave."""
    before = signal.getsignal(signal.SIGALRM)
    lost = 0
    with pytest.raises(OverdueError), at_most(0.05):
        try:
            time.sleep(5.0)
        except OverdueError:
            lost += 1
        time.sleep(5.0)
    assert lost == 1
    assert (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)) == (before, (0.0, 0.0))


@pytest.mark.parametrize(
    "written",
    [
        "__import__('pathlib').Path({path!r}).touch()",
        "\\text{{__import__('pathlib').Path({path!r}).touch()}}",
        "exec(\"open({path!r}, 'w')\")",
        "(lambda: open({path!r}, 'w'))()",
        "$open({path!r}, 'w')$",
    ],
)
@pytest.mark.parametrize("config", [MathConfig(), NumericConfig(), ExactConfig(), ArithmeticConfig()])
def test_no_answer_is_evaluated(tmp_path, written, config):
    path = tmp_path / "touched"
    written = written.format(path=str(path))
    score = make_reward(config).score(task(answer="7"), reply(f"\\boxed{{{written}}}"))
    assert score.correct is False
    assert not path.exists()


THOUGHTS = [
    # Text, whether the prompt opened the thoughts, whether 42 is the answer.
    (r"<think>\boxed{42}</think>\boxed{7}", False, False),
    (r"<think>\boxed{7}</think>\boxed{42}", False, True),
    (r"<think>\boxed{42}</think>I do not know.", False, False),
    (r"<think>\boxed{42}", False, False),
    (r"\boxed{42}", True, False),
    (r"\boxed{42}", False, True),
    (r"hm</think>\boxed{42}", True, True),
    (r"hm</think>\boxed{7} then \boxed{42}", True, True),
    (r"hm</think>\boxed{42} then \boxed{7}", True, False),
    (r"hm</think>\boxed{42} then \boxed{7", True, False),
    (r"hm</think>\boxed{42} <think>or \boxed{7}", True, True),
    (r"hm</think>\boxed{7} <think>or \boxed{42}", True, False),
    (r"hm</think>\boxed{7} <think>\boxed{42}</think>", True, False),
    (r"hm</think>42", True, False),
    ("", False, False),
]


@pytest.mark.parametrize(("text", "opened", "right"), THOUGHTS)
@pytest.mark.parametrize("config", [MathConfig(), NumericConfig(), ExactConfig(), ArithmeticConfig()])
def test_only_the_last_box_of_the_answer_counts(text, opened, right, config):
    score = make_reward(config).score(task(answer="42"), reply(text, opened=opened))
    assert (score.value, score.correct) == (float(right), right)


def test_any_of_several_known_answers_will_do(mathematics):
    several = task(answer=["a half", "1/2", 3])
    for written, right in ((r"\frac{1}{2}", True), ("3", True), ("4", False)):
        assert mathematics.score(several, reply(f"\\boxed{{{written}}}")).correct is right
        assert make_reward(ExactConfig()).score(task(answer=["x", written]), reply(f"\\boxed{{{written}}}")).correct


@pytest.mark.parametrize(
    ("known", "text", "config", "right"),
    [
        ("Paris", "It is\n\nParis.", ExactConfig(take=Take.LAST_LINE), True),
        ("Paris", "Paris\nor London", ExactConfig(take=Take.LAST_LINE), False),
        ("Paris", "paris", ExactConfig(take=Take.ANSWER), True),
        ("Paris", "paris", ExactConfig(take=Take.ANSWER, case=True), False),
        ("Paris", "Paris or London", ExactConfig(take=Take.ANSWER), False),
        ("1/2", r"\boxed{\frac{2}{4}}", NumericConfig(), True),
        ("50%", r"\boxed{0.5}", NumericConfig(), True),
        ("1,000", r"\boxed{1000 \text{ km}}", NumericConfig(), True),
        ("10", r"\boxed{10.1}", NumericConfig(), False),
        ("10", r"\boxed{10.1}", NumericConfig(absolute=0.2), True),
        ("10", r"\boxed{10.1}", NumericConfig(relative=0.02), True),
        ("10", r"\boxed{10 or 11}", NumericConfig(), False),
        ("10", "That makes 7 + 3 = 10.", NumericConfig(take=Take.LAST_LINE), True),
        ("10", "That makes 10, not 11.", NumericConfig(take=Take.LAST_LINE), False),
        ("10", r"\boxed{9^9^9^9}", NumericConfig(), False),
        ("10", r"\boxed{1e999999999}", NumericConfig(), False),
        (10, r"\boxed{ 10 }", ArithmeticConfig(), True),
        ("-10", r"\boxed{-10}", ArithmeticConfig(), True),
        ("10", r"\boxed{10.0}", ArithmeticConfig(), False),
    ],
)
def test_text_and_numbers(known, text, config, right):
    assert make_reward(config).score(task(answer=known), reply(text)).correct is right


@pytest.mark.parametrize(
    ("config", "judge", "message"),
    [
        (MathConfig(), {}, "judge.answer: expected a text, a number or a list of them, got None"),
        (ExactConfig(), {"answer": []}, "judge.answer: expected a text, a number or a list of them, got []"),
        (ExactConfig(), {"answer": " "}, "judge.answer: expected a text"),
        (NumericConfig(), {"answer": "x"}, "judge.answer: expected a number, got ('x',)"),
        (ArithmeticConfig(), {"answer": "1.5"}, "judge.answer: expected an integer, got '1.5'"),
        (ReasoningGymConfig(), {"entry": {"answer": "1"}}, "judge.entry: expected an entry of reasoning-gym"),
    ],
)
def test_a_task_without_an_answer_is_refused(config, judge, message):
    with pytest.raises(ValueError, match="task t-1") as error:
        make_reward(config).score(task(**judge), reply(r"\boxed{1}"))
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["chain_sum", "leg_counting", "countdown", "propositional_logic"])
def test_reasoning_gym_scores_as_it_does_itself(name):
    dataset = reasoning_gym.create_dataset(name, size=3, seed=5)
    reward = make_reward(ReasoningGymConfig(take=Take.ANSWER))
    for entry in dataset:
        stored = json.loads(json.dumps(entry))  # as a file of tasks keeps it
        for answer in (entry["answer"] or entry["metadata"].get("example_answer"), "nonsense"):
            score = reward.score(task(entry=stored), reply(str(answer)))
            assert score.value == dataset.score_answer(str(answer), entry)
            assert score.correct is (score.value == 1.0)


def test_numbers_agree_with_fractions(rng):
    """Any two decimals are judged as exact arithmetic would."""
    reward = make_reward(NumericConfig(relative=0.0, absolute=0.01))
    for _ in range(200):
        one, other = (f"{value:.3f}" for value in rng.normal(0, 0.02, 2))
        right = abs(Fraction(one) - Fraction(other)) <= Fraction(0.01)
        assert reward.score(task(answer=other), reply(f"\\boxed{{{one}}}")).correct is right


def test_nothing_here_evaluates():
    for path in (Path(make_reward.__code__.co_filename).parent).glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert " eval(" not in text and "exec(" not in text, path
