"""What a compiled program does, read from the text of its scheduled HLO: bytes over HBM, products, collectives.

Each operation names where its operands and results live: what is not marked as on-chip (`S(n)`) is in HBM, and is
counted once for each operation that reads or writes it. Of an operand that an operation only slices or gathers from,
and of a result that it only updates in part, the part counts. A loop counts as often as it runs.

XLA's own analysis counts the body of a loop once, and not what a kernel of ours reads; hence this one.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f8e4m3fn": 8, "f8e5m2": 8, "s4": 4, "u4": 4}
_FREE = frozenset({"get-tuple-element", "bitcast", "tuple", "parameter", "constant", "after-all", "partition-id"})
_ALIASES = ("ConcatBitcast", "AllocateBuffer", "AssumeGatherIndicesInBound", "SliceToDynamic")
_SLICES = ("dynamic-slice", "gather", "slice", "dynamic-update-slice")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# What loops count with.
_COUNTERS = ("s32[]", "u32[]")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{[^}]*?\})?")
_LINE = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_NAMES = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Operation:
    """One line of a computation: ``%name = shape kind(rest``."""

    name: str
    shape: str
    kind: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of what it reads."""
        return _NAMES.findall(self.halves[0])

    @property
    def halves(self) -> tuple[str, str]:
        """The text of its operands, and that of its attributes."""
        depth, end = 1, 0
        while depth and end < len(self.rest):
            depth += {"(": 1, ")": -1}.get(self.rest[end], 0)
            end += 1
        return self.rest[: end - 1], self.rest[end:]

    def called(self, field: str) -> str | None:
        """The computation that a field names."""
        found = re.search(rf"{field}=%([\w.\-]+)", self.rest)
        return found[1] if found else None

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional."""
        found = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        if found:
            return _NAMES.findall(found[1])
        return [name for field in ("true_computation", "false_computation") if (name := self.called(field))]


Module = Mapping[str, list[Operation]]


def parse(text: str) -> dict[str, list[Operation]]:
    """The operations of each computation of a module's text; the entry is there under ``"ENTRY"`` too.

    What goes on in the background, which may be written as a computation of one operation, is that operation's start:
    ``async-start(%x), calls=%c`` with a slice in c is ``slice-start(%x), slice=...``.
    """
    found: dict[str, list[Operation]] = {}
    current: list[Operation] = []
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%([\w.\-]+) \(", line)
        if head:
            current = found.setdefault(head[2], [])
            if head[1]:
                found["ENTRY"] = current
        elif match := _LINE.match(line):
            current.append(Operation(*match.groups()))
    return {name: [_unwrapped(found, each) for each in operations] for name, operations in found.items()}


def _unwrapped(module: Module, each: Operation) -> Operation:
    inner = module.get(each.called("calls") or "", []) if each.kind == "async-start" else []
    if not inner or any(other.kind != "parameter" for other in inner[:-1]):
        return each
    return Operation(each.name, each.shape, f"{inner[-1].kind}-start", f"{each.halves[0]}){inner[-1].halves[1]}")


def size(shape: str, *, everywhere: bool = False) -> int:
    """Bytes of a shape, or of a tuple's parts, that lie in HBM (or anywhere)."""
    total = 0
    for match in _SHAPE.finditer(shape):
        if everywhere or not re.search(r"S\(\d+\)\}?$", match[0]):
            bits = _BITS.get(match[1]) or int(re.sub(r"\D", "", match[1]) or 0)
            total += elements(match[2]) * bits // 8
    return total


def elements(extents: str) -> int:
    """Number of elements of ``"8,128"``."""
    return math.prod(int(n) for n in extents.split(",") if n)


def repeats(module: Module, loop: Operation) -> int | None:
    """How often a loop runs that counts from 0 to a constant; None where the program decides it."""
    condition = module.get(loop.called("condition") or "", [])
    inside = _with_called(module, condition)
    compared = [each for each in inside if each.kind == "compare"]
    limits = [value for each in inside if (value := _integer(each)) is not None]
    alone = len(compared) == len(limits) == 1 and "direction=LT" in compared[0].rest
    if not alone or any(each.kind == "and" for each in inside):
        return None
    return -(-limits[0] // _stride(module, loop, condition))


def _with_called(module: Module, operations: list[Operation]) -> list[Operation]:
    """With those of fusions among them."""
    return [*operations, *(o for each in operations for o in module.get(each.called("calls") or "", ()))]


def _integer(each: Operation) -> int | None:
    """A constant that loops count with."""
    return int(each.rest.split(")")[0]) if each.kind == "constant" and each.shape.startswith(_COUNTERS) else None


def _stride(module: Module, loop: Operation, condition: list[Operation]) -> int:
    """What a round adds to the counter: 2 where the compiler has put two rounds into one; 1 where it cannot be told."""
    counters = [each for each in condition if each.kind == "get-tuple-element" and each.shape.startswith(_COUNTERS)]
    body = module.get(loop.called("body") or "", [])
    if len(counters) != 1 or not body or body[-1].kind != "tuple":
        return 1
    index = re.search(r"index=(\d+)", counters[0].rest)
    assert index is not None, counters[0].rest
    by_name = {each.name: each for each in body}
    next_one = by_name.get(body[-1].operands[int(index[1])])
    if next_one is None:
        return 1
    inside = _with_called(module, [next_one])
    added = [by_name[name] for each in inside for name in each.operands if name in by_name]
    steps = [value for each in [*inside, *added] if (value := _integer(each)) is not None]
    alone = sum(each.kind == "add" for each in inside) == len(steps) == 1
    return steps[0] if alone and steps[0] > 0 else 1


def moved_bytes(module: Module, name: str, live_cache: int) -> int:
    """HBM bytes of one run of a computation; of several branches the one that moves most.

    Args:
        module: The program.
        name: The computation.
        live_cache: Bytes of one layer's pages that one call of the paged kernel reads: the kernel reads the live cache
            once, whatever the pool's size. Its other operands are counted like everybody's.
    """
    operations = module[name]
    shapes = {operation.name: operation.shape for operation in operations}
    return sum(_moved_by(module, each, shapes, live_cache) for each in operations)


def _moved_by(module: Module, each: Operation, shapes: Mapping[str, str], live_cache: int) -> int:
    if each.kind in _FREE or each.kind.endswith("-done") or any(alias in each.rest for alias in _ALIASES):
        return 0
    if each.kind == "while":
        return (repeats(module, each) or 1) * moved_bytes(module, each.called("body") or "", live_cache)
    if each.kind == "conditional":
        return max((moved_bytes(module, branch, live_cache) for branch in each.branches), default=0)
    if each.kind == "call":
        return moved_bytes(module, each.called("to_apply") or "", live_cache)
    if each.kind == "copy-start":
        return size(each.shape)  # the result names the destination and the source
    if each.kind == "slice-start":
        return size(each.shape.rsplit(", s32[]", 1)[0].split("), ", 1)[1], everywhere=True)
    if "tpu_custom_call" in each.rest and "paged" in each.name:
        others = [size(shapes.get(name, "")) for name in each.operands]
        return live_cache + sum(bytes for bytes in others if bytes < live_cache // 8)
    return _moved_by_operation(module, each, shapes)


def _moved_by_operation(module: Module, each: Operation, shapes: Mapping[str, str]) -> int:
    inner = module.get(each.called("calls") or "", [])
    parameters = {int(o.rest.split(")")[0]): o.name for o in inner if o.kind == "parameter"}
    total = 0
    for index, operand in enumerate(each.operands):
        bytes = size(shapes.get(operand, ""))
        if bytes and index in parameters:
            uses = [o for o in inner if parameters[index] in o.operands]
            if uses and all(o.kind in _SLICES for o in uses):
                bytes = min(bytes, sum(_part(inner, use) for use in uses))
        total += bytes
    written = size(each.shape)
    updates = [o for o in inner if o.kind in ("dynamic-update-slice", "scatter")]
    return total + (min(written, sum(_part(inner, o) for o in updates)) if updates else written)


def _part(inner: list[Operation], use: Operation) -> int:
    """Bytes that a slice, a gather or an update touches."""
    if use.kind in ("dynamic-update-slice", "scatter"):
        shapes = {operation.name: operation.shape for operation in inner}
        operands = use.operands
        return size(shapes.get(operands[1 if use.kind == "dynamic-update-slice" else -1], ""), everywhere=True)
    return size(use.shape, everywhere=True)


def walk(module: Module, name: str, times: int = 1) -> Iterator[tuple[Operation, int, str]]:
    """Every operation below a computation, how often it runs, and the computation that it stands in.

    Loops whose length the program decides count as one round; of a conditional the branch counts that moves most.
    """
    for each in module.get(name, []):
        yield each, times, name
        if each.kind == "while":
            yield from walk(module, each.called("body") or "", times * (repeats(module, each) or 1))
        if each.kind == "conditional":
            branches = [branch for branch in each.branches if branch in module]
            yield from walk(module, max(branches, key=lambda branch: moved_bytes(module, branch, 0), default=""), times)
        for field in ("calls", "to_apply"):
            if each.kind in ("fusion", "call", "async-start") and (inner := each.called(field)):
                yield from walk(module, inner, times)
        # What tpu7x hands to its sparse cores, such as all-reduces.
        if each.kind == "custom-call-start" and (handed := re.search(r"called_computations=\{([^}]*)\}", each.rest)):
            for inner in _NAMES.findall(handed[1]):
                yield from walk(module, inner, times)


def decode_round(module: Module) -> str:
    """The computation that holds the paged kernel: the body of a window's loop, or the entry where there is none."""
    holders = [
        name
        for name, operations in module.items()
        if any("tpu_custom_call" in each.rest and "paged" in each.name for each in operations)
    ]
    assert set(holders) - {"ENTRY"}, "a decode program has a paged kernel"
    return "ENTRY" if "ENTRY" in holders else holders[0]


def matrix_flops(module: Module, name: str) -> float:
    """Operations of all matrix products below a computation; those inside kernels of our own are not in the text."""
    shapes: dict[str, dict[str, str]] = {}
    total = 0.0
    for each, times, where in walk(module, name):
        if each.kind in ("convolution", "dot"):
            if where not in shapes:
                shapes[where] = {operation.name: operation.shape for operation in module[where]}
            total += times * _product_flops(each, shapes[where])
    return total


def _product_flops(each: Operation, shapes: Mapping[str, str]) -> float:
    result = _SHAPE.search(each.shape)
    assert result is not None, each.shape
    left, right = (_SHAPE.search(shapes.get(name, "")) for name in each.operands[:2])
    assert left is not None and right is not None, each.rest[:200]
    if each.kind == "dot":
        sizes = [int(n) for n in left[2].split(",") if n]
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.rest)
        axes = [int(n) for n in contracted[1].split(",") if n] if contracted else []
        return 2.0 * elements(result[2]) * math.prod(sizes[axis] for axis in axes)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.rest)
    assert labels is not None, each.rest[:200]
    shaped = [[int(n) for n in extents.split(",") if n] for extents in (left[2], right[2], result[2])]
    inputs, weights, outputs = (
        dict(zip(label, shape, strict=True)) for label, shape in zip(labels.groups(), shaped, strict=True)
    )
    window = re.search(r"window=\{([^}]*)\}", each.rest)
    pairs = _meetings(window[1] if window else "", inputs, weights, outputs)
    return 2.0 * outputs["b"] * outputs["f"] * weights["i"] * pairs


def _meetings(window: str, inputs: Mapping[str, int], weights: Mapping[str, int], outputs: Mapping[str, int]) -> int:
    """How many pairs of an output and a tap of a convolution's window meet an element, not padding or a hole.

    Products over several dimensions become convolutions, of whose window most lies outside.
    """
    fields = dict(field.split("=") for field in window.split())
    rank = sum(label.isdigit() for label in weights)

    def numbers(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * rank

    pads, strides, holes, spreads = (
        numbers(name, default)
        for name, default in (("pad", "0_0"), ("stride", "1"), ("lhs_dilate", "1"), ("rhs_dilate", "1"))
    )
    total = 1
    for axis in range(rank):
        low, stride, hole, spread = int(pads[axis].split("_")[0]), *(int(x[axis]) for x in (strides, holes, spreads))
        name = str(axis)
        total *= sum(
            at % hole == 0 and 0 <= at // hole < inputs[name]
            for output in range(outputs[name])
            for tap in range(weights[name])
            for at in (output * stride + tap * spread - low,)
        )
    return total


@dataclass(frozen=True)
class Collective:
    """Equal exchanges of a program.

    Attributes:
        kind: ``all-reduce``, ``all-gather``, ``reduce-scatter``, ``all-to-all`` or ``collective-permute``.
        group: Devices that exchange.
        stride: Distance between neighbours of a group in the order of the mesh.
        bytes: Of the whole array that a group shares: the result of an all-gather, the operand of a reduce-scatter.
        count: How often.
    """

    kind: str
    group: int
    stride: int
    bytes: int
    count: int


def collectives(module: Module, name: str) -> list[Collective]:
    """The exchanges below a computation, those of one size together; those of a single device are none."""
    found: dict[tuple[str, int, int, int], int] = {}
    for each, times, where in walk(module, name):
        kind = each.kind.removesuffix("-start")
        if kind not in _COLLECTIVES:
            continue
        group, stride = _group(each)
        whole = _exchanged(module, where, each, kind, group)
        if group > 1 and whole:
            key = (kind, group, stride, whole)
            found[key] = found.get(key, 0) + times
    return [Collective(*key, count=count) for key, count in sorted(found.items())]


def _exchanged(module: Module, where: str, each: Operation, kind: str, group: int) -> int:
    shapes = {operation.name: operation.shape for operation in module[where]}
    given = sum(size(shapes.get(name, ""), everywhere=True) for name in each.operands)
    return given * group if kind == "all-gather" else given


def _group(each: Operation) -> tuple[int, int]:
    """Size of an exchange's groups, and the distance of their members."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", each.rest)
    if listed:
        members = [int(n) for n in listed[1].split(",")]
        return len(members), members[1] - members[0] if len(members) > 1 else 1
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", each.rest)
    if iota:
        extents = [int(n) for n in iota[3].split(",")]
        order = [int(n) for n in iota[4].split(",")] if iota[4] else list(range(len(extents)))
        return int(iota[2]), math.prod(extents[order[-1] + 1 :])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", each.rest)
    if named:
        axes = {name: int(extent) for name, extent in re.findall(r"'([^']+)'=(\d+)", named[1])}
        members = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        inner = list(axes).index(members[-1][0]) + 1
        group = math.prod(int(part) if part else axes[name] for name, part in members)
        return group, math.prod(list(axes.values())[inner:])
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", each.rest)
    if pairs:
        return 2, abs(int(pairs[2]) - int(pairs[1]))
    return 1, 1
