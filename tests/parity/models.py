"""Random models of every shape that matters, as numpy arrays under Hugging Face names, and as our parameters.

The mapping to our parameters is written here a second time on purpose: a mistake in the package's own table would
otherwise cancel out.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

D, F, V, L = 64, 96, 257, 2
ORIGINAL_CONTEXT = 64


@dataclass(frozen=True)
class Case:
    """One architecture: N query heads, K kv heads, head dim H."""

    N: int
    K: int
    H: int
    tied: bool
    yarn: bool

    @property
    def name(self) -> str:
        tied, yarn = ("tied" if self.tied else "untied"), ("yarn" if self.yarn else "rope")
        return f"N{self.N}-K{self.K}-H{self.H}-{tied}-{yarn}"

    def huggingface(self) -> dict[str, Any]:
        """The contents of config.json, in the style of transformers 4."""
        yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL_CONTEXT}
        return {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "vocab_size": V,
            "hidden_size": D,
            "intermediate_size": F,
            "num_hidden_layers": L,
            "num_attention_heads": self.N,
            "num_key_value_heads": self.K,
            "head_dim": self.H,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "max_position_embeddings": 4 * ORIGINAL_CONTEXT if self.yarn else 512,
            "tie_word_embeddings": self.tied,
            "use_sliding_window": False,
            "torch_dtype": "float32",
            **({"rope_scaling": yarn} if self.yarn else {}),
        }

    def weights(self) -> dict[str, np.ndarray]:
        """Seeded float32 weights and biases under Hugging Face names."""
        rng = np.random.default_rng([self.N, self.K, self.H, self.tied])
        normal = lambda *shape: rng.standard_normal(shape, np.float32) * np.float32(0.1)  # noqa: E731
        out = {"model.embed_tokens.weight": normal(V, D), "model.norm.weight": 1 + normal(D)}
        for i in range(L):
            layer = f"model.layers.{i}."
            out[layer + "input_layernorm.weight"] = 1 + normal(D)
            out[layer + "post_attention_layernorm.weight"] = 1 + normal(D)
            for name, heads in (("q", self.N), ("k", self.K), ("v", self.K)):
                out[f"{layer}self_attn.{name}_proj.weight"] = normal(heads * self.H, D)
                out[f"{layer}self_attn.{name}_proj.bias"] = 5 * normal(heads * self.H)
            out[layer + "self_attn.o_proj.weight"] = normal(D, self.N * self.H)
            out[layer + "mlp.gate_proj.weight"] = normal(F, D)
            out[layer + "mlp.up_proj.weight"] = normal(F, D)
            out[layer + "mlp.down_proj.weight"] = normal(D, F)
        if not self.tied:
            out["lm_head.weight"] = normal(V, D)
        return out

    def params(self) -> dict[str, jnp.ndarray]:
        """The same weights as parameters of ours."""
        hf = self.weights()
        out = {"embed.embedding": hf["model.embed_tokens.weight"], "final_norm.scale": hf["model.norm.weight"]}
        for i in range(L):
            theirs, ours = f"model.layers.{i}.", f"layers.{i}."
            out[ours + "attention_norm.scale"] = hf[theirs + "input_layernorm.weight"]
            out[ours + "mlp_norm.scale"] = hf[theirs + "post_attention_layernorm.weight"]
            for name, heads in (("q", self.N), ("k", self.K), ("v", self.K)):
                projection = f"{theirs}self_attn.{name}_proj."
                out[f"{ours}attention.{name}_kernel"] = hf[projection + "weight"].T.reshape(D, heads, self.H)
                out[f"{ours}attention.{name}_bias"] = hf[projection + "bias"].reshape(heads, self.H)
            out[ours + "attention.o_kernel"] = hf[theirs + "self_attn.o_proj.weight"].T.reshape(self.N, self.H, D)
            for name in ("gate", "up", "down"):
                out[f"{ours}mlp.{name}_kernel"] = hf[f"{theirs}mlp.{name}_proj.weight"].T
        if not self.tied:
            out["head.kernel"] = hf["lm_head.weight"]
        return {path: jnp.asarray(array) for path, array in out.items()}


HEADS = ((4, 4, 64), (5, 1, 128), (7, 1, 64), (10, 2, 64))
CASES = [Case(*heads, tied, yarn) for heads in HEADS for tied in (True, False) for yarn in (True, False)]


def prompt() -> np.ndarray:
    """Token ids `[2, 200]`: three times the original context of the YaRN cases."""
    return np.random.default_rng(1).integers(0, V, (2, 200)).astype(np.int32)
