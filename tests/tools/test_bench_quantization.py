"""The perplexity that the tool measures through the paged cache is the one of plain attention."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwq_jax.chat import ChatTokenizer
from qwq_jax.checkpoint import open_checkpoint, restore_params
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.embedded import TINY_REASONER
from qwq_jax.jobs.convert import convert
from qwq_jax.logprobs import token_logprobs
from qwq_jax.model.attention import causal_attend
from qwq_jax.model.params import bind
from qwq_jax.sharding import decode_layout, make_mesh
from tools.bench_quantization import WINDOW, negative_log_likelihood, parse_run, windows


@pytest.mark.slow
@pytest.mark.exhaustive
def test_exact_is_plain_attention_and_8_bits_are_near(tmp_path: Path) -> None:
    convert(str(TINY_REASONER), str(tmp_path / "ours"))
    checkpoint = open_checkpoint(str(tmp_path / "ours"))
    layout = decode_layout(make_mesh(MeshConfig(), jax.devices()[:1]))
    texts = windows(ChatTokenizer.from_directory(TINY_REASONER), WINDOW)
    losses = {}
    for name in ("exact", "int8+cache:int8"):
        run = parse_run(name)
        params = restore_params(checkpoint, layout, jnp.float32, run[0])
        losses[name] = negative_log_likelihood(checkpoint.config, params, layout, texts, run)

    @jax.jit
    def plain(params, tokens):
        model = bind(checkpoint.config, params, dtype=jnp.float32)
        hidden, _ = model(tokens[:, :-1], jnp.arange(WINDOW - 1)[None], causal_attend(None))
        return token_logprobs(hidden, model.head_matrix(), tokens[:, 1:])[0]

    exact = -np.asarray(plain(restore_params(checkpoint, layout, jnp.float32), texts), np.float64).mean()
    assert losses["exact"] == pytest.approx(exact, rel=1e-5)
    assert losses["int8+cache:int8"] != losses["exact"]
    assert losses["int8+cache:int8"] == pytest.approx(exact, rel=0.02)  # of a text far from what it was trained on
