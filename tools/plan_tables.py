"""Plans of QwQ-32B for slices of every kind of TPU, and beside published figures, into docs/benchmarks/plans.md.

    python -m tools.plan_tables                     all of it; what was compiled before is kept
    python -m tools.plan_tables inference int8      these tables again; the others stay as the page has them

Every figure is of programs that were compiled for the slice (`qwq-jax plan`). Nothing here was run on a chip.
"""

import argparse
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from qwq_jax import runtime
from qwq_jax.config.plan import Calibration, Prices
from qwq_jax.jobs.plan import PlanOptions, make_plans
from qwq_jax.jobs.plan_job import read_job
from qwq_jax.plan.result import TopologyPlan
from qwq_jax.plan.tables import FACTS, fact_text, memory_text, mesh_text

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "docs" / "benchmarks" / "plans.md"


@dataclass(frozen=True)
class Asked:
    """One job on some slices.

    Attributes:
        title: Of its table.
        config: Below ``configs``.
        model: Below ``configs/models``.
        topologies: The slices.
        lengths: Mean prompt and completion; None for half of the longest.
        settings: As ``--set``.
    """

    title: str
    config: str
    model: str
    topologies: tuple[str, ...]
    lengths: tuple[int | None, int | None] = (None, None)
    settings: tuple[str, ...] = ()


SLICES = ("v4:2x2x4", "v5e:4x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1")
TABLES: Mapping[str, Asked] = {
    "inference": Asked(
        "Batch inference in bfloat16",
        "inference/qwq_32b.toml",
        "qwq-32b",
        (*SLICES, "v5e:2x4"),
        (1024, 4096),
    ),
    "int8": Asked(
        "Batch inference with 8-bit weights and cache",
        "inference/qwq_32b_int8.toml",
        "qwq-32b",
        ("v4:2x2x4", "v5e:2x4", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"),
        (1024, 4096),
    ),
    "131k": Asked(
        "Contexts of up to 131,072 tokens",
        "inference/qwq_32b_131k.toml",
        "qwq-32b-yarn",
        SLICES,
        (98_304, 16_384),
    ),
    "rl": Asked(
        "Reinforcement learning of all weights",
        "rl/qwq_32b_stage1.toml",
        "qwq-32b",
        ("v5p:4x4x4", "tpu7x:4x4x4", "v4:4x4x8"),
    ),
    "rl_v6e": Asked(
        "Reinforcement learning of all weights, on v6e", "rl/qwq_32b_stage1_v6e.toml", "qwq-32b", ("v6e:8x8",)
    ),
    "sft": Asked(
        "Training on rows of 131,072 tokens, which several devices share",
        "sft/qwq_32b_sft.toml",
        "qwq-32b-yarn",
        ("v5e:16x16", "2*v5e:16x16", "v6e:8x8", "v5p:4x4x4", "tpu7x:4x4x4"),
        settings=(
            "sequence_length=131072",
            "rows_per_step=64",
            "accumulation=16",
            "mesh.fsdp=4",
            "mesh.context=2",
            "mesh.tensor=8",
        ),
    ),
    "lora_32b": Asked(
        "Reinforcement learning of adapters",
        "rl/qwq_32b_stage1_v6e.toml",
        "qwq-32b",
        ("v4:2x2x4", "v5p:2x2x2", "v6e:4x4", "tpu7x:2x2x1"),
        settings=("lora.rank=32", "optimizer.learning_rate=1e-5"),
    ),
    "lora": Asked(
        "Reinforcement learning of adapters, R1-Distill-1.5B",
        "rl/r1_distill_1p5b_lora_v5e8.toml",
        "deepseek-r1-distill-qwen-1.5b",
        ("v5e:2x4",),
    ),
}


@dataclass(frozen=True)
class Published:
    """A figure that somebody measured, and the nearest job of ours.

    Attributes:
        who: Model, chips and setting, and who says so.
        tokens_per_second_per_chip: What they had.
        asked: Ours.
        fact: Which of our figures is of the same kind.
        why: What differs, where that is known.
    """

    who: str
    tokens_per_second_per_chip: float
    asked: Asked
    fact: str = "tokens_per_second_per_chip"
    why: str = ""


PUBLISHED = (
    Published(
        "Qwen3-32B bfloat16, v6e-4, 64 sequences, 1k in and 1k out (SGLang-JAX)",
        494,
        Asked("", "inference/qwq_32b.toml", "qwq-32b", ("v6e:2x2",), (1024, 1024), ("engine.max_context=2048",)),
        why="a served run with its prompts and its host; Qwen3-32B has 64 query heads and a feed-forward of 25,600",
    ),
    Published(
        "Llama-3.3-70B bfloat16, v6e-8, 128 sequences, 1k in and 1k out (vLLM)",
        443,
        Asked(
            "",
            "inference/qwq_32b.toml",
            "qwen2.5-72b",
            ("v6e:2x4",),
            (1024, 1024),
            ("engine.max_context=2048", "engine.max_sequences=128"),
        ),
        why="a served run with its prompts and its host; the same sizes but for the vocabulary (128,256) and the "
        "feed-forward (28,672)",
    ),
    Published(
        "Llama-3.1-70B int8, v5e-16, 128 sequences (jax-llm-examples)",
        402,
        Asked(
            "",
            "inference/qwq_32b_int8.toml",
            "qwen2.5-72b",
            ("v5e:4x4",),
            (1024, 1024),
            ("engine.max_context=2048", "mesh.data=2", "engine.cache_dtype=bfloat16", "engine.page_size=128"),
        ),
        "decode_tokens_per_second_per_chip",
        "decoding alone; theirs splits a layer over 16 chips, ours over 8 at most, where each reads twice the weights",
    ),
)

HEAD = """# Plans

**Nothing here was run on a chip.** `python -m tools.plan_tables` compiles the programs of each job, all layers, for
each slice, as `qwq-jax plan` does, and reads memory, products, HBM bytes and exchanges out of them. Times are the least
that these allow at the chips' peaks: `max(products, HBM, exchanges of weights) + exchanges of activations`, program by
program. Compilers: {versions}. GB are 10^9 bytes of one device; tpu7x has two devices a chip.

`rows` decode at a time on a replica; `rows that fit` of the mean length, and the longest context of one, are what the
memory would hold.
"""


def plans_of(asked: Asked) -> list[TopologyPlan]:
    """Compiles what is not kept."""
    job = read_job(
        ROOT / "configs" / asked.config,
        asked.settings,
        model=ROOT / "configs" / "models" / f"{asked.model}.toml",
        reward_model=None,
        lengths=asked.lengths,
    )
    options = PlanOptions(
        asked.topologies,
        Prices(),
        Calibration(),
        output=None,
        store=runtime.plan_directory(),
        workers=os.cpu_count() or 1,
        machine_code=True,
    )
    return make_plans(job, options)


def command(asked: Asked) -> str:
    """What a user would type for it."""
    prompt, completion = asked.lengths
    words = ["qwq-jax plan", f"configs/{asked.config}", f"--model configs/models/{asked.model}.toml"]
    words += [f"--topology {','.join(asked.topologies)}", *(f"--set {word}" for word in asked.settings)]
    words += [f"--prompt-tokens {prompt} --completion-tokens {completion}"] if prompt else []
    return " ".join([*words, "--machine-code"])


def table(asked: Asked) -> str:
    """One job's table, in Markdown."""
    plans = plans_of(asked)
    names = [name for name in FACTS if any(name in plan.facts for plan in plans)]
    lines = [
        f"## {asked.title}",
        "",
        f"`{command(asked)}`",
        "",
        f"| slice | mesh | GB | {' | '.join(FACTS[name] for name in names)} |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for plan in plans:
        cells = [plan.topology.name, mesh_text(plan), memory_text(plan)]
        lines.append(f"| {' | '.join([*cells, *(fact_text(name, plan.facts) for name in names)])} |")
    lines += ["", *(f"{plan.topology.name}: {problem}." for plan in plans for problem in plan.problems)]
    for plan in plans:
        if plan.settings:
            lines.append(f"- {plan.topology.name}: `--set {' --set '.join(plan.settings)}`")
    return "\n".join(lines).rstrip() + "\n"


def published() -> str:
    """Others' measurements beside our plans of the nearest job."""
    lines = [
        "## Beside published figures",
        "",
        "A plan is a bound: a system that runs reaches a part of it. What was measured is of other models of the same "
        "size and other programs; the part that it reaches of ours says how far a user should trust a plan without a "
        "calibration.",
        "",
        "| measured | tokens/s/chip | the nearest plan | tokens/s/chip | measured of planned | what differs |",
        "|---|---|---|---|---|---|",
    ]
    for each in PUBLISHED:
        (plan,) = plans_of(each.asked)
        ours = plan.facts.get(each.fact)
        name = f"{each.asked.model} on {plan.topology.name}, {mesh_text(plan)}"
        share = f"{each.tokens_per_second_per_chip / ours:.0%}" if ours else ""
        planned = f"{ours:,.0f}" if ours else memory_text(plan)
        lines.append(
            f"| {each.who} | {each.tokens_per_second_per_chip:,.0f} | {name} | {planned} | {share} | {each.why} |"
        )
    return "\n".join(lines) + "\n"


def sections_of(page: str) -> dict[str, str]:
    """What a page holds: the text of each section by its heading."""
    parts = re.split(r"^## (.+)\n", page, flags=re.MULTILINE)
    return {title: f"## {title}\n{text.rstrip()}\n" for title, text in zip(parts[1::2], parts[2::2], strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", help=f"of {', '.join([*TABLES, 'published'])}; all by default")
    arguments = parser.parse_args()
    titles = {name: asked.title for name, asked in TABLES.items()} | {"published": "Beside published figures"}
    chosen = arguments.tables or [*titles]
    for name in chosen:
        if name not in titles:
            parser.error(f"{name} is not one of {', '.join(titles)}")
    sections = sections_of(REPORT.read_text(encoding="utf-8")) if REPORT.exists() else {}
    head = HEAD.format(versions=", ".join(f"{name} {version(name)}" for name in ("jax", "libtpu")))
    for name in chosen:
        print(f"{name} ...", flush=True)
        sections[titles[name]] = published() if name == "published" else table(TABLES[name])
        kept = [sections[title] for title in titles.values() if title in sections]
        REPORT.write_text("\n".join([head, *kept]), encoding="utf-8")
    print(f"wrote {REPORT}")


if __name__ == "__main__":
    main()
