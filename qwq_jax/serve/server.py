"""The life of a server: bind, serve, drain, end."""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from aiohttp import web

from qwq_jax.engine.engine import Engine
from qwq_jax.serve.app import Front
from qwq_jax.serve.codec import TextCodec
from qwq_jax.serve.desk import Desk
from qwq_jax.serve.errors import engine_failed
from qwq_jax.serve.metrics import ServerMetrics
from qwq_jax.serve.options import ServeOptions
from qwq_jax.serve.worker import EngineWorker, Report

# Connections that may arrive in one burst.
_BACKLOG = 1024
# For handlers to send their last words.
_GOODBYE_SECONDS = 5.0

_log = logging.getLogger(__name__)


class EngineFailed(RuntimeError):
    """The engine raised an error, which is this one's cause; all requests have been told."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds the address, but lets nobody connect before the server is ready.

    Raises:
        ValueError: The host is unknown or not of this machine, or the port is taken or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise ValueError(f"--host {host}: no such host") from None
    listener = socket.socket(family, kind, protocol)
    try:
        # A server that has just ended must not block the port; one that listens still does.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ValueError(f"--host {host} --port {port}: cannot listen there: {error.strerror}") from None
    return listener


class Server:
    """One engine behind one socket.

    Args:
        engine: Called from one thread of its own while `run` runs.
        codec: Knows the tokenizer.
        options: Whom to serve, and how much at once.
    """

    def __init__(self, engine: Engine, codec: TextCodec, options: ServeOptions) -> None:
        self._engine = engine
        self._codec = codec
        self._options = options
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    def stop(self) -> None:
        """Begins to drain; called again, ends what still runs.  On the event loop's thread."""
        (self._hurry if self._stop.is_set() else self._stop).set()

    async def run(self, listener: socket.socket, *, ready: Callable[[str], None], signals: bool = True) -> None:
        """Serves until `stop`, or SIGTERM or SIGINT, then lets what runs end within `drain_seconds`.

        Args:
            listener: From `bind`; closed at the end.
            ready: Called with the address once requests are answered.
            signals: Whether to take these signals, which only the main thread can.

        Raises:
            EngineFailed: The engine raised an error.
            ValueError: Another process listens on the port by now.
        """
        loop = asyncio.get_running_loop()
        shape = self._engine.runner.shape
        metrics = ServerMetrics()

        def post(report: Report) -> None:
            loop.call_soon_threadsafe(desk.dispatch, report)

        worker = EngineWorker(self._engine, self._codec.hooks, post)
        rows = shape.replicas * shape.max_sequences
        desk = Desk(worker, metrics, rows=rows, max_waiting=self._options.max_waiting)
        front = Front(desk, self._codec, metrics, self._options)
        runner = web.AppRunner(
            front.app(), handler_cancellation=True, access_log=None, shutdown_timeout=_GOODBYE_SECONDS
        )
        await runner.setup()
        with ThreadPoolExecutor(1, "engine") as thread:
            serving = loop.run_in_executor(thread, worker.run)
            try:
                await self._listen(runner, listener)
                if signals:
                    for number in (signal.SIGTERM, signal.SIGINT):
                        loop.add_signal_handler(number, self.stop)
                ready(_address(listener))
                await self._until_the_end(serving, desk)
            finally:
                # Handlers end first: they take out of the engine what they still have in it.
                await runner.cleanup()
                worker.stop()
                await asyncio.wait([serving])
                listener.close()
        if (error := serving.exception()) is not None:
            raise EngineFailed("the engine failed") from error

    async def _listen(self, runner: web.AppRunner, listener: socket.socket) -> None:
        try:
            await web.SockSite(runner, listener, backlog=_BACKLOG).start()
        except OSError as error:
            raise ValueError(f"--port {self._options.port}: cannot listen there: {error.strerror}") from None

    async def _until_the_end(self, serving: "asyncio.Future[None]", desk: Desk) -> None:
        stop = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait([serving, stop], return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            _log.info("draining: %d sequences in flight, at most %g s", desk.in_flight, self._options.drain_seconds)
            draining = asyncio.ensure_future(desk.drain(self._options.drain_seconds, self._hurry))
            await asyncio.wait([serving, draining], return_when=asyncio.FIRST_COMPLETED)
            draining.cancel()
        stop.cancel()
        if serving.done():
            desk.refuse(engine_failed(503))
            desk.fail(engine_failed())
        # Whoever asks is told 503 for as long as others are being told how theirs ended.
        goodbye = asyncio.ensure_future(desk.drained())
        await asyncio.wait([goodbye], timeout=_GOODBYE_SECONDS)
        goodbye.cancel()


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
