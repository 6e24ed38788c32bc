"""A plan in the terminal."""

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from qwq_jax.config.plan import Prices
from qwq_jax.plan.chips import GB
from qwq_jax.plan.memory import PROGRAMS, RESERVED
from qwq_jax.plan.result import TopologyPlan

_WIDTH = 160


def show(
    plans: Sequence[TopologyPlan], prices: Prices, provisioning: str = "on-demand", console: Console | None = None
) -> None:
    """Prints a line a topology, then what each of them spends its memory and its time on."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)  # a file or a pipe has no edge
    plans = [each for plan in plans for each in (plan, plan.better) if each is not None]
    console.print(_overview(plans, prices))
    for plan in plans:
        for problem in plan.problems:
            console.print(f"[bold]{plan.topology.name} does not fit.[/] {problem}", highlight=False)
        if plan.settings:
            console.print(f"{plan.topology.name}: with --set {' --set '.join(plan.settings)}", highlight=False)
        if plan.memory is not None:
            console.print(_memory(plan))
            console.print(_times(plan))
        if plan.advice:
            better = "faster" if plan.fits else "fits"
            console.print(f"{plan.topology.name}: {better} by estimate: --set {' --set '.join(plan.advice)}")
    chips = sorted({plan.topology.chip.name for plan in plans})
    if unpriced := [f"{chip}.{provisioning}" for chip in chips if prices.of(chip, provisioning) is None]:
        console.print(f"No cost: --prices names no chip_hour of {', '.join(unpriced)}.", highlight=False)


def _overview(plans: Sequence[TopologyPlan], prices: Prices) -> Table:
    columns = [("topology", str), ("mesh", str), ("GB of a device", str), *_facts(plans, prices)]
    table = Table(title="Least times by the roofline; nothing here was run", title_justify="left")
    for name, _ in columns:
        table.add_column(name, justify="left" if name in ("topology", "mesh") else "right")
    for plan in plans:
        cells = [plan.topology.name, mesh_text(plan), memory_text(plan)]
        cells += [fact_text(name, plan.facts) if plan.fits else "" for _, name in _facts(plans, prices)]
        table.add_row(*cells)
    return table


FACTS = {
    "tokens_per_second": "tokens/s",
    "tokens_per_second_per_chip": "tokens/s/chip",
    "decode_tokens_per_second_per_chip": "decode only",
    "step_seconds": "step, s",
    "run_seconds": "run, h",
    "mfu": "MFU",
    "mbu": "MBU",
    "rows": "rows",
    "largest_batch": "rows that fit",
    "largest_context": "context that fits",
    "price_of_million_tokens": "cost of 1M tokens",
    "price_of_run": "cost of the run",
}


def _facts(plans: Sequence[TopologyPlan], prices: Prices) -> list[tuple[str, str]]:
    found = {name for plan in plans for name in plan.facts}
    return [
        (f"{label}, {prices.currency}" if name.startswith("price") else label, name)
        for name, label in FACTS.items()
        if name in found
    ]


def mesh_text(plan: TopologyPlan) -> str:
    """Both meshes in short, axes of size 1 left out."""
    trained = _axes(plan.mesh)
    return trained if plan.decode_mesh is None else f"{trained}; engine {_axes(plan.decode_mesh)}"


def _axes(mesh: Mapping[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in mesh.items() if size > 1) or "one device"


def memory_text(plan: TopologyPlan) -> str:
    """What is taken of what a device has."""
    if plan.memory is None:
        return "does not fit"
    memory = plan.memory
    return f"{memory.peak / GB:.1f} of {memory.usable / GB:.1f}" + ("" if plan.fits else " (does not fit)")


def fact_text(name: str, facts: Mapping[str, float]) -> str:
    """One figure, rounded as it deserves."""
    if name not in facts:
        return ""
    value = facts[name]
    if name in ("mfu", "mbu"):
        return f"{value:.0%}"
    if name == "run_seconds":
        return f"{value / 3600:,.1f}"
    return f"{value:,.2f}" if name.startswith("price") or value < 100 and name == "step_seconds" else f"{value:,.0f}"


def memory_rows(plan: TopologyPlan) -> Iterable[tuple[str, str]]:
    """What lies on a device, and the most of each phase, in GB."""
    memory = plan.memory
    assert memory is not None
    for name, size in memory.held.items():
        yield name, f"{size / GB:.2f}"
    for name, size in memory.engine.items():
        yield name if memory.held.keys() <= {PROGRAMS, RESERVED} else f"{name}, while it draws", f"{size / GB:.2f}"
    if memory.gradients:
        yield "gradients, while it learns", f"{memory.gradients / GB:.2f}"
    for name, cost in memory.programs.items():
        yield f"temporaries and results: {name}", f"{(cost.temporaries + cost.result) / GB:.2f}"
    for name, size in memory.peaks.items():
        yield f"in all: {name}", f"{size / GB:.2f} ({size / memory.usable:.0%})"


def _memory(plan: TopologyPlan) -> Table:
    table = Table("on a device", "GB", title=f"{plan.topology.name}: memory", title_justify="left")
    table.columns[1].justify = "right"
    for row in memory_rows(plan):
        table.add_row(*row)
    return table


TIME_COLUMNS = ("part", "program", "runs a step", "ms a run", "products", "HBM", "network", "bound by", "s a step")


def time_rows(plan: TopologyPlan) -> Iterable[tuple[str, ...]]:
    """A line a part: how often, how long, and what bounds it."""
    for part in plan.parts:
        seconds = part.seconds
        yield (
            part.name,
            part.program,
            f"{part.runs:,.2f}".rstrip("0").rstrip("."),
            f"{1e3 * seconds.total:,.2f}",
            f"{1e3 * seconds.compute:,.2f}",
            f"{1e3 * seconds.memory:,.2f}",
            f"{1e3 * (seconds.waited + seconds.hidden):,.2f}",
            seconds.bound,
            f"{part.total:,.3f}",
        )


def _times(plan: TopologyPlan) -> Table:
    table = Table(*TIME_COLUMNS, title=f"{plan.topology.name}: time", title_justify="left")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in time_rows(plan):
        table.add_row(*row)
    return table
