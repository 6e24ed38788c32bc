"""Compiles attention kernels for TPUs on a machine without one, and counts the cycles of the compiler's schedule.

    python tools/kernel_schedule.py show v5e forward ours --sizes 256,2048,256
    python tools/kernel_schedule.py search v5e forward splash --tokens 8192 --sizes 1024,1024,512 1024,2048,512
    python tools/kernel_schedule.py table --write docs/benchmarks/kernels.md

Nothing is timed: a cycle is a bundle of the schedule with the waits the compiler counts on, how often a region is
executed follows from the lists of visits that a kernel is given, and waits for memory are not part of it (bytes moved
are shown beside it). XLA operations around the kernels are left out: in a backward pass `di = sum(d_out * out)` is
the same in ours and in splash; the sum of splash's fused dq parts is not, and speaks for splash.

Needs `pip install libtpu` (and no TPU).
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Chip:
    """What is known of a chip's core.

    Attributes:
        topology: A name libtpu knows.
        ghz: Clock: v4 and v5 from bf16 FLOP/s = cores x 4 units x 128 x 128 x 2 x clock; v6e assumed; 7x from v6e's by
            the ratio of bf16 FLOP/s a core, since its matrix units take as many slots.
        hbm: Bytes a second of memory, a core.
        cores: Cores that work as one device.
        vmem_kib: Scoped VMEM for kernels that do not ask for any themselves.
    """

    topology: str
    ghz: float
    hbm: float
    cores: int
    vmem_kib: int


CHIPS = {
    "v4": Chip("v4:2x2x1", 1.05, 1.23e12 / 2, 2, 15 << 10),
    "v5e": Chip("v5e:2x2", 1.5, 8.2e11, 1, 100 << 10),
    "v5p": Chip("v5p:2x2x1", 1.75, 2.77e12 / 2, 2, 56 << 10),
    "v6e": Chip("v6e:2x2", 1.75, 1.64e12, 1, 100 << 10),
    "tpu7x": Chip("tpu7x:2x2x1", 2.2, 7.4e12 / 2, 1, 56 << 10),
}


@dataclass(frozen=True)
class Request:
    """One compilation: names of the case, and its shape."""

    chip: str
    kind: str
    kernel: str
    tokens: int
    sizes: tuple[int, ...]


def measure(request: Request, *, cache: Path | None = None, keep: Path | None = None) -> dict[str, Any]:
    """Compiles in a process of its own, and returns what `_measure_here` found, or `{"error": ...}`.

    Args:
        request: What to compile.
        cache: Directory of earlier results, by the request and the sources it depends on.
        keep: Where the compiler's files stay; None: they are deleted.
    """
    from schedule_parse import DUMPED

    stored = cache / f"{_fingerprint(request)}.json" if cache else None
    if stored and stored.exists():
        return json.loads(stored.read_text())
    chip = CHIPS[request.chip]
    dump = keep or Path(tempfile.mkdtemp(prefix="kernel_schedule_"))
    dump.mkdir(parents=True, exist_ok=True)
    flags = [f"--xla_jf_dump_to={dump}", "--xla_jf_dump_llo_text=true", f"--xla_jf_dump_llo_pass_label_regex={DUMPED}"]
    if not request.kernel.startswith("ours"):
        flags.append(f"--xla_tpu_scoped_vmem_limit_kib={chip.vmem_kib}")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "LIBTPU_INIT_ARGS": " ".join(flags),
    }
    try:
        done = subprocess.run(
            [sys.executable, __file__, "here", json.dumps(asdict(request)), str(dump)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        answer = dump / "answer.json"
        if answer.exists():
            result = json.loads(answer.read_text())
        else:
            result = {"error": _last_error(done.stderr)}
    except subprocess.TimeoutExpired:
        result = {"error": "no schedule after 600 s"}
    finally:
        if keep is None:
            shutil.rmtree(dump, ignore_errors=True)
    if stored:
        stored.parent.mkdir(parents=True, exist_ok=True)
        stored.write_text(json.dumps(result))
    return result


def _last_error(text: str) -> str:
    """What the last traceback in a process's output ends with."""
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return "\n".join(lines[starts[-1] if starts else -1 :])[:4000]


def _fingerprint(request: Request) -> str:
    """Names a result by the request and by every source that it may depend on."""
    digest = hashlib.sha256(json.dumps(asdict(request)).encode())
    sources = sorted(Path(__file__).parent.glob("schedule_*.py"))
    if request.kernel.startswith("ours"):
        sources += sorted((ROOT / "qwq_jax/kernels/attention").glob("*.py"))
    for source in sources:
        if source.name not in ("schedule_report.py", "schedule_table.py"):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _measure_here(request: Request, dump: Path) -> None:
    """Compiles in this process, whose environment says where the compiler writes, and leaves `answer.json` there."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding
    from schedule_cases import CASES, Shape
    from schedule_paged import PAGED
    from schedule_tokamax import TOKAMAX

    chip = CHIPS[request.chip]
    parts = chip.cores if request.kernel.startswith("ours") else 1
    cases = CASES | PAGED | TOKAMAX
    if (request.kind, request.kernel) not in cases:
        raise ValueError(f"no {request.kind} {request.kernel}; there are {', '.join(map(' '.join, cases))}")
    case = cases[request.kind, request.kernel](Shape(request.tokens, request.sizes, parts, request.chip))
    topology: Any = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology)
    place = SingleDeviceSharding(topology.devices[0])
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), case.arguments)
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("one",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # some kernels ask what chip they are for
        lowered = jax.jit(case.function).lower(*arguments)
    compiled = lowered.compile()
    kernels = [_read_kernel(dump, kernel) for kernel in case.kernels]
    memory = compiled.memory_analysis()
    answer = {
        "kernels": kernels,
        "cycles": sum(k["cycles"] for k in kernels),
        "issued": sum(k["issued"] for k in kernels),
        "moved": sum(sum(k["moved"].values()) for k in kernels),
        "ideal": case.ideal,
        "temporary": memory.temp_size_in_bytes if memory else 0,
    }
    (dump / "answer.json").write_text(json.dumps(answer))


def _read_kernel(dump: Path, kernel: Any) -> dict[str, Any]:
    """Costs of one kernel from its dump.

    Raises:
        ValueError: The dump does not have it exactly once, or its regions are not those expected.
    """
    from schedule_parse import BUNDLES, UTILIZATION, read_schedule

    found = [path for path in dump.glob(f"*-{kernel.name}.*-{BUNDLES}.txt") if "schedule-analysis" not in path.name]
    rows = list(dump.glob(f"*-{kernel.name}.*-{UTILIZATION}.txt"))
    if len(found) != 1 or len(rows) != 1:
        raise ValueError(f"{kernel.name} was dumped {len(found)} times")
    schedule = read_schedule(found[0], rows[0])
    costs = schedule.costs(kernel.parts)
    regions = [
        asdict(cost) | {"cycles": cost.bundles * cost.runs, "load": cost.load(schedule.capacity)} for cost in costs
    ]
    return {
        "name": kernel.name,
        "cycles": sum(cost.bundles * cost.runs for cost in costs),
        "issued": sum(cost.issued * cost.runs for cost in costs),
        "moved": kernel.moved,
        "regions": regions,
    }


def main() -> None:
    """Runs one of the commands of the docstring."""
    from schedule_report import run_command

    if sys.argv[1:2] == ["here"]:
        fields = json.loads(sys.argv[2])
        _measure_here(Request(**fields | {"sizes": tuple(fields["sizes"])}), Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="directory of earlier results")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("show", "search"):
        command = commands.add_parser(name)
        command.add_argument("chip", choices=CHIPS)
        command.add_argument("kind")
        command.add_argument("kernel")
        command.add_argument("--tokens", type=int, default=8192)
        command.add_argument("--sizes", nargs="+", required=True, help="tile sizes, 256,2048,256; several to search")
        command.add_argument("--keep", type=Path, help="where the compiler's files stay")
    table = commands.add_parser("table")
    table.add_argument("--write", type=Path, help="a markdown file; a plot goes beside it")
    run_command(parser.parse_args())


if __name__ == "__main__":
    main()
