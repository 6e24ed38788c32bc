"""HBM bytes, collectives and temporaries of a decode step, from the TPU compiler's own HLO, on a machine without a TPU.

    python tools/step_bytes.py v5e:4x4 v6e:2x4 --weights int8 --cache int8

The window of a `qwq_jax.engine` decode program is a loop; its body is one step. Each operation of the scheduled
module names where its operands and results live: what is not marked as on-chip (`S(n)`) is in HBM, and is counted
once for each operation that reads or writes it. Of an operand that an operation only slices or gathers from, and of a
result that it only updates in part, the part counts. The paged attention kernel reads the live cache once, which
`tools/kernel_schedule.py` shows of it; its other operands are counted like everybody's.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROWS, CONTEXT = 64, 8192
MESHES = {"v5e:4x4": (2, 8), "v6e:2x4": (1, 8), "v5p:2x2x1": (1, 4), "tpu7x:2x2x1": (1, 8)}
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f8e4m3fn": 8, "f8e5m2": 8, "s4": 4, "u4": 4}
_FREE = frozenset({"get-tuple-element", "bitcast", "tuple", "parameter", "constant", "after-all", "partition-id"})
_ALIASES = ("ConcatBitcast", "AllocateBuffer", "AssumeGatherIndicesInBound", "SliceToDynamic")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{[^}]*?\})?")
_LINE = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")


@dataclass(frozen=True)
class StepBytes:
    """Of one decode step on one device.

    Attributes:
        moved: HBM bytes read and written.
        ideal: Bytes of the weights that a step needs, once, and of the live cache, once.
        temporaries: Bytes that the program allocates beside its arguments and results.
        reductions: All-reduces of activations, `[rows, D]`.
        others: Other collectives, all of the sampler, with how often each occurs.
        largest_other: Elements of the largest of them.
    """

    moved: int
    ideal: int
    temporaries: int
    reductions: int
    others: dict[str, int]
    largest_other: int


@dataclass(frozen=True)
class _Operation:
    name: str
    shape: str
    kind: str
    rest: str

    @property
    def operands(self) -> list[str]:
        depth, end = 1, 0
        while depth and end < len(self.rest):
            depth += {"(": 1, ")": -1}.get(self.rest[end], 0)
            end += 1
        return re.findall(r"%([\w.\-]+)", self.rest[: end - 1])

    def called(self, field: str) -> str | None:
        found = re.search(rf"{field}=%([\w.\-]+)", self.rest)
        return found[1] if found else None


def computations(text: str) -> dict[str, list[_Operation]]:
    """The operations of each computation of a module's text."""
    found: dict[str, list[_Operation]] = {}
    current: list[_Operation] = []
    for line in text.splitlines():
        head = re.match(r"^(?:ENTRY )?%([\w.\-]+) \(", line)
        if head:
            current = found.setdefault(head[1], [])
        elif match := _LINE.match(line):
            current.append(_Operation(*match.groups()))
    return found


def size(shape: str, *, everywhere: bool = False) -> int:
    """Bytes of a shape, or of a tuple's parts, that lie in HBM (or anywhere)."""
    total = 0
    for match in _SHAPE.finditer(shape):
        if everywhere or not re.search(r"S\(\d+\)\}?$", match[0]):
            bits = _BITS.get(match[1]) or int(re.sub(r"\D", "", match[1]) or 0)
            total += math.prod(int(n) for n in match[2].split(",") if n) * bits // 8
    return total


def moved_bytes(module: dict[str, list[_Operation]], name: str, live_cache: int) -> int:
    """HBM bytes of one run of a computation; of several branches the one that moves most."""
    operations = module[name]
    shapes = {operation.name: operation.shape for operation in operations}
    total = 0
    for each in operations:
        if each.kind in _FREE or each.kind.endswith("-done") or any(alias in each.rest for alias in _ALIASES):
            continue
        if each.kind == "while":
            total += moved_bytes(module, each.called("body") or "", live_cache)
        elif each.kind == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", each.rest)
            names = re.findall(r"%([\w.\-]+)", branches[1]) if branches else []
            total += max((moved_bytes(module, branch, live_cache) for branch in names), default=0)
        elif each.kind == "copy-start":
            # The result names the destination and the source.
            total += size(each.shape)
        elif each.kind == "slice-start":
            total += size(each.shape.rsplit(", s32[]", 1)[0].split("), ", 1)[1], everywhere=True)
        elif "tpu_custom_call" in each.rest and "paged" in each.name:
            others = [size(shapes.get(name, "")) for name in each.operands]
            total += live_cache + sum(bytes for bytes in others if bytes < live_cache // 8)
        else:
            total += _of_operation(module, each, shapes)
    return total


def _of_operation(module: dict[str, list[_Operation]], each: _Operation, shapes: dict[str, str]) -> int:
    inner = module.get(each.called("calls") or "", [])
    parameters = {int(o.rest.split(")")[0]): o.name for o in inner if o.kind == "parameter"}
    total = 0
    for index, operand in enumerate(each.operands):
        bytes = size(shapes.get(operand, ""))
        if bytes and index in parameters:
            uses = [o for o in inner if parameters[index] in o.operands]
            if uses and all(o.kind in ("dynamic-slice", "gather", "slice", "dynamic-update-slice") for o in uses):
                bytes = min(bytes, sum(_part(inner, use) for use in uses))
        total += bytes
    written = size(each.shape)
    updates = [o for o in inner if o.kind in ("dynamic-update-slice", "scatter")]
    return total + (min(written, sum(_part(inner, o) for o in updates)) if updates else written)


def _part(inner: list[_Operation], use: _Operation) -> int:
    """Bytes that a slice, a gather or an update touches."""
    if use.kind in ("dynamic-update-slice", "scatter"):
        shapes = {operation.name: operation.shape for operation in inner}
        operands = use.operands
        return size(shapes.get(operands[1 if use.kind == "dynamic-update-slice" else -1], ""), everywhere=True)
    return size(use.shape, everywhere=True)


def collectives(module: dict[str, list[_Operation]], name: str, rows: int, width: int) -> tuple[int, dict, int]:
    """All-reduces of activations, the others by kind, and the largest of these in elements."""
    reductions, others, largest = 0, Counter(), 0
    for each in _all_operations(module, name):
        kind = each.kind.removesuffix("-start")
        if re.match(r"all-reduce\S*call-start$", each.name):  # on tpu7x, handed to the sparse cores
            reductions += 1
            continue
        if kind not in _COLLECTIVES:
            continue
        sizes = [math.prod(int(n) for n in dims.split(",") if n) for _, dims in _SHAPE.findall(each.shape)]
        if kind == "all-reduce" and max(sizes) == rows * width:
            reductions += 1
        else:
            others[kind] += 1
            largest = max(largest, *sizes)
    return reductions, dict(others), largest


def _all_operations(module: dict[str, list[_Operation]], name: str) -> Iterator[_Operation]:
    for each in module.get(name, []):
        yield each
        if each.kind in ("while", "conditional"):
            for inner in re.findall(r"(?:body=|branch_computations=\{|, )%([\w.\-]+)", each.rest):
                yield from _all_operations(module, inner)


def loop_body(module: dict[str, list[_Operation]]) -> str:
    """The computation that holds the paged kernel."""
    holders = [name for name, operations in module.items() if any("tpu_custom_call" in o.rest for o in operations)]
    assert len(holders) == 1, f"one loop body was expected: {holders}"
    return holders[0]


@dataclass(frozen=True)
class Case:
    """What to compile; `layers` 0 takes all of the model's."""

    topology: str
    weights: str | None
    cache: str
    layers: int = 0
    rows: int = ROWS
    window: int | None = None
    context: int = CONTEXT


def measure(case: Case) -> StepBytes:
    """Compiles in a process of its own, because the compiler reads its flags once.

    Raises:
        RuntimeError: The compiler failed; the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_pass_label_regex=none"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
            "LIBTPU_INIT_ARGS": flags,
        }
        command = [sys.executable, __file__, "--here", json.dumps(asdict(case)), folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{case}: {done.stderr[-800:]}")
        return StepBytes(**json.loads(done.stdout.splitlines()[-1]))


def _measure_here(case: Case, folder: Path) -> StepBytes:
    from jax.experimental import topologies

    from qwq_jax.config.engine import EngineConfig
    from qwq_jax.config.load import load_toml
    from qwq_jax.config.mesh import MeshConfig
    from qwq_jax.config.model import ModelConfig
    from qwq_jax.engine.runner import lower_step
    from qwq_jax.engine.step import Program
    from qwq_jax.sharding import decode_layout, make_mesh

    preset = Path(__file__).parents[1] / "configs/models/qwq-32b.toml"
    model = load_toml(preset, ModelConfig)
    model = model.model_copy(update={"num_layers": case.layers or model.num_layers})
    data, tensor = MESHES[case.topology]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=case.topology).devices
    layout = decode_layout(make_mesh(MeshConfig(data=data, tensor=tensor), devices))
    rows, page = case.rows // data, 128
    config = EngineConfig(
        max_sequences=rows,
        page_size=page,
        num_pages=rows * case.context // page,
        max_context=case.context,
        cache_dtype=case.cache,  # pyright: ignore[reportArgumentType]
        weights=case.weights,
        decode_window=case.window,
    )
    compiled = lower_step(model, layout, config, Program(rows, 0, 0)).compile()
    module = computations(max(folder.glob("*hlo.txt"), key=lambda path: path.stat().st_size).read_text())
    body = loop_body(module)
    token = (
        2 * model.num_kv_heads // tensor * (128 * (2 if case.cache == "bfloat16" else 1) + 4 * (case.cache[0] != "b"))
    )
    cache = rows * case.context * token
    layer = (
        2 * model.hidden_size * (model.num_heads + model.num_kv_heads) * 128
        + 3 * model.hidden_size * model.intermediate_size
    )
    head = model.vocab_size * model.hidden_size * 2
    weights = (model.num_layers * layer * {"int8": 1, "int4": 0.5}.get(case.weights or "", 2) + head) / tensor
    return StepBytes(
        moved_bytes(module, body, cache),
        int(weights + model.num_layers * cache),
        compiled.memory_analysis().temp_size_in_bytes,
        *collectives(module, body, rows, model.hidden_size),
    )


def extrapolated(case: Case, layers: int = 64) -> StepBytes:
    """The figures of all layers from those of two and four, which differ by two equal ones: quicker to compile."""
    two, four = (measure(replace(case, layers=count)) for count in (2, 4))
    line = lambda a, b: a + (b - a) * (layers - 2) // 2  # noqa: E731
    return StepBytes(
        line(two.moved, four.moved),
        line(two.ideal, four.ideal),
        line(two.temporaries, four.temporaries),
        line(two.reductions, four.reductions),
        four.others,
        four.largest_other,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topologies", nargs="*", default=list(MESHES), help=f"of {', '.join(MESHES)}")
    parser.add_argument("--weights", help="int8, int4; bfloat16 otherwise")
    parser.add_argument("--cache", default="bfloat16", help="bfloat16, int8, float8_e4m3fn, float8_e5m2")
    parser.add_argument("--window", type=int, help="tokens a call; 1 is a program without a loop")
    parser.add_argument("--quick", action="store_true", help="extrapolate from two and four layers")
    arguments = parser.parse_args()
    print("| topology | weights | cache | GB a step | of the ideal | temporaries, GB | all-reduces | others |")
    print("|---|---|---|---|---|---|---|---|")
    for topology in arguments.topologies:
        case = Case(topology, arguments.weights, arguments.cache, window=arguments.window)
        step = extrapolated(case) if arguments.quick else measure(case)
        others = ", ".join(f"{count} {kind}" for kind, count in sorted(step.others.items()))
        print(
            f"| {topology} | {case.weights or 'bfloat16'} | {case.cache} | {step.moved / 1e9:.2f} | "
            f"{step.moved / step.ideal:.3f} | {step.temporaries / 1e9:.3f} | {step.reductions} | "
            f"{others} (up to {step.largest_other:,} elements) |",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--here"]:
        print(json.dumps(asdict(_measure_here(Case(**json.loads(sys.argv[2])), Path(sys.argv[3])))))
    else:
        main()
