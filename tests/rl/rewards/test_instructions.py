"""Each rule on what keeps it and on what breaks it, and instructions that are refused."""

import pytest

from qwq_jax.config.rewards import InstructionsConfig
from qwq_jax.rl.rewards.instructions import check_instructions
from qwq_jax.rl.rewards.reward import make_reward
from qwq_jax.rl.rewards.rules import RULES
from tests.rl.rewards.replies import reply, task

CASES = [
    # Rule, what it takes, a text that keeps it, one that breaks it.
    ("words", {"least": 2, "most": 3}, "one two - three!", "one -"),
    ("words", {"most": 3}, "one", "one two three four"),
    ("characters", {"least": 3, "most": 4}, " abcd \n", "ab"),
    ("lines", {"least": 2, "most": 2}, "a\n\n  \nb\n", "a b"),
    ("paragraphs", {"least": 2, "most": 2}, "a\nb\n \n\nc\n\n", "a\nb"),
    ("paragraph_starts", {"paragraph": 2, "start": "Second"}, "First one.\n\nsecond one.", "Second.\n\nFirst."),
    ("paragraph_starts", {"paragraph": -1, "start": "Last"}, "a\n\nb\n\nLast", "Last\n\na"),
    ("paragraph_starts", {"paragraph": 1, "start": "a"}, "a", "\n\n"),
    (
        "sections",
        {"marker": "SECTION", "least": 2, "most": 2},
        "SECTION 1\nx\n**SECTION 2**\ny",
        "a SECTION 1\nSECTION 2",
    ),
    ("parts", {"divider": "******", "least": 2, "most": 2}, "a\n******\nb", "a\n******\n"),
    ("bullets", {"least": 2, "most": 2}, "* a\n  - b\ntext", "* a\n*b*\n- "),
    ("numbered", {"least": 2}, "1. a\n2) b", "1. a\n2.5 b"),
    ("headings", {"least": 1, "most": 1}, "# Title\ntext", "#tag"),
    ("highlights", {"least": 2, "most": 2}, "*a b* and **c**", "2 * 3 * 4 and *a*"),
    ("placeholders", {"least": 2}, "[name], [street]", "[name], []"),
    ("title", {}, "<<A day>>\ntext", "<< >> text"),
    ("contains", {"texts": ["cat", "Dog"]}, "The CAT and the dog.", "The cats and the dog."),
    ("contains", {"texts": ["cat"], "whole": False}, "concatenate", "dog"),
    ("contains", {"texts": ["c++", "a.b"]}, "c++ and a.b", "c++ and a-b"),
    ("forbids", {"texts": ["however"]}, "But howevers", "However, no"),
    ("forbids", {"texts": ["A"], "case": True}, "a", "A"),
    ("forbids", {"texts": [","], "whole": False}, "no comma", "a, b"),
    ("occurs", {"part": "very", "least": 2, "most": 2}, "very, Very good", "very every"),
    ("occurs", {"part": "e", "least": 3, "whole": False}, "eee", "ee"),
    ("starts", {"start": "Dear"}, "\nDear Ann", "My Dear"),
    ("ends", {"end": "Any questions?"}, "x. Any questions? \n", "Any questions? No."),
    ("one_of", {"texts": ["yes", "no"]}, " yes\n", "yes."),
    ("lowercase", {}, "only small, 1.", "Not"),
    ("uppercase", {}, "ONLY 1 BIG!", "Not"),
    ("capital_words", {"least": 1, "most": 2}, "a BIG, 2 x WOW", "A B C"),
    ("quoted", {}, '"all of it"', '"a" and b'),
    ("json", {}, '```json\n{"a": [1]}\n```', 'Here: {"a": 1}'),
    ("json", {}, "[1]", "3"),
    ("json", {}, "{}", "[" * 100_000),
    ("matches", {"pattern": r"^\d{4}-\d\d$"}, "on\n2024-05\n", "2024-5"),
]


@pytest.mark.parametrize(("rule", "values", "kept", "broken"), CASES)
def test_rules(rule, values, kept, broken):
    given = task(instructions=[{"rule": rule, **values}])
    reward = make_reward(InstructionsConfig())
    for text, right in ((kept, True), (broken, False)):
        score = reward.score(given, reply(f"<think>{broken if right else kept}</think>{text}"))
        assert (score.value, score.correct) == (float(right), right), text
        assert score.note == ("" if right else f"broken: {rule}")


def test_every_rule_is_tried():
    assert {rule for rule, *_ in CASES} == set(RULES)
    assert len(RULES) >= 15


def test_several_rules():
    given = task(instructions=[{"rule": "lowercase"}, {"rule": "words", "most": 1}, {"rule": "ends", "end": "."}])
    text = reply("two words.")
    score = make_reward(InstructionsConfig()).score(given, text)
    assert (score.value, score.correct) == (0.0, False)
    score = make_reward(InstructionsConfig(partial=True)).score(given, text)
    assert (score.value, score.correct, score.note) == (pytest.approx(2 / 3), False, "broken: words")


@pytest.mark.parametrize("text", ["", " \n", "<think>a"])
def test_nothing_keeps_no_rule(text):
    given = task(instructions=[{"rule": "forbids", "texts": ["x"]}, {"rule": "words", "most": 5}])
    assert make_reward(InstructionsConfig(partial=True)).score(given, reply(text)).value == 0.0


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        (None, "judge.instructions: expected a list of rules, got None"),
        ([], "judge.instructions: expected a list of rules"),
        (["words"], "judge.instructions[0].rule: expected one of words, characters"),
        ([{"rule": "word"}], "got 'word'"),
        ([{"rule": "title"}, {"rule": "words", "lest": 3}], "judge.instructions[1]: words: lest: Unexpected keyword"),
        ([{"rule": "words", "least": "3"}], "words: least: expected a valid integer, got '3'"),
        ([{"rule": "words"}], "words: expected least or most, or both"),
        ([{"rule": "contains", "texts": []}], "contains: texts: "),
        ([{"rule": "contains", "texts": [""]}], "contains: texts.0: "),
        ([{"rule": "contains"}], "contains: texts: Missing"),
        ([{"rule": "matches", "pattern": "("}], "matches: pattern: missing )"),
    ],
)
def test_refused(instructions, message):
    with pytest.raises(ValueError, match="task t-1") as error:
        check_instructions(task(instructions=instructions))
    assert message in str(error.value)
