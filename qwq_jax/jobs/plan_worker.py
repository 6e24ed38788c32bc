"""One process of `plan`: reads requests from its input, a line each, asks the TPU compiler, and writes JSON lines.

Started by `qwq_jax.plan.compiler` with a directory for what libtpu writes. A line is ``{"answer": ...}``, or
``{"refused": "why"}`` in one sentence if the job cannot be compiled so.
"""

import gc
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

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

# What the compiler says of a program that a device cannot hold: the one of what it needs while it runs, the other of
# what it is given.
_USED = re.compile(r"Used ([\d.]+)([KMGT])?i?B? of ([\d.]+)([KMGT])?i?B? hbm")
_EXCEEDS = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)")
_UNITS = {None: 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def main() -> int:
    """Answers requests until there are no more."""
    # Compilers and libraries print too: what they do goes where complaints go.
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    gc.freeze()  # all that was imported stays, and need not be looked through again and again
    folder = Path(sys.argv[1])
    runtime.compile_for_tpus(dump=folder)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            found = {"answer": answer_request(request["job"], request["task"], folder)}
        except ValueError as error:
            found = {"refused": (str(error).splitlines() or [repr(error)])[-1]}
        print(json.dumps(found), file=lines, flush=True)
    return 0


def answer_request(job: Mapping[str, Any], task: str, folder: Path) -> dict[str, Any]:
    """What a task asks of a job: ``device``, ``arrays``, or a program by name."""
    if task == "device":
        return {"usable": usable_memory(described_devices(parse_topology(job["topology"])))}
    job = dict(job)
    live = job.pop("live_tokens", 0)
    devices, work = _described(json.dumps(job, sort_keys=True))
    if task == "arrays":
        return measure_arrays(work, devices)
    return measure_program(work, task, folder, live=live)


@lru_cache(maxsize=1)
def _described(job: str) -> tuple[Sequence[Any], Work]:
    """The devices and the work of a job, kept for its next program."""
    jax.clear_caches()  # of the job before
    asked = json.loads(job)
    devices = described_devices(parse_topology(asked["topology"]))
    return devices, describe_work(asked, devices)


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


def measure_program(work: Work, name: str, folder: Path, *, live: int) -> dict[str, Any]:
    """Compiles a program and reads what it does.

    Args:
        work: The job.
        name: Of the program.
        folder: Where the compiler writes the program's text.
        live: Tokens in the pages that a step of the engine reads, of one replica.

    Returns:
        The fields of a `ProgramCost`; or, if it does not fit a device, ``{"used": bytes, "usable": bytes}``.
    """
    lowered = work.programs[name]()
    for old in folder.glob("*"):
        old.unlink()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used, usable = _too_large(error)
        return {"used": used, "usable": usable}
    found = compiled.memory_analysis()
    module = parse(max(folder.glob("*hlo.txt"), key=lambda path: path.stat().st_size).read_text())
    # A window of decoding is a loop, of which one round is a token of each sequence.
    start = decode_round(module) if name == "decode" else "ENTRY"
    layer = _live_bytes(work, live) if name in ("decode", "prompts") else 0
    return ProgramCost(
        temporaries=found.temp_size_in_bytes,
        result=found.output_size_in_bytes - found.alias_size_in_bytes,
        code=found.generated_code_size_in_bytes,
        flops=matrix_flops(module, start),
        moved=moved_bytes(module, start, layer),
        collectives=tuple(collectives(module, start)),
    ).to_json()


def _live_bytes(work: Work, live: int) -> int:
    """Of one layer's pages that hold `live` tokens, on one device."""
    spec = work.cache
    assert spec is not None
    devices = jax.tree.leaves(work.engine["key-value cache"])[0].sharding.mesh.devices.size
    token = spec.nbytes / (spec.num_layers * work.pages * spec.shape[4] * devices)
    return int(token * live)


def _too_large(error: Exception) -> tuple[int, int]:
    """Bytes that a program wants of a device, and what it may have; anything but a lack of memory is raised again."""
    found = _USED.search(str(error)) or _EXCEEDS.search(str(error))
    if found is None:
        raise error
    used, usable = (int(float(found[i]) * _UNITS[found[i + 1]]) for i in (1, 3))
    return used, usable


def held_bytes(tree: Any) -> int:
    """What the arrays of a tree take on one device, tiling included: the arguments of a program that reads none.

    Where these are more than the device has, it is what the compiler says that they are, to a hundredth of a GiB.
    """
    try:
        nothing = jax.jit(lambda tree: jnp.zeros(()), keep_unused=True).lower(tree).compile()
    except jax.errors.JaxRuntimeError as error:
        return _too_large(error)[0]
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
        return _too_large(error)[1]
    raise AssertionError("a terabyte fits")


if __name__ == "__main__":
    sys.exit(main())
