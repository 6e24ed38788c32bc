"""Train the tokenizer of tiny-reasoner and write it as an ordinary Hugging Face tokenizer directory.

python tools/make_tiny_tokenizer.py qwq_jax/embedded/tiny-reasoner

A byte-level BPE of 512 tokens over arithmetic problems and their solutions, in the manner of the Qwen2 family: NFC,
digits one by one, ChatML marks and <think> / </think> as added tokens with the highest ids. Any text can be encoded.
The same command writes the same bytes.
"""

import argparse
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from qwq_jax.rl.rewards import arithmetic

VOCAB_SIZE = 512
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINKING_TOKENS = ("<think>", "</think>")
CONTEXT_LENGTH = 1024

# How Qwen2 cuts text before BPE: contractions, words with one leading mark, single digits, punctuation, line ends.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Everyday words the problems lack, so that other text is not spelt out byte by byte.
PLAIN_ENGLISH = (
    "Please reason step by step, and put your final answer within \\boxed{}. You are a helpful assistant.",
    "First we add the numbers, then we subtract one from the other. Let me check: this is not right, but that is.",
    "There are two people in the room and they are all of the same age. If you would like, I can do it with you.",
    "Hello! What time is it? Which one was it, when, where, who and why? Thank you for your question.",
)

CHAT_TEMPLATE = """\
{#- One ChatML turn a message. Thoughts stay in the last turn only, where training needs them; the prompt for a new
    answer opens the thinking itself, so a completion holds </think> and no opening tag. -#}
{%- for message in messages %}
    {%- if message.role not in ["system", "user", "assistant", "tool"] %}
        {{- raise_exception("unknown role " ~ message.role) }}
    {%- endif %}
    {%- set text = message.content or "" %}
    {%- if message.role == "assistant" %}
        {%- if not loop.last %}
            {%- set text = text.split("</think>")[-1].lstrip("\\n") %}
        {%- elif message.reasoning_content %}
            {%- set text = "<think>\\n" ~ message.reasoning_content ~ "\\n</think>\\n\\n" ~ text %}
        {%- endif %}
    {%- endif %}
    {{- "<|im_start|>" ~ message.role ~ "\\n" ~ text ~ "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n<think>\\n" }}
{%- endif %}
"""


def corpus(count: int) -> Iterator[str]:
    """Questions and replies of ``count`` training problems, then a little plain English."""
    for problem in itertools.islice(arithmetic.problems(0, split=arithmetic.Split.TRAIN), count):
        for message in problem.messages():
            yield from re.split("|".join(map(re.escape, THINKING_TOKENS)), message["content"])
    yield from PLAIN_ENGLISH


def train(texts: Iterator[str]) -> Tokenizer:
    """A byte-level BPE of exactly ``VOCAB_SIZE`` tokens, added tokens last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS) - len(THINKING_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in THINKING_TOKENS])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the corpus yields {tokenizer.get_vocab_size()} tokens, {VOCAB_SIZE} were wanted")
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer) -> dict:
    """What transformers needs beside tokenizer.json."""
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in SPECIAL_TOKENS,
        }
        for token in SPECIAL_TOKENS + THINKING_TOKENS
    }
    return {
        "added_tokens_decoder": added,
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": CONTEXT_LENGTH,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def generation_config(tokenizer: Tokenizer) -> dict:
    """The family's sampling defaults: a turn ends at <|im_end|>, a text at <|endoftext|>."""
    end_of_text, end_of_turn = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")
    return {
        "bos_token_id": end_of_text,
        "do_sample": True,
        "eos_token_id": [end_of_turn, end_of_text],
        "pad_token_id": end_of_text,
        "temperature": 0.6,
        "top_p": 0.95,
    }


def write(directory: Path, *, problems: int) -> Tokenizer:
    """Train on ``problems`` problems and write the five files."""
    tokenizer = train(corpus(problems))
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    for name, content in (
        ("tokenizer_config.json", tokenizer_config(tokenizer)),
        ("special_tokens_map.json", {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
        ("generation_config.json", generation_config(tokenizer)),
    ):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return tokenizer


def main() -> None:
    """Parse the command line and write the directory."""
    parser = argparse.ArgumentParser(description="Train tiny-reasoner's tokenizer.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--problems", type=int, default=20000, help="problems to train on")
    options = parser.parse_args()
    tokenizer = write(options.output, problems=options.problems)
    print(f"{tokenizer.get_vocab_size()} tokens -> {options.output}")


if __name__ == "__main__":
    main()
