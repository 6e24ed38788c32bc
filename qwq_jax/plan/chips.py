"""The chips and slices of Cloud TPU, as data: what bounds a program on each of them."""

import re
from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class Chip:
    """Peak figures of one chip, both cores of it where there are two.

    Attributes:
        name: As in a topology, such as ``"v5e"``.
        bandwidth: HBM bytes a second.
        bf16: Floating-point operations a second, products and sums counted apart.
        int8: The same of 8-bit integers; None where the matrix unit has none.
        link: Bytes a second over one axis of the torus, both directions together.
        axes: Axes of the torus.
        between_slices: Bytes a second out of a chip into the data-center network; None where nobody published it.
        devices: JAX devices a chip; the figures above are divided by it for one device.
        one_host: Chips of the largest slice that one virtual machine holds; those of larger ones have four.
        configuration: What libtpu has to be told so that both cores are one device, as they are on Google Cloud.
        cache_dtype: The 8-bit type that its key-value cache is best kept in.
    """

    name: str
    bandwidth: float
    bf16: float
    int8: float | None
    link: float
    axes: int
    between_slices: float | None = None
    devices: int = 1
    one_host: int = 4
    configuration: str | None = None
    cache_dtype: str = "int8"


# Published peaks: Google's pages of each generation ("TPU v5e", ...; the network between slices is there that of a pod
# of 256 chips), and for links and for the network of v4 and v5p "How to Scale Your Model", chapter on TPUs. HBM sizes
# are not here: the compiler says what a program may have.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 1.23e12, 2.75e14, None, 9e10, 3, 6.25e9, configuration="megacore"),
        Chip("v5e", 8.2e11, 1.97e14, 3.94e14, 9e10, 2, 3.125e9, one_host=8),
        Chip("v5p", 2.77e12, 4.59e14, 9.18e14, 1.8e11, 3, 6.25e9),
        Chip("v6e", 1.64e12, 9.2e14, 1.84e15, 1.8e11, 2, 12.5e9, one_host=8),
        Chip("tpu7x", 7.4e12, 2.31e15, None, 1.2e12 / 3, 3, devices=2, cache_dtype="float8_e4m3fn"),
    )
}

# Slices that people rent, from one host to what the recipes ask for.
USUAL_TOPOLOGIES = (
    "v4:2x2x1",
    "v4:2x2x4",
    "v5e:2x4",
    "v5e:4x4",
    "v5e:4x8",
    "v5e:8x8",
    "v5e:16x16",
    "v5p:2x2x1",
    "v5p:2x2x2",
    "v5p:2x2x4",
    "v5p:4x4x4",
    "v6e:2x2",
    "v6e:2x4",
    "v6e:4x4",
    "v6e:8x8",
    "tpu7x:2x2x1",
    "tpu7x:2x2x2",
    "tpu7x:4x4x4",
)


@dataclass(frozen=True)
class Topology:
    """A slice of a pod, or several equal ones with the data-center network between them.

    Attributes:
        name: As it was asked for.
        chip: What it is made of.
        sides: Chips of a slice along each axis.
        slices: How many.

    Example:
        >>> parse_topology("tpu7x:2x2x1").devices
        8
    """

    name: str
    chip: Chip
    sides: tuple[int, ...]
    slices: int = 1

    @property
    def slice_name(self) -> str:
        """One slice as libtpu spells it."""
        return self.name.rpartition("*")[2]

    @property
    def chips(self) -> int:
        """How many chips, of all slices."""
        total = self.slices
        for side in self.sides:
            total *= side
        return total

    @property
    def devices(self) -> int:
        """How many devices JAX sees."""
        return self.chips * self.chip.devices

    @property
    def hosts(self) -> int:
        """Virtual machines."""
        of_slice = self.chips // self.slices
        return self.slices * (1 if of_slice <= self.chip.one_host else -(-of_slice // 4))


def parse_topology(name: str) -> Topology:
    """Reads ``CHIP:AxB`` or ``CHIP:AxBxC``, and ``2*CHIP:AxB`` for two such slices.

    Raises:
        ValueError: The chip is unknown or the sides are none of it.
    """
    count, star, one = name.rpartition("*")
    if star and not re.fullmatch(r"[1-9]\d*", count):
        raise ValueError(f"topology {name}: expected a number of slices before the *, as in 2*v5e:16x16")
    kind, _, sides = one.partition(":")
    if kind not in CHIPS:
        raise ValueError(f"topology {name}: the chip is {kind!r}; expected one of {', '.join(CHIPS)}, as in v5e:4x4")
    chip = CHIPS[kind]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sides) or sides.count("x") != chip.axes - 1:
        example = next(usual for usual in USUAL_TOPOLOGIES if usual.startswith(f"{kind}:"))
        raise ValueError(f"topology {name}: {kind} slices have {chip.axes} sides, as in {example}")
    slices = int(count) if star else 1
    if slices > 1 and chip.between_slices is None:
        raise ValueError(f"topology {name}: how fast slices of {kind} talk to each other is not known here")
    return Topology(name, chip, tuple(int(side) for side in sides.split("x")), slices)
