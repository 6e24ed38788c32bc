"""Values of Python as plain JSON and back, between a program nobody trusts and those who judge what it returns.

Pickles would run code where they are read. Here only numbers, text and containers of them cross, exactly and without
their classes: a list whose ``==`` always holds arrives as a list. Everything else stays where it is and is named by a
number, its handle.

Both sides read this file, that inside of the sandbox and that outside.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

MOST_ITEMS = 100_000
"""Of an iterator, so many are read."""

_SMALL = 2**63


def encode(value: Any, handle: Callable[[Any], int]) -> Any:
    """The value as what JSON has; `handle` gives the number of an object that stays.

    Raises:
        RecursionError: It contains itself, or is too deep.
    """
    match value:
        case None | bool():
            return value
        case int():
            return int(value) if -_SMALL < value < _SMALL else {"type": "int", "value": hex(value)}
        case float():
            return float(value)
        case str():
            return "".join(value)
        case list() | deque():
            return [encode(item, handle) for item in value]
        case tuple() | set() | frozenset() | range():
            kind = next(kind for kind in (tuple, set, frozenset, range) if isinstance(value, kind))
            return {"type": kind.__name__, "value": [encode(item, handle) for item in _first(iter(value))]}
        case dict():
            return {"type": "dict", "value": [[encode(key, handle), encode(value[key], handle)] for key in value]}
        case bytes() | bytearray():
            return {"type": "bytes", "value": value.hex()}
        case complex():
            return {"type": "complex", "value": [value.real, value.imag]}
        case Iterator():
            return {"type": "iterator", "value": [encode(item, handle) for item in _first(value)]}
        case _:
            return {"type": "object", "value": handle(value)}


def decode(data: Any, remote: Callable[[int], Any]) -> Any:
    """The value that `encode` wrote; `remote` makes what stands for the object of a handle.

    Raises:
        ValueError: Not what `encode` writes.
    """
    if isinstance(data, list):
        return [decode(item, remote) for item in data]
    if not isinstance(data, dict):
        return data
    match data:
        case {"type": "int", "value": str(text)}:
            return int(text, 16)
        case {"type": "tuple" | "range", "value": list(items)}:
            return tuple(decode(item, remote) for item in items)
        case {"type": "set" | "frozenset", "value": list(items)}:
            return {decode(item, remote) for item in items}
        case {"type": "dict", "value": list(pairs)}:
            return {decode(key, remote): decode(value, remote) for key, value in pairs}
        case {"type": "bytes", "value": str(text)}:
            return bytes.fromhex(text)
        case {"type": "complex", "value": [float(real), float(imaginary)]}:
            return complex(real, imaginary)
        case {"type": "iterator", "value": list(items)}:
            return iter([decode(item, remote) for item in items])
        case {"type": "object", "value": int(number)}:
            return remote(number)
    raise ValueError("not plain data")


def _first(items: Iterator[Any]) -> Iterator[Any]:
    return itertools.islice(items, MOST_ITEMS)
