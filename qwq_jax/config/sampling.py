"""How the tokens of one request are drawn."""

import itertools
from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, field_validator, model_validator

from qwq_jax.config.constraint import CONSTRAINT_FIELDS, Constraint, read_constraint
from qwq_jax.config.frozen import Frozen, describe

# Fields of an OpenAI body that say what to answer or how to report it; the caller reads them.
_NOT_SAMPLING = frozenset(
    """
    model messages prompt prompt_token_ids user metadata store return_token_ids service_tier safety_identifier
    """.split()
)

# Fields of OpenAI's API, and common extensions of it, that are not implemented: fine at the value that does nothing.
_ONLY: dict[str, tuple[Any, ...]] = {
    "length_penalty": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
}

# Second names of fields.
_OTHER_NAMES = frozenset({"max_completion_tokens", "chat_template_kwargs"})

MAX_LOGIT_BIASES = 300


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
        prompt_logprobs: Reports the log-probability of each prompt token, with this many alternatives; None does not.
        presence_penalty: Taken off the logit of each token generated before, as in OpenAI's API.
        frequency_penalty: Taken off it once for each time that it was generated.
        repetition_penalty: Divides positive logits, and multiplies negative ones, of the tokens of the prompt and of
            those generated, as in transformers; 1 is off.
        logit_bias: Added to the logits of these tokens, as pairs of token id and bias, by id; a mapping is taken too.
        min_tokens: Completions are at least so long: end and stop tokens are forbidden before.
        max_thinking_tokens: Thoughts that reach so many tokens are closed, and the answer begins.
        min_thinking_tokens: Thoughts that end before go on.
        enable_thinking: Whether the model is to think before it answers; None leaves it to the chat template.
        constraint: What the answer has to look like.
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
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=100.0)
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: NonNegativeInt = 0
    max_thinking_tokens: int | None = Field(default=None, ge=1)
    min_thinking_tokens: NonNegativeInt = 0
    enable_thinking: bool | None = None
    constraint: Constraint | None = None

    @field_validator("top_k", mode="before")
    @classmethod
    def _minus_one_is_off(cls, value: Any) -> Any:
        return 0 if value == -1 else value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        return _bias_pairs(value)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "" in self.stop:
            raise ValueError("stop: an empty text would end every completion at once")
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs {self.top_logprobs} needs logprobs true")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        if self.constraint is not None:
            # A complete answer allows end tokens only: these forbid them, or go on behind them.
            given = [
                name for name, value in (("min_tokens", self.min_tokens), ("ignore_eos", self.ignore_eos)) if value
            ]
            if given:
                raise ValueError(f"{given[0]} and {self.constraint.field} cannot go together: leave one out")
        self._check_thinking()
        return self

    def _check_thinking(self) -> None:
        most, least = self.max_thinking_tokens, self.min_thinking_tokens
        if self.enable_thinking is False and self.bounds_thinking:
            name = "min_thinking_tokens" if most is None else "max_thinking_tokens"
            raise ValueError(f"{name} has no meaning where enable_thinking is false")
        if most is not None and least > most:
            raise ValueError(f"min_thinking_tokens {least} is more than max_thinking_tokens {most}")
        if most is not None and most >= self.max_tokens:
            raise ValueError(
                f"max_thinking_tokens {most} leaves no token of max_tokens {self.max_tokens} for the answer"
            )
        if least >= self.max_tokens:
            raise ValueError(
                f"min_thinking_tokens {least} leaves no token of max_tokens {self.max_tokens} for the answer"
            )

    @property
    def penalised(self) -> bool:
        """Whether tokens that occurred are drawn with another probability."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1

    @property
    def bounds_thinking(self) -> bool:
        """Whether the length of the thoughts is bounded."""
        return self.max_thinking_tokens is not None or self.min_thinking_tokens > 0

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
        forms: dict[str, Any] = {}
        for name, value in body.items():
            if value is None or name in _NOT_SAMPLING:
                continue
            if name in CONSTRAINT_FIELDS:
                forms[name] = value
            elif name == "constraint":
                raise ValueError("constraint: unknown field")  # ours; a body has the names of its API
            elif name in cls.model_fields or name in _OTHER_NAMES:
                fields[name] = value
            elif name not in _ONLY:
                raise ValueError(f"{name}: unknown field")
            elif not any(
                value == neutral and isinstance(value, bool) is isinstance(neutral, bool) for neutral in _ONLY[name]
            ):
                raise ValueError(f"{name}: {value!r} is not implemented")
        if forms:
            fields["constraint"] = read_constraint(forms)
        _one_name(fields)
        if isinstance(fields.get("stop"), str):
            fields["stop"] = [fields["stop"]]
        inherited = defaults.model_dump() if defaults else {}
        if fields.get("logprobs") is False:
            inherited.pop("top_logprobs", None)  # it goes with the default that the line declines
        try:
            return cls.model_validate({**inherited, **fields})
        except ValidationError as error:
            raise ValueError(describe(error)) from None


def _one_name(fields: dict[str, Any]) -> None:
    """Moves what was given under a second name to the first, and refuses two that contradict each other."""
    given: list[tuple[str, str, Any]] = []
    if "max_completion_tokens" in fields:
        given.append(("max_completion_tokens", "max_tokens", fields.pop("max_completion_tokens")))
    if "chat_template_kwargs" in fields:
        switches = fields.pop("chat_template_kwargs")
        if not isinstance(switches, dict):
            raise ValueError(f"chat_template_kwargs: expected an object, got {switches!r}")
        strange = next((name for name in switches if name != "enable_thinking"), None)
        if strange is not None:
            raise ValueError(f"chat_template_kwargs.{strange}: is not implemented")
        if switches.get("enable_thinking") is not None:
            given.append(("chat_template_kwargs.enable_thinking", "enable_thinking", switches["enable_thinking"]))
    for second, first, value in given:
        if fields.setdefault(first, value) != value:
            raise ValueError(f"{second}: {value!r} contradicts {first} {fields[first]!r}")


def _bias_pairs(value: Any) -> tuple[tuple[int, float], ...]:
    """Pairs of token id and bias, by id, from a mapping or from such pairs; JSON has texts for the ids."""
    if isinstance(value, Mapping):
        value = tuple(value.items())
    if not isinstance(value, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in value):
        raise ValueError(f"expected an object of token ids and biases, got {value!r}")
    pairs = tuple(sorted((_token_id(token), _bias(token, bias)) for token, bias in value))
    if len(pairs) > MAX_LOGIT_BIASES:
        raise ValueError(f"expected at most {MAX_LOGIT_BIASES} tokens, got {len(pairs)}")
    twice = next((token for (token, _), (after, _) in itertools.pairwise(pairs) if token == after), None)
    if twice is not None:
        raise ValueError(f"token {twice} is given twice")
    return pairs


def _token_id(token: Any) -> int:
    number = int(token) if isinstance(token, str) and token.isascii() and token.isdecimal() else token
    if type(number) is not int or not 0 <= number < 2**31:
        raise ValueError(f"expected a token id, got {token!r}")
    return number


def _bias(token: Any, bias: Any) -> float:
    if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
        raise ValueError(f"expected a bias from -100 to 100 for token {token}, got {bias!r}")
    return float(bias)
