"""Peak memory and speed of `convert` and `export` at the widths of QwQ-32B, beside `cp` of the same bytes.

    python tools/bench_convert.py --layers 4 12 --workdir /tmp/bench

Exits with 1 if a peak is above twice the largest tensor plus 1 GiB, or if that of `convert` grows by more than a tenth
with the number of layers. Needs about 3.1 times the size of the largest model on disk (46 GB for 12 layers) and removes
what it made.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from qwq_jax.checkpoint.huggingface import TensorPlan, header_bytes, index_json, plan_shards
from qwq_jax.checkpoint.names import name_table
from qwq_jax.config.model import ModelConfig

GIB = 1 << 30
MOST_GROWTH = 1.10
# Peaks of equal runs differ by as much; at full width a tenth is more.
NOISE = 128 << 20
CHILD = """
import sys
from qwq_jax.jobs.convert import convert
from qwq_jax.jobs.export import export

def memory(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

before = memory("VmRSS")
report = {"convert": convert, "export": export}[sys.argv[1]](*sys.argv[2:])
print("MEASURED", report.nbytes, report.seconds, memory("VmHWM") - before)
"""


def config_of(num_layers: int, scale: int = 1) -> ModelConfig:
    """QwQ-32B with fewer layers, its widths divided by `scale`."""
    return ModelConfig(
        vocab_size=152_064 // scale,
        hidden_size=5120 // scale,
        num_layers=num_layers,
        num_heads=40 // scale,
        num_kv_heads=8 // scale,
        head_dim=128,
        intermediate_size=27_648 // scale,
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        max_position_embeddings=40_960,
        eos_token_ids=(151_645 // scale,),
    )


def make_source(folder: Path, config: ModelConfig) -> int:
    """Random finite bf16 bits from one block, shifted from tensor to tensor so that no two are alike."""
    dtype = np.dtype(ml_dtypes.bfloat16)
    plans = [TensorPlan(row.source, dtype, row.source_shape) for row in name_table(config)]
    shards = plan_shards(plans, 5_000_000_000)
    block = np.random.default_rng(0).integers(0, 1 << 16, 32 << 20, dtype=np.uint16) & 0xBFFF
    data = memoryview(block.tobytes())
    folder.mkdir(parents=True)
    for index, (name, shard) in enumerate(shards.items()):
        with open(folder / name, "wb") as file:
            file.write(header_bytes(shard))
            for number, plan in enumerate(shard):
                left = plan.nbytes
                start = 2 * (1009 * (number + 1) + 9973 * index)
                while left:
                    piece = data[start : start + left]
                    file.write(piece)
                    left -= len(piece)
                    start = 0
    (folder / "model.safetensors.index.json").write_bytes(index_json(shards))
    (folder / "config.json").write_text(json.dumps(config.to_huggingface("bfloat16")))
    return sum(plan.nbytes for plan in plans)


def copy(source: Path, dest: Path) -> tuple[float, float]:
    """Seconds of `cp`, and until its bytes are on disk as ours are when `convert` returns."""
    subprocess.run(["sync"], check=True)
    start = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(dest)], check=True)
    copied = time.monotonic() - start
    subprocess.run(["sync"], check=True)
    return copied, time.monotonic() - start


def measure(verb: str, source: Path, dest: Path) -> tuple[float, int]:
    """Seconds and peak bytes beyond the imported interpreter of one job in a process of its own."""
    subprocess.run(["sync"], check=True)
    command = [sys.executable, "-c", CHILD, verb, str(source), str(dest)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    line = next(line for line in done.stdout.splitlines() if line.startswith("MEASURED"))
    _, _, seconds, peak = line.split()
    return float(seconds), int(peak)


def same_bytes(one: Path, other: Path) -> bool:
    """Whether every weight file of two Hugging Face directories of the same sharding is equal."""
    names = sorted(path.name for path in one.glob("*.safetensors"))
    return all(not subprocess.run(["cmp", "-s", str(one / name), str(other / name)]).returncode for name in names)


def complaints(convert_peaks: list[int], export_peaks: list[int], bound: int) -> list[str]:
    """What the peaks, one a size, have against them."""
    found = [
        f"peak of {job} {peak / GIB:.2f} GiB is above the bound of {bound / GIB:.2f} GiB"
        for job, peaks in (("convert", convert_peaks), ("export", export_peaks))
        for peak in peaks
        if peak > bound
    ]
    least, most = min(convert_peaks), max(convert_peaks)
    if most > max(MOST_GROWTH * least, least + NOISE):
        found.append(f"peak of convert grows by {most / least:.3f}, more than {MOST_GROWTH}, with the number of layers")
    return found


def main() -> None:
    """Runs every size, prints a table, and exits with 1 if memory is not bounded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12])
    parser.add_argument("--workdir", type=Path, default=Path("out/bench"), help="place for what it makes")
    parser.add_argument("--scale", type=int, choices=(1, 2, 4, 8), default=1, help="divide every width by this")
    arguments = parser.parse_args()
    table = Table("layers", "GB", "job", "seconds", "MB/s", "peak GiB beyond imports", "bound GiB")
    peaks: dict[str, list[int]] = {"convert": [], "export": []}
    bound = 0
    for layers in arguments.layers:
        config = config_of(layers, arguments.scale)
        bound = 2 * config.vocab_size * config.hidden_size * 2 + GIB
        root = arguments.workdir / f"layers-{layers}"
        try:
            size = make_source(root / "hf", config)
            copied, durable = copy(root / "hf", root / "cp")
            shutil.rmtree(root / "cp")
            convert_seconds, convert_peak = measure("convert", root / "hf", root / "ours")
            export_seconds, export_peak = measure("export", root / "ours", root / "back")
            assert same_bytes(root / "hf", root / "back"), "the round trip changed bytes"
        finally:
            shutil.rmtree(root, ignore_errors=True)
        peaks["convert"].append(convert_peak)
        peaks["export"].append(export_peak)
        rows = [
            ("cp", copied, None),
            ("cp, then sync", durable, None),
            ("convert", convert_seconds, convert_peak),
            ("export", export_seconds, export_peak),
        ]
        for job, seconds, peak in rows:
            memory = ("", "") if peak is None else (f"{peak / GIB:.2f}", f"{bound / GIB:.2f}")
            table.add_row(
                str(layers), f"{size / 1e9:.1f}", job, f"{seconds:.1f}", f"{size / seconds / 1e6:.0f}", *memory
            )
    Console(width=110).print(table)
    print(f"peak of convert, largest over smallest: {max(peaks['convert']) / min(peaks['convert']):.3f}")
    if found := complaints(peaks["convert"], peaks["export"], bound):
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
