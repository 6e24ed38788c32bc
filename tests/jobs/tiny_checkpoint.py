"""A random checkpoint with a byte-level tokenizer and a template that opens the thoughts: what a text job needs."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from qwq_jax.config.model import ModelConfig
from qwq_jax.jobs.convert import convert
from tests.checkpoint.sources import random_tensors, write_source

END, OPEN, CLOSE = 256, 257, 258
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<think>\n{% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: id for id, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True), AddedToken("<think>"), AddedToken("</think>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))


def make_checkpoint(folder: Path, seed: int = 0) -> str:
    config = ModelConfig(
        vocab_size=260,
        hidden_size=32,
        num_layers=1,
        num_heads=8,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=64,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        max_position_embeddings=256,
        eos_token_ids=(END,),
    )
    tensors = random_tensors(config, "float32", seed)
    source = write_source(folder / f"source-{seed}", config, {name: 0.3 * x for name, x in tensors.items()})
    write_tokenizer(source)
    convert(str(source), str(folder / f"checkpoint-{seed}"))
    return str(folder / f"checkpoint-{seed}")
