"""What lies on a device in each phase of a job."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qwq_jax.plan.cost import ProgramCost


@dataclass(frozen=True)
class Phase:
    """A part of a job, in which one of some programs runs at a time.

    Attributes:
        programs: Those.
        resident: Which groups of arrays are there: ``held``, ``engine``, ``gradients``.
    """

    programs: tuple[str, ...]
    resident: tuple[str, ...]


# Of reinforcement learning. While the policy learns, the engine has given up its weights and its cache; the result of
# `sync` is the engine's weights.
RL_PHASES: Mapping[str, Phase] = {
    "rollout": Phase(("decode", "prompts"), ("held", "engine")),
    "reward": Phase(("reward model",), ("held", "engine")),
    "log-probabilities": Phase(("log-probabilities", "reference"), ("held",)),
    "gradient": Phase(("gradient",), ("held", "gradients")),
    "update": Phase(("update",), ("held", "gradients")),
    "sync": Phase(("sync",), ("held",)),
}
INFERENCE_PHASES: Mapping[str, Phase] = {
    "decode": Phase(("decode",), ("held", "engine")),
    "prompts": Phase(("prompts",), ("held", "engine")),
}
SFT_PHASES: Mapping[str, Phase] = {"step": Phase(("step",), ("held",))}
# Among what is held in training: float32 weights and AdamW's two moments.
STATE = "trained weights and moments"
# Machine code, of which a run keeps all that it has compiled.
PROGRAMS, RESERVED = "programs", "reserved for programs"
# What a program is given where its code was not made, for a step of the engine and for any other: of QwQ-32B's the
# largest have 33 and 110 MiB. A step's code grows to 600 MiB where a device has room; where it has none libtpu
# compresses it, and these are figures of full devices.
_STEP_RESERVE, _RESERVE = 48 << 20, 128 << 20


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        usable: What the compiler lets programs have.
        held: At all times: what is trained with its moments, weights that stay, reward models, programs.
        engine: While it draws: weights, and the key-value cache.
        gradients: The sums over micro-batches.
        programs: By name.
        phases: Those of the job; the ones without a program of it do not occur.
    """

    usable: int
    held: Mapping[str, int]
    engine: Mapping[str, int]
    gradients: int
    programs: Mapping[str, ProgramCost]
    phases: Mapping[str, Phase] = field(default_factory=lambda: RL_PHASES)

    @property
    def peaks(self) -> dict[str, int]:
        """The most that is taken in each phase."""
        groups = {"held": sum(self.held.values()), "engine": sum(self.engine.values()), "gradients": self.gradients}
        taken = {name: cost.temporaries + cost.result for name, cost in self.programs.items()}
        return {
            name: sum(groups[group] for group in phase.resident) + max(taken[p] for p in phase.programs if p in taken)
            for name, phase in self.phases.items()
            if any(program in taken for program in phase.programs)
        }

    @property
    def peak(self) -> int:
        """The most that is taken at any time."""
        return max(self.peaks.values())

    @property
    def shortfall(self) -> int:
        """Bytes that are missing; 0 where all fits."""
        return max(0, self.peak - self.usable)


def held_by_programs(programs: Mapping[str, ProgramCost], counts: Mapping[str, int]) -> dict[str, int]:
    """Bytes of machine code, measured and reserved.

    Args:
        programs: By name.
        counts: How many a run has of those that are not one.
    """
    made = {name: cost.code for name, cost in programs.items() if cost.code is not None}
    held = {PROGRAMS: sum(code * counts.get(name, 1) for name, code in made.items())} if made else {}
    reserve = sum(_STEP_RESERVE * counts[name] if name in counts else _RESERVE for name in programs.keys() - made)
    return held | ({RESERVED: reserve} if reserve else {})


def room_for_pages(memory: Memory, page: int) -> int:
    """Pages of the cache that fit beside all else of the phases that have an engine.

    Args:
        memory: With an engine without its cache.
        page: Bytes of one page, of all layers.
    """
    with_engine = [phase for phase, spec in memory.phases.items() if "engine" in spec.resident]
    peaks = memory.peaks
    left = memory.usable - max((peaks[name] for name in with_engine if name in peaks), default=0)
    return max(0, left // page)
