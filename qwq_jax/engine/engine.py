"""The engine: requests in, completions out, by continuous batching.

The loop is plain Python: ask the scheduler for work, lay it out as arrays, hand them to the runner, give each sequence
the token that was drawn for it.  What runs the step is a `Runner`; on devices that is `runner.DeviceRunner`.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qwq_jax.checkpoint.store import open_checkpoint, restore_params
from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.engine.request import (
    Completion,
    FinishReason,
    Hooks,
    HooksFactory,
    NewToken,
    Request,
    Sequence,
    TokenLogprob,
    sample_seed,
)
from qwq_jax.engine.runner import DeviceRunner
from qwq_jax.engine.scheduler import Scheduler
from qwq_jax.engine.step import Runner, Schedule, StepBuilder, StepResult, Work
from qwq_jax.sharding import decode_layout, make_mesh

ONE_DEVICE = MeshConfig()


@dataclass(frozen=True)
class StepOutput:
    """What one step brought: every token drawn, and the sequences that ended with theirs."""

    tokens: tuple[NewToken, ...] = ()
    completions: tuple[Completion, ...] = ()


@dataclass
class EngineStats:
    """Counts since the engine was made."""

    steps: int = 0
    prompt_tokens: int = 0
    """Prompt tokens computed, those computed again after a preemption included."""
    generated_tokens: int = 0
    completions: int = 0


@dataclass(eq=False)
class Engine:
    """Answers requests, as many at once as rows and pages allow.

    A request's tokens depend on its prompt, its parameters and its seed (or `run_seed` and its name), not on what else
    runs.  `eos_token_ids` end a sequence unless the request says `ignore_eos`.

    >>> for completion in Engine.from_checkpoint("ckpt", mesh=MeshConfig(), config=EngineConfig()).generate(requests):
    ...     print(completion.request_id, completion.token_ids)
    """

    runner: Runner
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    run_seed: int = 0
    stats: EngineStats = field(default_factory=EngineStats)

    def __post_init__(self) -> None:
        self._shape = self.runner.shape
        self._scheduler = Scheduler(self._shape)
        self._builder = StepBuilder(self._shape)
        self._sequences: dict[str, list[Sequence]] = {}
        self._arrivals = 0

    @classmethod
    def from_checkpoint(
        cls,
        path: str,
        *,
        mesh: MeshConfig = ONE_DEVICE,
        devices: tuple[Any, ...] | None = None,
        config: EngineConfig,
        run_seed: int = 0,
    ) -> "Engine":
        """Restore a checkpoint straight onto the devices of a mesh: of `devices`, or of all there are."""
        checkpoint = open_checkpoint(path)
        layout = decode_layout(make_mesh(mesh, devices))
        params = restore_params(checkpoint, layout, config.compute_dtype)
        runner = DeviceRunner(checkpoint.config, params, layout, config)
        return cls(runner, checkpoint.config.vocab_size, checkpoint.config.eos_token_ids, run_seed)

    @property
    def busy(self) -> bool:
        """Whether any sequence is waiting or running."""
        return bool(self._sequences)

    @property
    def scheduler(self) -> Scheduler:
        """For those who watch rows and pages."""
        return self._scheduler

    def check(self, request: Request) -> None:
        """Raise ValueError if this request can never be served."""
        prompt, shape = request.prompt_token_ids, self._shape
        if not prompt:
            raise ValueError("the prompt is empty: at least one token is needed")
        strange = next((token for token in prompt if not 0 <= token < self.vocab_size), None)
        if strange is not None:
            raise ValueError(f"prompt token id {strange} is not in the vocabulary of {self.vocab_size}")
        if len(prompt) >= shape.max_context:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, which leaves no room in the context of {shape.max_context}"
            )
        if len(prompt) >= shape.context:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, but the cache of a replica holds {shape.context} "
                f"({shape.num_pages} pages of {shape.page_size}): give the engine more pages"
            )

    def add(self, request: Request, hooks: HooksFactory | None = None) -> None:
        """Put a request in line.  `hooks` makes what watches its text, once for each sample."""
        self.check(request)
        params = request.params
        if request.request_id in self._sequences:
            raise ValueError(f"request id {request.request_id!r} is already in the engine")
        if params.stop and hooks is None:
            raise ValueError("stop strings need text, which the engine does not have: pass hooks")
        room = self._shape.context - len(request.prompt_token_ids)
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(self.eos_token_ids))
        self._sequences[request.request_id] = sequences = []
        for index in range(params.n):
            sequence = Sequence(
                request,
                index,
                arrival=self._arrivals,
                seed=sample_seed(params, request.request_id, index, self.run_seed),
                limit=len(request.prompt_token_ids) + min(params.max_tokens, room),
                stop_token_ids=ends,
                hooks=hooks(request) if hooks is not None else Hooks(),
            )
            self._arrivals += 1
            sequences.append(sequence)
            self._scheduler.add(sequence)

    def cancel(self, request_id: str) -> None:
        """Forget a request; its pages are free at once.  One that is not here (any more) is no error."""
        for sequence in self._sequences.pop(request_id, ()):
            self._scheduler.remove(sequence)

    def step(self) -> StepOutput:
        """Run one step on the devices."""
        schedule = self._scheduler.schedule()
        if schedule.empty:
            assert not self.busy, "sequences are waiting, but none can run"
            return StepOutput()
        result = self.runner.step(self._builder.build(schedule))
        tokens: list[NewToken] = []
        completions: list[Completion] = []
        for replica, slot, work in self._placed(schedule):
            self._scheduler.complete(work)
            if slot >= self._shape.max_sequences:
                self.stats.prompt_tokens += work.length
            if not work.samples:
                continue
            sequence = work.sequence
            drawn = _drawn(result, replica, slot, sequence.request.params.top_logprobs)
            reason = sequence.push(drawn)
            tokens.append(NewToken(sequence.request.request_id, sequence.index, drawn))
            if reason is not None:
                completions.append(self._finish(sequence, reason))
        self.stats.steps += 1
        self.stats.generated_tokens += len(tokens)
        self.stats.completions += len(completions)
        return StepOutput(tuple(tokens), tuple(completions))

    def run(self, requests: Iterable[Request], hooks: HooksFactory | None = None) -> Iterator[StepOutput]:
        """Serve requests step by step; the next are pulled only when the line of waiting ones is short."""
        source = iter(requests)
        exhausted = False
        while True:
            while not exhausted and self._scheduler.waiting < self._shape.replicas * self._shape.max_sequences:
                request = next(source, None)
                if request is None:
                    exhausted = True
                else:
                    self.add(request, hooks)
            if not self.busy:
                return
            yield self.step()

    def generate(self, requests: Iterable[Request], hooks: HooksFactory | None = None) -> Iterator[Completion]:
        """Serve requests; completions come as they end.  A request that can never be served is a ValueError."""
        for output in self.run(requests, hooks):
            yield from output.completions

    def stream(self, request: Request, hooks: HooksFactory | None = None) -> Generator[NewToken, None, None]:
        """Serve one request, token by token; closing the iterator cancels it."""
        self.add(request, hooks)
        pending: deque[NewToken] = deque()
        try:
            while pending or request.request_id in self._sequences:
                if not pending:
                    pending.extend(token for token in self.step().tokens if token.request_id == request.request_id)
                    continue
                yield pending.popleft()
        finally:
            self.cancel(request.request_id)

    def _placed(self, schedule: Schedule) -> Iterator[tuple[int, int, Work]]:
        """Each piece of work with its replica and its row in the step."""
        for replica, works in enumerate(schedule.decode):
            for work in works:
                assert work.sequence.row is not None
                yield replica, work.sequence.row, work
        for replica, works in enumerate(schedule.prefill):
            for slot, work in enumerate(works, start=self._shape.max_sequences):
                yield replica, slot, work

    def _finish(self, sequence: Sequence, reason: FinishReason) -> Completion:
        self._scheduler.remove(sequence)
        remaining = self._sequences[sequence.request.request_id]
        remaining.remove(sequence)
        if not remaining:
            del self._sequences[sequence.request.request_id]
        return sequence.completion(reason)


def _drawn(result: StepResult, replica: int, slot: int, num_top: int) -> TokenLogprob:
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        assert result.top_ids is not None and result.top_logprobs is not None, "the plan asked for them"
        ids, values = result.top_ids[replica, slot, :num_top], result.top_logprobs[replica, slot, :num_top]
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(int(result.tokens[replica, slot]), float(result.logprobs[replica, slot]), top)
