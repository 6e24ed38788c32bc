"""What libtpu writes of a program's memory: read from its text, and the same as of whole programs."""

from pathlib import Path

import pytest

from qwq_jax.plan.report import assigned_bytes, is_whole, too_large

# Main memory has no color; what a caller gives is a parameter, whether or not a result takes its place.
ASSIGNMENT = """BufferAssignment:
allocation 0: size 512, page 0, thread-local:
 value: <53 reduce_sum.125 @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 4096, page 0, parameter 11, shape |f32[8,128]| at ShapeIndex {}, maybe-live-out:
 value: <947 param.50 @0> (size=4096,offset=0): f32[8,128]{1,0:T(8,128)}
allocation 2: size 8192, page 0, parameter 12, shape |f32[16,128]| at ShapeIndex {}:
allocation 3: size 512, page 0, constant:
allocation 4: size 3000, page 0, maybe-live-out:
allocation 5: size 32, page 0, output shape is |(f32[8,128], f32[8,128])|, maybe-live-out:
allocation 6: size 40000, page 0, preallocated-temp:
allocation 7: size 67043328, color 1, page 0, preallocated-temp:
"""
CALLED = "HloModule jit_run\n\n%fused (a: f32[]) -> f32[] {\n}\n\n"


def test_temporaries_and_results_are_what_lies_in_main_memory_and_in_no_argument() -> None:
    assert assigned_bytes(ASSIGNMENT) == (3 * 16_384, 3032)


def test_a_text_without_an_assignment_is_no_answer() -> None:
    with pytest.raises(ValueError, match="wrote no assignment"):
        assigned_bytes("BufferAssignment:\n")


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        (f"{CALLED}ENTRY %main () -> f32[] {{\n  ROOT %a = f32[]\n}}\n\n", True),
        (CALLED, False),
        (f"{CALLED}ENTRY %main () -> f32[] {{\n  ROOT %a = f32[", False),
        (f"{CALLED}ENTRY %main () -> f32[8] {{\n  ROOT %a = f32[8]{{0}}", False),
        ("", False),
    ],
)
def test_a_text_is_whole_when_its_last_computation_is(text: str, whole: bool, tmp_path: Path) -> None:
    (tmp_path / "program.txt").write_text(text)
    assert is_whole(tmp_path / "program.txt") is whole


def test_a_text_that_is_not_there_is_not_whole() -> None:
    assert not is_whole(None)


def test_what_is_too_large_says_by_how_much() -> None:
    said = RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm.")
    assert too_large(said) == (int(17.5 * 2**30), int(15.75 * 2**30))
    said = RuntimeError("RESOURCE_EXHAUSTED: the program's arguments (20.00G) exceeds available HBM (15.75G)")
    assert too_large(said) == (20 * 2**30, int(15.75 * 2**30))
    with pytest.raises(RuntimeError, match="Mosaic"):
        too_large(RuntimeError("Mosaic failed to compile"))
