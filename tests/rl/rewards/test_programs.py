"""Programs against their tests: what passes, what does not, and what tries to pass without being right."""

import math

import pytest

from qwq_jax.config.rewards import CodeConfig
from qwq_jax.rl.rewards.coding import CodeReward
from qwq_jax.rl.rewards.inside.plain_data import decode, encode
from qwq_jax.rl.rewards.programs import (
    AssertTest,
    CallTest,
    StreamTest,
    read_tests,
    same_output,
    same_value,
)
from qwq_jax.rl.rewards.sandbox import Sandbox
from tests.rl.rewards.replies import code, isolation, reply, task

ADD = "def add(a, b):\n    return a + b"
SUMS = [{"stdin": f"{n} {n}\n", "stdout": f"{2 * n}\n"} for n in range(5)]


def made(**changes):
    return CodeReward(CodeConfig(**{"test_seconds": 3.0, "sandbox": isolation(), "memory_mib": 256, **changes}))


@pytest.fixture(scope="module")
def reward():
    return made()


@pytest.fixture(scope="module")
def hurried():
    return made(test_seconds=0.5)


@pytest.fixture(scope="module")
def partial():
    return made(partial=True)


def half_slow(rows):
    """Every second row among the slow tests: each takes a tenth of a second."""
    return [pytest.param(*row, marks=pytest.mark.slow if index % 2 else ()) for index, row in enumerate(rows)]


RIGHT = [
    # A program, and tests that it passes.
    ("a, b = map(int, input().split())\nprint(a + b)", SUMS),
    ("import sys\nfor line in sys.stdin: print(sum(map(int, line.split())))", SUMS),
    ("a, b = map(int, open(0).read().split())\nprint(float(a + b))\nexit()", SUMS),
    ("def main():\n    print(sum(map(int, input().split())))\nif __name__ == '__main__': main()", SUMS),
    ("print('a  ')\nprint()", [{"stdin": "", "stdout": "a\n"}]),
    (ADD, [{"call": "add", "args": [n, n], "result": 2 * n} for n in range(5)]),
    (ADD, [{"call": "add", "args": [1], "kwargs": {"b": 2}, "result": 3}]),
    ("class Solution:\n    def two(self, x): return (x, x)", [{"call": "Solution.two", "args": [1], "result": [1, 1]}]),
    ("f = lambda: {3, 1, 2}", [{"call": "f", "result": [1, 2, 3]}]),
    ("def f(): return {1: None, 2: 10**40}", [{"call": "f", "result": {"1": None, "2": 10**40}}]),
    ("def f(): yield 1", ["assert list(f()) == [1]"]),
    (ADD, ["assert add(3, 4) == 7", "assert add('a', 'b') == 'ab'"]),
    (ADD, "assert add(3, 4) == 7"),
    (ADD, {"asserts": "def check(candidate):\n    assert candidate(3, 4) == 7\n", "candidate": "add"}),
    (ADD, {"asserts": "from solution import add\ndef test_it():\n    assert add(3, 4) == 7"}),
    ("def srt(a): a.sort()", ["a = [3, 1]\nassert srt(a) is None\nassert a == [1, 3]"]),
    (
        "class Cache:\n    def __init__(self, n): self.d = {}\n    def put(self, k, v): self.d[k] = v\n"
        "    def get(self, k): return self.d[k]\n    def __len__(self): return len(self.d)",
        ["c = Cache(2)\nc.put(1, 'x')\nassert c.get(1) == 'x' and len(c) == 1\n"
         "try: c.get(2)\nexcept KeyError: pass\nelse: assert False"],
    ),
    ("def f(x): raise ValueError('neg')", ["try: f(-1)\nexcept ValueError as e: assert str(e) == 'neg'"]),
    ("def outer(n):\n    def inner(x): return x + n\n    return inner", ["assert outer(2)(3) == 5"]),
    ("print('noise')\n" + ADD, ["print('more')\nassert add(1, 1) == 2"]),
    ("def f(x): return x", ["v = ({1: (2.5, {3})}, [b'x', 1j, None, True])\nassert f(v) == v and type(f(v)) is tuple"]),
]  # fmt: skip


@pytest.mark.parametrize(("program", "tests"), half_slow(RIGHT))
def test_right_programs(reward, program, tests):
    score = reward.score(task(tests=tests), code(program))
    assert (score.value, score.correct) == (1.0, True), score
    assert type(score.value) is float


WRONG = [
    # A program, the tests, and what the note says.
    ("a, b = map(int, input().split())\nprint(a * b)", SUMS, "test 2: wrong output"),
    ("print(1", SUMS, "test 1: SyntaxError"),
    ("print(undefined)", SUMS, "test 1: NameError"),
    ("print(0)\nraise SystemExit(1)", SUMS, "test 1: it ended with status 1"),
    ("while True: pass", [SUMS[0]], "test 1: it took too long"),
    ("while True: print('x' * 1000)", SUMS, "test 1: it wrote too much"),
    ("x = bytearray(10 ** 10)", SUMS, "test 1: MemoryError"),
    ("import os\nos.kill(os.getppid(), 9)", SUMS, "test 1: the sandbox was lost"),
    (ADD, [{"call": "add", "args": [1, 2], "result": 4}], "test 1: wrong result"),
    (ADD, [{"call": "sub", "args": [1, 2], "result": 4}], "test 1: sub is not defined"),
    (ADD, [{"call": "add", "args": [1], "result": 4}], "test 1: TypeError"),
    ("add = 7", [{"call": "add", "result": 7}], "test 1: what the test calls is no function"),
    ("def f():\n    while True: pass", [{"call": "f", "result": 1}], "test 1: it took too long"),
    ("def f(): return 'x' * 10**7", [{"call": "f", "result": 1}], "test 1: the program was lost: output"),
    ("def f():\n    x = []\n    x.append(x)\n    return x", [{"call": "f", "result": 1}], "test 1: RecursionError"),
    ("def f(): return True", [{"call": "f", "result": 1}], "test 1: wrong result"),
    ("raise OSError('at import')", ["assert True"], "test 1: OSError: at import"),
    (ADD, ["assert add(3, 4) == 8"], "test 1: AssertionError"),
    (ADD, ["assert add(3, 4) == 7", "assert add(3, 4) == 8"], "test 2: AssertionError"),
    (ADD, {"asserts": "def check(candidate):\n    assert candidate(1, 1) == 3", "candidate": "add"}, "AssertionError"),
    (ADD, {"asserts": "def check(candidate): pass", "candidate": "sub"}, "NameError: the program does not define sub"),
    (ADD, {"asserts": "def test_it():\n    assert add(3, 4) == 8"}, "AssertionError"),
    (ADD, ["while True: pass"], "test 1: it took too long"),
]


@pytest.mark.parametrize(("program", "tests", "note"), half_slow(WRONG))
def test_wrong_programs(reward, hurried, program, tests, note):
    score = (hurried if "while True" in f"{program}{tests}" else reward).score(task(tests=tests), code(program))
    assert (score.value, score.correct) == (0.0, False)
    assert note in score.note


CHEATS = {
    "equal to everything": "class E:\n    def __eq__(self, other): return True\ndef f(*a): return E()",
    "a list equal to everything": "class E(list):\n    def __eq__(self, other): return True\ndef f(*a): return E()",
    "a number equal to everything": "class E(int):\n    def __eq__(self, other): return True\ndef f(*a): return E()",
    "a text equal to everything": "class E(str):\n    def __eq__(self, other): return True\ndef f(*a): return E()",
    "ending the process": "import os\ndef f(*a): os._exit(0)",
    "ending at import": "import os\nos._exit(0)",
    "sys.exit": "import sys\ndef f(*a): sys.exit(0)",
    "at exit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(*a): return None",
    "other builtins": """
import builtins
builtins.AssertionError = None
builtins.abs = lambda x: 0
def f(*a): return 0
""",
    "names of builtins": """
def abs(x): return 0
def isinstance(*a): return True
def any(x): return True
def f(*a): return 0
""",
    "a module of its own": """
import sys, types
math = types.ModuleType("math")
math.isclose = lambda *a: True
sys.modules["math"] = math
def f(*a): return 0
""",
    "taking the tests' names": """
def check(candidate): pass
def test_it(): pass
candidate = None
def f(*a): return 0
""",
    "the frames above": """
import sys
def f(*a):
    frame = sys._getframe()
    while frame:
        for value in list(frame.f_globals.values()) + list(frame.f_locals.values()):
            if isinstance(value, int) and value > 10**6: return value
        frame = frame.f_back
""",
    "all objects": """
import gc
def f(*a):
    for value in gc.get_objects():
        if isinstance(value, dict) and "result" in value: return value["result"]
""",
    "writing a verdict": """
import os
verdict = b'{"ended": "exit", "status": 0}'
def f(*a):
    for fd in range(64):
        try: os.write(fd, len(verdict).to_bytes(4, "big") + verdict)
        except OSError: pass
""",
    "recursion in the judge": """
def f(*a):
    x = []
    for _ in range(100000): x = [x]
    return x
""",
}
EXPECTED = 7_346_581
JUDGES = {
    "call": [{"call": "f", "args": [1, 2], "result": EXPECTED}],
    "assert": [f"import math\nassert f(1, 2) == {EXPECTED}"],
    "near": [f"assert abs(f(1, 2) - {EXPECTED}) < 1"],
    "close": [f"import math\nassert math.isclose(f(1, 2), {EXPECTED})"],
    "any": [f"assert any(value == {EXPECTED} for value in [f(1, 2)])"],
    "check": {"asserts": f"def check(candidate):\n    assert candidate(1, 2) == {EXPECTED}", "candidate": "f"},
    "contains": [f"assert {EXPECTED} in [f(1, 2)] and isinstance(f(1, 2), int)"],
    "not": [f"assert not f(1, 2) != {EXPECTED}"],
}


OFTEN = ("equal to everything", "sys.exit", "names of builtins", "the frames above")


@pytest.mark.parametrize(
    "cheat", [pytest.param(one, marks=() if one in OFTEN else pytest.mark.slow) for one in [*CHEATS, "none"]]
)
def test_nothing_passes_without_being_right(partial, cheat):
    tests = [test for judge in JUDGES.values() for test in (judge if isinstance(judge, list) else [judge])]
    score = partial.score(task(tests=tests), code(CHEATS.get(cheat, f"def f(*a): return {EXPECTED}")))
    assert score.value == (1.0 if cheat == "none" else 0.0), score


SEARCH = """
import gc, os, re, sys
found = set()
def look(text):
    found.update(re.findall("EXPECTED-[0-9]+", text))
for value in gc.get_objects():
    try: look(repr(value))
    except Exception: pass
frame = sys._getframe()
while frame:
    look(repr(frame.f_locals)); look(repr(frame.f_globals)); frame = frame.f_back
for top, _, names in os.walk("/harness"):
    for name in names:
        try: look(open(os.path.join(top, name)).read())
        except Exception: pass
for fd in range(3, 64):
    try: look(os.read(fd, 1 << 20).decode())
    except OSError: pass
look(repr(os.environ)); look(repr(sys.argv)); look(sys.stdin.read())
print(*found)
"""


def test_what_is_expected_is_not_in_the_sandbox(reward):
    assert reward.score(task(tests=[{"stdin": "EXPECTED-1", "stdout": "EXPECTED-1"}]), code(SEARCH)).correct
    assert not reward.score(task(tests=[{"stdin": "", "stdout": "EXPECTED-2"}] * 3), code(SEARCH)).correct


def test_partial_credit(partial):
    program = "a, b = map(int, input().split())\nprint(a * b)"
    score = partial.score(task(tests=SUMS), code(program))
    assert (score.value, score.correct) == (pytest.approx(2 / 5), False)
    assert score.note == "test 2: wrong output (2 of 5 passed)"
    died = "import os\na, b = map(int, input().split())\nif a == 1: os.kill(os.getppid(), 9)\nprint(a + b)"
    assert partial.score(task(tests=SUMS), code(died)).value == pytest.approx(4 / 5)
    # A program that is none stays wrong, test after test.
    assert partial.score(task(tests=[{"stdin": "", "stdout": ""}] * 3), code("print(")).value == 0.0


def test_one_start_serves_all_tests(reward, monkeypatch):
    started = []
    make = Sandbox.__init__

    def counted(self, *args):
        started.append(1)
        make(self, *args)

    monkeypatch.setattr(Sandbox, "__init__", counted)
    reward.score(task(tests=SUMS * 4), code("a, b = map(int, input().split())\nprint(a + b)"))
    assert len(started) == 1
    reward.score(task(tests=["assert add(1, 1) == 2"] * 5), code(ADD))
    assert len(started) == 3


def test_all_tests_together_have_a_time():
    slow = made(seconds=1.0, partial=True)
    score = slow.score(
        task(tests=SUMS * 10), code("import time\ntime.sleep(0.4)\nprint(sum(map(int, input().split())))")
    )
    assert 0 < score.value < 0.1 and ("too long" in score.note or "no time" in score.note)


@pytest.mark.parametrize("text", ["print(1)", "<think>```python\nprint(1)\n```</think>no", "```python\nprint(1)", ""])
def test_without_code(reward, text):
    score = reward.score(task(tests=[{"stdin": "", "stdout": "1"}]), reply(text))
    assert (score.value, score.correct, score.note) == (0.0, False, "no code block")


def test_reading_tests():
    tests = [{"stdin": "1", "stdout": "2"}, {"call": "f", "result": None}, {"asserts": "x", "candidate": "f"}, "y"]
    assert read_tests(task(tests=tests)) == (
        StreamTest("1", "2"),
        CallTest("f", None, (), {}),
        AssertTest("x", "f"),
        AssertTest("y", ""),
    )
    assert read_tests(task(tests="y")) == (AssertTest("y"),)


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (None, "judge.tests: expected tests of a program, got None"),
        ([], "judge.tests: expected tests of a program, got []"),
        ([3], "judge.tests[0]: expected an object with stdin, call or asserts, or a text, got 3"),
        ([{"input": "1"}], "judge.tests[0]: expected an object"),
        (["x", {"stdin": "1"}], "judge.tests[1]: stdout is missing"),
        ([{"call": "f", "result": 1, "arg": []}], "judge.tests[0]: arg is not a key of such a test"),
        ([{"call": "f", "result": 1, "args": 3}], "judge.tests[0]: expected a list as args"),
        ([{"stdin": 1, "stdout": "1"}], "judge.tests[0].stdin: expected a text, got 1"),
    ],
)
def test_tests_that_are_refused(tests, message):
    with pytest.raises(ValueError, match="task t-1") as error:
        read_tests(task(tests=tests))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("expected", "actual", "tolerance", "same"),
    [
        ("1 2\n3\n", "1 2  \n3", 0, True),
        ("1 2\n3\n", "1\n2\n3", 0, False),
        ("1\n\n2", "1\n2", 0, False),
        ("1.0", "1", 0, True),
        ("1e3", "1000", 0, True),
        ("0.333", "0.3333", 0, False),
        ("0.333", "0.3333", 1e-3, True),
        ("1000", "1000.5", 1e-3, True),
        ("yes", "YES", 0, False),
        ("nan", "nan", 0, True),
        ("nan", "NaN", 0, False),
        ("1", "1" * 100_000, 1.0, False),
        (f"{10**60}", f"{10**60 + 1}", 0, False),
        ("", "", 0, True),
        ("", "x", 0, False),
    ],
)
def test_same_output(expected, actual, tolerance, same):
    assert same_output(expected, actual, tolerance) is same


@pytest.mark.parametrize(
    ("expected", "actual", "tolerance", "same"),
    [
        ([1, [2, 3]], (1, (2, 3)), 0, True),
        ([1, 2], [2, 1], 0, False),
        ([1, 2], {2, 1}, 0, True),
        ([1, 1], {1}, 0, False),
        ([[1, 2]], {(1, 2)}, 0, True),
        ({"1": [0.5]}, {1: [0.5 + 1e-9]}, 1e-6, True),
        ({"1": 1}, {1: 1, 2: 2}, 0, False),
        (1, 1.0, 0, True),
        (1, True, 0, False),
        (False, 0, 0, False),
        (None, None, 0, True),
        (None, 0, 0, False),
        ("1", 1, 0, False),
        (math.inf, math.inf, 0, True),
        (math.nan, 1.0, 1.0, False),
        (10**40, 10**40 + 1, 0, False),
    ],
)
def test_same_value(expected, actual, tolerance, same):
    assert same_value(expected, actual, tolerance) is same


def test_plain_data_comes_back():
    value = [None, True, 1, 2**70, -(2**70), 1.5, math.inf, "é", (1, [2]), {3}, {(1,): {"a": b"x"}}, 1 + 2j, range(3)]
    returned = decode(encode(value, int), int)
    assert returned[:-1] == value[:-1] and returned[-1] == (0, 1, 2)
    assert list(decode(encode(iter("ab"), int), int)) == ["a", "b"]
    assert decode(encode(object(), lambda value: 7), lambda number: number) == 7


@pytest.mark.parametrize(
    "data", [{}, {"type": "x", "value": 1}, {"type": "set", "value": 3}, {"type": "object", "value": "0"}]
)
def test_what_is_no_plain_data(data):
    with pytest.raises(ValueError, match="plain data"):
        decode(data, int)
