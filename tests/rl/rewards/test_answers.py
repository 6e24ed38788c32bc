r"""What of a reply is its answer: boxes, code blocks, normalised text, and never a thought."""

import pytest

from qwq_jax.config.rewards import Take
from qwq_jax.rl.rewards.answers import answer_text, last_boxed, last_code, normalised, taken, vote
from tests.rl.rewards.replies import reply


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("\\boxed{1}", False, "\\boxed{1}"),
        ("<think>\\boxed{1}</think>\n\n\\boxed{2}", False, "\\boxed{2}"),
        ("\\boxed{1}</think>\n\n\\boxed{2}", True, "\\boxed{2}"),
        ("\\boxed{1} and on and on", True, ""),
        ("<think>\\boxed{1}", False, ""),
        ("<think>a</think>b</think>c", False, "c"),
        ("<think>a</think>b<think>c", False, "b"),
        ("<think>a</think>b<think>c</think>d", False, "d"),
    ],
)
def test_thoughts_are_no_answer(text, opened, expected):
    assert answer_text(reply(text, opened=opened)) == expected


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"\boxed{1}", "1"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left\{1, 2\right\}} }", r"\left\{1, 2\right\}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{\{}", r"\{"),
        (r"\boxed{1} then \boxed{2", None),
        (r"\boxed{1} then \boxed{ }", None),
        (r"\boxed{1\}", None),
        (r"\boxed{" * 20_000, None),
        ("no box", None),
        ("", None),
    ],
)
def test_the_last_box(text, boxed):
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  New   York. ", "new york"),
        (r"$\text{New York}$", "new york"),
        (r"**\(x + 1\)**", "x + 1"),
        ("(B)", "b"),
        ("b.", "b"),
        ("(1, 2)", "(1, 2)"),
        ("\N{FULLWIDTH DIGIT FOUR}\N{FULLWIDTH DIGIT TWO}", "42"),
        ("\N{MINUS SIGN}5", "-5"),
        ("'it'", "it"),
    ],
)
def test_normalised(text, expected):
    assert normalised(text) == expected


def test_case_is_kept_on_request():
    assert normalised("$\\text{NaCl}$", case=True) == "NaCl"


def test_normalising_takes_no_longer_for_nested_wrappers():
    assert len(normalised("**" * 50_000)) == 100_000


def test_takes():
    text = reply("<think>x</think>\nFirst.\nSo \\boxed{4}\n\n Last. \n")
    assert [taken(text, take) for take in (Take.BOXED, Take.LAST_LINE, Take.ANSWER)] == [
        "4",
        "Last.",
        "First.\nSo \\boxed{4}\n\n Last.",
    ]
    assert [taken(reply("<think>x"), take) for take in Take] == [None] * 3


def test_equal_answers_share_a_vote():
    assert vote(reply("\\boxed{42}")) == vote(reply("so \\boxed{ 42. }")) == "42"
    assert vote(reply("42")) is None
    assert vote(reply("<think>\\boxed{42}</think>none")) is None


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("```\na\n```\nand\n```\nb\n```", "b\n"),
        ("```py\na\n```\nprints\n```\n1\n```", "a\n"),
        ("```Python3\na\n```\n```python\nb\n```", "b\n"),
        ("~~~python\na\n~~~", "a\n"),
        ("````python\n'''\n```\n'''\n````", "'''\n```\n'''\n"),
        ("  ```python\n  a\n  ```", "  a\n"),
        ("```python\na", None),
        ("```python\na\n```\n```python\nb", "a\n"),
        ("print(1)", None),
        ("`print(1)`", None),
        ("```print(1)```", None),
        ("```" + " " * 50_000 + "`", None),
    ],
)
def test_the_last_code_block(text, code):
    assert last_code(text) == code
