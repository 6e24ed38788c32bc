"""Peak memory and speed of `convert` and `export` at the widths of QwQ-32B, beside `cp` of the same bytes.

    python tools/bench_convert.py --layers 4 12 --workdir /tmp/bench

Needs about 3.1 times the size of the largest model on disk (46 GB for 12 layers) and removes what it made.
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


def config_of(num_layers: int) -> ModelConfig:
    """QwQ-32B with fewer layers."""
    return ModelConfig(
        vocab_size=152_064,
        hidden_size=5120,
        num_layers=num_layers,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=27_648,
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        max_position_embeddings=40_960,
        eos_token_ids=(151_645,),
    )


def make_source(folder: Path, num_layers: int) -> int:
    """Random finite bf16 bits from one block, shifted from tensor to tensor so that no two are alike."""
    config = config_of(num_layers)
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


def main() -> None:
    """Runs every size and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12])
    parser.add_argument("--workdir", type=Path, default=Path("out/bench"), help="place for what it makes")
    arguments = parser.parse_args()
    table = Table("layers", "GB", "job", "seconds", "MB/s", "peak GiB beyond imports", "bound GiB")
    bound = (2 * 152_064 * 5120 * 2 + GIB) / GIB
    peaks = []
    for layers in arguments.layers:
        root = arguments.workdir / f"layers-{layers}"
        try:
            size = make_source(root / "hf", layers)
            copied, durable = copy(root / "hf", root / "cp")
            shutil.rmtree(root / "cp")
            convert_seconds, convert_peak = measure("convert", root / "hf", root / "ours")
            export_seconds, export_peak = measure("export", root / "ours", root / "back")
            assert same_bytes(root / "hf", root / "back"), "the round trip changed bytes"
        finally:
            shutil.rmtree(root, ignore_errors=True)
        peaks.append(convert_peak)
        rows = [
            ("cp", copied, None),
            ("cp, then sync", durable, None),
            ("convert", convert_seconds, convert_peak),
            ("export", export_seconds, export_peak),
        ]
        for job, seconds, peak in rows:
            memory = ("", "") if peak is None else (f"{peak / GIB:.2f}", f"{bound:.2f}")
            table.add_row(
                str(layers), f"{size / 1e9:.1f}", job, f"{seconds:.1f}", f"{size / seconds / 1e6:.0f}", *memory
            )
    Console(width=110).print(table)
    if len(peaks) > 1:
        print(f"peak of convert, largest over smallest: {max(peaks) / min(peaks):.3f}")


if __name__ == "__main__":
    main()
