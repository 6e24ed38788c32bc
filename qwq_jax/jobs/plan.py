"""``plan``: what a job takes on TPUs that are not here."""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from qwq_jax.config.engine import CACHE_SHARE, EngineConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.plan import Calibration, Prices
from qwq_jax.jobs.plan_job import (
    Job,
    arranged,
    changed,
    engine_of,
    program_names,
    trained_of,
    trained_so,
    way_of,
)
from qwq_jax.jobs.plan_refusals import Device, no_engine_fits, no_training_fits, relief
from qwq_jax.jobs.plan_times import parts_of
from qwq_jax.plan.chips import GB, USUAL_TOPOLOGIES, Topology, parse_topology
from qwq_jax.plan.compiler import Request, Workers, answer_all, compilers, is_kept
from qwq_jax.plan.cost import ProgramCost, with_slices
from qwq_jax.plan.memory import (
    INFERENCE_PHASES,
    RESERVED,
    RL_PHASES,
    SFT_PHASES,
    STATE,
    Memory,
    held_by_programs,
    room_for_pages,
)
from qwq_jax.plan.page import write_page
from qwq_jax.plan.result import TopologyPlan
from qwq_jax.plan.search import (
    TrainChoice,
    all_train_choices,
    by_speed,
    engine_choices,
    engine_speed,
    fits,
    train_choice,
    train_choices,
)
from qwq_jax.plan.tables import show

LOG = logging.getLogger(__name__)

_PHASES = {"inference": INFERENCE_PHASES, "sft": SFT_PHASES, "rl": RL_PHASES}


@dataclass(frozen=True)
class PlanOptions:
    """What is asked beside the job.

    Attributes:
        topologies: Slices, as libtpu names them.
        prices: Of chips.
        provisioning: How they are got, which decides the price: ``on-demand``, ``spot``, ...
        calibration: Of programs.
        output: Directory of ``plan.json`` and ``plan.html``; None to show only.
        store: Directory of what was compiled before.
        workers: Compilations at a time.
        search: Compile what is recommended too, rather than only name it.
        machine_code: Compile to the end; otherwise only until memory is assigned, and what programs take themselves is
            a reserve.
    """

    topologies: tuple[str, ...]
    prices: Prices
    calibration: Calibration
    output: Path | None
    store: Path
    workers: int
    search: bool = False
    provisioning: str = "on-demand"
    machine_code: bool = False


@dataclass(frozen=True)
class _Case:
    """A job on a slice, as far as it is known."""

    topology: Topology
    job: Job
    settings: tuple[str, ...]
    usable: int
    problem: str | None = None
    arrays: Mapping[str, Any] | None = None

    def request(self, task: str, **more: Any) -> Request:
        return Request({**self.job.described(self.topology.name), **more}, task)


def plan(job: Job, options: PlanOptions) -> list[TopologyPlan]:
    """Plans a job for each topology, shows and writes it.

    Raises:
        ValueError: A topology is none, or the job cannot be compiled at all.
    """
    plans = make_plans(job, options)
    show(plans, options.prices, options.provisioning)
    if options.output is not None:
        write(plans, job, options)
    return plans


def make_plans(job: Job, options: PlanOptions) -> list[TopologyPlan]:
    """The plan of each topology, and, where a search is asked for, of what it recommends there."""
    topologies = [parse_topology(name) for name in options.topologies]
    with _bar() as bar, Workers(options.workers) as workers:
        compiler = _Compiler(options.store, workers, bar)
        usable = _usable(topologies, compiler)
        cases = [_case(job, topology, usable[topology.chip.name]) for topology in topologies]
        plans = _compiled(_with_arrays(cases, compiler), options, compiler)
        if not options.search:
            return plans
        advised = [index for index, each in enumerate(plans) if each.advice]
        others = [
            replace(cases[i], job=changed(job, plans[i].advice), settings=plans[i].advice, problem=None)
            for i in advised
        ]
        better = _compiled(_with_arrays(others, compiler), options, compiler)
    for index, other in zip(advised, better, strict=True):
        if _is_better(other, plans[index]):
            plans[index] = replace(plans[index], better=replace(other, advice=()))
        else:  # an estimate that the compiler does not confirm is no advice
            plans[index] = replace(plans[index], advice=())
    return plans


def _is_better(other: TopologyPlan, than: TopologyPlan) -> bool:
    if not other.fits:
        return False
    speed = "tokens_per_second_per_chip"
    return not than.fits or other.facts.get(speed, 0.0) > than.facts.get(speed, 0.0)


def read_topologies(names: str, all_usual: bool) -> tuple[str, ...]:
    """Slices from a list with commas.

    Raises:
        ValueError: None is named, or one is none.
    """
    found = tuple(name for part in names.split(",") if (name := part.strip()))
    if all_usual and found:
        raise ValueError("--all and --topology exclude each other")
    if not all_usual and not found:
        raise ValueError("say which slices: --topology v5e:4x4,v6e:2x4, or --all")
    for name in found:
        parse_topology(name)
    return USUAL_TOPOLOGIES if all_usual else found


def write(plans: Sequence[TopologyPlan], job: Job, options: PlanOptions) -> None:
    """Writes both files."""
    assert options.output is not None
    options.output.mkdir(parents=True, exist_ok=True)
    document = {
        "job": job.name,
        "kind": job.kind,
        "compilers": compilers(),
        "machine_code": options.machine_code,
        "workload": job.workload.model_dump(),
        "prices": options.prices.model_dump(),
        "topologies": [each.to_json() for each in plans],
    }
    (options.output / "plan.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    write_page(options.output / "plan.html", document)
    LOG.info("wrote plan.json and plan.html in %s", options.output)


def _bar() -> Progress:
    return Progress(
        TextColumn("compiling {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


@dataclass(frozen=True)
class _Compiler:
    """Who is asked, where answers are kept, and where it is shown how many there are."""

    store: Path
    workers: Workers
    bar: Progress

    def ask(self, requests: Sequence[Request], what: str) -> list[dict[str, Any]]:
        new = [request for request in requests if not is_kept(request, self.store)]
        if not new:
            return answer_all(requests, store=self.store, workers=self.workers)
        task = self.bar.add_task(what, total=len(requests))

        def done(request: Request) -> None:
            self.bar.update(task, advance=1)
            if self.bar.disable:
                LOG.info("compiled %s for %s", request.task, request.job.get("topology"))

        answers = answer_all(requests, store=self.store, workers=self.workers, progress=done)
        self.bar.remove_task(task)
        return answers


def _usable(topologies: Sequence[Topology], compiler: _Compiler) -> dict[str, int]:
    """What the compiler lets a program have on a device of each chip."""
    first = {topology.chip.name: topology.name for topology in reversed(topologies)}
    requests = [Request({"topology": name}, "device") for name in first.values()]
    answers = compiler.ask(requests, "for one device")
    return {chip: answer["usable"] for chip, answer in zip(first, answers, strict=True)}


def _case(job: Job, topology: Topology, usable: int) -> _Case:
    """The job on a slice; what does not go together there is this slice's problem, not that of the others."""
    try:
        return _arrange(job, topology, usable)
    except ValueError as error:
        return _Case(topology, job, (), usable, f"{job.name} cannot be arranged on {topology.name}: {error}")


def _arrange(job: Job, topology: Topology, usable: int) -> _Case:
    """The job with a mesh for this slice: its own where it has as many devices, otherwise the best that is known."""
    if job.devices == topology.devices:
        return _Case(topology, job, (), usable)
    if job.kind != "inference":
        choices = _like_its_own(job, topology, usable)
        if not choices:
            return _Case(topology, job, (), usable, no_training_fits(job, topology, usable))
        decode = _decode_mesh(job, topology, usable) if job.kind == "rl" else None
        return _Case(topology, *_first_arranged(job, choices, decode), usable)
    engine = engine_of(job)
    choices = engine_choices(job.model, topology, job.workload, usable=usable, engine=engine)
    wanted = (engine.weights, engine.cache_dtype or "bfloat16")
    alike = [choice for choice in choices if (choice.weights, choice.cache_dtype) == wanted]
    if not alike:
        return _Case(topology, job, (), usable, no_engine_fits(job, topology, usable, wanted))
    return _Case(topology, *arranged(job, alike[0].mesh), usable)


def _decode_mesh(job: Job, topology: Topology, usable: int) -> MeshConfig:
    """The mesh of the engine of a run of reinforcement learning; its weights are not quantised."""
    served = engine_choices(job.model, topology, job.workload, usable=usable, engine=engine_of(job))
    alike = [choice for choice in served if choice.weights is None]
    return alike[0].mesh if alike else MeshConfig(data=1, tensor=topology.devices)


def _like_its_own(job: Job, topology: Topology, usable: int) -> list[TrainChoice]:
    """Ways that fit and leave what the user chose where that can be: rematerialisation, rows of a micro-batch."""
    trained, own = trained_of(job), way_of(job)
    found = train_choices(trained, topology, usable=usable, remat=(own.remat,))
    found = found or train_choices(trained, topology, usable=usable)
    kept = [train_choice(trained, topology, choice.way.with_total(own.total_rows)) for choice in found]
    return by_speed(each if fits(each, usable) else choice for each, choice in zip(kept, found, strict=True))


def _first_arranged(job: Job, choices: Sequence[TrainChoice], decode: MeshConfig | None) -> tuple[Job, tuple[str, ...]]:
    """The job in the first of these ways that its batch can be divided so; ValueError, that of the first, if none.

    A batch is what a user has chosen: a mesh that needs another is no choice.
    """
    problem: ValueError | None = None
    for choice in choices:
        try:
            return trained_so(job, choice.way, decode)
        except ValueError as error:
            problem = problem or error
    assert problem is not None, "no choice"
    raise problem


def _with_arrays(cases: Sequence[_Case], compiler: _Compiler) -> list[_Case]:
    """Measures what lies on the devices, and counts the pages that an engine has."""
    open_cases = [case for case in cases if case.problem is None]
    answers = iter(compiler.ask([case.request("arrays") for case in open_cases], "what arrays take"))
    return [case if case.problem is not None else _counted(case, next(answers)) for case in cases]


def _counted(case: _Case, arrays: Mapping[str, Any]) -> _Case:
    case = replace(case, arrays=arrays)
    if not arrays["engine"]:
        return case
    engine, longest, page = engine_of(case.job), case.job.longest, arrays["page"]
    there = sum(arrays["held"].values()) + arrays["engine"]["engine's weights"]
    left = arrays["usable"] - there

    device = Device(case.job.name, case.topology.name, there, case.usable)
    pages = engine.num_pages
    if pages is None:
        wanted = engine.max_sequences * -(-longest // engine.page_size)
        pages = min(wanted, int(CACHE_SHARE * left) // page if left > 0 else 0)
        if pages * engine.page_size < longest:
            needed = -(-longest // engine.page_size) * page
            return replace(
                case, problem=device.refused(f"one sequence of {longest:,} tokens", needed, needed / CACHE_SHARE)
            )
        case = replace(case, job=case.job.with_engine(num_pages=pages))
    elif (needed := pages * page) > left:
        problem = device.refused(f"engine.num_pages = {pages:,}", needed, needed)
        return replace(case, problem=f"{problem}; {max(left, 0) // page:,} pages would fit")
    sizes = {**arrays["engine"], "key-value cache": pages * page}
    return replace(case, arrays={**arrays, "engine": sizes})


def _compiled(cases: Sequence[_Case], options: PlanOptions, compiler: _Compiler) -> list[TopologyPlan]:
    requests: list[Request] = []
    slots: list[tuple[int, str]] = []
    for index, case in enumerate(cases):
        if case.problem is None:
            live = _live_rows(case) * case.job.workload.live_tokens
            for name in program_names(case.job):
                slots.append((index, name))
                of_engine = {"live_tokens": live} if name in ("decode", "prompts") else {}
                requests.append(case.request(name, **of_engine, machine_code=options.machine_code))
    answers = compiler.ask(requests, "programs")
    by_case: list[dict[str, dict[str, Any]]] = [{} for _ in cases]
    for (index, name), answer in zip(slots, answers, strict=True):
        by_case[index][name] = answer
    return [_planned(case, found, options) for case, found in zip(cases, by_case, strict=True)]


def _live_rows(case: _Case) -> int:
    """Rows of a replica that decode at a time: all, or as many sequences as the pages hold."""
    if case.job.kind == "sft":
        return 0
    engine: EngineConfig = engine_of(case.job)
    assert engine.num_pages is not None
    lengths = case.job.workload
    held = engine.num_pages * engine.page_size // (lengths.prompt_tokens + lengths.completion_tokens)
    return max(1, min(engine.max_sequences, held))


def _planned(case: _Case, found: Mapping[str, dict[str, Any]], options: PlanOptions) -> TopologyPlan:
    mesh, decode = case.job.meshes
    bare = TopologyPlan(case.topology, case.job.kind, mesh, decode, case.settings)
    if case.problem is not None:
        return replace(bare, problems=(case.problem,), advice=_advice(case, {}))
    arrays = case.arrays
    assert arrays is not None
    problems = [
        f"{name} needs {answer['used'] / GB:.2f} GB of the {answer['usable'] / GB:.2f} GB of a device, "
        f"{(answer['used'] - answer['usable']) / GB:.2f} GB too much; {relief(case.job, name)}"
        for name, answer in found.items()
        if "used" in answer
    ]
    if problems:
        return replace(bare, problems=tuple(problems), advice=_advice(case, {}))
    programs = {name: ProgramCost.from_json(answer) for name, answer in found.items()}
    for name in {"step", "update"} & programs.keys():
        # Without a separate program for gradients they are as large as the weights, a third of the state beside them.
        gradients = arrays["gradients"] or arrays["held"][STATE] // 3
        programs[name] = with_slices(programs[name], case.topology, gradients)
    memory = Memory(
        usable=arrays["usable"],
        held={**arrays["held"], **held_by_programs(programs, arrays["counts"])},
        engine=arrays["engine"],
        gradients=arrays["gradients"],
        programs=programs,
        phases=_PHASES[case.job.kind],
    )
    if memory.shortfall:
        worst = max(memory.peaks, key=lambda name: memory.peaks[name])
        problems.append(
            f"{worst} needs {memory.peak / GB:.2f} GB of the {memory.usable / GB:.2f} GB of a device, "
            f"{memory.shortfall / GB:.2f} GB too much; {relief(case.job, worst)}{_of_reserve(memory)}"
        )
    rows = _live_rows(case)
    parts, facts = parts_of(case.job, programs, case.topology, rows=rows, calibration=options.calibration)
    facts |= _room(case, memory)
    price = options.prices.of(case.topology.chip.name, options.provisioning)
    if price is not None:
        hourly = price * case.topology.chips
        if "tokens_per_second" in facts:
            facts["price_of_million_tokens"] = hourly / 3600 / facts["tokens_per_second"] * 1e6
        if "run_seconds" in facts:
            facts["price_of_run"] = hourly * facts["run_seconds"] / 3600
    advice = _advice(case, {} if problems else facts)
    return replace(bare, memory=memory, problems=tuple(problems), parts=parts, facts=facts, advice=advice)


def _of_reserve(memory: Memory) -> str:
    """What is to be said where a job would fit without the reserve for programs."""
    reserve = memory.held.get(RESERVED, 0)
    if memory.shortfall > reserve:
        return ""
    return f"; {reserve / GB:.2f} GB of it are a reserve for programs, which --machine-code measures"


def _room(case: _Case, memory: Memory) -> dict[str, float]:
    """The largest batch and context that fit."""
    if case.job.kind == "sft" or case.arrays is None:
        return {}
    engine = engine_of(case.job)
    empty = Memory(
        usable=memory.usable,
        held=memory.held,
        engine={**memory.engine, "key-value cache": 0},
        gradients=memory.gradients,
        programs=memory.programs,
        phases=memory.phases,
    )
    tokens = room_for_pages(empty, case.arrays["page"]) * engine.page_size
    lengths = case.job.workload
    return {
        "cache_tokens_of_replica": tokens,
        "largest_batch": tokens // (lengths.prompt_tokens + lengths.completion_tokens),
        "largest_context": min(tokens, case.job.model.max_context),
    }


def _advice(case: _Case, facts: Mapping[str, float]) -> tuple[str, ...]:
    """Settings that are estimated to be faster by a tenth at least, or, without `facts` of its own, to fit."""
    return _engine_advice(case, facts) if case.job.kind == "inference" else _train_advice(case, facts)


def _engine_advice(case: _Case, facts: Mapping[str, float]) -> tuple[str, ...]:
    job, topology = case.job, case.topology
    engine = engine_of(job)
    formats = engine.weights, engine.cache_dtype or "bfloat16"
    choices = engine_choices(job.model, topology, job.workload, usable=case.usable, engine=engine)
    if facts:
        # An estimate is compared with an estimate: the forms leave out what a compiled program also does.
        own = engine_speed(job.model, topology, job.workload, (job.config.mesh, _live_rows(case)), formats)
        choices = [choice for choice in choices if choice.tokens_per_second > 1.1 * own]
    present = job.config.mesh, engine.max_sequences, *formats
    others = (choice for choice in choices if (choice.mesh, choice.rows, choice.weights, choice.cache_dtype) != present)
    return tuple(best.settings) if (best := next(others, None)) else ()


def _train_advice(case: _Case, facts: Mapping[str, float]) -> tuple[str, ...]:
    job, topology = case.job, case.topology
    trained, present = trained_of(job), way_of(job)
    choices = [choice for choice in all_train_choices(trained, topology, usable=case.usable) if choice.way != present]
    if facts:
        own = train_choice(trained, topology, present).row_seconds
        choices = [choice for choice in choices if own > 1.1 * choice.row_seconds]
    decode = job.config.decode_mesh or job.config.mesh if job.kind == "rl" else None
    if decode is not None and decode.size != topology.devices:
        decode = _decode_mesh(job, topology, case.usable)
    try:
        return _first_arranged(job, choices, decode)[1] if choices else ()
    except ValueError:  # no way that would do divides the batch
        return ()
