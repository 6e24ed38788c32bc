r"""What of a reply counts as its answer: never a thought, and of several boxes the last."""

import re
import unicodedata
from collections import deque

from qwq_jax.chat import THINK_CLOSE, THINK_OPEN
from qwq_jax.config.rewards import Take
from qwq_jax.rl.types import Reply

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_WRAPPERS = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\$\$?(.*?)\$\$?",
        r"\\\((.*)\\\)",
        r"\\\[(.*)\\\]",
        r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}",
        r"\*\*(.*)\*\*",
        r"`(.*)`",
        r"\"(.*)\"",
        r"'(.*)'",
        r"\(([^\W\d_])\)",  # the letter of a choice
    )
)
_PYTHON = ("python", "python3", "py")
# Longer than any answer that is compared; wrappers are looked for in less, since looking takes the square of it.
_LONGEST_WRAPPED = 2000


def answer_text(reply: Reply) -> str:
    r"""The answer without thoughts that it opens again; empty where thoughts never ended.

    >>> answer_text(Reply("", "...", "4 <think>or 5?</think> \\boxed{4}", tokens=9))
    ' \\boxed{4}'
    """
    return reply.answer.rpartition(THINK_CLOSE)[2].partition(THINK_OPEN)[0]


def last_boxed(text: str) -> str | None:
    r"""What the last ``\boxed{}`` holds; None if there is none, or the last one is empty or never closed.

    >>> last_boxed(r"first \boxed{1}, no: \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    boxes = deque(_BOX.finditer(text), maxlen=1)
    if not boxes:
        return None
    start = boxes[0].end()
    depth, index = 1, start
    while index < len(text):
        match text[index]:
            case "\\":
                index += 1  # an escaped brace is a character
            case "{":
                depth += 1
            case "}":
                depth -= 1
        if not depth:
            return text[start:index].strip() or None
        index += 1
    return None


def taken(reply: Reply, take: Take) -> str | None:
    """The piece of the answer that a reward compares; None where it is missing."""
    text = answer_text(reply)
    match take:
        case Take.BOXED:
            return last_boxed(text)
        case Take.LAST_LINE:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            return lines[-1] if lines else None
        case Take.ANSWER:
            return text.strip() or None


def normalised(text: str, *, case: bool = False) -> str:
    r"""The text without what does not matter: spacing, quotes, dollar signs, a final full stop, capitals unless `case`.

    >>> normalised(r" $\text{New  York}$. ")
    'new york'
    """
    text = unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-")
    text = " ".join(text.split())
    before = None
    while text != before and len(text) <= _LONGEST_WRAPPED:
        before = text
        text = text.strip().rstrip(".,;:!").strip()
        for wrapper in _WRAPPERS:
            whole = wrapper.fullmatch(text)
            text = whole.group(1).strip() if whole else text
    return text if case else text.casefold()


def vote(reply: Reply) -> str | None:
    r"""The answer as text that equal answers share, for majority voting; None without a ``\boxed{}``."""
    boxed = last_boxed(answer_text(reply))
    return None if boxed is None else normalised(boxed)


def last_code(text: str) -> str | None:
    r"""The program in the last fenced block that is marked as Python, or in the last of all if none is; None without.

    A block that is never closed was cut off, and does not count.

    >>> last_code("Try\n```python\nprint(1)\n```\nIt prints:\n```\n1\n```\n")
    'print(1)\n'
    """
    blocks: list[tuple[str, str]] = []
    opened, language, lines = "", "", []
    for line in text.splitlines():
        fence, info = _fence(line)
        if not opened:
            if fence:
                opened, language, lines = fence, info.partition(" ")[0].casefold(), []
        elif fence.startswith(opened) and not info:
            blocks.append((language, "\n".join([*lines, ""])))
            opened = ""
        else:
            lines.append(line)
    marked = [code for language, code in blocks if language in _PYTHON]
    return (marked or [code for _, code in blocks] or [None])[-1]


def _fence(line: str) -> tuple[str, str]:
    """The backticks or tildes that a line opens or closes a block with, and what follows them; none of other lines."""
    text = line.strip()
    for mark in "`~":
        info = text.lstrip(mark)
        if len(text) - len(info) >= 3 and "`" not in info:
            return text[: len(text) - len(info)], info.strip()
    return "", ""
