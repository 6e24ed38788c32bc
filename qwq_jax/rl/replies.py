"""A completion of the engine as a reward sees it."""

from collections.abc import Sequence

from qwq_jax.chat import THINK_CLOSE, THINK_OPEN, ChatTokenizer, split_thinking
from qwq_jax.engine.request import Completion
from qwq_jax.rl.types import Reply

# More than enough tokens to hold "<think>" and the line breaks after it.
_TAIL = 16


def opens_thinking(prompt: Sequence[int], tokenizer: ChatTokenizer) -> bool:
    """Whether the prompt ends in an opening tag, so that the completion begins inside the thoughts."""
    return tokenizer.decode(prompt[-_TAIL:]).rstrip().endswith(THINK_OPEN)


def reply_of(completion: Completion, prompt: Sequence[int], tokenizer: ChatTokenizer) -> Reply:
    """Text, thoughts and answer of a completion; thoughts that never ended are neither thought nor answer."""
    text = tokenizer.decode(completion.token_ids)
    thought, answer = split_thinking(text, opens_thinking(prompt, tokenizer))
    if thought is not None and THINK_CLOSE not in text:
        thought, answer = None, ""
    return Reply(text, thought, answer, len(completion.token_ids), truncated=completion.stop_token_id is None)
