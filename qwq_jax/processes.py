"""What the processes of one run tell each other beside their arrays: who wants to stop, what failed, what was agreed.

They speak through the key-value store that `jax.distributed` keeps on process 0, not by collectives: a process need not
be at the same step as the others to be told something.

Each also lays out a beat there, and watches those of the others, in a thread: a process that waits in a collective for
one that has died, has failed or hangs would wait for ever.  JAX has heartbeats of its own, which come later and end a
process by an abort; that still happens, and at once, where process 0 dies, because the store goes with it.
"""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import jax

# The store has no public name; libraries that need it (Orbax among them) take it from here.
from jax._src import distributed
from jax.errors import JaxRuntimeError

from qwq_jax.health import HostHealth, summary
from qwq_jax.interrupt import EXIT_INTERRUPTED, Interrupted

LOG = logging.getLogger(__name__)

NEWS_SECONDS = 1.0
STEPS_PER_DECISION = 8
# The sum of both, and of two beats for process 0, stays well below the minute after which JAX aborts a process.
BEAT_SECONDS = 2.0
# Shorter than JAX's own patience, longer than any pause of a living thread. On CPUs XLA aborts a process, some of whose
# devices wait for one that waits for another process, after 40 seconds.
SILENCE_SECONDS = 30.0
# A process whose beat goes on but whose work does not hangs: longer than compiling, saving or loading may take.
STUCK_SECONDS = 1800.0
# How often process 0 says how the hosts do.
HEALTH_SECONDS = 60.0
_POLL_SECONDS = 0.1
# Longer than the watch needs to end a wait for a process that hangs.
_DECISION_MILLISECONDS = int(2000 * STUCK_SECONDS)
_ROOT = "qwq_jax"


class Store(Protocol):
    """The part of JAX's distributed client that is used here."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        """Sets a value."""

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        """Returns what lies below a key, perhaps nothing."""
        ...

    def key_value_delete(self, key: str) -> None:
        """Deletes a key."""

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        """Waits for a value."""
        ...


Publish = Callable[[Sequence[HostHealth]], None]
"""Takes how the hosts do, in the order of their processes."""


class PeerFailed(ValueError):
    """Another process met an error; the text says which and what."""


class Peers:
    """All processes of this run, as one of them sees them; enter it, so that they hear when this one fails.

    Every value goes as JSON under a name that is used once in a run.

    Args:
        stop: Whether this process has been asked to stop.
        index: Of this process.
        count: Of processes; one alone needs no store.
        store: Where they meet.
        clock: In seconds.
        devices: JAX's of this process, whose memory is looked at.
        publish: Given the health of all hosts now and then, on process 0.
    """

    def __init__(
        self,
        stop: Callable[[], bool],
        *,
        index: int = 0,
        count: int = 1,
        store: Store | None = None,
        clock: Callable[[], float] = time.monotonic,
        devices: Sequence[Any] = (),
        publish: "Publish | None" = None,
    ) -> None:
        assert count == 1 or store is not None, "several processes need a store"
        self.index = index
        self.count = count
        self._stop = stop
        self._store = store
        self._clock = clock
        self._read_at = -NEWS_SECONDS
        self._told = False
        self._stopping = False
        self._steps = 0
        self._signs = 0
        self._watch = self._monitor = None
        if store is not None:
            self._watch = Watch(store, index, lambda: self._signs)
            self._monitor = HealthMonitor(store, index, self._watch.silent_seconds, devices=devices, publish=publish)

    @classmethod
    def meet(cls, stop: Callable[[], bool], *, starts_devices: bool = True, publish: "Publish | None" = None) -> Self:
        """The processes that `jax.distributed` brought together; this one alone if it did not.

        Args:
            stop: As of the class.
            starts_devices: Whether JAX may be asked for its devices.
            publish: As of the class.

        Raises:
            ValueError: The devices are those of several processes, which have not been brought together.
        """
        state = distributed.global_state
        count = 1 if state.client is None else state.num_processes
        if starts_devices and jax.process_count() != count:
            raise ValueError(f"the devices here belong to {jax.process_count()} processes: give --distributed to each")
        if count == 1:
            return cls(stop)
        devices = jax.local_devices() if starts_devices else ()
        return cls(stop, index=state.process_id, count=count, store=state.client, devices=devices, publish=publish)

    def __enter__(self) -> Self:
        if self._watch is not None and self._monitor is not None:
            self._watch.start()
            self._monitor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._store is None or self._watch is None or self._monitor is None:
            return
        self._monitor.leave()
        if isinstance(error, JaxRuntimeError) or "Gloo" in str(error):
            # Most likely the effect of something at the other end: then the watch finds it and ends this process.
            self._watch.join(2 * SILENCE_SECONDS)
        self._watch.leave()
        if error is not None and not isinstance(error, PeerFailed | Interrupted):
            sentence = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            self._store.key_value_set(f"{_ROOT}/news/failed/{self.index}", sentence)

    @property
    def others(self) -> range:
        """The processes that report to process 0."""
        return range(1, self.count)

    def share(self, name: str, value: Any) -> None:
        """Lays a value out for whoever receives it."""
        if self._store is not None:
            self._store.key_value_set(f"{_ROOT}/{name}/{self.index}", json.dumps(value))

    def receive(self, name: str, source: int = 0) -> Any:
        """Waits for what `source` shares under a name; None if a process wants to stop before.

        Raises:
            PeerFailed: Another process has failed, so the value may never come.
        """
        while (value := self._look(name, source)) is None and not self.stopping():
            time.sleep(_POLL_SECONDS)
        return value

    def require(self, name: str, source: int = 0) -> Any:
        """Waits like `receive`, but not to stop before: for what comes soon, or never because of a failure."""
        while (value := self._look(name, source)) is None:
            self.stopping()
            time.sleep(_POLL_SECONDS)
        return value

    def require_same(self, values: Mapping[str, Any]) -> None:
        """Compares what process 0 was given.

        Raises:
            ValueError: This process was given something else.
        """
        mine = json.loads(json.dumps(values))
        self.share("given", mine)
        given = self.require("given") if self.index else mine
        different = sorted(key for key in mine if given.get(key) != mine[key])
        if different:
            raise ValueError(f"process {self.index} was given another {' and '.join(different)} than process 0")

    def stopping(self) -> bool:
        """Whether any process has been asked to stop, to be asked at any time; a second may pass until all know.

        Raises:
            PeerFailed: Another process has failed.
        """
        wanted = self._stop()
        if self._store is None:
            return wanted
        self._signs += 1
        self._tell(wanted)
        if self._clock() - self._read_at >= NEWS_SECONDS:
            self._read_at = self._clock()
            self._stopping = self._read_news()
        return wanted or self._stopping

    def stopping_together(self, progress: int) -> bool:
        """Whether to stop after this step; every process gets the same answer after the same step.

        Called once a step. Process 0 decides now and then, and the others wait for its word.

        Args:
            progress: Any number that all must have come to at this step.

        Raises:
            PeerFailed: Another process has failed, or is doing something else.
        """
        if self._store is None:
            return self._stop()
        self._tell(self._stop())
        self._signs += 1
        self._steps += 1
        if self._steps % STEPS_PER_DECISION:
            return False
        number = self._steps // STEPS_PER_DECISION
        key = f"{_ROOT}/decision/"
        if self.index == 0:
            stop = self._read_news()
            self._store.key_value_set(f"{key}{number}", json.dumps([stop, progress]))
            if number > 2:  # all have read it: they have taken steps with this process since
                self._store.key_value_delete(f"{key}{number - 2}")
            return stop
        stop, theirs = json.loads(self._store.blocking_key_value_get(f"{key}{number}", _DECISION_MILLISECONDS))
        assert theirs == progress, f"process 0 has come to {theirs} at step {self._steps}, process {self.index} not"
        return stop

    def _look(self, name: str, source: int) -> Any:
        assert self._store is not None, "a process alone has nobody to hear from"
        found = dict(self._store.key_value_dir_get(f"{_ROOT}/{name}/")).get(f"{_ROOT}/{name}/{source}")
        return None if found is None else json.loads(found)

    def _tell(self, wanted: bool) -> None:
        if wanted and not self._told:
            assert self._store is not None
            self._store.key_value_set(f"{_ROOT}/news/stop/{self.index}", "")
            self._told = True

    def _read_news(self) -> bool:
        assert self._store is not None
        stop = False
        for key, text in self._store.key_value_dir_get(f"{_ROOT}/news/"):
            kind, index = key.split("/")[-2:]
            if kind == "failed":
                raise PeerFailed(f"process {index}: {text}")
            stop = True
        return stop


class Watch(threading.Thread):
    """Says every few seconds that this process lives, and ends it when another one does not, hangs, or has failed.

    Args:
        store: Where all lay out their beats.
        index: Of this process.
        signs: How often the work of this process has shown itself so far.
        clock: In seconds.
    """

    def __init__(
        self, store: Store, index: int, signs: Callable[[], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(daemon=True)
        self._store = store
        self._index = index
        self._signs = signs
        self._clock = clock
        self._left = threading.Event()
        self._heard: dict[str, tuple[str, float]] = {}
        self._worked: dict[str, tuple[int, float]] = {}
        # Without process 0 the others hear nothing any more: it goes last.
        self._patience = SILENCE_SECONDS if index else SILENCE_SECONDS + 2 * BEAT_SECONDS

    def run(self) -> None:
        """Until it is left."""
        beat = 0
        while not self._left.is_set():
            try:
                told = json.dumps([beat, self._signs()])
                self._store.key_value_set(f"{_ROOT}/beat/{self._index}", told, allow_overwrite=True)
                beats = self._store.key_value_dir_get(f"{_ROOT}/beat/")
                failures = self._store.key_value_dir_get(f"{_ROOT}/news/failed/")
            except JaxRuntimeError:  # the store is gone, and JAX ends this process
                return
            trouble = self.silent(beats + failures) or self.stuck(beats)
            if trouble is not None:
                print(f"interrupted: {trouble}; what is finished is saved, the same command goes on", file=sys.stderr)
                sys.stderr.flush()
                # The main thread may be waiting for the other process, where nothing wakes it.
                os._exit(EXIT_INTERRUPTED)
            beat += 1
            self._left.wait(BEAT_SECONDS)

    def leave(self) -> None:
        """Ends the watch, and asks the others not to wait for another beat."""
        self._left.set()
        self.join()
        try:
            self._store.key_value_delete(f"{_ROOT}/beat/{self._index}")
        except JaxRuntimeError:  # no store, no beat
            return

    def silent_seconds(self, index: int) -> float:
        """Since a process was heard of, as far as this one has listened."""
        heard = self._heard.get(f"{_ROOT}/beat/{index}")
        return 0.0 if heard is None else self._clock() - heard[1]

    def silent(self, found: list[tuple[str, str]]) -> str | None:
        """What is wrong with a process whose beat, or report of a failure, has stood still; None if nothing is."""
        now = self._clock()
        for key, value in found:
            if self._heard.get(key, ("", now))[0] != value:
                self._heard[key] = value, now
            elif now - self._heard[key][1] >= self._patience:
                index = key.rpartition("/")[2]
                told = f"failed: {value}" if "/failed/" in key else f"has not been heard of for {self._patience:.0f} s"
                return f"process {index} {told}"
        return None

    def stuck(self, beats: list[tuple[str, str]]) -> str | None:
        """Which process hangs, because its beat goes on and its work does not; None if none does.

        Those that wait for it stand still too: it is the one that has come the least far. Before its first sign of work
        a process loads and compiles, which may take any time.
        """
        now, waiting = self._clock(), {}
        for key, value in beats:
            signs = json.loads(value)[1]
            if self._worked.get(key, (-1, now))[0] != signs:
                self._worked[key] = signs, now
            elif signs and now - self._worked[key][1] >= STUCK_SECONDS:
                waiting[key.rpartition("/")[2]] = signs
        if not waiting:
            return None
        least = min(waiting, key=lambda index: (waiting[index], int(index)))
        return f"process {least} lives but has not gone on for {STUCK_SECONDS:.0f} s"


class HealthMonitor(threading.Thread):
    """Lays out now and then how this process and its machine do; on process 0 logs and publishes what all have told.

    A thread of its own: a bucket that is slow to take the table, or a device that is slow to tell, must not keep the
    beat of `Watch` from being heard.

    Args:
        store: Where all lay it out.
        index: Of this process.
        silent_seconds: Since a process was heard of, by its index.
        devices: As of `Peers`.
        publish: As of `Peers`.
    """

    def __init__(
        self,
        store: Store,
        index: int,
        silent_seconds: Callable[[int], float],
        *,
        devices: Sequence[Any] = (),
        publish: Publish | None = None,
    ) -> None:
        super().__init__(daemon=True)
        self._store = store
        self._index = index
        self._silent_seconds = silent_seconds
        self._devices = devices
        self._publish = publish
        self._left = threading.Event()

    def run(self) -> None:
        """Until it is left, or the store is gone."""
        # Process 0 looks a little later than the others lay out.
        wait = 2 * BEAT_SECONDS if self._index == 0 else 0.0
        while not self._left.wait(wait):
            try:
                self.look()
            except JaxRuntimeError:
                return
            wait = HEALTH_SECONDS

    def leave(self) -> None:
        """Ends it after what it is doing, for which nobody waits."""
        self._left.set()

    def look(self) -> None:
        """Lays out this process' state, and on process 0 says how all do."""
        own = HostHealth.of_this(self._index, self._devices)
        key = f"{_ROOT}/health/"
        self._store.key_value_set(f"{key}{self._index}", json.dumps(own.to_json()), allow_overwrite=True)
        if self._index:
            return
        found = [HostHealth.from_json(json.loads(value)) for _, value in self._store.key_value_dir_get(key)]
        told = [each.heard(self._silent_seconds(each.process)) for each in found if each is not None]
        told.sort(key=lambda each: each.process)
        LOG.info("%s", summary(told))
        if self._publish is not None:
            self._publish(told)
