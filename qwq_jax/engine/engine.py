"""The engine: requests in, completions out, by continuous batching.

The loop is plain Python: ask the scheduler for work, lay it out as arrays, hand them to the runner, give each sequence
the token that was drawn for it.  What runs the step is a `Runner`; on devices that is `runner.DeviceRunner`.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qwq_jax.checkpoint.store import open_checkpoint, restore_params
from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.weights import choose_weights
from qwq_jax.engine.arrays import StepBuilder
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
from qwq_jax.engine.runner import DeviceRunner, usual_programs
from qwq_jax.engine.scheduler import Scheduler
from qwq_jax.engine.step import Draws, Runner, Schedule, StepPlan, StepResult, Work
from qwq_jax.engine.thoughts import Thoughts
from qwq_jax.model.attention import target_of
from qwq_jax.model.quantize import check_activations
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
    shared_tokens: int = 0
    """Prompt tokens found in the cache, because another sequence began alike."""
    generated_tokens: int = 0
    drafted_tokens: int = 0
    """Guesses that were checked, and how many of them held."""
    accepted_tokens: int = 0
    preemptions: int = 0
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
        self._flight: _Flight | None = None

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
        weights = choose_weights(checkpoint.manifest.weights, config.weights, config.activations)
        check_activations(weights, target_of(layout))
        params = restore_params(checkpoint, layout, config.compute_dtype, weights=weights)
        runner = DeviceRunner(checkpoint.config, params, layout, config, weights)
        return cls(runner, checkpoint.config.vocab_size, checkpoint.config.eos_token_ids, run_seed)

    @property
    def busy(self) -> bool:
        """Whether any sequence is waiting or running."""
        return bool(self._sequences)

    @property
    def scheduler(self) -> Scheduler:
        """For those who watch rows and pages."""
        return self._scheduler

    def warm_up(self, progress: Callable[[int, int], None] = lambda done, total: None) -> int:
        """Compile what requests without rarer wishes need, so that none of them has to wait for it.

        Args:
            progress: Told how many programs are ready, of how many; at first those that were before.

        Returns:
            How many programs.
        """
        programs = usual_programs(self._shape)
        self.runner.warm_up(programs, lambda done: progress(done, len(programs)))
        return len(programs)

    def release(self) -> None:
        """Leave the devices' memory of weights and cache to others; `replace_weights` comes before the next request."""
        self.forget_pages()
        self.runner.release()

    def replace_weights(self, params: Any) -> None:
        """Answer with other weights from now on, of the same shapes, types and places; forgets what is in the cache.

        Raises:
            ValueError: Requests are being answered, which would mix the two.
        """
        if self.busy:
            raise ValueError("weights cannot be replaced while requests are being answered")
        self.forget_pages()
        self.runner.replace_weights(params)

    def forget_pages(self) -> None:
        """Forget what is in the cache: from now on, answers are to the last bit those of a new engine."""
        assert not self.busy, "requests are being answered"
        self._scheduler.forget_pages()

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
        named = {
            "stop_token_ids": request.params.stop_token_ids,
            "logit_bias": [t for t, _ in request.params.logit_bias],
        }
        for name, ids in named.items():
            strange = next((token for token in ids if token >= self.vocab_size), None)
            if strange is not None:
                raise ValueError(f"{name}: token id {strange} is not in the vocabulary of {self.vocab_size}")
        _check_thinking(request, min(request.params.max_tokens, shape.context - len(prompt)))

    def add(self, request: Request, hooks: HooksFactory | None = None) -> None:
        """Put a request in line.  `hooks` makes what watches its text, once for each sample."""
        self.check(request)
        params = request.params
        if request.request_id in self._sequences:
            raise ValueError(f"request id {request.request_id!r} is already in the engine")
        if params.stop and hooks is None:
            raise ValueError("stop strings need text, which the engine does not have: pass hooks")
        start = len(request.prompt_token_ids)
        limit = start + min(params.max_tokens, self._shape.context - start)
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(self.eos_token_ids))
        self._sequences[request.request_id] = sequences = []
        for index in range(params.n):
            sequence = Sequence(
                request,
                index,
                arrival=self._arrivals,
                seed=sample_seed(params, request.request_id, index, self.run_seed),
                limit=limit,
                stop_token_ids=ends,
                hooks=hooks(request) if hooks is not None else Hooks(),
                thoughts=_thoughts(request),
            )
            self._arrivals += 1
            sequences.append(sequence)
            self._scheduler.add(sequence)

    def cancel(self, request_id: str) -> None:
        """Forget a request; its pages are free at once.  One that is not here (any more) is no error."""
        for sequence in self._sequences.pop(request_id, ()):
            self._scheduler.remove(sequence)

    def step(self) -> StepOutput:
        """Prepare and start a step on the devices, and give what the one before it brought.

        The first call starts two, the last none; a sequence whose next step depends on its last token is waited for.
        """
        while True:
            started = self._start()
            flight, self._flight = self._flight, started
            if flight is not None:
                return self._collect(flight)
            if started is None:
                assert not self.busy, "sequences are waiting, but none can run"
                return StepOutput()

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

    def _start(self) -> "_Flight | None":
        """Submit the next step, if it can be prepared before the one in flight is seen."""
        if self._flight is not None and (self._shape.drafts or self._scheduler.step_by_step):
            return None
        schedule = self._scheduler.schedule()
        if schedule is None or schedule.empty:
            assert schedule is not None or self._flight is not None, "nothing is in flight, so all tokens are known"
            return None
        plan = self._builder.build(schedule)
        self.stats.steps += 1
        self.stats.prompt_tokens += sum(work.length for works in schedule.prefill for work in works)
        self.stats.drafted_tokens += sum(len(work.drafts) for work in schedule.works)
        self.stats.preemptions, self.stats.shared_tokens = self._scheduler.preemptions, self._scheduler.shared_tokens
        epochs = {work.sequence.arrival: work.sequence.epoch for work in schedule.works}
        rows = {work.sequence.arrival: work.sequence.row or 0 for work in schedule.works}
        return _Flight(schedule, plan, self.runner.submit(plan), epochs, rows)

    def _collect(self, flight: "_Flight") -> StepOutput:
        result = self.runner.collect(flight.ticket)
        tokens: list[NewToken] = []
        completions: list[Completion] = []
        for work, drawn in flight.drawn(result):
            sequence = work.sequence
            if sequence.epoch != flight.epochs[sequence.arrival]:
                continue
            sequence.ahead -= work.draws
            reason = self._push(work, drawn)
            tokens += (NewToken(sequence.request.request_id, sequence.index, new) for new in sequence.take_new())
            if reason is not None:
                completions.append(self._finish(sequence, reason))
            else:
                self._scheduler.settle(sequence)
        self.stats.completions += len(completions)
        return StepOutput(tuple(tokens), tuple(completions))

    def _push(self, work: Work, drawn: Iterable[TokenLogprob]) -> FinishReason | None:
        """Give a sequence what was drawn for it, as far as it follows from what came before."""
        sequence, epoch = work.sequence, work.sequence.epoch
        for index, token in enumerate(drawn):
            if index and work.drafts:
                if work.drafts[index - 1] != sequence.tokens[-1]:
                    break
                self.stats.accepted_tokens += 1
            self.stats.generated_tokens += 1
            reason = sequence.push(token)
            if reason is not None or sequence.epoch != epoch:
                return reason
        if work.drafts:
            sequence.computed = len(sequence.tokens) - 1
        return None

    def _finish(self, sequence: Sequence, reason: FinishReason) -> Completion:
        self._scheduler.remove(sequence)
        remaining = self._sequences[sequence.request.request_id]
        remaining.remove(sequence)
        if not remaining:
            del self._sequences[sequence.request.request_id]
        return sequence.completion(reason)


@dataclass(frozen=True)
class _Flight:
    """A step that the devices are at, and how its sequences stood when it was submitted."""

    schedule: Schedule
    plan: StepPlan
    ticket: Any
    epochs: Mapping[int, int]
    rows: Mapping[int, int]

    def drawn(self, result: StepResult) -> Iterator[tuple[Work, list[TokenLogprob]]]:
        """Each piece of work with the tokens drawn for it; scores are noted on the way."""
        drafts = self.plan.program.drafts
        for replica, works in enumerate(self.schedule.decode):
            for work in works:
                num_top, row = work.sequence.request.params.top_logprobs, self.rows[work.sequence.arrival]
                begin = int(self.plan.arrays["query_start"][replica, row]) if drafts else 0
                places = ((replica, begin + i) if drafts else (replica, i, row) for i in range(work.draws))
                yield work, [_entry(result.decode, place, num_top) for place in places]
        for replica, works in enumerate(self.schedule.prefill):
            begin = 0
            for slot, work in enumerate(works):
                assert result.prefill is not None
                if result.scored is not None and work.sequence.epoch == self.epochs[work.sequence.arrival]:
                    _score(work, result.scored, (replica, begin))
                begin += work.length
                num_top = work.sequence.request.params.top_logprobs
                yield work, [_entry(result.prefill, (replica, slot), num_top)] if work.draws else []


def _score(work: Work, scored: Draws, place: tuple[int, int]) -> None:
    """Note the log-probabilities of a chunk's own tokens: of the prompt, or put in."""
    sequence, params = work.sequence, work.sequence.request.params
    replica, begin = place
    for position in range(work.start + 1, min(work.start + work.length + 1, len(sequence.tokens))):
        if sequence.wants_score(position):
            of_prompt = position < len(sequence.request.prompt_token_ids)
            num_top = (params.prompt_logprobs or 0) if of_prompt else params.top_logprobs
            sequence.score(position, _entry(scored, (replica, begin + position - 1 - work.start), num_top))


def _entry(draws: Draws, place: tuple[int, ...], num_top: int) -> TokenLogprob:
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        assert draws.top_ids is not None and draws.top_logprobs is not None, "the plan asked for them"
        ids, values = draws.top_ids[place][:num_top], draws.top_logprobs[place][:num_top]
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(int(draws.tokens[place]), float(draws.logprobs[place]), top)


def _check_thinking(request: Request, room: int) -> None:
    params, marks = request.params, request.thinking
    if not params.bounds_thinking:
        return
    if marks is None:
        raise ValueError("max_thinking_tokens and min_thinking_tokens need the tokens that end thoughts: give thinking")
    if params.max_thinking_tokens is not None and params.max_thinking_tokens + len(marks.closing) >= room:
        raise ValueError(
            f"max_thinking_tokens {params.max_thinking_tokens} and the {len(marks.closing)} tokens that end the "
            f"thoughts leave no room for an answer: there is room for {room} tokens"
        )


def _thoughts(request: Request) -> Thoughts | None:
    params = request.params
    if not params.bounds_thinking or request.thinking is None:
        return None
    start = len(request.prompt_token_ids)
    return Thoughts(request.thinking, start, params.min_thinking_tokens, params.max_thinking_tokens)
