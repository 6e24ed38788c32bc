"""What goes between the parts of reinforcement learning: tasks in, replies from the engine, scores from the rewards.

Plain Python, so that rewards run in processes that never load JAX.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwq_jax.chat import Message


@dataclass(frozen=True)
class Task:
    r"""One line of a task file: what is asked, and what a reward needs to judge the reply.

    Example: ``Task("gsm8k-12", ({"role": "user", "content": "What is 6 x 7?"},), "gsm8k", {"answer": "42"})``

    Attributes:
        task_id: Unique in the file.
        messages: The conversation to reply to.
        source: Where it comes from; evaluation reports by source, and a reward may be confined to some.
        judge: What rewards read, by the name of the field: ``answer`` (text), ``tests`` (of a program),
            ``instructions`` (rules that the reply has to keep).
        difficulty: From 0, easy, to 1; None where nobody said.
    """

    task_id: str
    messages: tuple[Message, ...]
    source: str = ""
    judge: Mapping[str, Any] = field(default_factory=dict)
    difficulty: float | None = None


@dataclass(frozen=True)
class Reply:
    r"""A completion as a reward sees it.

    Example: ``Reply("6 x 7 = 42\n</think>\n\n\\boxed{42}", "6 x 7 = 42\n", "\\boxed{42}", tokens=17)``

    Attributes:
        text: All that was generated, special tokens that end it left out.
        thought: What stands before ``</think>``; None if the model did not think, or did not come to an end of it.
        answer: What follows ``</think>``, or everything if there was no thought; empty if thoughts never ended.
        tokens: Tokens generated, those of thoughts and the end token included.
        truncated: Whether it was cut off by the limit of tokens rather than ended by the model.
    """

    text: str
    thought: str | None
    answer: str
    tokens: int
    truncated: bool = False


@dataclass(frozen=True)
class Score:
    """What a reward says of a reply.

    Attributes:
        value: The reward; usually from 0 to 1.
        correct: Whether the reply solves the task; None from a reward that does not judge that (format, length).
        note: Why, in a few words, for whoever reads samples.
    """

    value: float
    correct: bool | None = None
    note: str = ""
