"""What it means when Orbax cannot restore: damaged files, or more than the devices hold."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from jax.errors import JaxRuntimeError

# How tensorstore says that bytes are absent or are not those that were written.
_DAMAGE = re.compile(r"\b(?:NOT_FOUND|DATA_LOSS|INVALID_ARGUMENT|FAILED_PRECONDITION|OUT_OF_RANGE): ([^\[\n]*)")


@contextmanager
def restoring(path: str, names: Iterable[str]) -> Iterator[None]:
    """Turns damage of the arrays `names` in `path`, and a lack of memory, into one sentence; else the error passes."""
    try:
        yield
    except Exception as error:  # Orbax raises nothing narrower for what it meets
        sentence = _explanation(error, names)
        if sentence is None:
            raise
        raise ValueError(f"{path}: {sentence}") from error


def _explanation(error: Exception, names: Iterable[str]) -> str | None:
    causes = list(_causes(error))
    if any(_is_out_of_memory(cause) for cause in causes):
        return "its arrays do not fit the memory of the devices; use a wider mesh"
    reasons = [found[1] for cause in causes if (found := _DAMAGE.search(str(cause)))]
    reasons += [str(cause) for cause in causes if isinstance(cause, FileNotFoundError | json.JSONDecodeError)]
    if not reasons:
        return None
    text = "\n".join(map(str, causes))
    name = max((name for name in names if f"{name}/" in text or f"'{name}'" in text), key=len, default="an array")
    return f"{name} is damaged or incomplete ({reasons[0].strip().splitlines()[0][:200]})"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_out_of_memory(error: BaseException) -> bool:
    exhausted = isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    return exhausted or isinstance(error, MemoryError)
