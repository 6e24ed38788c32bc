"""What the jobs that train share: where they start, the directory they own, what they leave and what they show."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
from jax.experimental import multihost_utils
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qwq_jax.checkpoint.directory import answered, explained, open_directory
from qwq_jax.checkpoint.store import MARKER, Checkpoint, open_checkpoint
from qwq_jax.checkpoint.train_store import TrainStore
from qwq_jax.config.model import ModelConfig
from qwq_jax.health import HostHealth
from qwq_jax.jobs.convert import convert
from qwq_jax.train.packing import Segment
from qwq_jax.train.state import Params, TrainState
from qwq_jax.train.weights import companion_files, write_checkpoint

LOG = logging.getLogger(__name__)
HOSTS = "hosts.json"


def check_output(directory: str, outputs: Collection[str]) -> None:
    """Raises a ValueError if the directory cannot be looked into, or holds something and none of a run's `outputs`."""
    with explained(f"cannot write {directory}"):
        children = open_directory(directory).children()
    if children and children.isdisjoint(outputs):
        raise ValueError(f"{directory} holds something else; give an empty or new directory")


def hosts_file(output_dir: str) -> Callable[[Sequence[HostHealth]], None]:
    """Builds what writes `HOSTS` into a run's directory: when, and how each host of the run did then.

    The file is for those who look on: one that cannot be written is said, and the run goes on.
    """
    directory = open_directory(output_dir)

    def publish(hosts: Sequence[HostHealth]) -> None:
        text = json.dumps({"time": round(time.time()), "hosts": [host.to_json() for host in hosts]}, indent=1)
        try:
            with answered(output_dir):
                directory.write(HOSTS, text.encode())
        except (ValueError, OSError) as error:
            LOG.warning("%s is not written: %s", HOSTS, error)

    return publish


def initial_checkpoint(model: str, *, output_dir: str) -> Checkpoint:
    """The checkpoint that a run starts from; a Hugging Face directory is converted into its output directory first."""
    if MARKER in open_directory(model).children():
        return open_checkpoint(model)
    location = f"{output_dir}/initial"
    if jax.process_index() == 0:
        LOG.info("converting %s", model)
        convert(model, location)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("converted")
    return open_checkpoint(location)


def fingerprint(checkpoint: Checkpoint) -> str:
    """Hash of the weights of a checkpoint."""
    weights = [(record.path, record.stored_sha256) for record in checkpoint.manifest.tensors]
    return hashlib.sha256(json.dumps(weights).encode()).hexdigest()


def check_model(model: ModelConfig, *, name: str, sequence_length: int, dtype: str) -> None:
    """Raises a ValueError if the model, called `name`, cannot be trained so or be written down afterwards."""
    if sequence_length > model.max_context:
        raise ValueError(f"sequence_length {sequence_length} is beyond the {model.max_context} positions of {name}")
    try:
        model.to_huggingface(dtype)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def check_tokens(model: ModelConfig, segments: Iterable[Segment], *, tokenizer: str) -> None:
    """Raises a ValueError if a token has no row in the embedding."""
    largest = max(int(segment.tokens.max()) for segment in segments)
    if largest >= model.vocab_size:
        raise ValueError(f"{tokenizer}: token {largest} lies outside the model's vocabulary of {model.vocab_size}")


def final_state(
    state: TrainState, *, final: Literal["last", "best"], store: TrainStore, target: TrainState
) -> tuple[int, TrainState]:
    """The step whose weights are the result, and its state, which `target` describes."""
    last = int(state.step)
    chosen = store.best_step() if final == "best" else last
    assert chosen is not None, "the last step is always evaluated"
    if chosen != last:
        # One state at a time: there may not be room for two.
        jax.tree.map(lambda x: x.delete(), state)
        state = store.restore(chosen, target)
    return chosen, state


def write_model(
    dest: str,
    params: Params,
    model: ModelConfig,
    *,
    dtype: str,
    tokenizer_dir: str,
    made_by: Any,
    origin: str,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes stacked parameters as a checkpoint with the companions of the tokenizer and other `files`.

    `made_by` is all that decides them, as JSON: a second call completes the checkpoint if that is the same.
    """
    identity = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
    companions = {**companion_files(tokenizer_dir), **(files or {})}
    write_checkpoint(dest, params, model, dtype=dtype, files=companions, identity=identity, origin=origin)


def progress_bar() -> Progress:
    """Steps, loss, tokens a second, time left; nothing on the processes but the first."""
    return Progress(
        TextColumn("step"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=jax.process_index() != 0,
    )


def reporter(progress: Progress, *, done: int, steps: int) -> Callable[[int, Mapping[str, float]], None]:
    """Builds the callback that shows a step, and logs those with a held-out loss."""
    task = progress.add_task("", total=steps, completed=done)

    def report(step: int, values: Mapping[str, float]) -> None:
        text = f"loss {values['loss']:.4f}  {values['tokens_per_second']:,.0f} tokens/s"
        progress.update(task, completed=step, description=text)
        if "eval_loss" in values and jax.process_index() == 0:
            accuracy = f"  accuracy {values['eval_accuracy']:.1%}" if "eval_accuracy" in values else ""
            progress.console.print(f"step {step}/{steps}  {text}  held-out loss {values['eval_loss']:.4f}{accuracy}")

    return report
