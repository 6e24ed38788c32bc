"""What a process does once, before its first computation. The only reader of the environment.

Nothing here happens at import: a job calls `start` first.
"""

import hashlib
import logging
import os
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import jax
from jax._src import distributed  # as `processes` takes it

from qwq_jax.config.place import Place
from qwq_jax.interrupt import Interrupted, StopRequested

__all__ = [
    "Interrupted",
    "StopRequested",
    "add_tpu_flags",
    "cache_directory",
    "compile_cache",
    "compile_for_tpus",
    "default_compute_dtype",
    "hide_abandoned_reads",
    "log_to_stderr",
    "plan_directory",
    "start",
]

LOG = logging.getLogger(__name__)
_DEVICE_COUNT_FLAG = re.compile(r"--xla_force_host_platform_device_count=\d+\s*")
_TPU_FLAGS = "LIBTPU_INIT_ARGS"
# Faster compilations are cheaper to repeat than to look up.
_WORTH_CACHING_SECONDS = 0.5
_GOOGLE = "0x1ae0"
# A process that is not heard of for so long is dead, and the others end themselves.
_HEARTBEAT_SECONDS = 60
_ABANDONED = ("Event loop is closed", "Encountered error while reading array index")


def start(*, simulate_devices: int | None = None, distributed: bool | Place = False) -> None:
    """Prepares JAX: platform, processes, compile cache, log.

    Args:
        simulate_devices: Run on the CPU, as if it were this many devices.
        distributed: Join the other processes of a multi-host run. True: a TPU pod, GKE or Slurm know which they are, or
            the environment says it by ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``.

    Raises:
        ValueError: The processes or the devices cannot be set up as asked.
    """
    if simulate_devices is not None:
        _simulate(simulate_devices)
    if distributed:
        _join_processes(_named_place() if distributed is True else distributed)
    elif simulate_devices is None and not os.environ.get("JAX_PLATFORMS") and tpu_is_only_compiled_for():
        jax.config.update("jax_platforms", "cpu")
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_CACHING_SECONDS)
    log_to_stderr()
    hide_abandoned_reads()


def compile_for_tpus() -> None:
    """Prepares JAX to compile for TPUs that are not here; before libtpu is loaded, which reads its settings once.

    This program sets no flag that decides what is compiled, here or on a TPU: those that others set to hide exchanges
    behind arithmetic (``--xla_tpu_enable_async_collective_fusion`` and its ``_fuse_all_gather`` and
    ``_multiple_steps``, ``--xla_tpu_overlap_compute_collective_tc``, ``--xla_enable_async_all_gather``,
    ``--xla_tpu_enable_latency_hiding_scheduler``) leave a step of training as it is, with as many exchanges in the
    background and as much memory: they are libtpu 0.0.52's defaults. A user's own in ``LIBTPU_INIT_ARGS`` hold in both.
    A plan adds some by `add_tpu_flags`, for machine code that it has no use for.
    """
    # There is no TPU to ask what it is, and others may compile at the same time.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}
    jax.config.update("jax_platforms", "cpu")


def add_tpu_flags(flags: str) -> None:
    """Flags for libtpu, which reads them when it is loaded; a user's own, which come after them, have the last word."""
    os.environ[_TPU_FLAGS] = f"{flags} {os.environ.get(_TPU_FLAGS, '')}"


def plan_directory() -> Path:
    """Where answers of the TPU compiler are kept: those under other flags of the user's own are others."""
    kept, flags = cache_directory() / "plan", os.environ.get(_TPU_FLAGS)
    return kept / hashlib.sha256(flags.encode()).hexdigest()[:16] if flags else kept


def cache_directory() -> Path:
    """Where this program keeps what can be made again."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qwq_jax"


def tpu_is_only_compiled_for(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether libtpu is here, but no TPU and no GPU: asked for devices, it would complain for a page.

    Args:
        devices: Where Linux lists what is on the bus; TPUs are of Google's vendor number, as some of its network cards.
    """
    if find_spec("libtpu") is None or any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return False
    return all(vendor.read_text().strip() != _GOOGLE for vendor in devices.glob("*/vendor"))


def compile_cache() -> str | None:
    """Where compiled programs are kept from one process to the next; None where they are not."""
    return jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]


def default_compute_dtype() -> Literal["float32", "bfloat16"]:
    """bfloat16, except on the CPU, which has no arithmetic for it. Starts the JAX backend."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def log_to_stderr() -> None:
    """Shows this package's log from `INFO` and everybody else's from `WARNING`, each line with its process if many."""
    # JAX itself would start its devices to say which process this is.
    process = f" p{distributed.global_state.process_id}" if jax.distributed.is_initialized() else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s{process} %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("qwq_jax").setLevel(logging.INFO)
    # Orbax, asyncio and gcsfs print the traceback of an error that is raised besides.
    for name in ("absl", "asyncio", "gcsfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def hide_abandoned_reads() -> None:
    """When a read fails Orbax drops the others that are under way; Python would print a traceback for each."""
    if not isinstance(sys.unraisablehook, _AbandonedReads):
        sys.unraisablehook = _AbandonedReads(sys.unraisablehook)


class _AbandonedReads:
    """A hook for errors that nobody can catch, which passes over those of abandoned reads."""

    def __init__(self, otherwise: Callable[[Any], object]) -> None:
        self._otherwise = otherwise

    def __call__(self, unraisable: Any) -> None:
        if not str(unraisable.exc_value).startswith(_ABANDONED):
            self._otherwise(unraisable)


def _simulate(devices: int) -> None:
    if devices < 1:
        raise ValueError(f"--simulate-devices {devices}: expected at least 1")
    # The older way to ask for the same would contradict it.
    os.environ["XLA_FLAGS"] = _DEVICE_COUNT_FLAG.sub("", os.environ.get("XLA_FLAGS", ""))
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:
        # The backend already runs: fine if it is what was asked for.
        if jax.default_backend() != "cpu" or jax.device_count() < devices:
            raise ValueError(f"--simulate-devices {devices}: JAX has already started with other devices") from None


def _named_place() -> Place:
    """As far as the environment says."""
    address, count, index = (
        os.environ.get(name) for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    )
    if (count is None) != (index is None):
        raise ValueError("JAX_NUM_PROCESSES and JAX_PROCESS_ID go together, and only one of them is set")
    for name, value in (("JAX_NUM_PROCESSES", count), ("JAX_PROCESS_ID", index)):
        if value is not None and not value.isdecimal():
            raise ValueError(f"{name} {value!r} is not a number")
    return Place(address, None if count is None else int(count), None if index is None else int(index))


def _join_processes(place: Place) -> None:
    if place.address is not None:
        port = re.search(r"[^:]:(\d{1,5})$", place.address)
        if port is None or not 0 < int(port[1]) < 65536:
            raise ValueError(f"the address of process 0, {place.address!r}, is not of the form HOST:PORT")
    if place.count is not None and place.index is not None and place.index >= place.count:
        raise ValueError(f"process {place.index} is none of {place.count} processes, which count from 0")
    log_to_stderr()
    if place.address is not None:
        LOG.info("process %s of %s waits for the others at %s", place.index, place.count, place.address)
    # Jobs note SIGTERM themselves; JAX's own notice would swallow one that comes before.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address=place.address,
            num_processes=place.count,
            process_id=place.index,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        raise ValueError(
            "--distributed: nothing here says where the other processes are. A TPU pod knows them; elsewhere give "
            "--coordinator-address, --num-processes and --process-id before the verb, or set JAX_COORDINATOR_ADDRESS "
            "to HOST:PORT of process 0, JAX_NUM_PROCESSES to their number and JAX_PROCESS_ID to that of this one, "
            f"from 0 on ({error})"
        ) from None
