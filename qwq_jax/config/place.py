"""Which of the processes of a run this one is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A process among those of a run; None is for `jax.distributed` to find out.

    Attributes:
        address: ``HOST:PORT`` at which process 0 meets the others.
        count: How many they are.
        index: This one, from 0 on.
    """

    address: str | None
    count: int | None
    index: int | None
