r"""Numbers as people and models write them, read exactly and without evaluating anything.

``-1,234.5``, ``3/4``, ``\frac{3}{4}``, ``1 1/2``, ``2.5e-3``, ``2.5 \times 10^{-3}``, ``50\%``, ``\$12``, ``12 km``.
"""

import re
from collections import deque
from dataclasses import dataclass
from fractions import Fraction

_MOST_CHARACTERS = 200
_LARGEST_EXPONENT = 1000

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_TEN = r"(?:[eE](?P<exponent>[-+]?\d+)|\s*(?:\\times|\\cdot|×|\*|x)\s*10\s*\^\s*\{?(?P<power>[-+]?\d+)\}?)"
_NUMBER = re.compile(
    rf"""
    (?P<sign>(?:(?<![\w)}}])[-+−])?)[ ]*
    (?:
        (?:(?P<whole>{_DIGITS})\s*(?=\\[dtc]?frac))?
            \\[dtc]?frac\s*(?:\{{\s*(?P<above>-?{_DECIMAL})\s*\}}|(?P<above1>\d))
            \s*(?:\{{\s*(?P<below>{_DECIMAL})\s*\}}|(?P<below1>\d))
        | (?:(?P<mixed>\d+)[ ]+)?(?P<over>{_DECIMAL})\s*/\s*(?P<under>{_DECIMAL})
        | (?P<decimal>{_DECIMAL}){_TEN}?
    )
    (?P<percent>\s*(?:\\?%|percent\b))?
    """,
    re.VERBOSE,
)
_UNIT = re.compile(
    r"\s*(?:\\(?:text|textbf|mathrm|rm)\s*\{[^{}]*\}|\^\s*\{?\\circ\}?|°)?"
    r"[a-zA-Z/ ]*(?:(?<=[a-zA-Z}])(?:\^?[23]|\^\{[23]\}|[²³]))?[.]?"
)
_DROPPED = re.compile(r"\\[!,;: ]|\\left|\\right|~|[$€£¥]|\\[$]|\\\(|\\\)")


@dataclass(frozen=True)
class Number:
    """A number, exact.

    Attributes:
        value: Its value; of ``50%``, 50.
        percent: Whether a percent sign follows it.
    """

    value: Fraction
    percent: bool = False


def read_number(text: str) -> Number | None:
    r"""The number that a text is, units and currency aside; None if it is none, or more than one.

    >>> read_number(r"\$1,234.50")
    Number(value=Fraction(2469, 2), percent=False)
    """
    text = _plain(text).strip()
    if len(text) > _MOST_CHARACTERS:
        return None
    found = _NUMBER.match(text)
    if found is None or not _UNIT.fullmatch(text, found.end()):
        return None
    return _number(found)


def last_number(text: str) -> Number | None:
    """The last number in a text; None without."""
    last = deque(_NUMBER.finditer(_plain(text)), maxlen=1)
    return _number(last[0]) if last else None


def agree(one: Number, other: Number, *, absolute: float, relative: float) -> bool:
    """Whether `one` is `other`, give or take the larger of `absolute` and `relative` times `other`.

    Where only one has a percent sign it may mean either: ``50%`` agrees with 0.5 and, as an answer to "how many
    percent", with 50.
    """
    if one.percent == other.percent:
        readings = [(one.value, other.value)]
    else:
        readings = [(one.value, other.value), (_fraction_of(one), _fraction_of(other))]
    return any(abs(a - b) <= max(Fraction(absolute), Fraction(relative) * abs(b)) for a, b in readings)


def _fraction_of(number: Number) -> Fraction:
    return number.value / 100 if number.percent else number.value


def _plain(text: str) -> str:
    return _DROPPED.sub("", text.replace("{,}", ",").replace("\\ ", " "))


def _number(found: re.Match[str]) -> Number | None:
    part = {name: value.replace(",", "") for name, value in found.groupdict().items() if value}
    if any(len(value) > _MOST_CHARACTERS for value in part.values()):
        return None
    exponent = int(part.get("exponent") or part.get("power") or 0)
    if abs(exponent) > _LARGEST_EXPONENT:
        return None
    if "decimal" in part:
        value = Fraction(part["decimal"]) * Fraction(10) ** exponent
    else:
        below = Fraction(part.get("below") or part.get("below1") or part["under"])
        if not below:
            return None
        above = Fraction(part.get("above") or part.get("above1") or part["over"])
        value = int(part.get("whole") or part.get("mixed") or 0) + above / below
    return Number(-value if part.get("sign") in ("-", "−") else value, percent="percent" in part)
