"""What a recipe of reinforcement learning takes of a chip's memory, by the TPU compiler, on a machine without a TPU.

    python -m tools.rl_memory                                      all recipes, into docs/benchmarks/rl_memory.md
    python -m tools.rl_memory qwq_32b_stage1                       one of them, into the same file
    python -m tools.rl_memory qwq_32b_stage1 --set rollout.max_tokens=32768      printed only

Each program of the run is compiled for the described chips with arrays that do not exist, by the functions that the run
itself uses: the gradient of a micro-batch, the optimizer's step, log-probabilities, the engine's weights from the
trained ones, a window of decoding, a step with prompts, and a reward model's scores. What lies on a chip at one time is
then added up for each phase. While the policy learns, the engine has given up its weights and its cache.
"""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Read by libtpu when it is loaded: there is no TPU to ask, and others may compile at the same time.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from qwq_jax.config.load import load_toml
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.rl import RlConfig
from qwq_jax.engine.runner import engine_shape, lower_step, usual_programs
from qwq_jax.engine.step import Program
from qwq_jax.jobs.rl_start import describe_state, engine_layout, engine_settings, make_functions
from qwq_jax.model.cache import abstract_layer, cache_spec
from qwq_jax.model.spec import model_spec
from qwq_jax.rl.learner import Rows, Total, Updater, make_scorer
from qwq_jax.rl.optimizers import make_optimizers
from qwq_jax.rl.policy import Policy
from qwq_jax.rl.reward_model import make_values, with_scalar_head
from qwq_jax.sharding import Layout, make_mesh, train_layout
from qwq_jax.train.batch import TrainBatch
from qwq_jax.train.state import Params, TrainState
from qwq_jax.train.weights import abstract_params

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "docs" / "benchmarks" / "rl_memory.md"
GB = 1e9


@dataclass(frozen=True)
class Target:
    """What a recipe's file does not say, because a checkpoint or the machine does.

    Attributes:
        topology: The chips, as libtpu names them.
        model: Architecture of the policy, a file of ``configs/models`` without its ending.
        reward_model: The same of each reward model.
    """

    topology: str
    model: str
    reward_model: str | None = None


RECIPES: Mapping[str, Target] = {
    "qwq_32b_stage1": Target("v5p:4x4x4", "qwq-32b"),
    "qwq_32b_stage2": Target("v5p:4x4x4", "qwq-32b", "qwen2.5-14b"),
    "qwq_32b_stage1_v6e": Target("v6e:8x8", "qwq-32b"),
    "qwq_32b_stage2_v6e": Target("v6e:8x8", "qwq-32b", "qwen2.5-14b"),
    "r1_distill_1p5b_lora_v5e8": Target("v5e:2x4", "deepseek-r1-distill-qwen-1.5b"),
}


@dataclass(frozen=True)
class Needs:
    """Bytes that one compiled program takes on one chip.

    Attributes:
        temporaries: While it runs, beside its arguments and results.
        result: Of results that take no argument's place.
        code: Of the program itself, which stays there.
    """

    temporaries: int
    result: int
    code: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one chip.

    Attributes:
        usable: What the compiler lets programs have.
        held: At all times: what is trained with its moments, weights that stay, reward models, programs.
        engine: While it draws: weights, and the key-value cache.
        gradients: The sums over micro-batches.
        programs: By name.
    """

    usable: int
    held: Mapping[str, int]
    engine: Mapping[str, int]
    gradients: int
    programs: Mapping[str, Needs]

    @property
    def phases(self) -> dict[str, int]:
        """The most that is taken in each phase of a step."""
        held, engine = sum(self.held.values()), sum(self.engine.values())
        during = {
            "rollout": (held + engine, ("decode", "prompts")),
            "reward": (held + engine, ("reward model",)),
            "log-probabilities": (held, ("log-probabilities", "reference")),
            "gradient": (held + self.gradients, ("gradient",)),
            "update": (held + self.gradients, ("update",)),
            "sync": (held, ("sync",)),  # its result is the engine's weights
        }
        taken = {name: needs.temporaries + needs.result for name, needs in self.programs.items()}
        return {
            phase: there + max(taken[name] for name in names if name in taken)
            for phase, (there, names) in during.items()
            if any(name in taken for name in names)
        }

    @property
    def peak(self) -> int:
        """The most that is taken at any time."""
        return max(self.phases.values())


def measure(config: RlConfig, model: ModelConfig, topology: str, reward_model: ModelConfig | None = None) -> Memory:
    """Compiles all programs of a run; each takes seconds to minutes.

    Raises:
        ValueError: A program does not fit the chip by itself, or the recipe has what is not looked at here.
    """
    if config.critic_or_default is not None:
        raise ValueError("recipes with a critic are not measured here")
    if config.engine.num_pages is None:
        raise ValueError("engine.num_pages: the recipe must say how many, as there is no memory here to ask")
    config = config.model_copy(update={"compute_dtype": config.compute_dtype or "bfloat16"})
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    layout, decode = train_layout(make_mesh(config.mesh, devices)), engine_layout(config, devices)
    usable = usable_memory(devices)
    optimizers = make_optimizers(config)
    target = describe_state(config, model, layout, optimizers)
    policy = make_functions(config, model, (layout, decode), optimizers, target=target)
    fixed = None
    if config.lora is not None or config.objective.uses_reference:
        fixed = abstract_params(model, dtype=config.compute_dtype, layout=layout)
    lowered = _of_learner(config, policy, target.policy, fixed) | _of_engine(config, model, decode)  # pyright: ignore[reportArgumentType]
    held: dict[str, Any] = {"trained weights and moments": target.policy}
    if fixed is not None:
        held["frozen weights" if config.lora else "reference"] = fixed
    if reward_model is not None:
        scalar = with_scalar_head(reward_model)
        params = abstract_params(scalar, dtype=config.compute_dtype, layout=layout)
        values = make_values(scalar, layout, compute_dtype=config.compute_dtype)  # pyright: ignore[reportArgumentType]
        lowered["reward model"] = make_scorer(values, policy.rows).program.lower(params, _batch(policy.rows, ()))
        held["reward model"] = params
    programs = {name: _needs(name, each) for name, each in lowered.items()}
    shape = engine_shape(model, decode, engine_settings(config))
    counts = {"prompts": 0, "decode": 0}
    for program in usual_programs(shape):
        counts["prompts" if program.prefill_tokens else "decode"] += 1
    code = sum(needs.code * counts.get(name, 1) for name, needs in programs.items())
    return Memory(
        usable=usable,
        held={name: _bytes(tree) for name, tree in held.items()} | {"programs": code},
        engine={name: _bytes(tree) for name, tree in _engine_arrays(config, model, decode).items()},
        gradients=_bytes(_totals(policy.updater, target.policy, _trained_batch(config, policy.rows), fixed).gradients),  # pyright: ignore[reportArgumentType]
        programs=programs,
    )


def _of_learner(config: RlConfig, policy: Policy, state: TrainState, fixed: Params | None) -> dict[str, Any]:
    """The programs of an update, lowered."""
    frozen = fixed if config.lora is not None else None
    updater: Any = policy.updater
    batch, plain = _trained_batch(config, policy.rows), _batch(policy.rows, ())
    total = _totals(updater, state, batch, frozen)
    lowered = {
        "gradient": updater.add.lower(total, state.params, batch, frozen),
        "update": updater.apply.lower(state, total),
        "sync": policy.sync.lower(state.params, frozen),
    }
    if config.needs_old_logprobs:
        lowered["log-probabilities"] = policy.score.program.lower({**(frozen or {}), **state.params}, plain)
    if config.objective.uses_reference:
        lowered["reference"] = policy.score_reference.program.lower(fixed, plain)
    return lowered


def _of_engine(config: RlConfig, model: ModelConfig, layout: Layout) -> dict[str, Any]:
    """The largest programs of the engine, lowered."""
    settings = engine_settings(config)
    programs = {
        "decode": Program(settings.max_sequences, 0, 0),
        "prompts": Program(settings.max_sequences, settings.prefill_chunk, 0),
    }
    return {name: lower_step(model, layout, settings, program) for name, program in programs.items()}


def _engine_arrays(config: RlConfig, model: ModelConfig, layout: Layout) -> dict[str, Any]:
    settings = engine_settings(config)
    assert settings.num_pages is not None
    spec = cache_spec(
        model,
        layout,
        replicas=layout.size("replica"),
        pages=settings.num_pages,
        page_size=settings.page_size,
        dtype=settings.cache_dtype or settings.compute_dtype,
    )
    weights = {
        path: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=layout.sharding(array.axes, array.shape))
        for path, array in model_spec(model, jnp.dtype(settings.compute_dtype)).items()
    }
    return {"engine's weights": weights, "key-value cache": (abstract_layer(spec, layout),) * model.num_layers}


def _trained_batch(config: RlConfig, rows: Rows) -> TrainBatch:
    """A micro-batch with the columns that the loss reads."""
    columns = ["advantages", "weights", "rollout_logp"]
    columns += ["old_logp"] if config.needs_old_logprobs else []
    columns += ["ref_logp"] if config.objective.uses_reference else []
    return _batch(rows, columns)


def _batch(rows: Rows, columns: Sequence[str]) -> TrainBatch:
    shape = (rows.rows_per_micro_batch, rows.row_length)
    place = rows.layout.sharding(("batch", None), shape)
    describe: Any = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)  # noqa: E731
    return TrainBatch(
        tokens=describe(jnp.int32),
        targets=describe(jnp.int32),
        loss_mask=describe(jnp.bool_),
        positions=describe(jnp.int32),
        segment_ids=describe(jnp.int32),
        columns={name: describe(jnp.float32) for name in columns},
    )


def _totals(updater: Updater, state: TrainState, batch: TrainBatch, frozen: Params | None) -> Total:
    """The sums over micro-batches, described: gradients lie as their parameters do."""
    shapes: Total = jax.eval_shape(updater.zero, state, batch, frozen)
    place = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)  # noqa: E731
    whole = jax.tree.leaves(state.step)[0].sharding
    gradients: Any = {name: place(x, state.params[name].sharding) for name, x in shapes.gradients.items()}
    return Total(gradients, jax.tree.map(lambda x: place(x, whole), shapes.terms))


def _needs(name: str, lowered: Any) -> Needs:
    """Compiles a program."""
    try:
        found = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(f"{name}: the program does not fit a chip: {str(error).splitlines()[0]}") from None
    return Needs(
        temporaries=found.temp_size_in_bytes,
        result=found.output_size_in_bytes - found.alias_size_in_bytes,
        code=found.generated_code_size_in_bytes,
    )


def _bytes(tree: Any) -> int:
    """What the arrays of a tree take on one chip, tiling included: the arguments of a program that reads none."""
    nothing = jax.jit(lambda tree: jnp.zeros(()), keep_unused=True).lower(tree).compile()
    found = nothing.memory_analysis()
    assert found is not None, "libtpu tells what a program needs"
    return found.argument_size_in_bytes


def usable_memory(devices: Sequence[Any]) -> int:
    """Bytes that the compiler lets a program have on such a chip: it says so when it refuses one that wants more."""
    place = jax.sharding.SingleDeviceSharding(devices[0])
    huge = jax.ShapeDtypeStruct((1 << 40,), jnp.int8, sharding=place)
    try:
        jax.jit(lambda x: x + 1).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"available HBM \(([\d.]+)G\)", str(error))
        assert found is not None, str(error)[:500]
        return int(float(found[1]) * 2**30)
    raise AssertionError("a terabyte fits")


def recipe_memory(name: str, overrides: Sequence[str] = ()) -> tuple[RlConfig, Memory]:
    """Reads a recipe and measures it for its own chips."""
    target = RECIPES[name]
    config = load_toml(ROOT / "configs" / "rl" / f"{name}.toml", RlConfig, overrides)
    load = lambda preset: load_toml(ROOT / "configs" / "models" / f"{preset}.toml", ModelConfig)  # noqa: E731
    reward_model = load(target.reward_model) if target.reward_model else None
    return config, measure(config, load(target.model), target.topology, reward_model)


def summary(memory: Memory) -> str:
    """The line that a recipe opens with."""
    phases = [f"{name} {size / GB:.1f}" for name, size in memory.phases.items()]
    return f"{', '.join(phases)} GB of the {memory.usable / GB:.1f} GB of a chip"


def description(name: str, config: RlConfig) -> str:
    """What was measured, as far as it decides the figures: a recipe that changes must be measured again."""
    target, mesh, decode = RECIPES[name], config.mesh, config.decode_mesh or config.mesh
    replicas, tokens = decode.data * decode.fsdp, (config.engine.num_pages or 0) * config.engine.page_size
    reward_model = f", with a reward model like {target.reward_model}" if target.reward_model else ""
    adapters = f", adapters of rank {config.lora.rank}" if config.lora else ""
    row_length = config.row_length or config.rollout.max_prompt_tokens + config.rollout.max_tokens
    return (
        f"`configs/rl/{name}.toml` on `{target.topology}`: {target.model}{adapters}{reward_model}. Training: data "
        f"{mesh.data} x fsdp {mesh.fsdp} x tensor {mesh.tensor}, {config.rows_per_micro_batch} rows of {row_length:,} "
        f"tokens at a time, log-probabilities of {config.logprob_chunk} of them. Engine: data {replicas} x tensor "
        f"{decode.tensor}, each replica with {config.engine.max_sequences} rows, {tokens:,} tokens of cache "
        f"({config.engine.cache_dtype or 'bfloat16'}) and {config.engine.prefill_chunk:,} tokens of prompts a step. "
        f"Completions of up to {config.rollout.max_tokens:,} tokens."
    )


def section(name: str, config: RlConfig, memory: Memory) -> str:
    """One recipe's part of the report, in Markdown."""
    lines = [
        f"## {name}",
        "",
        description(name, config),
        "",
        "| on each chip | GB |",
        "|---|---|",
        *(f"| {key}, always | {size / GB:.2f} |" for key, size in memory.held.items()),
        *(f"| {key}, while it draws | {size / GB:.2f} |" for key, size in memory.engine.items()),
        f"| gradients, while it learns | {memory.gradients / GB:.2f} |",
        *(
            f"| temporaries and results: {key} | {(needs.temporaries + needs.result) / GB:.2f} |"
            for key, needs in memory.programs.items()
        ),
        "",
        f"| phase | GB | of the usable {memory.usable / GB:.2f} GB |",
        "|---|---|---|",
        *(f"| {key} | {size / GB:.2f} | {size / memory.usable:.1%} |" for key, size in memory.phases.items()),
        "",
    ]
    return "\n".join(lines)


HEAD = """# What the recipes of reinforcement learning take of a chip's memory

**Nothing here was run on a chip.** `python -m tools.rl_memory` compiles the programs of a recipe, all layers, for the
described chips, by the functions that the run uses, and adds up what lies on one chip at one time. Sizes of arrays are
those of the compiler, tiling included; what is usable is what it allows a program. GB are 10^9 bytes. Compilers:
{versions}.

While the policy learns, the engine has given up its weights and its cache: a step takes the larger of both, not their
sum. `programs` counts every program that a run compiles, those of the engine as large as its largest.
"""


def write(sections: Mapping[str, str], path: Path = REPORT) -> None:
    """Puts sections into the report, in the order of the recipes; others in it stay."""
    old = re.split(r"^## ", path.read_text(), flags=re.MULTILINE)[1:] if path.exists() else []
    kept = {part.split("\n", 1)[0]: f"## {part.rstrip()}\n" for part in old}
    merged = {name: text for name, text in (kept | dict(sections)).items() if name in RECIPES}
    head = HEAD.format(versions=", ".join(f"{name} {version(name)}" for name in ("jax", "libtpu")))
    path.write_text("\n".join([head, *(merged[name] for name in RECIPES if name in merged)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help=f"of {', '.join(RECIPES)}; all by default")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in qwq-jax rl; prints only")
    arguments = parser.parse_args()
    for name in arguments.recipes or RECIPES:
        if name not in RECIPES:
            parser.error(f"{name} is not one of {', '.join(RECIPES)}")
        config, memory = recipe_memory(name, arguments.set)
        print(section(name, config, memory))
        print(summary(memory), flush=True)
        if not arguments.set:
            write({name: section(name, config, memory)})


if __name__ == "__main__":
    main()
