"""The design as assertions: what may import what, and how long things may be. See docs/architecture.md."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qwq_jax"

# Rooms of the package by layer; imports point to lower layers only.
LAYERS = {
    "config": 0,
    "runtime": 1,
    "interrupt": 1,
    "health": 1,
    "processes": 1,
    "chat": 1,
    "sharding": 1,
    "kernels": 1,
    "logprobs": 1,
    "sampling": 2,
    "grammar": 2,
    "model": 2,
    "checkpoint": 3,
    "engine": 3,
    "plan": 4,
    "train": 4,
    "sft": 5,
    "rl": 5,
    "serve": 5,
    "jobs": 6,
    "embedded": 0,
    "__main__": 7,
}
# Neighbours of one layer that may see each other, one way.
NEIGHBOURS = {("runtime", "interrupt"), ("processes", "interrupt"), ("processes", "health"), ("engine", "checkpoint")}

# A third-party package, and the only files of ours that may import it.
WALLS = {
    "jax.experimental.pallas": ("kernels/",),
    "orbax": ("checkpoint/store.py", "checkpoint/train_store.py"),
    "safetensors": (),
    "optax": ("train/", "rl/"),
    "transformers": (),
    "torch": (),
    "llguidance": ("grammar.py",),
    "typer": ("__main__.py",),
    "prometheus_client": ("serve/metrics.py",),
}
# These decide and describe, and run where no JAX is installed or before it is set up.
NO_JAX = (
    "__init__.py",
    "__main__.py",
    "config/",
    "chat.py",
    "grammar.py",
    "interrupt.py",
    "engine/request.py",
    "engine/pages.py",
    "engine/scheduler.py",
    "engine/step.py",
    "engine/arrays.py",
    "engine/thoughts.py",
    "engine/lookup.py",
    "plan/",
    "rl/rewards/",
)
JAX = ("jax", "jaxlib", "flax", "optax", "orbax")

# Imports inside a function: of packages that may be absent, at the edge that needs them.
OPTIONAL = {
    "rl/rewards/": {"math_verify", "reasoning_gym"},
    "rl/tasks.py": {"reasoning_gym"},
    "checkpoint/gguf.py": {"gguf"},
}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "base", "manager", "core", "tools"}

FILE_LINES, FUNCTION_LINES, KERNEL_LINES = 500, 60, 150


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module_name: str) -> str:
    """The first part below qwq_jax, such as "engine"; empty for qwq_jax itself."""
    return (module_name.split(".") + [""])[1]


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(node: ast.AST) -> Iterator[str]:
    """The modules that one statement imports; `from a import b` gives "a.b", of which "a" is a prefix."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"relative import in line {node.lineno}"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(path: Path) -> set[str]:
    return {target for node in ast.walk(tree(path)) for target in imported(node)}


def is_within(target: str, package: str) -> bool:
    return target == package or target.startswith(f"{package}.")


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def each_source(test):
    return pytest.mark.parametrize("path", sources(), ids=name)(test)


@each_source
def test_imports_point_down(path):
    ours = room(module(path))
    if not ours:
        assert not imports(path), "qwq_jax/__init__.py imports nothing"
        return
    for target in imports(path):
        theirs = room(target)
        if not is_within(target, "qwq_jax") or theirs == ours:
            continue
        if target == "qwq_jax.__version__":
            continue
        assert theirs in LAYERS, f"{theirs} has no layer"
        allowed = LAYERS[theirs] < LAYERS[ours] or (ours, theirs) in NEIGHBOURS
        assert allowed, f"{ours} (layer {LAYERS[ours]}) imports {theirs} (layer {LAYERS[theirs]})"


def test_every_room_has_a_layer_and_a_door():
    for path in PACKAGE.iterdir():
        if path.is_dir() and list(path.rglob("*.py")):
            assert path.name in LAYERS
    for path in sources():
        assert (path.parent / "__init__.py").exists(), f"{name(path.parent)} has no __init__.py"


@each_source
def test_third_party_packages_stay_behind_their_walls(path):
    targets = imports(path)
    for package, allowed in WALLS.items():
        if any(is_within(target, package) for target in targets):
            late = package in optional_imports(path)
            assert late or name(path).startswith(allowed or ("-",)), f"{package} belongs in {allowed}"


@each_source
def test_host_code_does_not_import_jax(path):
    if name(path).startswith(NO_JAX):
        for target in imports(path):
            assert target.split(".")[0] not in JAX


def test_host_code_brings_no_jax_in():
    """Not by what it imports, nor by the packages that it lies in."""
    modules = [module(path) for path in sources() if name(path).startswith(NO_JAX)]
    code = f"import sys, {', '.join(modules)}; sys.exit(' '.join(m for m in {JAX!r} if m in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@each_source
def test_no_cycles_between_modules(path):
    """A module that imports another is never imported by it, however far around."""
    by_module = {module(other): other for other in sources()}

    def neighbours(of: Path) -> set[str]:
        found = set()
        for target in imports(of):
            parts = target.split(".")
            # `from package import name` imports a module, or a name of the package's own.
            for candidate in (target, ".".join(parts[:-1])):
                if candidate in by_module:
                    found.add(candidate)
                    break
        return found

    seen: set[str] = set()
    waiting = list(neighbours(path))
    while waiting:
        current = waiting.pop()
        assert current != module(path), "imports itself, directly or around"
        if current not in seen:
            seen.add(current)
            waiting.extend(neighbours(by_module[current]))


def optional_imports(path: Path) -> set[str]:
    return {package for prefix, packages in OPTIONAL.items() if name(path).startswith(prefix) for package in packages}


@each_source
def test_no_import_inside_a_function(path):
    for function in functions(path):
        for node in ast.walk(function):
            for target in imported(node):
                # --help and a mistyped option must not wait for JAX: see the docstring of __main__.
                if name(path) == "__main__.py" and (
                    is_within(target, "qwq_jax.jobs") or is_within(target, "qwq_jax.runtime")
                ):
                    continue
                assert target.split(".")[0] in optional_imports(path), f"{function.name} imports {target}"


@each_source
def test_files_and_functions_are_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= FILE_LINES, f"{lines} lines"
    limit = KERNEL_LINES if name(path).startswith("kernels/") else FUNCTION_LINES
    for function in functions(path):
        assert function.end_lineno is not None
        length = function.end_lineno - function.lineno + 1
        assert length <= limit, f"{function.name} has {length} lines"


@each_source
def test_names_say_something(path):
    assert not FORBIDDEN_NAMES & set(Path(name(path)).with_suffix("").parts)


@each_source
def test_errors_are_caught_by_name(path):
    """Except to clean up or to explain: what ends in a bare `raise`, or in `raise ... from`, lets the error pass."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            last = node.body[-1]
            if isinstance(last, ast.Raise) and (last.exc is None or isinstance(last.cause, ast.Name)):
                continue
            assert node.type is not None, f"bare except in line {node.lineno}"
            caught = {item.id for item in ast.walk(node.type) if isinstance(item, ast.Name)}
            assert not caught & {"Exception", "BaseException"}, f"line {node.lineno} catches {caught}"


@each_source
def test_only_runtime_reads_the_environment(path):
    if name(path) == "runtime.py":
        return
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr not in ("environ", "getenv", "putenv"), f"line {node.lineno}"


@each_source
def test_nothing_global_changes(path):
    for node in ast.walk(tree(path)):
        assert not isinstance(node, ast.Global), f"line {node.lineno}"


def test_the_engine_compiles_in_one_place():
    """One file of the engine decides what is compiled; the others only call it."""
    users = set()
    for path in (PACKAGE / "engine").glob("*.py"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if (node.value.id, node.attr) in (("jax", "jit"), ("nnx", "jit")):
                    users.add(path.name)
    assert len(users) == 1, users


GCP = ROOT / "gcp"
# What the launcher's modules may see of each other, by layer; `worker` runs on the VMs, by itself.
GCP_LAYERS = {
    "topology": 0,
    "names": 0,
    "objects": 0,
    "worker": 0,
    "job": 1,
    "cloud": 2,
    "record": 2,
    "client": 3,
    "gcloud": 3,
    "machine": 3,
    "staging": 3,
    "logs": 3,
    "price": 3,
    "manifest": 3,
    "xpk": 3,
    "kueue": 4,
    "arguments": 2,
    "submission": 4,
    "driver": 4,
    "rehearsal": 4,
    "tpu": 5,
}
WORKER_ORDER = ("assignment", "google", "rounds", "mirror", "install", "guard", "agent", "__main__")


def gcp_sources() -> list[Path]:
    return sorted(GCP.rglob("*.py"))


def each_gcp_source(test):
    return pytest.mark.parametrize("path", gcp_sources(), ids=lambda path: path.relative_to(GCP).as_posix())(test)


def gcp_modules(path: Path) -> set[str]:
    """Modules of ours that a file imports, as dotted names below gcp."""
    ours = {other.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for other in gcp_sources()}
    return {target.removeprefix("gcp.") for target in imports(path) if target in ours}


@each_gcp_source
def test_gcp_imports_point_down(path):
    parts = path.relative_to(GCP).with_suffix("").parts
    if parts[0] == "__init__":
        assert not imports(path)
        return
    for target in gcp_modules(path):
        theirs = target.split(".")
        if parts[0] == theirs[0] == "worker":
            assert WORKER_ORDER.index(theirs[1]) < WORKER_ORDER.index(parts[1]), f"{parts} imports {theirs}"
            continue
        neighbours = {("record", "cloud"), ("driver", "gcloud"), ("cloud", "job")}
        down = GCP_LAYERS[theirs[0]] < GCP_LAYERS[parts[0]]
        assert down or (parts[0], theirs[0]) in neighbours, f"{parts} imports {theirs}"


@each_gcp_source
def test_gcp_sees_only_configurations_of_the_package_and_its_worker_nothing(path):
    worker = path.is_relative_to(GCP / "worker")
    for target in imports(path):
        top = target.split(".")[0]
        assert top not in JAX
        if top == "qwq_jax":
            # The command line parses words without JAX, and says what a job's verb would refuse.
            parser = (path.name, target) == ("submission.py", "qwq_jax.__main__.check_words")
            assert parser or (not worker and is_within(target, "qwq_jax.config")), target
        if worker:
            assert top in sys.stdlib_module_names or is_within(target, "gcp.worker"), f"{target} is on no fresh VM"


def test_gcp_brings_no_jax_in():
    listed = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in gcp_sources()]
    code = f"import sys, {', '.join(listed)}; sys.exit(' '.join(m for m in {JAX!r} if m in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@each_gcp_source
def test_gcp_keeps_the_same_measures(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE_LINES
    assert not FORBIDDEN_NAMES & {part.removesuffix(".py") for part in path.relative_to(GCP).parts}
    reads_environment = path.relative_to(GCP).as_posix() in ("tpu.py", "worker/__main__.py")
    for node in ast.walk(tree(path)):
        assert not isinstance(node, ast.Global)
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except in line {node.lineno}"
            caught = {item.id for item in ast.walk(node.type) if isinstance(item, ast.Name)}
            assert not caught & {"Exception", "BaseException"}, f"line {node.lineno} catches {caught}"
    for function in functions(path):
        assert function.end_lineno is not None
        assert function.end_lineno - function.lineno + 1 <= FUNCTION_LINES, function.name
        parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        named = [each for each in parameters if each.arg not in ("self", "cls")]
        command = path.name == "tpu.py" and function.decorator_list
        assert command or len(named) <= 8, f"{function.name} has {len(named)} parameters"
        late = [target for node in ast.walk(function) for target in imported(node)]
        assert not late, f"{function.name} imports {late}"
    if not reads_environment:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                assert node.attr not in ("environ", "getenv", "putenv"), f"line {node.lineno}"
