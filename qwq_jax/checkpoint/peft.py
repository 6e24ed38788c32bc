"""LoRA adapters as the PEFT library stores them: a directory of adapter_config.json and adapter_model.safetensors.

| PEFT (base_model.model.model.layers.i. ...) | shape       | adapter, stacked          | layer i of it  |
|---------------------------------------------|-------------|---------------------------|----------------|
| self_attn.q_proj.lora_A.weight              | [rank, D]   | layers.attention.q_lora.a | [D, rank]      |
| self_attn.q_proj.lora_B.weight              | [N*H, rank] | layers.attention.q_lora.b | [rank, N, H]   |
| self_attn.o_proj.lora_A.weight              | [rank, N*H] | layers.attention.o_lora.a | [N, H, rank]   |

and so on for the other projections: the kernel's row in `checkpoint.names` gives both names and the sizes.
"""

import itertools
import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from pydantic import ValidationError

from qwq_jax.checkpoint.directory import Directory, explained, open_directory
from qwq_jax.checkpoint.huggingface import TensorInfo, TensorPlan, has_nonfinite, header_bytes, read_header, write_bytes
from qwq_jax.checkpoint.names import name_table
from qwq_jax.config.frozen import describe
from qwq_jax.config.lora import MODULES, LoraConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.model.lora import A, B, lora_spec

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings that do not change what an adapter computes once it is trained, or that its tensors tell again.
_SILENT = {"auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "inference_mode"} | {
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
# Ways to begin that leave the model's own weights as they are; others (PiSSA, OLoRA, ...) belong to changed ones.
_BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class AdapterRow:
    """One tensor of PEFT's, and where it lies in the stacked adapters.

    Example:
        `AdapterRow("base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight", "layers.attention.q_lora.a", 3,
        (rank, D))`.
    """

    source: str
    path: str
    layer: int
    shape: tuple[int, int]

    def to_source(self, stacked: np.ndarray) -> np.ndarray:
        """PEFT's matrix."""
        return stacked[self.layer].reshape(self.shape[::-1]).T

    def to_layer(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The layer, of this shape, of the stacked array."""
        return tensor.T.reshape(shape)


@dataclass(frozen=True)
class PeftAdapter:
    """What `read_adapter` found.

    Attributes:
        lora: The settings.
        params: Stacked float32 host arrays, as `qwq_jax.model.lora.lora_spec` lists them.
        base_model: What it was trained on, as PEFT's file says.
    """

    lora: LoraConfig
    params: dict[str, np.ndarray]
    base_model: str | None


def adapter_table(config: ModelConfig, lora: LoraConfig) -> tuple[AdapterRow, ...]:
    """Every tensor of an adapter, those of one stacked array together."""
    rows = []
    for row in name_table(config):
        stem, _, kind = row.source.rpartition(".")
        if kind == "weight" and stem.rpartition(".")[2] in lora.target_modules:
            _, layer, name = row.path.split(".", 2)
            outputs, inputs = row.source_shape
            for letter, suffix, shape in (("A", A, (lora.rank, inputs)), ("B", B, (outputs, lora.rank))):
                path = f"layers.{name.removesuffix('_kernel')}{suffix}"
                rows.append(AdapterRow(f"{_PREFIX}{stem}.lora_{letter}.weight", path, int(layer), shape))
    return tuple(sorted(rows, key=lambda row: (row.path, row.layer)))


def export_adapter(
    dest: str,
    adapters: Mapping[str, jax.Array | np.ndarray],
    config: ModelConfig,
    lora: LoraConfig,
    *,
    base_model: str | None = None,
    dtype: str = "float32",
) -> None:
    """Writes stacked adapters as PEFT does, in place of what was there; every process calls it, the first one writes.

    Args:
        dest: Local directory or ``gs://`` address.
        adapters: See `qwq_jax.model.lora`; one stacked array at a time is in host memory.
        config: The architecture.
        lora: The settings.
        base_model: Hub id or directory of the model that they were trained on, for ``AutoPeftModel`` and for people.
        dtype: What the tensors are stored in.

    Raises:
        ValueError: It cannot be written there.
    """
    rows = adapter_table(config, lora)
    assert {row.path for row in rows} == adapters.keys(), sorted(adapters)
    plans = [TensorPlan(row.source, np.dtype(dtype), row.shape) for row in rows]
    directory = open_directory(dest)
    with explained(f"cannot write {dest}"):
        with directory.create(WEIGHTS) if jax.process_index() == 0 else nullcontext() as file:
            if file is not None:
                file.write(header_bytes(plans))
            for path, group in itertools.groupby(rows, key=lambda row: row.path):
                stacked = _host(adapters[path])
                for row in group:
                    if file is not None:
                        write_bytes(file, np.ascontiguousarray(row.to_source(stacked), dtype))
        if jax.process_index() == 0:
            directory.write(CONFIG, (json.dumps(_settings(lora, base_model), indent=2) + "\n").encode())


def read_adapter(location: str, config: ModelConfig) -> PeftAdapter:
    """Reads an adapter of this architecture that PEFT, or `export_adapter`, wrote.

    Args:
        location: Local directory or ``gs://`` address.
        config: The architecture.

    Raises:
        ValueError: A file is missing or damaged, the adapter does what this program does not, or it is another
            model's.
    """
    directory = open_directory(location)
    with explained(f"cannot read {location}"):
        sizes = directory.sizes()
        for name in (CONFIG, WEIGHTS):
            if name not in sizes:
                raise ValueError(f"{location}/{name} is missing")
        settings = _read_settings(directory, f"{location}/{CONFIG}")
        tensors = {tensor.name: tensor for tensor in read_header(directory, WEIGHTS, sizes[WEIGHTS])}
        lora = _read_lora(settings, tensors, f"{location}/{CONFIG}")
        rows = adapter_table(config, lora)
        _check_tensors(rows, tensors, f"{location}/{WEIGHTS}")
        params = {path: np.empty(array.shape, np.float32) for path, array in lora_spec(config, lora).items()}
        for row in rows:
            value = _read_tensor(directory, tensors[row.source])
            if has_nonfinite(value):
                raise ValueError(f"{location}/{WEIGHTS}: {row.source} holds a value that is no finite number")
            params[row.path][row.layer] = row.to_layer(value, params[row.path].shape[1:])
    base_model = settings.get("base_model_name_or_path")
    return PeftAdapter(lora, params, base_model if isinstance(base_model, str) else None)


def _host(array: jax.Array | np.ndarray) -> np.ndarray:
    if jax.process_count() > 1 and isinstance(array, jax.Array):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _settings(lora: LoraConfig, base_model: str | None) -> dict[str, Any]:
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": {},
        "target_modules": list(lora.target_modules),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": lora.rslora,
    }


def _read_settings(directory: Directory, where: str) -> dict[str, Any]:
    try:
        settings = json.loads(directory.read(CONFIG))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{where} should hold a JSON object")
    return settings


def _read_lora(settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo], where: str) -> LoraConfig:
    """The settings, if this program computes what they say; which modules are adapted is seen from the tensors."""
    if settings.get("peft_type") != "LORA":
        raise ValueError(f'{where}: peft_type is {settings.get("peft_type")!r}, and only "LORA" is read')
    begun = settings.get("init_lora_weights", True)
    if begun not in _BEGINNINGS:
        raise ValueError(f"{where}: init_lora_weights {begun!r} means other weights of the model than its own")
    read = {"peft_type", "init_lora_weights", "r", "lora_alpha", "use_rslora"}
    for name, value in settings.items():
        if name not in read | _SILENT and value not in (None, False, "none") and value != {} and value != []:
            raise ValueError(f"{where}: {name} is {value!r}, which changes what an adapter does and is not supported")
    modules = tuple(m for m in MODULES if any(f".{m}.lora_" in name for name in tensors))
    if not modules:
        raise ValueError(f"{where}: none of {', '.join(MODULES)} has an adapter in {WEIGHTS}")
    alpha = settings.get("lora_alpha", 8)  # PEFT's defaults
    fields = {"rank": settings.get("r", 8), "alpha": alpha, "rslora": settings.get("use_rslora", False)}
    try:
        return LoraConfig(target_modules=modules, **fields)
    except ValidationError as error:
        raise ValueError(f"{where}: {describe(error)}") from None


def _check_tensors(rows: tuple[AdapterRow, ...], tensors: Mapping[str, TensorInfo], where: str) -> None:
    expected = {row.source: row.shape for row in rows}
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise ValueError(f"{where}: {name} is missing")
        if name not in expected:
            raise ValueError(f"{where}: {name} is no part of an adapter of this model")
        if tensors[name].shape != expected[name]:
            raise ValueError(
                f"{where}: {name} has shape {list(tensors[name].shape)}, but the model and the rank ask for "
                f"{list(expected[name])}"
            )


def _read_tensor(directory: Directory, tensor: TensorInfo) -> np.ndarray:
    value = np.empty(math.prod(tensor.shape), tensor.dtype)
    directory.read_into(tensor.file, tensor.start, value.view(np.uint8).data)
    return value.reshape(tensor.shape)
