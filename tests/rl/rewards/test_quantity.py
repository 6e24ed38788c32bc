"""Numbers as people write them, against Python's own reading of fractions."""

from fractions import Fraction

import pytest

from qwq_jax.rl.rewards.quantity import Number, agree, last_number, read_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("-1,234.5", Fraction("-1234.5")),
        ("1{,}234", 1234),
        (r"1\,234", 1234),
        ("\N{MINUS SIGN}5", -5),
        ("+5", 5),
        (".5", Fraction(1, 2)),
        ("12.", 12),
        ("3/4", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac34", Fraction(-3, 4)),
        (r"1\frac{1}{2}", Fraction(3, 2)),
        ("1 1/2", Fraction(3, 2)),
        ("2.5e-3", Fraction("0.0025")),
        (r"2.5 \times 10^{-3}", Fraction("0.0025")),
        (r"2 \cdot 10^3", 2000),
        (r"\$12.50", Fraction("12.5")),
        ("€12", 12),
        ("12 km", 12),
        (r"12\text{ cm}^2", 12),
        ("12 m^2", 12),
        (r"90^\circ", 90),
        ("12 m/s.", 12),
    ],
)
def test_one_number(text, value):
    assert read_number(text) == Number(Fraction(value))


@pytest.mark.parametrize("text", ["50%", r"50\%", "50 %", "50 percent"])
def test_percentages(text):
    assert read_number(text) == Number(Fraction(50), percent=True)


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "--5", "5-3", "3=3", "1,2", "1,23", "12 or 13", "12 or 3", "5 apples and 3", "3.14.15", "1 234"),
        *("1/0", r"\frac{1}{0}", "1e999999999", "9" * 300, "9^9^9^9", "__import__('os')", "2**10", "1_000"),
        "5" + "a" * 500,
    ],
)
def test_no_number_or_more_than_one(text):
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5 cats, then 1,234.", 1234),
        ("It costs $12.50 in total", Fraction("12.5")),
        ("so x = -3/4.", Fraction(-3, 4)),
        ("in 2024-05", 5),
        ("answer 5\n3/4", Fraction(3, 4)),
    ],
)
def test_the_last_number(text, value):
    assert last_number(text) == Number(Fraction(value))


def test_a_long_text_is_read_in_time():
    assert last_number("1," * 20_000 + "7") is not None
    assert read_number("5" + "a" * 199) is not None


@pytest.mark.parametrize(
    ("one", "other", "right"),
    [
        ("50%", "0.5", True),
        ("0.5", "50%", True),
        ("50%", "50", True),
        ("50%", "50%", True),
        ("50%", "5", False),
        ("0.5%", "50%", False),
        ("100.05", "100", True),
        ("100.2", "100", False),
        ("0.005", "0", True),
        ("0.02", "0", False),
    ],
)
def test_agreement(one, other, right):
    given, known = read_number(one), read_number(other)
    assert given and known
    assert agree(given, known, absolute=0.01, relative=0.001) is right
