"""Between text and tokens: a line's prompt as token ids, stop strings, and a completion as text.  No JAX."""

import math
from collections.abc import Sequence
from typing import Any

from qwq_jax.chat import THINK_CLOSE, THINK_OPEN, ChatTokenizer, IncrementalDetokenizer, split_thinking
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.engine.request import Completion, Hooks, Request, TokenLogprob
from qwq_jax.jobs.batch_file import Choice, PromptLine

# More than enough tokens to hold "<think>" and the line breaks after it.
_TAIL = 16


def prompt_ids(line: PromptLine, tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """The prompt of a line as token ids; ValueError if the messages cannot be rendered."""
    if line.messages is not None:
        return tuple(tokenizer.apply_template(line.messages))
    if line.prompt is not None:
        return tuple(tokenizer.encode(line.prompt))
    assert line.prompt_token_ids is not None, "a line has one of three prompts"
    return line.prompt_token_ids


def with_special_stops(params: SamplingParams, tokenizer: ChatTokenizer) -> SamplingParams:
    """Turns stop strings that are special tokens, which no text shows, into stop tokens.

    Raises:
        ValueError: One holds more than a special token.
    """
    special = tokenizer.special_ids
    text = tuple(stop for stop in params.stop if stop not in special)
    mixed = next(((stop, mark) for stop in text for mark in special if mark in stop), None)
    if mixed is not None:
        raise ValueError(f"stop: {mixed[0]!r} holds the special token {mixed[1]!r}, which has to be a stop of its own")
    if len(text) == len(params.stop):
        return params
    ids = [special[stop] for stop in params.stop if stop in special]
    return params.model_copy(update={"stop": text, "stop_token_ids": (*params.stop_token_ids, *ids)})


class StopStrings:
    """Watches the text of one sequence as its tokens come; the engine's `StopChecker`."""

    def __init__(self, detokenizer: IncrementalDetokenizer, stop: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._overlap = max(map(len, stop)) - 1
        self._tail = ""

    def push(self, token_id: int) -> bool:
        """Takes the next token; True once a stop string is complete."""
        text = self._tail + self._detokenizer.push(token_id)
        self._tail = text[-self._overlap :] if self._overlap else ""
        return any(stop in text for stop in self._stop)


def hooks_of(tokenizer: ChatTokenizer, request: Request) -> Hooks:
    """What watches the text of one sample of a request."""
    stop = request.params.stop
    return Hooks(StopStrings(tokenizer.detokenizer(), stop) if stop else None)


def choice_of(completion: Completion, request: Request, tokenizer: ChatTokenizer) -> Choice:
    """A completion as text: cut before a stop string, thoughts apart from the answer.

    Raises:
        ValueError: A log-probability that was asked for is not a number, for which JSON has no word.
    """
    text = _before(tokenizer.decode(completion.token_ids), request.params.stop)
    opened = prompt_opens_thinking(request.prompt_token_ids, tokenizer)
    reasoning, content = split_thinking(text, opened)
    return Choice(
        completion.index,
        content,
        reasoning,
        completion.finish_reason.value,
        completion.token_ids,
        0 if reasoning is None else reasoning_tokens(completion.token_ids, tokenizer),
        None if completion.logprobs is None else tuple(_logprob(entry, tokenizer) for entry in completion.logprobs),
    )


def prompt_opens_thinking(prompt: Sequence[int], tokenizer: ChatTokenizer) -> bool:
    """Whether the prompt ends in an opening tag, so that the completion begins inside the thoughts."""
    return tokenizer.decode(prompt[-_TAIL:]).rstrip().endswith(THINK_OPEN)


def _before(text: str, stop: Sequence[str]) -> str:
    found = [at for at in (text.find(each) for each in stop) if at >= 0]
    return text[: min(found)] if found else text


def reasoning_tokens(tokens: Sequence[int], tokenizer: ChatTokenizer) -> int:
    """Tokens of a completion with thoughts up to the closing tag, itself included; all where it never came."""
    closing = StopStrings(tokenizer.detokenizer(), (THINK_CLOSE,))
    return next((count for count, token in enumerate(tokens, start=1) if closing.push(token)), len(tokens))


def _logprob(entry: TokenLogprob, tokenizer: ChatTokenizer) -> dict[str, Any]:
    top = [token_record(token, logprob, tokenizer) for token, logprob in entry.top]
    return {**token_record(entry.token_id, entry.logprob, tokenizer), "top_logprobs": top}


def token_record(token_id: int, logprob: float, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """A token in OpenAI's shape; a part of a character has no text of its own, and bytes null.

    Raises:
        ValueError: The log-probability is not a number, for which JSON has no word.
    """
    if not math.isfinite(logprob):
        raise ValueError(f"the model gave token {token_id} the log-probability {logprob}")
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}
