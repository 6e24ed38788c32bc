"""The decode step's HBM bytes, collectives and temporaries, held to the ideal on each chip."""

import pytest

pytest.importorskip("libtpu", reason="the TPU compiler runs on Linux only")

from tools.step_bytes import Case, extrapolated  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "weights", "cache"),
    [
        ("v5e:4x4", "int8", "int8"),
        pytest.param("v6e:2x4", None, "bfloat16", marks=pytest.mark.exhaustive),
        pytest.param("v5p:2x2x1", "int8", "int8", marks=pytest.mark.exhaustive),
        pytest.param("tpu7x:2x2x1", "int8", "float8_e4m3fn", marks=pytest.mark.exhaustive),
    ],
)
def test_a_decode_step_moves_little_more_than_it_must(topology: str, weights: str | None, cache: str) -> None:
    step = extrapolated(Case(topology, weights, cache))
    assert 0.95 < step.moved / step.ideal < 1.15
    assert step.temporaries < 0.5e9
    assert step.reductions == 2 * 64 + 1, "two a layer, and one for the embedding that the vocabulary cuts"
    # The sampler's: candidates of each part of the vocabulary, maxima and sums of rows, tokens for every replica.
    assert step.largest_other <= 64 * 8 * 128 * 4
