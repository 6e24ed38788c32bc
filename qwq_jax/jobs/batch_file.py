"""The batch format: JSON lines in OpenAI's shape, read and written.  No JAX, no tokenizer.

A request line is OpenAI's (`custom_id`, `method`, `url`, `body`) or short: the body itself, with `custom_id` beside its
fields if wanted.  A body has one of `messages`, `prompt` and `prompt_token_ids`, sampling fields, and
`return_token_ids`.  Whatever is wrong with a line becomes a `BadLine`, which is answered by an error; nothing is
ignored.

A result line depends on the request line and its answer alone: ids come from the line's number and `created` is 0, so
that two runs of a file can be compared byte by byte.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwq_jax.config.json_line import load_json_line, shortened
from qwq_jax.config.sampling import SamplingParams

URL = "/v1/chat/completions"
_PROMPTS = ("messages", "prompt", "prompt_token_ids")


@dataclass(frozen=True)
class PromptLine:
    """A line that can be served; exactly one of the three prompts is given.

    >>> parse_line(4, b'{"prompt": "1 + 1 =", "max_tokens": 4}').custom_id
    'line-4'
    """

    number: int
    custom_id: str
    params: SamplingParams
    return_token_ids: bool
    model: str | None
    messages: tuple[dict[str, Any], ...] | None = None
    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be served, and why: a sentence that begins with its number."""

    number: int
    custom_id: str
    message: str


@dataclass(frozen=True)
class Choice:
    """One sample's answer as text, with its tokens; the first sample has the prompt's log-probabilities, if wanted."""

    index: int
    content: str
    reasoning_content: str | None
    finish_reason: str
    token_ids: tuple[int, ...]
    reasoning_tokens: int
    logprobs: tuple[dict[str, Any], ...] | None = None
    prompt_logprobs: tuple[dict[str, Any] | None, ...] | None = None


def read_batch(path: Path, defaults: SamplingParams | None = None) -> Iterator[PromptLine | BadLine]:
    """Read a file line by line, in bounded memory but for the set of names; blank lines are no requests.

    Args:
        path: JSONL.
        defaults: Sampling of lines that do not say themselves; OpenAI's defaults otherwise.
    """
    names: dict[str, int] = {}
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            line = parse_line(number, raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw, defaults)
            first = names.setdefault(line.custom_id, number)
            if first != number and isinstance(line, PromptLine):
                message = f"line {number}: custom_id {line.custom_id!r} is taken by line {first}"
                line = BadLine(number, line.custom_id, message)
            yield line


def count_lines(path: Path) -> int:
    """The number of request lines, good or bad."""
    with path.open("rb") as file:
        return sum(1 for raw in file if raw.strip())


def parse_line(number: int, raw: bytes, defaults: SamplingParams | None = None) -> PromptLine | BadLine:
    """Understand one line, or say what is wrong with it."""
    custom_id = f"line-{number}"
    try:
        record = load_json_line(raw)
        name = record.pop("custom_id", None)
        if name is not None:
            if not isinstance(name, str) or not name:
                raise ValueError(f"custom_id: expected a text that is not empty, got {shortened(name)}")
            custom_id = name
        return _understand(number, custom_id, _body(record), defaults)
    except ValueError as error:
        return BadLine(number, custom_id, f"line {number}: {error}")


def parse_body(name: str, body: dict[str, Any], defaults: SamplingParams | None = None) -> PromptLine:
    """Understand a body that did not come from a file; ValueError names the field that is wrong."""
    return _understand(0, name, body, defaults)


def result_line(line: PromptLine, choices: list[Choice], prompt_tokens: int, model: str) -> bytes:
    """The answer to a line: OpenAI's batch output around a `chat.completion`."""
    completion_tokens = sum(len(choice.token_ids) for choice in choices)
    of_prompt = next((choice.prompt_logprobs for choice in choices if choice.prompt_logprobs is not None), None)
    body: dict[str, Any] = {
        "id": f"chatcmpl-{line.number}",
        "object": "chat.completion",
        "created": 0,
        "model": line.model or model,
        "choices": [_choice(choice, line.return_token_ids) for choice in sorted(choices, key=lambda c: c.index)],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "completion_tokens_details": {"reasoning_tokens": sum(choice.reasoning_tokens for choice in choices)},
        },
    }
    if of_prompt is not None:
        body["prompt_logprobs"] = list(of_prompt)
    response = {"status_code": 200, "request_id": f"req_{line.number}", "body": body}
    return _dump(line.number, line.custom_id, response, None)


def error_line(line: BadLine) -> bytes:
    """The answer to a line that cannot be served."""
    return _dump(line.number, line.custom_id, None, {"code": "invalid_request", "message": line.message})


def result_number(raw: bytes) -> int:
    """The number of the request line that a result line answers; ValueError if it is no such line."""
    record = json.loads(raw)
    prefix, _, number = str(record.get("id") if isinstance(record, dict) else None).rpartition("_")
    if prefix != "batch_req" or not number.isdecimal():
        raise ValueError("not a result line of this program")
    return int(number)


def _dump(number: int, custom_id: str, response: dict[str, Any] | None, error: dict[str, str] | None) -> bytes:
    record = {"id": f"batch_req_{number}", "custom_id": custom_id, "response": response, "error": error}
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _choice(choice: Choice, return_token_ids: bool) -> dict[str, Any]:
    message = {"role": "assistant", "content": choice.content}
    if choice.reasoning_content is not None:
        message["reasoning_content"] = choice.reasoning_content
    record: dict[str, Any] = {
        "index": choice.index,
        "message": message,
        "logprobs": None if choice.logprobs is None else {"content": list(choice.logprobs), "refusal": None},
        "finish_reason": choice.finish_reason,
    }
    if return_token_ids:
        record["token_ids"] = list(choice.token_ids)
    return record


def _body(record: dict[str, Any]) -> dict[str, Any]:
    """The body of an OpenAI line, or the short line itself."""
    if "body" not in record:
        strange = next((name for name in ("method", "url") if name in record), None)
        if strange is not None:
            raise ValueError(f"{strange}: given, but there is no body")
        return record
    body, method, url = record.pop("body"), record.pop("method", "POST"), record.pop("url", URL)
    if record:
        raise ValueError(f"{next(iter(record))}: unknown field beside body")
    if method != "POST":
        raise ValueError(f"method: expected 'POST', got {shortened(method)}")
    if url != URL:
        raise ValueError(f"url: expected {URL!r}, got {shortened(url)}")
    if not isinstance(body, dict):
        raise ValueError(f"body: expected a JSON object, got {shortened(body)}")
    return body


def _understand(number: int, custom_id: str, body: dict[str, Any], defaults: SamplingParams | None) -> PromptLine:
    given = [name for name in _PROMPTS if body.get(name) is not None]
    if len(given) != 1:
        found = " and ".join(given) if given else "none"
        raise ValueError(f"expected one of messages, prompt and prompt_token_ids, got {found}")
    return_token_ids = body.get("return_token_ids") or False
    if not isinstance(return_token_ids, bool):
        raise ValueError(f"return_token_ids: expected true or false, got {shortened(return_token_ids)}")
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise ValueError(f"model: expected a text, got {shortened(model)}")
    line = PromptLine(number, custom_id, SamplingParams.from_openai(body, defaults), return_token_ids, model)
    return {"messages": _with_messages, "prompt": _with_prompt, "prompt_token_ids": _with_ids}[given[0]](
        line, body[given[0]]
    )


def _with_messages(line: PromptLine, value: Any) -> PromptLine:
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"messages: expected a list of objects that is not empty, got {shortened(value)}")
    return _replace(line, messages=tuple(value))


def _with_prompt(line: PromptLine, value: Any) -> PromptLine:
    if not isinstance(value, str):
        raise ValueError(f"prompt: expected a text, got {shortened(value)}")
    return _replace(line, prompt=value)


def _with_ids(line: PromptLine, value: Any) -> PromptLine:
    if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
        raise ValueError(f"prompt_token_ids: expected a list of token ids, got {shortened(value)}")
    return _replace(line, prompt_token_ids=tuple(value))


def _replace(line: PromptLine, **prompt: Any) -> PromptLine:
    return PromptLine(line.number, line.custom_id, line.params, line.return_token_ids, line.model, **prompt)
