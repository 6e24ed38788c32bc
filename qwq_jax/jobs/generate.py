"""`qwq-jax generate`: answer a file of requests; killed at any point, the same command goes on where it stood."""

import functools
import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax

from qwq_jax.chat import ChatTokenizer
from qwq_jax.checkpoint.store import Checkpoint, open_checkpoint
from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.engine.engine import Engine
from qwq_jax.engine.request import Completion, Request
from qwq_jax.interrupt import StopRequested
from qwq_jax.jobs.answer import choice_of, hooks_of, request_of
from qwq_jax.jobs.batch_file import BadLine, Choice, PromptLine, count_lines, error_line, read_batch, result_line
from qwq_jax.jobs.progress import BatchProgress
from qwq_jax.jobs.result_file import file_fingerprint
from qwq_jax.jobs.shared_output import SharedOutput
from qwq_jax.processes import Peers

OPENAI_DEFAULTS = SamplingParams()

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerateReport:
    """What a run did.

    Attributes:
        requests: Lines of the input.
        answered: Lines that this run answered, errors included.
        errors: Lines that this run answered with an error.
        generated_tokens: Tokens that this run drew.
        tokens_per_second: These by the wall time of the run without its start.
        compiles: Programs that were compiled for it.
    """

    requests: int
    answered: int = 0
    errors: int = 0
    generated_tokens: int = 0
    tokens_per_second: float = 0.0
    compiles: int = 0

    @property
    def counts(self) -> dict[str, Any]:
        """What adds up over processes that have lines of their own."""
        return {name: value for name, value in asdict(self).items() if name != "requests"}

    @property
    def sentence(self) -> str:
        """For the terminal."""
        earlier = f", {self.requests - self.answered} earlier" if self.answered < self.requests else ""
        errors = f", {self.errors} with an error" if self.errors else ""
        return f"{self.answered} of {self.requests} requests answered{earlier}{errors}"


def generate(
    checkpoint: str,
    input: Path,
    output: Path,
    *,
    engine: EngineConfig,
    mesh: MeshConfig,
    sampling: SamplingParams = OPENAI_DEFAULTS,
    seed: int = 0,
) -> GenerateReport:
    """Answers the requests of `input` that `output` does not answer yet.

    Args:
        checkpoint: Directory, local or ``gs://``.
        input: JSONL of requests, see `batch_file`.
        output: JSONL of answers, see `result_file`; in the order of the input once all are there.
        engine: Sizes of the engine; of these only types and context change an answer.
        mesh: Devices; a run may go on on another mesh.
        sampling: For lines that do not say themselves.
        seed: Decides, with the name of a request, the tokens of one that has no seed.

    Raises:
        ValueError: The input, the output or the checkpoint cannot be used.
        Interrupted: A signal asked to stop; all that was answered is saved.
    """
    with StopRequested() as stop, Peers.meet(stop) as peers:
        _check_paths(input, output)
        opened = open_checkpoint(checkpoint)
        total = count_lines(input)
        origin = _origin(opened, input, engine, sampling, seed)
        peers.require_same({**origin, "mesh": mesh.model_dump(), "engine": engine.model_dump()})
        own = mesh.share_of_process(peers.count, jax.local_device_count()) if peers.count > 1 else None
        with SharedOutput(output, origin, peers, split=own is not None) as results:
            if len(results.answered) == total:
                results.finish(total, {})
                _log.info("%s: all %d requests are answered", output, total)
                return GenerateReport(total)
            results.open_part()
            tokenizer = ChatTokenizer.from_directory(opened.tokenizer_dir)
            devices = None if own is None else tuple(jax.local_devices())
            server = Engine.from_checkpoint(checkpoint, mesh=own or mesh, devices=devices, config=engine, run_seed=seed)
            batch = _Batch(server, tokenizer, results, model=Path(checkpoint.rstrip("/")).name, sampling=sampling)
            report = _answer(batch, input, total, peers)
    if peers.index == 0:
        _log.info("%s: %s", output, report.sentence)
    return report


def _answer(batch: "_Batch", input: Path, total: int, peers: Peers) -> GenerateReport:
    """Serves the lines of this process, and waits for those of the others."""
    results, server = batch.results, batch.engine
    before = 0 if results.split else len(results.answered)
    with BatchProgress(before + results.share_of(total), before, shown=results.split or peers.index == 0) as progress:
        for output_of_step in server.run(batch.requests(input), functools.partial(hooks_of, batch.tokenizer)):
            for completion in output_of_step.completions:
                batch.take(completion)
            results.sync_if_due()
            progress.update(before + batch.answered, len(output_of_step.tokens))
            stop = peers.stopping() if results.split else peers.stopping_together(server.stats.generated_tokens)
            if stop:
                raise results.stopped(total)
        progress.update(before + batch.answered, 0)
        report = batch.report(total, progress.tokens_per_second)
        return replace(report, **results.finish(total, report.counts))


@dataclass
class _Batch:
    """The lines in flight: what was asked, and the samples that have come so far."""

    engine: Engine
    tokenizer: ChatTokenizer
    results: SharedOutput
    model: str
    sampling: SamplingParams
    answered: int = 0
    errors: int = 0
    _lines: dict[str, tuple[PromptLine, Request, list[Choice]]] = field(default_factory=dict)

    def requests(self, path: Path) -> Iterator[Request]:
        """The lines still to be served, as they are pulled; bad ones are answered on the way."""
        left = (line for line in read_batch(path, self.sampling) if line.number not in self.results.answered)
        for rank, line in enumerate(left):
            if not self.results.serves(rank):
                continue
            if isinstance(line, PromptLine):
                try:
                    request = request_of(line, self.tokenizer)
                    self.engine.check(request)
                except ValueError as error:
                    line = BadLine(line.number, line.custom_id, f"line {line.number}: {error}")
            if isinstance(line, BadLine):
                self._refuse(line)
                continue
            self._lines[line.custom_id] = (line, request, [])
            yield request

    def take(self, completion: Completion) -> None:
        """Note a sample; the last one of a line completes it, and one that cannot be reported fails it."""
        if completion.request_id not in self._lines:
            return  # another sample of a line that failed
        line, request, choices = self._lines[completion.request_id]
        try:
            choices.append(choice_of(completion, request, self.tokenizer))
        except ValueError as error:
            del self._lines[completion.request_id]
            self.engine.cancel(completion.request_id)
            self._refuse(BadLine(line.number, line.custom_id, f"line {line.number}: {error}"))
            return
        if len(choices) == line.params.n:
            del self._lines[completion.request_id]
            self.results.append(result_line(line, choices, len(request.prompt_token_ids), self.model))
            self.answered += 1

    def _refuse(self, line: BadLine) -> None:
        self.results.append(error_line(line))
        self.answered += 1
        self.errors += 1

    def report(self, requests: int, tokens_per_second: float) -> GenerateReport:
        """What was done by this process."""
        generated, compiles = self.engine.stats.generated_tokens, self.engine.runner.compiles
        return GenerateReport(requests, self.answered, self.errors, generated, tokens_per_second, compiles)


def _check_paths(input: Path, output: Path) -> None:
    for path in (input, output):
        if re.match(r"\w+:/", str(path)):  # a Path has dropped one of two slashes
            address = str(path).replace(":/", "://", 1)
            raise ValueError(f"{address}: requests and answers have to be local files; copy to or from there")
    if not input.is_file():
        raise ValueError(f"{input}: {'is not a file' if input.exists() else 'no such file'}")
    if output.exists() and output.samefile(input):
        raise ValueError(f"{output} is the input: choose another output")


def _origin(
    checkpoint: Checkpoint, input: Path, engine: EngineConfig, sampling: SamplingParams, seed: int
) -> dict[str, object]:
    """All that an answer depends on, by the names that an error message calls them."""
    return {
        "checkpoint": hashlib.sha256(checkpoint.manifest.to_json()).hexdigest(),
        "input": file_fingerprint(input),
        "compute_dtype": engine.compute_dtype,
        "cache_dtype": engine.cache_dtype or engine.compute_dtype,
        "weights": engine.weights,
        "activations": engine.activations,
        "max_context": engine.max_context or checkpoint.config.max_context,
        "sampling": sampling.model_dump(mode="json"),
        "seed": seed,
    }
