import json

import numpy as np
import pytest

from qwq_jax.chat import ChatTokenizer
from qwq_jax.sft.data import read_examples
from qwq_jax.train.stream import BatchStream, plan_steps, slots_of
from tests.sft.chat_directory import END, PLAIN, THINKING, write_tokenizer


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    return ChatTokenizer.from_directory(write_tokenizer(tmp_path_factory.mktemp("thinking"), THINKING))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return ChatTokenizer.from_directory(write_tokenizer(tmp_path_factory.mktemp("plain"), PLAIN))


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def read(tmp_path, tokenizer, *conversations, row_length=400, **options):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return read_examples([path], tokenizer, row_length=row_length, **options)


def text(tokenizer, segment, *, trained):
    ids = segment.tokens[segment.trained] if trained else segment.tokens
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def test_only_the_completion_is_trained_and_it_ends_with_one_end_of_turn(tmp_path, plain):
    before = [{"role": "system", "content": "S"}, user("2+2?")]
    (segment,) = read(tmp_path, plain, [*before, assistant("It is 4.")]).segments
    assert text(plain, segment, trained=True) == "It is 4.<|im_end|>"
    assert int((segment.tokens[segment.trained] == END).sum()) == 1 and segment.tokens[-1] == END
    prompt = segment.tokens[~segment.trained].tolist()
    assert prompt == plain.apply_template(before)


@pytest.mark.parametrize(
    "turn",
    [
        assistant("<think>\nadd\n</think>\n\n4"),
        assistant("4", reasoning_content="add"),
        assistant("add\n</think>\n\n4"),
    ],
)
def test_thoughts_continue_the_tag_that_the_prompt_opened(tmp_path, thinking, turn):
    (segment,) = read(tmp_path, thinking, [user("2+2?"), turn]).segments
    assert text(thinking, segment, trained=True) == "add\n</think>\n\n4<|im_end|>"
    assert text(thinking, segment, trained=False).count("<think>") == 1


def test_turns_share_a_sequence_where_the_template_keeps_them(tmp_path, plain):
    (segment,) = read(tmp_path, plain, [user("a"), assistant("b"), user("c"), assistant("d")]).segments
    assert text(plain, segment, trained=True) == "b<|im_end|>d<|im_end|>"
    whole = [user("a"), assistant("b"), user("c"), assistant("d")]
    assert segment.tokens.tolist() == plain.apply_template(whole, add_generation_prompt=False)[:-1]  # but the last "\n"


def test_turns_whose_thoughts_the_template_drops_become_sequences_of_their_own(tmp_path, thinking):
    turns = [user("a"), assistant("x</think>b"), user("c"), assistant("y</think>d")]
    first, second = read(tmp_path, thinking, turns).segments
    assert text(thinking, first, trained=True) == "x</think>b<|im_end|>"
    assert text(thinking, second, trained=True) == "y</think>d<|im_end|>"
    assert "x</think>" not in text(thinking, second, trained=False) and "b<|im_end|>" in text(
        thinking, second, trained=False
    )


GOOD = json.dumps({"messages": [user("a"), assistant("b")]})


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "data.jsonl:2: expected a JSON object, but at column 2"),
        ("[1]", r"data.jsonl:2: expected a JSON object, got \[1\]"),
        ('{"messages": [], "messages": []}', "data.jsonl:2: messages: given twice"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "data.jsonl:2: a text holds half of a surrogate"),
        (
            json.dumps({"messages": [user("a"), assistant("b")], "tools": [1]}),
            "data.jsonl:2: 'tools' changes the prompt",
        ),
        (json.dumps({"messages": [assistant("b")]}), r"data.jsonl:2: messages\[0\] has role 'assistant'"),
        ('{"messages": []}', 'data.jsonl:2: expected an object with a non-empty list "messages"'),
        ('{"messages": ["hi"]}', r"data.jsonl:2: messages\[0\] is not an object"),
        (
            json.dumps({"messages": [user("a"), {"role": "bot", "content": "b"}]}),
            r"messages\[1\] has unknown role 'bot'",
        ),
        (json.dumps({"messages": [{"role": ["user"], "content": "a"}]}), r"messages\[0\] has unknown role \['user'\]"),
        (json.dumps({"messages": [user("a"), assistant(None)]}), r"data.jsonl:2: messages\[1\] has no text in content"),
        (json.dumps({"messages": [user("a"), assistant("b", tool_calls=[])]}), "has field 'tool_calls'"),
        (json.dumps({"messages": [user("a")]}), "ends with role 'user'; there is no assistant turn to learn"),
        (json.dumps({"messages": [user("a"), assistant("b<|im_end|>c")]}), "contains an end-of-turn token"),
        (json.dumps({"messages": [user("a" * 500), assistant("b")]}), "data.jsonl:2: 5.. tokens do not fit a row"),
    ],
)
def test_a_bad_line_is_named(tmp_path, plain, line, sentence):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(ValueError, match=sentence):
        read_examples([path], plain, row_length=400)


def test_bytes_that_are_not_utf8_are_named(tmp_path, plain):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\xff\n")
    with pytest.raises(ValueError, match="data.jsonl:2: not UTF-8 at byte 1"):
        read_examples([path], plain, row_length=400)


def test_an_answer_inside_the_thoughts_is_refused(tmp_path, thinking):
    with pytest.raises(ValueError, match=r"data.jsonl:1: messages\[1\] has no </think>, and the chat template opens"):
        read(tmp_path, thinking, [user("a"), assistant("b")])


def test_what_the_template_refuses_is_named(tmp_path):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + PLAIN
    tokenizer = ChatTokenizer.from_directory(write_tokenizer(tmp_path / "tokenizer", refuses))
    good, system = [user("a"), assistant("b")], {"role": "system", "content": "S"}
    with pytest.raises(ValueError, match=r"data.jsonl:2: the chat template .* refused the messages: no system turn"):
        read(tmp_path, tokenizer, good, [system, *good])


def test_files_without_examples_are_refused(tmp_path, plain):
    with pytest.raises(ValueError, match="no such file"):
        read_examples([tmp_path / "absent.jsonl"], plain, row_length=400)
    with pytest.raises(ValueError, match="no example to train on"):
        read(tmp_path, plain)


def test_too_long_examples_are_counted_if_they_may_be_skipped(tmp_path, plain):
    examples = read(tmp_path, plain, [user("a"), assistant("b")], [user("a" * 500), assistant("b")], skip_too_long=True)
    assert len(examples.segments) == 1 and examples.too_long == 1
    assert examples.trained_tokens == 2


def test_the_fingerprint_sees_every_token_and_mask(tmp_path, plain):
    prints = [
        read(tmp_path, plain, [user(u), assistant(a)]).fingerprint() for u, a in [("ab", "c"), ("ab", "d"), ("a", "bc")]
    ]
    assert len(set(prints)) == 3
    assert read(tmp_path, plain, [user("ab"), assistant("c")]).fingerprint() == prints[0]


SLOTS = [int(n) for n in np.random.default_rng(5).integers(4, 30, 50)]


def plan(steps, seed=0):
    return plan_steps(SLOTS, row_length=32, rows_per_step=4, seed=seed, steps=steps)


def test_every_pass_sees_every_sequence_once_in_an_order_of_its_own():
    order = [i for step in plan(40) for row in step for i in row]
    first, second = order[:50], order[50:100]
    assert sorted(first) == sorted(second) == list(range(50)) and first != second
    assert all(len(step) == 4 for step in plan(40)) and len(plan(40)) == 40
    assert plan(40, seed=1) != plan(40)
    assert plan(40)[:7] == plan(7)


def test_a_stream_goes_on_from_its_state(tmp_path, plain):
    conversations = [[user("q" * n), assistant("a" * n)] for n in range(1, 20)]
    examples = read(tmp_path, plain, *conversations, row_length=200).examples
    steps = plan_steps([slots_of(example) for example in examples], row_length=200, rows_per_step=2, seed=0, steps=9)
    whole = list(BatchStream(examples, steps, row_length=200))
    assert len(whole) == 9
    stream = BatchStream(examples, steps, row_length=200)
    for _ in range(4):
        next(stream)
    state = json.loads(json.dumps(stream.state()))
    resumed = BatchStream(examples, steps, row_length=200)
    resumed.set_state(state)
    rest = list(resumed)
    assert len(rest) == 5
    for left, right in zip(rest, whole[4:], strict=True):
        np.testing.assert_array_equal(left.tokens, right.tokens)
