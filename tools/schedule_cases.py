"""What `kernel_schedule` measures: how to build each kernel, and how often a call executes each of its regions.

The counts come from the lists of visits that the kernels themselves follow, so a case is exact; where the compiler's
regions are not those described here the tool stops.

All cases are one row of T tokens, 5 query heads of 128 over one kv head, bf16, causal: QwQ-32B on 8 chips. To add a
kernel, write a function `Shape -> Case` and enter it in CASES.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from schedule_parse import Part

from qwq_jax.kernels.attention.flash import LOG2_E, Sizes, flash_forward
from qwq_jax.kernels.attention.flash_vjp import flash_backward
from qwq_jax.kernels.attention.steps import FIRST, FULL, LAST, NEW, Steps, plan_steps

HEADS, WIDTH = 5, 128
BF16, F32 = 2, 4


@dataclass(frozen=True)
class Shape:
    """One measurement to make.

    Attributes:
        tokens: Tokens of the row (of the context, in decode).
        sizes: Tile sizes, as many as the case takes.
        parts: Cores that share the call (2 on chips whose two cores are one device).
        chip: "v5e" and so on.
    """

    tokens: int
    sizes: tuple[int, ...]
    parts: int = 1
    chip: str = "v5e"


@dataclass(frozen=True)
class Kernel:
    """A Pallas kernel of a case.

    Attributes:
        name: As in its `pallas_call`.
        parts: Its regions outside and inside the grid loop.
        moved: Bytes that its blocks move between HBM and the chip, by operand.
    """

    name: str
    parts: tuple[Part, ...]
    moved: dict[str, int]


@dataclass(frozen=True)
class Case:
    """A function to compile and what is expected of it.

    Attributes:
        function: To be jitted.
        arguments: Shapes and dtypes.
        kernels: Pallas kernels whose time counts; others of the program are left out.
        ideal: Bytes if every operand and result moved once.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    kernels: tuple[Kernel, ...]
    ideal: int


def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """An argument."""
    return jax.ShapeDtypeStruct(shape, dtype)


def fetches(*indices: np.ndarray) -> int:
    """How often a pipeline moves a block whose index in each step (in order) is given: whenever it changes."""
    flat = np.stack([np.ravel(index) for index in np.broadcast_arrays(*indices)], axis=1)
    return 1 + int((flat[1:] != flat[:-1]).any(axis=1).sum())


def grid_loop(steps: int, inside: Sequence[Part], *, cores: int = 1, share: int | None = None) -> tuple[Part, ...]:
    """The loop over a grid: two trips more than steps, to fill and to empty the pipeline; a guard around the body.

    Args:
        steps: Of all cores together.
        inside: Parts of the body.
        cores: Cores that share the grid.
        share: Steps of the core that has most; None: an even share.
    """
    body = Part("step", steps, tuple(inside))
    # Whether two cores share the grid is the runtime's choice: some programs are compiled to walk all of it.
    trips = ((share or steps // cores) + 2, steps + 2)
    return (Part("grid", steps + 2 * cores, (body,), loop=True, trips=trips),)


def on_first_core(shape: Shape, parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """A kernel that is not split: on v5p its second core jumps over all of it."""
    return (Part("first core", 1, parts),) if shape.chip == "v5p" else parts


def _set(bits: np.ndarray, mask: int) -> int:
    return int(((bits & mask) != 0).sum())


def _visits(shape: Shape, *, by_key: bool) -> tuple[Steps, Sizes]:
    sizes = Sizes(*shape.sizes[:3], parts=shape.parts, looped=any(shape.sizes[3:]))
    return plan_steps(shape.tokens, None, **sizes.lists, by_key=by_key), sizes


def _partial(bits: np.ndarray) -> np.ndarray:
    """The visits that are not full."""
    return bits[(bits != 0) & (bits & FULL == 0)]


def _mixed(partial: np.ndarray, chunks: int) -> np.ndarray:
    """`[visits, chunks]` bool: which chunks are masked because some of their pairs are not visible."""
    return (partial[:, None] >> (12 + np.arange(chunks))) & 1 == 1


def _partial_forward(bits: np.ndarray, chunks: int) -> tuple[Part, ...]:
    """What a partial visit of the forward does: whole chunks in pieces of powers of two, then masked ones."""
    partial = _partial(bits)
    whole, mixed = (partial >> 8) & 15, int(_mixed(partial, chunks).sum())
    largest = (chunks - 1).bit_length() - 1
    pieces = [Part(f"{1 << i} whole chunks", _set(whole, 1 << i)) for i in range(largest, -1, -1)]
    if chunks == 1:
        # The kernel asks for single whole chunks even where a whole chunk is a full visit.
        return (Part("1 whole chunks", 0), Part("mixed chunk", mixed))
    return (*pieces, Part("chunks", partial.size * chunks, (Part("mixed chunk", mixed),), loop=True, trips=(chunks,)))


def _whole_chunks(bits: np.ndarray) -> Part:
    """The loop over chunks that are visible throughout, and the guard around it."""
    whole = (bits >> 8) & 15
    return Part("whole", int((whole > 0).sum()), (Part("chunks", int(whole.sum()), loop=True),))


def _ours_forward(shape: Shape, *, with_lse: bool) -> Case:
    steps, sizes = _visits(shape, by_key=False)
    bits = np.asarray(steps.bits)
    outer, inner = np.asarray(steps.outer), np.asarray(steps.inner)
    chunks = sizes.block_kv // sizes.chunk
    inside = [
        Part("begin", shape.parts),
        _whole_chunks(bits) if sizes.looped else Part("full", _set(bits, FULL)),
        Part("partial", _partial(bits).size, _partial_forward(bits, chunks)[-1 if sizes.looped else 0 :]),
        Part("last", _set(bits, LAST)),
    ]
    T = shape.tokens
    rows = fetches(outer) * sizes.block_q
    moved = {"q": rows * HEADS * WIDTH * BF16, "k, v": 2 * fetches(inner) * sizes.block_kv * WIDTH * BF16}
    moved |= {"out": rows * HEADS * WIDTH * BF16} | ({"lse": rows * HEADS * F32} if with_lse else {})
    return Case(
        lambda q, k, v: flash_forward(q, k, v, None, scale=1 / LOG2_E, sizes=sizes, with_lse=with_lse),
        (array(1, T, HEADS, WIDTH), array(1, T, 1, WIDTH), array(1, T, 1, WIDTH)),
        (Kernel("flash_forward", grid_loop(bits.size, inside, cores=shape.parts), moved),),
        ideal_forward(T, F32 if with_lse else 0),
    )


def ideal_forward(tokens: int, lse: int) -> int:
    """Bytes of q, k, v, out once, and `lse` bytes a row and head."""
    return tokens * (2 * HEADS + 2) * WIDTH * BF16 + lse * tokens * HEADS


def _ideal_backward(tokens: int) -> int:
    """Bytes of q, d_out, dq, k, v, dk, dv and two float32 numbers a row."""
    return tokens * (3 * HEADS + 4) * WIDTH * BF16 + 2 * F32 * tokens * HEADS


def _ours_backward(shape: Shape) -> Case:
    steps, sizes = _visits(shape, by_key=True)
    bits = np.asarray(steps.bits)
    outer, inner = np.asarray(steps.outer), np.asarray(steps.inner)
    chunks = sizes.block_kv // sizes.chunk
    whole, mixed = int(((_partial(bits) >> 8) & 15).sum()), int(_mixed(_partial(bits), chunks).sum())
    visits, new, full = _set(bits, -1), _set(bits, NEW), _set(bits, FULL)
    inside = [
        Part("first", _set(bits, FIRST)),
        Part("read dq", visits - new, optional=True),
        Part("full", full),
        Part(
            "partial",
            visits - full,
            (
                Part(
                    "chunks",
                    (visits - full) * chunks,
                    (Part("whole chunk", whole), Part("mixed chunk", mixed)),
                    loop=True,
                    trips=(chunks,),
                ),
            ),
        ),
        Part("write dq", visits, (Part("new", new), Part("add", visits - new))),
        Part("last", _set(bits, LAST)),
    ]
    T = shape.tokens
    rows, keys = fetches(inner) * sizes.block_q, fetches(outer) * sizes.block_kv
    moved = {
        "q, d_out": 2 * rows * HEADS * WIDTH * BF16,
        "lse, di": 2 * rows * HEADS * F32,
        "k, v, dk, dv": 4 * keys * WIDTH * BF16,
        "dq": (2 * visits - new) * sizes.block_q * HEADS * WIDTH * F32,
    }
    big, small, row = array(1, T, HEADS, WIDTH), array(1, T, 1, WIDTH), array(1, HEADS, T, dtype=jnp.float32)
    return Case(
        lambda q, k, v, out, lse, d_out, d_lse: flash_backward(
            (q, k, v, out, lse), d_out, d_lse, None, scale=1 / LOG2_E, sizes=sizes
        ),
        (big, small, small, big, row, big, row),
        (Kernel("flash_backward", grid_loop(bits.size, inside, cores=shape.parts), moved),),
        _ideal_backward(T),
    )


def _splash(shape: Shape, *, backward: bool = False, fused: bool = False, residuals: bool = False) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    mask = masks.MultiHeadMask([masks.CausalMask((shape.tokens, shape.tokens)) for _ in range(HEADS)])
    names = ["block_q", "block_kv", "block_kv_compute"]
    values: dict[str, Any] = dict(zip(names, shape.sizes, strict=False))
    if backward:
        names = ["block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq"]
        values = {"block_q": 512, "block_kv": 512} | dict(zip(names, shape.sizes, strict=False))
    with jax.default_device(jax.devices("cpu")[0]):
        return kernel.make_splash_mqa_single_device(
            mask,
            block_sizes=kernel.BlockSizes(**values, use_fused_bwd_kernel=fused),
            save_residuals=residuals,
        )


def _splash_forward(shape: Shape, *, residuals: bool) -> Case:
    kernel = _splash(shape, residuals=residuals)
    block_q, block_kv = shape.sizes[:2]
    info = kernel.fwd_mask_info
    runs, blocks = int((np.asarray(info.block_mask) > 0).sum()), shape.tokens // block_q
    following = np.asarray(info.data_next)
    grid = (HEADS, *following.shape[1:])
    inside = [Part("init", HEADS * blocks), Part("run", HEADS * runs), Part("end", HEADS * blocks)]
    head, i, _ = np.indices(grid)
    queries = fetches(head, i) * block_q
    moved = {
        "q": queries * WIDTH * BF16,
        "k, v": 2 * fetches(np.broadcast_to(following, grid)) * block_kv * WIDTH * BF16,
        "q_sequence": fetches(i) * block_q * WIDTH * F32,
        "out": queries * WIDTH * BF16,
    } | ({"lse": queries * WIDTH * F32} if residuals else {})
    steps = int(np.prod(grid))
    name = f"splash_mqa_fwd{'_residuals' if residuals else '_no_residuals'}"
    return Case(
        kernel,
        (array(HEADS, shape.tokens, WIDTH), *[array(shape.tokens, WIDTH)] * 2),
        # On two cores the heads are dealt out, three and two.
        (Kernel(name, grid_loop(steps, inside, share=-(-HEADS // 2) * steps // HEADS), moved),),
        ideal_forward(shape.tokens, F32 if residuals else 0),
    )


def _splash_dkv(kernel: Any, shape: Shape, fused: bool) -> Kernel:
    block_q, block_kv = shape.sizes[:2]
    info = kernel.dkv_mask_info
    following = np.asarray(info.data_next)[0].T  # [key blocks, query blocks]
    keys, queries = following.shape
    grid = (keys, HEADS, queries)
    runs = int((np.asarray(info.block_mask) > 0).sum())
    inside = [Part("init", keys), Part("run", HEADS * runs), Part("end", keys)]
    key, head, _ = np.indices(grid)
    next_query = np.broadcast_to(following[:, None], grid)
    rows = fetches(head, next_query) * block_q
    moved = {
        "q, d_out": 2 * rows * WIDTH * BF16,
        "lse, di": 2 * rows * 8 * F32,
        "q_sequence": fetches(next_query) * block_q * 8 * F32,
        "k, v, dk, dv": 4 * fetches(key) * block_kv * WIDTH * BF16,
    } | ({"dq parts": keys * HEADS * queries * block_q * WIDTH * BF16} if fused else {})
    parts = on_first_core(shape, grid_loop(int(np.prod(grid)), inside))
    return Kernel("splash_mqa_dkv_no_residuals", parts, moved)


def _splash_dq(kernel: Any, shape: Shape) -> Kernel:
    block_q, block_kv = shape.sizes[3:5]
    info = kernel.dq_mask_info
    following = np.asarray(info.data_next)
    grid = (HEADS, *following.shape[1:])
    runs, blocks = int((np.asarray(info.block_mask) > 0).sum()), grid[1]
    inside = [Part("init", HEADS * blocks), Part("run", HEADS * runs), Part("end", HEADS * blocks)]
    head, i, _ = np.indices(grid)
    rows = fetches(head, i) * block_q
    moved = {
        "q, d_out, dq": 3 * rows * WIDTH * BF16,
        "lse, di": 2 * rows * F32,
        "q_sequence": fetches(i) * block_q * WIDTH * F32,
        "k, v": 2 * fetches(np.broadcast_to(following, grid)) * block_kv * WIDTH * BF16,
    }
    parts = on_first_core(shape, grid_loop(int(np.prod(grid)), inside))
    return Kernel("splash_mqa_dq_no_residuals", parts, moved)


def _splash_backward(shape: Shape, *, fused: bool) -> Case:
    kernel = _splash(shape, backward=True, fused=fused)
    kernels = (_splash_dkv(kernel, shape, fused), *(() if fused else (_splash_dq(kernel, shape),)))
    big, small = array(HEADS, shape.tokens, WIDTH), array(shape.tokens, WIDTH)
    return Case(
        lambda q, k, v, d_out: jax.vjp(kernel, q, k, v)[1](d_out),
        (big, small, small, big),
        kernels,
        _ideal_backward(shape.tokens),
    )


CASES: dict[tuple[str, str], Callable[[Shape], Case]] = {
    ("forward", "ours"): functools.partial(_ours_forward, with_lse=False),
    ("forward", "splash"): functools.partial(_splash_forward, residuals=False),
    ("forward_lse", "ours"): functools.partial(_ours_forward, with_lse=True),
    ("forward_lse", "splash"): functools.partial(_splash_forward, residuals=True),
    ("backward", "ours"): _ours_backward,
    ("backward", "splash"): functools.partial(_splash_backward, fused=False),
    ("backward", "splash_fused"): functools.partial(_splash_backward, fused=True),
}
