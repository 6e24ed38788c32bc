"""One process of `plan`: reads requests from its input, a line each, asks the TPU compiler, and writes JSON lines.

Started by `qwq_jax.plan.compiler` with a directory for what libtpu writes. A line is ``{"answer": ...}``, or
``{"refused": "why"}`` in one sentence if the job cannot be compiled so.

Each request is answered by a copy of this process, which has imported all and has loaded nothing. A program's memory
and text are decided when memory has been assigned, and most of the time goes into the machine code after that. libtpu
cannot be told to stop there: a copy that has no use for machine code ends itself.
"""

import gc
import json
import os
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, TextIO

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from qwq_jax import runtime
from qwq_jax.config.inference import InferenceConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.rl import RlConfig
from qwq_jax.config.train import SftConfig
from qwq_jax.jobs.plan_programs import Work, inference_work, rl_work, sft_work
from qwq_jax.plan.chips import Topology, parse_topology
from qwq_jax.plan.cost import ProgramCost
from qwq_jax.plan.hlo import collectives, decode_round, matrix_flops, moved_bytes, parse
from qwq_jax.plan.report import assigned_bytes, is_whole, too_large
from qwq_jax.rl.rewards.inside.supervisor import die_with_parent

# What libtpu writes of a program when its memory is assigned, in this order.
_ASSIGNMENT, _TEXT = "*after_optimizations-buffer-assignment.txt", "*after_optimizations_after_buffer_assignment.txt"
_POLL = 0.1  # seconds
# Sparse cores' code is made before the rest is decided, and decides nothing of it.
_LEAST_CODE = "--xla_sc_backend_opt_level=O2 --xla_sc_disable_mlo_loop_unroll=true"


def main() -> int:
    """Answers requests until there are no more, or one of them fails: then it ends as that one did."""
    # Compilers and libraries print too: what they do goes where complaints go.
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    runtime.compile_for_tpus()
    gc.freeze()  # all that was imported stays, and need not be looked through again and again
    folder, parent = Path(sys.argv[1]) / "program", os.getpid()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _answer_and_end(line, folder, lines, parent)
        status = _wait(child, lines)
        if os.WIFSIGNALED(status):
            os.kill(os.getpid(), os.WTERMSIG(status))
        if status:
            return os.waitstatus_to_exitcode(status)
    return 0


def _wait(child: int, lines: TextIO) -> int:
    """The status with which a copy ended, or was ended because nobody is there to read its answer."""
    events = select.poll()
    ended = os.pidfd_open(child)
    events.register(ended, select.POLLIN)
    events.register(lines, 0)  # an error is told without being asked for
    if ended not in dict(events.poll()):
        os.kill(child, signal.SIGKILL)
    os.close(ended)
    return os.waitpid(child, 0)[1]


def _answer_and_end(line: str, folder: Path, lines: TextIO, parent: int) -> NoReturn:
    """Writes the answer of a request; then the process ends at once, whatever the compiler is doing."""
    try:
        die_with_parent(parent)
        gc.disable()  # the copy ends before that would pay
        request = json.loads(line)
        if not request["job"].get("machine_code", False):
            runtime.add_tpu_flags(_LEAST_CODE)
        try:
            found = {"answer": answer_request(request["job"], request["task"], folder)}
        except ValueError as error:
            found = {"refused": (str(error).splitlines() or [repr(error)])[-1]}
        print(json.dumps(found), file=lines, flush=True)
        os._exit(0)
    finally:  # something failed
        traceback.print_exc()
        os._exit(1)


def answer_request(job: Mapping[str, Any], task: str, folder: Path) -> dict[str, Any]:
    """What a task asks of a job: ``device``, ``arrays``, or a program by name."""
    devices = described_devices(parse_topology(job["topology"]))
    if task == "device":
        return {"usable": usable_memory(devices)}
    work = describe_work(job, devices)
    if task == "arrays":
        return measure_arrays(work, devices)
    live, machine_code = job.get("live_tokens", 0), job.get("machine_code", False)
    return measure_program(work, task, folder, live=live, machine_code=machine_code)


def described_devices(topology: Topology) -> Sequence[Any]:
    """The devices of a slice, or of several, as JAX sees them there; ValueError if there are none such."""
    words: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.chip.configuration is not None:
        words["chip_config_name"] = topology.chip.configuration
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.slice_name, **words).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology {topology.name}: the compiler knows no such slice ({error})") from None


def describe_work(job: Mapping[str, Any], devices: Sequence[Any]) -> Work:
    """The job on devices that need not exist."""
    model = ModelConfig.model_validate_json(json.dumps(job["model"]))
    text = json.dumps(job["config"])
    match job["kind"]:
        case "inference":
            return inference_work(InferenceConfig.model_validate_json(text), model, devices)
        case "sft":
            return sft_work(SftConfig.model_validate_json(text), model, devices)
        case "rl":
            scored = job.get("reward_model")
            reward_model = ModelConfig.model_validate_json(json.dumps(scored)) if scored else None
            return rl_work(RlConfig.model_validate_json(text), model, devices, reward_model)
        case kind:
            raise AssertionError(kind)


def measure_arrays(work: Work, devices: Sequence[Any]) -> dict[str, Any]:
    """Bytes of a job's arrays on one device, tiling included, and what the device has."""
    engine = {name: held_bytes(tree) for name, tree in work.engine.items()}
    return {
        "usable": usable_memory(devices),
        "held": {name: held_bytes(tree) for name, tree in work.held.items()},
        "engine": engine,
        "page": engine["key-value cache"] // work.pages if work.pages else 0,
        "gradients": held_bytes(work.gradients) if work.gradients is not None else 0,
        "counts": dict(work.counts or {}),
    }


def measure_program(work: Work, name: str, folder: Path, *, live: int, machine_code: bool) -> dict[str, Any]:
    """Compiles a program and reads what it does.

    Args:
        work: The job.
        name: Of the program.
        folder: Where the compiler writes what it has decided.
        live: Tokens in the pages that a step of the engine reads, of one replica.
        machine_code: Whether the program is compiled to its end. Otherwise the compiler is still busy with that, and
            the caller ends the process.

    Returns:
        The fields of a `ProgramCost`; or, if it does not fit a device, ``{"used": bytes, "usable": bytes}``.
    """
    lowered = work.programs[name]()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        compiled = _compiled(lowered, folder, machine_code=machine_code)
    except jax.errors.JaxRuntimeError as error:
        used, usable = too_large(error)
        return {"used": used, "usable": usable}
    if compiled is None:
        (temporaries, result), code = assigned_bytes(_written(folder, _ASSIGNMENT)), None
    else:
        found = compiled.memory_analysis()
        temporaries, result = found.temp_size_in_bytes, found.output_size_in_bytes - found.alias_size_in_bytes
        code = found.generated_code_size_in_bytes
    module = parse(_written(folder, _TEXT))
    # A window of decoding is a loop, of which one round is a token of each sequence.
    start = decode_round(module) if name == "decode" else "ENTRY"
    layer = _live_bytes(work, live) if name in ("decode", "prompts") else 0
    return ProgramCost(
        temporaries=temporaries,
        result=result,
        code=code,
        flops=matrix_flops(module, start),
        moved=moved_bytes(module, start, layer),
        collectives=tuple(collectives(module, start)),
    ).to_json()


def _compiled(lowered: Any, folder: Path, *, machine_code: bool) -> Any:
    """The compiled program; None without machine code: what was decided is in the folder."""
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
    program = ThreadPoolExecutor(1).submit(lowered.compile, compiler_options=options)
    if machine_code:
        return program.result()
    while not is_whole(next(folder.glob(_TEXT), None)):
        if program.done():
            program.result()  # tells what it was that failed
            break
        time.sleep(_POLL)  # the compiler has threads of its own
    return None


def _written(folder: Path, pattern: str) -> str:
    found = next(folder.glob(pattern), None)
    if found is None:
        raise ValueError(f"this version of libtpu writes no {pattern}, from which a plan is read; 0.0.52 does")
    return found.read_text(encoding="utf-8")


def _live_bytes(work: Work, live: int) -> int:
    """Of one layer's pages that hold `live` tokens, on one device."""
    spec = work.cache
    assert spec is not None
    devices = jax.tree.leaves(work.engine["key-value cache"])[0].sharding.mesh.devices.size
    token = spec.nbytes / (spec.num_layers * work.pages * spec.shape[4] * devices)
    return int(token * live)


def held_bytes(tree: Any) -> int:
    """What the arrays of a tree take on one device, tiling included: the arguments of a program that reads none.

    Where these are more than the device has, it is what the compiler says that they are, to a hundredth of a GiB.
    """
    try:
        nothing = jax.jit(lambda tree: jnp.zeros(()), keep_unused=True).lower(tree).compile()
    except jax.errors.JaxRuntimeError as error:
        return too_large(error)[0]
    found = nothing.memory_analysis()
    assert found is not None, "libtpu tells what a program needs"
    return found.argument_size_in_bytes


def usable_memory(devices: Sequence[Any]) -> int:
    """Bytes that the compiler lets a program have on such a device: it says so when it refuses one that wants more."""
    place = jax.sharding.SingleDeviceSharding(devices[0])
    huge = jax.ShapeDtypeStruct((1 << 40,), jnp.int8, sharding=place)
    try:
        jax.jit(lambda x: x + 1).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        return too_large(error)[1]
    raise AssertionError("a terabyte fits")


if __name__ == "__main__":
    sys.exit(main())
