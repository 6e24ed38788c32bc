"""What a job's arguments would find out on chips that are paid for, found out before."""

from pathlib import Path

import pytest

from gcp import submission
from gcp.job import JobSpec
from qwq_jax.config.load import build, load_toml

GENERATE = Path("configs/gcp/generate_v6e.toml")


def job(*settings: str) -> JobSpec:
    return load_toml(GENERATE, JobSpec, settings)


def words(**options: str) -> str:
    """A setting of the arguments, some of them others."""
    given = {"--input": "prompts.jsonl", "--output": "answers.jsonl", "--set": "mesh.tensor=8"} | options
    flat = ["gs://b/m", *(word for pair in given.items() for word in pair)]
    return f"arguments={flat!r}".replace("'", '"')


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text("")
    return tmp_path


def test_the_job_that_ships_is_taken(place: Path) -> None:
    submission.check(job(), place, client="rest")
    submission.check(job("results=['answers.*']"), place, client="rest")
    submission.check(job(words(**{"--output": "out/answers.jsonl"}), "results=['out/**']"), place, client="rest")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["results=[]"], "results: nothing there matches the output answers.jsonl, which would be deleted"),
        (["results=['answer.jsonl']"], "results: nothing there matches the output answers.jsonl"),
        ([words(**{"--output": "/tmp/answers.jsonl"})], "/tmp/answers.jsonl lies on VMs, which are deleted"),
        (
            [words(**{"--output": "gs://b/answers.jsonl"}), "results=[]"],
            "local files only, and gs://b/answers.jsonl is none; give --output a file, and list it in results",
        ),
        (
            [words(**{"--input": "gs://b/prompts.jsonl"}), "files=[]"],
            "local files only, and gs://b/prompts.jsonl is none; give --input a file, and list it in files",
        ),
        (["files=[]"], "files: prompts.jsonl is an argument of the job, and has to be listed"),
        (["topology=v6e:2x2"], "mesh: 8 devices are asked for, and 1 x v6e:2x2 has 4"),
        (["topology=v6e:4x4"], "mesh: 8 devices are asked for, and 1 x v6e:4x4 has 16: several hosts must use all"),
        (
            ["topology=v6e:4x4", words(**{"--set": "mesh.data=4", "--set=mesh.tensor=4": "--set=mesh.fsdp=1"})],
            "each of the 4 hosts answers a part of the file, and they need a directory in common",
        ),
        ([words(**{"--set": "mesh.tensors=8"})], "mesh.tensors: unknown key"),
        ([words(**{"--outputs": "a.jsonl"})], "arguments: generate: No such option: --outputs"),
        ([words(**{"--seed": "some"})], "arguments: generate: Invalid value for .--seed."),
        ([words(**{"--help": "me"})], "arguments: generate: these words ask for help, and run nothing"),
        (["zones=['us-east5']"], "zones: us-east5 is a region; expected one of its zones, such as us-east5-b"),
        (["zones=['us-east5-b', 'us-east5-b']"], "zones: one is named twice"),
        (["vm="], "vm: "),
        (["deadline_hours=1e9"], "deadline_hours: "),
    ],
)
def test_what_would_fail_on_chips_is_refused(place: Path, settings: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        submission.check(job(*settings), place, client="rest")


def test_a_vm_and_gke_may_have_disks_of_their_own(place: Path) -> None:
    own = job("results=[]", words(**{"--output": "/mnt/answers.jsonl"}), "vm=mine", "zones=['us-east5-b']")
    submission.check(own, place, client="gcloud")
    submission.check(job("results=[]", "files=[]", words(**{"--output": "/mnt/answers.jsonl"})), place)


def test_a_pod_keeps_nothing(place: Path) -> None:
    with pytest.raises(
        ValueError, match=r"arguments: answers.jsonl would lie in a pod, which is deleted; expected gs:"
    ):
        submission.check(job("results=[]"), place)


def test_a_run_keeps_its_checkpoints(place: Path) -> None:
    (place / "sft.toml").write_text(
        "model = 'gs://b/m'\ntrain_files = ['prompts.jsonl']\noutput_dir = 'out'\nsteps = 2\n"
    )
    fields = load_toml(GENERATE, JobSpec).model_dump() | {
        "verb": "sft",
        "arguments": ("sft.toml",),
        "files": ("sft.toml", "prompts.jsonl"),
        "topology": "v6e:1x1",
    }
    with pytest.raises(ValueError, match="results: nothing there matches the output out"):
        submission.check(build(JobSpec, fields, source="job"), place, client="rest")
    fields["results"] = ("out/**",)
    submission.check(build(JobSpec, fields, source="job"), place, client="rest")
    several = fields | {"topology": "v6e:2x4", "slices": 2}
    several["arguments"] = ("sft.toml", "--set", "mesh.data=2", "--set", "mesh.fsdp=8", "--set", "rows_per_step=16")
    with pytest.raises(ValueError, match="output_dir: out is another directory on each of the 2 hosts"):
        submission.check(build(JobSpec, several, source="job"), place, client="rest")
