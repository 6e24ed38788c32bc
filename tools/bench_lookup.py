"""One stream with and without prompt lookup, beside transformers' `generate` with and without its own.

    python -m tools.smollm2_as_qwen2 SOURCE && qwq-jax convert SOURCE CHECKPOINT
    python -m tools.bench_lookup SOURCE CHECKPOINT --write docs/benchmarks/lookup.md

What lookup gains hangs on the text: so the model is a real one (random weights repeat nothing, or everything), and the
texts are real ones, docstrings of Python's standard library. A model reads each under two tasks: to give it back
corrected, which repeats most of it, and to sum it up, which repeats some words. Greedy, float32 on the CPU, one stream
at a time; completions end where the model ends them, or at `--tokens`. Only decoding counts: the time from the first
tokens to the last, without the first. All ways take turns on each text; of `--repetitions` the best is compared.
Exits with 1 if greedy tokens of the first few texts differ beyond ties.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from qwq_jax.chat import ChatTokenizer
from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.engine.engine import Engine
from qwq_jax.engine.request import Request
from qwq_jax.runtime import start
from tools.bench_engine import Stream, Workload, disagreements, load_peer, our_stream, their_stream
from tools.bench_quantization import documents

TASKS = {
    "give back corrected": "Correct the spelling and grammar of this text. Answer with the whole text only.",
    "sum up": "Sum this text up in a few sentences.",
}


@dataclass
class Way:
    """One way to draw a stream, and what each turn over all texts of a task took.

    Attributes:
        name: For the table.
        ours: Whether it is the engine.
        lookup: Tokens guessed at once; 0 for none.
        run: Draws the completion of a prompt.
        decoded: Tokens after the first ones of each turn, by task.
        seconds: What they took.
    """

    name: str
    ours: bool
    lookup: int
    run: Callable[[list[int]], Stream]
    decoded: dict[str, list[int]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def best(self, task: str) -> float:
        """Tokens a second of the best turn."""
        pairs = zip(self.decoded[task], self.seconds[task], strict=True)
        return max(tokens / seconds for tokens, seconds in pairs)


def texts(tokenizer: ChatTokenizer, count: int, shortest: int, longest: int) -> list[str]:
    """This many docstrings of between `shortest` and `longest` tokens, evenly spread over the library."""
    fitting = [text for text in documents() if shortest <= len(tokenizer.encode(text)) <= longest]
    if len(fitting) < count:
        raise SystemExit(
            f"only {len(fitting)} docstrings have {shortest} to {longest} tokens: ask for fewer than {count}"
        )
    return fitting[:: len(fitting) // count][:count]


def ways_of(options: argparse.Namespace, model: Any, ends: Sequence[int]) -> Iterator[Way]:
    """The engine and transformers, each without lookup and with each number of guesses."""
    params = SamplingParams(temperature=0.0, max_tokens=options.tokens)
    for drafts in (0, *options.drafts):
        config = EngineConfig(
            max_sequences=1, max_context=options.context, compute_dtype="float32", draft_tokens=drafts
        )
        engine = Engine.from_checkpoint(str(options.checkpoint), config=config)
        how = {"eos_token_id": list(ends), "prompt_lookup_num_tokens": drafts or None}
        name = f", prompt lookup of {drafts}" if drafts else ""
        yield Way(
            f"qwq_jax{name}",
            True,
            drafts,
            lambda prompt, engine=engine: our_stream(engine, Request("one", tuple(prompt), params)),
        )
        yield Way(
            f"transformers{name}",
            False,
            drafts,
            lambda prompt, how=how: their_stream(model, prompt, options.tokens, **how),
        )


def measure(options: argparse.Namespace) -> tuple[list[Way], list[str]]:
    """Every way once to warm up and for its tokens, and then in turns."""
    tokenizer = ChatTokenizer.from_directory(options.source)
    chosen = texts(tokenizer, options.texts, *options.sizes)
    model = load_peer(options.source)
    ways = list(ways_of(options, model, tokenizer.eos_token_ids))
    notes: list[str] = []
    for task, instruction in TASKS.items():
        prompts = [
            tokenizer.apply_template([{"role": "user", "content": f"{instruction}\n\n{text}"}]) for text in chosen
        ]
        streams = {way.name: [way.run(prompt) for prompt in prompts] for way in ways}
        for way in ways:
            answers = [stream.tokens for stream in streams[way.name]]
            wrong = disagreements(model, Workload(prompts, [len(answer) for answer in answers]), answers)
            if wrong:
                raise SystemExit(f"{way.name}: greedy tokens are not the model's: " + "; ".join(wrong))
        answers = [stream.tokens for stream in streams[ways[0].name]]
        same = sum(all(each[i].tokens == answer for each in streams.values()) for i, answer in enumerate(answers))
        sizes = f"{sum(map(len, prompts))} prompt tokens, {sum(map(len, answers))} of completions"
        notes.append(f"{task}: {len(prompts)} texts, {sizes}; all ways gave the same tokens for {same} of them")
        take_turns(ways, task, prompts, options.repetitions)
    return ways, notes


def take_turns(ways: list[Way], task: str, prompts: list[list[int]], repetitions: int) -> None:
    """Every way on each text before the next one, so that a busy minute hits all."""
    for turn in range(repetitions):
        for way in ways:
            way.decoded.setdefault(task, []).append(0)
            way.seconds.setdefault(task, []).append(0.0)
        for prompt in prompts:
            for way in ways:
                stream = way.run(prompt)
                way.decoded[task][-1] += stream.decoded
                way.seconds[task][-1] += stream.seconds
        rates = (f"{way.name} {way.decoded[task][-1] / way.seconds[task][-1]:.1f}" for way in ways)
        print(f"{task}, turn {turn}: {'; '.join(rates)} tokens/s", flush=True)


def report(options: argparse.Namespace, ways: list[Way], notes: list[str], load: float) -> str:
    """The result as markdown."""
    lines = [
        "# One stream with prompt lookup, beside transformers",
        "",
        f"    {shlex.join(['python', '-m', 'tools.bench_lookup', *options.words])}",
        "",
        f"SOURCE is SmolLM2-135M-Instruct by `tools.smollm2_as_qwen2`, float32, greedy, {os.cpu_count()} cores, torch "
        f"{torch.__version__} with",
        f"{torch.get_num_threads()} threads, transformers {transformers.__version__}; docstrings of Python's standard "
        f"library of {options.sizes[0]} to {options.sizes[1]} tokens,",
        f"completions of at most {options.tokens}, decoding alone, best of {options.repetitions} turns; load average "
        f"{load:.1f} when it began (1 a busy core).",
        "",
        f"| tokens/s | {' | '.join(TASKS)} |",
        f"|---|{'---|' * len(TASKS)}",
        *(f"| {way.name} | {' | '.join(f'{way.best(task):.1f}' for task in TASKS)} |" for way in ways),
        "",
    ]
    for task in TASKS:
        ours = max((way for way in ways if way.ours), key=lambda way: way.best(task))
        plain = next(way for way in ways if not way.ours and not way.lookup)
        theirs = max((way for way in ways if not way.ours), key=lambda way: way.best(task))
        alone = next(way for way in ways if way.ours and not way.lookup)
        best = ours.best(task)
        lines.append(
            f"- {task}: {ours.name} is {best / plain.best(task):.2f} times {plain.name}, "
            f"{best / theirs.best(task):.2f} times the best of theirs ({theirs.name}); without lookup on either side "
            f"{alone.best(task) / plain.best(task):.2f}"
        )
    return "\n".join([*lines, *(f"- {note}" for note in notes)]) + "\n"


def main() -> None:
    """Parses the command line and measures."""
    options = parse(sys.argv[1:])
    start()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    load = os.getloadavg()[0]
    text = report(options, *measure(options), load)
    print(text)
    if options.write:
        options.write.write_text(text)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a Hugging Face directory with a chat template")
    parser.add_argument("checkpoint", type=Path, help="the same model, converted")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs=2, default=(150, 350), metavar=("SHORTEST", "LONGEST"))
    parser.add_argument("--tokens", type=int, default=192, help="cap of the completions")
    parser.add_argument("--context", type=int, default=1024, help="longest prompt and completion")
    parser.add_argument("--drafts", type=int, nargs="+", default=[3, 7, 15], help="guesses at once, of both")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch")
    parser.add_argument("--write", type=Path, help="a markdown file")
    options = parser.parse_args(arguments)
    options.words = list(arguments)
    return options


if __name__ == "__main__":
    main()
