"""What a body may hold, and what it is told otherwise."""

import pytest

from qwq_jax.serve.bodies import read_chat, read_completion
from qwq_jax.serve.errors import ApiError

MESSAGES = [{"role": "user", "content": "?"}]


def test_the_servers_fields_do_not_reach_the_codec():
    body = {"messages": MESSAGES, "model": "m", "stream": True, "stream_options": {"include_usage": True}, "n": 2}
    call = read_chat(body, "m")
    assert call.bodies == ({"messages": MESSAGES, "n": 2},)
    assert call.stream and call.include_usage and not call.return_token_ids


@pytest.mark.parametrize(
    ("prompt", "bodies"),
    [
        ("a", [{"prompt": "a"}]),
        (["a", "b"], [{"prompt": "a"}, {"prompt": "b"}]),
        ([1, 2], [{"prompt_token_ids": [1, 2]}]),
        ([[1], [2, 3]], [{"prompt_token_ids": [1]}, {"prompt_token_ids": [2, 3]}]),
    ],
)
def test_prompts_of_every_kind(prompt, bodies):
    assert list(read_completion({"prompt": prompt}, "m").bodies) == bodies


def test_a_number_of_logprobs_is_understood():
    (body,) = read_completion({"prompt": "a", "logprobs": 0}, "m").bodies
    assert body == {"prompt": "a", "logprobs": True, "top_logprobs": 0}


@pytest.mark.parametrize(
    ("read", "body", "sentence"),
    [
        (read_chat, {}, "messages: missing"),
        (read_chat, {"messages": MESSAGES, "prompt": "x"}, "prompt: unknown field of this endpoint"),
        (read_chat, {"messages": MESSAGES, "stream": 1}, "stream: expected true or false, got 1"),
        (read_chat, {"messages": MESSAGES, "stream_options": {}}, "stream_options: needs stream true"),
        (read_chat, {"messages": MESSAGES, "stream": True, "stream_options": {"x": 1}}, "stream_options.x: unknown"),
        (read_chat, {"messages": MESSAGES, "stream": True, "stream_options": []}, "stream_options: expected an object"),
        (read_chat, {"messages": MESSAGES, "model": 3}, "model: expected a text, got 3"),
        (read_completion, {}, "prompt: missing"),
        (read_completion, {"prompt": []}, "prompt: expected a text, token ids"),
        (read_completion, {"prompt": ["a", 1]}, "prompt: expected a text or a list of token ids, got 1"),
        (read_completion, {"prompt": [[-1]]}, "prompt: expected a text or a list of token ids, got"),
        (read_completion, {"prompt": ["a"] * 129}, "prompt: expected at most 128 prompts in a call, got 129"),
        (read_completion, {"prompt": "a", "logprobs": True}, "logprobs: expected a number of tokens from 0 to 20"),
        (read_completion, {"prompt": "a", "top_logprobs": 2}, "top_logprobs: unknown field of this endpoint"),
    ],
)
def test_what_is_wrong_is_named(read, body, sentence):
    with pytest.raises(ValueError) as caught:
        read(body, "m")
    assert str(caught.value).startswith(sentence)


def test_another_model_is_not_found():
    with pytest.raises(ApiError) as caught:
        read_chat({"messages": MESSAGES, "model": "gpt"}, "m")
    assert caught.value.status == 404
