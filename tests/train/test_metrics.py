import json

import pytest

from qwq_jax.train import metrics
from qwq_jax.train.metrics import MetricsLog, read_records


def write(directory, steps, *, resume_step=0):
    log = MetricsLog(directory, resume_step=resume_step)
    for step in steps:
        log.write(step, {"loss": step / 2})
    log.close()
    return log.path


def test_a_resumed_log_has_every_step_once(tmp_path):
    path = write(tmp_path, range(1, 8))
    write(tmp_path, range(5, 11), resume_step=4)
    assert read_records(path) == [{"step": step, "loss": step / 2} for step in range(1, 11)]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_line_that_a_crash_cut_is_dropped(tmp_path):
    path = write(tmp_path, range(1, 4))
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    write(tmp_path, [4], resume_step=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


@pytest.mark.parametrize("line", [b'{"loss": 1}', b"loss 1", b'{"loss": "\xff"}', b"[1]", b""])
def test_a_line_that_is_no_record_is_named_and_nothing_is_lost(tmp_path, line):
    path = write(tmp_path, range(1, 4))
    damaged = path.read_bytes() + line + b"\n"
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"metrics.jsonl:4: not a record of a training run"):
        MetricsLog(tmp_path, resume_step=4)
    assert path.read_bytes() == damaged


def test_a_new_run_starts_an_empty_file(tmp_path):
    write(tmp_path, range(1, 4))
    assert [record["step"] for record in read_records(write(tmp_path, [1]))] == [1]


def test_a_run_killed_before_its_first_checkpoint_says_once_what_was_there_before_it(tmp_path):
    write(tmp_path, range(0, 3))
    assert [record["step"] for record in read_records(write(tmp_path, range(0, 2)))] == [0, 1]


def test_in_a_bucket_the_files_are_copied_at_every_flush(tmp_path, monkeypatch):
    bucket = tmp_path / "bucket"
    real = metrics.epath.Path
    monkeypatch.setattr(metrics.epath, "Path", lambda path: real(str(path).replace("gs://bucket", str(bucket))))
    write("gs://bucket/run", range(1, 8))
    write("gs://bucket/run", range(5, 11), resume_step=4)
    assert [record["step"] for record in read_records(bucket / "run" / "metrics.jsonl")] == list(range(1, 11))
    assert list((bucket / "run" / "tensorboard").iterdir())
