"""HBM bytes, collectives and temporaries of a decode step, from the TPU compiler's own HLO, on a machine without a TPU.

    python -m tools.step_bytes v5e:4x4 v6e:2x4 --weights int8 --cache int8

One round of the window of a `qwq_jax.engine` decode program, as `qwq-jax plan` reads it (`qwq_jax.plan.hlo`), beside
what a step cannot do without. The paged attention kernel reads the live cache once, which `tools/kernel_schedule.py`
shows of it.
"""

import argparse
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from qwq_jax import runtime
from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.inference import InferenceConfig
from qwq_jax.config.load import load_toml
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.plan import Workload
from qwq_jax.jobs.plan_job import Job
from qwq_jax.plan.compiler import Request, Workers, answer_all
from qwq_jax.plan.cost import ProgramCost
from qwq_jax.plan.hlo import Collective
from qwq_jax.plan.search import token_bytes, weight_bytes

ROWS, CONTEXT, PAGE = 64, 8192, 128
MESHES = {"v5e:4x4": (2, 8), "v6e:2x4": (1, 8), "v5p:2x2x1": (1, 4), "tpu7x:2x2x1": (1, 8)}
PRESET = Path(__file__).parents[1] / "configs/models/qwq-32b.toml"


@dataclass(frozen=True)
class StepBytes:
    """Of one decode step on one device.

    Attributes:
        moved: HBM bytes read and written.
        ideal: Bytes of the weights that a step needs, once, and of the live cache, once.
        temporaries: Bytes that the program allocates beside its arguments and results.
        reductions: All-reduces of activations, `[rows, D]`.
        others: Other collectives, all of the sampler, with how often each occurs.
        largest_other: Bytes of the largest of them.
    """

    moved: int
    ideal: int
    temporaries: int
    reductions: int
    others: dict[str, int]
    largest_other: int


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
    """Compiles the step of a case.

    Raises:
        ValueError: It does not fit a device.
    """
    model = load_toml(PRESET, ModelConfig)
    model = model.model_copy(update={"num_layers": case.layers or model.num_layers})
    data, tensor = MESHES[case.topology]
    rows = case.rows // data
    engine = EngineConfig(
        max_sequences=rows,
        page_size=PAGE,
        num_pages=rows * case.context // PAGE,
        max_context=case.context,
        cache_dtype=case.cache,  # pyright: ignore[reportArgumentType]
        weights=case.weights,
        decode_window=case.window,
    )
    config = InferenceConfig(engine=engine, mesh=MeshConfig(data=data, tensor=tensor))
    job = Job("step_bytes", "inference", config, model, Workload())
    request = Request({**job.described(case.topology), "live_tokens": rows * case.context}, "decode")
    with Workers(1) as workers:
        (answer,) = answer_all([request], store=runtime.plan_directory(), workers=workers)
    if "used" in answer:
        raise ValueError(f"{case} needs {answer['used']:,} bytes of the {answer['usable']:,} of a device")
    cost = ProgramCost.from_json(answer)
    reductions, others, largest = exchanges(cost.collectives, 2 * rows * model.hidden_size)
    embedding = 2.0 * model.vocab_size * model.hidden_size / tensor  # of which a step gathers some rows
    ideal = weight_bytes(model, case.weights, tensor) - embedding
    ideal += rows * case.context * token_bytes(model, case.cache, tensor)
    return StepBytes(cost.moved, int(ideal), cost.temporaries, reductions, others, largest)


def exchanges(collectives: Iterable[Collective], activations: int) -> tuple[int, dict[str, int], int]:
    """All-reduces of so many bytes, the other collectives by kind, and the largest of these in bytes."""
    reductions, others, largest = 0, Counter(), 0
    for each in collectives:
        if each.kind == "all-reduce" and each.bytes == activations:
            reductions += each.count
        else:
            others[each.kind] += each.count
            largest = max(largest, each.bytes)
    return reductions, dict(others), largest


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
            f"{others} (up to {step.largest_other:,} bytes) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
