"""What an answer has to look like: read from OpenAI's `response_format` and from vLLM's fields of the same meaning."""

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from pydantic import Field

from qwq_jax.config.frozen import Frozen
from qwq_jax.config.json_line import shortened


class ConstraintKind(StrEnum):
    """How the text of a constraint is to be read."""

    JSON = "json"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


class Constraint(Frozen):
    """A language that the whole answer, thoughts left out, belongs to.

    Attributes:
        kind: How `text` is to be read.
        text: A JSON schema, a regular expression, a JSON list of texts, or a grammar in Lark's notation.
        field: Where the request gave it, for messages.
    """

    kind: ConstraintKind = Field(strict=False)
    text: str
    field: str = "constraint"


_ANY_OBJECT = {"type": "object"}
_STRUCTURED = ("json", "json_object", "regex", "choice", "grammar")
_FLAT = {f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar")}

CONSTRAINT_FIELDS = frozenset({"response_format", "structured_outputs", *_FLAT})
"""The fields of a request body that `read_constraint` understands."""


def read_constraint(fields: Mapping[str, Any]) -> Constraint | None:
    """The one constraint that these fields of a request body ask for; None where they ask for plain text.

    Args:
        fields: Those of `CONSTRAINT_FIELDS` that the body has, none of them null.

    Example:
        >>> read_constraint({"guided_regex": "[0-9]+"}).kind
        <ConstraintKind.REGEX: 'regex'>

    Raises:
        ValueError: A field is malformed, or two ask for a constraint; the sentence names them.
    """
    found = [constraint for name, value in fields.items() if (constraint := _read(name, value)) is not None]
    if len(found) > 1:
        raise ValueError(f"{found[0].field} and {found[1].field} cannot both constrain one answer: leave one out")
    return found[0] if found else None


def _read(name: str, value: Any) -> Constraint | None:
    if name == "response_format":
        return _response_format(value)
    if name == "structured_outputs":
        return _structured_outputs(value)
    return _constraint(_FLAT[name], value, name)


def _response_format(value: Any) -> Constraint | None:
    kind = value.get("type") if isinstance(value, dict) else None
    extra = {"json_schema"} if kind == "json_schema" else set()
    match kind:
        case "text" | "json_object":
            constraint = None if kind == "text" else _constraint("json", _ANY_OBJECT, "response_format")
        case "json_schema":
            where, wrapper = "response_format.json_schema", value.get("json_schema")
            if not isinstance(wrapper, dict) or "schema" not in wrapper:
                raise ValueError(f"{where}: expected an object with a schema, got {shortened(wrapper)}")
            _only(wrapper, {"name", "description", "schema", "strict"}, where)
            constraint = _constraint("json", wrapper["schema"], f"{where}.schema")
        case _:
            raise ValueError(
                "response_format: expected an object whose type is text, json_object or json_schema, "
                f"got {shortened(value)}"
            )
    _only(value, {"type", *extra}, "response_format")
    return constraint


def _structured_outputs(value: Any) -> Constraint | None:
    if not isinstance(value, dict):
        raise ValueError(f"structured_outputs: expected an object, got {shortened(value)}")
    _only(value, set(_STRUCTURED), "structured_outputs")
    given = [kind for kind in _STRUCTURED if value.get(kind) is not None and value[kind] is not False]
    if len(given) > 1:
        raise ValueError(f"structured_outputs: {given[0]} and {given[1]} cannot both constrain one answer")
    if not given:
        return None
    kind, where = given[0], f"structured_outputs.{given[0]}"
    if kind != "json_object":
        return _constraint(kind, value[kind], where)
    if value[kind] is not True:
        raise ValueError(f"{where}: expected true or false, got {shortened(value[kind])}")
    return _constraint("json", _ANY_OBJECT, where)


def _constraint(kind: str, value: Any, where: str) -> Constraint:
    match kind:
        case "json":
            text = _schema(value, where)
        case "choice":
            if not isinstance(value, list) or not value or not all(isinstance(one, str) and one for one in value):
                raise ValueError(f"{where}: expected a list of texts that are not empty, got {shortened(value)}")
            text = json.dumps(value, ensure_ascii=False)
        case _:
            if not isinstance(value, str) or not value:
                raise ValueError(f"{where}: expected a text that is not empty, got {shortened(value)}")
            text = value
    return Constraint(kind=ConstraintKind(kind), text=text, field=where)


def _schema(value: Any, where: str) -> str:
    """A schema as text; vLLM takes it as text too."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where}: expected a JSON schema, but it is no JSON: {error}") from None
    if not isinstance(value, dict | bool):
        raise ValueError(f"{where}: expected a JSON schema, got {shortened(value)}")
    return json.dumps(value, ensure_ascii=False)


def _only(value: Mapping[str, Any], known: set[str], where: str) -> None:
    strange = next((name for name in value if name not in known), None)
    if strange is not None:
        raise ValueError(f"{where}.{strange}: is not implemented")
