"""What processes tell each other, with a store in memory and a process a thread or none."""

import json
import logging
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import pytest
from jax.errors import JaxRuntimeError

from qwq_jax.health import HostHealth, summary
from qwq_jax.interrupt import Interrupted
from qwq_jax.processes import (
    SILENCE_SECONDS,
    STEPS_PER_DECISION,
    STUCK_SECONDS,
    HealthMonitor,
    PeerFailed,
    Peers,
    Watch,
)


class Memory:
    """The store of `jax.distributed`, as far as it is used."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        with self.changed:
            assert allow_overwrite or key not in self.values, key
            self.values[key] = value
            self.changed.notify_all()

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        with self.changed:
            return [(name, value) for name, value in self.values.items() if name.startswith(key)]

    def key_value_delete(self, key: str) -> None:
        with self.changed:
            self.values.pop(key, None)

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.values, timeout=10), key
            return self.values[key]


class Clock:
    """Goes on by so much each time it is read."""

    def __init__(self, pace: float = 0.0) -> None:
        self.seconds = 0.0
        self.pace = pace

    def __call__(self) -> float:
        self.seconds += self.pace
        return self.seconds


def never() -> bool:
    return False


def always() -> bool:
    return True


def peers(*stops: Callable[[], bool], clock: Clock | None = None) -> list[Peers]:
    store, clock = Memory(), clock or Clock(pace=1.0)
    return [Peers(stop, index=i, count=len(stops), store=store, clock=clock) for i, stop in enumerate(stops)]


def test_a_process_alone_needs_nobody() -> None:
    with Peers(never) as alone:
        alone.share("anything", 1)
        alone.require_same({"seed": 1})
        assert not alone.stopping() and not alone.stopping_together(0)
    assert Peers(always).stopping() and Peers(always).stopping_together(0)


def test_others_hear_of_a_stop_within_a_second() -> None:
    clock = Clock()
    first, second = peers(never, always, clock=clock)
    assert not first.stopping()
    assert second.stopping()
    assert not first.stopping()
    clock.seconds = 1.0
    assert first.stopping()


@pytest.mark.parametrize("asked", [0, 1])
def test_all_stop_after_the_same_step(asked: int) -> None:
    stops = [never, never]
    stops[asked] = always
    found: list[list[bool]] = [[], []]

    step = threading.Barrier(2, timeout=10)  # as the collectives of a step

    def work(peer: Peers) -> None:
        while not found[peer.index] or not found[peer.index][-1]:
            step.wait()
            found[peer.index].append(peer.stopping_together(len(found[peer.index])))

    threads = [threading.Thread(target=work, args=(peer,)) for peer in peers(*stops)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found[0] == found[1] and len(found[0]) % STEPS_PER_DECISION == 0


def test_processes_that_do_different_things_do_not_go_on() -> None:
    first, second = peers(never, never)
    for step in range(STEPS_PER_DECISION):
        first.stopping_together(step)
    with pytest.raises(AssertionError, match="has come to 7 at step 8"):
        for _ in range(STEPS_PER_DECISION):
            second.stopping_together(0)


def test_what_is_shared_is_received_and_an_error_comes_instead() -> None:
    first, second, third = peers(never, never, never)
    first.share("plan", {"lines": [1, 2]})
    assert second.require("plan") == third.receive("plan") == {"lines": [1, 2]}
    with pytest.raises(ValueError, match="no disk"), third:
        raise ValueError("no disk")
    for waiting in (first.receive, first.require):
        with pytest.raises(PeerFailed, match="process 2: no disk"):
            waiting("done", 2)
    # What came from elsewhere is not passed on as if it were one's own.
    with pytest.raises(PeerFailed), second:
        second.require("done", 2)
    with pytest.raises(Interrupted), first:
        raise Interrupted("stopped")
    assert {index for index in range(3) if f"qwq_jax/news/failed/{index}" in first._store.values} == {2}  # type: ignore


def test_a_stop_ends_waiting() -> None:
    first, _ = peers(always, never)
    assert first.receive("done", 1) is None


def test_all_were_given_the_same() -> None:
    first, second = peers(never, never)
    first.require_same({"seed": 1, "input": {"bytes": 3}, "mesh": (2, 1)})
    second.require_same({"seed": 1, "input": {"bytes": 3}, "mesh": (2, 1)})
    with pytest.raises(ValueError, match="process 1 was given another input and seed than process 0"):
        second_again = Peers(never, index=1, count=2, store=second._store)
        second_again._store.values.pop("qwq_jax/given/1")  # type: ignore
        second_again.require_same({"seed": 2, "input": {"bytes": 4}, "mesh": (2, 1)})


def beats(*signs: int, beat: int = 0) -> list[tuple[str, str]]:
    return [(f"qwq_jax/beat/{index}", f"[{beat}, {count}]") for index, count in enumerate(signs)]


def test_a_process_that_hangs_is_named_and_not_those_that_wait_for_it() -> None:
    clock = Clock()
    watch = Watch(Memory(), 0, lambda: 0, clock)
    assert watch.stuck(beats(0, 5, 5)) is None
    clock.seconds = STUCK_SECONDS / 2
    assert watch.stuck(beats(0, 9, 8)) is None
    clock.seconds = STUCK_SECONDS * 1.4
    assert watch.stuck(beats(0, 9, 8)) is None, "not for so long yet; and process 0 has not begun"
    clock.seconds = STUCK_SECONDS * 1.5
    assert watch.stuck(beats(0, 9, 8)) == "process 2 lives but has not gone on for 1800 s"
    assert watch.stuck(beats(0, 9, 9)) == "process 1 lives but has not gone on for 1800 s", "2 has gone on"


def test_a_process_that_is_silent_is_named() -> None:
    clock = Clock()
    watch = Watch(Memory(), 1, lambda: 0, clock)
    assert watch.silent(beats(3, 3, beat=1)) is None
    clock.seconds = SILENCE_SECONDS
    assert watch.silent([beats(3, 3, beat=1)[0], beats(3, 3, beat=2)[1]]) == "process 0 has not been heard of for 30 s"


def test_process_0_says_how_all_processes_do(caplog: pytest.LogCaptureFixture) -> None:
    store, told = Memory(), []
    other = HostHealth(1, "tpu-1", memory_gb=70.5, free_gb=0.001, load=90.0, device_memory=0.75)
    store.key_value_set("qwq_jax/health/1", json.dumps(other.to_json()))
    store.key_value_set("qwq_jax/health/2", json.dumps({"process": 2, "of": "another version"}))
    first = HealthMonitor(store, 0, {0: 0.0, 1: 3.0}.__getitem__, publish=told.append)
    with caplog.at_level(logging.INFO, logger="qwq_jax"):
        first.look()
    [[own, heard]] = told
    assert (own.process, own.host) == (0, socket.gethostname()) and heard == other.heard(3.0)
    assert caplog.messages == [
        "2 processes on 2 hosts, most memory 70.5 GB (p1), least free 0.0 GB (p1), highest load 90.0 (p1), "
        "fullest device 75% (p1), longest unheard of 3 s (p1)"
    ]
    HealthMonitor(store, 1, lambda _: 0.0, publish=told.append).look()
    assert len(told) == 1, "others only tell"
    assert json.loads(store.values["qwq_jax/health/1"])["host"] == socket.gethostname()


def test_a_slow_bucket_and_a_device_in_trouble_do_not_stop_the_beat() -> None:
    class Troubled:
        def memory_stats(self) -> dict[str, int]:
            raise JaxRuntimeError("INTERNAL: the chip does not answer")

    store, reached, end = Memory(), threading.Event(), threading.Event()

    def publish(hosts: Sequence[HostHealth]) -> None:
        reached.set()
        end.wait(30)

    peer = Peers(never, index=0, count=2, store=store, devices=[Troubled()], publish=publish)
    with peer:
        assert reached.wait(30), "the table is under way"
        beat = store.values["qwq_jax/beat/0"]
        with store.changed:
            assert store.changed.wait_for(lambda: store.values["qwq_jax/beat/0"] != beat, timeout=30)
    end.set()


def test_a_host_looks_at_itself(tmp_path: Path) -> None:
    class Device:
        def __init__(self, stats: dict[str, int] | None) -> None:
            self.memory_stats = lambda: stats

    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "statm").write_text("9000 2000 100 1 0 500 0\n")
    (tmp_path / "meminfo").write_text("MemTotal: 24000000 kB\nMemAvailable:    1000000 kB\n")
    full = {"bytes_in_use": 30, "bytes_limit": 40}
    host = HostHealth.of_this(2, [Device(None), Device(full), Device(full | {"bytes_in_use": 10})], proc=tmp_path)
    page = os.sysconf("SC_PAGE_SIZE")
    assert (host.process, host.memory_gb, host.free_gb) == (2, round(2000 * page / 1e9, 3), 1.024)
    assert host.device_memory == 0.75 and HostHealth.from_json(host.to_json()) == host
    here = HostHealth.of_this(0, jax.local_devices())
    assert here.memory_gb and 0.05 < here.memory_gb < 100 and here.load is not None and here.device_memory is None
    nothing = HostHealth.of_this(0, [], proc=tmp_path / "absent")
    assert nothing.memory_gb is nothing.free_gb is None and "most memory" not in summary([nothing])


def test_every_question_whether_to_stop_is_a_sign_of_work() -> None:
    store = Memory()
    peer = Peers(never, index=0, count=2, store=store)
    with peer:
        peer.stopping()
        peer.stopping_together(1)
        assert peer._watch is not None and peer._watch._signs() == 2


def test_slurm_tells_processes_of_each_other() -> None:
    """Two tasks of one step, with the variables that srun sets."""
    code = (
        "from qwq_jax import runtime; runtime.start(simulate_devices=1, distributed=True); "
        "import jax; print(jax.process_index(), jax.process_count(), jax.device_count())"
    )
    names = ("XLA_FLAGS", "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {
        "SLURM_JOB_ID": str(random.SystemRandom().randrange(1 << 20)),  # which makes the port
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": "2",
    }
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in range(2)
    ]
    ends = [task.communicate(timeout=120) for task in tasks]
    assert [out.split() for out, _ in ends] == [["0", "2", "2"], ["1", "2", "2"]], ends
