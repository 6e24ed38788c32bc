"""A server in a thread of the test process, and what tests ask of it."""

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from openai import OpenAI

from qwq_jax.engine.engine import Engine
from qwq_jax.jobs.serve import TokenizerCodec
from qwq_jax.serve.options import ServeOptions
from qwq_jax.serve.server import Server, bind

MODEL = "tiny-reasoner"
QUESTION = [{"role": "user", "content": "What is 47 + 85?"}]


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, str | None]:
        """OpenAI's error object, which has these four fields and nothing beside it."""
        (error,) = json.loads(self.body).values()
        assert error.keys() == {"message", "type", "param", "code"}
        return error


@dataclass
class Live:
    """A server that runs; `error` is what it ended with."""

    address: str
    loop: asyncio.AbstractEventLoop
    server: Server
    thread: threading.Thread
    error: list[BaseException] = field(default_factory=list)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.server.stop)

    def client(self, **options) -> OpenAI:
        return OpenAI(
            base_url=f"{self.address}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 60.0, **options}
        )

    def call(self, method: str, path: str, body: object = None, **headers: str) -> "Reply":
        """A request by hand; a body that is no bytes goes as JSON."""
        connection = http.client.HTTPConnection(self.address.removeprefix("http://"), timeout=60)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            return Reply(response.status, dict(response.headers), response.read())

    def metric(self, name: str) -> float:
        """A sample of /metrics, by its name and labels."""
        lines = self.call("GET", "/metrics").body.decode().splitlines()
        (value,) = [line.rpartition(" ")[2] for line in lines if line.rpartition(" ")[0] == name]
        return float(value)

    def health(self) -> int:
        return self.call("GET", "/health").status


@contextlib.contextmanager
def running(engine: Engine, codec: TokenizerCodec, **options) -> Iterator[Live]:
    """Starts a server on a free port, and drains it in the end."""
    started, holder, errors = threading.Event(), {}, []

    def run() -> None:
        async def main() -> None:
            server = Server(engine, codec, ServeOptions(**{"model": MODEL, "port": 0, **options}))
            holder.update(server=server, loop=asyncio.get_running_loop())

            def ready(address: str) -> None:
                holder["address"] = address
                started.set()

            await server.run(bind("127.0.0.1", 0), ready=ready, signals=False)

        try:
            asyncio.run(main())
        except BaseException as error:  # handed to the test
            errors.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    if errors:
        raise errors[0]
    live = Live(holder["address"], holder["loop"], holder["server"], thread, errors)
    try:
        yield live
    finally:
        if thread.is_alive():
            with contextlib.suppress(RuntimeError):  # it ended by itself meanwhile
                live.stop()
        thread.join(60)
        assert not thread.is_alive(), "the server does not end"


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits until something is so."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.01)
