"""What a recipe of reinforcement learning takes of a chip's memory, by the TPU compiler, on a machine without a TPU.

    python -m tools.rl_memory                                      all recipes, into docs/benchmarks/rl_memory.md
    python -m tools.rl_memory qwq_32b_stage1                       one of them, into the same file
    python -m tools.rl_memory qwq_32b_stage1 --set rollout.max_tokens=32768      printed only

A page of `qwq-jax plan` for the recipes of ``configs/rl``, each for its own chips. While the policy learns, the engine
has given up its weights and its cache.
"""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from qwq_jax import runtime
from qwq_jax.config.plan import Calibration, Prices
from qwq_jax.config.rl import RlConfig
from qwq_jax.jobs.plan import PlanOptions, make_plans
from qwq_jax.jobs.plan_job import read_job
from qwq_jax.plan.chips import GB
from qwq_jax.plan.memory import Memory

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "docs" / "benchmarks" / "rl_memory.md"


@dataclass(frozen=True)
class Target:
    """What a recipe's file does not say, because a checkpoint or the machine does.

    Attributes:
        topology: The chips, as libtpu names them.
        model: Architecture of the policy, a file of ``configs/models`` without its ending.
        reward_model: The same of its reward model.
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


def recipe_memory(name: str, overrides: Sequence[str] = ()) -> tuple[RlConfig, Memory]:
    """Reads a recipe and compiles it for its own chips.

    Raises:
        ValueError: It does not fit them.
    """
    target = RECIPES[name]
    preset = lambda model: ROOT / "configs" / "models" / f"{model}.toml"  # noqa: E731
    job = read_job(
        ROOT / "configs" / "rl" / f"{name}.toml",
        overrides,
        model=preset(target.model),
        reward_model=preset(target.reward_model) if target.reward_model else None,
        lengths=(None, None),
    )
    options = PlanOptions(
        (target.topology,),
        Prices(),
        Calibration(),
        output=None,
        store=runtime.plan_directory(),
        workers=os.cpu_count() or 1,
        machine_code=True,
    )
    (plan,) = make_plans(job, options)
    if plan.memory is None:
        raise ValueError("; ".join(plan.problems))
    return job.config, plan.memory


def summary(memory: Memory) -> str:
    """The line that a recipe opens with."""
    phases = [f"{name} {size / GB:.1f}" for name, size in memory.peaks.items()]
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
        *(f"| {key} | {size / GB:.2f} | {size / memory.usable:.1%} |" for key, size in memory.peaks.items()),
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
