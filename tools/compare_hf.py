"""Proves that transformers computes from a Hugging Face directory what we compute from the checkpoint it came from.

    python -m tools.compare_hf CHECKPOINT HF_DIRECTORY

Both in float32 on the CPU, logits of a random prompt. Exits 1 if any differs by more than 2e-4 of the largest logit;
without transformers or torch it says so and exits 0.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np

from qwq_jax.checkpoint import open_checkpoint, restore_params
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.model.attention import causal_attend
from qwq_jax.model.params import bind
from qwq_jax.sharding import decode_layout, make_mesh

TOLERANCE = 2e-4


def our_logits(path: str, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits `[T, V]` of the checkpoint for tokens `[T]`."""
    checkpoint = open_checkpoint(path)
    params = restore_params(checkpoint, decode_layout(make_mesh(MeshConfig(), jax.devices("cpu"))), jnp.float32)

    @jax.jit
    def forward(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        model = bind(checkpoint.config, params, dtype=jnp.float32)
        return model.logits(model(tokens[None], jnp.arange(tokens.size)[None], causal_attend(None))[0])[0]

    return np.asarray(forward(params, jnp.asarray(tokens)))


def main() -> int:
    """Compares, prints the largest difference, returns the exit code."""
    parser = argparse.ArgumentParser(description="Compare transformers' logits with ours.")
    parser.add_argument("checkpoint")
    parser.add_argument("directory")
    parser.add_argument("--tokens", type=int, default=256, help="length of the random prompt")
    args = parser.parse_args()
    try:
        import torch
        import transformers
    except ImportError as error:
        print(f"not compared: {error.name} is not installed")
        return 0
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(args.directory, dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, args.tokens).astype(np.int32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens[None]).long()).logits[0].numpy()
    ours = our_logits(args.checkpoint, tokens)
    worst, largest = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    equal = worst <= TOLERANCE * max(1.0, largest)
    print(
        f"transformers {transformers.__version__} reads {args.directory}: logits {'equal' if equal else 'DIFFER'}, "
        f"largest difference {worst:.1e} of {largest:.1f} over {args.tokens} tokens"
    )
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
