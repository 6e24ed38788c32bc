"""Chip-hours of a run, and what they cost where the price table says."""

from dataclasses import dataclass
from pathlib import Path

from gcp.record import Record
from qwq_jax.config.load import load_toml
from qwq_jax.config.plan import Prices

TABLE = Path(__file__).with_name("prices.toml")


@dataclass(frozen=True)
class Cost:
    """Of a run so far.

    Attributes:
        chip_hours: While resources were active.
        price: Of one of them; None where the table has none.
        key: Of that price in the table.
        currency: Of the price.
    """

    chip_hours: float
    price: float | None
    key: str
    currency: str

    def __str__(self) -> str:
        if self.price is None:
            return f'{self.chip_hours:.2f} chip-hours; no price: fill in chip_hour."{self.key}" in {TABLE}'
        amount = self.chip_hours * self.price
        return f"{self.chip_hours:.2f} chip-hours at {self.price:g} {self.currency} = {amount:.2f} {self.currency}"


def read_prices(path: Path = TABLE) -> Prices:
    """Reads the table.

    Raises:
        ValueError: It does not fit; the key is named.
    """
    return load_toml(path, Prices)


def cost(record: Record, prices: Prices, now: float) -> Cost:
    """Adds up the times for which the run held chips."""
    seconds = sum((now if each.end is None else each.end) - each.begin for each in record.intervals)
    key = f"{record.job.slice.generation}.{record.job.provisioning}"
    return Cost(seconds / 3600 * record.job.chips, prices.chip_hour.get(key), key, prices.currency)


def most(record: Record, prices: Prices) -> Cost:
    """What the run costs at most, if it holds its chips until the deadline."""
    hours = (record.deadline - record.created) / 3600
    key = f"{record.job.slice.generation}.{record.job.provisioning}"
    return Cost(hours * record.job.chips, prices.chip_hour.get(key), key, prices.currency)
