"""The command line of TPU VM jobs: ``python gcp/tpu.py VERB JOB.toml``. Needs no JAX and no TPU.

Exit codes: 0 done; 2 bad input, told in one sentence; 42 interrupted, and the job goes on without us; 1 otherwise.
"""

import logging
import os
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import typer

# Run by its path, Python looks for modules beside this file, and would not find this package.
if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from google.auth.exceptions import GoogleAuthError

from gcp import client, kueue, manifest, names, price, rehearsal, staging, submission, xpk
from gcp import record as records
from gcp.cloud import Cloud, Refused
from gcp.driver import ExistingVm, Launcher, OutOfSight, TakenOver
from gcp.gcloud import GcloudCloud
from gcp.job import JobSpec
from gcp.logs import LogReader, follow
from gcp.objects import Objects, PlannedObjects, Unavailable, open_bucket
from gcp.record import Outcome, Record
from qwq_jax.config.load import load_toml

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 42

app = typer.Typer(
    name="tpu.py",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

ClientName = Literal["rest", "gcloud"]
Job = Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job; see configs/gcp/.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; may be given many times.")
]
Client = Annotated[
    ClientName | None,
    typer.Option("--client", help="How to talk to Cloud TPU: rest, or gcloud, which a VM that exists needs."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print every request and send none.")]


@dataclass(frozen=True)
class Context:
    """What a verb works with: the job, its bucket, its cloud; all of them rehearsed in a dry run.

    Attributes:
        job: As its file and the command line describe it.
        objects: The job's bucket.
        cloud: Where its resources are.
        owner: Of a launcher.
        sleep: Waits.
        told: Settings by which the verb finds the job, or which its command line gives; they have to be the job's.
    """

    job: JobSpec
    objects: Objects
    cloud: Cloud
    owner: str
    sleep: Callable[[float], None]
    told: frozenset[str] = frozenset()

    def record(self) -> Record:
        """Reads the job's record.

        Raises:
            ValueError: There is none, or the command line describes another job.
        """
        saved = records.load(self.objects, self.job.name)
        if saved is None:
            raise ValueError(f"there is no job {self.job.name} in {self.job.bucket}; submit it first")
        running = saved.record.job
        changed = [key for key in JobSpec.model_fields if getattr(running, key) != getattr(self.job, key)]
        if wrong := [key for key in changed if key in self.told]:
            raise ValueError(
                f"{wrong[0]}: job {running.name} was submitted with {getattr(running, wrong[0])!r}, and only another "
                "`submit` changes that"
            )
        if changed:
            _say(f"job {running.name} was submitted with another {', '.join(changed)}, which holds")
        return saved.record

    def launcher(self) -> Launcher:
        """A launcher of this context."""
        boot = staging.BOOT.read_text(encoding="utf-8")
        return Launcher(self.objects, self.cloud, self.owner, boot, _now, self.sleep, _say)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    words = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    for library in ("gcsfs", "asyncio"):  # they print the traceback of an error that they raise besides
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        return app(args=words, prog_name="tpu.py", standalone_mode=False) or EXIT_DONE
    except typer.TyperException as error:
        print(f"error: {error.format_message().removesuffix('.')} (see tpu.py --help)", file=sys.stderr)
        return EXIT_BAD_INPUT
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted: the job goes on; `watch` takes it up again, `cancel` ends it", file=sys.stderr)
        return EXIT_INTERRUPTED
    except TakenOver as taken:
        print(f"interrupted: {taken}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (Unavailable, OutOfSight) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_FAILED
    except (ValueError, Refused, GoogleAuthError, OSError) as error:
        # What the cloud says is told as it says it: permissions, buckets, credentials.
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT


@app.callback()
def options() -> None:
    """Jobs of qwq-jax on TPU VMs: submit, watch, cancel; manifests for GKE."""


@app.command(epilog="Example: `python gcp/tpu.py submit configs/gcp/generate_v6e.toml --dry-run`")
def submit(
    job: Job,
    overrides: Set = None,
    client_name: Client = None,
    again: Annotated[bool, typer.Option("--again", help="Start a job that is over once more.")] = False,
    dry_run: DryRun = False,
) -> int:
    """Stage code and files, get chips, run the job to its end; killed, the same command goes on."""
    spec = load_toml(job, JobSpec, overrides or ())
    files = submission.check(spec, Path.cwd(), client=_client(spec, client_name))
    context = _open(spec, client_name, dry_run=dry_run)
    record = submission.submit(
        context.objects,
        spec,
        files,
        build=staging.build_wheel,
        owner=context.owner,
        now=_now(),
        again=again,
    )
    _say(f"job {spec.name}, run {record.uid}: {spec.slices} x {spec.topology}, {spec.provisioning}")
    _say(f"at most {price.most(record, price.read_prices())}")
    return _told(context.launcher().drive(spec.name))


@app.command(epilog="Example: `python gcp/tpu.py watch configs/gcp/generate_v6e.toml`")
def watch(job: Job, overrides: Set = None, client_name: Client = None, dry_run: DryRun = False) -> int:
    """Take up a job whose launcher is gone, and see it to its end."""
    context = _opened(job, overrides, client_name, dry_run=dry_run)
    launcher = context.launcher()
    launcher.patiently(context.job.name, context.record)
    return _told(launcher.drive(context.job.name))


@app.command(epilog="Example: `python gcp/tpu.py status configs/gcp/generate_v6e.toml`")
def status(job: Job, overrides: Set = None, client_name: Client = None, dry_run: DryRun = False) -> int:
    """Say where a job is, and what has happened."""
    context = _opened(job, overrides, client_name, dry_run=dry_run)
    record = context.record()
    for event in record.events[-20:]:
        print(f"{_when(event.at)}  {event.text}")
    ended = record.outcome or records.outcome(context.objects, record)
    print(f"{record.job.name}: {_state(record, ended)}, attempt {record.attempt}, zone {record.zone}")
    print(f"preemptions {record.preemptions} of {record.job.preemptions}, failures {record.failures} of resources")
    if record.phase in ("asked", "leaving"):
        resource = context.cloud.get(record.zone, record.resource)
        print(f"resource {record.resource}: {resource.detail if resource else 'none'}")
        if found := context.objects.get(record.places.status(record.attempt)):
            print(f"first worker: {found.data.decode()}")
    print(f"deadline {_when(record.deadline)}; {price.cost(record, price.read_prices(), _now())}")
    return EXIT_DONE


@app.command("list", epilog="Example: `python gcp/tpu.py list gs://my-bucket`")
def list_jobs(
    bucket: Annotated[str, typer.Argument(metavar="gs://BUCKET", help="Where the jobs are.")], dry_run: DryRun = False
) -> int:
    """List the jobs of a bucket."""
    if not bucket.startswith("gs://"):
        raise ValueError(f"{bucket}: expected gs://BUCKET")
    objects = PlannedObjects(print) if dry_run else open_bucket(bucket)
    for name in objects.list(f"{names.ROOT}/jobs/"):
        job, _, rest = name.removeprefix(f"{names.ROOT}/jobs/").partition("/")
        if rest != "record.json" or (saved := records.load(objects, job)) is None:
            continue
        record = saved.record
        ended = record.outcome or records.outcome(objects, record)
        print(f"{job:24} {_state(record, ended):12} {record.job.topology:12} {record.zone:18} {_when(record.created)}")
    return EXIT_DONE


@app.command(epilog="Example: `python gcp/tpu.py logs configs/gcp/generate_v6e.toml -f`")
def logs(
    job: Job,
    overrides: Set = None,
    following: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over.")] = False,
    worker: Annotated[int | None, typer.Option(min=0, help="Only this worker's.")] = None,
    dry_run: DryRun = False,
) -> int:
    """Print the mirrored logs, each line with its attempt and worker."""
    context = _opened(job, overrides, None, dry_run=dry_run, cloud=False)
    record = context.record()
    reader = LogReader(context.objects, record, worker)

    def over() -> bool:
        return not following or records.outcome(context.objects, record) is not None

    for line in follow(reader, over=over, sleep=context.sleep):
        print(line, flush=True)
    return EXIT_DONE


@app.command(epilog="Example: `python gcp/tpu.py cancel configs/gcp/generate_v6e.toml`")
def cancel(job: Job, overrides: Set = None, client_name: Client = None, dry_run: DryRun = False) -> int:
    """End a job and delete what it holds; the job may save first, for two minutes."""
    context = _opened(job, overrides, client_name, dry_run=dry_run)
    launcher, wanted = context.launcher(), Outcome(kind="cancelled", detail="by `cancel`", at=_now())
    ended = launcher.patiently(context.job.name, lambda: records.conclude(context.objects, context.record(), wanted))
    record = launcher.drive(context.job.name)
    print(f"{context.job.name}: {_state(record, ended)}")
    return EXIT_DONE


@app.command(epilog="Example: `python gcp/tpu.py cost configs/gcp/generate_v6e.toml`")
def cost(
    job: Job,
    overrides: Set = None,
    prices: Annotated[Path, typer.Option(help="Price table.")] = price.TABLE,
    dry_run: DryRun = False,
) -> int:
    """Say how many chip-hours a job took, and what they cost if the price table knows."""
    table = price.read_prices(prices)
    record = _opened(job, overrides, None, dry_run=dry_run, cloud=False).record()
    print(price.cost(record, table, _now()))
    return EXIT_DONE


@app.command("manifest", epilog="Example: `python gcp/tpu.py manifest JOB.toml --image IMAGE --queue tpus`")
def print_manifest(
    job: Job,
    image: Annotated[str, typer.Option(help="Container image with qwq_jax[tpu] in it.")],
    overrides: Set = None,
    queue: Annotated[str | None, typer.Option(help="Kueue's LocalQueue.")] = None,
    namespace: Annotated[str, typer.Option(help="Of the JobSet.")] = "default",
) -> int:
    """Print a JobSet for GKE; `kubectl apply -f -` takes it."""
    spec = load_toml(job, JobSpec, overrides or ())
    files = submission.check(spec, Path.cwd())
    print(manifest.to_yaml(manifest.jobset(spec, image=image, files=files, queue=queue, namespace=namespace)), end="")
    print(f"# {manifest.NOTE}", file=sys.stderr)
    return EXIT_DONE


@app.command("queue", epilog="Example: `python gcp/tpu.py queue JOB.toml --queue tpus --chips 64 | kubectl apply -f -`")
def print_queue(
    job: Job,
    queue: Annotated[str, typer.Option(help="Kueue's LocalQueue.")],
    chips: Annotated[int, typer.Option(min=1, help="That jobs of this queue may hold together.")],
    overrides: Set = None,
    namespace: Annotated[str, typer.Option(help="Of the LocalQueue and its jobs.")] = "default",
) -> int:
    """Print the queue that `manifest --queue` names, for slices such as the job's; Kueue needs it once."""
    spec = load_toml(job, JobSpec, overrides or ())
    print(manifest.to_yaml(kueue.objects(spec, queue=queue, chips=chips, namespace=namespace)), end="")
    return EXIT_DONE


@app.command("xpk", epilog="Example: `python gcp/tpu.py xpk JOB.toml --image IMAGE --cluster CLUSTER`")
def print_xpk(
    job: Job,
    image: Annotated[str, typer.Option(help="Container image with qwq_jax[tpu] in it.")],
    cluster: Annotated[str, typer.Option(help="xpk's cluster.")],
    overrides: Set = None,
) -> int:
    """Print the command line that starts the job with xpk."""
    print(xpk.command_line(load_toml(job, JobSpec, overrides or ()), image=image, cluster=cluster))
    print(f"# {xpk.NOTE}", file=sys.stderr)
    return EXIT_DONE


def _opened(
    job: Path, overrides: list[str] | None, client_name: ClientName | None, *, dry_run: bool, cloud: bool = True
) -> Context:
    """A context of a job that was submitted; a rehearsed one is submitted first, without a word."""
    spec = load_toml(job, JobSpec, overrides or ())
    # Where it is looked for, too: another project would say that the job's resource is gone.
    told = {"project", "vm", *(override.partition("=")[0].partition(".")[0].strip() for override in overrides or ())}
    context = replace(_open(spec, client_name, dry_run=dry_run, cloud=cloud), told=frozenset(told))
    if dry_run:
        assert isinstance(context.objects, PlannedObjects), "as every rehearsal has them"
        record = rehearsal.seed(context.objects.others(), spec, now=_now())
        if isinstance(context.cloud, rehearsal.PlannedCloud):
            context.cloud.adopt(record)
        if not cloud:
            # Nobody looks at the cloud, and so nobody would see that it ends.
            rehearsal.finish(context.objects.others(), spec.name)
    return context


def _client(spec: JobSpec, client_name: ClientName | None) -> ClientName:
    if spec.vm and client_name == "rest":
        raise ValueError(f"vm: {spec.vm} is reached by ssh, which needs --client gcloud")
    return client_name or ("gcloud" if spec.vm else "rest")


def _open(spec: JobSpec, client_name: ClientName | None, *, dry_run: bool, cloud: bool = True) -> Context:
    owner, chosen_name = f"{uuid.uuid4()}", _client(spec, client_name)
    if dry_run:
        return _rehearsed(spec, chosen_name, owner)
    objects = open_bucket(spec.bucket)
    if not cloud or chosen_name == "gcloud":
        by_command = GcloudCloud(spec.project)
        chosen = _existing(spec, by_command, objects) if spec.vm else by_command
    else:
        chosen = client.connect(spec.project, endpoint=os.environ.get("QWQ_JAX_TPU_ENDPOINT"))
    return Context(spec, objects, chosen, owner, lambda seconds: time.sleep(seconds * _pace()))


def _rehearsed(spec: JobSpec, client_name: ClientName, owner: str) -> Context:
    say = rehearsal.without_secrets(print, spec.environment)
    objects = PlannedObjects(say)

    def active() -> None:
        rehearsal.finish(objects.others(), spec.name)

    planned = rehearsal.PlannedCloud(spec.project, say, by_gcloud=client_name == "gcloud", active=active)
    by_command = GcloudCloud(spec.project, rehearsal.planned_run(say, active))
    chosen = _existing(spec, by_command, objects) if spec.vm else planned
    return Context(spec, objects, chosen, owner, lambda seconds: None)


def _existing(spec: JobSpec, by_command: GcloudCloud, objects: Objects) -> ExistingVm:
    assert spec.vm, "there is one"

    def record() -> Record:
        saved = records.load(objects, spec.name)
        assert saved is not None, "a launcher runs for a record"
        return saved.record

    return ExistingVm(spec.vm, by_command, objects, record)


def _pace() -> float:
    """Length of a second, which tests make shorter."""
    return float(os.environ.get("QWQ_JAX_PACE", "1"))


def _now() -> float:
    return time.time() / _pace()


def _told(record: Record) -> int:
    assert record.outcome is not None, "a job that is over has an outcome"
    _say(f"{record.job.name}: {record.outcome.kind}, {record.outcome.detail}")
    _say(f"{price.cost(record, price.read_prices(), _now())}")
    return {"done": EXIT_DONE, "bad-input": EXIT_BAD_INPUT}.get(record.outcome.kind, EXIT_FAILED)


def _state(record: Record, ended: Outcome | None) -> str:
    if ended is None:
        return {"resting": "waiting", "asked": "active" if record.active_at else "queued"}.get(record.phase, "leaving")
    return ended.kind if record.phase == "over" else f"{ended.kind}, leaving"


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


if __name__ == "__main__":
    sys.exit(main())
