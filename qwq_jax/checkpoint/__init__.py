"""Checkpoints: Hugging Face directories in and out, and the Orbax directories that every other job reads.

`names` is the table between the two worlds; `huggingface` reads and writes one of them, `store` the other.
"""

from qwq_jax.checkpoint.store import Checkpoint, open_checkpoint, read_param, restore_params

__all__ = ["Checkpoint", "open_checkpoint", "read_param", "restore_params"]
