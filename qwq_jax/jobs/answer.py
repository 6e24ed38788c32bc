"""Between text and tokens: a line's prompt as token ids, stop strings, and a completion as text.  No JAX."""

import math
from collections.abc import Sequence
from typing import Any

from qwq_jax.chat import THINK_CLOSE, THINK_OPEN, ChatTokenizer, IncrementalDetokenizer, Message, split_thinking
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.engine.request import Completion, Hooks, Request, ThinkingTokens, TokenLogprob
from qwq_jax.grammar import Place, compile_grammar
from qwq_jax.jobs.batch_file import Choice, PromptLine

# More than enough tokens to hold "<think>" and the line breaks after it.
_TAIL = 16

# What is put in when thoughts have to end, and what makes them go on. The model reads both as its own words.
_CLOSING = f"\n\nTime is up: I give my answer from what I have.\n{THINK_CLOSE}\n\n"
_CONTINUATION = "\nWait"
# Thoughts that end before they begin.
_NO_THOUGHTS = f"\n{THINK_CLOSE}\n\n"


def request_of(line: PromptLine, tokenizer: ChatTokenizer) -> Request:
    """A line as the engine takes it.

    Raises:
        ValueError: Its messages cannot be rendered, or it asks for what this tokenizer does not have.
    """
    return request_from_ids(line.custom_id, line.params, prompt_ids(line, tokenizer), tokenizer)


def request_from_ids(
    request_id: str, params: SamplingParams, prompt: Sequence[int], tokenizer: ChatTokenizer
) -> Request:
    """A prompt as the engine takes it; `chat_prompt` and `text_prompt` make the prompt.

    Raises:
        ValueError: The parameters ask for what this tokenizer does not have.
    """
    params = with_special_stops(params, tokenizer)
    if params.constraint is not None:
        compile_grammar(tokenizer, params.constraint)  # what is wrong with it is said now, not when its turn comes
    thinking = _thinking_tokens(params, prompt, tokenizer) if params.bounds_thinking else None
    return Request(request_id, tuple(prompt), params, thinking)


def prompt_ids(line: PromptLine, tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """The prompt of a line as token ids; ValueError if the messages cannot be rendered."""
    if line.messages is not None:
        return chat_prompt(line.messages, line.params.enable_thinking, tokenizer)
    if line.prompt is not None:
        return text_prompt(tokenizer.encode(line.prompt), line.params.enable_thinking, tokenizer)
    assert line.prompt_token_ids is not None, "a line has one of three prompts"
    return text_prompt(line.prompt_token_ids, line.params.enable_thinking, tokenizer)


def chat_prompt(messages: Sequence[Message], enable_thinking: bool | None, tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """The prompt of a conversation as token ids.

    Raises:
        ValueError: The messages cannot be rendered, or whether the model thinks cannot be chosen.
    """
    prompt = tuple(tokenizer.apply_template(messages, enable_thinking=enable_thinking))
    return prompt if tokenizer.switches_thinking else text_prompt(prompt, enable_thinking, tokenizer)


def text_prompt(prompt: Sequence[int], enable_thinking: bool | None, tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """A prompt that no template can be asked about: thoughts that it opens are closed at once if they are not wanted.

    Raises:
        ValueError: It opens none, so that whether the model thinks cannot be chosen.
    """
    if enable_thinking is None:
        return tuple(prompt)
    if not prompt_opens_thinking(prompt, tokenizer):
        raise ValueError(
            f"enable_thinking: {str(enable_thinking).lower()} cannot be had: the chat template has no such switch, "
            f"or is not used, and the prompt does not end in {THINK_OPEN}"
        )
    if enable_thinking:
        return tuple(prompt)
    ended = tokenizer.decode(prompt[-_TAIL:]).endswith("\n")
    return (*prompt, *tokenizer.encode(_NO_THOUGHTS if ended else "\n" + _NO_THOUGHTS))


def _thinking_tokens(params: SamplingParams, prompt: Sequence[int], tokenizer: ChatTokenizer) -> ThinkingTokens:
    field = "min_thinking_tokens" if params.max_thinking_tokens is None else "max_thinking_tokens"
    close = tokenizer.encode(THINK_CLOSE)
    if len(close) != 1:
        raise ValueError(f"{field}: the tokenizer has no token {THINK_CLOSE}, so that thoughts cannot be bounded")
    if _place(params, prompt, tokenizer) is Place.ANSWER:
        raise ValueError(f"{field}: the prompt does not end in {THINK_OPEN}, so that there are no thoughts to bound")
    clash = next((stop for stop in params.stop if stop in _CLOSING or stop in _CONTINUATION), None)
    if clash is not None or close[0] in params.stop_token_ids:
        raise ValueError(
            f"{field}: what is put in to bound the thoughts holds the stop {clash or THINK_CLOSE!r}: leave one out"
        )
    opened = tokenizer.encode(THINK_OPEN)[0] if _place(params, prompt, tokenizer) is Place.START else None
    return ThinkingTokens(close[0], tuple(tokenizer.encode(_CLOSING)), tuple(tokenizer.encode(_CONTINUATION)), opened)


def _place(params: SamplingParams, prompt: Sequence[int], tokenizer: ChatTokenizer) -> Place:
    """Where the completion of a prompt begins.

    A prompt may leave it to the model to open its thoughts; models whose template can switch them off do so.
    """
    if prompt_opens_thinking(prompt, tokenizer):
        return Place.THOUGHTS
    closed = tokenizer.decode(prompt[-_TAIL:]).rstrip().endswith(THINK_CLOSE)
    may_think = tokenizer.switches_thinking and params.enable_thinking is not False and not closed
    return Place.START if may_think else Place.ANSWER


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
    """Watches the text of one sequence as its tokens come; the engine's `StopChecker`.

    The text of the first `passed` tokens, which cannot end it, is passed over.
    """

    def __init__(self, detokenizer: IncrementalDetokenizer, stop: Sequence[str], passed: int = 0) -> None:
        self._detokenizer = detokenizer
        self._passed = passed
        self._stop = tuple(stop)
        self._overlap = max(map(len, stop)) - 1
        self._tail = ""

    def push(self, token_id: int) -> bool:
        """Takes the next token; True once a stop string is complete."""
        text = self._tail + self._detokenizer.push(token_id)
        if self._passed:
            self._passed -= 1
            return False
        self._tail = text[-self._overlap :] if self._overlap else ""
        return any(stop in text for stop in self._stop)


def hooks_of(tokenizer: ChatTokenizer, request: Request) -> Hooks:
    """What watches one sample of a request: its text for stop strings, its answer for the form it has to have."""
    params = request.params
    stop = StopStrings(tokenizer.detokenizer(), params.stop, too_early(params)) if params.stop else None
    if params.constraint is None:
        return Hooks(stop)
    grammar = compile_grammar(tokenizer, params.constraint)
    place = _place(params, request.prompt_token_ids, tokenizer)
    return Hooks(stop, grammar.mask(place, params.stop_token_ids))


def choice_of(completion: Completion, request: Request, tokenizer: ChatTokenizer) -> Choice:
    """A completion as text: cut before a stop string, thoughts apart from the answer.

    Raises:
        ValueError: A log-probability that was asked for is not a number, for which JSON has no word.
    """
    passed, detokenizer = completion.token_ids[: too_early(request.params)], tokenizer.detokenizer()
    free = "".join(detokenizer.push(token) for token in passed) if request.params.stop else ""
    text = _before(tokenizer.decode(completion.token_ids), request.params.stop, len(free))
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
        None
        if completion.prompt_logprobs is None
        else tuple(entry and _logprob(entry, tokenizer) for entry in completion.prompt_logprobs),
    )


def prompt_opens_thinking(prompt: Sequence[int], tokenizer: ChatTokenizer) -> bool:
    """Whether the prompt ends in an opening tag, so that the completion begins inside the thoughts."""
    return tokenizer.decode(prompt[-_TAIL:]).rstrip().endswith(THINK_OPEN)


def too_early(params: SamplingParams) -> int:
    """How many tokens come before the first that may end a completion."""
    return max(params.min_tokens - 1, 0)


def _before(text: str, stop: Sequence[str], start: int) -> str:
    found = [at for at in (text.find(each, start) for each in stop) if at >= 0]
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
