"""From what a compiled program does to the least time that a chip takes for it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from qwq_jax.plan.chips import Topology
from qwq_jax.plan.hlo import Collective

# "How to Scale Your Model" takes a microsecond for each hop of the torus.
HOP_SECONDS = 1e-6
# How often the array of an exchange crosses a link, of a ring of n with (n - 1) / n left out.
_CROSSINGS = {
    "all-reduce": 2.0,
    "all-gather": 1.0,
    "reduce-scatter": 1.0,
    "all-to-all": 0.25,
    "collective-permute": 2.0,
}


@dataclass(frozen=True)
class ProgramCost:
    """One compiled program, on one device.

    Attributes:
        temporaries: Bytes that it takes beside its arguments and results.
        result: Bytes of results that take no argument's place.
        code: Bytes of the program itself; None where its machine code was not made.
        flops: Operations of its matrix products, those of attention included.
        moved: Bytes over HBM.
        collectives: What it exchanges with other devices.
    """

    temporaries: int
    result: int
    code: int | None
    flops: float
    moved: int
    collectives: tuple[Collective, ...] = ()

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "ProgramCost":
        """Reads what `to_json` wrote."""
        exchanges = tuple(Collective(**each) for each in fields["collectives"])
        return cls(**{**fields, "collectives": exchanges})

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Seconds:
    """Least times of one run of a program.

    Attributes:
        compute: Of its products at the matrix unit's peak.
        memory: Of its bytes at the memory's peak.
        waited: Of exchanges that the next operation needs: those over the tensor axis.
        hidden: Of exchanges that can go on beside products: of weights and gradients.
        factor: Measured over predicted, from a calibration; 1 without.
    """

    compute: float
    memory: float
    waited: float
    hidden: float
    factor: float = field(default=1.0)

    @property
    def total(self) -> float:
        """``factor x (max(compute, memory, hidden) + waited)``."""
        return self.factor * (max(self.compute, self.memory, self.hidden) + self.waited)

    @property
    def bound(self) -> str:
        """What takes most of it."""
        times = {
            "compute": self.compute,
            "HBM": self.memory,
            "network": max(self.hidden, self.waited),
        }
        return max(times, key=lambda name: times[name])


def least_seconds(
    cost: ProgramCost, topology: Topology, *, tensor: int, int8: bool = False, factor: float = 1.0
) -> Seconds:
    """The roofline of a program.

    Args:
        cost: The program.
        topology: Where it runs.
        tensor: Size of the mesh's tensor axis, the innermost one.
        int8: Whether its products are of 8-bit integers on both sides.
        factor: See `Seconds`.
    """
    chip = topology.chip
    peak = (chip.int8 or chip.bf16) if int8 else chip.bf16
    waited = hidden = 0.0
    for each in cost.collectives:
        seconds = each.count * exchange_seconds(each, topology)
        if each.stride == 1 and each.group <= tensor:
            waited += seconds
        else:
            hidden += seconds
    return Seconds(
        compute=cost.flops / (peak / chip.devices),
        memory=cost.moved / (chip.bandwidth / chip.devices),
        waited=waited,
        hidden=hidden,
        factor=factor,
    )


def exchange_seconds(exchange: Collective, topology: Topology) -> float:
    """Least time of one exchange: rings along as many axes of the torus as the group needs, and a microsecond a hop.

    Between slices the data-center network carries what each device has after the exchange within its slice.

    A side that is not closed to a ring (on v5e and v6e shorter than 16, elsewhere no multiple of 4) has half the
    bandwidth.
    """
    slices = _slices(exchange, topology)
    inside = exchange.group // slices
    seconds = HOP_SECONDS * max(1, inside // 2)
    if inside > 1:
        chips = -(-inside // topology.chip.devices)
        seconds += exchange.bytes * _crossings(exchange.kind, inside) / _bandwidth(topology, chips)
    if slices > 1:
        # Each device of a slice exchanges its part with its like in the others.
        assert topology.chip.between_slices is not None
        between = topology.chip.between_slices / topology.chip.devices
        seconds += exchange.bytes / inside * _crossings(exchange.kind, slices) / between
    return seconds


def with_slices(cost: ProgramCost, topology: Topology, gradients: int) -> ProgramCost:
    """An update with what goes between slices, which its compiled text does not tell: the sum of gradients, once.

    Args:
        cost: Of the program that updates.
        topology: One slice, to which nothing is added, or several.
        gradients: Bytes of them on one device, which exchanges them with its like in the other slices.
    """
    if topology.slices == 1:
        return cost
    added = Collective("all-reduce", topology.slices, topology.devices // topology.slices, gradients, 1)
    return replace(cost, collectives=(*cost.collectives, added))


def _crossings(kind: str, members: int) -> float:
    return _CROSSINGS[kind] * (members - 1) / members


def _slices(exchange: Collective, topology: Topology) -> int:
    """How many slices the members of a group lie in: the outermost axis of a mesh goes over them."""
    in_slice = topology.devices // topology.slices
    return min(topology.slices, exchange.group, max(1, exchange.group * exchange.stride // in_slice))


def _bandwidth(topology: Topology, chips: int) -> float:
    """Bytes a second into and out of a chip over the axes that a group of so many chips spans."""
    total, covered = 0.0, 1
    for side in sorted(topology.sides, reverse=True):
        if covered >= chips and total:
            break
        closed = side >= 16 if topology.chip.axes == 2 else side % 4 == 0
        total += topology.chip.link * (1.0 if closed else 0.5)
        covered *= side
    return total


def attention_flops(*, queries: float, context: float, heads: int, head_dim: int, passes: float = 1.0) -> float:
    """Operations of QK^T and PV: each query token meets `context` keys, in `heads` query heads.

    Args:
        queries: Query tokens.
        context: Keys that each meets, on average; of a causal row of T tokens half of T.
        heads: Query heads on the device, of all layers.
        head_dim: Their size.
        passes: Forward passes that it is worth: a backward pass of a flash kernel has 2.5 (five products for two).
    """
    return passes * 4.0 * queries * context * heads * head_dim


def axes_of(exchange: Collective, axes: Mapping[str, int]) -> str:
    """The mesh axes that the groups of an exchange span."""
    stride, named, members = 1, [], 1
    for name, extent in reversed(list(axes.items())):
        if extent > 1 and stride >= exchange.stride and members < exchange.group:
            named.append(name)
            members *= extent
        stride *= extent
    return " x ".join(reversed(named)) or "one device"
