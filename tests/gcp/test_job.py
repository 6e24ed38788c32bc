"""Job files: those that ship, and what is wrong with others, in a sentence."""

from pathlib import Path
from typing import Any, get_args

import pytest

from gcp import client, driver, gcloud, manifest, submission, xpk
from gcp.job import DISTRIBUTED, JobSpec
from gcp.topology import GENERATIONS, Topology
from qwq_jax.config.load import load_toml
from qwq_jax.config.plan import ChipName
from tests.gcp.memory import MemoryObjects, a_job, a_record

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "configs" / "gcp").glob("*.toml"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_the_jobs_that_ship(path):
    job = load_toml(path, JobSpec)
    assert job.slice.accelerator_type
    for name in job.files:
        if name.startswith("configs/"):
            assert (ROOT / name).exists()


@pytest.mark.parametrize(
    ("text", "accelerator", "hosts", "chips_per_host"),
    [
        ("v4:2x2x4", "v4-32", 4, 4),
        ("v5e:1x1", "v5litepod-1", 1, 1),
        ("v5e:2x4", "v5litepod-8", 1, 8),
        ("v5e:4x4", "v5litepod-16", 4, 4),
        ("v5p:4x4x4", "v5p-128", 16, 4),
        ("v6e:2x4", "v6e-8", 1, 8),
        ("v6e:16x16", "v6e-256", 64, 4),
        ("cpu:4", "cpu-4", 4, 1),
    ],
)
def test_topologies(text, accelerator, hosts, chips_per_host):
    topology = Topology.parse(text)
    assert (topology.accelerator_type, topology.hosts, topology.chips_per_host) == (accelerator, hosts, chips_per_host)
    assert str(topology) == text


@pytest.mark.parametrize(
    ("usual", "other"),
    [
        ("v5p:2x2x1", None),
        ("v5p:2x4x4", None),
        ("v5p:4x4x4", "v4:2x4x8"),
        ("v4:4x8x8", "v4:4x4x16"),
        ("v5p:8x12x16", "v5p:4x16x24"),
        ("v5p:4x4x12", "v5p:12x4x4"),
        ("v6e:2x4", "v6e:4x2"),
        ("v5e:8x16", "v5e:4x32"),
        ("cpu:4", None),
    ],
)
def test_the_shapes_that_accelerator_types_stand_for(usual, other):
    assert Topology.parse(usual).is_usual
    assert other is None or not Topology.parse(other).is_usual


def test_another_shape_is_asked_for():
    """Not the type, by which the cloud would choose the shape."""

    def asked(topology: str) -> tuple[Any, list[str], str]:
        job = a_job(topology=topology, zones=("a",))
        request = driver.request(a_record(job, attempt=1), boot="", now=1000.0)
        (spec,) = client.queued_resource(request, "projects/p/locations/a").tpu.node_spec
        return spec.node, gcloud.create_words(request, Path("M")), xpk.command_line(job, image="i", cluster="c")

    node, words, line = asked("v5p:4x4x16")
    assert (node.accelerator_type, node.accelerator_config.topology) == ("", "4x4x16")
    assert node.accelerator_config.type_.name == "V5P"
    assert {"--type=v5p", "--topology=4x4x16"} <= {*words} and "--tpu-type v5p-4x4x16" in line
    assert gcloud.GcloudCloud("p")._command(words, "a")[1] == "alpha", "the released gcloud knows no such type"
    assert asked("v5e:2x8")[0].accelerator_config.type_.name == "V5LITE_POD"
    node, words, line = asked("v5p:4x8x8")
    assert node.accelerator_type == "v5p-512" and not node.accelerator_config.topology
    assert "--accelerator-type=v5p-512" in words and "--tpu-type v5p-512" in line


def test_generations_are_named_as_in_the_price_table():
    """One table serves `cost` and `qwq-jax plan`."""
    assert {*GENERATIONS} - {"cpu"} == {*get_args(ChipName)}
    assert Topology.parse("tpu7x:2x2x1").gke_machine == "tpu7x-standard-4t"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "Job"}, "name 'Job': expected at most 40 lower-case"),
        ({"name": "x" * 41}, "expected at most 40"),
        ({"bucket": "bucket"}, "bucket 'bucket': expected gs://BUCKET"),
        ({"bucket": "gs://bucket/dir"}, "without a directory"),
        ({"results": ["gs://bucket/x"]}, "results: gs://bucket/x is no file of the working directory"),
        ({"vm": "m", "zones": ["a"], "network": "n"}, "network: VM m exists, and has its own"),
        ({"vm": "m", "zones": ["a"], "service_account": "s"}, "service_account: VM m exists, and has its own"),
        ({"vm": "m", "zones": ["a"], "runtime_version": "r"}, "runtime_version: VM m exists, and has its own"),
        ({"topology": "v9:2x2"}, "expected GENERATION:SHAPE with one of v4, v5e"),
        ({"topology": "v5e:2x2x2"}, "v5e has shapes such as v5e:4x4"),
        ({"topology": "v5e:3x3"}, "9 chips do not fill hosts of 4"),
        ({"topology": "v5e:1x12"}, "there is no such slice; its sides are powers of two, from 2x2 on"),
        ({"topology": "v6e:3x4"}, "'v6e:3x4': there is no such slice"),
        ({"topology": "v5p:1x1x4"}, "there is no such slice; its sides are even, from 2x2x2 on, or 2x2x1"),
        ({"zones": ()}, "zones"),
        ({"zones": ("us-east5-b", "US East 5")}, "zones: 'US East 5' is none; expected one such as us-east5-b"),
        ({"zones": ("us-east5b",)}, "zones: us-east5b is none; expected us-east5-b"),
        ({"project": "My Project"}, "project 'My Project': expected a project's ID"),
        ({"verb": "export", "topology": "v5e:4x4"}, "verb export runs on one host"),
        ({"verb": "demo"}, "verb: expected"),
        ({"files": ("/etc/passwd",)}, "'/etc/passwd' is not a relative path"),
        ({"results": ("../x",)}, "'../x' is not a relative path"),
        ({"arguments": ("--distributed",)}, "leave it out"),
        ({"deadline_hours": 0.0}, "deadline_hours"),
        ({"reservation": "r"}, "only with provisioning"),
        ({"vm": "v"}, "one slice and one zone"),
        ({"zone": "a"}, "zone: unknown key"),
    ],
)
def test_bad_jobs(changes, sentence, tmp_path):
    values = a_job().model_dump(mode="json", exclude_none=True, exclude_defaults=True) | changes
    lines = [f"{key} = {str(list(v)) if isinstance(v, list | tuple) else repr(v)}" for key, v in values.items()]
    (tmp_path / "job.toml").write_text("\n".join(lines))
    with pytest.raises(ValueError) as caught:
        load_toml(tmp_path / "job.toml", JobSpec)
    assert sentence in str(caught.value) and "job.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("verb", DISTRIBUTED)
def test_verbs_that_join_hosts_are_told_to_on_several_hosts(verb):
    for topology, told in (("v5e:4x4", ["--distributed"]), ("v5e:2x4", [])):
        job = a_job(verb=verb, topology=topology, arguments=("a",))
        given = driver.assignment(a_record(job, attempt=1))
        assert given.command == [verb, "a", *told] and given.distributed == bool(told)
        (jobset,) = manifest.jobset(job, image="i", files={}, queue=None, namespace="n")
        pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        assert pod["containers"][0]["command"] == ["qwq-jax", *given.command]


class TestCheck:
    """What a job would refuse after an hour in the queue is refused on the laptop."""

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(ValueError, match="files: prompts.jsonl cannot be read: No such file"):
            submission.check(a_job(files=("prompts.jsonl",)), tmp_path)

    def test_the_job_s_own_configuration(self, tmp_path):
        (tmp_path / "x.toml").write_text("stepps = 1\n")
        with pytest.raises(ValueError, match=r"x.toml.*stepps: unknown key"):
            submission.check(a_job(verb="rl", arguments=("x.toml",), files=("x.toml",)), tmp_path)

    def test_no_configuration(self, tmp_path):
        with pytest.raises(ValueError, match="arguments: sft: Missing argument 'config'"):
            submission.check(a_job(verb="sft"), tmp_path)
        with pytest.raises(ValueError, match="sft needs its TOML file as the first one"):
            submission.check(a_job(verb="sft", arguments=("--set", "seed=1", "sft.toml")), tmp_path)

    @pytest.fixture
    def place(self, tmp_path):
        """Where everything is that the jobs name."""
        for path in JOBS:
            for name in load_toml(path, JobSpec).files:
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                source = ROOT / name
                (tmp_path / name).write_bytes(source.read_bytes() if source.exists() else b"{}")
        settings = (
            'model = "m"\ntrain_files = ["./conversations.jsonl"]\noutput_dir = "o"\nsteps = 1\nrows_per_step = 4\n'
        )
        (tmp_path / "sft.toml").write_text(settings)
        return tmp_path

    @pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
    def test_the_jobs_that_ship_name_all_that_they_read(self, place, path):
        job = load_toml(path, JobSpec)
        assert set(submission.check(job, place, client="rest")) == set(job.files)

    @pytest.mark.parametrize("missing", ["data/code_train.jsonl", "data/code_held_out.jsonl"])
    def test_a_file_that_the_configuration_names_and_the_job_does_not(self, place, missing):
        job = load_toml(ROOT / "configs/gcp/rl_v5p.toml", JobSpec)
        less = job.model_copy(update={"files": tuple(name for name in job.files if name != missing)})
        with pytest.raises(ValueError, match=f"files: configs/rl/qwq_32b_stage1.toml reads {missing}, which has to be"):
            submission.check(less, place)

    @pytest.mark.parametrize("key", ["train_files", "eval_files"])
    def test_the_job_s_overrides_count(self, place, key):
        job = load_toml(ROOT / "configs/gcp/tiny_cpu.toml", JobSpec)
        other = job.model_copy(update={"arguments": ("sft.toml", "--set", f'{key}=["other.jsonl"]')})
        with pytest.raises(ValueError, match=r"files: sft.toml reads other.jsonl, which has to be listed"):
            submission.check(other, place)

    def test_a_path_of_a_disk_is_for_hosts_that_may_have_one(self, place):
        job = load_toml(ROOT / "configs/gcp/tiny_cpu.toml", JobSpec)
        mounted = job.model_copy(update={"arguments": ("sft.toml", "--set", 'train_files=["/mnt/x.jsonl"]')})
        submission.check(
            mounted.model_copy(update={"arguments": (*mounted.arguments, "--set", "output_dir=/mnt/o")}), place
        )
        submission.check(mounted.model_copy(update={"vm": "mine"}), place, client="rest")
        with pytest.raises(ValueError, match=r"reads /mnt/x.jsonl"):
            submission.check(mounted, place, client="rest")

    def test_a_bucket_that_is_nobodys(self, place):
        job = load_toml(ROOT / "configs/gcp/rl_v5p.toml", JobSpec)
        forgotten = job.model_copy(update={"arguments": (job.arguments[0], *job.arguments[3:])})
        with pytest.raises(ValueError, match='model is still gs://BUCKET/qwq-32b; add "--set", "model=..."'):
            submission.check(forgotten, place)

    def test_a_file_that_is_not_listed(self, tmp_path):
        with pytest.raises(ValueError, match="has to be listed"):
            words = ("m", "--input", "x.toml", "--output", "/mnt/o.jsonl")
            submission.check(a_job(arguments=words), tmp_path)


def test_submitting_twice_and_differently():
    objects = MemoryObjects()
    built = []

    def build() -> tuple[str, bytes]:
        built.append(1)
        return "w.whl", b"w"

    def submit(job: JobSpec, files: dict[str, bytes], **options: object):
        return submission.submit(objects, job, files, build=build, owner="me", now=1.0, **options)

    job = a_job(files=("x",))
    first = submit(job, {"x": b"1"})
    assert submit(job, {"x": b"1"}) == first and built == [1]
    with pytest.raises(ValueError, match="job job runs with another slices"):
        submit(a_job(files=("x",), slices=2), {"x": b"1"})
    with pytest.raises(ValueError, match="runs with another x"):
        submit(job, {"x": b"2"})
    with pytest.raises(ValueError, match="runs with another x"):
        submit(job, {"x": b"2"}, again=True)
