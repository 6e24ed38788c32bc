"""How near the plans come on a machine that can be timed: this one's processor, in place of a TPU.

    python -m tools.plan_check --write docs/benchmarks/plan_check.md

Steps of fine-tuning and of decoding are compiled for the CPU, their text is read by what reads a TPU's, and they get
the least time that the same roofline gives, with peaks that are measured first: of a large product, and of a sum over
more than the caches hold. The first case of each kind is timed and calibrates, as a user's measurement does, and the
others are predicted; all are timed in turns. Exits with 1 if a prediction is further off than 25 %.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.plan import Calibration, Measured, ProgramName
from qwq_jax.config.train import SftConfig
from qwq_jax.engine.arrays import arrays_of, pack
from qwq_jax.engine.runner import engine_shape, lower_step
from qwq_jax.engine.step import EngineShape, Program, StepPlan
from qwq_jax.jobs.plan_programs import sft_work
from qwq_jax.plan.chips import Chip, Topology
from qwq_jax.plan.cost import ProgramCost, attention_flops, least_seconds
from qwq_jax.plan.hlo import matrix_flops, moved_bytes, parse
from qwq_jax.runtime import start
from qwq_jax.sharding import decode_layout, make_mesh

TOLERANCE = 0.25
CHIP = "this machine"


@dataclass(frozen=True)
class Case:
    """A step of a model: `rows` rows of `tokens` tokens, trained on; or of which each draws one more.

    Attention of decoding is a loop whose length the program decides, and is added, as that of a kernel is on a TPU.
    """

    program: ProgramName
    hidden: int
    layers: int
    rows: int
    tokens: int

    @property
    def name(self) -> str:
        """For the table."""
        what = "trained on" if self.program == "step" else "in the cache"
        return f"{self.layers} layers of {self.hidden}, {self.rows} rows of {self.tokens} tokens {what}"

    @property
    def model(self) -> ModelConfig:
        """A Qwen2 model of this size."""
        return ModelConfig(
            vocab_size=8192,
            hidden_size=self.hidden,
            num_layers=self.layers,
            num_heads=self.hidden // 64,
            num_kv_heads=self.hidden // 64 // 4,
            head_dim=64,
            intermediate_size=self.hidden * 3,
            rope_theta=1e6,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            max_position_embeddings=2048,
            eos_token_ids=(0,),
        )


class Compiled(NamedTuple):
    """A program: what one step of it does, and a function that takes `steps` of them."""

    cost: ProgramCost
    run: Callable[[], Any]
    steps: int = 1


_NOTHING = ProgramCost(0, 0, 0, 0.0, 0)

CASES = (
    Case("step", 512, 8, 4, 256),
    Case("step", 768, 8, 4, 256),
    Case("step", 512, 16, 2, 512),
    Case("decode", 1024, 12, 8, 256),
    Case("decode", 1024, 24, 8, 256),
    Case("decode", 768, 24, 8, 512),
    Case("decode", 1280, 12, 16, 256),
)


def main() -> int:
    """Parses the command line and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="of each step; the best counts")
    parser.add_argument("--write", type=Path, help="a markdown file")
    options = parser.parse_args()
    start(simulate_devices=1)
    machine = measure_machine(options.repetitions)
    lines, worst = compare(CASES, machine, options.repetitions)
    text = "\n".join([*heading(machine), *lines, "", f"The worst prediction is {worst:.0%} off."]) + "\n"
    print(text)
    if options.write:
        options.write.write_text(text)
    return int(worst > TOLERANCE)


def compare(cases: tuple[Case, ...], machine: Topology, repetitions: int) -> tuple[list[str], float]:
    """Rows of the table, and how far off the worst prediction is; the first case of a program calibrates."""
    programs = [(training if case.program == "step" else decoding)(case) for case in cases]
    calibration, lines, worst = Calibration(), [], 0.0
    for case, compiled, seconds in zip(cases, programs, times_in_turns(programs, repetitions), strict=True):
        calibrates = not any(each.program == case.program for each in calibration.measured)
        factor = calibration.factor(CHIP, case.program)
        predicted = least_seconds(compiled.cost, machine, tensor=1, factor=factor)
        if calibrates:
            measured = Measured(chip=CHIP, program=case.program, seconds=seconds, predicted=predicted.total)
            calibration = Calibration(measured=(*calibration.measured, measured))
            verdict = f"calibrates: x {seconds / predicted.total:.2f}"
        else:
            off = abs(predicted.total / seconds - 1)
            worst, verdict = max(worst, off), f"{predicted.total / seconds:.2f} of measured"
        lines.append(
            f"| {case.program} | {case.name} | {predicted.bound} | {1e3 * predicted.total:.1f} | {1e3 * seconds:.1f} | "
            f"{verdict} |"
        )
    return lines, worst


def training(case: Case) -> Compiled:
    """A step of fine-tuning."""
    config = SftConfig(
        model="none",
        train_files=("none",),
        output_dir="none",
        sequence_length=case.tokens,
        rows_per_step=case.rows,
        steps=10,
        compute_dtype="float32",
    )
    lowered = sft_work(config, case.model, jax.devices()[:1]).programs["step"]()
    compiled = lowered.compile()
    state, batch, _ = jax.device_put(jax.tree.map(_filled, lowered.in_avals[0]))
    held = [state]

    def run() -> None:
        held[0], *_ = jax.block_until_ready(compiled(held[0], batch, None))

    return Compiled(cost_of(compiled), run)


def decoding(case: Case) -> Compiled:
    """A window of decode steps, of which the text has one."""
    model, layout = case.model, decode_layout(make_mesh(MeshConfig(), jax.devices()[:1]))
    config = EngineConfig(max_sequences=case.rows, max_context=2 * case.tokens, num_pages=None, compute_dtype="float32")
    shape = engine_shape(model, layout, config)
    config = config.model_copy(update={"num_pages": shape.num_pages})
    program = Program(case.rows, 0, shape.max_table_width)
    lowered = lower_step(model, layout, config, program)
    compiled = lowered.compile()
    params, cache, carry, _ = jax.device_put(jax.tree.map(_filled, lowered.in_avals[0]))
    packed = jnp.asarray(pack(_plan(shape, program, case.tokens), shape))
    live = case.rows * case.tokens / (shape.num_pages * shape.page_size)  # of all that the cache can hold
    read = int(live * sum(pages.nbytes for pages in jax.tree.leaves(cache)))
    held = [cache, carry]

    def run() -> None:
        *held[:], _ = jax.block_until_ready(compiled(params, *held, packed))

    heads = case.layers * model.num_heads
    added = attention_flops(queries=case.rows, context=case.tokens, heads=heads, head_dim=model.head_dim)
    return Compiled(cost_of(compiled, added_flops=added, added_bytes=read), run, shape.decode_window)


def _plan(shape: EngineShape, program: Program, tokens: int) -> StepPlan:
    """Every row draws a window's tokens after so many that are in its pages."""
    arrays = {name: np.zeros((1, *extent), dtype) for name, (extent, dtype) in arrays_of(shape, program).items()}
    rows, width = program.decode_rows, program.table_width
    arrays["page_table"][0] = np.arange(rows * width).reshape(rows, width)
    arrays["origin"][0] = np.arange(rows)
    arrays["token"][:], arrays["position"][:], arrays["stop_ids"][:], arrays["top_p"][:] = 1, tokens, -1, 1.0
    arrays["budget"][:] = arrays["steps"][:] = shape.decode_window
    return StepPlan(program, arrays)


def _filled(described: Any) -> np.ndarray:
    """Small random numbers, or ones."""
    if jnp.issubdtype(described.dtype, jnp.floating):
        return np.random.default_rng(0).standard_normal(described.shape, np.float32) * np.float32(0.02)
    return np.ones(described.shape, described.dtype)


def cost_of(compiled: Any, *, added_flops: float = 0.0, added_bytes: int = 0) -> ProgramCost:
    """What the text of a compiled program says that it does, and what it does not say."""
    module = parse(compiled.as_text())
    return ProgramCost(
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
        result=0,
        code=0,
        flops=matrix_flops(module, "ENTRY") + added_flops,
        moved=moved_bytes(module, "ENTRY", 0) + added_bytes,
    )


def times_in_turns(programs: Sequence[Compiled], repetitions: int) -> list[float]:
    """The least seconds of one step of each, after a run to warm up.

    Each runs once a turn: a machine is slower in some minutes, and what is compared should share them.
    """
    best = [math.inf] * len(programs)
    for turn in range(repetitions + 1):
        for i, compiled in enumerate(programs):
            began = time.perf_counter()
            compiled.run()
            seconds = (time.perf_counter() - began) / compiled.steps
            best[i] = min(best[i], seconds) if turn else best[i]
            print(f"turn {turn} of {repetitions}: {1e3 * seconds:.1f} ms", flush=True)
    return best


def measure_machine(repetitions: int) -> Topology:
    """Peaks of this machine: a product of 2048 squared, and a sum over a gibibyte, in float32."""
    square, long = jnp.ones((2048, 2048)), jnp.ones((1 << 28,))
    product = jax.jit(lambda x: x @ x)
    total = jax.jit(lambda x: jnp.sum(x))
    best = lambda run, count: times_in_turns([Compiled(_NOTHING, lambda: run().block_until_ready())], count)[0]  # noqa: E731
    flops = 2 * 2048**3 / best(lambda: product(square), 4 * repetitions)
    return machine_of(long.nbytes / best(lambda: total(long), repetitions), flops)


def machine_of(bandwidth: float, flops: float) -> Topology:
    """A slice of one device with these peaks."""
    return Topology(CHIP, Chip(CHIP, bandwidth, flops, None, 1.0, 1), (1,))


def heading(machine: Topology) -> list[str]:
    """What the table stands under."""
    return [
        "# Plans beside measured times, on a CPU",
        "",
        "    python -m tools.plan_check --write docs/benchmarks/plan_check.md",
        "",
        f"{os.cpu_count()} cores; peaks measured here: {machine.chip.bf16 / 1e9:.0f} GFLOP/s (a product of 2048 "
        f"squared), {machine.chip.bandwidth / 1e9:.1f} GB/s (a sum over 1 GiB), float32.",
        "Programs are compiled for this CPU, and read and timed by the roofline as `qwq-jax plan` does those of a TPU;",
        "the first case of each kind calibrates the others. What this checks is the reader, the roofline and the",
        "calibration, not the peaks of any TPU.",
        "",
        "| program | case | bound | predicted, ms | measured, ms | |",
        "|---|---|---|---|---|---|",
    ]


if __name__ == "__main__":
    sys.exit(main())
