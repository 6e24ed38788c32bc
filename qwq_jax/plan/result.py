"""What a plan says of one topology."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwq_jax.plan.chips import Topology
from qwq_jax.plan.cost import ProgramCost, Seconds, axes_of
from qwq_jax.plan.memory import Memory


@dataclass(frozen=True)
class Part:
    """A part of a job's time.

    Attributes:
        name: Of the phase.
        program: What runs in it.
        runs: How often, for one step of the job.
        seconds: Of one run.
    """

    name: str
    program: str
    runs: float
    seconds: Seconds

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return self.runs * self.seconds.total


@dataclass(frozen=True)
class TopologyPlan:
    """What a job takes on a slice.

    Attributes:
        topology: The slice.
        kind: ``inference``, ``sft`` or ``rl``.
        mesh: Size of each mesh axis, of training where there are two.
        decode_mesh: That of the engine, if the job has one.
        settings: What was changed of the job's config to run here, as words for ``--set``.
        memory: On one device; None where the compiler refused a program.
        problems: Why it does not run here, each a sentence; none where it does.
        parts: Of a step's time; a step of inference is a token of each row.
        facts: Figures of the job as a whole, by name: see `facts_of`.
        advice: Other settings, estimated to be faster, as words for ``--set``; none where these are the best known.
        better: The plan of the advice, if it was compiled.
    """

    topology: Topology
    kind: str
    mesh: Mapping[str, int]
    decode_mesh: Mapping[str, int] | None
    settings: tuple[str, ...] = ()
    memory: Memory | None = None
    problems: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    facts: Mapping[str, float] = field(default_factory=dict)
    advice: tuple[str, ...] = ()
    better: "TopologyPlan | None" = None

    @property
    def fits(self) -> bool:
        """Whether it runs here."""
        return not self.problems

    def axes(self, program: str) -> Mapping[str, int]:
        """The mesh that a program runs on."""
        return (self.decode_mesh or self.mesh) if program in ("decode", "prompts") else self.mesh

    def to_json(self) -> dict[str, Any]:
        """As plain values; bytes and seconds."""
        memory = self.memory
        return {
            "topology": self.topology.name,
            "chips": self.topology.chips,
            "hosts": self.topology.hosts,
            "kind": self.kind,
            "mesh": dict(self.mesh),
            "decode_mesh": None if self.decode_mesh is None else dict(self.decode_mesh),
            "settings": list(self.settings),
            "fits": self.fits,
            "problems": list(self.problems),
            "memory": None
            if memory is None
            else {
                "usable": memory.usable,
                "held": dict(memory.held),
                "engine": dict(memory.engine),
                "gradients": memory.gradients,
                "phases": memory.peaks,
            },
            "programs": {}
            if memory is None
            else {name: self._program(name, cost) for name, cost in memory.programs.items()},
            "parts": [
                {"name": part.name, "program": part.program, "runs": part.runs, "seconds": part.total}
                for part in self.parts
            ],
            "facts": dict(self.facts),
            "advice": list(self.advice),
            "recommended": None if self.better is None else self.better.to_json(),
        }

    def _program(self, name: str, cost: ProgramCost) -> dict[str, Any]:
        seconds = next((part.seconds for part in self.parts if part.program == name), None)
        axes = self.axes(name)
        return {
            "temporaries": cost.temporaries,
            "result": cost.result,
            "code": cost.code,
            "matrix_flops": cost.flops,
            "hbm_bytes": cost.moved,
            "collectives": [
                {"kind": e.kind, "axes": axes_of(e, axes), "devices": e.group, "bytes": e.bytes, "count": e.count}
                for e in cost.collectives
            ],
            "seconds": None
            if seconds is None
            else {
                "compute": seconds.compute,
                "hbm": seconds.memory,
                "network_waited": seconds.waited,
                "network_hidden": seconds.hidden,
                "calibration": seconds.factor,
                "total": seconds.total,
            },
        }
