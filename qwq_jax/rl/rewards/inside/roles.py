"""What a process in the sandbox becomes: a program that is run, a module that is called, or tests that call it."""

import builtins
import sys
import types
from collections.abc import Callable
from typing import Any

from qwq_jax.rl.rewards.inside.frames import Message, framed, receive, send
from qwq_jax.rl.rewards.inside.plain_data import decode, encode

_MODULE = "solution"
# A program that has an `abs` of its own must not lend it to the tests that judge it.
_TAKEN = frozenset([*vars(builtins), *sys.stdlib_module_names])
_MOST_OBJECTS = 100_000
_MOST_CHARACTERS = 500
# What programs raise and go on after. Anything else ends the process, once it is reported.
_ORDINARY = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    NameError,
    OSError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
)


def be_program(code: types.CodeType) -> None:
    """Runs it as ``python program.py`` would; what it raises ends the process with a traceback, as it does there."""
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.argv = ["program.py"]
    exec(code, _module("__main__").__dict__)


def be_module(code: types.CodeType, questions: int, answers: int) -> None:
    """Runs it as a module, tells its names, and then answers questions about its objects until there are no more.

    Args:
        code: The program.
        questions: File descriptor of messages ``{"call": handle, "args": [...], "kwargs": {...}}`` and
            ``{"get": handle, "name": attribute}``, values as `encode` writes them.
        answers: Where ``{"names": {...}}``, then ``{"value": ..., "args": [...]}``, the arguments as the call left
            them, or ``{"raised": [type, text]}`` go.
    """
    objects: list[Any] = []

    def handle(value: Any) -> int:
        if len(objects) >= _MOST_OBJECTS:
            raise MemoryError("too many objects")
        objects.append(value)
        return len(objects) - 1

    module = _module(_MODULE)
    try:
        exec(code, module.__dict__)
        names = {
            name: encode(value, handle)
            for name, value in vars(module).items()
            if not name.startswith("__") and not isinstance(value, types.ModuleType)
        }
    except BaseException as error:
        send(answers, framed(_raised(error)))
        raise
    send(answers, framed({"names": names}))
    while True:
        question = receive(questions)
        try:
            answer = _answered(question, objects, handle)
        except _ORDINARY as error:
            answer = _raised(error)
        except BaseException as error:
            send(answers, framed(_raised(error)))
            raise
        send(answers, framed(answer))


def _answered(question: Message, objects: list[Any], handle: Callable[[Any], int]) -> Message:
    if "get" in question:
        return {"value": encode(getattr(objects[question["get"]], question["name"]), handle), "args": []}
    args = decode(question["args"], objects.__getitem__)
    kwargs = {name: decode(value, objects.__getitem__) for name, value in question["kwargs"].items()}
    value = objects[question["call"]](*args, **kwargs)
    return {"value": encode(value, handle), "args": encode(args, handle)}


def _raised(error: BaseException) -> Message:
    kind = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
    return {"raised": [kind, str(error)[:_MOST_CHARACTERS]]}


def be_tests(code: str, names: Message, candidate: str, questions: int, answers: int) -> None:
    """Runs code that asserts, where the program's names are stand-ins that ask the process that has the program.

    The code sees the names as globals and as the module ``solution``, but for those of Python's own functions and
    modules; if there is a `candidate`, also under that name.
    Afterwards its functions ``check(candidate)`` and ``test...()`` are called, if it defines any.

    Args:
        code: The tests.
        names: Those of the program, values as `encode` writes them.
        candidate: The name that is tested; empty for none.
        questions: File descriptor that answers of the program come from.
        answers: Where ``{"ask": question}`` and, of a test that fails, ``{"failed": text}`` go.
    """

    def ask(question: Message) -> Message:
        send(answers, framed({"ask": question}))
        return receive(questions)

    module = _module("__main__")
    scope = vars(module)
    try:
        given = {
            name: decode(value, lambda number: _Remote(ask, number))
            for name, value in names.items()
            if name not in _TAKEN
        }
        vars(_module(_MODULE)).update(given)
        scope.update(given)
        if candidate:
            if candidate not in given:
                raise NameError(f"the program does not define {candidate}")
            scope["candidate"] = given[candidate]
        exec(compile(code, "<tests>", "exec", dont_inherit=True), scope)
        for name, value in list(scope.items()):
            if not isinstance(value, types.FunctionType):
                continue
            if name == "check" and candidate:
                value(given[candidate])
            elif name.startswith("test") and not value.__code__.co_argcount:
                value()
    except BaseException as error:
        send(answers, framed({"failed": f"{type(error).__name__}: {error}"[:_MOST_CHARACTERS]}))
        raise


class _Remote:
    """Stands in tests for an object of the program. It is never equal to anything but itself."""

    def __init__(self, ask: Callable[[Message], Message], number: int) -> None:
        self._ask_program, self._number = ask, number

    def __getattr__(self, name: str) -> Any:
        return self._value(self._ask_program({"get": self._number, "name": name}))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        question = {
            "call": self._number,
            "args": encode(list(args), _own_number),
            "kwargs": {name: encode(value, _own_number) for name, value in kwargs.items()},
        }
        answer = self._ask_program(question)
        value = self._value(answer)
        for before, after in zip(args, decode(answer["args"], self._other), strict=True):
            _become(before, after)
        return value

    def __len__(self) -> int:
        return self.__getattr__("__len__")()

    def __getitem__(self, key: Any) -> Any:
        return self.__getattr__("__getitem__")(key)

    def __str__(self) -> str:
        return self.__getattr__("__str__")()

    def _other(self, number: int) -> "_Remote":
        return _Remote(self._ask_program, number)

    def _value(self, answer: Message) -> Any:
        if "raised" in answer:
            kind, text = answer["raised"]
            error = getattr(builtins, kind, RuntimeError)
            raise (error if issubclass(error, Exception) else RuntimeError)(text)
        if "lost" in answer:
            raise RuntimeError(f"the program ended: {answer['lost']}")
        return decode(answer["value"], self._other)


def _own_number(value: Any) -> int:
    if isinstance(value, _Remote):
        return value.__dict__["_number"]
    raise TypeError(f"a test cannot hand a {type(value).__name__} to the program")


def _become(before: Any, after: Any) -> None:
    """Does to an argument in the tests what the call did to it in the program."""
    if isinstance(before, list) and isinstance(after, list):
        before[:] = after
    elif isinstance(before, dict | set) and isinstance(after, type(before)):
        before.clear()
        before.update(after)


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__["__builtins__"] = builtins
    sys.modules[name] = module
    return module
