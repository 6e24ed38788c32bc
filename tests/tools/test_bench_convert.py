"""The benchmark of conversion says no when memory is not bounded, and yes of our conversion."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench_convert import GIB, complaints

ROOT = Path(__file__).parents[2]


def test_peaks_within_a_tenth_and_under_the_bound_are_fine():
    assert complaints([2 * GIB, 2 * GIB + GIB // 6], [3 * GIB], 3 * GIB) == []


@pytest.mark.parametrize(
    ("convert", "export", "said"),
    [
        ([2 * GIB, 2 * GIB + GIB // 4], [GIB], "peak of convert grows by 1.125"),
        ([4 * GIB], [GIB], "peak of convert 4.00 GiB is above the bound of 3.00 GiB"),
        ([GIB], [4 * GIB], "peak of export 4.00 GiB is above the bound of 3.00 GiB"),
    ],
)
def test_peaks_that_grow_or_are_above_the_bound_are_told(convert, export, said):
    (sentence,) = complaints(convert, export, 3 * GIB)
    assert sentence.startswith(said)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_memory_does_not_depend_on_the_number_of_layers(tmp_path):
    """At a quarter of the widths of QwQ-32B: eight layers more are half a gigabyte, and their share is the noise."""
    command = [sys.executable, "-m", "tools.bench_convert", "--scale", "4", "--workdir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
