"""Reads what libtpu's compiler says about a kernel: a tree of its loops and guarded regions, each with its cycles.

`*-packed-bundles-post-ra.txt` is the schedule with the waits that the compiler counts on written out as empty bundles:
one bundle a cycle. (`*-final_bundles.txt` has most of them taken out again, because the hardware waits by itself: it is
what is issued, not how long it takes, and 5 to 15 % shorter.) `*-pre-delay_hlo-static-per-bundle-utilization.txt` has a
row for every one of these bundles: how many slots of each unit it uses.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

BUNDLES = "packed-bundles-post-ra"
UTILIZATION = "pre-delay_hlo-static-per-bundle-utilization"
# A regular expression for libtpu's --xla_jf_dump_llo_pass_label_regex: what is read here, and little more.
DUMPED = f".*({BUNDLES}|pre-delay).*"

_ROW = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*>*\s*(\{\s*\})?")
_BRANCH = re.compile(r"\bsbr\.rel (?:\((!?%[^)]*)\) )?target bundleno = (\d+)")
_EXIT = re.compile(r"\b(\d+) /\* loop exit test")


@dataclass(frozen=True)
class Branch:
    """A jump: the bundle it stands in, and the bundle it goes to."""

    at: int
    target: int


@dataclass
class Region:
    """Bundles `[start, end)`: a whole kernel, the body of a loop, or what a branch may jump over.

    Attributes:
        kind: "kernel", "loop" or "guard".
        start: First bundle.
        end: One after the last bundle.
        trips: What the test at the end of a loop compares with, where that is a constant.
        inside: Loops and guards within, in order.
    """

    kind: str
    start: int
    end: int
    trips: int | None = None
    inside: list["Region"] = field(default_factory=list)

    def own(self) -> Iterator[int]:
        """The bundles that belong to no region within."""
        at = self.start
        for region in self.inside:
            yield from range(at, region.start)
            at = region.end
        yield from range(at, self.end)

    def outline(self, depth: int = 0) -> str:
        """The tree as indented text, for messages."""
        trips = "" if self.trips is None else f" x{self.trips}"
        line = f"{'  ' * depth}{self.kind}{trips} [{self.start:#x}, {self.end:#x})"
        return "\n".join([line, *(region.outline(depth + 1) for region in self.inside)])


@dataclass(frozen=True)
class Part:
    """What a case expects in a kernel, in the order of the text: a guarded region, or a loop.

    Attributes:
        name: For the report.
        runs: How often the body is executed in a whole call; of a loop, over all its trips.
        inside: Parts within.
        loop: Whether it is a loop.
        trips: What the trips may be each time the loop is entered, checked where the compiler wrote them down.
        optional: Whether the compiler may do without a branch (a few instructions become conditional themselves, and
            then count with what surrounds them).
        opaque: Never executed in this case (`runs` is 0), so that what is within does not matter.
    """

    name: str
    runs: int
    inside: tuple["Part", ...] = ()
    loop: bool = False
    trips: tuple[int, ...] = ()
    optional: bool = False
    opaque: bool = False


@dataclass(frozen=True)
class Cost:
    """One region of a whole call: its own bundles (not those of regions within) and how often they are executed.

    Attributes:
        name: Path of part names.
        bundles: Cycles of one execution, with the waits the compiler counts on.
        issued: Bundles that are not empty.
        runs: Executions in the call.
        used: Slots of each unit over one execution.
    """

    name: str
    bundles: int
    issued: int
    runs: int
    used: dict[str, int]

    def load(self, capacity: dict[str, int]) -> dict[str, float]:
        """Share of the slots in use, by unit; spills and fills are parts of loads and stores."""
        return {
            unit: count / (capacity[unit] * max(self.bundles, 1))
            for unit, count in self.used.items()
            if ":" not in unit
        }


@dataclass(frozen=True)
class Schedule:
    """A kernel as its compiler scheduled it.

    Attributes:
        tree: Its regions.
        empty: Whether each bundle is empty.
        units: Names of the columns of `slots`.
        capacity: Slots of each unit a bundle.
        slots: Slots in use, a row a bundle.
    """

    tree: Region
    empty: list[bool]
    units: list[str]
    capacity: dict[str, int]
    slots: list[list[int]]

    def costs(self, parts: Sequence[Part]) -> list[Cost]:
        """The cost of every region, given what the case expects.

        Raises:
            ValueError: The regions are not those expected.
        """
        found: list[Cost] = []
        self._collect(self.tree, Part("outside the grid loop", 1, tuple(parts)), "", found)
        return found

    def _collect(self, region: Region, part: Part, path: str, found: list[Cost]) -> None:
        if part.opaque:
            assert part.runs == 0, f"{part.name} is executed, so its regions matter"
            return
        shape = [r.kind for r in region.inside]
        inside = part.inside
        if len(shape) < len(inside):
            inside = tuple(p for p in inside if not p.optional)
        expected = ["loop" if p.loop else "guard" for p in inside]
        if shape != expected:
            names = [p.name for p in inside]
            raise ValueError(
                f"{part.name!r} should hold {list(zip(names, expected, strict=True))} "
                f"but the schedule has\n{region.outline()}"
            )
        if part.loop and region.trips is not None and part.trips and region.trips not in part.trips:
            expected_trips = " or ".join(map(str, part.trips))
            raise ValueError(f"{part.name!r} should make {expected_trips} trips, the schedule says {region.trips}")
        own = list(region.own())
        used = {unit: sum(self.slots[i][column] for i in own) for column, unit in enumerate(self.units)}
        name = f"{path}{part.name}"
        found.append(Cost(name, len(own), sum(not self.empty[i] for i in own), part.runs, used))
        for inner, inner_part in zip(region.inside, inside, strict=True):
            self._collect(inner, inner_part, "" if region.kind == "kernel" else f"{name} / ", found)


def read_schedule(bundles: Path, utilization: Path) -> Schedule:
    """Reads one kernel's two files.

    Raises:
        ValueError: They do not look like what this module understands.
    """
    rows = _read_rows(bundles)
    branches, ends, exits, empty = [], set(), {}, []
    for number, (text, is_empty) in enumerate(rows):
        empty.append(is_empty)
        hits = _BRANCH.findall(text)
        if len(hits) != len(re.findall(r"\bsbr\.", text)):
            raise ValueError(f"bundle {number:#x} of {bundles.name} jumps in a way that is not understood")
        branches += [Branch(number, int(target)) for _, target in hits]
        if "End region" in text:
            ends.add(number)
        if limit := _EXIT.search(text):
            exits[number] = int(limit[1])
    delay = _delay_slots(branches, ends)
    tree = build_tree(branches, delay, len(rows), exits)
    units, capacity, slots = _read_utilization(utilization)
    if len(slots) not in (len(rows), len(rows) - 1):
        raise ValueError(f"{len(rows)} bundles, but {len(slots)} rows in {utilization.name}")
    slots += [[0] * len(units)] * (len(rows) - len(slots))
    return Schedule(tree, empty, units, capacity, slots)


def build_tree(branches: Sequence[Branch], delay: int, count: int, exits: dict[int, int] | None = None) -> Region:
    """Nests loops and guards.

    Args:
        branches: All jumps.
        delay: Bundles after a jump that are executed before it takes effect.
        count: Bundles in all.
        exits: Constants that loops are left at, by the bundle of the test.

    Raises:
        ValueError: Regions overlap without one holding the other.
    """
    spans = []
    for branch in branches:
        after = branch.at + 1 + delay
        kind, start, end = (
            ("loop", branch.target, after) if branch.target <= branch.at else ("guard", after, branch.target)
        )
        if start < end:
            spans.append((start, -end, kind, branch.at))
    root = Region("kernel", 0, count)
    stack = [root]
    for start, end, kind, at in sorted(spans):
        region = Region(kind, start, -end)
        while start >= stack[-1].end:
            stack.pop()
        if region.end > stack[-1].end:
            raise ValueError(f"{kind} [{start:#x}, {region.end:#x}) crosses the end of {stack[-1].end:#x}")
        stack[-1].inside.append(region)
        stack.append(region)
        if kind == "loop":
            tests = [number for number in (exits or {}) if start <= number <= at]
            # The test of a loop is the last one before it jumps back.
            region.trips = (exits or {})[max(tests)] if tests and at - max(tests) < 64 else None
    return root


def _read_rows(path: Path) -> list[tuple[str, bool]]:
    """The text of each bundle (comments may go over several lines), and whether it is empty."""
    rows: list[list[str]] = []
    empty: list[bool] = []
    for line in path.read_text().splitlines():
        if match := _ROW.match(line):
            if int(match[1], 16) != len(rows):
                raise ValueError(f"bundle {len(rows):#x} of {path.name} is missing")
            rows.append([])
            empty.append(match[2] is not None)
        if rows:
            rows[-1].append(line)
    if not rows:
        raise ValueError(f"no bundles in {path}")
    return [("\n".join(lines), is_empty) for lines, is_empty in zip(rows, empty, strict=True)]


def _delay_slots(branches: Sequence[Branch], ends: set[int]) -> int:
    """Bundles from a jump to the end of its region, which is where the last of its delay slots is."""
    for delay in range(1, 16):
        if all(branch.at + delay in ends for branch in branches):
            return delay
    raise ValueError("the jumps of this schedule have no common number of delay slots")


def _read_utilization(path: Path) -> tuple[list[str], dict[str, int], list[list[int]]]:
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if len(lines) < 4 or not lines[0].startswith("== CAPA") or not lines[3].startswith("== UTIL"):
        raise ValueError(f"{path} is not a table of utilization")
    units = [unit.strip() for unit in lines[1].split(",")]
    capacity = dict(zip(units, map(int, lines[2].split()), strict=True))
    return units, capacity, [list(map(int, line.split())) for line in lines[4:]]
