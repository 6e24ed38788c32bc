"""The engine's host policy, on a runner whose next token is a hash of the prefix as it reads it back from paged memory.

Wrong page tables, positions, lengths or sample indices change the hash, and with it every later token.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qwq_jax.config.sampling import SamplingParams
from qwq_jax.engine.arrays import pack
from qwq_jax.engine.engine import Engine
from qwq_jax.engine.pages import PagePool, pages_for
from qwq_jax.engine.request import Completion, FinishReason, Hooks, Request, sample_seed
from qwq_jax.engine.step import MAX_TOP_LOGPROBS, Draws, EngineShape, Program, StepPlan, StepResult

VOCAB = 97
EOS = 96


def next_token(prefix: list[int], seed: int) -> int:
    return zlib.crc32(np.asarray([seed, *prefix], np.int64).tobytes()) % VOCAB


class HashRunner:
    """Paged memory of token ids in place of keys and values; what is submitted is done at once, and collected later."""

    def __init__(self, shape: EngineShape) -> None:
        self.shape = shape
        self.compiles = 0
        self.plans: list[StepPlan] = []
        self._memory = np.full((shape.replicas, shape.num_pages, shape.page_size, 2), -1, np.int64)
        self._token = np.zeros((shape.replicas, shape.max_sequences), np.int64)
        self._alive = np.zeros((shape.replicas, shape.max_sequences), bool)

    def warm_up(self, programs: Iterable[Program], progress: Callable[[int], None]) -> None:
        for done, _ in enumerate(programs, start=1):
            progress(done)

    def release(self) -> None:
        self.params = None

    def replace_weights(self, params: Any) -> None:
        self.params = params

    def submit(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        arrays = pack(plan, self.shape)  # checks shapes and types
        assert arrays.dtype == np.int32
        replicas = range(self.shape.replicas)
        if plan.program.drafts:
            return StepResult(_joined([self._draft(plan, replica) for replica in replicas]))
        decode = _joined([self._window(plan, replica) for replica in replicas])
        if not plan.program.prefill_tokens:
            return StepResult(decode)
        prefill, scored = zip(*(self._prefill(plan, replica) for replica in replicas), strict=True)
        return StepResult(decode, _joined(list(prefill)), _joined(list(scored)) if plan.program.score else None)

    def collect(self, ticket: StepResult) -> StepResult:
        return ticket

    def _window(self, plan: StepPlan, replica: int) -> np.ndarray:
        arrays = {name: array[replica] for name, array in plan.arrays.items()}
        D = plan.program.decode_rows
        drawn = np.full((1 if plan.program.prefill_tokens else self.shape.decode_window, D), -1)
        assert arrays["steps"][0] <= len(drawn)
        for known in (self._token, self._alive):
            known[replica, :D] = known[replica, arrays["origin"]]
        for row in range(D):
            if arrays["token"][row] >= 0:
                self._token[replica, row], self._alive[replica, row] = arrays["token"][row], True
            assert arrays["budget"][row] <= arrays["steps"][0]
            for i in range(arrays["budget"][row]):
                if not self._alive[replica, row]:
                    break
                at = arrays["position"][row] + i
                self._append(plan, replica, row, [self._token[replica, row]], at)
                token = self._next(plan, replica, row, at + 1)
                self._token[replica, row] = drawn[i, row] = token
                self._alive[replica, row] = token not in arrays["stop_ids"][row]
        return drawn

    def _prefill(self, plan: StepPlan, replica: int) -> tuple[np.ndarray, np.ndarray]:
        arrays = {name: array[replica] for name, array in plan.arrays.items()}
        drawn = np.full(self.shape.max_prefill_sequences, -1)
        scored = np.full(plan.program.prefill_tokens, -1)
        for slot in range(self.shape.max_prefill_sequences):
            length, row = arrays["prompt_length"][slot], plan.program.decode_rows + slot
            if not length:
                continue
            begin, end = arrays["prompt_start"][slot : slot + 2]
            positions = arrays["prompt_position"][begin:end]
            assert positions.tolist() == list(range(length - (end - begin), length))
            self._append(plan, replica, row, arrays["prompt_token"][begin:end].tolist(), positions[0])
            if arrays["into"][slot] >= 0:
                token = self._next(plan, replica, row, length)
                drawn[slot] = self._token[replica, arrays["into"][slot]] = token
                self._alive[replica, arrays["into"][slot]] = token not in arrays["stop_ids"][row]
            if plan.program.score:
                scored[begin:end] = arrays["target"][begin:end]
        return drawn, scored

    def _draft(self, plan: StepPlan, replica: int) -> np.ndarray:
        arrays = {name: array[replica] for name, array in plan.arrays.items()}
        drawn = np.full(arrays["flat_token"].shape, -1)
        for row in range(plan.program.decode_rows):
            begin, end = arrays["query_start"][row : row + 2]
            if end == begin:
                continue
            first = arrays["flat_position"][begin]
            assert first + end - begin == arrays["kv_length"][row] and (arrays["flat_row"][begin:end] == row).all()
            self._append(plan, replica, row, arrays["flat_token"][begin:end].tolist(), first)
            drawn[begin:end] = [self._next(plan, replica, row, first + 1 + i) for i in range(end - begin)]
        return drawn

    def _append(self, plan: StepPlan, replica: int, row: int, tokens: list[int], start: int) -> None:
        positions = np.arange(start, start + len(tokens))
        page = plan.arrays["page_table"][replica, row, positions // self.shape.page_size]
        self._memory[replica, page, positions % self.shape.page_size, 0] = tokens
        self._memory[replica, page, positions % self.shape.page_size, 1] = positions

    def _next(self, plan: StepPlan, replica: int, row: int, length: int) -> int:
        stored = self._memory[replica, plan.arrays["page_table"][replica, row]].reshape(-1, 2)[:length]
        assert stored[:, 1].tolist() == list(range(length)), "another sequence wrote into these pages"
        token = next_token(stored[:, 0].tolist(), int(plan.arrays["seed"][replica, row]))
        return allowed_token(token, plan, replica, row)


def allowed_token(token: int, plan: StepPlan, replica: int, row: int) -> int:
    """The next token that the row's mask admits."""
    if plan.program.mask:
        bits = np.unpackbits(plan.arrays["allowed"][replica, row].view(np.uint8), bitorder="little")[:VOCAB]
        token = next(t for t in [*range(token, VOCAB), *range(token)] if bits[t])
    return token


def _joined(parts: list[np.ndarray]) -> Draws:
    """Log-probabilities that tell the token, and alternatives that tell its place in the row."""
    tokens = np.stack(parts)
    top = np.zeros((*tokens.shape, MAX_TOP_LOGPROBS))
    return Draws(tokens, -tokens.astype(np.float32), top.astype(np.int32), top)


def shape_of(**changes: int) -> EngineShape:
    sizes = dict(
        replicas=2,
        max_sequences=3,
        max_context=40,
        num_pages=12,
        page_size=4,
        prefill_chunk=8,
        max_prefill_sequences=2,
        vocab_size=VOCAB,
        decode_window=4,
    )
    return EngineShape(**(sizes | changes))


def engine_of(shape: EngineShape) -> Engine:
    return Engine(HashRunner(shape), VOCAB, (EOS,))


def expected(request: Request, shape: EngineShape) -> dict[int, tuple[tuple[int, ...], FinishReason]]:
    """What each sample must be, one token after the other, alone."""
    answers = {}
    params = request.params
    room = shape.context - len(request.prompt_token_ids)
    for index in range(params.n):
        seed = sample_seed(params, request.request_id, index, 0)
        drawn: list[int] = []
        reason = FinishReason.LENGTH
        while len(drawn) < min(params.max_tokens, room):
            drawn.append(next_token([*request.prompt_token_ids, *drawn], seed))
            if drawn[-1] in params.stop_token_ids or (drawn[-1] == EOS and not params.ignore_eos):
                reason = FinishReason.STOP
                break
        answers[index] = (tuple(drawn), reason)
    return answers


def check_answers(requests: list[Request], completions: list[Completion], shape: EngineShape) -> None:
    got = {(c.request_id, c.index): (c.token_ids, c.finish_reason) for c in completions}
    assert len(got) == len(completions), "a sample was answered twice"
    want = {(r.request_id, index): answer for r in requests for index, answer in expected(r, shape).items()}
    assert got == want


def make_request(name: str, length: int, alike: int = 0, **params: object) -> Request:
    """A prompt of random tokens, of which the first `alike` are those of every other one."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    common = np.random.default_rng(0).integers(0, VOCAB, 64)[: min(alike, length)]
    own = rng.integers(0, VOCAB, length - len(common))
    return Request(name, tuple([*common.tolist(), *own.tolist()]), SamplingParams(**params))


shapes = st.builds(
    shape_of,
    replicas=st.integers(1, 3),
    max_sequences=st.integers(1, 5),
    num_pages=st.integers(2, 14),
    page_size=st.integers(1, 7),
    prefill_chunk=st.integers(1, 12),
    max_prefill_sequences=st.integers(1, 3),
    decode_window=st.integers(1, 6),
    drafts=st.sampled_from([0, 0, 3]),
    prefix_cache=st.booleans(),
)


@settings(max_examples=50, deadline=None)
@given(
    shape=shapes,
    sizes=st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 3), st.booleans(), st.integers(0, 30)),
        max_size=12,
    ),
)
def test_tokens_do_not_depend_on_batch_pages_chunks_windows_guesses_sharing_or_preemption(
    shape: EngineShape, sizes: list[tuple[int, int, int, bool, int]]
) -> None:
    requests = [
        make_request(f"r{i}", length, alike, max_tokens=max_tokens, n=n, ignore_eos=ignore)
        for i, (length, max_tokens, n, ignore, alike) in enumerate(sizes)
        if length < shape.context
    ]
    engine = engine_of(shape)
    completions = list(engine.generate(requests))
    check_answers(requests, completions, shape)
    assert engine.scheduler.free_pages == (shape.num_pages,) * shape.replicas
    assert not engine.busy and not engine.scheduler.waiting and not engine.scheduler.running


def test_preemption_happens_and_changes_nothing() -> None:
    shape = shape_of(replicas=1, max_sequences=4, num_pages=8, max_context=32)
    engine = engine_of(shape)
    requests = [make_request(f"r{i}", 6, max_tokens=20, ignore_eos=True) for i in range(6)]
    completions = list(engine.generate(requests))
    assert engine.scheduler.preemptions > 3, "the test is meant to run out of pages"
    assert [c.request_id for c in completions] == [r.request_id for r in requests], "the oldest is meant to go on"
    check_answers(requests, completions, shape)


@pytest.mark.parametrize("growth, sizes", [(2, [20, 10, 8]), (4, [20, 8])])
def test_rows_close_ranks_as_others_end(growth: int, sizes: list[int]) -> None:
    """Those that answer longest came last, in the highest rows; tokens known to the devices alone move with them."""
    shape = shape_of(replicas=1, max_sequences=20, max_context=160, num_pages=800, growth=growth)
    engine = engine_of(shape)
    requests = [make_request(f"r{i}", 6, max_tokens=40 + 4 * i, ignore_eos=True) for i in range(20)]
    check_answers(requests, list(engine.generate(requests)), shape)
    windows = [plan for plan in engine.runner.plans if not plan.program.prefill_tokens]
    rows = [plan.program.decode_rows for plan in windows]
    assert rows == sorted(rows, reverse=True) and sorted(set(rows), reverse=True) == sizes
    moved = [plan for plan in windows if (plan.arrays["origin"] != np.arange(plan.program.decode_rows)).any()]
    assert len(moved) == len(sizes) - 1
    assert all((plan.arrays["token"][plan.arrays["budget"] > 0] < 0).any() for plan in moved)


def test_first_come_is_first_served_and_replicas_share_the_load() -> None:
    shape = shape_of(replicas=2, max_sequences=2, num_pages=40)
    engine = engine_of(shape)
    requests = [make_request(f"r{i}", 5, max_tokens=6, ignore_eos=True) for i in range(8)]
    order = [completion.request_id for completion in engine.generate(requests)]
    assert sorted(order) == order
    busy = [(plan.arrays["budget"] > 0).sum(axis=1) for plan in engine.runner.plans]
    assert all(abs(int(a) - int(b)) <= 1 for a, b in busy), "one replica idles while the other works"


def test_decode_goes_on_while_a_long_prompt_is_read_in_chunks() -> None:
    shape = shape_of(replicas=1, max_context=200, num_pages=60)
    engine = engine_of(shape)
    engine.add(make_request("short", 3, max_tokens=60, ignore_eos=True))
    engine.step()
    engine.add(make_request("long", 64, max_tokens=2, ignore_eos=True))
    for _ in range(8):
        assert [token.request_id for token in engine.step().tokens][:1] == ["short"]
    assert engine.stats.prompt_tokens == 3 + 64


def test_requests_are_pulled_lazily() -> None:
    pulled: list[int] = []

    def source() -> Iterator[Request]:
        for index in range(1000):
            pulled.append(index)
            yield make_request(f"r{index}", 4, max_tokens=4)

    engine = engine_of(shape_of(replicas=1))
    next(engine.generate(source()))
    assert len(pulled) < 20


def test_steps_use_few_shapes() -> None:
    shape = shape_of(max_context=200, num_pages=100)
    engine = engine_of(shape)
    requests = [make_request(f"r{i}", 1 + 11 * i, max_tokens=40) for i in range(12)]
    list(engine.generate(requests))
    programs = {plan.program for plan in engine.runner.plans}
    assert {program.table_width for program in programs} <= {8, 13, 50}
    assert {program.prefill_tokens for program in programs} == {0, shape.prefill_chunk}
    assert {program.decode_rows for program in programs} == {3}


class Countdown:
    """Stops at the third token."""

    def __init__(self) -> None:
        self.left = 3

    def push(self, token_id: int) -> bool:
        self.left -= 1
        return self.left == 0


def test_stop_checker_ends_the_sequence_at_its_token() -> None:
    engine = engine_of(shape_of())
    request = make_request("r", 4, max_tokens=20, stop=("x",), ignore_eos=True, n=2)
    completions = list(engine.generate([request], lambda _: Hooks(stop=Countdown())))
    assert [len(c.token_ids) for c in completions] == [3, 3]
    assert {c.finish_reason for c in completions} == {FinishReason.STOP}
    assert {c.stop_token_id for c in completions} == {None}
    with pytest.raises(ValueError, match="hooks"):
        engine.add(request)


def test_stop_token_is_the_last_token_and_is_named() -> None:
    request = make_request("r", 4, max_tokens=30, ignore_eos=True)
    ((tokens, _),) = expected(request, shape_of()).values()
    stopped = Request("r", request.prompt_token_ids, SamplingParams(max_tokens=30, stop_token_ids=(tokens[4],)))
    (completion,) = engine_of(shape_of()).generate([stopped])
    assert completion.token_ids == tokens[:5] and completion.stop_token_id == tokens[4]
    assert completion.finish_reason is FinishReason.STOP


def test_logprobs_have_one_entry_a_token_also_after_preemption() -> None:
    shape = shape_of(replicas=1, max_sequences=4, num_pages=8, max_context=32)
    engine = engine_of(shape)
    requests = [
        make_request(f"r{i}", 6, max_tokens=20, ignore_eos=True, logprobs=True, top_logprobs=2) for i in range(5)
    ]
    for completion in engine.generate(requests):
        assert completion.logprobs is not None
        assert [entry.token_id for entry in completion.logprobs] == list(completion.token_ids)
        assert [entry.logprob for entry in completion.logprobs] == [-token for token in completion.token_ids]
        assert all(len(entry.top) == 2 for entry in completion.logprobs)
    assert engine.scheduler.preemptions


def test_stream_gives_the_tokens_and_cancels_when_closed() -> None:
    engine = engine_of(shape_of())
    request = make_request("r", 4, max_tokens=9, ignore_eos=True)
    ((tokens, _),) = expected(request, shape_of()).values()
    assert tuple(new.token.token_id for new in engine.stream(request)) == tokens
    stream = engine.stream(request)
    next(stream)
    stream.close()
    assert not engine.busy and engine.scheduler.free_pages == (12, 12)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (Request("r", (), SamplingParams()), "the prompt is empty"),
        (Request("r", (1, VOCAB), SamplingParams()), f"token id {VOCAB} is not in the vocabulary of {VOCAB}"),
        (Request("r", (-1,), SamplingParams()), "token id -1 is not in the vocabulary"),
        (Request("r", (1,) * 40, SamplingParams()), "40 tokens, which leaves no room in the context of 40"),
    ],
)
def test_impossible_requests_are_refused(request_: Request, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        engine_of(shape_of()).check(request_)


def test_a_prompt_beyond_the_pages_is_refused_with_the_figures() -> None:
    with pytest.raises(ValueError, match=r"cache of a replica holds 12 \(3 pages of 4\)"):
        engine_of(shape_of(num_pages=3)).check(make_request("r", 12))


def test_seeds_follow_the_request_and_not_the_run() -> None:
    seeded, free = SamplingParams(seed=7), SamplingParams()
    assert sample_seed(seeded, "a", 0, 1) == sample_seed(seeded, "b", 0, 2)
    assert sample_seed(free, "a", 0, 1) != sample_seed(free, "b", 0, 1)
    assert sample_seed(free, "a", 0, 1) != sample_seed(free, "a", 0, 2)
    assert len({sample_seed(seeded, "a", index, 0) for index in range(100)}) == 100


def test_page_pool_refuses_wrong_use() -> None:
    pool = PagePool(4)
    pages = pool.take(3)
    assert len(set(pages)) == 3 and pool.free == 1
    with pytest.raises(AssertionError, match="2 pages asked of 1"):
        pool.take(2)
    pool.give_back(pages)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.give_back(pages[:1])


def check_pages(engine: Engine, shape: EngineShape) -> None:
    """Who runs holds exactly the pages that are not free, and no more than it can need; rows add up too."""
    for replica in engine.scheduler._replicas:
        held = [page for sequence in replica.running for page in sequence.pages]
        assert len(set(held)) == replica.pool.size - replica.pool.free
        assert len(held) == len(set(held)) or shape.prefix_cache
        assert len(replica.running) + len(replica.rows) == shape.max_sequences
        for sequence in replica.running:
            # Where tokens were put in, what was under way is not wanted, but the pages for it stay.
            windows = 1 if sequence.thoughts is None else 3
            reach = sequence.length + windows * max(shape.decode_window, 1 + shape.drafts)
            assert len(sequence.pages) <= pages_for(min(reach, sequence.limit), shape.page_size)


class EngineMachine(RuleBasedStateMachine):
    """Requests come and go in any order; nothing leaks, nothing starves, every answer is right."""

    @initialize(shape=shapes)
    def start(self, shape: EngineShape) -> None:
        self.shape = shape
        self.engine = engine_of(shape)
        self.live: dict[str, Request] = {}
        self.answered: list[Completion] = []
        self.served: list[Request] = []
        self.count = 0

    @rule(length=st.integers(1, 30), max_tokens=st.integers(1, 40), n=st.integers(1, 3), alike=st.integers(0, 30))
    def add(self, length: int, max_tokens: int, n: int, alike: int) -> None:
        length = min(length, self.shape.context - 1) or 1
        request = make_request(f"r{self.count}", length, alike, max_tokens=max_tokens, n=n)
        if len(request.prompt_token_ids) >= self.shape.context:
            return
        self.count += 1
        self.live[request.request_id] = request
        self.engine.add(request)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.live)))
        self.engine.cancel(name)
        del self.live[name]
        self.answered = [completion for completion in self.answered if completion.request_id != name]

    @rule(steps=st.integers(1, 20))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self._collect()

    def _collect(self) -> None:
        self.answered.extend(self.engine.step().completions)
        for name, request in tuple(self.live.items()):
            if sum(completion.request_id == name for completion in self.answered) == request.params.n:
                self.served.append(self.live.pop(name))

    @invariant()
    def pages_add_up(self) -> None:
        check_pages(self.engine, self.shape)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        todo = sum(
            request.params.n * (len(request.prompt_token_ids) + request.params.max_tokens) + request.params.n
            for request in self.live.values()
        )
        steps = 0
        while self.engine.busy:
            self._collect()
            steps += 1
            assert steps <= 20 * todo + 100, "a request starves"
        check_answers(self.served, self.answered, self.shape)
        assert self.engine.scheduler.free_pages == (self.shape.num_pages,) * self.shape.replicas


EngineMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestEngineMachine = EngineMachine.TestCase
