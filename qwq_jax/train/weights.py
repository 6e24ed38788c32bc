"""Weights into training and out of it: stacked on the TRAIN layout inside, an ordinary checkpoint outside."""

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from qwq_jax.checkpoint.directory import explained, open_directory
from qwq_jax.checkpoint.huggingface import COMPANIONS
from qwq_jax.checkpoint.manifest import TensorRecord
from qwq_jax.checkpoint.names import name_table
from qwq_jax.checkpoint.store import Checkpoint, CheckpointWriter, restore_params
from qwq_jax.config.lora import LoraConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.model.lora import adapted_kernel, lora_spec, merge
from qwq_jax.model.params import random_params, stack
from qwq_jax.model.spec import model_spec, stacked_spec
from qwq_jax.sharding import Layout
from qwq_jax.train.state import Params


def random_weights(config: ModelConfig, *, seed: int, dtype: Any, layout: Layout) -> Params:
    """Fresh stacked parameters, the same for every mesh."""

    def make(key: jax.Array) -> Params:
        return stack(random_params(config, key, dtype), config.num_layers)

    return jax.jit(make, out_shardings=stacked_shardings(config, layout))(jax.random.key(seed))


def checkpoint_weights(checkpoint: Checkpoint, *, dtype: Any, layout: Layout) -> Params:
    """Stacked parameters of a checkpoint; each process reads what its devices hold."""
    params = restore_params(checkpoint, layout, dtype)
    arrange = jax.jit(
        partial(stack, num_layers=checkpoint.config.num_layers),
        out_shardings=stacked_shardings(checkpoint.config, layout),
    )
    return arrange(params)


def stacked_shardings(config: ModelConfig, layout: Layout) -> dict[str, NamedSharding]:
    """Where each stacked parameter lies."""
    spec = stacked_spec(model_spec(config), config.num_layers)
    return {name: layout.sharding(array.axes, array.shape) for name, array in spec.items()}


def abstract_params(config: ModelConfig, *, dtype: Any, layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
    """Stacked parameters before they exist: shapes, types and shardings."""
    spec = stacked_spec(model_spec(config), config.num_layers)
    places = stacked_shardings(config, layout)
    return {
        name: jax.ShapeDtypeStruct(array.shape, np.dtype(dtype), sharding=places[name]) for name, array in spec.items()
    }


def abstract_adapters(config: ModelConfig, lora: LoraConfig, *, layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
    """Stacked adapters before they exist: shapes, types and shardings."""
    return {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=layout.sharding(array.axes, array.shape))
        for name, array in lora_spec(config, lora).items()
    }


def merged_weights(base: Params, adapters: Params, lora: LoraConfig) -> Params:
    """The stacked model with its adapters merged in, laid out as `base`, whose arrays are used up: keep none of them.

    For weights that an engine shall have while training goes on, call `merge` inside the `jax.jit` that moves them.
    """
    kernels = {name: base[name] for name in map(adapted_kernel, adapters)}
    places = {name: kernel.sharding for name, kernel in kernels.items()}
    run = jax.jit(partial(merge, lora=lora), donate_argnums=0, out_shardings=places)
    return {**base, **run(kernels, adapters)}


def companion_files(directory: str) -> dict[str, bytes]:
    """Tokenizer, chat template and the like of a model directory, by name; not its config.json."""
    source = open_directory(directory)
    with explained(f"cannot read {directory}"):
        present = source.sizes()
        return {name: source.read(name) for name in COMPANIONS if name in present and name != "config.json"}


def write_checkpoint(
    dest: str,
    params: Params,
    config: ModelConfig,
    *,
    dtype: str,
    files: Mapping[str, bytes],
    identity: str,
    origin: str,
) -> None:
    """Writes stacked parameters as a checkpoint like those of ``convert``; a second call completes it.

    Every process calls it, the first one writes; one layer's parameter is in host memory at a time.
    """
    writer = None
    if jax.process_index() == 0:
        writer = CheckpointWriter(dest, model_spec(config, dtype), identity=identity, origin=origin)
    for row in name_table(config):
        array = layer_value(params, row.path)
        if writer is not None and not writer.is_committed and row.path not in writer.finished:
            stored = np.asarray(array, dtype)
            exported = np.ascontiguousarray(row.to_source(stored))
            digest = hashlib.sha256(exported.view(np.uint8).data).hexdigest()
            record = TensorRecord(
                path=row.path,
                shape=stored.shape,
                dtype=dtype,
                source=row.source,
                source_dtype=dtype,
                sha256=digest,
                stored_sha256=digest,
            )
            writer.write(stored, record)
    if writer is not None and not writer.is_committed:
        written = json.dumps(config.to_huggingface(dtype), indent=2).encode()
        writer.commit(config, {"config.json": written, **files})


def layer_value(params: Params, path: str) -> np.ndarray:
    """The array that a checkpoint knows as `path`, on the host: of a stacked one, the slice of its layer."""
    parts = path.split(".")
    array = params[path] if parts[0] != "layers" else params[".".join(["layers", *parts[2:]])][int(parts[1])]
    if jax.process_count() > 1:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
