"""Which meshes and types a job could have on some chips, by closed forms; the best of them is then compiled.

The forms count what is unavoidable: weights and cache once a step, products, and two exchanges a layer. They order
candidates; the figures that are reported are a compiler's.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from qwq_jax.config.engine import CACHE_SHARE, EngineConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.plan import Workload
from qwq_jax.config.weights import parse_weights
from qwq_jax.plan.chips import Topology
from qwq_jax.plan.cost import exchange_seconds
from qwq_jax.plan.hlo import Collective

_MOST_ROWS = 1024
_TRAINED_BYTES = 12.0  # float32 weight and two moments
_GRADIENT_BYTES = 4.0
# Of a device's memory; the rest is for what the forms do not count.
_FILLED = 0.92


@dataclass(frozen=True)
class EngineChoice:
    """A way to run inference.

    Attributes:
        mesh: Of the devices.
        weights: As `EngineConfig.weights`.
        cache_dtype: As `EngineConfig.cache_dtype`.
        rows: As `EngineConfig.max_sequences`: what memory has room for, at the workload's mean length.
        tokens_per_second: Of a chip, estimated.
    """

    mesh: MeshConfig
    weights: str | None
    cache_dtype: str
    rows: int
    tokens_per_second: float

    @property
    def settings(self) -> list[str]:
        """As words for ``--set``."""
        words = [f"mesh.data={self.mesh.data}", f"mesh.tensor={self.mesh.tensor}", f"engine.max_sequences={self.rows}"]
        words += [f"engine.weights={self.weights}"] if self.weights else []
        return [*words, f"engine.cache_dtype={self.cache_dtype}"]


def tensor_sizes(model: ModelConfig, devices: int) -> list[int]:
    """Sizes of a tensor axis that divide these devices, and the heads and the feed-forward of this model."""
    return [
        size
        for size in range(1, devices + 1)
        if devices % size == 0
        and model.num_heads % math.lcm(model.num_kv_heads, size) == 0
        and model.intermediate_size % size == 0
    ]


def weight_bytes(model: ModelConfig, weights: str | None, tensor: int) -> float:
    """Of the weights of an engine on one device: projections quantised or bfloat16, the rest bfloat16."""
    projections = model.num_layers * (
        2 * model.hidden_size * (model.num_heads + model.num_kv_heads) * model.head_dim
        + 3 * model.hidden_size * model.intermediate_size
    )
    format = None if weights is None else parse_weights(weights)
    each = 2.0 if format is None else format.bits / 8 + (4.0 / format.group if format.group else 0.0)
    rest = (1 if model.tie_word_embeddings else 2) * model.vocab_size * model.hidden_size
    split = tensor if model.vocab_size % tensor == 0 else 1
    return projections * each / tensor + rest * 2.0 / split


def token_bytes(model: ModelConfig, cache_dtype: str, tensor: int) -> float:
    """Of one token's keys and values of all layers on one device; 8-bit ones have a float32 scale a head."""
    heads = math.lcm(model.num_kv_heads, tensor) / tensor
    width = -(-model.head_dim // 128) * 128
    each = width * 2.0 if cache_dtype == "bfloat16" else width + 4.0
    return 2.0 * model.num_layers * heads * each


def engine_choices(
    model: ModelConfig, topology: Topology, workload: Workload, *, usable: int, engine: EngineConfig
) -> list[EngineChoice]:
    """What fits, the fastest first; `engine` says what is not up for choice."""
    longest = min(engine.max_context or model.max_context, model.max_context)
    found = []
    for tensor in tensor_sizes(model, topology.devices // topology.slices):
        for weights in (None, "int8", "int4"):
            for cache_dtype in ("bfloat16", topology.chip.cache_dtype):
                left = CACHE_SHARE * (usable - weight_bytes(model, weights, tensor))
                tokens = left / token_bytes(model, cache_dtype, tensor)
                if tokens < longest:
                    continue
                fitting = min(_MOST_ROWS, int(tokens / (workload.prompt_tokens + workload.completion_tokens)))
                if fitting < 1:
                    continue
                rows = 1 << (fitting.bit_length() - 1)
                mesh = MeshConfig(data=topology.devices // tensor, tensor=tensor)
                speed = engine_speed(model, topology, workload, (mesh, rows), (weights, cache_dtype))
                found.append(EngineChoice(mesh, weights, cache_dtype, rows, speed))
    return sorted(found, key=lambda choice: -choice.tokens_per_second)


def engine_speed(
    model: ModelConfig,
    topology: Topology,
    workload: Workload,
    arranged: tuple[MeshConfig, int],
    formats: tuple[str | None, str],
) -> float:
    """Tokens a second of a chip, estimated, with a mesh and so many rows a replica, of these weights and cache.

    The time is that of a decode step, and of the prompts that come in meanwhile.
    """
    (mesh, rows), (weights, cache_dtype) = arranged, formats
    tensor = mesh.tensor
    chip = topology.chip
    read = weight_bytes(model, weights, tensor) + rows * workload.live_tokens * token_bytes(model, cache_dtype, tensor)
    products = 2.0 * (model.num_parameters - model.vocab_size * model.hidden_size) / tensor
    step = max(read * chip.devices / chip.bandwidth, rows * products * chip.devices / chip.bf16)
    if tensor > 1:
        reduced = Collective("all-reduce", tensor, 1, rows * model.hidden_size * 2, 2 * model.num_layers)
        step += reduced.count * exchange_seconds(reduced, topology)
    prompts = rows * workload.prompt_tokens / workload.completion_tokens * products * chip.devices / chip.bf16
    return rows * (mesh.size // tensor) / (step + prompts) / topology.chips


@dataclass(frozen=True)
class TrainChoice:
    """A way to train.

    Attributes:
        mesh: Of the devices.
        bytes_needed: On a device, estimated: state, gradients, and a micro-batch of one row a batch shard.
        seconds: Of such a micro-batch, estimated.
        rows: Of a micro-batch: one a batch shard.
    """

    mesh: MeshConfig
    bytes_needed: float
    seconds: float
    rows: int


def train_choices(
    model: ModelConfig, topology: Topology, *, usable: int, row_length: int, lora: bool = False
) -> list[TrainChoice]:
    """Meshes of a training job that fit, the one with the least time a row first."""
    found = list(_train_choices(model, topology, row_length=row_length, lora=lora))
    return sorted(
        (choice for choice in found if choice.bytes_needed < _FILLED * usable),
        key=lambda choice: choice.seconds / choice.rows,
    )


def _train_choices(model: ModelConfig, topology: Topology, *, row_length: int, lora: bool) -> Iterator[TrainChoice]:
    within = topology.devices // topology.slices  # between slices, data alone is split
    for tensor in tensor_sizes(model, within):
        for context in _context_sizes(within // tensor, row_length):
            fsdp = within // (tensor * context)
            if model.hidden_size % fsdp == 0:
                mesh = MeshConfig(data=topology.slices, fsdp=fsdp, context=context, tensor=tensor)
                yield _train_choice(model, topology, mesh, row_length=row_length, lora=lora)


def _context_sizes(devices: int, row_length: int) -> list[int]:
    """Sizes of a context axis that divide these devices, and, beyond 1, a row into two pieces for each."""
    return [n for n in range(1, devices + 1) if devices % n == 0 and (n == 1 or row_length % (2 * n) == 0)]


def _train_choice(
    model: ModelConfig, topology: Topology, mesh: MeshConfig, *, row_length: int, lora: bool
) -> TrainChoice:
    """Bytes and seconds of a micro-batch of one row a batch shard."""
    chip, parameters, tensor = topology.chip, model.num_parameters, mesh.tensor
    shared = tensor * mesh.context  # devices that work on one row
    state = (2.0 if lora else _TRAINED_BYTES + _GRADIENT_BYTES) * parameters / (mesh.fsdp * tensor)
    width = model.hidden_size + model.intermediate_size
    kept = model.num_layers * row_length * model.hidden_size * 2.0 / shared
    working = 12.0 * row_length * width / shared
    # With rematerialisation three passes over the products and one more of each layer's forward.
    products = (6.0 if lora else 8.0) * parameters * row_length / shared
    attended = 4.5 * 2.0 * row_length**2 * model.num_layers * model.num_heads * model.head_dim / shared
    seconds = (products + attended) * chip.devices / chip.bf16
    gathered = Collective("all-gather", mesh.fsdp, shared, int(2 * parameters / tensor), 3)
    hidden = gathered.count * exchange_seconds(gathered, topology) if mesh.fsdp > 1 else 0.0
    waited = 0.0
    if tensor > 1:
        whole = int(row_length * model.hidden_size * 2 / mesh.context)
        exchanged = Collective("all-gather", tensor, 1, whole, 12 * model.num_layers)
        waited += exchanged.count * exchange_seconds(exchanged, topology)
    if mesh.context > 1:
        # Keys and values of a row: gathered forward and once more backward, and their gradients scattered.
        heads = max(1, model.num_kv_heads // tensor)
        keys = int(2 * 2 * row_length * heads * model.head_dim)
        exchanged = Collective("all-gather", mesh.context, tensor, keys, 3 * model.num_layers)
        waited += exchanged.count * exchange_seconds(exchanged, topology)
    return TrainChoice(mesh, state + kept + working, max(seconds, hidden) + waited, mesh.data * mesh.fsdp)
