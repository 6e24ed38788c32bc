"""TOML files and ``--set`` overrides to configurations."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from qwq_jax.config.frozen import Frozen, describe

C = TypeVar("C", bound=Frozen)


def load_toml(path: str | Path, cls: type[C], overrides: Sequence[str] = ()) -> C:
    """Reads `path` as a `cls`, after applying `overrides` such as ``"optimizer.learning_rate=1e-5"``.

    Raises:
        ValueError: One sentence that names the file and the key path.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"{path}: cannot be read: {reason}") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None
    return build(cls, values, overrides, source=str(path))


def build(cls: type[C], values: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str) -> C:
    """Makes a `cls` of nested `values` and `overrides`; `source` says in errors where the values came from.

    Raises:
        ValueError: One sentence that names `source`, or the override at fault, and the key path.
    """
    merged = {key: _copy(value) for key, value in values.items()}
    for override in overrides:
        _apply(merged, override)
    try:
        return cls.model_validate(merged)
    except ValidationError as error:
        where = f"{source} with --set {' --set '.join(overrides)}" if overrides else source
        raise ValueError(f"{where}: {describe(error, key_paths(cls))}") from None


def key_paths(cls: type[Frozen], prefix: str = "") -> list[str]:
    """Lists every key that `cls` has, as a dotted path: ``["steps", "mesh", "mesh.data", ...]``."""
    paths = []
    for name, field in cls.model_fields.items():
        paths.append(prefix + name)
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for candidate in candidates:
            if isinstance(candidate, type) and issubclass(candidate, Frozen):
                paths.extend(key_paths(candidate, f"{prefix}{name}."))
    return paths


def _copy(value: Any) -> Any:
    return {key: _copy(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _apply(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise ValueError(f"--set {override}: expected KEY=VALUE, such as mesh.data=2")
    for depth, key in enumerate(keys[:-1], start=1):
        if values.get(key) is None:  # a table that may be absent, and is
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise ValueError(f"--set {override}: {'.'.join(keys[:depth])} is a value, not a table")
    values[keys[-1]] = _toml_value(text.strip())


def _toml_value(text: str) -> Any:
    """Reads `text` as a TOML value, or as a bare string where it is none, so that shells need no second quotes."""
    try:
        document = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return document["value"] if len(document) == 1 else text
