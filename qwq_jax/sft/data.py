"""Conversations in JSONL -> token sequences, with the assistant's tokens marked. No JAX here.

One conversation a line: ``{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}``.

Every assistant turn is trained on exactly what the model will see and say when it is used: its prompt is the chat
template of the messages before it with the generation prompt, its completion is the text of the turn, tokenised on its
own as sampled text is, and one end-of-turn token. Templates of reasoning models drop the thoughts of earlier turns, so
a later turn may not continue the tokens of an earlier one: then each turn becomes a sequence of its own. Where the
template does keep them verbatim, the turns share one sequence with holes in the mask, which trains the same for less.

A template that opens ``<think>`` leaves it to the completion to close it. The thoughts are the turn's
``reasoning_content``, or the part of its ``content`` before ``</think>``; a turn without either is refused, since it
would teach to answer inside the thoughts.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwq_jax.chat import ChatTokenizer
from qwq_jax.config.json_line import load_json_line
from qwq_jax.train.packing import Segment
from qwq_jax.train.turns import completion_ids

ROLES = frozenset({"system", "user", "assistant", "tool"})
FIELDS = frozenset({"role", "content", "reasoning_content"})
# Beside "messages" a line may hold anything (an id, a source) but what the template would have been given.
CHANGES_PROMPT = frozenset({"tools", "functions", "documents"})


@dataclass(frozen=True)
class Examples:
    """The sequences of some files.

    Attributes:
        segments: In the order of the files.
        too_long: How many were left out because they do not fit a row.
    """

    segments: list[Segment]
    too_long: int = 0

    @property
    def examples(self) -> list[tuple[Segment]]:
        """The sequences one by one, as the order of training takes them."""
        return [(segment,) for segment in self.segments]

    @property
    def trained_tokens(self) -> int:
        """Targets in one pass."""
        return sum(int(segment.trained.sum()) for segment in self.segments)

    def fingerprint(self) -> str:
        """A hash of every token and mask, in order: equal data, equal fingerprint."""
        digest = hashlib.sha256()
        for segment in self.segments:
            digest.update(np.int64(len(segment.tokens)).tobytes())
            digest.update(segment.tokens.tobytes())
            digest.update(segment.trained.tobytes())
        return digest.hexdigest()


def read_examples(
    paths: Sequence[Path], tokenizer: ChatTokenizer, *, row_length: int, skip_too_long: bool = False
) -> Examples:
    """Reads JSONL files of conversations.

    Raises:
        ValueError: A file is absent or holds no example, or a line is not a conversation with an assistant turn, or
            does not fit a row of `row_length` and `skip_too_long` is false. Names file and line.
    """
    segments: list[Segment] = []
    too_long = 0
    for path in paths:
        before = len(segments)
        for where, messages in read_conversations(path):
            for segment in conversation_segments(messages, tokenizer, where=where):
                if segment.slots <= row_length:
                    segments.append(segment)
                elif skip_too_long:
                    too_long += 1
                else:
                    raise ValueError(
                        f"{where}: {len(segment.tokens)} tokens do not fit a row, which takes {row_length + 1}"
                    )
        if len(segments) == before:
            raise ValueError(f"{path}: no example to train on; too long for a row of {row_length}: {too_long}")
    return Examples(segments, too_long)


def read_conversations(path: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yields ``("file.jsonl:3", messages)`` for every line that is not blank, checked."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                where = f"{path}:{number}"
                yield where, check_messages(parse_line(raw, where=where), where=where)


def parse_line(raw: bytes, *, where: str) -> object:
    """The JSON value of a line."""
    try:
        return load_json_line(raw)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_messages(value: object, *, where: str) -> list[dict[str, Any]]:
    """Returns the messages of a line if they are a conversation that ends with the assistant."""
    if not isinstance(value, dict) or not isinstance(value.get("messages"), list) or not value["messages"]:
        raise ValueError(f'{where}: expected an object with a non-empty list "messages"')
    if changes := value.keys() & CHANGES_PROMPT:
        raise ValueError(f"{where}: {min(changes)!r} changes the prompt, and training does not understand it")
    for i, message in enumerate(value["messages"]):
        if not isinstance(message, dict):
            raise ValueError(f"{where}: messages[{i}] is not an object")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"{where}: messages[{i}] has unknown role {role!r}, expected one of {sorted(ROLES)}")
        if unknown := message.keys() - FIELDS:
            raise ValueError(f"{where}: messages[{i}] has field {min(unknown)!r}, which training does not understand")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{where}: messages[{i}] has no text in content")
        if not isinstance(message.get("reasoning_content") or "", str):
            raise ValueError(f"{where}: messages[{i}] has a reasoning_content that is not text")
    last = value["messages"][-1]["role"]
    if last != "assistant":
        raise ValueError(f"{where}: the conversation ends with role {last!r}; there is no assistant turn to learn")
    return value["messages"]


def conversation_segments(messages: Sequence[dict[str, Any]], tokenizer: ChatTokenizer, *, where: str) -> list[Segment]:
    """The sequences that train every assistant turn, as few as the template allows."""
    sequences: list[tuple[list[int], list[bool]]] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i == 0:
            raise ValueError(f"{where}: messages[0] has role 'assistant'; there is nothing before it to answer")
        try:
            prompt = tokenizer.apply_template(messages[:i], add_generation_prompt=True)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        completion = completion_ids(message, tokenizer, where=f"{where}: messages[{i}]")
        if sequences and prompt[: len(sequences[-1][0])] == sequences[-1][0]:
            tokens, trained = sequences.pop()
            trained = trained + [False] * (len(prompt) - len(tokens))
        else:
            trained = [False] * len(prompt)
        sequences.append((prompt + completion, trained + [True] * len(completion)))
    return [Segment(np.array(tokens, np.int32), np.array(trained, np.bool_)) for tokens, trained in sequences]
