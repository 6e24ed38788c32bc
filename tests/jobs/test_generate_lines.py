"""The batch format: every kind of line is understood or refused in a sentence, and nothing is ignored."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwq_jax.config.sampling import SamplingParams
from qwq_jax.jobs.batch_file import (
    BadLine,
    Choice,
    PromptLine,
    count_lines,
    error_line,
    parse_line,
    read_batch,
    result_line,
    result_number,
)

ASK = {"messages": [{"role": "user", "content": "1 + 1?"}]}
BATCH = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": ASK}


def parse(record: Any) -> PromptLine | BadLine:
    return parse_line(3, record if isinstance(record, bytes) else json.dumps(record).encode())


def test_openai_line_is_understood() -> None:
    body = ASK | {"model": "qwq", "temperature": 0.5, "max_tokens": 7, "stop": "x", "return_token_ids": True}
    line = parse(BATCH | {"body": body})
    assert line == PromptLine(
        3, "a", SamplingParams(temperature=0.5, max_tokens=7, stop=("x",)), True, "qwq", messages=tuple(ASK["messages"])
    )


@pytest.mark.parametrize(
    ("short", "prompt"),
    [
        (ASK, {"messages": tuple(ASK["messages"])}),
        ({"prompt": "1 + 1 ="}, {"prompt": "1 + 1 ="}),
        ({"prompt": ""}, {"prompt": ""}),
        ({"prompt_token_ids": [1, 2]}, {"prompt_token_ids": (1, 2)}),
        ({"custom_id": None, "prompt": "x"}, {"prompt": "x"}),
    ],
)
def test_short_lines_are_understood(short: dict[str, Any], prompt: dict[str, Any]) -> None:
    line = parse(short | {"temperature": 0})
    assert line == PromptLine(3, "line-3", SamplingParams(temperature=0.0), False, None, **prompt)


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (b'{"prompt": "x"', "expected a JSON object, but at column 15"),
        (b"\xff{}", "not UTF-8 at byte 1"),
        (b"[1]", "expected a JSON object, got [1]"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "x", "temperature": NaN}', "NaN is not JSON"),
        (b'{"prompt": "x", "prompt": "y"}', "prompt: given twice"),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        ({}, "expected one of messages, prompt and prompt_token_ids, got none"),
        (ASK | {"prompt": "x"}, "expected one of messages, prompt and prompt_token_ids, got messages and prompt"),
        (ASK | {"custom_id": 3}, "custom_id: expected a text that is not empty, got 3"),
        (ASK | {"custom_id": ""}, "custom_id: expected a text that is not empty"),
        (BATCH | {"body": 3}, "body: expected a JSON object, got 3"),
        (BATCH | {"method": "GET"}, "method: expected 'POST', got \"GET\""),
        (BATCH | {"url": "/v1/embeddings"}, "url: expected '/v1/chat/completions', got \"/v1/embeddings\""),
        (BATCH | {"temperature": 1}, "temperature: unknown field beside body"),
        (ASK | {"method": "POST"}, "method: given, but there is no body"),
        ({"messages": []}, "messages: expected a list of objects that is not empty, got []"),
        ({"messages": "hi"}, 'messages: expected a list of objects that is not empty, got "hi"'),
        ({"messages": ["hi"]}, "messages: expected a list of objects"),
        ({"prompt": 3}, "prompt: expected a text, got 3"),
        ({"prompt_token_ids": [1, True]}, "prompt_token_ids: expected a list of token ids, got [1, true]"),
        ({"prompt_token_ids": [-1]}, "prompt_token_ids: expected a list of token ids"),
        ({"prompt_token_ids": "1"}, "prompt_token_ids: expected a list of token ids"),
        (ASK | {"return_token_ids": 1}, "return_token_ids: expected true or false, got 1"),
        (ASK | {"model": 1}, "model: expected a text, got 1"),
        (ASK | {"temperature": -1}, "temperature"),
        (ASK | {"temperature": "hot"}, "temperature"),
        (ASK | {"max_tokens": 0}, "max_tokens"),
        (ASK | {"n": 0}, "n"),
        (ASK | {"length_penalty": 0.5}, "length_penalty: 0.5 is not implemented"),
        (ASK | {"logit_bias": {"1": 200}}, "logit_bias: expected a bias from -100 to 100"),
        (ASK | {"stream": True}, "stream: True is not implemented"),
        (ASK | {"tempreature": 1}, "tempreature: unknown field"),
        (ASK | {"top_logprobs": 3}, "top_logprobs 3 needs logprobs"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_lines_say_where_and_what(record: Any, sentence: str) -> None:
    line = parse(record)
    assert isinstance(line, BadLine)
    assert line.message.startswith("line 3: ") and sentence in line.message
    assert "\n" not in line.message and len(line.message) < 250
    answer = json.loads(error_line(line))
    assert answer["response"] is None and answer["error"] == {"code": "invalid_request", "message": line.message}
    assert answer["id"] == "batch_req_3" and answer["custom_id"] == line.custom_id


def test_defaults_hold_where_a_line_says_nothing() -> None:
    defaults = SamplingParams(temperature=0.6, top_k=40, stop=("###",))
    raw = b'{"prompt": "x", "top_k": 5, "stop": null}'
    line = parse_line(1, raw, defaults)
    assert isinstance(line, PromptLine)
    assert line.params == SamplingParams(temperature=0.6, top_k=5, stop=("###",))


def test_a_bad_line_keeps_its_name() -> None:
    assert parse(BATCH | {"url": "x"}).custom_id == "a"


def test_file_names_lines_refuses_names_given_twice_and_skips_blanks(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    named = json.dumps(ASK | {"custom_id": "a"})
    rest = [named, "", json.dumps(ASK), "   ", named, "oops", json.dumps(ASK | {"custom_id": "line-3"})]
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(rest).encode())
    lines = list(read_batch(path))
    assert count_lines(path) == len(lines) == 5
    assert [(line.number, line.custom_id) for line in lines] == [
        (1, "a"), (3, "line-3"), (5, "a"), (6, "line-6"), (7, "line-3"),
    ]  # fmt: skip
    bad = {line.number: line.message for line in lines if isinstance(line, BadLine)}
    assert bad.keys() == {5, 6, 7}
    assert bad[5] == "line 5: custom_id 'a' is taken by line 1"
    assert bad[7] == "line 7: custom_id 'line-3' is taken by line 3"


def test_result_line_has_openais_shape_and_depends_on_nothing_else() -> None:
    line = parse(BATCH | {"body": ASK | {"n": 2, "return_token_ids": True}})
    assert isinstance(line, PromptLine)
    entry = {"token": "é", "logprob": -0.5, "bytes": [195, 169], "top_logprobs": []}
    choices = [
        Choice(1, "é", "why", "stop", (5, 6, 7), 2, (entry,)),
        Choice(0, "", None, "length", (5,), 0),
    ]
    raw = result_line(line, choices, 4, "ckpt")
    assert raw == result_line(line, choices[::-1], 4, "ckpt") and raw.endswith(b"\n") and "é".encode() in raw
    assert result_number(raw) == 3
    record = json.loads(raw)
    body = record["response"].pop("body")
    assert record == {
        "id": "batch_req_3", "custom_id": "a", "response": {"status_code": 200, "request_id": "req_3"}, "error": None,
    }  # fmt: skip
    assert body["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 4,
        "total_tokens": 8,
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    assert body["object"] == "chat.completion" and body["model"] == "ckpt" and body["created"] == 0
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": "length",
            "token_ids": [5],
        },
        {
            "index": 1,
            "message": {"role": "assistant", "content": "é", "reasoning_content": "why"},
            "logprobs": {"content": [entry], "refusal": None},
            "finish_reason": "stop",
            "token_ids": [5, 6, 7],
        },
    ]


@pytest.mark.parametrize("raw", [b"{}", b"[]", b'{"id": "batch_req_x"}', b'{"id": "batch_5"}', b"nonsense"])
def test_foreign_lines_are_no_results(raw: bytes) -> None:
    with pytest.raises(ValueError):
        result_number(raw)
