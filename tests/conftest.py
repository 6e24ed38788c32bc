"""Eight simulated devices, one compile cache for all workers, and a tiny model."""

import os
from pathlib import Path

# Read by JAX when it is first imported, which this file comes before.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
# Processes that tests start share the cache too. Compiled programs are looked up by content, so it never goes stale.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
# Nothing in the tests may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402

from qwq_jax.config.model import ModelConfig  # noqa: E402


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """A model of the family's shape that compiles in a second: G = 4, untied, with biases, a vocabulary that is odd."""
    return ModelConfig(
        vocab_size=257,
        hidden_size=64,
        num_layers=2,
        num_heads=8,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=128,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_ids=(256,),
        pad_token_id=0,
    )


@pytest.fixture
def rng() -> np.random.Generator:
    """Seeded afresh for each test."""
    return np.random.default_rng(0)
