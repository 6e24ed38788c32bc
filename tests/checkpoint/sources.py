"""Random Hugging Face checkpoints, written by the safetensors library itself, and what is needed to compare them."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from qwq_jax.config.model import ModelConfig

COMPANIONS = {
    "tokenizer.json": '{"made": "up", "text": "\u00e9\\n"}',
    "tokenizer_config.json": '{"a":   1}',
    "chat_template.jinja": "{{ messages }}<think>\n",
    "generation_config.json": '{"eos_token_id": [7, 8]}',
}


def model_config(*, tied: bool = False, num_layers: int = 2) -> ModelConfig:
    """Every dimension differs from every other, so that no wrong permutation has the right shape."""
    return ModelConfig(
        vocab_size=96,
        hidden_size=40,
        num_layers=num_layers,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=56,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        max_position_embeddings=128,
        eos_token_ids=(7,),
    )


def random_tensors(config: ModelConfig, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Written out by hand, not from the table under test. Holds subnormals and negative zeros."""
    rng = np.random.default_rng(seed)
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    n, k = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (v, d)
    for i in range(config.num_layers):
        layer = {
            "input_layernorm.weight": (d,),
            "post_attention_layernorm.weight": (d,),
            "self_attn.q_proj.weight": (n, d),
            "self_attn.k_proj.weight": (k, d),
            "self_attn.v_proj.weight": (k, d),
            "self_attn.q_proj.bias": (n,),
            "self_attn.k_proj.bias": (k,),
            "self_attn.v_proj.bias": (k,),
            "self_attn.o_proj.weight": (d, n),
            "mlp.gate_proj.weight": (f, d),
            "mlp.up_proj.weight": (f, d),
            "mlp.down_proj.weight": (d, f),
        }
        shapes.update({f"model.layers.{i}.{name}": shape for name, shape in layer.items()})
    tensors = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        values.reshape(-1)[:3] = [-0.0, 0.0, 1e-40]
        tensors[name] = values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return tensors


def write_source(
    folder: Path, config: ModelConfig, tensors: dict[str, np.ndarray], *, shards: int = 1, dtype: str = "float32"
) -> Path:
    """Writes the directory that a hub repository would hold."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_huggingface(dtype), indent=3))
    for name, text in COMPANIONS.items():
        (folder / name).write_text(text)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    names = sorted(tensors)
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def make_source(
    folder: Path, *, dtype: str = "float32", tied: bool = False, shards: int = 1, num_layers: int = 2, seed: int = 0
) -> Path:
    """A whole random checkpoint."""
    config = model_config(tied=tied, num_layers=num_layers)
    return write_source(folder, config, random_tensors(config, dtype, seed), shards=shards, dtype=dtype)


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a Hugging Face directory, by the safetensors library."""
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found = load_file(file)
        assert not found.keys() & tensors.keys()
        tensors.update(found)
    return tensors


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
