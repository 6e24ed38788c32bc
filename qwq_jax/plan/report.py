"""What libtpu says and writes of a program: its memory, before and after it was found too large."""

import re
from pathlib import Path

# What the compiler says of a program that a device cannot hold: the one of what it needs while it runs, the other of
# what it is given.
_USED = re.compile(r"Used ([\d.]+)([KMGT])?i?B? of ([\d.]+)([KMGT])?i?B? hbm")
_EXCEEDS = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)")
_UNITS = {None: 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

# Of a device's main memory: what lies in another is of a color.
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), page \d+, (.*)$", re.MULTILINE)
# Temporaries are rounded up to it.
_PAGE = 1 << 14


def assigned_bytes(assignment: str) -> tuple[int, int]:
    """Bytes of temporaries, and of results that lie in no argument, as `memory_analysis` has them of a whole program.

    It has a page or some less of programs that are small themselves.

    Args:
        assignment: The text that libtpu writes when it has assigned memory, ``*-buffer-assignment.txt``.

    Raises:
        ValueError: It assigns nothing, and so is none.
    """
    found = [(int(size), kind) for size, kind in _ALLOCATION.findall(assignment)]
    if not found:
        raise ValueError("the compiler wrote no assignment of memory")
    temporaries = sum(size for size, kind in found if "preallocated-temp" in kind)
    result = sum(size for size, kind in found if "maybe-live-out" in kind and not kind.startswith("parameter"))
    return -(-temporaries // _PAGE) * _PAGE, result


def is_whole(text: Path | None) -> bool:
    """Whether the text of a program is there, and to its end: its last computation is that which calls the others."""
    if text is None:
        return False
    lines = text.read_text(encoding="utf-8", errors="replace").rstrip()
    return "\nENTRY " in lines and lines.endswith("\n}")


def too_large(error: Exception) -> tuple[int, int]:
    """Bytes that a program wants of a device, and what it may have; anything but a lack of memory is raised again."""
    found = _USED.search(str(error)) or _EXCEEDS.search(str(error))
    if found is None:
        raise error
    used, usable = (int(float(found[i]) * _UNITS[found[i + 1]]) for i in (1, 3))
    return used, usable
