"""``python gcp/tpu.py``: its verbs in a dry run, the README's walk, and what it says when it cannot."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from gcp import driver, staging, tpu
from gcp.gcloud import GcloudCloud
from gcp.job import JobSpec
from gcp.logs import LogReader
from gcp.objects import PlannedObjects
from gcp.price import Prices, cost
from gcp.record import Interval
from gcp.rehearsal import finish, seed
from qwq_jax.config.load import load_toml
from tests.gcp.memory import MemoryObjects, a_job, a_record
from tests.gcp.world import World, WorldCloud

ROOT = Path(__file__).parents[2]
README = (ROOT / "gcp" / "README.md").read_text(encoding="utf-8")
WALK = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)[0].strip().splitlines()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with the repository's configurations and a file of prompts."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "What is 47 + 85?"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(staging, "build_wheel", lambda: ("qwq_jax-0-py3-none-any.whl", b"wheel"))
    return tmp_path


def test_the_walk_is_short():
    assert len(WALK) < 10


@pytest.mark.parametrize("line", [line for line in WALK if "tpu.py" in line])
def test_the_walks_own_commands(place, capsys, line):
    words = shlex.split(line)
    assert words[:2] == [".venv/bin/python", "gcp/tpu.py"]
    assert tpu.main([*words[2:], "--dry-run"]) == 0
    said = capsys.readouterr().out
    for request in ("PUT qwq_jax/content/", "if generation is 0", "POST https://tpu.googleapis.com/v2/", "?force=true"):
        assert request in said
    assert said.index("PUT qwq_jax/jobs/") < said.index("POST https://"), "written down before it is asked for"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="no gcloud here")
def test_the_walks_gcloud_commands(tmp_path):
    """By gcloud's own check of command lines."""
    lines = [line for line in WALK if line.startswith("gcloud ")]
    assert lines
    for line in [*lines, "gcloud storage buckets create gs://x --lokation=y"]:
        lint = ["gcloud", "meta", "lint-gcloud-commands", f"--command-string={line}"]
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "CLOUDSDK_CONFIG": str(tmp_path)}
        done = subprocess.run(lint, env=environment, capture_output=True, text=True, timeout=120, check=False)
        fine = '"success": true' in done.stdout
        assert fine == (line in lines), f"{line}: {done.stdout} {done.stderr}"


def test_the_walks_other_commands():
    (make,) = [line for line in WALK if "tpu.py" not in line and not line.startswith("gcloud ")]
    assert make == "make install" and "\ninstall:" in (ROOT / "Makefile").read_text()
    pinned = (ROOT / "requirements.lock").read_text()
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gcp"]
    assert extra and all(f"\n{requirement.partition('>')[0]}==" in pinned.lower() for requirement in extra)


def test_the_manifest_of_the_readme(place, capsys):
    (line,) = [block for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "tpu.py manifest" in block]
    (place / "data").mkdir()
    for name in ("math_train", "code_train", "math_held_out", "code_held_out"):
        (place / "data" / f"{name}.jsonl").touch()
    assert tpu.main(shlex.split(line.replace("\\\n", ""))[2:]) == 0
    told = capsys.readouterr()
    assert "kind: JobSet" in told.out and "# kubectl's cluster runs it" in told.err and "idle_minutes" in told.err


def test_the_queue_of_the_readme(place, capsys):
    (line,) = [block for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "tpu.py queue" in block]
    assert tpu.main(shlex.split(line.partition("|")[0])[2:]) == 0
    said = capsys.readouterr().out
    assert [f"kind: {kind}" in said for kind in ("ResourceFlavor", "ClusterQueue", "LocalQueue")] == [True] * 3
    assert "nominalQuota: 128" in said and "name: default-tpus" in said


@pytest.mark.parametrize("verb", ["manifest", "queue", "xpk"])
def test_verbs_that_only_print_have_no_dry_run(capsys, verb):
    assert f"`{verb}`" in next(line for line in README.splitlines() if "no such option" in line)
    assert tpu.main([verb, "job.toml", "--dry-run"]) == 2


def test_the_results_lie_where_the_walk_fetches_them():
    (copy,) = [line for line in WALK if "storage cp" in line]
    (pattern,) = re.findall(r"gs://my-bucket/(\S+?)'", copy)
    record = a_record(a_job(name="qwq-generate"))
    assert re.fullmatch(pattern.replace("*", "[^/]+"), f"{record.places.results}/answers.jsonl")


@pytest.mark.parametrize("verb", ["watch", "status", "logs", "cancel", "cost"])
@pytest.mark.parametrize("client", ["rest", "gcloud"])
def test_every_verb_can_be_rehearsed(place, capsys, verb, client):
    chosen = ["--client", client] if verb in ("watch", "status", "cancel") else []
    assert tpu.main([verb, "configs/gcp/generate_v6e.toml", *chosen, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "GET qwq_jax/jobs/qwq-generate/record.json" in said
    if verb in ("watch", "cancel"):
        assert ("?force=true" if client == "rest" else "queued-resources delete qwq-generate-000000-1") in said


def test_a_rehearsal_by_gcloud_prints_its_command_line(place, capsys):
    arguments = ["--client", "gcloud", "--set", "provisioning=flex-start", "--dry-run"]
    assert tpu.main(["submit", "configs/gcp/generate_v6e.toml", *arguments]) == 0
    said = capsys.readouterr().out
    assert "queued-resources create qwq-generate-" in said and "--provisioning-model=flex-start" in said
    assert '"--output", "answers.jsonl"' in said


@pytest.mark.parametrize("provisioning", ["spot", "flex-start"])
def test_a_rehearsal_by_gcloud_prints_what_is_sent(place, capsys, monkeypatch, provisioning):
    arguments = ["configs/gcp/generate_v6e.toml", "--client", "gcloud", "--set", f"provisioning={provisioning}"]
    assert tpu.main(["submit", *arguments, "--dry-run"]) == 0
    printed = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("gcloud ")]
    sent: list[list[str]] = []

    def run(command: Any) -> Any:
        sent.append(list(command))
        found: Any = {"name": name, "state": {"state": "ACTIVE"}, "tpu": {"nodeSpec": [{"nodeId": name}]}}
        if "describe" not in command:
            found = []
        elif "tpu-vm" in command:
            found = {"state": "READY"}
        return subprocess.CompletedProcess(command, 0, json.dumps(found), "")

    cloud = GcloudCloud("my-project", run)
    (create,) = [words for words in printed if "create" in words]
    name = create[create.index("create") + 1]
    job = load_toml(place / arguments[0], JobSpec, [f"provisioning={provisioning}"])
    record = a_record(job, attempt=1, now=0.0).changed(uid=name.split("-")[2])
    cloud.create(driver.request(record, boot="", now=record.created))
    cloud.get(record.zone, name)
    cloud.list(record.zone)
    cloud.delete(record.zone, name)
    # Where the metadata lie, and how long is left, is another thing each time.
    changing = ("--metadata-from-file", "--valid-until-duration", "--max-run-duration")
    plain = [[word.partition("=")[0] if word.startswith(changing) else word for word in words] for words in printed]
    assert len(sent) == 5
    for words in sent:
        assert [word.partition("=")[0] if word.startswith(changing) else word for word in words] in plain
    assert ("alpha" in create) == (provisioning == "flex-start")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["provisioning=flex-start"], "use --client gcloud"),
        (["topology=tpu7x:2x2x1"], "offered through GKE only"),
    ],
)
def test_what_the_client_cannot_ask_for_is_refused_before_anything_is_staged(place, capsys, changes, sentence):
    words = [word for change in changes for word in ("--set", change)]
    assert tpu.main(["submit", "configs/gcp/generate_v6e.toml", *words, "--dry-run"]) == 2
    told = capsys.readouterr()
    assert sentence in told.err and "PUT" not in told.out


def test_a_vm_that_exists_is_never_deleted(place, capsys):
    changes = ["--set", "vm=mine", "--set", 'zones=["us-east5-b"]']
    assert tpu.main(["submit", "configs/gcp/generate_v6e.toml", *changes, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "tpu-vm ssh mine" in said and "delete" not in said


def test_a_vm_that_exists_is_not_reached_by_rest(place, capsys):
    changes = ["--set", "vm=mine", "--set", 'zones=["us-east5-b"]', "--client", "rest"]
    assert tpu.main(["submit", "configs/gcp/generate_v6e.toml", *changes, "--dry-run"]) == 2
    assert "vm: mine is reached by ssh, which needs --client gcloud" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["watch", "status", "logs", "cancel", "cost"])
def test_a_job_that_runs_is_not_another_one(place, capsys, monkeypatch, verb):
    """What the command line asks for is the job's, or refused; what its file says now is told."""
    bucket = PlannedObjects(lambda text: None)
    path = "configs/gcp/generate_v6e.toml"
    job = load_toml(place / path, JobSpec)
    seed(bucket, job, now=0.0)
    finish(bucket, job.name)
    monkeypatch.setattr(tpu, "open_bucket", lambda address: bucket)
    monkeypatch.setattr(tpu.client, "connect", lambda project, endpoint: WorldCloud(World(lambda: 0.0)))
    before = dict(bucket._written)
    for changes in (["deadline_hours=99"], ["project=other"], ["slices=2"]):
        assert tpu.main([verb, path, "--set", *changes]) == 2
        key = changes[0].partition("=")[0]
        assert f"error: {key}: job qwq-generate was submitted with" in capsys.readouterr().err
    assert bucket._written == before
    (place / "job.toml").write_text((place / path).read_text().replace("deadline_hours = 12", "deadline_hours = 13"))
    assert tpu.main([verb, "job.toml", "--set", "slices=1"]) == 0
    assert "was submitted with another deadline_hours, which holds" in capsys.readouterr().err


def test_list(capsys):
    assert tpu.main(["list", "gs://bucket", "--dry-run"]) == 0
    assert "LIST qwq_jax/jobs/" in capsys.readouterr().out


def test_manifest_and_xpk(place, capsys):
    (place / "job.toml").write_text((ROOT / "configs/gcp/convert_qwq_32b.toml").read_text())
    assert tpu.main(["manifest", "job.toml", "--image", "i"]) == 0
    assert "kind: JobSet" in capsys.readouterr().out
    xpk = ["xpk", "job.toml", "--image", "i", "--cluster", "c"]
    assert tpu.main(xpk) == 2
    assert "error: zones: xpk works in the one zone of its cluster" in capsys.readouterr().err
    assert tpu.main([*xpk, "--set", 'zones=["us-east5-b"]']) == 0
    told = capsys.readouterr()
    assert told.out.startswith("xpk workload create") and "\n# xpk ends no job that hangs" in f"\n{told.err}"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["submit", "none.toml"], "none.toml: cannot be read"),
        (["submit", "configs/gcp/generate_v6e.toml", "--set", "zone=a"], "zone: unknown key, did you mean zones?"),
        (["submit", "configs/gcp/rl_v5p.toml"], "files: data/math_train.jsonl cannot be read"),
        (["submit", "configs/gcp/generate_v6e.toml", "--set", "topology=tpu7x:2x2x1"], "offered through GKE only"),
        (["submit", "configs/gcp/generate_v6e.toml", "--set", "provisioning=flex-start"], "use --client gcloud"),
        (["list", "bucket"], "expected gs://BUCKET"),
        (["manifest", "configs/gcp/generate_v6e.toml", "--image", "i"], "answers.jsonl would lie in a pod"),
        (["submitt"], "submitt"),
    ],
)
def test_bad_input_is_one_sentence(place, capsys, arguments, sentence):
    dry = ["--dry-run"] if arguments[0] == "submit" else []
    assert tpu.main([*arguments, *dry]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert sentence in line


def test_run_by_its_path_it_needs_no_jax(tmp_path):
    """From anywhere; --help of every verb names an example."""
    script = f"""
import runpy, sys
sys.argv, sys.path[0] = ["tpu.py", "--help"], {str(ROOT / "gcp")!r}
try:
    runpy.run_path({str(ROOT / "gcp" / "tpu.py")!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0
assert "jax" not in sys.modules and "gcp.driver" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in ("submit", "watch", "status", "list", "logs", "cancel", "cost", "manifest", "queue", "xpk"):
        assert verb in done.stdout


def test_cost():
    record = a_record(a_job(topology="v5e:4x4", slices=2)).changed(
        intervals=(Interval(attempt=1, zone="a", begin=0.0, end=1800.0), Interval(attempt=2, zone="a", begin=3600.0))
    )
    told = cost(record, Prices(), now=7200.0)
    assert told.chip_hours == 48.0 and 'fill in chip_hour."v5e.spot"' in str(told)
    assert "= 24.00 EUR" in str(cost(record, Prices(currency="EUR", chip_hour={"v5e.spot": 0.5}), now=7200.0))


def test_logs_come_once_and_in_whole_lines():
    objects, record = MemoryObjects(), a_record()
    place = f"{record.places.logs}/0001-0002-000000.log"
    objects.put(place, b"one\ntw")
    reader = LogReader(objects, record)
    assert list(reader.new_lines()) == ["[1.2] one"]
    objects.put(place, b"one\ntwo\nthr")
    assert list(reader.new_lines()) == ["[1.2] two"]
    assert list(reader.new_lines()) == [] and list(reader.rest()) == ["[1.2] thr"]
    assert list(LogReader(objects, record, worker=1).new_lines()) == []
