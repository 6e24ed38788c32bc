"""The command line: parse, load the config, call one job.

Exit codes: 0 done; 2 bad input, told in one sentence; 42 interrupted with everything saved, run it again; 1 otherwise.

Each verb imports its job inside its function: that keeps ``--help`` and every mistyped option from waiting for JAX to
load.
"""

import errno
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from qwq_jax import __version__
from qwq_jax.config.evaluate import EvaluateConfig, load_rewards, read_ks
from qwq_jax.config.inference import CHAT_SAMPLING, InferenceConfig
from qwq_jax.config.load import build, load_toml
from qwq_jax.config.place import Place
from qwq_jax.config.plan import Calibration, Prices, Provisioning
from qwq_jax.config.preference import PreferenceConfig
from qwq_jax.config.rl import RlConfig
from qwq_jax.config.tasks import parse_source
from qwq_jax.config.train import SftConfig
from qwq_jax.interrupt import EXIT_INTERRUPTED, Interrupted

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2

# What the user can put right: no room, no permission, no such place.
_USERS_ERRORS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.EFBIG,
    }
)

app = typer.Typer(
    name="qwq-jax",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; may be given many times.")
]
SimulateDevices = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Run on the CPU as if it were N devices.")
]


def _place(context: typer.Context, given: bool) -> Any:
    """Whether the processes of a run join, or, where it was said, which of them this is: who says so wants it."""
    return context.obj or given


# A flag for typer; what verbs get is what `_place` returns, and `runtime.start` takes both.
Distributed = Annotated[
    bool, typer.Option("--distributed", callback=_place, help="Join the other processes of a multi-host run.")
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = app(args=words, prog_name="qwq-jax", standalone_mode=False)
    except typer.TyperException as error:
        print(f"error: {error.format_message().removesuffix('.')} (see qwq-jax --help)", file=sys.stderr)
        return EXIT_BAD_INPUT
    except typer.Abort:
        return EXIT_FAILED
    except Interrupted as stop:
        print(f"interrupted: {stop}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except OSError as error:
        if error.errno not in _USERS_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}", file=sys.stderr)
        return EXIT_BAD_INPUT
    # A verb returns nothing; typer answers Ctrl-C with a code of its own.
    return EXIT_FAILED if code else EXIT_DONE


def check_words(verb: str, words: Sequence[str]) -> None:
    """Parses what follows a verb and runs nothing: for who sends a command to machines that are paid for.

    Raises:
        ValueError: The verb would refuse these words, in its own.
    """
    command: Any = typer.main.get_command(app)
    if verb not in command.commands:
        raise ValueError(f"{verb}: no such command")
    try:
        with command.make_context("qwq-jax", [verb, *words]) as context:
            command.get_command(context, verb).make_context(verb, list(words), parent=context)
    except typer.TyperException as error:
        raise ValueError(f"{verb}: {error.format_message().removesuffix('.')}") from None
    except typer.Exit:
        raise ValueError(f"{verb}: these words ask for help, and run nothing") from None


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
    coordinator_address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where the processes of a run meet: at process 0.")
    ] = None,
    num_processes: Annotated[int | None, typer.Option(min=1, metavar="N", help="How many they are.")] = None,
    process_id: Annotated[int | None, typer.Option(min=0, metavar="I", help="Which this one is, from 0 on.")] = None,
) -> None:
    """QwQ-32B and the Qwen2 family in JAX: convert, answer in batch, serve, fine-tune, hand back.

    TPU pods, GKE and Slurm tell the processes of a run (`--distributed`) of each other; elsewhere
    `--coordinator-address`, `--num-processes` and `--process-id` do, before the verb.
    """
    given = (coordinator_address, num_processes, process_id)
    if all(each is None for each in given):
        return
    if num_processes is None or process_id is None or coordinator_address is None:
        raise ValueError("--coordinator-address, --num-processes and --process-id go together")
    assert isinstance(context.command, TyperGroup)
    verb = context.command.commands.get(context.invoked_subcommand or "")
    if verb is not None and all(each.name != "distributed" for each in verb.params):
        raise ValueError(f"{verb.name} is done by one process: leave out --process-id and what belongs to it")
    context.obj = Place(coordinator_address, num_processes, process_id)


@app.command(epilog="Example: `qwq-jax convert Qwen/QwQ-32B gs://bucket/qwq-32b`")
def convert(
    source: Annotated[str, typer.Argument(help="Hugging Face directory, local or gs://, or hub id.")],
    dest: Annotated[str, typer.Argument(help="Checkpoint directory to write, local or gs://.")],
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Store weights as this; their own type otherwise.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(metavar="int8|int4", help="Store projections in 8 or 4 bits; int4-g64, int8-head, ...")
    ] = None,
    allow_nan: Annotated[bool, typer.Option("--allow-nan", help="Accept weights that are NaN or infinite.")] = False,
    low_disk: Annotated[bool, typer.Option("--low-disk", help="Delete each downloaded shard after use.")] = False,
    distributed: Distributed = False,
) -> None:
    """Turn a Hugging Face model into an Orbax checkpoint, tensor by tensor; the same command goes on after a stop."""
    from qwq_jax import runtime
    from qwq_jax.jobs import convert as job

    runtime.start(distributed=distributed)
    words = {"dtype": dtype, "quantize": quantize, "allow_nan": allow_nan, "low_disk": low_disk}
    job.convert(source, dest, **words, together=bool(distributed))


@app.command(epilog="Example: `qwq-jax export runs/sft/model-000800 exported`")
def export(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint directory, local or gs://.")],
    dest: Annotated[str, typer.Argument(help="Hugging Face directory to write.")],
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Write a quantised checkpoint, whose original is lost.")
    ] = False,
) -> None:
    """Turn an Orbax checkpoint back into a Hugging Face model directory."""
    from qwq_jax import runtime
    from qwq_jax.jobs import export as job

    runtime.start()
    job.export(checkpoint, dest, dequantize=dequantize)


@app.command(
    epilog="Example: `qwq-jax generate qwq-32b --input prompts.jsonl --output answers.jsonl --set mesh.tensor=8`"
)
def generate(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint directory, local or gs://.")],
    input: Annotated[Path, typer.Option(help="JSONL of requests: OpenAI batch lines or the short forms.")],
    output: Annotated[Path, typer.Option(help="JSONL of answers; lines already in it are not served again.")],
    seed: Annotated[int, typer.Option(min=0, help="For requests that bring no seed of their own.")] = 0,
    overrides: Set = None,
    simulate_devices: SimulateDevices = None,
    distributed: Distributed = False,
) -> None:
    """Answer a file of requests; the same command goes on after a stop.

    Settings are `engine.*`, `mesh.*`, and `sampling.*` for requests that do not say themselves.
    """
    from qwq_jax import runtime
    from qwq_jax.jobs import generate as job

    runtime.start(simulate_devices=simulate_devices, distributed=distributed)
    config = _inference_config(overrides, {"compute_dtype": runtime.default_compute_dtype()})
    job.generate(
        checkpoint,
        input,
        output,
        engine=config.engine,
        mesh=config.mesh,
        sampling=config.sampling,
        seed=seed,
    )


@app.command(epilog="Example: `qwq-jax chat qwq-32b --set mesh.tensor=8`")
def chat(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint directory, local or gs://.")],
    overrides: Set = None,
    simulate_devices: SimulateDevices = None,
) -> None:
    """Talk to a model in the terminal, its thinking dimmed. Settings are `engine.*`, `mesh.*` and `sampling.*`."""
    from qwq_jax import runtime
    from qwq_jax.jobs import chat as job

    runtime.start(simulate_devices=simulate_devices)
    advised = CHAT_SAMPLING.model_dump(exclude_unset=True)
    config = _inference_config(overrides, {"compute_dtype": runtime.default_compute_dtype()}, advised)
    job.chat(checkpoint, engine=config.engine, mesh=config.mesh, sampling=config.sampling)


@app.command(epilog="Example: `qwq-jax serve qwq-32b --port 8000 --api-key-file keys.txt --set mesh.tensor=8`")
def serve(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint directory, local or gs://.")],
    host: Annotated[str, typer.Option(help="Name or address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")] = 8000,
    api_key: Annotated[str | None, typer.Option(help="Key that clients have to send; a file shows in no list.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File of such keys, one a line.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="The directory's name otherwise.")] = None,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests in line; one more is answered 429.")] = 256,
    drain_seconds: Annotated[float, typer.Option(min=0, help="Time to end for what runs at a SIGTERM.")] = 30.0,
    warm_up: Annotated[bool, typer.Option(help="Compile all usual programs before the port opens.")] = True,
    overrides: Set = None,
    simulate_devices: SimulateDevices = None,
) -> None:
    """Serve a model over HTTP as OpenAI does. Settings are `engine.*`, `mesh.*` and `sampling.*`."""
    if find_spec("prometheus_client") is None:
        raise ValueError("serve needs prometheus_client: pip install 'qwq_jax[serve]'")
    from qwq_jax import runtime
    from qwq_jax.jobs import serve as job

    keys = (() if api_key is None else (api_key,)) + (() if api_key_file is None else job.read_keys(api_key_file))
    name = job.model_name(checkpoint) if served_model_name is None else served_model_name
    options = job.ServeOptions(name, host, port, keys, max_waiting, drain_seconds)
    runtime.start(simulate_devices=simulate_devices)
    config = _inference_config(overrides, {"compute_dtype": runtime.default_compute_dtype()})
    job.serve(checkpoint, options, engine=config.engine, mesh=config.mesh, sampling=config.sampling, warm_up=warm_up)


@app.command(epilog="Example: `qwq-jax warm-up qwq-32b --set mesh.tensor=8`")
def warm_up(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint directory, local or gs://.")],
    overrides: Set = None,
    simulate_devices: SimulateDevices = None,
) -> None:
    """Compile what `generate`, `chat` and `serve` need with these settings, for the compile cache."""
    from qwq_jax import runtime
    from qwq_jax.jobs import warm_up as job

    runtime.start(simulate_devices=simulate_devices)
    config = _inference_config(overrides, {"compute_dtype": runtime.default_compute_dtype()})
    job.warm_up(checkpoint, engine=config.engine, mesh=config.mesh)


@app.command(epilog="Example: `qwq-jax sft configs/sft/tiny_reasoner.toml --set optimizer.learning_rate=1e-4`")
def sft(
    config: Annotated[Path, typer.Argument(help="TOML file of the run.")],
    overrides: Set = None,
    simulate_devices: SimulateDevices = None,
    distributed: Distributed = False,
) -> None:
    """Fine-tune on conversations; the same command goes on after a stop."""
    settings = load_toml(config, SftConfig, overrides or ())

    from qwq_jax import runtime
    from qwq_jax.jobs import sft as job

    runtime.start(simulate_devices=simulate_devices, distributed=distributed)
    job.sft(settings)


@app.command(epilog="Example: `qwq-jax dpo configs/rl/tiny_dpo.toml --set dpo.beta=0.05`")
def dpo(
    config: Annotated[Path, typer.Argument(help="TOML file of the run, with a table dpo.")],
    overrides: Set = None,
    simulate_devices: SimulateDevices = None,
    distributed: Distributed = False,
) -> None:
    """Train a policy on pairs of replies of which one is preferred; the same command goes on after a stop."""
    settings = load_toml(config, PreferenceConfig, overrides or ())

    from qwq_jax import runtime
    from qwq_jax.jobs import preference as job

    runtime.start(simulate_devices=simulate_devices, distributed=distributed)
    job.dpo(settings)


@app.command(epilog="Example: `qwq-jax reward-model configs/rl/tiny_reward_model.toml --set steps=50`")
def reward_model(
    config: Annotated[Path, typer.Argument(help="TOML file of the run, with a table reward_model.")],
    overrides: Set = None,
    simulate_devices: SimulateDevices = None,
    distributed: Distributed = False,
) -> None:
    """Train a model that scores replies on such pairs; the same command goes on after a stop."""
    settings = load_toml(config, PreferenceConfig, overrides or ())

    from qwq_jax import runtime
    from qwq_jax.jobs import preference as job

    runtime.start(simulate_devices=simulate_devices, distributed=distributed)
    job.reward_model(settings)


@app.command(epilog="Example: `qwq-jax rl configs/rl/tiny_grpo.toml --set steps=50`")
def rl(
    config: Annotated[Path, typer.Argument(help="TOML file of the run.")],
    overrides: Set = None,
    simulate_devices: SimulateDevices = None,
    distributed: Distributed = False,
) -> None:
    """Reinforcement learning on tasks that can be judged; the same command goes on after a stop."""
    settings = load_toml(config, RlConfig, overrides or ())

    from qwq_jax import runtime
    from qwq_jax.jobs import rl as job

    runtime.start(simulate_devices=simulate_devices, distributed=distributed)
    job.rl(settings)


@app.command(
    "eval",
    epilog="Example: `qwq-jax eval out/demo/checkpoint --task arithmetic:split=held-out --samples 8 --output out/eval`",
)
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint directory, local or gs://.")],
    task: Annotated[
        list[str],
        typer.Option(
            metavar="SOURCE",
            help="JSONL file, or arithmetic:KEY=VALUE,... or reasoning_gym:dataset=NAME,...; may repeat.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Directory for replies, scores, table and report.")],
    samples: Annotated[int, typer.Option(min=1, max=1000, help="Replies to each task.")] = 1,
    k: Annotated[str, typer.Option(metavar="K,K", help="For pass@k and maj@k; 1 and all samples otherwise.")] = "",
    rewards: Annotated[
        Path | None, typer.Option(help="TOML with [[rewards]], such as a recipe; by the kind of task otherwise.")
    ] = None,
    compare: Annotated[Path | None, typer.Option(help="Output of another evaluation, to compare with.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that judge replies.")] = os.cpu_count() or 1,
    seed: Annotated[int, typer.Option(min=0, help="Another one, other replies.")] = 0,
    overrides: Set = None,
    simulate_devices: SimulateDevices = None,
    distributed: Distributed = False,
) -> None:
    """Measure how many tasks a model solves: pass@k, avg@k, maj@k. The same command goes on after a stop.

    Settings are `engine.*`, `mesh.*` and `sampling.*`.
    """
    given = {
        "tasks": [parse_source(each) for each in task],
        "samples": samples,
        "ks": read_ks(k),
        "rewards": () if rewards is None else load_rewards(rewards),
        "workers": workers,
        "seed": seed,
    }
    settings = build(EvaluateConfig, given, source="options")
    from qwq_jax import runtime
    from qwq_jax.jobs import evaluate as job

    runtime.start(simulate_devices=simulate_devices, distributed=distributed)
    advised = CHAT_SAMPLING.model_dump(exclude_unset=True)
    config = _inference_config(overrides, {"compute_dtype": runtime.default_compute_dtype()}, advised)
    job.evaluate_checkpoint(
        checkpoint,
        output,
        settings,
        engine=config.engine,
        mesh=config.mesh,
        sampling=config.sampling,
        before=compare,
    )


@app.command(
    epilog="Example: `qwq-jax plan configs/rl/qwq_32b_stage1.toml --model configs/models/qwq-32b.toml "
    "--topology v5p:4x4x4`"
)
def plan(
    config: Annotated[Path, typer.Argument(help="TOML file of an rl or sft run, or of inference.")],
    topology: Annotated[str, typer.Option(metavar="CHIP:AxB,...", help="Slices, as libtpu names them.")] = "",
    all_topologies: Annotated[bool, typer.Option("--all", help="All usual slices.")] = False,
    model: Annotated[
        Path | None, typer.Option(help="Its architecture: configs/models/*.toml, a config.json or its directory.")
    ] = None,
    reward_model: Annotated[Path | None, typer.Option(help="The same of the reward model of an rl run.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Mean length of a prompt.")] = None,
    completion_tokens: Annotated[int | None, typer.Option(min=1, help="Mean length of a completion.")] = None,
    prices: Annotated[Path | None, typer.Option(help="TOML with the price of a chip's hour.")] = None,
    provisioning: Annotated[Provisioning, typer.Option(help="Which price.")] = "on-demand",
    calibration: Annotated[
        Path | None,
        typer.Option(help="TOML with an entry [[measured]] a timed program: chip, program, seconds, predicted."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Directory for plan.json and plan.html.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Compilations at a time.")] = os.cpu_count() or 1,
    search: Annotated[bool, typer.Option("--search", help="Compile what is recommended too.")] = False,
    machine_code: Annotated[
        bool,
        typer.Option(
            "--machine-code",
            help="Compile to the end, which takes two to five times as long: the size of programs is measured rather "
            "than reserved, and what the last stage refuses is found.",
        ),
    ] = False,
    overrides: Set = None,
) -> None:
    """Compile a job for TPUs that are not here: memory, time and cost of each slice."""
    if find_spec("libtpu") is None:
        raise ValueError("plan needs the TPU compiler, libtpu, which runs on Linux: pip install 'qwq_jax[tpu]'")
    from qwq_jax import runtime
    from qwq_jax.jobs import plan as job
    from qwq_jax.jobs.plan_job import read_job

    options = job.PlanOptions(
        job.read_topologies(topology, all_topologies),
        Prices() if prices is None else load_toml(prices, Prices),
        Calibration() if calibration is None else load_toml(calibration, Calibration),
        output,
        runtime.plan_directory(),
        workers,
        search,
        provisioning,
        machine_code,
    )
    if output is not None and output.exists() and not output.is_dir():
        raise ValueError(f"--output {output}: expected a directory, and this is a file")
    lengths = (prompt_tokens, completion_tokens)
    asked = read_job(config, overrides or (), model=model, reward_model=reward_model, lengths=lengths)
    if missing := [each.topology.name for each in job.plan(asked, options) if not each.fits]:
        raise ValueError(f"{config.name} does not fit {', '.join(missing)}; see above")


@app.command(epilog="Example: `qwq-jax demo --output out/demo`")
def demo(
    output: Annotated[Path, typer.Option(help="Directory for everything the demo makes.")] = Path("out/demo"),
    simulate_devices: SimulateDevices = 8,
) -> None:
    """Show the whole story on the embedded tiny model: convert, answer on a mesh, score, export."""
    from qwq_jax import runtime
    from qwq_jax.jobs import demo as job

    runtime.start(simulate_devices=simulate_devices)
    job.demo(output)


def _inference_config(
    overrides: Sequence[str] | None, engine: dict[str, Any], sampling: dict[str, Any] | None = None
) -> InferenceConfig:
    defaults = {"engine": engine, "sampling": sampling or {}}
    return build(InferenceConfig, defaults, overrides or (), source="settings")


if __name__ == "__main__":
    sys.exit(main())
