"""The decode step's HBM bytes, collectives and temporaries, held to the ideal on each chip."""

import pytest

pytest.importorskip("libtpu", reason="the TPU compiler runs on Linux only")

from tools.step_bytes import Case, computations, extrapolated, moved_bytes, size  # noqa: E402

MODULE = """
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


def test_bytes_are_those_that_cross_to_hbm() -> None:
    assert size("(bf16[8,8]{1,0:T(8,128)(2,1)S(1)}, s4[10]{0})") == 5
    # Four gathered rows, the copied matrix, the result: nothing that stays on the chip.
    assert moved_bytes(computations(MODULE), "main", 0) == 64 + 128 + 64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "weights", "cache"),
    [
        ("v5e:4x4", "int8", "int8"),
        pytest.param("v6e:2x4", None, "bfloat16", marks=pytest.mark.exhaustive),
        pytest.param("v5p:2x2x1", "int8", "int8", marks=pytest.mark.exhaustive),
        ("tpu7x:2x2x1", "int8", "float8_e4m3fn"),
    ],
)
def test_a_decode_step_moves_little_more_than_it_must(topology: str, weights: str | None, cache: str) -> None:
    step = extrapolated(Case(topology, weights, cache))
    assert 0.95 < step.moved / step.ideal < 1.15
    assert step.temporaries < 0.5e9
    assert step.reductions == 2 * 64 + 1, "two a layer, and one for the embedding that the vocabulary cuts"
    # The sampler's: candidates of each part of the vocabulary, maxima and sums of rows, tokens for every replica.
    assert step.largest_other <= 64 * 8 * 128
