"""Speed of the engine beside transformers' `generate`: same checkpoint, prompts and lengths, one process, greedy.

    python -m tools.bench_engine --write docs/benchmarks/engine.md
    python -m tools.bench_engine --tiny --requests 6 --repetitions 1 --batches 1 4

A random model of the shape of SmolLM2-135M in the Qwen2 architecture, float32, on the CPU, or with ``--device cuda
--dtype bfloat16`` on a GPU that torch and JAX share (``XLA_PYTHON_CLIENT_PREALLOCATE=false``). Prompts are ragged and
completions of log-normal lengths; each turn has prompts of its own. A static batch of transformers runs until the
longest of its rows ends, and only wanted tokens count; transformers' continuous batching takes each request's own
length. Repetitions are interleaved, because machines are noisy; what is compared is each one's best. Exits with 1 if
greedy tokens differ beyond ties.
On a busy machine torch's threads wait for each other at every operation: give it `--threads 1` there as well.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from transformers.generation import ContinuousBatchingConfig

from qwq_jax.checkpoint.names import name_table
from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.engine.engine import Engine
from qwq_jax.engine.request import Request
from qwq_jax.jobs.convert import convert
from qwq_jax.runtime import start

PROMPT = 512
MEDIAN_LENGTH, SIGMA, LONGEST = 64, 0.8, 512
CONTEXT = 1024
CHECKED = 4
# Logits of two implementations differ in float32's fifth digit, and in bfloat16's second: of deviation 1, tokens this
# near are as good as equal (0.19 apart were seen after 47 tokens of their own).
NEAR_TIE = {"float32": 1e-3, "bfloat16": 0.3}
START_TARGET = 10.0
# How a static batch may be filled. What a completion's length will be nobody knows; a peer that did would do best.
ORDERS = {"arrival": "", "prompt": ", sorted by prompts", "oracle": ", sorted by completions to come"}


@dataclass(frozen=True)
class Workload:
    """Prompts, and how many tokens each is answered with."""

    prompts: list[list[int]]
    lengths: list[int]

    @property
    def tokens(self) -> int:
        """Tokens wanted."""
        return sum(self.lengths)

    def renewed(self, turn: int, vocab_size: int) -> "Workload":
        """The same sizes with other tokens: what an engine still holds of an earlier turn must not help it."""
        return Workload([[1 + (t + turn) % (vocab_size - 1) for t in prompt] for prompt in self.prompts], self.lengths)


@dataclass
class Runner:
    """One way to serve the workload of a turn, and the seconds that each repetition took.

    One that `foresees` knows how long completions will be before they are drawn; it bounds what an order could give.
    """

    name: str
    run: Callable[[Workload], None]
    work: Workload
    foresees: bool = False
    seconds: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        """Tokens a second of the best repetition."""
        return self.work.tokens / min(self.seconds)

    @property
    def median(self) -> float:
        """Tokens a second of the median repetition."""
        return self.work.tokens / float(np.median(self.seconds))


@dataclass(frozen=True)
class Stream:
    """What one stream brought: its tokens, how many came at first, and the seconds from those to the last."""

    tokens: tuple[int, ...]
    first: int
    seconds: float

    @property
    def decoded(self) -> int:
        """Tokens after the first ones."""
        return len(self.tokens) - self.first

    @property
    def rate(self) -> float:
        """Tokens a second of decoding alone."""
        return self.decoded / self.seconds


def config_of(layers: int, tiny: bool) -> ModelConfig:
    """SmolLM2-135M as a Qwen2 model with this many layers; or one for tests."""
    return ModelConfig(
        vocab_size=512 if tiny else 49_152,
        hidden_size=72 if tiny else 576,
        num_layers=layers,
        num_heads=9,
        num_kv_heads=3,
        head_dim=8 if tiny else 64,
        intermediate_size=192 if tiny else 1536,
        rope_theta=100_000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        eos_token_ids=(0,),
    )


def make_source(folder: Path, config: ModelConfig, seed: int = 0) -> None:
    """A Hugging Face directory of random float32 weights; deviation 1/sqrt(D), so that layers matter to the output."""
    rng = np.random.default_rng(seed)
    deviation = np.float32(config.hidden_size**-0.5)
    tensors = {
        row.source: np.ones(row.source_shape, np.float32)
        if "norm" in row.source
        else rng.standard_normal(row.source_shape, np.float32) * deviation
        for row in name_table(config)
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_huggingface("float32")))


def make_workload(
    requests: int, vocab_size: int, *, prompt: int = PROMPT, longest: int = LONGEST, seed: int = 0
) -> Workload:
    """Prompts of 16 tokens to this many, uniform; lengths log-normal and capped."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(16, prompt + 1, requests)
    lengths = np.clip(rng.lognormal(np.log(MEDIAN_LENGTH), SIGMA, requests).astype(int), 1, longest)
    return Workload([rng.integers(1, vocab_size, size).tolist() for size in sizes], lengths.tolist())


def request_of(name: str, prompt: list[int], length: int) -> Request:
    """A greedy request of exactly this many tokens."""
    return Request(name, tuple(prompt), SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True))


def serve(engine: Engine, work: Workload) -> list[tuple[int, ...]]:
    """Our side: the completions in the order of the requests."""
    requests = [request_of(str(i), *pair) for i, pair in enumerate(zip(work.prompts, work.lengths, strict=True))]
    done = {completion.request_id: completion.token_ids for completion in engine.generate(requests)}
    found = [done[str(i)] for i in range(len(requests))]
    assert [len(tokens) for tokens in found] == work.lengths, "lengths are forced"
    return found


def padded(prompts: list[list[int]], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask


def generate_batches(model: Any, work: Workload, size: int, order_by: str) -> None:
    """Runs transformers in static batches, in one of `ORDERS`."""
    order = list(range(len(work.prompts)))
    if order_by == "prompt":
        order.sort(key=lambda i: len(work.prompts[i]))
    elif order_by == "oracle":
        order.sort(key=lambda i: work.lengths[i])
    for begin in range(0, len(order), size):
        chosen = order[begin : begin + size]
        ids, mask = padded([work.prompts[i] for i in chosen], model.device)
        longest = max(work.lengths[i] for i in chosen)
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=longest, min_new_tokens=longest, pad_token_id=0
        )
        assert out.cpu().shape[1] == ids.shape[1] + longest


def generate_continuously(model: Any, work: Workload) -> None:
    """Runs transformers' continuous batching, each request with its own length."""
    generation = transformers.GenerationConfig(do_sample=False, max_new_tokens=LONGEST, eos_token_id=-1, pad_token_id=0)
    blocks = ContinuousBatchingConfig(page_size=32, num_blocks=2048, max_batch_tokens=256)
    manager = model.init_continuous_batching(generation_config=generation, continuous_batching_config=blocks)
    manager.start()
    try:
        for prompt, length in zip(work.prompts, work.lengths, strict=True):
            manager.add_request(prompt, max_new_tokens=length, eos_token_id=-1)
        tokens = 0
        for _ in work.prompts:
            result = None
            while result is None or not result.is_finished():
                result = manager.get_result(timeout=5)
                if result is None and not manager.is_running():
                    raise RuntimeError("its thread ended")
            if result.error is not None:
                raise RuntimeError(result.error)
            tokens += len(result.generated_tokens)
        if tokens != work.tokens:
            raise RuntimeError(f"it made {tokens} tokens of {work.tokens}")
    finally:
        manager.stop(block=True)


def our_stream(engine: Engine, request: Request) -> Stream:
    """One request served alone."""
    engine.add(request)
    found: list[int] = []
    first, begun, ended = 0, 0.0, 0.0
    while engine.busy:
        new = [token.token.token_id for token in engine.step().tokens]
        if new:
            found += new
            ended = time.perf_counter()
            if not first:
                first, begun = len(new), ended
    return Stream(tuple(found), first, ended - begun)


def their_stream(model: Any, prompt: list[int], limit: int, **how: Any) -> Stream:
    """The same of transformers, `how` as `generate` takes it: a criterion that never stops sees when tokens come."""
    seen: list[tuple[int, float]] = []

    def note(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        seen.append((ids.shape[1] - len(prompt), time.perf_counter()))
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    ids, mask = padded([prompt], model.device)
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=limit,
        pad_token_id=0,
        stopping_criteria=transformers.StoppingCriteriaList([note]),  # pyright: ignore[reportArgumentType]
        **how,
    )
    (first, begun), (_, ended) = seen[0], seen[-1]
    return Stream(tuple(out[0, len(prompt) :].tolist()), first, ended - begun)


def our_decode_rate(engine: Engine, prompt: list[int], length: int) -> float:
    """Tokens a second after the first step that gave any, of a single stream of exactly this many."""
    return our_stream(engine, request_of("one", prompt, length)).rate


def their_decode_rate(model: Any, prompt: list[int], length: int) -> float:
    """The same of transformers."""
    return their_stream(model, prompt, length, min_new_tokens=length).rate


def disagreements(model: Any, work: Workload, ours: list[tuple[int, ...]]) -> list[str]:
    """Where greedy tokens differ and it was no near tie, among the first requests."""
    found: list[str] = []
    for i in range(min(CHECKED, len(ours))):
        ids = torch.tensor([work.prompts[i] + list(ours[i])], device=model.device)
        with torch.no_grad():
            logits = model(ids).logits[0, len(work.prompts[i]) - 1 : -1].float().cpu().numpy()
        # Each of our tokens must be the likeliest after the ones before it, which are ours too.
        gaps = logits.max(-1) - logits[np.arange(len(ours[i])), list(ours[i])]
        if gaps.max() > NEAR_TIE[str(model.dtype).removeprefix("torch.")]:
            found.append(f"request {i}: token {int(gaps.argmax())} is {gaps.max():.4f} below the likeliest")
    return found


def first_token(checkpoint: str, dtype: Any) -> None:
    """What a warm start is measured on: one request, up to its first token."""
    start()
    engine = Engine.from_checkpoint(checkpoint, config=engine_config(1, dtype))
    tokens = next(engine.stream(request_of("one", list(range(1, 129)), 8)))
    print("TOKEN", tokens.token.token_id, flush=True)


def seconds_to_first_token(checkpoint: str, dtype: str) -> float:
    """From the start of a process to its first token; the first of two processes fills the compile cache."""
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        command = [sys.executable, "-m", "tools.bench_engine", "--first-token", checkpoint, "--dtype", dtype]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            if not any(line.startswith("TOKEN") for line in process.stdout):
                raise SystemExit("the process that measures a warm start failed")
            seconds = time.perf_counter() - began
    return seconds


def engine_config(rows: int, dtype: Any) -> EngineConfig:
    """The engine as it is measured."""
    return EngineConfig(max_sequences=rows, max_context=CONTEXT, compute_dtype=dtype)


def measure(options: argparse.Namespace, folder: Path) -> tuple[list[Runner], list[str]]:
    """Runs everything once to warm up, and then in turns; also says what is worth saying."""
    config = config_of(options.layers, options.tiny)
    make_source(folder / "source", config)
    convert(str(folder / "source"), str(folder / "checkpoint"))
    work = make_workload(options.requests, config.vocab_size, prompt=options.prompt, longest=options.longest)
    model = load_peer(folder / "source", options.dtype, options.device)
    engine = Engine.from_checkpoint(str(folder / "checkpoint"), config=engine_config(options.rows, options.dtype))
    wrong = disagreements(model, work, serve(engine, work))
    if wrong:
        raise SystemExit("greedy tokens differ from transformers': " + "; ".join(wrong))
    notes = [f"greedy tokens of {min(CHECKED, options.requests)} requests checked: each the likeliest of transformers'"]
    runners = [Runner("qwq_jax", lambda fresh: ignore(serve(engine, fresh)), work)]
    for size in options.batches:
        for order in options.orders if size > 1 else ("arrival",):
            name = f"transformers, batches of {size}{ORDERS[order]}"
            part = Workload(work.prompts[: options.single], work.lengths[: options.single]) if size == 1 else work
            run = lambda fresh, size=size, order=order: generate_batches(model, fresh, size, order)  # noqa: E731
            runners.append(Runner(name, run, part, foresees=order == "oracle"))
    # Of its own, because it changes the model's attention.
    other = load_peer(folder / "source", options.dtype, options.device)
    continuous = Runner("transformers, continuous batching", partial(generate_continuously, other), work)
    refused = None if options.no_continuous else attempt(continuous)
    runners += [] if refused or options.no_continuous else [continuous]
    notes += [f"transformers' continuous batching does not run here: {refused}"] if refused else []
    notes += ["transformers' continuous batching was left out"] if options.no_continuous else []
    take_turns(runners, options.repetitions, config.vocab_size)
    small = Engine.from_checkpoint(str(folder / "checkpoint"), config=engine_config(1, options.dtype))
    notes.append(single_stream(small, model, config.vocab_size, (min(128, options.prompt), options.stream)))
    if not options.no_start:
        seconds = seconds_to_first_token(str(folder / "checkpoint"), options.dtype)
        late = "" if seconds < START_TARGET else f" (target: {START_TARGET:.0f})"
        notes.append(f"first token {seconds:.1f} s after the start of a process with a full compile cache{late}")
    return runners, notes


def ignore(_: Any) -> None:
    """Makes a call's result nobody's business."""


def attempt(runner: Runner) -> str | None:
    """Runs what may not run on this machine; the reason why not, or None."""
    try:
        runner.run(runner.work)
    except (RuntimeError, ValueError, ImportError, NotImplementedError, TypeError, KeyError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def take_turns(runners: list[Runner], repetitions: int, vocab_size: int) -> None:
    """Each runner once a turn, so that a busy minute hits all."""
    for turn in range(repetitions):
        for runner in runners:
            work = runner.work.renewed(turn + 1, vocab_size)
            began = time.perf_counter()
            runner.run(work)
            runner.seconds.append(time.perf_counter() - began)
            print(f"turn {turn} {runner.name}: {work.tokens / runner.seconds[-1]:.1f} tokens/s", flush=True)


def single_stream(engine: Engine, model: Any, vocab_size: int, sizes: tuple[int, int]) -> str:
    """Decoding alone, in turns, best of three after one to warm up; `sizes` of the prompt and the completion."""
    width, length = sizes
    prompt = np.random.default_rng(1).integers(1, vocab_size, width).tolist()
    pairs = [(our_decode_rate(engine, prompt, length), their_decode_rate(model, prompt, length)) for _ in range(4)]
    ours, theirs = (max(rates) for rates in zip(*pairs[1:], strict=True))
    return (
        f"single stream, decoding alone after a prompt of {width}: qwq_jax {ours:.1f} tokens/s, transformers "
        f"{theirs:.1f}: {ours / theirs:.2f} times"
    )


def load_peer(source: Path, dtype: str = "float32", device: str = "cpu") -> Any:
    """The model of transformers, without an end token."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="sdpa")
    model.to(torch.device(device)).eval()  # pyright: ignore[reportArgumentType]
    model.generation_config.eos_token_id = None
    return model


def report(options: argparse.Namespace, runners: list[Runner], notes: list[str], load: float) -> str:
    """The result as markdown."""
    ours, peers = runners[0], [runner for runner in runners[1:] if not runner.foresees]
    best = max(peers, key=lambda runner: runner.best)
    foreseeing = [runner for runner in runners if runner.foresees]
    place = "a CPU" if options.device == "cpu" else f"an {torch.cuda.get_device_name()}"
    bound = max(foreseeing, key=lambda runner: runner.best, default=None)
    lines = [
        f"# The engine beside transformers, on {place}",
        "",
        f"    {shlex.join(['python', '-m', 'tools.bench_engine', *options.words])}",
        "",
        f"A random Qwen2 model of the shape of SmolLM2-135M ({options.layers} layers, {options.dtype}), "
        f"{options.requests} requests with prompts of 16 to {options.prompt} tokens",
        f"and log-normal completions (median {MEDIAN_LENGTH}, sigma {SIGMA}, at most {options.longest}), greedy, "
        f"{os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads, transformers "
        f"{transformers.__version__},",
        f"{options.repetitions} repetitions in turns; load average {load:.1f} when it began (1 a busy core).",
        "Static batches run until their longest row ends, and only wanted tokens count"
        + (f"; those of 1 are measured on the first {options.single} requests." if 1 in options.batches else "."),
        "",
        "| | tokens/s, best | median | qwq_jax over it |",
        "|---|---|---|---|",
        *(f"| {r.name} | {r.best:.1f} | {r.median:.1f} | {ours.best / r.best:.2f} |" for r in runners),
        "",
        f"- best peer: {best.name}; qwq_jax is {ours.best / best.best:.2f} times as fast",
        *(
            [f"- batches filled by lengths that nobody knows beforehand would be at {ours.best / bound.best:.2f}"]
            if bound
            else []
        ),
        *(f"- {note}" for note in notes),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parses the command line and measures."""
    options = parse(sys.argv[1:])
    if options.first_token:
        first_token(options.first_token, options.dtype)
        return
    start()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        runners, notes = measure(options, options.workdir or Path(temporary))
    text = report(options, runners, notes, load)
    print(text)
    if options.write:
        options.write.write_text(text)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="narrow model, for tests")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of torch; JAX takes the best it has")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=PROMPT, help="longest prompt")
    parser.add_argument("--longest", type=int, default=LONGEST, help="cap of the completions")
    parser.add_argument("--rows", type=int, default=64, help="max_sequences of the engine")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--single", type=int, default=8, help="requests that batches of 1 are measured on")
    parser.add_argument("--stream", type=int, default=128, help="tokens of the single stream")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch")
    parser.add_argument("--no-continuous", action="store_true", help="leave transformers' continuous batching out")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS), help="of requests in batches")
    parser.add_argument("--no-start", action="store_true", help="leave the warm start out")
    parser.add_argument("--write", type=Path, help="a markdown file")
    parser.add_argument("--workdir", type=Path, help="where the model is put and left; else somewhere temporary")
    parser.add_argument("--first-token", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.words = list(arguments)
    return options


if __name__ == "__main__":
    main()
