r"""Pairs of replies of which one was preferred: JSONL -> token sequences. No JAX here.

A line is one pair; a reply is a text, or an assistant's message with ``content`` and maybe ``reasoning_content``::

    {"prompt": "What is 6 x 7?", "chosen": "<think>\n6 x 7 = 42\n</think>\n\n42", "rejected": "<think>\n...", "id": "1"}

with ``messages`` in place of ``prompt`` for a conversation, and ``margin``, at least 0, for how much better the chosen
one is. Whatever else a line holds is refused: a mistyped margin would be none.

A policy is trained on what it would say: prompt and completion as in instruction tuning. A reward model reads the same,
or only the answer, which then follows thoughts that end before they begin; its score is the output at the last token,
the one that ends the turn.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, NonNegativeFloat, field_validator, model_validator

from qwq_jax.chat import THINK_CLOSE, THINK_OPEN, ChatTokenizer, checked_message, split_thinking
from qwq_jax.config.frozen import Frozen
from qwq_jax.config.json_line import load_json_line, shortened
from qwq_jax.config.load import build
from qwq_jax.rl.advantage import to_column
from qwq_jax.train.packing import Segment
from qwq_jax.train.stream import slots_of
from qwq_jax.train.turns import completion_ids, ended

# Thoughts that end before they begin.
_CLOSING = f"\n{THINK_CLOSE}\n\n"
_FIELDS = frozenset({"role", "content", "reasoning_content"})


@dataclass(frozen=True)
class Preference:
    """One line.

    Attributes:
        where: File and line.
        messages: The conversation to reply to.
        chosen: The assistant's message that was preferred.
        rejected: The other.
        margin: How much better it is, or None.
    """

    where: str
    messages: tuple[dict[str, Any], ...]
    chosen: dict[str, Any]
    rejected: dict[str, Any]
    margin: float | None = None


PairOfSegments = tuple[Segment, Segment]
"""Of the chosen and the rejected reply, each with the prompt before it."""

Encode = Callable[[Preference], PairOfSegments]


@dataclass(frozen=True)
class Pairs:
    """The pairs of some files.

    Attributes:
        examples: In the order of the files.
        too_long: How many were left out because they do not fit a row.
        with_margin: How many have a margin.
    """

    examples: list[PairOfSegments]
    too_long: int = 0
    with_margin: int = 0

    @property
    def segments(self) -> list[Segment]:
        """The sequences: the chosen one of the first pair, its rejected one, those of the second pair, ..."""
        return [segment for pair in self.examples for segment in pair]

    def with_column(self, name: str, values: Sequence[np.ndarray]) -> "Pairs":
        """The same with a column of the `values` ``[n_i]`` at the trained tokens of each of the `segments`."""
        columns = (
            replace(segment, columns={**segment.columns, name: to_column(x, segment.trained)})
            for segment, x in zip(self.segments, values, strict=True)
        )
        return replace(self, examples=list(zip(columns, columns, strict=True)))

    def fingerprint(self) -> str:
        """A hash of every token, mask and margin, in order: equal data, equal fingerprint."""
        digest = hashlib.sha256()
        for segment in self.segments:
            digest.update(np.int64(len(segment.tokens)).tobytes())
            for values in (segment.tokens, segment.trained, *segment.columns.values()):
                digest.update(values.tobytes())
        return digest.hexdigest()


def read_pairs(paths: Iterable[Path], encode: Encode, *, row_length: int, skip_too_long: bool = False) -> Pairs:
    """Reads JSONL files of preferences; `encode` is `policy_pair` or `reward_pair` with a tokenizer.

    Raises:
        ValueError: A file is absent or holds no pair, or a line is no pair, or repeats an id of its file, or does not
            fit a row of `row_length` and `skip_too_long` is false. Names file and line.
    """
    examples: list[PairOfSegments] = []
    too_long = with_margin = 0
    for path in paths:
        before = len(examples)
        for preference in read_preferences(path):
            pair = encode(preference)
            if slots_of(pair) > row_length:
                if not skip_too_long:
                    raise ValueError(
                        f"{preference.where}: both replies with their prompts take {slots_of(pair)} slots, and a row "
                        f"has {row_length}"
                    )
                too_long += 1
                continue
            examples.append(pair)
            with_margin += preference.margin is not None
        if len(examples) == before:
            raise ValueError(f"{path}: no pair to train on; too long for a row of {row_length}: {too_long}")
    return Pairs(examples, too_long, with_margin)


def read_preferences(path: Path) -> Iterator[Preference]:
    """The lines of a file, checked; blank ones are none."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    lines: dict[str, int] = {}
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            where = f"{path}:{number}"
            name, preference = parse_preference(raw, where=where)
            first = number if name is None else lines.setdefault(name, number)
            if first != number:
                raise ValueError(f"{where}: id {name!r} is taken by line {first}")
            yield preference


def parse_preference(raw: bytes, *, where: str) -> tuple[str | None, Preference]:
    """The id of a line, if it has one, and its pair; ValueError begins with `where`."""
    try:
        record = load_json_line(raw)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    line = build(_Line, record, source=where)
    messages = line.messages or ({"role": "user", "content": line.prompt},)
    return line.id, Preference(where, messages, line.chosen, line.rejected, line.margin)


def policy_pair(preference: Preference, tokenizer: ChatTokenizer) -> PairOfSegments:
    """What a policy is trained on: every token of the replies, the end of the turn included.

    Raises:
        ValueError: A reply cannot follow the prompt, or both are the same.
    """

    def segment(name: str, reply: dict[str, Any]) -> Segment:
        prompt = _prompt(preference, tokenizer)
        completion = completion_ids(reply, tokenizer, where=f"{preference.where}: {name}")
        trained = np.arange(len(prompt) + len(completion)) >= len(prompt)
        return Segment(np.array([*prompt, *completion], np.int32), trained)

    return _different(preference, segment("chosen", preference.chosen), segment("rejected", preference.rejected))


def reward_pair(preference: Preference, tokenizer: ChatTokenizer, *, thoughts: bool) -> PairOfSegments:
    """What a reward model reads; the column ``margin`` stands at the score of the chosen reply.

    Raises:
        ValueError: A reply cannot follow the prompt, has no answer, or both are the same.
    """

    def segment(name: str, reply: dict[str, Any], margin: float) -> Segment:
        where = f"{preference.where}: {name}"
        completion = (
            completion_ids(reply, tokenizer, where=where)
            if thoughts
            else answer_ids(_answer(reply, tokenizer, where), tokenizer, where=where)
        )
        scored = scored_segment(_prompt(preference, tokenizer), completion)
        return replace(scored, columns={"margin": to_column(np.float64(margin), scored.trained)})

    chosen = segment("chosen", preference.chosen, preference.margin or 0.0)
    return _different(preference, chosen, segment("rejected", preference.rejected, 0.0))


def answer_ids(answer: str, tokenizer: ChatTokenizer, *, where: str = "the answer") -> list[int]:
    """An answer alone as a reward model reads it after the generation prompt, which may have opened thoughts."""
    closing = _CLOSING if tokenizer.generation_prompt_opens_thinking else ""
    return ended(closing + answer, tokenizer, where=where)


def scored_segment(prompt: Sequence[int], reply: Sequence[int]) -> Segment:
    """A conversation whose last slot reads its last token: a reward model's score is the output there.

    A sequence of ``n`` tokens fills ``n - 1`` slots, so one more stands behind it, which nobody reads.
    """
    tokens = np.array([*prompt, *reply, reply[-1]], np.int32)
    return Segment(tokens, np.arange(len(tokens)) == len(tokens) - 1)


def _prompt(preference: Preference, tokenizer: ChatTokenizer) -> list[int]:
    try:
        return tokenizer.apply_template(preference.messages)
    except ValueError as error:
        raise ValueError(f"{preference.where}: {error}") from None


def _answer(reply: dict[str, Any], tokenizer: ChatTokenizer, where: str) -> str:
    """A reply without its thoughts, which stand in a field of their own, before ``</think>``, or nowhere."""
    text = reply["content"]
    if not reply.get("reasoning_content"):
        opened = tokenizer.generation_prompt_opens_thinking and THINK_CLOSE in text
        if opened or text.lstrip().startswith(THINK_OPEN):
            text = split_thinking(text, opened)[1]
    if not text.strip():
        raise ValueError(f"{where} has no answer that the reward model could read")
    return text


def _different(preference: Preference, chosen: Segment, rejected: Segment) -> PairOfSegments:
    if np.array_equal(chosen.tokens, rejected.tokens):
        raise ValueError(f"{preference.where}: chosen and rejected are the same to the model")
    return chosen, rejected


class _Line(Frozen):
    id: str | None = Field(default=None, min_length=1)
    messages: tuple[dict[str, Any], ...] | None = Field(default=None, min_length=1)
    prompt: str | None = Field(default=None, min_length=1)
    chosen: Any
    rejected: Any
    margin: NonNegativeFloat | None = None

    @field_validator("chosen", "rejected")
    @classmethod
    def _reply(cls, value: Any) -> dict[str, Any]:
        if isinstance(value, str):
            return {"role": "assistant", "content": value}
        if not isinstance(value, dict) or value.get("role") != "assistant" or not isinstance(value.get("content"), str):
            raise ValueError(f"expected a text, or a message of the assistant with content, got {shortened(value)}")
        if unknown := value.keys() - _FIELDS:
            raise ValueError(f"has field {min(unknown)!r}, which training does not understand")
        if not isinstance(value.get("reasoning_content") or "", str):
            raise ValueError("has a reasoning_content that is not text")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.messages is None) is (self.prompt is None):
            raise ValueError("expected one of messages and prompt, got " + ("none" if self.prompt is None else "both"))
        for index, message in enumerate(self.messages or ()):
            checked_message(message, index)
        if self.messages and self.messages[-1]["role"] not in ("user", "tool"):
            role = self.messages[-1]["role"]
            raise ValueError(
                f"messages: the conversation ends with role {role!r}, so that there is nothing to reply to"
            )
        return self
