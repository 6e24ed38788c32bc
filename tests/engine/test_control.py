"""What the engine does beside drawing tokens: shares pages, guesses, bounds thoughts, restricts tokens.

On the runner of `test_engine`, whose next token is a hash of the whole prefix.
"""

from dataclasses import replace

import numpy as np
import pytest

from qwq_jax.config.sampling import SamplingParams
from qwq_jax.engine.engine import Engine
from qwq_jax.engine.lookup import PromptLookup
from qwq_jax.engine.pages import PagePool, extend_digests
from qwq_jax.engine.request import Completion, FinishReason, Hooks, Request, sample_seed
from qwq_jax.engine.step import EngineShape, StepPlan
from qwq_jax.engine.thoughts import ThinkingTokens
from tests.engine.test_engine import EOS, VOCAB, engine_of, make_request, next_token, shape_of

MARKS = ThinkingTokens(close=95, closing=(90, 91, 95), continuation=(92, 93))


def run(request: Request, shape: EngineShape, hooks: Hooks = Hooks()) -> Completion:  # noqa: B008
    (completion,) = engine_of(shape).generate([request], lambda _: hooks)
    return completion


def thinking_reference(request: Request, context: int) -> list[int]:
    """One token after the other, by the rules of `Thoughts`."""
    params, seed = request.params, sample_seed(request.params, request.request_id, 0, 0)
    out: list[int] = []
    thinking = True
    limit = min(params.max_tokens, context - len(request.prompt_token_ids))
    while len(out) < limit:
        token = next_token([*request.prompt_token_ids, *out], seed)
        if thinking and token in (MARKS.close, EOS):
            room = min(limit, params.max_thinking_tokens or limit) - len(out)
            if len(out) < params.min_thinking_tokens and len(MARKS.continuation) < room:
                out += MARKS.continuation
                continue
            thinking = False
        out.append(token)
        if token == EOS:
            break
        if thinking and params.max_thinking_tokens and len(out) >= params.max_thinking_tokens:
            out += MARKS.closing
            thinking = False
    return out


@pytest.mark.parametrize("window", [1, 5])
@pytest.mark.parametrize(
    "bounds",
    [
        {"max_thinking_tokens": 9},
        {"min_thinking_tokens": 60},
        {"min_thinking_tokens": 30, "max_thinking_tokens": 70},
        {"min_thinking_tokens": 12, "max_thinking_tokens": 12},
        {"max_thinking_tokens": 1},
    ],
)
def test_thoughts_are_closed_and_continued_at_their_bounds(bounds: dict[str, int], window: int) -> None:
    shape = shape_of(max_context=200, num_pages=60, decode_window=window)
    forced = 0
    for index in range(12):
        plain = make_request(f"r{index}", 7, max_tokens=100, logprobs=bool(index % 2), **bounds)
        request = replace(plain, thinking=MARKS)
        completion = run(request, shape)
        assert list(completion.token_ids) == thinking_reference(request, 200)
        assert len(completion.token_ids) <= 100
        marks = set(MARKS.closing + MARKS.continuation)
        assert {completion.token_ids[at] for at in completion.forced} <= marks
        forced += len(completion.forced)
        if index % 2:  # each token is scored, those put in as well
            assert completion.logprobs is not None
            assert [(e.token_id, e.logprob) for e in completion.logprobs] == [(t, -t) for t in completion.token_ids]
    assert forced, "no bound was reached"


def test_tokens_put_in_get_pages_where_no_more_may_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt and one token fill its pages, and the tokens that end the thoughts come after the bound on these."""
    monkeypatch.setattr("tests.engine.test_engine.next_token", lambda prefix, seed: 7)
    plain = make_request("r", 7, max_tokens=6, max_thinking_tokens=1)
    completion = run(replace(plain, thinking=MARKS), shape_of(replicas=1))
    assert completion.token_ids == (7, *MARKS.closing, 7, 7) and completion.forced == (1, 2, 3)


def test_a_continuation_goes_not_beyond_the_longest_thoughts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.engine.test_engine.next_token", lambda prefix, seed: MARKS.close)
    plain = make_request("r", 8, max_tokens=9, min_thinking_tokens=4, max_thinking_tokens=4)
    completion = run(replace(plain, thinking=MARKS), shape_of(replicas=1))
    assert completion.token_ids == (*MARKS.continuation, *[MARKS.close] * 7)


def test_bounds_that_cannot_be_kept_are_refused() -> None:
    engine = engine_of(shape_of())
    params = SamplingParams(max_tokens=12, max_thinking_tokens=9)
    with pytest.raises(ValueError, match="need the tokens that end thoughts"):
        engine.check(Request("r", (1,), params))
    with pytest.raises(ValueError, match="no room for an answer: there is room for 12 tokens"):
        engine.check(Request("r", (1,), params, thinking=MARKS))


@pytest.mark.parametrize("fields", [{"stop_token_ids": (2**32,)}, {"logit_bias": {str(VOCAB): 1.0}}])
def test_tokens_outside_the_vocabulary_are_refused(fields: dict[str, object]) -> None:
    params = SamplingParams.model_validate({"max_tokens": 3, **fields})
    with pytest.raises(ValueError, match=f"is not in the vocabulary of {VOCAB}"):
        engine_of(shape_of()).check(Request("r", (1,), params))


def test_the_greatest_least_length_is_that_of_the_context() -> None:
    request = make_request("r", 4, max_tokens=3 * 10**9, min_tokens=3 * 10**9, ignore_eos=True)
    assert len(run(request, shape_of()).token_ids) == 36


def test_a_long_prompt_in_chunks_runs_beside_others_whose_logits_are_edited() -> None:
    engine = engine_of(shape_of(replicas=1, max_context=200, num_pages=100))
    edits = {"presence_penalty": 1.0, "ignore_eos": True, "max_tokens": 30}
    requests = [
        make_request("a", 3, **edits, logit_bias={"1": 1.0}),
        make_request("b", 120, **edits, logit_bias={str(token): 1.0 for token in range(40)}),
    ]
    assert {len(completion.token_ids) for completion in engine.generate(requests)} == {30}


def test_no_guesses_are_made_beside_a_row_that_the_host_must_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.engine.test_engine.next_token", lambda prefix, seed: (prefix[-1] + 1) % 5)
    engine = engine_of(shape_of(replicas=1, max_context=100, num_pages=60, drafts=3))
    requests = [make_request("p", 9, max_tokens=40, ignore_eos=True)]
    requests.append(make_request("q", 9, max_tokens=20, presence_penalty=0.5, ignore_eos=True))
    assert len(list(engine.generate(requests))) == 2
    for plan in engine.runner.plans:
        assert not (plan.program.drafts and plan.program.history)
    assert engine.stats.drafted_tokens


def test_tokens_put_in_are_scored_also_after_preemption() -> None:
    shape = shape_of(replicas=1, max_sequences=4, num_pages=12, max_context=40, prefill_chunk=3)
    engine = engine_of(shape)
    requests = [
        replace(
            make_request(f"r{i}", 9, alike=9, max_tokens=25, logprobs=True, max_thinking_tokens=4, n=2), thinking=MARKS
        )
        for i in range(5)
    ]
    for completion in engine.generate(requests):
        assert completion.logprobs is not None
        assert [entry.token_id for entry in completion.logprobs] == list(completion.token_ids)
    assert engine.scheduler.preemptions


class EvenTokens:
    """Admits even tokens, and the end after five of them; only after the first `free` tokens."""

    def __init__(self, free: int) -> None:
        self.free, self.count = free, 0

    @property
    def active(self) -> bool:
        return self.count >= self.free

    def fill(self, bits: np.ndarray) -> None:
        allowed = np.zeros(len(bits) * 32, np.uint8)
        allowed[:VOCAB:2] = 1
        allowed[EOS] = self.count >= self.free + 5
        bits[:] = np.packbits(allowed, bitorder="little").view(np.uint32)

    def push(self, token_id: int) -> None:
        self.count += 1


@pytest.mark.parametrize("free", [0, 3])
def test_a_mask_restricts_each_token_of_its_sequence_and_no_other(free: int) -> None:
    shape = shape_of(replicas=1, max_context=100, num_pages=60)
    engine = engine_of(shape)
    masked, plain = make_request("m", 5, max_tokens=20), make_request("p", 5, max_tokens=30, ignore_eos=True)
    hooks = lambda request: Hooks(mask=EvenTokens(free)) if request is masked else Hooks()  # noqa: E731
    done = {completion.request_id: completion for completion in engine.generate([masked, plain], hooks)}
    assert done["p"].token_ids == run(plain, shape).token_ids
    seed, prefix = sample_seed(masked.params, "m", 0, 0), list(masked.prompt_token_ids)
    for index, token in enumerate(done["m"].token_ids):
        wanted = next_token(prefix, seed)
        if index >= free:
            order = [*range(wanted, VOCAB), *range(wanted)]
            wanted = next(t for t in order if t % 2 == 0 and (t != EOS or index >= free + 5))
        assert token == wanted
        prefix.append(token)


def test_samples_of_a_prompt_compute_it_once() -> None:
    shape = shape_of(replicas=1, max_sequences=8, max_context=200, num_pages=200)
    engine = engine_of(shape)
    completions = list(engine.generate([make_request("r", 41, max_tokens=5, n=6, ignore_eos=True)]))
    assert len({c.token_ids for c in completions}) == 6
    # Ten full pages of four tokens are shared; the last token is each one's own, and starts its decoding.
    assert engine.stats.prompt_tokens == 40
    assert engine.stats.shared_tokens == 5 * 40
    assert engine.scheduler.free_pages == (200,)


def test_a_later_request_finds_what_an_earlier_one_computed_until_its_pages_are_needed() -> None:
    shape = shape_of(replicas=1, max_context=48, num_pages=12)
    engine = engine_of(shape)
    list(engine.generate([make_request("a", 30, alike=20, max_tokens=2, ignore_eos=True)]))
    list(engine.generate([make_request("b", 30, alike=20, max_tokens=2, ignore_eos=True)]))
    assert engine.stats.shared_tokens == 20
    list(engine.generate([make_request("c", 46, max_tokens=2, ignore_eos=True)]))  # all twelve pages
    list(engine.generate([make_request("d", 30, alike=20, max_tokens=2, ignore_eos=True)]))
    assert engine.stats.shared_tokens == 20


def test_prompt_log_probabilities_have_an_entry_a_token_whatever_the_cache_holds() -> None:
    engine = engine_of(shape_of(replicas=1))
    for name in "ab":
        request = make_request(name, 20, alike=20, max_tokens=3, prompt_logprobs=2, n=2, ignore_eos=True)
        first, second = sorted(engine.generate([request]), key=lambda completion: completion.index)
        assert first.prompt_logprobs is not None and second.prompt_logprobs is None
        assert first.prompt_logprobs[0] is None
        tokens = [entry.token_id for entry in first.prompt_logprobs[1:] if entry]
        assert tokens == list(request.prompt_token_ids[1:])
        assert all(entry and len(entry.top) == 2 for entry in first.prompt_logprobs[1:])


def test_guesses_hold_where_the_text_repeats_itself_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    period = lambda prefix, seed: 50 + seed % 7 if len(prefix) % 10 == 0 else (prefix[-1] + 1) % 5  # noqa: E731
    monkeypatch.setattr("tests.engine.test_engine.next_token", period)
    shape = shape_of(replicas=1, max_context=100, num_pages=60, drafts=3)
    requests = [make_request(f"r{i}", 9, max_tokens=30 + i, n=2, ignore_eos=True) for i in range(3)]
    engine = engine_of(shape)
    guessed = {(c.request_id, c.index): c.token_ids for c in engine.generate(requests)}
    plain = engine_of(replace(shape, drafts=0)).generate(requests)
    assert guessed == {(c.request_id, c.index): c.token_ids for c in plain}
    assert engine.stats.drafted_tokens > engine.stats.accepted_tokens > 60, "some guesses hold, some do not"
    assert engine.scheduler.free_pages == (60,)


def test_guesses_are_looked_for_again_after_twice_as_many_tokens_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing repeats itself before the 40th token, and then everything."""
    monkeypatch.setattr("tests.engine.test_engine.next_token", lambda prefix, seed: min(len(prefix), 40))
    shape = shape_of(replicas=1, max_context=100, num_pages=60, drafts=3, decode_window=8)
    engine = engine_of(shape)
    steps: list[tuple[int, int]] = []
    submit = engine.runner.submit

    def noting(plan: StepPlan) -> object:
        prompt = plan.program.prefill_tokens
        steps.append((plan.program.drafts, 0 if prompt or plan.program.drafts else int(plan.arrays["steps"][0, 0])))
        return submit(plan)

    monkeypatch.setattr(engine.runner, "submit", noting)
    (completion,) = engine.generate([make_request("one", 9, max_tokens=60, ignore_eos=True)])
    assert completion.token_ids == tuple(min(9 + i, 40) for i in range(60))
    plain = [size for drafts, size in steps if size]
    assert plain[:5] == [2, 4, 8, 8, 8] and (3, 0) in steps, "the first token came with the prompt"
    again = steps[steps.index((3, 0)) :]
    assert all(drafts == 3 for drafts, _ in again), "it goes on guessing while guesses are at hand"
    assert engine.stats.accepted_tokens > 15


def test_lookup_proposes_what_followed_last_time() -> None:
    lookup = PromptLookup()
    assert lookup.propose([1, 2, 3], 4) == ()
    assert lookup.propose([1, 2, 3, 9, 1, 2], 2) == (3, 9)
    assert lookup.propose([1, 2, 3, 9, 1, 2, 4, 1, 2], 3) == (4, 1, 2)
    assert lookup.propose([1, 2, 3, 9, 1, 2, 4, 1, 2, 3], 0) == ()
    assert PromptLookup().propose([7, 1, 2, 1, 2], 5) == (1, 2, 1, 2, 1), "a loop goes on"


def test_pages_are_found_by_all_that_comes_before_them() -> None:
    pool, digests, other = PagePool(4), [], []
    extend_digests(digests, [1, 2, 3, 4, 5], 2)
    extend_digests(other, [9, 9, 3, 4], 2)
    assert len(digests) == 2 and digests[1] != other[1]
    pages = pool.take(2)
    for page, digest in zip(pages, digests, strict=True):
        pool.register(page, digest)
    assert pool.find(digests) == pages and pool.find(other) == []
    pool.share(pages)
    pool.give_back(pages)
    assert pool.free == 2, "another holder is left"
    pool.give_back(pages)
    assert pool.free == 4 and pool.find(digests) == pages
    pool.take(3)
    assert pool.find(digests) == pages[:1], "the end of a sequence goes first"


@pytest.mark.parametrize("window", [1, 3, 8])
def test_steps_are_submitted_before_the_last_one_is_seen(window: int) -> None:
    engine: Engine = engine_of(shape_of(replicas=1, max_context=200, num_pages=60, decode_window=window))
    engine.add(make_request("r", 4, max_tokens=50, ignore_eos=True))
    engine.step()
    assert len(engine.runner.plans) == 2, "the second step starts before the first one's tokens are looked at"
    assert engine.runner.plans[1].arrays["token"][0, 0] == -1
    (completion,) = [completion for _ in range(60) if engine.busy for completion in engine.step().completions]
    assert completion.finish_reason is FinishReason.LENGTH and len(completion.token_ids) == 50
