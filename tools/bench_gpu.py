"""The shape of QwQ-32B on one GPU: our decoding and training beside transformers and PEFT, same weights, one process.

    XLA_PYTHON_CLIENT_PREALLOCATE=false python -m tools.bench_gpu --write docs/benchmarks/gpu.md
    python -m tools.bench_gpu --device cpu --tiny --steps 2

The project is for TPUs, whose kernels do not run here: attention is XLA's own. What a GPU shows is that the real sizes
run, that logits agree with transformers' in bfloat16, and what engine and training loop make of a real accelerator.
Weights are random: drawn once by torch, handed to JAX when torch is done with them, so that one copy has to fit.
Ragged requests are greedy, and none ends early. Training is of LoRA adapters, one document a row.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.load import load_toml
from qwq_jax.config.lora import LoraConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.train import OptimizerConfig
from qwq_jax.engine.engine import Engine
from qwq_jax.engine.runner import DeviceRunner
from qwq_jax.model.attention import causal_attend
from qwq_jax.model.lora import random_adapters
from qwq_jax.model.params import Params, bind, unstack
from qwq_jax.runtime import start
from qwq_jax.sft.loss import make_sft_loss
from qwq_jax.sharding import Layout, decode_layout, make_mesh, train_layout
from qwq_jax.train.batch import place_batch
from qwq_jax.train.optimizer import make_optimizer, make_schedule
from qwq_jax.train.packing import Segment, fill_rows
from qwq_jax.train.state import init_state
from qwq_jax.train.step import make_train_step
from tools import gpu_peer
from tools.bench_engine import Workload, generate_batches, make_workload, our_decode_rate, serve, their_decode_rate

ROOT = Path(__file__).parents[1]
CHECKED_TOKENS = 128
LEARNING_RATE = 1e-4


@dataclass
class Measured:
    """What one side did.

    Attributes:
        served: Wanted tokens a second of the ragged requests.
        stream: Tokens a second of one stream.
        losses: Of the steps of training.
        step: Seconds of the quickest step.
        peak: Most bytes while it trained; None where nobody knows.
        compiled: Seconds of compiling, by what was compiled.
    """

    served: float = 0.0
    stream: float = 0.0
    losses: list[float] = field(default_factory=list)
    step: float = 0.0
    peak: int | None = None
    compiled: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """What is measured, and on what.

    Attributes:
        config: The architecture.
        options: Of the command line.
        work: Requests.
        rows: Tokens to train on, `[A, B, T + 1]`.
        checked: Tokens `[1, S]` of which logits are compared.
    """

    config: ModelConfig
    options: argparse.Namespace
    work: Workload
    rows: np.ndarray
    checked: np.ndarray

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Bench":
        """Draws prompts and rows."""
        config = load_toml(ROOT / "configs/models/qwq-32b.toml", ModelConfig)
        small = {"vocab_size": 512, "hidden_size": 80, "num_heads": 10, "num_kv_heads": 2, "head_dim": 8}
        small |= {"intermediate_size": 96, "eos_token_ids": (0,), "bos_token_id": 0, "pad_token_id": 0}
        config = config.model_copy(update={"num_layers": options.layers, **(small if options.tiny else {})})
        rng = np.random.default_rng(0)
        shape = (options.accumulation, options.rows, options.row_length + 1)
        work = make_workload(options.requests, config.vocab_size, prompt=options.prompt, longest=options.longest)
        checked = rng.integers(1, config.vocab_size, (1, CHECKED_TOKENS))
        return cls(config, options, work, rng.integers(1, config.vocab_size, shape), checked)

    @property
    def stream(self) -> tuple[list[int], int]:
        """Prompt and length of the single stream."""
        return self.work.renewed(7, self.config.vocab_size).prompts[0], self.options.stream


def measure_peer(bench: Bench, model: Any) -> Measured:
    """Speed, losses and memory of transformers and PEFT."""
    options, found = bench.options, Measured()
    vocab = bench.config.vocab_size
    generate_batches(model, Workload(bench.work.prompts, [2] * options.requests), options.batch, "arrival")
    began = time.perf_counter()
    generate_batches(model, bench.work.renewed(1, vocab), options.batch, "arrival")
    found.served = bench.work.tokens / (time.perf_counter() - began)
    say(f"transformers: {found.served:.1f} tokens/s")
    found.stream = max(their_decode_rate(model, *bench.stream) for _ in range(2))
    say(f"transformers, one stream: {found.stream:.1f} tokens/s")
    gpu_peer.peak_bytes(options.device)
    found.losses, seconds = gpu_peer.lora_steps(
        model, bench.rows, rank=options.rank, learning_rate=LEARNING_RATE, steps=options.steps, device=options.device
    )
    found.step, found.peak = min(seconds), gpu_peer.peak_bytes(options.device)
    say(f"PEFT: steps of {', '.join(f'{x:.2f}' for x in seconds)} s, losses {found.losses}")
    return found


def our_logits(bench: Bench, params: Params, layout: Layout) -> np.ndarray:
    """As `gpu_peer.logits_of`, of stacked parameters."""

    def run(params: Params, tokens: jax.Array) -> jax.Array:
        model = bind(bench.config, params, dtype=bench.options.dtype)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = model(tokens, positions, causal_attend(None, layout), layout=layout)
        return model.logits(hidden)

    return np.asarray(jax.jit(run)(params, jnp.asarray(bench.checked, jnp.int32)))


def train_ours(bench: Bench, params: Params, layout: Layout, found: Measured) -> None:
    """Steps of `qwq-jax sft` with adapters, as `gpu_peer.lora_steps` makes them; fills `found` in."""
    options, lora = bench.options, LoraConfig(rank=bench.options.rank, alpha=float(bench.options.rank))
    loss = make_sft_loss(bench.config, layout, compute_dtype=options.dtype, logprob_chunk=512, remat=True, lora=lora)
    settings = OptimizerConfig(learning_rate=LEARNING_RATE, final_lr_ratio=1.0)
    optimizer = make_optimizer(settings, schedule=make_schedule(settings, steps=options.steps))
    state = init_state(random_adapters(bench.config, lora, jax.random.key(0), layout), optimizer)
    step = make_train_step(loss, optimizer, shardings=jax.tree.map(lambda x: x.sharding, state))
    accumulation, rows, length = bench.rows.shape
    trained = np.arange(length) > 0
    segments = [[Segment(row.astype(np.int32), trained)] for row in bench.rows.reshape(-1, length)]
    packed = fill_rows(segments, row_length=length - 1)
    batch = place_batch(packed, accumulation=accumulation, layout=layout)
    began = time.perf_counter()
    compiled = step.lower(state, batch, params).compile()  # pyright: ignore[reportAttributeAccessIssue]
    found.compiled["a step of training"] = time.perf_counter() - began
    memory = compiled.memory_analysis()
    found.peak = int(memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes)
    found.peak -= int(memory.alias_size_in_bytes)
    seconds = []
    for _ in range(options.steps):
        began = time.perf_counter()
        state, metrics = compiled(state, batch, params)
        found.losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - began)
    found.step = min(seconds)
    say(f"qwq_jax: steps of {', '.join(f'{x:.2f}' for x in seconds)} s, losses {found.losses}; {rows} rows")


def serve_ours(bench: Bench, stacked: Params, layout: Layout, found: Measured) -> None:
    """The engine on the same weights; `stacked` is emptied. Fills `found` in."""
    options, params = bench.options, Params()
    for name in list(stacked):
        params |= unstack({name: jax.block_until_ready(stacked.pop(name))}, bench.config.num_layers)
        jax.block_until_ready(params)
        gpu_peer.forget(options.device)
    params = {name: jax.device_put(x, layout.sharding((None,) * x.ndim)) for name, x in params.items()}
    for name, rows in (("the engine's programs", options.batch), ("those of one stream", 1)):
        config = EngineConfig(
            max_sequences=rows,
            page_size=128,
            max_context=-(-(options.prompt + max(options.longest, options.stream)) // 128) * 128,
            prefill_chunk=options.chunk,
            compute_dtype=options.dtype,
        )
        runner = DeviceRunner(bench.config, params, layout, config)
        engine = Engine(runner, bench.config.vocab_size, ())
        began = time.perf_counter()
        programs = engine.warm_up(lambda done, total: say(f"{done} of {total} programs"))
        found.compiled[f"{name}, {programs}"] = time.perf_counter() - began
        if rows == 1:
            found.stream = max(our_decode_rate(engine, *bench.stream) for _ in range(2))
            say(f"qwq_jax, one stream: {found.stream:.1f} tokens/s")
        else:
            serve(engine, Workload(bench.work.prompts, [2] * options.requests))
            work = bench.work.renewed(1, bench.config.vocab_size)
            began = time.perf_counter()
            serve(engine, work)
            found.served = work.tokens / (time.perf_counter() - began)
            say(f"qwq_jax: {found.served:.1f} tokens/s")
        runner.release()
        del engine, runner


def compare(theirs: np.ndarray, ours: np.ndarray, eager: np.ndarray) -> list[str]:
    """How far logits lie apart, and as a measure two attentions of transformers' own.

    Raises:
        SystemExit: Further than three times that.
    """
    scale = theirs.std()
    apart, rounding = (float(np.abs(x - theirs).mean() / scale) for x in (ours, eager))
    agree = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    agree_eager = float((eager.argmax(-1) == theirs.argmax(-1)).mean())
    text = (
        f"logits of {theirs.shape[1]} tokens: mean distance from transformers' {apart:.2%} of their deviation, the "
        f"same likeliest token in {agree:.1%}; between transformers' own two attentions (eager, sdpa) {rounding:.2%} "
        f"and {agree_eager:.1%}"
    )
    say(text)
    if apart > 3 * max(rounding, 1e-5):
        raise SystemExit(f"not the same model: {text}")
    return [text]


def measure(bench: Bench) -> tuple[Measured, Measured, list[str]]:
    """First transformers, then ours on its weights."""
    options = bench.options
    flops, bandwidth = gpu_peer.peaks(options.device, (256, 2**20) if options.tiny else (8192, 2**30))
    say(f"torch here: {flops / 1e12:.1f} TFLOP/s, {bandwidth / 1e12:.3f} TB/s")
    model = gpu_peer.random_model(bench.config, options.dtype, options.device)
    size = sum(parameter.numel() for parameter in model.parameters())
    say(f"{size / 1e9:.2f} B parameters")
    theirs = gpu_peer.logits_of(model, bench.checked)
    model.set_attn_implementation("eager")
    eager = gpu_peer.logits_of(model, bench.checked)
    model.set_attn_implementation("sdpa")
    peer = measure_peer(bench, model)
    layout, ours = train_layout(make_mesh(MeshConfig())), Measured()
    params = gpu_peer.take_weights(model, bench.config, layout, options.device)
    del model
    gpu_peer.forget(options.device)
    notes = compare(theirs, our_logits(bench, params, layout), eager)
    train_ours(bench, params, layout, ours)
    serve_ours(bench, params, decode_layout(layout.mesh), ours)
    # A decode step reads all weights but the embedding's rows of other tokens.
    read = 2 * (size - bench.config.vocab_size * bench.config.hidden_size)
    # Forward, forward again, and the gradients of activations: weights themselves have none.
    products = 6 * (size - bench.config.vocab_size * bench.config.hidden_size) * bench.rows[..., 1:].size
    for name, side in (("transformers", peer), ("qwq_jax", ours)):
        share, rate = read * side.stream / bandwidth, products / side.step
        notes.append(
            f"{name}: one stream reads weights at {share:.0%} of torch's copies ({bandwidth / 1e12:.2f} TB/s); "
            f"training multiplies at {rate / flops:.0%} of torch's products ({flops / 1e12:.0f} TFLOP/s), what is "
            "computed again counted and attention not"
        )
    notes.append("compiled: " + ", ".join(f"{name} in {seconds:.0f} s" for name, seconds in ours.compiled.items()))
    return peer, ours, notes


def report(bench: Bench, peer: Measured, ours: Measured, notes: list[str]) -> str:
    """The result as markdown."""
    options, tokens = bench.options, bench.rows[..., 1:].size
    device = jax.devices()[0].device_kind
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, jax {jax.__version__}"
    memory = [f"{side.peak / 1e9:.1f}" if side.peak else "-" for side in (peer, ours)]
    return "\n".join([
        f"# The shape of QwQ-32B on one {device}",
        "",
        f"    {shlex.join(['python', '-m', 'tools.bench_gpu', *options.words])}",
        "",
        f"{bench.config.num_layers} layers, {options.dtype}, random weights, the same on both sides; {versions}.",
        f"{options.requests} requests with prompts of 16 to {options.prompt} tokens and log-normal completions (median "
        f"64, at most {options.longest}),",
        f"{options.batch} at a time; one stream of {options.stream} tokens, decoding alone; adapters of rank "
        f"{options.rank} trained on {tokens:,} tokens a step, rows of {options.row_length}, activations computed "
        "again.",
        "",
        "| | transformers, PEFT | qwq_jax | ratio |",
        "|---|---|---|---|",
        f"| batch, tokens/s | {peer.served:.1f} | {ours.served:.1f} | {ours.served / peer.served:.2f} |",
        f"| one stream, tokens/s | {peer.stream:.1f} | {ours.stream:.1f} | {ours.stream / peer.stream:.2f} |",
        f"| LoRA, tokens/s | {tokens / peer.step:,.0f} | {tokens / ours.step:,.0f} | {peer.step / ours.step:.2f} |",
        f"| LoRA, GB (torch's peak, the compiler's plan) | {memory[0]} | {memory[1]} | |",
        f"| loss of the first step | {peer.losses[0]:.4f} | {ours.losses[0]:.4f} | |",
        "",
        *(f"- {note}" for note in notes),
        "- torch runs without `torch.compile`; static batches run until their longest row ends, and only wanted tokens "
        "count",
    ]) + "\n"  # fmt: skip


def say(text: str) -> None:
    """Shows how far it is."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="narrow layers, for tests")
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64, help="requests at a time, of both")
    parser.add_argument("--prompt", type=int, default=512, help="longest prompt")
    parser.add_argument("--longest", type=int, default=256, help="cap of the completions")
    parser.add_argument("--chunk", type=int, default=1024, help="prompt tokens of a step of the engine")
    parser.add_argument("--stream", type=int, default=96, help="tokens of the single stream")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--rows", type=int, default=2, help="of a micro-batch")
    parser.add_argument("--row-length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--write", type=Path, help="a markdown file")
    options = parser.parse_args(arguments)
    options.words = list(arguments)
    return options


def main() -> None:
    """Measures and reports."""
    options = parse(sys.argv[1:])
    start()
    transformers.logging.set_verbosity_error()
    bench = Bench.of(options)
    text = report(bench, *measure(bench))
    print(text)
    if options.write:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
