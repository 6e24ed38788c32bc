"""Reinforcement learning beside TRL and tunix: same model, prompts, sizes, optimizer and machine, one after the other.

    python -m tools.bench_rl --trl-python TRL/bin/python --tunix-python TUNIX/bin/python --write docs/benchmarks/rl.md

The peers live in virtual environments of their own, made once::

    python -m venv TRL && TRL/bin/pip install torch==2.13.0 trl
    python -m venv TUNIX && TUNIX/bin/pip install google-tunix jax

Measured are samples a second, over the same steps of each after compilation, and the time to the first evaluation on
held-out problems that reaches the target. Our side is `qwq-jax rl CONFIG`, with a compile cache that is empty when it
begins, once before the peers and once, for its speed alone, after them: the slower one counts. A peer that is not
given is left out, and the report says so. `--set mesh.data=2` makes a device of each of two processors.
`--device cuda` gives each side a GPU, one after the other; then `--threads` is that of the processors beside it.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from qwq_jax import __version__
from qwq_jax.chat import ChatTokenizer
from qwq_jax.config.load import load_toml
from qwq_jax.config.rewards import ArithmeticConfig
from qwq_jax.config.rl import RlConfig
from qwq_jax.jobs.rl import read_tasks
from qwq_jax.rl.prompts import Prompt, PromptOrder, make_prompts
from tools.rl_race import Descent, Question, Race, use_threads
from tools.rl_race_report import Goal, Outcome, Setting, as_json, markdown, training_seconds

ROOT = Path(__file__).parents[1]
OURS, AGAIN = "qwq_jax", "qwq_jax, after the peers"
PEERS = {"trl": "TRL", "tunix": "tunix"}
POLL_SECONDS = 0.1
# What starting, compiling and evaluating may take beside the limit of training, before a side is given up.
GRACE_SECONDS = 600.0
LOG_LINES = 8
# Steps by which sizes of a micro-batch are compared.
TRIAL_SKIPS, TRIAL_MEASURES = 2, 2


@dataclass(frozen=True)
class Side:
    """One that runs.

    Attributes:
        name: As the report calls it.
        command: Starts it.
        records: Where it writes a line a step.
        log: Where all else that it says goes.
        environment: Of the process, beside what is there.
    """

    name: str
    command: Sequence[str]
    records: Path
    log: Path
    environment: Mapping[str, str]


def make_race(config: RlConfig, *, eval_every: int, threads: int) -> Race:
    """What all sides are given, from a config of ours.

    Raises:
        SystemExit: The peers cannot be given the same.
    """
    check(config)
    tasks, tokenizer = read_tasks(config), ChatTokenizer.from_directory(config.model)
    rollout, optimizer = config.rollout, config.optimizer

    def question(prompt: Prompt) -> Question:
        messages = [dict(message) for message in prompt.task.messages]
        answer = int(prompt.task.judge["answer"])
        return Question(messages, tokenizer.render(messages), list(prompt.token_ids), answer)

    prompts = make_prompts(tasks.train, tokenizer, longest=rollout.max_prompt_tokens)
    order = PromptOrder(prompts, seed=config.seed)
    held_out = make_prompts(tasks.held_out, tokenizer, longest=rollout.max_prompt_tokens)
    assert optimizer.clip_norm is not None and config.objective.clip_low is not None
    assert config.objective.clip_high is not None
    return Race(
        model=str(Path(config.model).resolve()),
        prompts=[question(order[i]) for i in range(config.last_step * rollout.prompts_per_step)],
        held_out=[question(prompt) for prompt in held_out],
        prompts_per_step=rollout.prompts_per_step,
        group_size=rollout.group_size,
        max_prompt_tokens=rollout.max_prompt_tokens,
        max_tokens=rollout.max_tokens,
        temperature=rollout.temperature,
        clip_low=config.objective.clip_low,
        clip_high=config.objective.clip_high,
        descent=Descent(
            learning_rate=optimizer.learning_rate,
            warmup_steps=optimizer.warmup_steps,
            final_lr_ratio=optimizer.final_lr_ratio,
            steps=config.updates,
            b1=optimizer.b1,
            b2=optimizer.b2,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            clip_norm=optimizer.clip_norm,
        ),
        eval_every=eval_every,
        seed=config.seed,
        threads=threads,
    )


def check(config: RlConfig) -> None:
    """Exits unless the peers can be given all that a config says."""
    objective, evaluation = config.objective, config.evaluation
    dr_grpo = (objective.baseline, objective.scale, objective.surrogate, objective.aggregation, objective.ratio)
    needed = {
        "objective dr_grpo without kl, entropy bonus, delta, masked or dropped completions": dr_grpo
        == ("group_mean", "none", "clip", "constant", "token")
        and (objective.kl, objective.entropy_coefficient, objective.delta) == ("none", 0.0, None)
        and not objective.mask_truncated
        and objective.uninformative_groups == "keep",
        "one update a step": config.updates_per_step * config.passes_per_step == 1,
        "the reward arithmetic alone": config.rewards == (ArithmeticConfig(),),
        "all weights trained, in float32": config.lora is None
        and (config.param_dtype, config.compute_dtype) == ("float32", "float32"),
        "a shuffled curriculum": config.curriculum.order == "shuffled",
        "greedy evaluation, as long as the rollout": evaluation is not None
        and (evaluation.samples, evaluation.temperature) == (1, 0.0)
        and evaluation.max_tokens in (None, config.rollout.max_tokens),
        "optimizer.clip_norm and no weight decay": config.optimizer.clip_norm is not None
        and config.optimizer.weight_decay == 0.0,
    }
    missing = [name for name, there in needed.items() if not there]
    if missing:
        raise SystemExit(f"the race needs {'; '.join(missing)}")


def our_side(name: str, options: argparse.Namespace, folder: Path, *, devices: int) -> Side:
    """`qwq-jax rl` in a directory, and with a compile cache, that nobody has used, on a mesh of so many devices."""
    folder.mkdir(parents=True)
    settings = [*options.set, f"output_dir={folder}/out", f"evaluation.every={options.eval_every}", "save_every=0"]
    command = [sys.executable, "-m", "qwq_jax", "rl", str(options.config)]
    for setting in settings:
        command += ["--set", setting]
    if devices > 1:
        command += ["--simulate-devices", str(devices)]
    environment = {"JAX_PLATFORMS": options.device, "JAX_COMPILATION_CACHE_DIR": str(folder / "xla")}
    # As torch multiplies float32 on a GPU unless it is told otherwise.
    environment |= {"JAX_DEFAULT_MATMUL_PRECISION": "float32"} if options.device == "cuda" else {}
    return Side(name, command, folder / "out" / "metrics.jsonl", folder / "log", environment)


def peer_side(peer: str, options: argparse.Namespace, race: Path, folder: Path, *, micro_batch: int) -> Side:
    """A peer in its own environment."""
    python = {"trl": options.trl_python, "tunix": options.tunix_python}[peer]
    folder.mkdir(parents=True)
    command = [str(python), "-m", f"tools.rl_peer_{peer}", "--race", str(race), "--record", str(folder / "records")]
    command += ["--micro-batch", str(micro_batch), "--device", options.device]
    environment = {
        "JAX_PLATFORMS": options.device,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
        "OMP_NUM_THREADS": str(options.threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    return Side(PEERS[peer], command, folder / "records", folder / "log", environment)


def run(side: Side, goal: Goal) -> Outcome:
    """Runs a side until all is known that is asked, and ends it."""
    print(f"{side.name}: {' '.join(side.command)}", flush=True)
    begun, arrived, shown, failure = time.perf_counter(), None, 0, None
    with side.log.open("wb") as log:
        process = subprocess.Popen(
            side.command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **side.environment}, cwd=ROOT
        )
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                outcome, elapsed = Outcome.read(side.name, side.records), time.perf_counter() - begun
                shown = show(outcome, shown)
                if arrived is None and goal.target is not None and outcome.reached(goal.target) is not None:
                    arrived = elapsed
                if outcome.enough(goal):
                    break
                if elapsed > 2 * goal.limit + GRACE_SECONDS:
                    failure = f"given up after {elapsed:.0f} s"
                    break
            else:
                failure = f"ended with {process.returncode}: {last_lines(side.log)}" if process.returncode else None
        finally:
            end(process)
    outcome = Outcome.read(side.name, side.records)
    if not outcome.measured(goal):
        failure = failure or f"only {len(outcome.steps)} steps: {last_lines(side.log)}"
    seconds = process_seconds(outcome, arrived, goal)
    return replace(outcome, process_seconds=seconds, failure=failure, speed_alone=goal.target is None)


def process_seconds(outcome: Outcome, arrived: float | None, goal: Goal) -> float | None:
    """Takes the evaluations after the first step out of the time at which the target was seen to be reached."""
    if arrived is None or goal.target is None:
        return None
    step = outcome.reached(goal.target)
    assert step is not None
    return arrived - sum(record.get("seconds_evaluation", 0.0) for record in outcome.steps if record["step"] <= step)


def end(process: subprocess.Popen[bytes]) -> None:
    """Asks a process to end, and ends it if it does not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def show(outcome: Outcome, shown: int) -> int:
    """Prints the records after the first `shown`; gives how many there are now."""
    for record in outcome.records[shown:]:
        held_out = f", held out {record['eval_accuracy']:.1%}" if "eval_accuracy" in record else ""
        seconds = f"{training_seconds(record):.2f} s, accuracy {record['accuracy']:.1%}" if record["step"] else "start"
        print(f"  {outcome.name} step {record['step']}: {seconds}{held_out}", flush=True)
    return len(outcome.records)


def last_lines(path: Path) -> str:
    """The end of a log, on one line."""
    return " / ".join(line.strip() for line in path.read_text(errors="replace").splitlines()[-LOG_LINES:])


def measure(options: argparse.Namespace, config: RlConfig, folder: Path) -> list[Outcome]:
    """Runs all sides that are there, one after the other."""
    race, path = make_race(config, eval_every=options.eval_every, threads=options.threads), folder / "race.json"
    race.write(path)
    goal, devices = goal_of(options), config.mesh.size
    outcomes = [run(our_side(OURS, options, folder / "ours", devices=devices), goal)]
    for peer, name in PEERS.items():
        if {"trl": options.trl_python, "tunix": options.tunix_python}[peer] is None:
            print(f"{name}: LEFT OUT, as --{peer}-python does not say where it is", flush=True)
            outcomes.append(Outcome(name, [], failure=f"left out: no --{peer}-python"))
            continue
        tried = {"trl": options.trl_micro_batch, "tunix": options.tunix_micro_batch}[peer]
        micro_batch = quickest(peer, options, path, folder, tried)
        found = run(peer_side(peer, options, path, folder / peer, micro_batch=micro_batch), goal)
        outcomes.append(replace(found, note=note(micro_batch, tried)))
    if not options.once:
        outcomes.append(run(our_side(AGAIN, options, folder / "again", devices=devices), replace(goal, target=None)))
    return outcomes


def quickest(peer: str, options: argparse.Namespace, race: Path, folder: Path, tried: Sequence[int]) -> int:
    """Which of several sizes of a micro-batch serves a peer best, by a few steps of each."""
    if len(tried) == 1:
        return tried[0]
    goal = Goal(None, TRIAL_SKIPS, TRIAL_MEASURES, options.limit)
    seconds = {}
    for size in tried:
        found = run(peer_side(peer, options, race, folder / f"{peer}-{size}", micro_batch=size), goal)
        if found.failure is None:
            seconds[size] = sum(map(training_seconds, found.measured(goal)))
    # If none of them runs, the race itself tells why.
    return min(seconds, key=seconds.__getitem__) if seconds else tried[0]


def note(micro_batch: int, tried: Sequence[int]) -> str:
    """What a report says of the size of a micro-batch."""
    others = ", ".join(str(size) for size in tried if size != micro_batch)
    return f"{micro_batch} completions in one forward and backward" + (f" (slower: {others})" if others else "")


def goal_of(options: argparse.Namespace) -> Goal:
    """What is measured."""
    return Goal(options.target, options.skip, options.measure, options.limit)


def main() -> None:
    """Measures and reports; exits with 1 if a side failed."""
    options = parse(sys.argv[1:])
    config = load_toml(options.config, RlConfig, options.set)
    use_threads(options.threads)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.workdir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        outcomes = measure(options, config, folder)
    versions = {"qwq_jax": __version__, **{name: version(name) for name in ("jax", "flax", "optax")}}
    setting = Setting(
        command=shown_command(sys.argv[1:]),
        config=config,
        goal=goal_of(options),
        threads=options.threads,
        load=load,
        eval_every=options.eval_every,
        versions=versions,
        device=device_name(options.device),
    )
    text = markdown(setting, outcomes)
    print(text)
    if options.write:
        options.write.write_text(text)
    if options.json:
        options.json.write_text(as_json(setting, outcomes))
    raise SystemExit(1 if any(outcome.records and outcome.failure for outcome in outcomes) else 0)


def device_name(device: str) -> str:
    """What all sides run on, in the report's words."""
    if device == "cpu":
        return "a CPU"
    asked = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    return f"one {asked.stdout.strip() or 'GPU'}"


def shown_command(arguments: Sequence[str]) -> str:
    """The command as a report shows it, without places that are of this machine only."""
    words, given = ["python", "-m", "tools.bench_rl"], iter(arguments)
    for word in given:
        if word in ("--workdir", "--json"):
            next(given)
        elif word in ("--trl-python", "--tunix-python"):
            next(given)
            words += [word, f"{word.split('-')[2].upper()}/bin/python"]
        else:
            words.append(shlex.quote(word))
    return " ".join(words)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", default=Path("configs/rl/tiny_grpo.toml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of qwq-jax rl")
    parser.add_argument("--trl-python", type=Path, help="of an environment with TRL")
    parser.add_argument("--tunix-python", type=Path, help="of an environment with google-tunix")
    parser.add_argument("--trl-micro-batch", type=int, nargs="+", default=[32, 64, 256], metavar="N",
                        help="completions of a forward and backward; of several the quickest is taken")  # fmt: skip
    parser.add_argument("--tunix-micro-batch", type=int, nargs="+", default=[32, 64, 256], metavar="N")
    parser.add_argument("--target", type=float, default=0.8, help="held-out accuracy to reach")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of training to reach it in")
    parser.add_argument("--eval-every", type=int, default=5, help="steps")
    parser.add_argument("--skip", type=int, default=3, help="first steps whose speed does not count")
    parser.add_argument("--measure", type=int, default=12, help="steps after them whose speed does")
    parser.add_argument("--threads", type=int, default=2, help="processors that each side may use")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of each side")
    parser.add_argument("--once", action="store_true", help="no second run of ours after the peers")
    parser.add_argument("--write", type=Path, help="a markdown file")
    parser.add_argument("--json", type=Path, help="all records")
    parser.add_argument("--workdir", type=Path, help="where the runs are put and left; else somewhere temporary")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
