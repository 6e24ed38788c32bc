"""Which meshes and types a job could have on some chips, by closed forms; the best of them is then compiled.

The forms count what is unavoidable: weights and cache once a step, products, and two exchanges a layer. They order
candidates; the figures that are reported are a compiler's.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

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
_ROWS_A_SHARD = (1, 2, 4, 8)


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
    """Of the weights of an engine on one device: what its format does not quantise is bfloat16."""
    projections = model.num_layers * (
        2 * model.hidden_size * (model.num_heads + model.num_kv_heads) * model.head_dim
        + 3 * model.hidden_size * model.intermediate_size
    )
    format = None if weights is None else parse_weights(weights)
    each = 2.0 if format is None else format.bits / 8 + (4.0 / format.group if format.group else 0.0)
    embedding = 2.0 * model.vocab_size * model.hidden_size
    head = 0.0 if model.tie_word_embeddings else embedding / (2.0 if format is not None and format.head else 1.0)
    split = tensor if model.vocab_size % tensor == 0 else 1
    return projections * each / tensor + (embedding + head) / split


def token_bytes(model: ModelConfig, cache_dtype: str, tensor: int) -> float:
    """Of one token's keys and values of all layers on one device; those of 8 bits have a float32 scale a head."""
    heads = math.lcm(model.num_kv_heads, tensor) / tensor
    width = -(-model.head_dim // 128) * 128
    each = width * {"float32": 4.0, "bfloat16": 2.0}.get(cache_dtype, 1.0 + 4.0 / width)
    return 2.0 * model.num_layers * heads * each


def engine_choices(
    model: ModelConfig, topology: Topology, workload: Workload, *, usable: int, engine: EngineConfig
) -> list[EngineChoice]:
    """What fits, the fastest first; `engine` says what is not up for choice."""
    longest = min(engine.max_context or model.max_context, model.max_context)
    # 8-bit products take 8-bit weights.
    formats = {engine.weights} if engine.activations else {engine.weights, None, "int8", "int4"}
    caches = {engine.cache_dtype or "bfloat16", "bfloat16", topology.chip.cache_dtype}
    found = []
    for tensor in tensor_sizes(model, topology.devices // topology.slices):
        for weights in formats:
            for cache_dtype in caches:
                left = CACHE_SHARE * (usable - weight_bytes(model, weights, tensor))
                tokens = left / token_bytes(model, cache_dtype, tensor)
                if tokens < longest:
                    continue
                mean = min(longest, workload.prompt_tokens + workload.completion_tokens)
                fitting = min(_MOST_ROWS, int(tokens / mean))
                rows = 1 << (fitting.bit_length() - 1)
                mesh = MeshConfig(data=topology.devices // tensor, tensor=tensor)
                speed = engine_speed(model, topology, workload, (mesh, rows), (weights, cache_dtype))
                found.append(EngineChoice(mesh, weights, cache_dtype, rows, speed))
    # Sets have no order: of equal ones the first by name.
    return sorted(found, key=lambda choice: (-choice.tokens_per_second, *choice.settings))


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
class TrainWay:
    """How a training job computes a micro-batch.

    Attributes:
        mesh: Of the devices.
        remat: Whether activations are computed again in the backward pass.
        rows: Of a micro-batch on one batch shard.
    """

    mesh: MeshConfig
    remat: bool = True
    rows: int = 1

    @property
    def total_rows(self) -> int:
        """Of a micro-batch, over all shards."""
        return self.rows * self.mesh.data * self.mesh.fsdp

    def with_total(self, rows: int) -> "TrainWay":
        """The same with so many rows over all shards, or as it is where they do not divide over these."""
        shards = self.mesh.data * self.mesh.fsdp
        return self if rows % shards else replace(self, rows=rows // shards)


@dataclass(frozen=True)
class TrainChoice:
    """A way to train, and what it takes.

    Attributes:
        way: It.
        bytes_needed: On a device, estimated: state, gradients, and a micro-batch.
        seconds: Of a micro-batch, estimated.
    """

    way: TrainWay
    bytes_needed: float
    seconds: float

    @property
    def row_seconds(self) -> float:
        """Of one row, all devices at work."""
        return self.seconds / self.way.total_rows


@dataclass(frozen=True)
class Trained:
    """What is trained.

    Attributes:
        model: The architecture.
        row_length: Tokens of a row.
        lora: Whether only adapters are.
    """

    model: ModelConfig
    row_length: int
    lora: bool = False


def state_bytes(trained: Trained) -> float:
    """Of weights, moments and gradients on all devices; adapters beside bfloat16 weights are small."""
    return (2.0 if trained.lora else _TRAINED_BYTES + _GRADIENT_BYTES) * trained.model.num_parameters


def train_choices(
    trained: Trained, topology: Topology, *, usable: int, remat: Sequence[bool] = (True,), rows: Sequence[int] = (1,)
) -> list[TrainChoice]:
    """Ways of a training job that fit, the one with the least time a row first.

    Args:
        trained: What is trained.
        topology: Where.
        usable: Bytes of a device.
        remat: What may be chosen from.
        rows: Of a batch shard's micro-batch, the same.
    """
    ways = (
        TrainWay(mesh, again, count) for mesh in _train_meshes(trained, topology) for again in remat for count in rows
    )
    found = (train_choice(trained, topology, way) for way in ways)
    return by_speed(choice for choice in found if fits(choice, usable))


def fits(choice: TrainChoice, usable: int) -> bool:
    """Whether a device of so many bytes holds it, by estimate."""
    return choice.bytes_needed < _FILLED * usable


def by_speed(choices: Iterable[TrainChoice]) -> list[TrainChoice]:
    """The one with the least time a row first, of equal ones that with the fewest bytes."""
    return sorted(choices, key=lambda choice: (choice.row_seconds, choice.bytes_needed))


def all_train_choices(trained: Trained, topology: Topology, *, usable: int) -> list[TrainChoice]:
    """Those with everything up for choice."""
    return train_choices(trained, topology, usable=usable, remat=(True, False), rows=_ROWS_A_SHARD)


def _train_meshes(trained: Trained, topology: Topology) -> Iterator[MeshConfig]:
    within = topology.devices // topology.slices  # between slices, data alone is split
    for tensor in tensor_sizes(trained.model, within):
        for context in _context_sizes(within // tensor, trained.row_length):
            fsdp = within // (tensor * context)
            if trained.model.hidden_size % fsdp == 0:
                yield MeshConfig(data=topology.slices, fsdp=fsdp, context=context, tensor=tensor)


def _context_sizes(devices: int, row_length: int) -> list[int]:
    """Sizes of a context axis that divide these devices, and, beyond 1, a row into two pieces for each."""
    return [n for n in range(1, devices + 1) if devices % n == 0 and (n == 1 or row_length % (2 * n) == 0)]


def train_choice(trained: Trained, topology: Topology, way: TrainWay) -> TrainChoice:
    """Bytes and seconds of a micro-batch."""
    model, mesh, chip = trained.model, way.mesh, topology.chip
    shared = mesh.tensor * mesh.context  # devices that work on one row
    tokens = way.rows * trained.row_length / shared
    kept = tokens * model.num_layers * 2.0 * (model.hidden_size if way.remat else _activations(model))
    working = 12.0 * tokens * (model.hidden_size + model.intermediate_size)
    # Three passes over the products, adapters two; with rematerialisation one more of each layer's forward.
    passes = (2.0 if trained.lora else 3.0) + (1.0 if way.remat else 0.0)
    products = 2.0 * passes * model.num_parameters * tokens
    attended = 2.0 * (4.5 if way.remat else 3.5) * tokens * trained.row_length
    attended *= model.num_layers * model.num_heads * model.head_dim
    seconds = (products + attended) * chip.devices / chip.bf16
    gathered = Collective("all-gather", mesh.fsdp, shared, int(2 * model.num_parameters / mesh.tensor), 3)
    hidden = gathered.count * exchange_seconds(gathered, topology) if mesh.fsdp > 1 else 0.0
    return TrainChoice(
        way,
        state_bytes(trained) / (mesh.fsdp * mesh.tensor) + kept + working,
        max(seconds, hidden) + _waited(trained, topology, way),
    )


def _activations(model: ModelConfig) -> int:
    """Elements that the backward pass of a layer reads of each token, where none is computed again.

    The layer's input and that of its feed-forward, each before and after its norm (which is float32, and counts twice),
    queries, keys, values and what attention made of them, and of the feed-forward gate, its activation, up and product.
    """
    heads = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    return 6 * model.hidden_size + heads + 4 * model.intermediate_size


def _waited(trained: Trained, topology: Topology, way: TrainWay) -> float:
    """Seconds of the exchanges of a micro-batch that the next operation needs."""
    model, mesh, waited = trained.model, way.mesh, 0.0
    if mesh.tensor > 1:
        whole = int(way.rows * trained.row_length * model.hidden_size * 2 / mesh.context)
        exchanged = Collective("all-gather", mesh.tensor, 1, whole, (12 if way.remat else 8) * model.num_layers)
        waited += exchanged.count * exchange_seconds(exchanged, topology)
    if mesh.context > 1:
        # Keys and values of a row: gathered forward and once more backward, and their gradients scattered.
        heads = max(1, model.num_kv_heads // mesh.tensor)
        keys = int(2 * 2 * way.rows * trained.row_length * heads * model.head_dim)
        exchanged = Collective("all-gather", mesh.context, mesh.tensor, keys, 3 * model.num_layers)
        waited += exchanged.count * exchange_seconds(exchanged, topology)
    return waited
