"""Pairs from JSONL: what a policy and a reward model read of them, token for token, and what is refused."""

import json
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import pytest

from qwq_jax.chat import ChatTokenizer
from qwq_jax.config.rewards import RewardModelConfig
from qwq_jax.engine.request import Completion, FinishReason
from qwq_jax.rl.judging import Claim, SharedJudge
from qwq_jax.rl.preference_data import answer_ids, policy_pair, read_pairs, reward_pair, scored_segment
from qwq_jax.rl.prompts import Prompt
from qwq_jax.rl.replies import reply_of
from qwq_jax.rl.rewards.graded import Graded
from qwq_jax.rl.rewards.pool import RewardPool
from qwq_jax.rl.types import Task
from qwq_jax.train.packing import fill_rows
from qwq_jax.train.stream import fill_examples, plan_steps, slots_of
from tests.sft.chat_directory import END, PLAIN, THINKING, write_tokenizer


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    return ChatTokenizer.from_directory(write_tokenizer(tmp_path_factory.mktemp("thinking"), THINKING))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return ChatTokenizer.from_directory(write_tokenizer(tmp_path_factory.mktemp("plain"), PLAIN))


def read(tmp_path, tokenizer, *lines, kind=policy_pair, row_length=400, skip_too_long=False, **reading):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    encode = partial(kind, tokenizer=tokenizer, **reading)
    return read_pairs([path], encode, row_length=row_length, skip_too_long=skip_too_long)


def pair(chosen: Any = "yes", rejected: Any = "no", **more: Any) -> dict[str, Any]:
    return {"prompt": "2+2?", "chosen": chosen, "rejected": rejected, **more}


def text(tokenizer, segment, which=None):
    ids = segment.tokens if which is None else segment.tokens[which]
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def test_a_policy_learns_each_token_of_both_replies_and_their_ends(tmp_path, plain):
    (chosen, rejected) = read(tmp_path, plain, pair()).examples[0]
    assert text(plain, chosen, chosen.trained) == "yes<|im_end|>"
    assert text(plain, rejected, rejected.trained) == "no<|im_end|>"
    prompt = plain.apply_template([{"role": "user", "content": "2+2?"}])
    for segment in (chosen, rejected):
        assert segment.tokens[~segment.trained].tolist() == prompt and segment.tokens[-1] == END


@pytest.mark.parametrize(
    "chosen",
    [
        "<think>\nadd\n</think>\n\n4",
        {"role": "assistant", "content": "4", "reasoning_content": "add"},
        {"role": "assistant", "content": "add\n</think>\n\n4"},
    ],
)
def test_thoughts_come_in_three_forms_and_may_be_left_to_the_policy(tmp_path, thinking, chosen):
    line = pair(chosen, "<think>\nadd\n</think>\n\n5")
    policy, _ = read(tmp_path, thinking, line).examples[0]
    assert text(thinking, policy, policy.trained) == "add\n</think>\n\n4<|im_end|>"
    whole, _ = read(tmp_path, thinking, line, kind=reward_pair, thoughts=True).examples[0]
    assert whole.tokens[:-1].tolist() == policy.tokens.tolist()
    answer, _ = read(tmp_path, thinking, line, kind=reward_pair, thoughts=False).examples[0]
    assert text(thinking, answer).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n4<|im_end|><|im_end|>")


def test_an_answer_alone_needs_no_thoughts_for_a_reward_model(tmp_path, thinking, plain):
    for tokenizer, end in ((thinking, "<think>\n\n</think>\n\nyes<|im_end|>"), (plain, "assistant\nyes<|im_end|>")):
        chosen, _ = read(tmp_path, tokenizer, pair(), kind=reward_pair, thoughts=False).examples[0]
        assert text(tokenizer, chosen, slice(0, -1)).endswith(end)
    # Where no template opens thoughts, a reply may begin them itself.
    chosen, _ = read(tmp_path, plain, pair("<think>\nadd\n</think>\n\n4"), kind=reward_pair, thoughts=False).examples[0]
    assert text(plain, chosen, slice(0, -1)).endswith("assistant\n4<|im_end|>")


@pytest.mark.parametrize("thoughts", [False, True])
@pytest.mark.parametrize("name", ["thinking", "plain"])
def test_a_reward_model_is_trained_on_what_it_judges(tmp_path, request, name, thoughts):
    """A reply that was drawn is read as the same reply in a line of data."""
    tokenizer = request.getfixturevalue(name)
    told = "add\n</think>\n\n4" if name == "thinking" else "4"
    line = pair(told, "no\n</think>\n\n5")
    trained, _ = read(tmp_path, tokenizer, line, kind=reward_pair, thoughts=thoughts).examples[0]
    task = Task("1", ({"role": "user", "content": "2+2?"},))
    prompt = Prompt(task, tuple(tokenizer.apply_template(task.messages)))
    drawn = (*tokenizer.encode(told), END)
    completion = Completion("1", 0, drawn, FinishReason.STOP, stop_token_id=END)
    graded: Future[Graded] = Future()
    graded.set_result(Graded(0.0, None))
    claim = Claim(prompt, completion, reply_of(completion, prompt.token_ids, tokenizer), graded)
    asked = []

    class Recorder:
        def scores(self, pairs):
            asked.extend(pairs)
            return np.ones(len(pairs), np.float32)

    configs = [RewardModelConfig(checkpoint="rm", thoughts=thoughts)]
    with RewardPool(configs) as pool:
        (found,) = SharedJudge(configs, pool, {"model": Recorder()}, tokenizer).results([claim])
    assert found.value == 1.0
    assert scored_segment(*asked[0]).tokens.tolist() == trained.tokens.tolist()


def test_the_score_stands_where_the_last_token_is_read(tmp_path, plain):
    examples = read(tmp_path, plain, pair(margin=2.5), kind=reward_pair, thoughts=False).examples
    packed = fill_rows([examples[0]], row_length=100)
    at = np.flatnonzero(packed.loss_mask[0])
    assert packed.tokens[0, at].tolist() == [END, END] and packed.segment_ids[0, at].tolist() == [1, 2]
    assert packed.positions[0, at].tolist() == [segment.slots - 1 for segment in examples[0]]
    assert packed.columns["margin"][0, at].tolist() == [2.5, 0.0]


def test_both_replies_of_a_pair_lie_in_one_row_one_after_the_other(tmp_path, plain):
    lines = [pair("y" * (n % 7 + 1), "n" * (n % 5 + 1), prompt=f"number {n}") for n in range(40)]
    pairs = read(tmp_path, plain, *lines)
    slots = [slots_of(example) for example in pairs.examples]
    seen = 0
    for rows in plan_steps(slots, row_length=300, rows_per_step=2, seed=0, steps=12):
        packed = fill_examples(pairs.examples, rows, row_length=300)
        for r, row in enumerate(rows):
            for place, index in enumerate(row):
                for side, segment in enumerate(pairs.examples[index]):
                    here = packed.segment_ids[r] == 2 * place + side + 1
                    assert packed.tokens[r, here].tolist() == segment.tokens[:-1].tolist()
                    seen += 1
    assert seen > 80 and max(len(row) for row in rows) > 1


def test_columns_join_the_tokens_that_they_belong_to(tmp_path, plain):
    pairs = read(tmp_path, plain, pair(), pair("maybe", "never", id="b"))
    values = [np.arange(int(segment.trained.sum())) + 10.0 * i for i, segment in enumerate(pairs.segments)]
    joined = pairs.with_column("ref_logp", values)
    for segment, value in zip(joined.segments, values, strict=True):
        assert segment.columns["ref_logp"][segment.trained].tolist() == value.tolist()
        assert not segment.columns["ref_logp"][~segment.trained].any()
    assert [s.tokens.tolist() for s in joined.segments] == [s.tokens.tolist() for s in pairs.segments]


def test_the_fingerprint_sees_tokens_masks_margins_and_the_order(tmp_path, plain):
    def of(*lines, **reading):
        return read(tmp_path, plain, *lines, **reading).fingerprint()

    judged = {"kind": reward_pair, "thoughts": False}
    prints = [of(pair()), of(pair("no", "yes")), of(pair(), pair("a", "b")), of(pair("a", "b"), pair())]
    prints += [of(pair(), **judged), of(pair(margin=1), **judged)]
    assert len(set(prints)) == 6
    assert of(pair()) == prints[0] == of(pair(margin=1)), "a margin means nothing to a policy"


def test_long_pairs_are_refused_or_counted(tmp_path, plain):
    long = pair("y" * 400)
    with pytest.raises(ValueError, match=r"pairs.jsonl:2: both replies with their prompts take \d+ slots, and a row"):
        read(tmp_path, plain, pair(), long)
    pairs = read(tmp_path, plain, pair(margin=1), long, pair("a", "b"), skip_too_long=True)
    assert len(pairs.examples) == 2 and pairs.too_long == 1 and pairs.with_margin == 1
    with pytest.raises(ValueError, match="no pair to train on; too long for a row of 400: 1"):
        read(tmp_path, plain, long, skip_too_long=True)


REFUSED = [
    (b"{", "expected a JSON object, but at column 2"),
    (b'{"prompt": "a", "prompt": "b"}', "prompt: given twice"),
    (pair(chosen=3), "chosen: expected a text, or a message of the assistant with content, got 3"),
    (pair(rejected={"role": "user", "content": "x"}), "rejected: expected a text, or a message of the assistant"),
    (pair(chosen={"role": "assistant", "content": "x", "tool_calls": []}), "chosen: has field 'tool_calls'"),
    (pair(chosen={"role": "assistant", "content": "x", "reasoning_content": 1}), "reasoning_content that is not text"),
    ({"prompt": "a", "chosen": "b"}, "rejected: missing"),
    (pair(margn=1.0), "margn: unknown key, did you mean margin?"),
    (pair(margin=-1.0), "margin: expected greater than or equal to 0, got -1.0"),
    (pair(margin="1"), "margin: expected a valid number, got '1'"),
    ({"chosen": "a", "rejected": "b"}, "expected one of messages and prompt, got none"),
    (pair(messages=[{"role": "user", "content": "a"}]), "expected one of messages and prompt, got both"),
    (
        {"messages": [{"role": "assistant", "content": "a"}], "chosen": "a", "rejected": "b"},
        "the conversation ends with role 'assistant'",
    ),
    ({"messages": [{"role": "user"}], "chosen": "a", "rejected": "b"}, "messages[0]: content is missing"),
    (pair("no"), "chosen and rejected are the same to the model"),
    (pair("a<|im_end|>b"), "chosen contains an end-of-turn token"),
    (pair(id="one"), "id 'one' is taken by line 1"),
]


@pytest.mark.parametrize(("line", "sentence"), REFUSED, ids=[sentence[:30] for _, sentence in REFUSED])
def test_a_bad_line_is_named(tmp_path, plain, line, sentence):
    path = tmp_path / "pairs.jsonl"
    raw = line if isinstance(line, bytes) else json.dumps(line).encode()
    path.write_bytes(json.dumps(pair(id="one")).encode() + b"\n\n" + raw + b"\n")
    with pytest.raises(ValueError) as raised:
        read_pairs([path], partial(policy_pair, tokenizer=plain), row_length=400)
    assert str(raised.value).startswith(f"{path}:3: ") and sentence in str(raised.value)


def test_replies_without_end_of_thoughts_or_without_an_answer_are_refused(tmp_path, thinking, plain):
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: chosen has no </think>"):
        read(tmp_path, thinking, pair())
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: chosen has no </think>"):
        read(tmp_path, thinking, pair(), kind=reward_pair, thoughts=True)
    for reply in ("<think>\nforever", "<think>\nfor a while</think>\n "):
        with pytest.raises(ValueError, match=r"pairs.jsonl:1: rejected has no answer"):
            read(tmp_path, plain, pair(rejected=reply), kind=reward_pair, thoughts=False)
    same = pair("<think>\none way\n</think>\n\n4", "<think>\nanother\n</think>\n\n4")
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: chosen and rejected are the same to the model"):
        read(tmp_path, thinking, same, kind=reward_pair, thoughts=False)
    assert read(tmp_path, thinking, same).examples
    with pytest.raises(ValueError, match="the answer contains an end-of-turn token"):
        answer_ids("4<|im_end|>5", plain)


def test_files_are_named_too(tmp_path, plain):
    encode = partial(policy_pair, tokenizer=plain)
    with pytest.raises(ValueError, match="absent.jsonl: no such file"):
        read_pairs([tmp_path / "absent.jsonl"], encode, row_length=400)
    with pytest.raises(ValueError, match="pairs.jsonl: no pair to train on"):
        read(tmp_path, plain)
