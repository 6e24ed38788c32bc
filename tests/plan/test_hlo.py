"""What is read from a program's text, against counts made by hand and against products that NumPy would do."""

import itertools

import pytest

from qwq_jax.plan.hlo import Collective, collectives, decode_round, matrix_flops, moved_bytes, parse, size

FUSED = """
%fused (p0: bf16[1000,8], p1: s32[4]) -> bf16[4,8] {
  %p0 = bf16[1000,8]{1,0} parameter(0)
  %p1 = s32[4]{0:S(1)} parameter(1)
  ROOT %g = bf16[4,8]{1,0:S(1)} gather(%p0, %p1), offset_dims={1}
}

ENTRY %main (a: bf16[1000,8], b: bf16[8,8]) -> bf16[4,8] {
  %a = bf16[1000,8]{1,0} parameter(0)
  %b = bf16[8,8]{1,0} parameter(1)
  %i = s32[4]{0:S(1)} iota(), iota_dimension=0
  %f = bf16[4,8]{1,0:S(1)} fusion(%a, %i), kind=kLoop, calls=%fused
  %c = (bf16[8,8]{1,0:S(1)}, bf16[8,8]{1,0}, u32[]{:S(2)}) copy-start(%b)
  %d = bf16[8,8]{1,0:S(1)} copy-done(%c)
  ROOT %o = bf16[4,8]{1,0} convolution(%f, %d), dim_labels=bf_io->bf
}
"""

# A loop of five rounds, each with a product and an exchange; a branch that is taken or not.
LOOP = """
%condition (p: (s32[], f32[4,8])) -> pred[] {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(5)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %w = f32[8,8]{1,0} constant({...})
  %y = f32[4,8]{1,0:S(1)} convolution(%x, %w), dim_labels=bf_io->bf
  ROOT %r = f32[4,8]{1,0:S(1)} all-reduce(%y), replica_groups=GROUPS, to_apply=%add
}

%small (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %s = f32[4,8]{1,0} negate(%p)
}

%large (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %once = f32[4,8]{1,0} negate(%p)
  ROOT %s = f32[4,8]{1,0} all-gather(%once), replica_groups={{0,1},{2,3}}, dimensions={0}
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %t = (s32[], f32[4,8]{1,0}) tuple(%a)
  %w = (s32[], f32[4,8]{1,0}) while(%t), condition=%condition, body=%body
  %q = f32[4,8]{1,0} get-tuple-element(%w), index=1
  ROOT %b = f32[4,8]{1,0} conditional(%q, %q, %q), branch_computations={%small, %large}
}
"""


def test_bytes_are_those_that_cross_to_hbm() -> None:
    assert size("(bf16[8,8]{1,0:T(8,128)(2,1)S(1)}, s4[10]{0})") == 5
    # Four gathered rows, the copied matrix, the result: nothing that stays on the chip.
    assert moved_bytes(parse(FUSED), "ENTRY", 0) == 64 + 128 + 64


def test_a_loop_counts_as_often_as_it_runs_and_of_branches_the_larger() -> None:
    module = parse(LOOP.replace("GROUPS", "{{0,1,2,3}}"))
    assert matrix_flops(module, "ENTRY") == 5 * 2 * 4 * 8 * 8
    matrix, weights = 4 * 8 * 4, 8 * 8 * 4
    # The product reads both from HBM and leaves its result on the chip, where the exchange finds and leaves it.
    assert moved_bytes(module, "ENTRY", 0) == 5 * (matrix + weights) + 2 * matrix + 2 * matrix
    assert collectives(module, "ENTRY") == [
        Collective("all-gather", 2, 1, 2 * matrix, 1),
        Collective("all-reduce", 4, 1, matrix, 5),
    ]


# Two pieces of a gathered matrix a round, as the compiler makes of a product with one: the counter is unsigned and
# goes on by two.
WINDOWED = """
%next (p: u32[], q: u32[]) -> u32[] {
  %p = u32[] parameter(0)
  %q = u32[] parameter(1)
  ROOT %sum = u32[] add(%p, %q)
}

%condition (p: (u32[], f32[4,8])) -> pred[] {
  %p = (u32[], f32[4,8]{1,0}) parameter(0)
  %limit = u32[]{:T(128)} constant(8)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (p: (u32[], f32[4,8])) -> (u32[], f32[4,8]) {
  %p = (u32[], f32[4,8]{1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %other = u32[] constant(15)
  %two = u32[] constant(2)
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %w = f32[8,8]{1,0} constant({...})
  %y = f32[4,8]{1,0:S(1)} convolution(%x, %w), dim_labels=bf_io->bf
  %z = f32[4,8]{1,0:S(1)} convolution(%y, %w), dim_labels=bf_io->bf
  %n = NEXT
  ROOT %r = (u32[]{:T(128)}, f32[4,8]{1,0}) tuple(%n, %z)
}

ENTRY %main (a: f32[4,8]) -> (u32[], f32[4,8]) {
  %a = f32[4,8]{1,0} parameter(0)
  %o = u32[] constant(0)
  %t = (u32[], f32[4,8]{1,0}) tuple(%o, %a)
  ROOT %w = (u32[], f32[4,8]{1,0}) while(%t), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(
    ("following", "rounds"),
    [
        ("u32[]{:T(128)} add(%i, %two)", 4),
        ("u32[]{:T(128)} fusion(%i, %two), kind=kLoop, calls=%next", 4),
        ("u32[]{:T(128)} multiply(%i, %two)", 8),  # not understood
    ],
)
def test_a_loop_of_two_rounds_in_one_runs_half_as_often(following: str, rounds: int) -> None:
    module = parse(WINDOWED.replace("NEXT", following))
    assert matrix_flops(module, "ENTRY") == rounds * 2 * (2 * 4 * 8 * 8)


# What tpu7x hands to its sparse cores: the exchange stands in a computation that the start of the call names.
HANDED_OVER = """
%handed (p: bf16[64,8]) -> bf16[64,8] {
  %p = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-reduce.3 = bf16[64,8]{1,0} all-reduce(%p), replica_groups=mesh['axis_0'=8] {'axis_0'}, to_apply=%add
}

ENTRY %main (a: bf16[64,8]) -> bf16[64,8] {
  %a = bf16[64,8]{1,0} parameter(0)
  %all-reduce.1.call-start = ((), (), (s32[16]{0:S(8)}, s32[0]{0:T(1)S(4)})) custom-call-start(), \
custom_call_target="offload", called_computations={%handed}
  %all-reduce.1.call-update = ((bf16[64,8]{1,0}), bf16[64,8]{1,0}, (s32[16]{0:S(8)})) \
custom-call-update(%all-reduce.1.call-start, %a)
  ROOT %all-reduce.1.call-done = bf16[64,8]{1,0} custom-call-done(%all-reduce.1.call-update)
}
"""


def test_an_exchange_that_is_handed_over_counts_once() -> None:
    assert collectives(parse(HANDED_OVER.replace("\\\n", "")), "ENTRY") == [
        Collective("all-reduce", 8, 1, 64 * 8 * 2, 1)
    ]


def test_a_loop_that_may_end_early_counts_once() -> None:
    always = "ROOT %lt = pred[] compare(%i, %limit), direction=LT"
    early = f"{always[5:]}\n  %all = pred[] constant(true)\n  ROOT %and = pred[] and(%lt, %all)"
    text = LOOP.replace(always, early).replace("GROUPS", "{{0,1}}")
    assert matrix_flops(parse(text), "ENTRY") == 2 * 4 * 8 * 8


@pytest.mark.parametrize(
    ("groups", "group", "stride"),
    [
        ("{{0,2,4,6},{1,3,5,7}}", 4, 2),
        ("[2,4]<=[8]", 4, 1),
        ("[4,2]<=[2,4]T(1,0)", 2, 4),
        ("mesh['axis_0'=2,'axis_1'=8] {'axis_1'}", 8, 1),
        ("mesh['axis_0'=2,'axis_1'=8] {'axis_0'}", 2, 8),
        ("mesh['axis_0'=4,'axis_1'=8] {'axis_0','axis_1'}", 32, 1),
        ("mesh['axis_0'=4,'axis_1'=8] {'axis_0':(1)2}", 2, 8),
    ],
)
def test_every_spelling_of_groups(groups: str, group: int, stride: int) -> None:
    (found,) = (e for e in collectives(parse(LOOP.replace("GROUPS", groups)), "body"))
    assert (found.group, found.stride) == (group, stride)


@pytest.mark.parametrize(
    ("left", "right", "result", "fields", "products"),
    [
        # Rows by a matrix.
        ("4,16", "16,32", "4,32", "dim_labels=bf_io->bf", 4 * 16 * 32),
        # Queries of 40 heads: a convolution over the heads, of which all but one tap is padding.
        (
            "4,8,64,1",
            "64,40,16,1",
            "4,8,40,16",
            "window={size=1x40 pad=0_0x39_39 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f",
            4 * 8 * 64 * 40 * 16,
        ),
        # A gradient sums over the rows, which are the window.
        ("4,8,64", "4,8,32", "64,32,1", "window={size=4}, dim_labels=0fb_0io->bf0", 4 * 8 * 64 * 32),
        # A batched product: at each place the window meets its own matrix.
        (
            "6,4,16",
            "6,16,32",
            "6,4,32",
            "window={size=6 stride=5 pad=0_0 lhs_dilate=6}, dim_labels=0bf_0io->0bf",
            6 * 4 * 16 * 32,
        ),
    ],
)
def test_products_count_what_meets(left: str, right: str, result: str, fields: str, products: int) -> None:
    text = (
        f"ENTRY %main (a: f32[{left}]) -> f32[{result}] {{\n  %a = f32[{left}]{{0}} parameter(0)\n"
        f"  %b = f32[{right}]{{0}} parameter(1)\n  ROOT %c = f32[{result}]{{0}} convolution(%a, %b), {fields}\n}}\n"
    )
    assert matrix_flops(parse(text), "ENTRY") == 2 * products


def test_the_round_of_a_window_is_where_the_paged_kernel_is() -> None:
    line = '  %paged_decode.1 = f32[4]{0} custom-call(%p), custom_call_target="tpu_custom_call"\n'
    inside = LOOP.replace("  %y = f32[4,8]", line + "  %y = f32[4,8]")
    assert decode_round(parse(inside)) == "body"
    assert decode_round(parse(FUSED.replace("  %i = s32", line + "  %i = s32"))) == "ENTRY"


def test_the_live_cache_is_read_once() -> None:
    line = '  %paged.1 = f32[4]{0} custom-call(%a, %i), custom_call_target="tpu_custom_call"\n'
    text = FUSED.replace("  %f = bf16", line + "  %f = bf16")
    without, with_kernel = (moved_bytes(parse(each), "ENTRY", 1000) for each in (FUSED, text))
    assert with_kernel - without == 1000, "whatever the pool's size is"


def test_names_of_axes() -> None:
    for first, second in itertools.product((2, 4), (2, 8)):
        groups = f"mesh['x'={first},'y'={second}] {{'x'}}"
        (found,) = collectives(parse(LOOP.replace("GROUPS", groups)), "body")
        assert (found.group, found.stride) == (first, second)


def test_what_goes_on_in_the_background_is_written_in_two_ways() -> None:
    """As an operation's start, and as a computation of that operation: both read a part only."""
    done = "  %done = s8[8,128]{1,0:S(1)} slice-done(%start)\n"
    shape = "((s8[64,128]{1,0}), s8[8,128]{1,0:S(1)}, s32[]{:S(2)})"
    head = "ENTRY %main (p: s8[64,128]) -> s8[8,128] {\n  %p = s8[64,128]{1,0} parameter(0)\n"
    plain = f"{head}  %start = {shape} slice-start(%p), slice={{[0:8], [0:128]}}\n{done}}}\n"
    inner = "%inner (q: s8[64,128]) -> s8[8,128] {\n  %q = s8[64,128]{1,0} parameter(0)\n"
    inner += "  ROOT %cut = s8[8,128]{1,0} slice(%q), slice={[0:8], [0:128]}\n}\n"
    wrapped = f"{inner}{head}  %start = {shape} async-start(%p), calls=%inner\n{done.replace('slice-', 'async-')}}}\n"
    one, other = parse(plain)["ENTRY"][1], parse(wrapped)["ENTRY"][1]
    assert (one.kind, one.operands, one.rest) == (other.kind, other.operands, other.rest)
    assert moved_bytes(parse(plain), "ENTRY", 0) == moved_bytes(parse(wrapped), "ENTRY", 0) == 8 * 128
