"""Load on a server: requests a second, time to the first token, time between tokens, and who was turned away.

    python tools/bench_serve.py --url http://localhost:8000 --requests 512 --concurrency 64

Without a URL it serves the embedded model, on this machine and for as long as it takes. Each of the `--concurrency`
clients streams one answer after the other; one that is told 429 waits as long as it is told, and asks again.
"""

import argparse
import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
from rich.console import Console
from rich.table import Table

from qwq_jax.embedded import TINY_REASONER
from qwq_jax.jobs.convert import convert


@dataclass
class Measured:
    """What the clients saw, in seconds and tokens."""

    answered: int = 0
    refused: int = 0
    failed: int = 0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Load:
    """What is asked.

    Attributes:
        url: Of the server, without `/v1`.
        requests: How many in all.
        concurrency: How many at once.
        max_tokens: Longest answer.
        key: API key.
    """

    url: str
    requests: int
    concurrency: int
    max_tokens: int
    key: str | None


async def ask(session: aiohttp.ClientSession, load: Load, number: int, seen: Measured) -> None:
    """One request until it is answered or has failed."""
    question = f"What is {number % 90 + 10} + {number * 7 % 90 + 10}?"
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": load.max_tokens,
        "temperature": 0.6,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    while True:
        started = time.perf_counter()
        async with session.post(f"{load.url}/v1/chat/completions", json=body) as response:
            if response.status == 200:
                await read(response, started, seen)
                return
            if response.status != 429:
                seen.failed += 1
                return
            seen.refused += 1
            pause = float(response.headers["Retry-After"])
        await asyncio.sleep(pause)


async def read(response: aiohttp.ClientResponse, started: float, seen: Measured) -> None:
    """Takes a stream to its end."""
    last = None
    async for line in response.content:
        now = time.perf_counter()
        if line == b"data: [DONE]\n":
            seen.answered += 1
            seen.whole.append(now - started)
            return
        if not line.startswith(b"data: "):
            continue
        chunk = json.loads(line.removeprefix(b"data: "))
        if chunk.get("usage"):
            seen.tokens += chunk["usage"]["completion_tokens"]
        for choice in chunk.get("choices", []):
            if choice["delta"].get("content") or choice["delta"].get("reasoning_content"):
                (seen.first if last is None else seen.between).append(now - (started if last is None else last))
                last = now
    seen.failed += 1


async def run(load: Load) -> tuple[Measured, float]:
    """All requests; also the seconds that they took."""
    seen, numbers = Measured(), iter(range(load.requests))

    async def client(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            await ask(session, load, number, seen)

    headers = {"Authorization": f"Bearer {load.key}"} if load.key else {}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(headers=headers, connector=connector, timeout=timeout) as session:
        # Compiling is not what is measured.
        await asyncio.gather(*[ask(session, load, number, Measured()) for number in range(load.concurrency)])
        started = time.perf_counter()
        await asyncio.gather(*[client(session) for _ in range(load.concurrency)])
        return seen, time.perf_counter() - started


@contextlib.contextmanager
def embedded_server(max_sequences: int) -> Iterator[str]:
    """The embedded model behind `qwq-jax serve`, in another process."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = str(Path(folder) / "tiny-reasoner")
        convert(str(TINY_REASONER), checkpoint)
        command = [sys.executable, "-m", "qwq_jax", "serve", checkpoint, "--port", "0"]
        command += ["--set", f"engine.max_sequences={max_sequences}", "--set", "engine.max_context=512"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if (found := re.search(r"(http://\S+)/v1", line)) is not None:
                    break
            else:
                raise SystemExit("the server did not start")
            try:
                yield found[1]
            finally:
                process.send_signal(signal.SIGTERM)
                process.communicate(timeout=60)


def report(seen: Measured, seconds: float) -> None:
    """Prints the figures."""
    console = Console()
    console.print(
        f"{seen.answered} answered, {seen.failed} failed, told to wait {seen.refused} times; {seconds:.1f} s: "
        f"{seen.answered / seconds:.2f} requests/s, {seen.tokens / seconds:.0f} tokens/s"
    )
    table = Table("milliseconds", "p50", "p90", "p99", "max")
    rows = {"to the first token": seen.first, "between chunks": seen.between, "whole answer": seen.whole}
    for name, values in rows.items():
        if values:
            figures = [*np.percentile(values, [50, 90, 99]), max(values)]
            table.add_row(name, *[f"{1000 * figure:.1f}" for figure in figures])
    console.print(table)


def main() -> None:
    """Measures and prints; exit code 1 if a request failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a server that runs, without /v1")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--api-key-file", type=Path)
    parser.add_argument("--max-sequences", type=int, default=16, help="rows of the embedded model's engine")
    options = parser.parse_args()
    key = options.api_key_file.read_text().split()[0] if options.api_key_file else None
    server = contextlib.nullcontext(options.url) if options.url else embedded_server(options.max_sequences)
    with server as url:
        load = Load(url.rstrip("/"), options.requests, options.concurrency, options.max_tokens, key)
        seen, seconds = asyncio.run(run(load))
    report(seen, seconds)
    raise SystemExit(1 if seen.failed else 0)


if __name__ == "__main__":
    main()
