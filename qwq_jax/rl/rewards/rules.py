r"""Rules that a program can check an answer against, after IFEval (Zhou et al., arXiv 2311.07911).

Each function here whose name does not begin with an underscore is a rule, by the name of the function. Its first
argument is the answer, thoughts left out, and the others are what a task gives. Where a rule counts, ``least`` and
``most`` bound the count. No rule depends on a language, but that words are divided by spaces.
"""

import json as json_library
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated

from pydantic import ConfigDict, Field, validate_call

_BULLET = re.compile(r"^[ \t]*[-*+•][ \t]+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^[ \t]*\d+[.)][ \t]+\S", re.MULTILINE)
_HEADING = re.compile(r"^#{1,6}[ \t]+\S", re.MULTILINE)
_HIGHLIGHT = re.compile(r"(?<![*\w])(\*{1,2})(?![*\s])[^*\n]+(?<!\s)\1(?![*\w])")
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]+\]")
_TITLE = re.compile(r"<<[^<>\n]+>>")
_FENCED = re.compile(r"```[^\n`]*\n(.*)\n[ \t]*```", re.DOTALL)
_PARAGRAPH_BREAK = re.compile(r"\n[ \t]*\n")

Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]


def _within(count: int, least: int, most: int | None) -> bool:
    return least <= count and (most is None or count <= most)


def _words(text: str) -> list[str]:
    return [word for word in text.split() if any(character.isalnum() for character in word)]


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in _PARAGRAPH_BREAK.split(text) if part.strip()]


def _count(text: str, part: Text, *, case: bool, whole: bool) -> int:
    """How often `part` occurs, as a whole word where `whole`."""
    edge = r"(?<!\w){}(?!\w)" if whole else "{}"
    return len(re.findall(edge.format(re.escape(part)), text, 0 if case else re.IGNORECASE))


def words(text: str, *, least: int = 0, most: int | None = None) -> bool:
    """Counts words: what stands between spaces and has a letter or a digit."""
    return _within(len(_words(text)), least, most)


def characters(text: str, *, least: int = 0, most: int | None = None) -> bool:
    """Counts characters, spaces at both ends left out."""
    return _within(len(text.strip()), least, most)


def lines(text: str, *, least: int = 0, most: int | None = None) -> bool:
    """Counts lines that are not blank."""
    return _within(sum(bool(line.strip()) for line in text.splitlines()), least, most)


def paragraphs(text: str, *, least: int = 0, most: int | None = None) -> bool:
    """Counts paragraphs, which blank lines divide."""
    return _within(len(_paragraphs(text)), least, most)


def paragraph_starts(text: str, *, paragraph: int, start: Text) -> bool:
    """Paragraph number `paragraph`, from 1, or from the end if negative, begins so; capitals do not matter."""
    found = _paragraphs(text)
    if not 0 < abs(paragraph) <= len(found):
        return False
    return found[paragraph - (paragraph > 0)].casefold().startswith(start.casefold())


def sections(text: str, *, marker: Text, least: int = 0, most: int | None = None) -> bool:
    """Counts sections: lines that begin with `marker`, as ``SECTION``, and a number or a letter after it."""
    return _within(len(re.findall(rf"^\W*{re.escape(marker)}\s+\w", text, re.MULTILINE)), least, most)


def parts(text: str, *, divider: Text, least: int = 0, most: int | None = None) -> bool:
    """Counts parts that `divider`, such as ``******``, divides; none may be blank."""
    found = text.strip().split(divider)
    return all(part.strip() for part in found) and _within(len(found), least, most)


def bullets(text: str, *, least: int = 0, most: int | None = None) -> bool:
    """Counts lines that begin with ``-``, ``*``, ``+`` or a bullet."""
    return _within(len(_BULLET.findall(text)), least, most)


def numbered(text: str, *, least: int = 0, most: int | None = None) -> bool:
    """Counts lines that begin with a number and a full stop or a bracket."""
    return _within(len(_NUMBERED.findall(text)), least, most)


def headings(text: str, *, least: int = 0, most: int | None = None) -> bool:
    """Counts Markdown headings."""
    return _within(len(_HEADING.findall(text)), least, most)


def highlights(text: str, *, least: int = 0, most: int | None = None) -> bool:
    """Counts pieces of a line ``*like this*`` or ``**like this**``."""
    return _within(len(_HIGHLIGHT.findall(text)), least, most)


def placeholders(text: str, *, least: int = 0, most: int | None = None) -> bool:
    """Counts placeholders such as ``[name]``."""
    return _within(len(_PLACEHOLDER.findall(text)), least, most)


def title(text: str) -> bool:
    """There is a title in double angle brackets: ``<<title>>``."""
    return any(match.group()[2:-2].strip() for match in _TITLE.finditer(text))


def contains(text: str, *, texts: Texts, case: bool = False, whole: bool = True) -> bool:
    """All of `texts` occur, as whole words unless told otherwise."""
    return all(_count(text, part, case=case, whole=whole) for part in texts)


def forbids(text: str, *, texts: Texts, case: bool = False, whole: bool = True) -> bool:
    """None of `texts` occurs."""
    return not any(_count(text, part, case=case, whole=whole) for part in texts)


def occurs(
    text: str, *, part: Text, least: int = 0, most: int | None = None, case: bool = False, whole: bool = True
) -> bool:
    """Counts how often one text occurs."""
    return _within(_count(text, part, case=case, whole=whole), least, most)


def starts(text: str, *, start: Text) -> bool:
    """The answer begins so."""
    return text.strip().startswith(start.strip())


def ends(text: str, *, end: Text) -> bool:
    """The answer ends so."""
    return text.strip().endswith(end.strip())


def one_of(text: str, *, texts: Texts) -> bool:
    """The answer is one of these, and nothing else."""
    return text.strip() in [choice.strip() for choice in texts]


def lowercase(text: str) -> bool:
    """There are letters, and none is a capital."""
    return text.islower()


def uppercase(text: str) -> bool:
    """There are letters, and all are capitals."""
    return text.isupper()


def capital_words(text: str, *, least: int = 0, most: int | None = None) -> bool:
    """Counts words of capitals only."""
    return _within(sum(word.isupper() for word in _words(text)), least, most)


def quoted(text: str) -> bool:
    """The whole answer is in double quotes."""
    inner = text.strip()
    return len(inner) > 2 and inner[0] == inner[-1] == '"'


def json(text: str) -> bool:
    """The answer is JSON, an object or a list, and nothing else; it may be in a fenced block."""
    fenced = _FENCED.fullmatch(text.strip())
    try:
        return isinstance(json_library.loads(fenced.group(1) if fenced else text), dict | list)
    except (ValueError, RecursionError):
        return False


def matches(text: str, *, pattern: str) -> bool:
    """A regular expression of Python's is found in the answer."""
    return re.search(pattern, text, re.MULTILINE) is not None


_Rule = Callable[..., bool]
_STRICT = ConfigDict(strict=True)
RULES: Mapping[str, _Rule] = MappingProxyType(
    {
        rule.__name__: validate_call(config=_STRICT)(rule)
        for rule in (
            words,
            characters,
            lines,
            paragraphs,
            paragraph_starts,
            sections,
            parts,
            bullets,
            numbered,
            headings,
            highlights,
            placeholders,
            title,
            contains,
            forbids,
            occurs,
            starts,
            ends,
            one_of,
            lowercase,
            uppercase,
            capital_words,
            quoted,
            json,
            matches,
        )
    }
)
"""The rules by name."""
