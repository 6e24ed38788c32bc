"""torch's side of `tools.bench_gpu`: transformers' model of random weights, its LoRA by PEFT, its weights for JAX.

The weights are drawn on the device, so that no file of the model's size is needed, and handed to JAX without a copy of
the whole: each group of layers is rearranged, and its originals are forgotten.
"""

import gc
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model

from qwq_jax.checkpoint.names import name_table
from qwq_jax.config.model import ModelConfig
from qwq_jax.model.params import Params
from qwq_jax.sharding import Layout

DEVIATION = 0.02


def synchronize(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def random_model(config: ModelConfig, dtype: str, device: str) -> Any:
    """Qwen2 of transformers; matrices and biases normal, norms near 1."""
    described = transformers.Qwen2Config(**config.to_huggingface(dtype))
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            described, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, DEVIATION)
    model.generation_config.eos_token_id = None
    return model.eval()


def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits `[B, T, V]` in float32 of tokens `[B, T]`."""
    with torch.no_grad():
        return model(torch.tensor(tokens, device=model.device)).logits.float().cpu().numpy()


def lora_steps(
    model: Any, rows: np.ndarray, *, rank: int, learning_rate: float, steps: int, device: str
) -> tuple[list[float], list[float]]:
    """Steps of AdamW on adapters of all projections, activations computed again; the model is left as it was.

    Args:
        model: It.
        rows: Tokens `[A, B, T + 1]`: A micro-batches of T targets a row.
        rank: Of the adapters, in float32 as PEFT makes them.
        learning_rate: Of each step.
        steps: How many.
        device: Where the model is.

    Returns:
        Losses and seconds of the steps.
    """
    peft = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", lora_dropout=0.0))
    peft.train()
    peft.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    peft.enable_input_require_grads()
    trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    losses, seconds = [], []
    for _ in range(steps):
        synchronize(device)
        began = time.perf_counter()
        total = 0.0
        for micro in rows:
            ids = torch.tensor(micro, device=device)
            loss = peft(input_ids=ids, labels=ids, use_cache=False).loss / len(rows)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        losses.append(total)
        seconds.append(time.perf_counter() - began)
    peft.disable_input_require_grads()
    peft.gradient_checkpointing_disable()
    peft.unload()
    model.eval()
    return losses, seconds


def take_weights(model: Any, config: ModelConfig, layout: Layout, device: str) -> Params:
    """The weights as stacked arrays of JAX, which keep torch's memory; the model is of no use after it."""
    tensors = dict(model.named_parameters())
    groups: dict[str, list[Any]] = {}
    for row in name_table(config):
        parts = row.path.split(".")
        name = ".".join([parts[0], *parts[2:]]) if parts[0] == "layers" else row.path
        groups.setdefault(name, []).append(row)
    params = {}
    for name, rows in groups.items():
        with torch.no_grad():
            values = [tensors[row.source].reshape(row.factors).permute(row.order) for row in rows]
            joined = torch.stack(values) if name.startswith("layers.") else values[0].contiguous()
        del values
        for row in rows:
            tensors[row.source].data = torch.empty(0, dtype=joined.dtype, device=device)
        forget(device)
        synchronize(device)
        axes = (None,) * joined.ndim
        params[name] = jax.device_put(jax.dlpack.from_dlpack(joined.detach()), layout.sharding(axes))
    return params


def forget(device: str) -> None:
    """Gives memory that nobody uses back to the device."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def peak_bytes(device: str) -> int | None:
    """Most memory that torch has had since it was asked last; None on a CPU."""
    if device != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def peaks(device: str, sizes: Sequence[int] = (8192, 2**30)) -> tuple[float, float]:
    """What torch does here: FLOP/s of a product of bfloat16 squares, and bytes/s read and written by a copy."""
    side, length = sizes
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    x = torch.empty(length, device=device, dtype=torch.uint8)
    y = torch.empty_like(x)
    product = best_of(lambda: torch.matmul(a, b), device)
    copy = best_of(lambda: y.copy_(x), device)
    return 2 * side**3 / product, 2 * length / copy


def best_of(run: Any, device: str, times: int = 5) -> float:
    """Seconds of one of ten calls in a row, the best of some such rows."""
    found = []
    for _ in range(times):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(10):
            run()
        synchronize(device)
        found.append((time.perf_counter() - began) / 10)
    return min(found)
