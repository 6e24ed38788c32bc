"""The one base class of every configuration, and what is said when a value does not fit."""

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails


class Frozen(BaseModel):
    """An immutable configuration that refuses unknown keys and never guesses a type.

    ``"3"`` is not an integer, ``1`` is not a boolean and ``nan`` is not a number. Two conversions that lose nothing are
    made: an integer where a float is expected, and a list (all that TOML and JSON have) where a tuple is expected.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


def describe(error: ValidationError, known_keys: Sequence[str] = ()) -> str:
    """Says in one line what is wrong, each key path with its reason, and offers the closest of `known_keys`."""
    return "; ".join(_describe_one(details, known_keys) for details in error.errors())


def _describe_one(details: ErrorDetails, known_keys: Sequence[str]) -> str:
    path = ".".join(str(part) for part in details["loc"])
    reason = details["msg"].removeprefix("Value error, ")
    match details["type"]:
        case "extra_forbidden":
            similar = difflib.get_close_matches(path, known_keys, n=1)
            return f"{path}: unknown key" + (f", did you mean {similar[0]}?" if similar else "")
        case "missing":
            return f"{path}: missing"
        case "value_error":
            return f"{path}: {reason}" if path else reason
        case _:
            reason = (
                reason.replace("Input should be", "expected")
                .replace("a valid tuple", "a list")
                .replace("a valid dictionary or instance of", "a table of")
            )
            return f"{path}: {reason}, got {details['input']!r}"
