"""Worker processes: parallel, in order, killed when they hang, replaced when they die, and never left behind."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from qwq_jax.config.rewards import (
    CodeConfig,
    CustomConfig,
    ExactConfig,
    FormatConfig,
    MathConfig,
    RewardModelConfig,
)
from qwq_jax.rl.rewards.pool import PoolClosed, RewardPool
from qwq_jax.rl.types import Score
from tests.rl.rewards.replies import all_end, code, descendants, isolation, own_descendants, reply, task

MINE = "tests.rl.rewards.verifiers"


def own(function, **fields):
    return CustomConfig(name=function, function=f"{MINE}:{function}", **fields)


@pytest.fixture(scope="module")
def pool():
    configs = [
        ExactConfig(),
        FormatConfig(weight=0.5),
        own("troubled", seconds=0.5),
        own("process", weight=0.0),
        own("modules", weight=0.0),
        RewardModelConfig(checkpoint="x"),
    ]
    with RewardPool(configs, workers=2, memory_mib=2048) as pool:
        yield pool


def test_a_sum_with_its_parts(pool):
    graded = pool.submit(task(answer="4"), reply("<think>2+2</think>\\boxed{4}")).result()
    assert (graded.value, graded.correct, graded.failed, graded.missing) == (2.5, True, (), ("model",))
    assert graded.parts["exact"] == Score(1.0, True, "4")
    assert graded.parts["format"] == Score(1.0)
    assert type(graded.value) is float


def test_workers_are_other_processes_without_jax(pool):
    graded = [pool.submit(task(answer="4"), reply("x")) for _ in range(8)]
    pids = {int(one.result().parts["process"].note) for one in graded}
    assert os.getpid() not in pids and 1 <= len(pids) <= 2
    assert {one.result().parts["modules"].note for one in graded} == {""}


def test_results_are_in_order(pool):
    answers = [str(index) for index in range(60)]
    pairs = [(task(answer="7"), reply(f"\\boxed{{{answer}}}")) for answer in answers]
    assert [graded.parts["exact"].note for graded in pool.scores(pairs)] == answers


@pytest.mark.parametrize(
    ("trouble", "note"),
    [
        ("hang", "killed after 0.5 s"),
        pytest.param("spin", "killed after 0.5 s", marks=pytest.mark.slow),
        ("die", "its process ended with status 3"),
        pytest.param("crash", "its process ended with status -6", marks=pytest.mark.slow),
        ("raise", "KeyError: 'missing'"),
        pytest.param("exit", "SystemExit: 0", marks=pytest.mark.slow),
        pytest.param("memory", "MemoryError: ", marks=pytest.mark.slow),
    ],
)
def test_trouble_is_killed_and_counts_nothing(pool, trouble, note):
    """The part of that verifier is 0, with a note; the others count, and the next reply is scored as ever."""
    started = time.monotonic()
    first = pool.submit(task(answer="4"), reply(trouble))
    graded = first.result(timeout=30)
    assert graded.parts["troubled"] == Score(0.0, None, note)
    assert graded.failed == ("troubled",)
    assert graded.parts["exact"] == Score(0.0, False, "no \\boxed{}")
    assert pool.submit(task(answer="4"), reply("\\boxed{4}")).result(timeout=30).value == 2.25
    assert time.monotonic() - started < 10.0


def test_one_that_hangs_keeps_nobody_waiting(pool):
    hanging = pool.submit(task(answer="4"), reply("hang"))
    started = time.monotonic()
    assert all(graded.correct for graded in pool.scores([(task(answer="4"), reply("\\boxed{4}"))] * 20))
    assert time.monotonic() - started < 5.0
    assert hanging.result().failed == ("troubled",)


def test_what_a_verifier_prints_is_no_answer(pool):
    assert pool.submit(task(answer="4"), reply("print")).result().parts["troubled"].value == 1.0


def test_a_task_without_an_answer_is_refused_at_once(pool):
    with pytest.raises(ValueError, match=r"task t-1: judge\.answer"):
        pool.submit(task(), reply("x"))


def test_close_leaves_nothing():
    before = own_descendants()
    pool = RewardPool([own("troubled", seconds=60.0)], workers=2)
    running = [pool.submit(task(), reply(what)) for what in ("child", "hang")]
    waiting = [pool.submit(task(), reply("x")) for _ in range(3)]
    time.sleep(0.5)
    started = own_descendants(before)
    assert len(started) >= 3  # two workers, and what one of them has started
    moment = time.monotonic()
    pool.close()
    assert all_end(started, 2.0) and time.monotonic() - moment < 2.5
    for future in running:
        with pytest.raises(PoolClosed):
            future.result()
    for future in waiting:
        with pytest.raises(CancelledError):
            future.result()
    with pytest.raises(PoolClosed):
        pool.submit(task(), reply("x"))
    pool.close()


def test_the_users_own_functions():
    configs = [own("words"), own("polite"), own("not_finite", sources=("odd",)), own("text", sources=("odd",))]
    with RewardPool(configs, workers=1) as pool:
        graded = pool.submit(task("x"), reply("three words please")).result()
        assert (graded.value, graded.correct) == (4.0, True)
        odd = pool.submit(task("odd"), reply("x")).result()
        assert odd.failed == ("not_finite", "text")
        assert "returned nan, not a Score, a number or a boolean" in odd.parts["not_finite"].note


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (f"{MINE}:missing", f"reward function {MINE}:missing: {MINE} has no function missing"),
        ("nowhere.at_all:reward", "reward function nowhere.at_all:reward: No module named 'nowhere'"),
    ],
)
def test_what_cannot_be_made_is_said_at_the_start(function, message):
    before = own_descendants()
    with pytest.raises(ValueError, match=message):
        RewardPool([CustomConfig(function=function)], workers=2)
    assert all_end(own_descendants(before), 2.0)


def test_workers_are_counted_from_one():
    with pytest.raises(ValueError, match="workers: expected at least 1, got 0"):
        RewardPool([FormatConfig()], workers=0)


def test_a_pool_of_nothing_but_a_reward_model():
    with RewardPool([RewardModelConfig(checkpoint="x")], workers=1) as pool:
        assert pool.submit(task(), reply("x")).result().missing == ("model",)


def test_math_and_code_side_by_side():
    configs = [
        MathConfig(sources=("math",)),
        CodeConfig(sources=("code",), sandbox=isolation(), test_seconds=2.0),
    ]
    with RewardPool(configs, workers=2) as pool:
        mathematics = task("math", answer="\\frac{1}{2}")
        program = task("code", tests=[{"stdin": "1 2\n", "stdout": "3\n"}])
        pairs = [
            (mathematics, reply("\\boxed{0.5}")),
            (program, code("print(sum(map(int, input().split())))")),
            (mathematics, reply("\\boxed{2}")),
            (program, code("print(4)")),
        ]
        assert [graded.value for graded in pool.scores(pairs)] == [1.0, 1.0, 0.0, 0.0]


SCRIPT = """
import signal, sys, time
from qwq_jax.config.rewards import CodeConfig, CustomConfig, Isolation
from qwq_jax.rl.rewards.pool import RewardPool
from tests.rl.rewards.replies import code, reply, task

# Ignored in what a shell starts in the background, and so in what that starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
pool = RewardPool(
    [
        CustomConfig(function="tests.rl.rewards.verifiers:troubled", sources=("own",), seconds=100.0),
        CodeConfig(sources=("code",), sandbox={sandbox!r}, test_seconds=60.0, seconds=100.0),
    ],
    workers=2,
)
pool.submit(task("own"), reply({trouble!r}))
pool.submit(task("code", tests=[{{"stdin": "", "stdout": ""}}]), code("while True: pass"))
print("submitted", flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize(
    ("number", "trouble"),
    [
        (signal.SIGTERM, "hang"),
        pytest.param(signal.SIGKILL, "spin", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "hang", marks=pytest.mark.slow),
    ],
)
def test_no_process_outlives_the_parent(number, trouble):
    """However it ends, and even while a verifier is stuck where no handler runs and a program loops in its sandbox."""
    script = SCRIPT.format(sandbox=isolation().value, trouble=trouble)
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[3]
    )
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"submitted\n"
        time.sleep(0.5)
        below = descendants(parent.pid)
        assert len(below) >= 4, below  # two workers, and the processes of a sandbox
        parent.send_signal(number)
        parent.wait(timeout=5)
        assert all_end(below, 3.0)
