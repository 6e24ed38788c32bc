"""How the tokens of one request are drawn."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, field_validator, model_validator

from qwq_jax.config.frozen import Frozen, describe

# Fields of an OpenAI body that say what to answer or how to report it; the caller reads them.
_NOT_SAMPLING = frozenset(
    """
    model messages prompt prompt_token_ids user metadata store return_token_ids service_tier safety_identifier
    """.split()
)

# Fields of OpenAI's API, and common extensions of it, that are not implemented: fine at the value that does nothing.
_ONLY: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
}


class SamplingParams(Frozen):
    """The sampling part of a request. The defaults are OpenAI's: the model's own distribution, nothing cut off.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Keeps the fewest tokens whose probability reaches this.
        top_k: Keeps this many tokens; 0 keeps all.
        min_p: Keeps tokens at least this many times as likely as the most likely one.
        max_tokens: Longest completion, thinking included; the engine shortens it to what the context leaves.
        stop: Texts that end the completion, and are not part of it.
        stop_token_ids: Tokens that end the completion, beside the model's own.
        seed: Makes the completion reproducible, whatever is served beside it.
        n: Completions of the prompt.
        ignore_eos: Goes on after the model's own end tokens.
        logprobs: Reports the log-probability of each token.
        top_logprobs: Reports this many of the most likely tokens at each position.
    """

    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0, lt=2**31)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    max_tokens: PositiveInt = 16_384
    stop: tuple[str, ...] = Field(default=(), max_length=16)
    stop_token_ids: tuple[NonNegativeInt, ...] = Field(default=(), max_length=64)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    n: int = Field(default=1, ge=1, le=128)
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)

    @field_validator("top_k", mode="before")
    @classmethod
    def _minus_one_is_off(cls, value: Any) -> Any:
        return 0 if value == -1 else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "" in self.stop:
            raise ValueError("stop: an empty text would end every completion at once")
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs {self.top_logprobs} needs logprobs true")
        return self

    @classmethod
    def from_openai(cls, body: Mapping[str, Any], defaults: "SamplingParams | None" = None) -> "SamplingParams":
        """Reads the sampling fields of an OpenAI request body; one that is absent or ``null`` is that of `defaults`.

        Fields that carry the prompt or ask for a form of answer (``messages``, ``model``, ...) are left to the caller.

        Example:
            >>> SamplingParams.from_openai({"messages": [], "temperature": 0.6, "stop": "END"}).stop
            ('END',)

        Raises:
            ValueError: A field is unknown, is not implemented, or has a wrong type or value; the sentence names it.
        """
        fields: dict[str, Any] = {}
        for name, value in body.items():
            if value is None or name in _NOT_SAMPLING:
                continue
            if name in cls.model_fields or name == "max_completion_tokens":
                fields[name] = value
            elif name not in _ONLY:
                raise ValueError(f"{name}: unknown field")
            elif not any(
                value == neutral and isinstance(value, bool) is isinstance(neutral, bool) for neutral in _ONLY[name]
            ):
                raise ValueError(f"{name}: {value!r} is not implemented")
        if "max_completion_tokens" in fields:
            limit = fields.pop("max_completion_tokens")
            if fields.setdefault("max_tokens", limit) != limit:
                raise ValueError(f"max_completion_tokens: {limit!r} contradicts max_tokens {fields['max_tokens']!r}")
        if isinstance(fields.get("stop"), str):
            fields["stop"] = [fields["stop"]]
        inherited = defaults.model_dump() if defaults else {}
        if fields.get("logprobs") is False:
            inherited.pop("top_logprobs", None)  # it goes with the default that the line declines
        try:
            return cls.model_validate({**inherited, **fields})
        except ValidationError as error:
            raise ValueError(describe(error)) from None
