"""The whole story on the embedded model: convert, answer held-out problems on a mesh, mark them, hand it back."""

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape

from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.embedded import TINY_REASONER
from qwq_jax.jobs.convert import convert
from qwq_jax.jobs.export import export
from qwq_jax.jobs.generate import generate
from qwq_jax.rl.rewards.arithmetic import Problem, Split, is_correct, problems

PROBLEMS = 128
LEVELS = (1, 2, 3)  # those that the embedded model was trained on
SHOWN = 3
SAMPLING = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 256}
ENGINE = EngineConfig(
    max_sequences=16, page_size=16, max_context=512, prefill_chunk=128, max_prefill_sequences=4, compute_dtype="float32"
)


def demo(output: Path, *, count: int = PROBLEMS) -> None:
    """Runs the demo; what it makes stays in `output`, and a second run continues the first.

    Args:
        output: Directory for the checkpoint, the problems, the answers and the exported model.
        count: Number of problems.

    Raises:
        ValueError: `output` holds something else, or cannot be written to.
    """
    console = Console(highlight=False)
    checkpoint, exported = output / "checkpoint", output / "exported"
    asked, answered = output / "problems.jsonl", output / "answers.jsonl"
    output.mkdir(parents=True, exist_ok=True)

    console.rule("1. Hugging Face weights to an Orbax checkpoint")
    convert(str(TINY_REASONER), str(checkpoint))

    mesh = mesh_of(jax.device_count())
    console.rule(f"2. {count} held-out problems on a mesh of {mesh.data} x {mesh.tensor} devices (data x tensor)")
    questions = held_out_problems(count)
    asked.write_text("".join(json.dumps(line) + "\n" for line in request_lines(questions)))
    started = time.perf_counter()
    report = generate(str(checkpoint), asked, answered, engine=ENGINE, mesh=mesh)
    seconds = time.perf_counter() - started

    console.rule("3. Its answers")
    answers = [json.loads(line)["response"]["body"] for line in answered.read_text().splitlines()]
    marks = [is_correct(reply_text(body), each.answer) for each, body in zip(questions, answers, strict=True)]
    for problem, body in itertools.islice(zip(questions, answers, strict=True), SHOWN):
        show(console, problem, body)
    console.print(f"[bold]{sum(marks)} of {len(marks)} right ({sum(marks) / len(marks):.0%})[/bold]")
    tokens = report.generated_tokens
    if tokens:
        rate = f"{tokens / seconds:.0f} tokens/s, loading and compiling included"
        console.print(f"{tokens} tokens in {seconds:.1f} s: {rate}")

    console.rule("4. Back to Hugging Face")
    export(str(checkpoint), str(exported))
    console.print("Everything is here:")
    for path in (checkpoint, asked, answered, exported):
        console.print(f"  {path}")


def mesh_of(devices: int) -> MeshConfig:
    """Half the devices' worth of data parallelism at most: the widest tensor axis up to 4, the rest data."""
    tensor = next(size for size in (4, 2, 1) if devices % size == 0)
    return MeshConfig(data=devices // tensor, tensor=tensor)


def held_out_problems(count: int) -> list[Problem]:
    """Problems that the embedded model was not trained on; always the same ones."""
    return list(itertools.islice(problems(2026, split=Split.HELD_OUT, levels=LEVELS), count))


def request_lines(questions: Sequence[Problem]) -> list[dict[str, Any]]:
    """One OpenAI batch line a problem."""
    return [
        {
            "custom_id": f"problem-{index}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": problem.messages()[:1], "seed": index, **SAMPLING},
        }
        for index, problem in enumerate(questions)
    ]


def reply_text(body: dict[str, Any]) -> str:
    """Thoughts and answer of a response, as the model wrote them."""
    message = body["choices"][0]["message"]
    return f"{message['reasoning_content'] or ''}</think>{message['content'] or ''}"


def show(console: Console, problem: Problem, body: dict[str, Any]) -> None:
    """Prints a problem, the thoughts dimmed, and the answer with its mark."""
    message = body["choices"][0]["message"]
    mark = "[green]right[/green]" if is_correct(reply_text(body), problem.answer) else "[red]wrong[/red]"
    console.print(f"[bold]{escape(problem.question)}[/bold]")
    console.print(f"[dim]{escape((message['reasoning_content'] or '').strip())}[/dim]")
    console.print(f"{escape((message['content'] or '').strip())}  ({mark}, it is {problem.answer})\n")
