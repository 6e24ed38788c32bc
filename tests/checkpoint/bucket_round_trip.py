"""What `test_remote.py` runs against a bucket, in a process that knew the fake server from its start."""

import sys
from pathlib import Path

import gcsfs
import numpy as np
import pytest

from qwq_jax.checkpoint import open_checkpoint, read_param, restore_params
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.jobs import convert as convert_job
from qwq_jax.jobs.convert import convert
from qwq_jax.jobs.export import export
from qwq_jax.sharding import make_mesh, train_layout
from tests.checkpoint.sources import make_source, read_tensors


def main(workdir: Path, bucket: str) -> None:
    source = make_source(workdir / "hf", dtype="bfloat16", shards=2)
    files = gcsfs.GCSFileSystem()
    files.put(str(source) + "/", f"{bucket}/hf/", recursive=True)
    root = f"gs://{bucket}"

    interrupt_and_resume(f"{root}/hf", f"{root}/ours")
    checkpoint = open_checkpoint(f"{root}/ours")
    tensors = read_tensors(source)
    layout = train_layout(make_mesh(MeshConfig(fsdp=2, tensor=2)))
    for name, array in restore_params(checkpoint, layout).items():
        assert np.asarray(array).tobytes() == read_param(checkpoint, name).tobytes(), name
    assert read_param(checkpoint, "final_norm.scale").tobytes() == tensors["model.norm.weight"].tobytes()
    tokenizer = Path(checkpoint.tokenizer_dir) / "tokenizer.json"
    assert tokenizer.read_bytes() == (source / "tokenizer.json").read_bytes()

    assert export(f"{root}/ours", f"{root}/back", max_shard_bytes=30_000).verified == len(tensors)
    assert not files.exists(f"{bucket}/back/exporting.json")
    files.get(f"{bucket}/back/", str(workdir / "back") + "/", recursive=True)
    got = read_tensors(workdir / "back")
    assert got.keys() == tensors.keys() and all(got[name].tobytes() == tensors[name].tobytes() for name in tensors)
    refusals(root, files, bucket)
    print("EVERYTHING HOLDS")


def interrupt_and_resume(source: str, dest: str) -> None:
    write = convert_job.CheckpointWriter.write

    def stopping(self, array, record):
        if len(self.finished) >= 10:
            raise KeyError("stopped")
        write(self, array, record)

    convert_job.CheckpointWriter.write = stopping
    with pytest.raises(KeyError, match="stopped"):
        convert(source, dest)
    convert_job.CheckpointWriter.write = write
    with pytest.raises(ValueError, match="never finished"):
        open_checkpoint(dest)
    report = convert(source, dest)
    assert 0 < report.written <= 17 and report.tensors == 27
    assert convert(source, dest).written == 0


def refusals(root: str, files: gcsfs.GCSFileSystem, bucket: str) -> None:
    with pytest.raises(ValueError, match="gs://.*/hf holds something else"):
        convert(f"{root}/hf", f"{root}/hf")
    with pytest.raises(ValueError, match="gs://.*/back holds something else"):
        export(f"{root}/ours", f"{root}/back")
    with pytest.raises(ValueError, match="gs://.*/nothing: there is no such directory"):
        convert(f"{root}/nothing", f"{root}/x")
    with pytest.raises(ValueError, match="cannot write gs://no-such-bucket/x"):
        convert(f"{root}/hf", "gs://no-such-bucket/x")
    shard = "model-00001-of-00002.safetensors"
    files.pipe_file(f"{bucket}/hf/{shard}", files.cat_file(f"{bucket}/hf/{shard}")[:-1])
    with pytest.raises(ValueError, match=f"gs://.*/hf/{shard} is truncated"):
        convert(f"{root}/hf", f"{root}/y")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
