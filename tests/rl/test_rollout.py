"""Batches of groups: what is asked of the engine, how a batch is refilled, and what is left of one that is stopped."""

import numpy as np
import pytest

from qwq_jax.config.rl import RolloutConfig
from qwq_jax.engine.request import sample_seed
from qwq_jax.rl.rollout import Rollouts
from tests.rl.scripted import END, Letters, ScriptedEngine, ScriptedJudge, make_prompt, make_sample

CONFIG = RolloutConfig(prompts_per_step=3, group_size=2, max_prompt_tokens=4, max_tokens=6, max_refills=2)
ORDER = [make_prompt(number) for number in range(30)]


def letters(name, index):
    """One letter for the prompt, and as many as the index says: ``"2/5", 1`` is "f" and "b"."""
    return [97 + int(name.split("/")[1]) % 26, *[98] * index, END]


def rollouts(value, tokens=letters, config=CONFIG):
    engine, judge = ScriptedEngine(tokens), ScriptedJudge(value)
    judge.engine = engine
    return Rollouts(engine, Letters(), judge, config), engine, judge


def by_length(task_id, reply):
    return float(reply.tokens)


def test_groups_are_in_order_whatever_ends_first():
    source, engine, judge = rollouts(by_length)
    batch = source.batch(ORDER, 4, step=9, refill=False)
    assert [group.prompt.task.task_id for group in batch.groups] == ["t4", "t5", "t6"]
    for number, group in zip((4, 5, 6), batch.groups, strict=True):
        assert [sample.reply.text for sample in group.samples] == [chr(97 + number), chr(97 + number) + "b"]
        assert group.rewards == [2.0, 3.0], "each reply has its own score"
        assert [sample.completion.index for sample in group.samples] == [0, 1]
    assert (batch.cursor, batch.drawn_groups, batch.tokens) == (7, 3, 15)
    assert set(batch.seconds) == {"rollout", "reward"}
    assert judge.steps_at == [1, 2, 3, 4, 5, 6], "judged while the engine goes on"


def test_all_of_the_distribution_is_drawn_from_at_the_temperature_of_the_run():
    """A top-p or top-k cuts the support: the mean ratio would be the mass that was kept."""
    source, engine, _ = rollouts(by_length, config=CONFIG.model_copy(update={"temperature": 0.6}))
    source.batch(ORDER, 0, step=1, refill=False)
    for request in engine.requests:
        params = request.params
        assert (params.temperature, params.n, params.max_tokens, params.logprobs) == (0.6, 2, 6, True)
        assert (params.top_p, params.top_k, params.min_p, params.penalised, params.logit_bias) == (1, 0, 0, False, ())
        assert params.seed is None, "the name gives the seed"
        assert request.prompt_token_ids == (65, 66)


def seeds(step, cursor, run_seed=0):
    source, engine, _ = rollouts(by_length)
    source.batch(ORDER, cursor, step=step, refill=False)
    return [
        sample_seed(request.params, request.request_id, index, run_seed)
        for request in engine.requests
        for index in range(request.params.n)
    ]


def test_noise_is_new_in_every_step_and_the_same_when_a_step_is_done_again():
    # The same prompts again in another step, as after a pass over few tasks.
    drawn = [*seeds(1, 0), *seeds(2, 0), *seeds(2, 3)]
    assert len(set(drawn)) == len(drawn) == 18
    assert seeds(2, 3) == drawn[-6:]
    assert set(seeds(1, 0, run_seed=1)).isdisjoint(drawn)


def test_a_prompt_may_be_asked_twice_in_a_batch():
    source, _, _ = rollouts(by_length)
    same = [ORDER[0]] * 3
    batch = source.batch(same, 0, step=1, refill=False)
    assert [group.samples[0].reply.text for group in batch.groups] == ["a", "b", "c"], "by number, not by task"


UNINFORMATIVE = {"t1", "t2", "t4"}


def some_alike(task_id, reply):
    return 0.5 if task_id in UNINFORMATIVE else float(reply.tokens)


def test_refilling_draws_as_many_as_are_missing():
    source, engine, judge = rollouts(some_alike)
    batch = source.batch(ORDER, 0, step=1, refill=True)
    # 0 1 2, then 3 4 for the two that say nothing, then 5 for the 4.
    assert [request.request_id for request in engine.requests] == ["1/0", "1/1", "1/2", "1/3", "1/4", "1/5"]
    assert [group.prompt.task.task_id for group in batch.groups] == ["t0", "t3", "t5"]
    assert (batch.cursor, batch.drawn_groups, batch.tokens) == (6, 6, 30)
    assert len(judge.submitted) == 12


def test_without_refilling_what_says_nothing_stays():
    source, _, _ = rollouts(some_alike)
    batch = source.batch(ORDER, 0, step=1, refill=False)
    assert [group.prompt.task.task_id for group in batch.groups] == ["t0", "t1", "t2"] and batch.cursor == 3


def test_refilling_ends_with_what_there_is():
    source, engine, _ = rollouts(lambda task_id, reply: float(reply.tokens) if task_id == "t1" else 0.0)
    batch = source.batch(ORDER, 0, step=1, refill=True)
    assert [group.prompt.task.task_id for group in batch.groups] == ["t1"]
    assert (batch.cursor, batch.drawn_groups) == (7, 7), "3, and twice 2"


def test_a_policy_that_always_gets_the_same_is_trained_on_the_last_draw():
    source, _, _ = rollouts(lambda *_: 1.0)
    batch = source.batch(ORDER, 0, step=1, refill=True)
    assert [group.prompt.task.task_id for group in batch.groups] == ["t6", "t7", "t8"]
    assert (batch.cursor, batch.drawn_groups) == (9, 9)


def test_rewards_that_differ_by_little_are_informative():
    source, _, _ = rollouts(lambda task_id, reply: 0.0 if reply.tokens == 2 else 0.7)
    batch = source.batch(ORDER, 0, step=1, refill=True)
    assert batch.drawn_groups == 3 and batch.groups[0].rewards == [0.0, 0.7]


@pytest.mark.parametrize("at", [1, 4, 7])
def test_stopping_gives_no_batch_and_leaves_the_engine_empty(at):
    source, engine, _ = rollouts(some_alike)
    asked = 0

    def stopping():
        nonlocal asked
        asked += 1
        return asked == at

    assert source.batch(ORDER, 0, step=1, refill=True, stopping=stopping) is None
    assert asked == at, "asked after every step, and no more steps after that"
    assert engine.cancelled == (["1/0", "1/1", "1/2"] if at < 7 else ["1/3", "1/4"])


def test_a_draw_adds_to_what_each_phase_took():
    source, _, _ = rollouts(by_length)
    seconds = {"rollout": 100.0, "reward": 100.0}
    source.draw([("x/1", ORDER[1])], seconds)
    assert seconds["rollout"] > 100 and seconds["reward"] > 100


def test_the_arrays_of_a_sample():
    sample = make_sample([97, 98, 99, END], 1.0, forced=[1, 2])
    np.testing.assert_allclose(sample.logprobs, [-0.01, -0.02, -0.03, -0.04])
    assert sample.logprobs.dtype == np.float32
    assert sample.drawn.tolist() == [True, False, False, True]


def test_a_reply_at_the_limit_is_truncated_and_one_that_ends_there_is_not():
    ends = {"1/0": [97] * 6, "1/1": [97] * 5 + [END], "1/2": [END]}
    source, _, _ = rollouts(by_length, lambda name, index: ends[name])
    batch = source.batch(ORDER, 0, step=1, refill=False)
    replies = [group.samples[0].reply for group in batch.groups]
    assert [reply.truncated for reply in replies] == [True, False, False]
    assert [reply.tokens for reply in replies] == [6, 6, 1], "the end token counts"
