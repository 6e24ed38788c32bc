"""What the model has to say in an assistant's turn, as the tokens that follow the generation prompt. No JAX here."""

from typing import Any

from qwq_jax.chat import ChatTokenizer

END_OF_TURN = "<|im_end|>"


def completion_ids(message: dict[str, Any], tokenizer: ChatTokenizer, *, where: str) -> list[int]:
    """The text of a turn, tokenised on its own as sampled text is, and one end-of-turn token.

    Raises:
        ValueError: It has no end of its thoughts though the template opens them, or holds an end of turn; begins with
            `where`.
    """
    text = completion_text(message, tokenizer.generation_prompt_opens_thinking, where)
    return ended(text, tokenizer, where=where)


def ended(text: str, tokenizer: ChatTokenizer, *, where: str) -> list[int]:
    """The tokens of a text and the one that ends a turn; ValueError if the text holds such a one itself."""
    end = end_of_turn_id(tokenizer)
    tokens = tokenizer.encode(text)
    if not {end, *tokenizer.eos_token_ids}.isdisjoint(tokens):
        raise ValueError(f"{where} contains an end-of-turn token")
    return [*tokens, end]


def completion_text(message: dict[str, Any], opened: bool, where: str) -> str:
    """What the model has to say after the generation prompt, which has opened the thoughts or not."""
    text = message["content"]
    if reasoning := message.get("reasoning_content"):
        text = f"<think>\n{reasoning}\n</think>\n\n{text}"
    if not opened:
        return text
    if "</think>" not in text:
        raise ValueError(f"{where} has no </think>, and the chat template opens <think> for it")
    return text.removeprefix("<think>").removeprefix("\n") if text.startswith("<think>") else text


def end_of_turn_id(tokenizer: ChatTokenizer) -> int:
    """The one token that ends a turn: ``<|im_end|>`` where it is an end of sequence, else the first that is."""
    encoded = tokenizer.encode(END_OF_TURN)
    if len(encoded) == 1 and encoded[0] in tokenizer.eos_token_ids:
        return encoded[0]
    if not tokenizer.eos_token_ids:
        raise ValueError("the tokenizer names no end-of-sequence token to train")
    return tokenizer.eos_token_ids[0]
