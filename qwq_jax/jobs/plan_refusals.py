"""Why a job does not fit a slice: what is short by how much, and what would fit."""

from collections.abc import Callable

from qwq_jax.config.engine import CACHE_SHARE
from qwq_jax.jobs.plan_job import Job, engine_of, trained_of
from qwq_jax.plan.chips import GB, USUAL_TOPOLOGIES, Topology, parse_topology
from qwq_jax.plan.search import engine_choices, tensor_sizes, token_bytes, train_choices, weight_bytes


def no_engine_fits(job: Job, topology: Topology, usable: int, wanted: tuple[str | None, str]) -> str:
    """A job of inference whose weights and one sequence no mesh of a slice holds.

    Args:
        job: It.
        topology: The slice.
        usable: Bytes of a device.
        wanted: Types of weights and cache.

    Returns:
        A sentence with what is short on a device, of the widest tensor axis, and other types or another slice.
    """
    (weights, cache), longest = wanted, engine_of(job).max_context
    assert longest is not None, "engine_of sets it"
    tensor = tensor_sizes(job.model, topology.devices // topology.slices)[-1]
    held = weight_bytes(job.model, weights, tensor)
    one = longest * token_bytes(job.model, cache, tensor)
    short = held + one / CACHE_SHARE - usable

    def choices(slice: Topology) -> list[str]:
        found = engine_choices(job.model, slice, job.workload, usable=usable, engine=engine_of(job))
        return found[0].settings if found else []

    settings = choices(topology)
    would = (
        f"it would with --set {' --set '.join(settings)}"
        if settings
        else f"nor with 8 or 4 bits; {_larger(topology, lambda other: bool(choices(other)))}"
    )
    return (
        f"{job.name} does not fit {topology.name} with {weights or 'bfloat16'} weights and a {cache} cache: over "
        f"{tensor} device{'s' if tensor > 1 else ''} weights take {held / GB:.1f} GB of each and one sequence of "
        f"{longest:,} tokens {one / GB:.1f} GB, of {usable / GB:.1f} GB: short by {short / GB:.1f} GB; {would}"
    )


def no_training_fits(job: Job, topology: Topology, usable: int) -> str:
    """A job of training of which no mesh of a slice holds the state and a row."""
    state = (2 if job.config.lora is not None else 16) * job.model.num_parameters
    have = usable * topology.devices
    short = f"short by {(state - have) / GB:.1f} GB" if state > have else "without room for a row's activations"
    would = _larger(topology, lambda other: bool(train_choices(trained_of(job), other, usable=usable)))
    return (
        f"{job.name} does not fit {topology.name}: weights, moments and gradients are {state / GB:.1f} GB and all "
        f"devices have {have / GB:.1f} GB, {short}; {would}"
    )


def no_cache_fits(where: tuple[Job, Topology], bytes: tuple[int, int], what: str, needed: int, room: float) -> str:
    """A cache for which a device has less than the `room`.

    Args:
        where: The job and the slice.
        bytes: Of the weights on a device, and what it has.
        what: Of which cache.
        needed: Its bytes.
        room: Those that it asks for.
    """
    (job, topology), (there, usable) = where, bytes
    left = usable - there
    return (
        f"{job.name} does not fit {topology.name}: beside {there / GB:.1f} GB of weights a device has "
        f"{max(left, 0) / GB:.1f} of its {usable / GB:.1f} GB left, and the cache of {what} needs "
        f"{needed / GB:.1f} GB: short by {(room - left) / GB:.1f} GB"
    )


def relief(job: Job, name: str) -> str:
    """What makes a program smaller."""
    if name in ("decode", "prompts", "rollout"):
        return "lower engine.num_pages or engine.max_sequences, or split over more devices"
    if name in ("gradient", "step", "log-probabilities", "reference"):
        rows = "rows_per_micro_batch" if job.kind == "rl" else "rows_per_step (or raise accumulation)"
        return f"lower {rows} or logprob_chunk, set remat=true, or split over more devices"
    return "split over more devices"


def _larger(topology: Topology, fits: Callable[[Topology], bool]) -> str:
    """The first usual slice of the same chip that would do."""
    for name in USUAL_TOPOLOGIES:
        other = parse_topology(name)
        if other.chip == topology.chip and fits(other):
            return f"{name} would hold it"
    return f"no usual {topology.chip.name} slice would hold it"
