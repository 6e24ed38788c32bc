"""How long the parts of a job take at least, from what its programs do."""

from collections.abc import Mapping
from dataclasses import replace

from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.plan import Calibration
from qwq_jax.jobs.plan_job import Job, engine_of
from qwq_jax.plan.chips import Topology
from qwq_jax.plan.cost import ProgramCost, Seconds, attention_flops, least_seconds
from qwq_jax.plan.result import Part
from qwq_jax.plan.search import token_bytes, weight_bytes

# Passes of attention that a gradient is worth: forward, again where layers are computed again, and five products for
# the two of a forward pass.
_BACKWARD_PASSES = 2.5


def parts_of(
    job: Job,
    programs: Mapping[str, ProgramCost],
    topology: Topology,
    *,
    rows: int,
    calibration: Calibration,
) -> tuple[tuple[Part, ...], dict[str, float]]:
    """The parts of a step, and figures of the job as a whole.

    Args:
        job: The job, on its mesh.
        programs: What each does on a device.
        topology: The slice.
        rows: Sequences of a replica that decode at a time.
        calibration: Of its chips.

    Returns:
        Parts; and, by name, of those that the job has: ``tokens_per_second`` (completions', of the slice),
        ``tokens_per_second_per_chip``, ``step_seconds``, ``run_seconds``, ``mfu`` (model's products over the peak, the
        whole step), ``mbu`` (weights and live cache once, over what the memory could bring in a decode step).
    """
    with_attention = _with_attention(job, programs, rows)
    seconds = {}
    for name, cost in with_attention.items():
        mesh = _mesh_of(job, name)
        seconds[name] = least_seconds(
            cost,
            topology,
            tensor=mesh.tensor,
            int8=name == "prompts" and engine_of(job).activations == "int8",
            factor=calibration.factor(topology.chip.name, name),
        )
    if job.kind == "inference":
        return _inference(job, seconds, topology, rows)
    if job.kind == "sft":
        return _sft(job, seconds, topology)
    return _rl(job, seconds, topology, rows)


def _mesh_of(job: Job, program: str) -> MeshConfig:
    """Where a program runs: those of an engine may have another mesh."""
    if job.kind == "rl" and program in ("decode", "prompts"):
        return job.config.decode_mesh or job.config.mesh
    return job.config.mesh


def _with_attention(job: Job, programs: Mapping[str, ProgramCost], rows: int) -> dict[str, ProgramCost]:
    """The programs with what the attention kernels compute, which their text does not say."""
    model, out = job.model, {}
    for name, cost in programs.items():
        layers = model.num_layers * model.num_heads
        lengths = job.workload
        added = 0.0
        if name in ("decode", "prompts"):
            added = attention_flops(queries=rows, context=lengths.live_tokens, heads=layers, head_dim=model.head_dim)
            if name == "prompts":
                added += attention_flops(
                    queries=engine_of(job).prefill_chunk,
                    context=lengths.prompt_tokens / 2,
                    heads=layers,
                    head_dim=model.head_dim,
                )
        elif name in ("gradient", "step", "log-probabilities", "reference"):
            added = attention_flops(
                queries=_tokens_of_micro_batch(job) * (job.config.accumulation if name == "step" else 1),
                context=_mean_context(job),
                heads=layers,
                head_dim=model.head_dim,
                passes=_passes(job) if name in ("gradient", "step") else 1.0,
            )
        out[name] = replace(cost, flops=cost.flops + added / _mesh_of(job, name).tensor)
    return out


def _passes(job: Job) -> float:
    return (2.0 if job.config.remat else 1.0) + _BACKWARD_PASSES


def _tokens_of_micro_batch(job: Job) -> float:
    """On one device's share of the rows."""
    mesh = job.config.mesh
    if job.kind == "sft":
        rows = job.config.rows_per_step // job.config.accumulation
    else:
        rows = job.config.rows_per_micro_batch
    return rows * job.row_length / (mesh.data * mesh.fsdp * mesh.context)


def _mean_context(job: Job) -> float:
    """Keys that a query of a packed row meets: half a sequence; how long those of ``sft`` are, nothing here says."""
    if job.kind == "sft":
        return job.row_length / 2
    return (job.workload.prompt_tokens + job.workload.completion_tokens) / 2


def _inference(
    job: Job, seconds: Mapping[str, Seconds], topology: Topology, rows: int
) -> tuple[tuple[Part, ...], dict[str, float]]:
    decode, prompts = seconds["decode"], seconds["prompts"]
    lengths, engine = job.workload, engine_of(job)
    replicas = job.config.mesh.data * job.config.mesh.fsdp
    chunks = rows * lengths.prompt_tokens / lengths.completion_tokens / engine.prefill_chunk
    parts = (Part("decode", "decode", 1.0, decode), Part("prompts", "prompts", chunks, prompts))
    rate = rows * replicas / sum(part.total for part in parts)
    return parts, {
        "tokens_per_second": rate,
        "tokens_per_second_per_chip": rate / topology.chips,
        "rows": rows,
        "decode_tokens_per_second_per_chip": rows * replicas / decode.total / topology.chips,
        "prompt_tokens_per_second_per_chip": engine.prefill_chunk * replicas / prompts.total / topology.chips,
        "mbu": _mbu(job, decode, topology, rows, job.config.mesh.tensor),
    }


def _mbu(job: Job, decode: Seconds, topology: Topology, rows: int, tensor: int) -> float:
    engine = engine_of(job)
    model = job.model
    embedding = 2.0 * model.vocab_size * model.hidden_size / tensor if not model.tie_word_embeddings else 0.0
    ideal = weight_bytes(model, engine.weights, tensor) - embedding
    ideal += rows * job.workload.live_tokens * token_bytes(model, engine.cache_dtype or "bfloat16", tensor)
    return ideal * topology.chip.devices / topology.chip.bandwidth / decode.total


def _sft(job: Job, seconds: Mapping[str, Seconds], topology: Topology) -> tuple[tuple[Part, ...], dict[str, float]]:
    step = seconds["step"]
    tokens = job.config.rows_per_step * job.row_length
    facts = {
        "step_seconds": step.total,
        "run_seconds": step.total * job.config.last_step,
        "tokens_per_second": tokens / step.total,
        "tokens_per_second_per_chip": tokens / step.total / topology.chips,
        "mfu": _mfu(
            job.model, topology, tokens=tokens, passes=_products(job), seconds=step.total, context=_mean_context(job)
        ),
    }
    return (Part("step", "step", 1.0, step),), facts


def _rl(
    job: Job, seconds: Mapping[str, Seconds], topology: Topology, rows: int
) -> tuple[tuple[Part, ...], dict[str, float]]:
    config, lengths = job.config, job.workload
    decode_mesh = _mesh_of(job, "decode")
    replicas = decode_mesh.data * decode_mesh.fsdp
    samples = config.rollout.samples_per_step
    completed = samples * (lengths.prompt_tokens + lengths.completion_tokens)
    micro_batches = max(1.0, completed / job.row_length / config.rows_per_micro_batch)
    # All of a group begin with one prompt, which the prefix cache computes once.
    prompts = config.rollout.prompts_per_step / replicas * lengths.prompt_tokens / engine_of(job).prefill_chunk
    runs = {
        "decode": ("rollout", max(1.0, samples / replicas / rows) * lengths.completion_tokens),
        "prompts": ("rollout", max(1.0, prompts)),
        "reward model": ("reward", micro_batches),
        "log-probabilities": ("log-probabilities", micro_batches),
        "reference": ("log-probabilities", micro_batches),
        "gradient": ("gradient", micro_batches * config.passes_per_step),
        "update": ("update", float(config.updates_per_step * config.passes_per_step)),
        "sync": ("sync", 1.0),
    }
    parts = tuple(Part(phase, name, count, seconds[name]) for name, (phase, count) in runs.items() if name in seconds)
    step = sum(part.total for part in parts)
    learning = sum(part.total for part in parts if part.name == "gradient")
    rate = samples * lengths.completion_tokens / step
    return parts, {
        "step_seconds": step,
        "run_seconds": step * config.last_step,
        "tokens_per_second": rate,
        "tokens_per_second_per_chip": rate / topology.chips,
        "rows": rows,
        "mfu": _mfu(
            job.model,
            topology,
            tokens=completed * config.passes_per_step,
            passes=_products(job),
            seconds=learning,
            context=_mean_context(job),
        ),
        "mbu": _mbu(job, seconds["decode"], topology, rows, decode_mesh.tensor),
    }


def _products(job: Job) -> float:
    """Products of each weight with a token: its own gradient is one, which frozen weights beside adapters have not."""
    return 2.0 if job.config.lora is not None else 3.0


def _mfu(
    model: ModelConfig, topology: Topology, *, tokens: float, passes: float, seconds: float, context: float
) -> float:
    """The products of the model itself, nothing that is computed again, over the peak ("PaLM", appendix B)."""
    used = model.num_parameters - (0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size)
    products = 2.0 * passes * used * tokens
    products += attention_flops(
        queries=tokens,
        context=context,
        heads=model.num_layers * model.num_heads,
        head_dim=model.head_dim,
        passes=3.0,
    )
    return products / (seconds * topology.chip.bf16 * topology.chips)
