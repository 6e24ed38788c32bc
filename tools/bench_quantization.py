"""Perplexity of a checkpoint with quantised weights and caches, teacher-forced through the paged cache.

    python -m tools.bench_quantization CHECKPOINT [--tokens 20480] [--runs int8,int4-g64,cache:int8,...]

CHECKPOINT is not quantised, such as SmolLM2-135M made by `tools.smollm2_as_qwen2`. The text is what is on every machine
with Python: the docstrings of its standard library, in the order of their files. It is read in windows of 1,024 tokens
without context before them, each computed as prompts are, a chunk at a time, over the cache of the earlier ones.

A run is a name of `qwq_jax.config.weights` (`-a8` behind it makes activations int8 too), `cache:DTYPE`, or `exact`, and
several of them joined by `+`. Prints a row of a Markdown table for each.
"""

import argparse
import ast
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qwq_jax.chat import ChatTokenizer
from qwq_jax.checkpoint import open_checkpoint, restore_params
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.weights import WeightFormat, parse_weights
from qwq_jax.model.attention import PagedBatch, paged_attend
from qwq_jax.model.cache import allocate_cache, cache_spec
from qwq_jax.model.params import Params, bind
from qwq_jax.sharding import Layout, decode_layout, make_mesh

WINDOW, CHUNK, PAGE = 1024, 256, 64
RUNS = (
    "exact,int8,int8-a8,int4,int4-g64,int4-g32,int4-g16,cache:int8,cache:float8_e4m3fn,cache:float8_e5m2,"
    "int8+cache:int8"
)


def documents() -> Iterator[str]:
    """Docstrings of the standard library's modules, classes and functions that are at least a paragraph long."""
    for path in sorted(Path(ast.__file__).parent.glob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 400:
                    yield text


def windows(tokenizer: ChatTokenizer, count: int) -> np.ndarray:
    """The first tokens of the text as `[n, WINDOW]`."""
    tokens: list[int] = []
    for text in documents():
        tokens += tokenizer.encode(text + "\n\n")
        if len(tokens) >= count:
            break
    whole = min(count, len(tokens)) // WINDOW
    return np.asarray(tokens[: whole * WINDOW], np.int32).reshape(whole, WINDOW)


def parse_run(name: str) -> tuple[WeightFormat | None, str]:
    """Weights and cache dtype of a run."""
    weights, cache = None, "float32"
    for part in name.split("+"):
        if part.startswith("cache:"):
            cache = part.removeprefix("cache:")
        elif part != "exact":
            weights = parse_weights(part.removesuffix("-a8"))
            if part.endswith("-a8"):
                weights = weights.model_copy(update={"activations": 8})
    return weights, cache


def negative_log_likelihood(
    config: ModelConfig, params: Params, layout: Layout, texts: np.ndarray, run: tuple[WeightFormat | None, str]
) -> float:
    """Mean over all tokens but each window's first, in nats."""
    weights, dtype = run
    pages = WINDOW // PAGE
    cache = allocate_cache(cache_spec(config, layout, replicas=1, pages=pages, page_size=PAGE, dtype=dtype), layout)

    @jax.jit
    def score(params: Params, cache, tokens: jax.Array, targets: jax.Array, start: jax.Array):
        positions = (start + jnp.arange(CHUNK))[None]
        table = jnp.arange(pages, dtype=jnp.int32)[None, None]
        batch = PagedBatch(table, (start + CHUNK)[None, None], jnp.array([[0, CHUNK]], jnp.int32), positions)
        attend = paged_attend(layout, batch, decode_rows=0, max_query=CHUNK, heads=config.num_heads, layer=cache[0])
        model = bind(config, params, dtype=jnp.float32, weights=weights)
        hidden, cache = model(tokens[None], positions, attend, cache)
        logp = jax.nn.log_softmax(model.logits(hidden)[0])
        return cache, jnp.take_along_axis(logp, targets[:, None], axis=1)[:, 0]

    total = 0.0
    for text in texts:
        for start in range(0, WINDOW, CHUNK):
            targets = np.append(text[start + 1 : start + CHUNK + 1], 0)[:CHUNK]
            cache, logp = score(params, cache, text[start : start + CHUNK], targets, jnp.int32(start))
            total -= float(np.asarray(logp, np.float64)[: min(CHUNK, WINDOW - 1 - start)].sum())
    return total / (texts.size - len(texts))


def bench(path: str, count: int, runs: Sequence[str]) -> Iterator[tuple[str, float, float]]:
    """Name, perplexity and seconds of each run."""
    checkpoint = open_checkpoint(path)
    layout = decode_layout(make_mesh(MeshConfig(), jax.devices("cpu")[:1]))
    texts = windows(ChatTokenizer.from_directory(checkpoint.tokenizer_dir), count)
    for name in runs:
        started = time.perf_counter()
        run = parse_run(name)
        params = restore_params(checkpoint, layout, jnp.float32, run[0])
        loss = negative_log_likelihood(checkpoint.config, params, layout, texts, run)
        yield name, math.exp(loss), time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity with quantised weights and caches.")
    parser.add_argument("checkpoint")
    parser.add_argument("--tokens", type=int, default=20 * WINDOW)
    parser.add_argument("--runs", default=RUNS)
    args = parser.parse_args()
    print(f"Python {sys.version.split()[0]}, {args.tokens // WINDOW} windows of {WINDOW} tokens\n")
    print("| run | perplexity | change | seconds |\n|---|---|---|---|")
    exact = None
    for name, perplexity, seconds in bench(args.checkpoint, args.tokens, args.runs.split(",")):
        exact = exact or perplexity
        print(f"| {name} | {perplexity:.4f} | {perplexity / exact - 1:+.2%} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
