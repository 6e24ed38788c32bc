"""Cases of tokamax's splash attention for `kernel_schedule`, where tokamax is installed.

Only its kernel is loaded, not the package around it, whose many dependencies are not needed for that.
"""

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from schedule_cases import BF16, F32, HEADS, WIDTH, Case, Kernel, Part, Shape, array, fetches, grid_loop, ideal_forward

PACKAGE = "tokamax._src.ops.experimental.tpu.splash_attention"


def _load(name: str) -> Any:
    """A module of tokamax's splash attention; the packages around it stay empty.

    Raises:
        ValueError: Tokamax is not installed.
    """
    if PACKAGE in sys.modules:
        return importlib.import_module(f"{PACKAGE}.{name}")
    found = importlib.util.find_spec("tokamax")
    if found is None or found.origin is None:
        raise ValueError("tokamax is not installed: pip install --no-deps tokamax")
    path = Path(found.origin).parent
    for depth in range(1, PACKAGE.count(".") + 2):
        names = PACKAGE.split(".")[:depth]
        module = types.ModuleType(".".join(names))
        module.__path__ = [str(path.joinpath(*names[1:]))]
        sys.modules.setdefault(module.__name__, module)
    return importlib.import_module(f"{PACKAGE}.{name}")


def _forward(shape: Shape, *, scheduler: bool) -> Case:
    masks, module = _load("splash_attention_mask"), _load("splash_attention_kernel")
    names = ("block_q", "block_kv", "block_kv_compute")
    config = module.SplashConfig(**dict(zip(names, shape.sizes, strict=True)), use_experimental_scheduler=scheduler)
    with jax.default_device(jax.devices("cpu")[0]):
        kernel = module.make_splash_mqa_single_device(masks.CausalMask((shape.tokens,) * 2), config=config)
    info = kernel.fwd_mask_info
    rows, columns, mixed = (np.asarray(x) for x in (info.active_rows, info.active_cols, info.block_mask == 1))
    count = int(np.asarray(info.num_active_blocks)[0])
    rows, columns, mixed = rows[:count], columns[:count], mixed[:count]
    blocks, masked = len(np.unique(rows)), int(mixed.sum())
    inside = [
        Part("init", HEADS * blocks),
        Part("whole", HEADS * (count - masked)),
        Part("mixed", HEADS * masked),
        Part("end", HEADS * blocks),
    ]
    # The length of the grid is an array, so the loop over it is entered through a test.
    parts = (Part("any step", 1, grid_loop(HEADS * count, inside)),)
    block_q, block_kv = shape.sizes[:2]
    head = np.arange(HEADS)[:, None]
    queries, keys = fetches(head, rows[None]) * block_q, fetches(np.broadcast_to(columns, (HEADS, count))) * block_kv
    moved = {"q, out": 2 * queries * WIDTH * BF16, "k, v": 2 * keys * WIDTH * BF16}
    moved |= {"q_sequence": fetches(np.broadcast_to(rows, (HEADS, count))) * block_q * WIDTH * F32}
    return Case(
        kernel,
        (array(HEADS, shape.tokens, WIDTH), *[array(shape.tokens, WIDTH)] * 2),
        (Kernel("splash_mqa_fwd_no_residuals", parts, moved),),
        ideal_forward(shape.tokens, 0),
    )


TOKAMAX: dict[tuple[str, str], Callable[[Shape], Case]] = {
    ("forward", "tokamax"): functools.partial(_forward, scheduler=False),
    ("forward", "tokamax_scheduler"): functools.partial(_forward, scheduler=True),
}
