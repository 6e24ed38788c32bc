"""Batch inference: requests of token ids in, completions out, by continuous batching over a paged cache.

`request` and `step` say what goes in and out, `pages` and `scheduler` decide what runs (plain Python), `runner` holds
the one compiled step, `engine` is the loop.
"""

from qwq_jax.engine.engine import Engine
from qwq_jax.engine.request import Completion, FinishReason, Request

__all__ = ["Completion", "Engine", "FinishReason", "Request"]
