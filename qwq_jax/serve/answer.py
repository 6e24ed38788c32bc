"""The tokens of one call as OpenAI's objects, whole or in chunks."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from qwq_jax.engine.request import Completion, NewToken, Request, TokenLogprob
from qwq_jax.serve.bodies import Call
from qwq_jax.serve.codec import TextCodec
from qwq_jax.serve.errors import ApiError
from qwq_jax.serve.text import PlacedToken, Ready, SampleText


class Form(Protocol):
    """The shape of the answers of one endpoint."""

    prefix: str
    """What ids begin with."""
    whole: str
    """`object` of an answer in one piece."""
    chunk: str
    """`object` of a chunk of a stream."""
    split: bool
    """Whether thoughts are told from the answer."""
    one_prompt: bool
    """Whether a call has one prompt, so that what is said of it belongs to the answer rather than to a choice."""

    def opening(self) -> dict[str, Any] | None:
        """What a choice's stream begins with."""
        ...

    def piece(self, is_thinking: bool, text: str) -> dict[str, Any]:
        """Text as a part of a streamed choice."""
        ...

    def message(self, thoughts: str | None, text: str) -> dict[str, Any]:
        """All text as a part of a choice."""
        ...

    def logprobs(self, tokens: Sequence[PlacedToken], codec: TextCodec) -> dict[str, Any]:
        """Tokens with their log-probabilities."""
        ...


def _record(token: TokenLogprob, codec: TextCodec) -> dict[str, Any]:
    top = [codec.token_record(*each) for each in token.top]
    return {**codec.token_record(token.token_id, token.logprob), "top_logprobs": top}


class ChatForm:
    """``/v1/chat/completions``."""

    prefix = "chatcmpl"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"
    split = True
    one_prompt = True

    def opening(self) -> dict[str, Any] | None:
        """The role."""
        return {"delta": {"role": "assistant", "content": ""}}

    def piece(self, is_thinking: bool, text: str) -> dict[str, Any]:
        """Thoughts or answer; without text an empty delta."""
        return {"delta": {"reasoning_content" if is_thinking else "content": text} if text else {}}

    def message(self, thoughts: str | None, text: str) -> dict[str, Any]:
        """The assistant's message."""
        message = {"role": "assistant", "content": text}
        return {"message": message if thoughts is None else {**message, "reasoning_content": thoughts}}

    def logprobs(self, tokens: Sequence[PlacedToken], codec: TextCodec) -> dict[str, Any]:
        """One record a token, each with the likeliest ones in its place."""
        return {"content": [_record(placed.token, codec) for placed in tokens], "refusal": None}


class CompletionForm:
    """``/v1/completions``, which knows no thoughts."""

    prefix = "cmpl"
    whole = "text_completion"
    chunk = "text_completion"
    split = False
    one_prompt = False

    def opening(self) -> dict[str, Any] | None:
        """Nothing."""
        return None

    def piece(self, is_thinking: bool, text: str) -> dict[str, Any]:
        """The text."""
        return {"text": text}

    def message(self, thoughts: str | None, text: str) -> dict[str, Any]:
        """The text."""
        return {"text": text}

    def logprobs(self, tokens: Sequence[PlacedToken], codec: TextCodec) -> dict[str, Any]:
        """Four lists of one entry a token; offsets count the characters of the completion, and begin with 0.

        The likeliest tokens are a table by text, in which the drawn token is always found; of several with the same
        text, such as parts of characters, the likeliest stays.
        """
        texts, tops = [], []
        for placed in tokens:
            drawn = codec.token_record(placed.token.token_id, placed.token.logprob)["token"]
            top: dict[str, float] = {}
            for token, logprob in placed.token.top:
                top.setdefault(codec.token_record(token, logprob)["token"], logprob)
            texts.append(drawn)
            tops.append({**top, drawn: max(placed.token.logprob, top.get(drawn, placed.token.logprob))})
        return {
            "tokens": texts,
            "token_logprobs": [placed.token.logprob for placed in tokens],
            "top_logprobs": tops,
            "text_offset": [placed.offset for placed in tokens],
        }


@contextmanager
def _as_server_error() -> Iterator[None]:
    """What cannot be reported, such as a log-probability that is not a number, is no fault of the client."""
    try:
        yield
    except ValueError as error:
        raise ApiError(500, str(error), type="server_error") from None


@dataclass(eq=False)
class _Sample:
    """One choice on its way."""

    index: int
    request: Request
    text: SampleText
    opened: bool = False


class Answer:
    """What has come of one call.

    Args:
        name: Id of the answer.
        model: Name of the model.
        call: What was asked.
        requests: What the engine was asked; the choices of request `i` are numbered from `i * n` on.
        form: The endpoint's shapes.
        codec: Knows the tokenizer.
    """

    def __init__(
        self, name: str, model: str, call: Call, requests: Sequence[Request], *, form: Form, codec: TextCodec
    ) -> None:
        self._call = call
        self._form = form
        self._codec = codec
        self._head = {"id": name, "created": int(time.time()), "model": model}
        self._prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
        self._samples = {
            (request.request_id, index): _Sample(
                place * request.params.n + index, request, SampleText(codec, request, split=form.split)
            )
            for place, request in enumerate(requests)
            for index in range(request.params.n)
        }
        self._reasons: dict[int, str] = {}
        self._of_prompts: dict[str, Sequence[TokenLogprob | None]] = {}
        """Log-probabilities of each request's prompt, if wanted."""

    def take(self, events: Sequence[NewToken | Completion]) -> list[_Sample]:
        """Takes what the engine brought; returns the samples that it belongs to, in the order of their choices."""
        touched: dict[int, _Sample] = {}
        for event in events:
            sample = self._samples[event.request_id, event.index]
            touched[sample.index] = sample
            if isinstance(event, NewToken):
                sample.text.push(event.token)
            else:
                sample.text.finish()
                if event.prompt_logprobs is not None:
                    self._of_prompts[event.request_id] = event.prompt_logprobs
                self._reasons[sample.index] = event.finish_reason.value
        return [touched[index] for index in sorted(touched)]

    def chunks(self, events: Sequence[NewToken | Completion]) -> list[dict[str, Any]]:
        """What a stream says of these events: text that is certain, and the reason of each choice that ended."""
        chunks = []
        for sample in self.take(events):
            reason = self._reasons.get(sample.index)
            opening = None if sample.opened else self._form.opening()
            sample.opened = True
            if opening is not None:
                chunks.append(self._chunk(sample, opening, Ready(), None))
            if reason is None and sample.text.waits_for_text:
                continue  # the tokens go with the text that they lead to
            ready = sample.text.take()
            pieces = ready.pieces or [(False, "")]
            for position, (is_thinking, text) in enumerate(pieces, start=1):
                last = position == len(pieces)
                # Tokens go with the last of the pieces that they made, and so does the end.
                belongings = Ready(tokens=ready.tokens if last else [])
                chunks.append(
                    self._chunk(sample, self._form.piece(is_thinking, text), belongings, reason if last else None)
                )
        return chunks

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream that was asked for counts."""
        return {**self._head, "object": self._form.chunk, "choices": [], "usage": self.usage}

    def whole(self) -> dict[str, Any]:
        """The answer in one piece, once all samples have ended."""
        assert len(self._reasons) == len(self._samples), "a sample has not ended"
        samples = tuple(self._samples.values())
        of_prompt = self._prompt_report(samples[0]) if self._form.one_prompt else {}
        choices = [self._choice(sample) for sample in samples]
        return {**self._head, "object": self._form.whole, "choices": choices, "usage": self.usage, **of_prompt}

    @property
    def usage(self) -> dict[str, Any]:
        """Counts of tokens."""
        texts = [sample.text for sample in self._samples.values()]
        completion_tokens = sum(text.completion_tokens for text in texts)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._prompt_tokens + completion_tokens,
            "completion_tokens_details": {"reasoning_tokens": sum(text.reasoning_tokens for text in texts)},
        }

    def _chunk(self, sample: _Sample, content: Mapping[str, Any], ready: Ready, reason: str | None) -> dict[str, Any]:
        choice = {"index": sample.index, **content, **self._report(sample, ready), "finish_reason": reason}
        chunk = {**self._head, "object": self._form.chunk, "choices": [choice]}
        return {**chunk, "usage": None} if self._call.include_usage else chunk

    def _choice(self, sample: _Sample) -> dict[str, Any]:
        ready = sample.text.take()
        thoughts = "".join(text for is_thinking, text in ready.pieces if is_thinking)
        content = "".join(text for is_thinking, text in ready.pieces if not is_thinking)
        message = self._form.message(thoughts if sample.text.thought else None, content)
        reason = self._reasons[sample.index]
        of_prompt = {} if self._form.one_prompt else self._prompt_report(sample)
        return {"index": sample.index, **message, **self._report(sample, ready), "finish_reason": reason, **of_prompt}

    def _prompt_report(self, sample: _Sample) -> dict[str, Any]:
        """Log-probabilities of the tokens of a prompt, of which the first has none, if asked for."""
        tokens = self._of_prompts.get(sample.request.request_id)
        if tokens is None:
            return {}
        with _as_server_error():
            return {"prompt_logprobs": [token and _record(token, self._codec) for token in tokens]}

    def _report(self, sample: _Sample, ready: Ready) -> dict[str, Any]:
        """What a choice says of its tokens: log-probabilities, null if not asked for, and ids, if asked for."""
        report: dict[str, Any] = {"logprobs": None}
        if sample.request.params.logprobs and ready.tokens:
            with _as_server_error():
                report["logprobs"] = self._form.logprobs(ready.tokens, self._codec)
        if self._call.return_token_ids:
            report["token_ids"] = [placed.token.token_id for placed in ready.tokens]
        return report
