"""What Cloud TPU and GKE call a topology such as ``v5e:4x4``, and how many hosts it has. The only such table."""

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Generation:
    """One kind of TPU, as Google's two products name it.

    Attributes:
        accelerator: Prefix of the accelerator type of a TPU VM; None where only GKE has it.
        cores_per_chip: The number in the accelerator type counts cores, which for some generations are chips.
        runtime: The image of a TPU VM.
        dimensions: How many numbers a topology has.
        host_chips: Chips of one host of a slice of several hosts.
        single_host: Chip counts that one host can hold alone.
        gke_accelerator: The node label of GKE.
        gke_machine: Machine type, with the chips of a host to be filled in.
    """

    accelerator: str | None
    cores_per_chip: int
    runtime: str
    dimensions: int
    host_chips: int
    single_host: tuple[int, ...]
    gke_accelerator: str
    gke_machine: str


GENERATIONS = {
    "v4": Generation("v4", 2, "tpu-ubuntu2204-base", 3, 4, (4,), "tpu-v4-podslice", "ct4p-hightpu-{}t"),
    "v5e": Generation(
        "v5litepod", 1, "v2-alpha-tpuv5-lite", 2, 4, (1, 4, 8), "tpu-v5-lite-podslice", "ct5lp-hightpu-{}t"
    ),
    "v5p": Generation("v5p", 2, "v2-alpha-tpuv5", 3, 4, (4,), "tpu-v5p-slice", "ct5p-hightpu-{}t"),
    "v6e": Generation("v6e", 1, "v2-alpha-tpuv6e", 2, 4, (1, 4, 8), "tpu-v6e-slice", "ct6e-standard-{}t"),
    "tpu7x": Generation(None, 2, "", 3, 4, (4,), "tpu7x", "tpu7x-standard-{}t"),
    # Workers without a TPU, to try a job out: cpu:4 is four of them.
    "cpu": Generation("cpu", 1, "tpu-ubuntu2204-base", 1, 1, (1,), "", ""),
}

# Shapes of three dimensions below one cube of 4x4x4, of which all others are made.
_BELOW_A_CUBE = frozenset({"2x2x1", "2x2x2", "2x2x4", "2x4x4"})


@dataclass(frozen=True)
class Topology:
    """A slice.

    Example:
        >>> Topology.parse("v5e:4x4").accelerator_type
        'v5litepod-16'
        >>> Topology.parse("v5p:4x4x4").hosts
        16
    """

    generation: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Reads ``GENERATION:AxB`` or ``GENERATION:AxBxC``.

        Raises:
            ValueError: It is none, with what was expected.
        """
        generation, separator, shape = text.partition(":")
        known = GENERATIONS.get(generation)
        if not separator or known is None:
            raise ValueError(f"topology {text!r}: expected GENERATION:SHAPE with one of {', '.join(GENERATIONS)}")
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") + 1 != known.dimensions:
            example = "x".join(["4"] * known.dimensions)
            raise ValueError(f"topology {text!r}: {generation} has shapes such as {generation}:{example}")
        topology = cls(generation, tuple(int(number) for number in shape.split("x")))
        if topology.chips not in known.single_host and topology.chips % known.host_chips:
            raise ValueError(f"topology {text!r}: {topology.chips} chips do not fill hosts of {known.host_chips}")
        if not _can_be_cut(topology.shape):
            sides = "powers of two, from 2x2 on" if known.dimensions == 2 else "even, from 2x2x2 on, or 2x2x1"
            raise ValueError(f"topology {text!r}: there is no such slice; its sides are {sides}")
        return topology

    def __str__(self) -> str:
        return f"{self.generation}:{self.shape_text}"

    @property
    def shape_text(self) -> str:
        """``4x4``."""
        return "x".join(map(str, self.shape))

    @property
    def chips(self) -> int:
        """All chips of the slice."""
        return math.prod(self.shape)

    @property
    def devices_per_chip(self) -> int:
        """Devices that JAX sees on a chip; of v4 and v5p both cores are one."""
        return 2 if self.generation == "tpu7x" else 1

    @property
    def chips_per_host(self) -> int:
        """Chips that one VM sees."""
        known = GENERATIONS[self.generation]
        return self.chips if self.chips in known.single_host else known.host_chips

    @property
    def hosts(self) -> int:
        """VMs of the slice."""
        return self.chips // self.chips_per_host

    @property
    def accelerator_type(self) -> str:
        """Cloud TPU's name of the slice.

        Raises:
            ValueError: TPU VMs do not offer it.
        """
        known = GENERATIONS[self.generation]
        if known.accelerator is None:
            raise ValueError(f"topology {self}: {self.generation} is offered through GKE only; use the verb manifest")
        return f"{known.accelerator}-{self.chips * known.cores_per_chip}"

    @property
    def is_usual(self) -> bool:
        """Whether Cloud TPU gives this shape to the accelerator type, which only says how many chips there are.

        That is the most compact one, with its shortest side first.
        """
        if self.shape_text in _BELOW_A_CUBE or len(self.shape) == 1:
            return True
        side = 4 if len(self.shape) == 3 else 1
        if any(length % side for length in self.shape) or self.shape != tuple(sorted(self.shape)):
            return False
        blocks = [length // side for length in self.shape]
        return sum(blocks) == _least_sum(math.prod(blocks), len(blocks))

    @property
    def runtime(self) -> str:
        """The image of its VMs."""
        return GENERATIONS[self.generation].runtime

    @property
    def gke_accelerator(self) -> str:
        """GKE's node label.

        Raises:
            ValueError: GKE has no such nodes.
        """
        if not (label := GENERATIONS[self.generation].gke_accelerator):
            raise ValueError(f"topology {self}: GKE has no TPU nodes of this kind")
        return label

    @property
    def gke_machine(self) -> str:
        """GKE's machine type."""
        return GENERATIONS[self.generation].gke_machine.format(self.chips_per_host)


def _can_be_cut(shape: tuple[int, ...]) -> bool:
    """Whether hosts of 2x2 chips, on their wires, can make it; single chips are slices too."""
    if len(shape) == 2:
        return shape == (1, 1) or all(side > 1 and side & (side - 1) == 0 for side in shape)
    return len(shape) == 1 or shape == (2, 2, 1) or all(side % 2 == 0 for side in shape)


def _least_sum(product: int, factors: int) -> int:
    """The smallest sum of so many whole numbers with this product."""
    if factors == 1:
        return product
    divisors = (number for number in range(1, product + 1) if product % number == 0)
    return min(number + _least_sum(product // number, factors - 1) for number in divisors)
