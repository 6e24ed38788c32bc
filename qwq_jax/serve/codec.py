"""What the server needs to know about text, which is given to it: prompts to tokens, and tokens to records."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from qwq_jax.chat import IncrementalDetokenizer
from qwq_jax.engine.request import Hooks, Request


class TextCodec(Protocol):
    """Text at the ends of the engine."""

    def request(self, request_id: str, body: Mapping[str, Any]) -> Request:
        """The engine's request of a body that has one of `messages`, `prompt` and `prompt_token_ids`.

        Raises:
            ValueError: The body cannot be served; one sentence that names the field.
        """
        ...

    def hooks(self, request: Request) -> Hooks:
        """What watches the text of one sample of a request."""
        ...

    def detokenizer(self) -> IncrementalDetokenizer:
        """A decoder for the tokens of one sample."""
        ...

    def opens_thinking(self, prompt: Sequence[int]) -> bool:
        """Whether completions of this prompt begin inside the thoughts."""
        ...

    def reasoning_tokens(self, tokens: Sequence[int]) -> int:
        """How many tokens of a completion that begins with thoughts belong to them."""
        ...

    def token_record(self, token_id: int, logprob: float) -> dict[str, Any]:
        """A token as OpenAI reports it: ``{"token", "logprob", "bytes"}``; ValueError if `logprob` is not finite."""
        ...
