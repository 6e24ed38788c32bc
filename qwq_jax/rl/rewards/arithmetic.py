r"""Arithmetic with its working shown: problems, worked solutions and the verifier that marks them.

Two kinds of problem, sums ("What is 385 - 47 + 6?") and short word problems ("Mia has 47 shells. ..."), each solved
column by column inside ``<think>`` and ended by ``\boxed{n}``. The same module therefore writes the data of
supervised training and grades the answers of a sampled model.

A problem is known by its expression. Whether it is held out is a hash of that expression alone, so the two splits stay
disjoint whatever seeds, levels and sizes are asked for, and a word problem never repeats a held-out sum in other words.

Plain Python on the standard library.
"""

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

LEVELS = (1, 2, 3, 4)
"""1: one operation on two digits; 2: on three digits; 3: two operations on two digits; 4: two operations on three."""

OPERATIONS = ("+", "-", "*")
"""Multiplication, by one digit, comes in word problems only."""

HELD_OUT_ONE_IN = 8
"""One expression in this many belongs to the held-out split."""

_PLACES = ("ones", "tens", "hundreds", "thousands", "ten-thousands")
_NAMES = ("Mia", "Tom", "Ana", "Leo", "Eva", "Max", "Zoe", "Ben")
_THINGS = ("shells", "cards", "stamps", "apples", "books", "coins", "marbles", "pencils")
_BOXES = ("boxes", "bags", "jars")
_GAINS = ("finds {n} more", "buys {n} more", "gets {n} from {other}")
_LOSSES = ("gives {n} to {other}", "loses {n}", "sells {n}")
_ASKS = ("What is {}?", "Compute {}.", "Work out {}.")

_BOXED = re.compile(r"\\boxed\{\s*(-?\d+)\s*\}")


class Split(Enum):
    """Which side of the train / held-out line a problem lies on."""

    TRAIN = "train"
    HELD_OUT = "held-out"


@dataclass(frozen=True)
class Problem:
    r"""A question, its worked solution and its answer.

    Example: ``Problem(question="What is 38 + 4?", expression="38 + 4", level=1, answer=42, reasoning="38 + 4:\n...")``
    """

    question: str
    expression: str
    level: int
    reasoning: str
    answer: int

    def messages(self) -> list[dict[str, str]]:
        """The problem as a two-message chat, thoughts and boxed answer in the assistant's turn."""
        reply = f"<think>\n{self.reasoning}\n</think>\n\nThe answer is \\boxed{{{self.answer}}}."
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": reply}]


def answer(text: str) -> int | None:
    r"""The last boxed integer after the thoughts, or None where there is none (or the thoughts never end).

    ``text`` is a whole reply or a completion whose prompt already opened ``<think>``:
    ``answer("12-5=7\n</think>\n\n\\boxed{7}") == 7``.
    """
    _, closed, reply = text.rpartition("</think>")
    if not closed and "<think>" in text:
        return None
    found = _BOXED.findall(reply)
    return int(found[-1]) if found else None


def is_correct(text: str, expected: int) -> bool:
    """Whether the reply's final boxed answer is ``expected``."""
    return answer(text) == expected


def split_of(expression: str, one_in: int = HELD_OUT_ONE_IN) -> Split:
    """The split an expression belongs to, for ever; one in so many is held out."""
    digest = hashlib.sha256(expression.encode()).digest()
    return Split.HELD_OUT if int.from_bytes(digest[:8], "big") % one_in == 0 else Split.TRAIN


def problems(
    seed: int,
    *,
    split: Split,
    levels: Sequence[int] = LEVELS,
    word_share: float = 0.5,
    operations: Sequence[str] = OPERATIONS,
) -> Iterator[Problem]:
    """An endless stream of problems of one split; the same arguments give the same stream.

    Repeats are possible, as they are in a small space of problems; ``word_share`` of them are word problems, before
    those that need other than these ``operations`` are left out.

    Raises:
        ValueError: There is no such level or operation, or no such problem at all.
    """
    unknown = sorted(set(levels) - set(LEVELS))
    if unknown or not levels:
        raise ValueError(f"levels must be some of {LEVELS}, not {tuple(levels)}")
    if not 0.0 <= word_share <= 1.0:
        raise ValueError(f"word_share must lie between 0 and 1, not {word_share}")
    if not operations or set(operations) - set(OPERATIONS):
        raise ValueError(f"operations must be some of {OPERATIONS}, not {tuple(operations)}")
    if set(operations) == {"*"} and word_share == 0:
        raise ValueError("multiplication comes in word problems only, so word_share must be above 0")
    rng = random.Random(f"arithmetic/{seed}")
    while True:
        level = rng.choice(levels)
        draw = _word_problem if rng.random() < word_share else _sum
        question, terms = draw(rng, level)
        expression = _expression(terms)
        if split_of(expression) is split and set(expression.split()[1::2]) <= set(operations):
            reasoning, result = solve(terms)
            yield Problem(question, expression, level, reasoning, result)


Terms = tuple[tuple[str, int], ...]
"""A chain evaluated from left to right, as ``(("+", 47), ("*", 3), ("-", 12))``; the first sign is always plus."""


def solve(terms: Terms) -> tuple[str, int]:
    """The working, line by line, and the result of a chain of operations.

    >>> print(solve((("+", 47), ("-", 9)))[0])
    47 - 9:
    ones 17-9=8, borrow 1
    tens 4-1-0=3
    so 38
    """
    (_, total), *operations = terms
    lines = [_expression(terms)] if len(operations) > 1 else []
    for sign, operand in operations:
        lines.append(f"{total} {sign} {operand}:")
        columns, total = _COLUMNS[sign](total, operand)
        lines += [f"{place} {column}" for place, column in zip(_PLACES, columns, strict=False)]
        lines.append(f"so {total}")
    return "\n".join(lines), total


def _digits(number: int, width: int) -> list[int]:
    return [number // 10**i % 10 for i in range(width)]


def _add(a: int, b: int) -> tuple[list[str], int]:
    width, carry, columns = max(len(str(a)), len(str(b))), 0, []
    for i, (x, y) in enumerate(zip(_digits(a, width), _digits(b, width), strict=True)):
        column = x + y + carry
        working = f"{x}+{y}+1={column}" if carry else f"{x}+{y}={column}"
        carry = column // 10
        columns.append(working + (", carry 1" if carry and i < width - 1 else ""))
    return columns, a + b


def _subtract(a: int, b: int) -> tuple[list[str], int]:
    assert a >= b, (a, b)
    width, borrow, columns = len(str(a)), 0, []
    for x, y in zip(_digits(a, width), _digits(b, width), strict=True):
        taken = f"-{borrow}" if borrow else ""
        needs = x - borrow < y
        column = x - borrow - y + (10 if needs else 0)
        columns.append(f"{x + 10 if needs else x}{taken}-{y}={column}" + (", borrow 1" if needs else ""))
        borrow = int(needs)
    return columns, a - b


def _multiply(a: int, b: int) -> tuple[list[str], int]:
    assert 0 <= b <= 9, b
    width, carry, columns = len(str(a)), 0, []
    for i, x in enumerate(_digits(a, width)):
        column = x * b + carry
        working = f"{x}*{b}+{carry}={column}" if carry else f"{x}*{b}={column}"
        carry = column // 10
        columns.append(working + (f", carry {carry}" if carry and i < width - 1 else ""))
    return columns, a * b


_COLUMNS = {"+": _add, "-": _subtract, "*": _multiply}


def _expression(terms: Terms) -> str:
    (_, first), *operations = terms
    return str(first) + "".join(f" {sign} {operand}" for sign, operand in operations)


def _number(rng: random.Random, level: int) -> int:
    """A number of at most the level's digits, its length drawn first so that short ones are not rare."""
    most = 3 if level in (2, 4) else 2
    digits = most if rng.random() < 0.7 else rng.randint(1, most)
    return rng.randint(max(2, 10 ** (digits - 1)), 10**digits - 1)


def _operations(level: int) -> int:
    return 1 if level in (1, 2) else 2


def _extend(rng: random.Random, level: int, terms: Terms, count: int) -> Terms:
    """Append ``count`` additions and subtractions that never go below zero."""
    total = solve(terms)[1]
    for _ in range(count):
        operand = _number(rng, level)
        sign = "-" if operand <= total and rng.random() < 0.5 else "+"
        total += operand if sign == "+" else -operand
        terms = (*terms, (sign, operand))
    return terms


def _sum(rng: random.Random, level: int) -> tuple[str, Terms]:
    terms = _extend(rng, level, (("+", _number(rng, level)),), _operations(level))
    return rng.choice(_ASKS).format(_expression(terms)), terms


def _word_problem(rng: random.Random, level: int) -> tuple[str, Terms]:
    name, other = rng.sample(_NAMES, 2)
    things = rng.choice(_THINGS)
    scene = rng.choice((_story, _boxes, _comparison))
    return scene(rng, level, name, other, things)


def _events(rng: random.Random, other: str, terms: Terms) -> str:
    """The operations as things that happen: "finds 38 more, then gives 12 to Tom"."""
    kinds = {"+": _GAINS, "-": _LOSSES}
    return ", then ".join(rng.choice(kinds[sign]).format(n=operand, other=other) for sign, operand in terms)


def _story(rng: random.Random, level: int, name: str, other: str, things: str) -> tuple[str, Terms]:
    start = _number(rng, level)
    terms = _extend(rng, level, (("+", start),), _operations(level))
    happened = _events(rng, other, terms[1:])
    return f"{name} has {start} {things}. {name} {happened}. How many {things} does {name} have now?", terms


def _boxes(rng: random.Random, level: int, name: str, other: str, things: str) -> tuple[str, Terms]:
    each, count = _number(rng, level), rng.randint(2, 9)
    terms = _extend(rng, level, (("+", each), ("*", count)), _operations(level) - 1)
    opening = f"{name} has {count} {rng.choice(_BOXES)} with {each} {things} in each."
    if len(terms) == 2:
        return f"{opening} How many {things} does {name} have?", terms
    happened = _events(rng, other, terms[2:])
    return f"{opening} {name} {happened}. How many {things} does {name} have now?", terms


def _comparison(rng: random.Random, level: int, name: str, other: str, things: str) -> tuple[str, Terms]:
    terms = _extend(rng, level, (("+", _number(rng, level)),), 1)
    (_, own), (sign, difference) = terms
    opening = f"{name} has {own} {things}. {other} has {difference} {'more' if sign == '+' else 'fewer'} than {name}."
    if _operations(level) == 1:
        return f"{opening} How many {things} does {other} have?", terms
    return f"{opening} How many {things} do they have together?", (*terms, ("+", own))
