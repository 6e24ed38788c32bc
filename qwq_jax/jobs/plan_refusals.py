"""Why a job does not fit a slice: what is short by how much, and what would fit."""

from collections.abc import Callable
from dataclasses import dataclass

from qwq_jax.config.engine import CACHE_SHARE
from qwq_jax.jobs.plan_job import Job, engine_of, trained_of
from qwq_jax.plan.chips import GB, USUAL_TOPOLOGIES, Topology, parse_topology
from qwq_jax.plan.search import engine_choices, state_bytes, tensor_sizes, token_bytes, train_choices, weight_bytes


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
    assert short > 0, "the widest axis leaves the most room"

    def choices(where: Topology) -> list[str]:
        found = engine_choices(job.model, where, job.workload, usable=usable, engine=engine_of(job))
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
    trained = trained_of(job)
    state = state_bytes(trained)
    have = usable * topology.devices // topology.slices  # each slice has all of it
    short = f"short by {(state - have) / GB:.1f} GB" if state > have else "without room for a row's activations"
    would = _larger(topology, lambda other: bool(train_choices(trained, other, usable=usable)))
    return (
        f"{job.name} does not fit {topology.name}: weights, moments and gradients are {state / GB:.1f} GB and all "
        f"devices{' of a slice' if topology.slices > 1 else ''} have {have / GB:.1f} GB, {short}; {would}"
    )


@dataclass(frozen=True)
class Device:
    """What a device of a slice has for the cache of a job.

    Attributes:
        job: The job's name.
        topology: The slice's.
        held: Bytes of the weights on it.
        usable: Bytes that it has.
    """

    job: str
    topology: str
    held: int
    usable: int

    def refused(self, cache: str, needed: int, room: float) -> str:
        """Why it does not take a cache of `needed` bytes, which asks for so much room."""
        left = self.usable - self.held
        return (
            f"{self.job} does not fit {self.topology}: beside {self.held / GB:.1f} GB of weights a device has "
            f"{max(left, 0) / GB:.1f} of its {self.usable / GB:.1f} GB left, and the cache of {cache} needs "
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
