"""Request bodies of the two endpoints: the server's own fields are read here, the rest is left to the codec."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwq_jax.config.json_line import shortened
from qwq_jax.serve.errors import unknown_model

# One call may bring several prompts; each is a request to the engine.
MAX_PROMPTS = 128
_OWN = ("model", "stream", "stream_options")


@dataclass(frozen=True)
class Call:
    """A body understood.

    Attributes:
        bodies: One for each prompt, as `TextCodec.request` takes it.
        stream: Whether tokens are sent as they come.
        include_usage: Whether the stream ends with a chunk of counts.
        return_token_ids: Whether choices hold their tokens.
    """

    bodies: tuple[dict[str, Any], ...]
    stream: bool
    include_usage: bool
    return_token_ids: bool


BodyReader = Callable[[dict[str, Any], str], Call]


def read_chat(body: dict[str, Any], served: str) -> Call:
    """A body of ``/v1/chat/completions``; `served` is the one model there is.

    Raises:
        ValueError: A field is missing, unknown here or wrong.
        ApiError: The model is another one.
    """
    _refuse(body, "prompt", "prompt_token_ids")
    if body.get("messages") is None:
        raise ValueError("messages: missing")
    return _call(body, served, [{"messages": body["messages"]}], without=("messages",))


def read_completion(body: dict[str, Any], served: str) -> Call:
    """A body of ``/v1/completions``: a prompt is a text, a list of token ids, or a list of either.

    Raises:
        ValueError: A field is missing, unknown here or wrong.
        ApiError: The model is another one.
    """
    _refuse(body, "messages", "prompt_token_ids", "top_logprobs")
    logprobs = body.get("logprobs")
    changed: dict[str, Any] = {}
    if logprobs is not None:
        if type(logprobs) is not int or not 0 <= logprobs <= 20:
            raise ValueError(f"logprobs: expected a number of tokens from 0 to 20, got {shortened(logprobs)}")
        changed = {"logprobs": True, "top_logprobs": logprobs}
    return _call({**body, **changed}, served, _prompts(body.get("prompt")), without=("prompt",))


def _prompts(value: Any) -> list[dict[str, Any]]:
    if value is None:
        raise ValueError("prompt: missing")
    if isinstance(value, str):
        return [{"prompt": value}]
    if not isinstance(value, list) or not value:
        raise ValueError(f"prompt: expected a text, token ids, or a list of these, got {shortened(value)}")
    if all(type(item) is int for item in value):
        return [{"prompt_token_ids": _ids(value)}]
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"prompt: expected at most {MAX_PROMPTS} prompts in a call, got {len(value)}")
    return [{"prompt": item} if isinstance(item, str) else {"prompt_token_ids": _ids(item)} for item in value]


def _ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not value or not all(type(item) is int and item >= 0 for item in value):
        raise ValueError(f"prompt: expected a text or a list of token ids, got {shortened(value)}")
    return value


def _call(body: dict[str, Any], served: str, prompts: list[dict[str, Any]], *, without: tuple[str, ...]) -> Call:
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise ValueError(f"model: expected a text, got {shortened(model)}")
    if model not in (None, served):
        raise unknown_model(model, served)
    stream = _flag(body.get("stream"), "stream")
    options = body.get("stream_options")
    if options is not None and not stream:
        raise ValueError("stream_options: needs stream true")
    if stream and body.get("prompt_logprobs") is not None:
        raise ValueError("prompt_logprobs: cannot be had with stream true")
    rest = {name: value for name, value in body.items() if name not in (*_OWN, *without)}
    return Call(
        tuple({**rest, **prompt} for prompt in prompts),
        stream,
        _includes_usage(options),
        _flag(body.get("return_token_ids"), "return_token_ids"),
    )


def _includes_usage(options: Any) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict):
        raise ValueError(f"stream_options: expected an object, got {shortened(options)}")
    for name, value in options.items():
        if name not in ("include_usage", "include_obfuscation"):
            raise ValueError(f"stream_options.{name}: unknown field")
        if _flag(value, f"stream_options.{name}") and name == "include_obfuscation":
            raise ValueError("stream_options.include_obfuscation: true is not implemented")
    return bool(options.get("include_usage"))


def _flag(value: Any, name: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name}: expected true or false, got {shortened(value)}")
    return bool(value)


def _refuse(body: dict[str, Any], *names: str) -> None:
    for name in names:
        if body.get(name) is not None:
            raise ValueError(f"{name}: unknown field of this endpoint")
