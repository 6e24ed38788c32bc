"""HTTP: routes, keys, errors, and answers whole or as server-sent events."""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from aiohttp import web

from qwq_jax.config.json_line import load_json_line
from qwq_jax.engine.request import Request
from qwq_jax.serve.answer import Answer, ChatForm, CompletionForm, Form
from qwq_jax.serve.bodies import BodyReader, Call, read_chat, read_completion
from qwq_jax.serve.codec import TextCodec
from qwq_jax.serve.desk import Desk, Ticket
from qwq_jax.serve.errors import ApiError, invalid, unauthorized, unknown_model
from qwq_jax.serve.metrics import Outcome, ServerMetrics, outcome_of
from qwq_jax.serve.options import ServeOptions

# A context of 131,072 tokens is about half a megabyte of text; a call may bring several.
MAX_BODY_BYTES = 16 * 2**20
# Of all prompts of a call together.
MAX_COMPLETIONS = 512
# A comment this often keeps proxies from closing a stream that waits, and finds out that its client is gone.
_PING_SECONDS = 15.0

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_log = logging.getLogger(__name__)


class Front:
    """The handlers of one server.

    Args:
        desk: Lets requests in.
        codec: Knows the tokenizer.
        metrics: What is counted.
        options: Name of the model, and keys.
    """

    def __init__(self, desk: Desk, codec: TextCodec, metrics: ServerMetrics, options: ServeOptions) -> None:
        self._desk = desk
        self._codec = codec
        self._metrics = metrics
        self._options = options
        self._started = int(time.time())

    def app(self) -> web.Application:
        """The application; it has to run with `handler_cancellation`, which tells that a client is gone."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._errors_as_json])
        app.router.add_post("/v1/chat/completions", partial(self._answer, read=read_chat, form=ChatForm()))
        app.router.add_post("/v1/completions", partial(self._answer, read=read_completion, form=CompletionForm()))
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._model)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics_page)
        return app

    @web.middleware
    async def _errors_as_json(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Every refusal in OpenAI's shape, keys checked, outcomes of ``/v1`` counted."""
        counted = request.path.startswith("/v1/")
        try:
            if counted:
                self._check_key(request)
            return await handler(request)
        except ApiError as error:
            refusal, headers = error, error.headers
        except web.HTTPException as error:
            refusal = ApiError(error.status, _reason(error, request), code="not_found" if error.status == 404 else None)
            headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        except asyncio.CancelledError:
            if counted:
                self._metrics.ended(Outcome.CANCELLED)
            raise
        except Exception as error:
            _log.exception("%s %s", request.method, request.path)
            if counted:
                self._metrics.ended(Outcome.FAILED)
            told = ApiError(500, "an error of the server, which its log tells", type="server_error")
            raise web.HTTPInternalServerError(text=json.dumps(told.body), content_type="application/json") from error
        if counted:
            self._metrics.ended(outcome_of(refusal.status))
        return web.json_response(refusal.body, status=refusal.status, headers=headers)

    def _check_key(self, http: web.Request) -> None:
        keys = self._options.api_keys
        if not keys:
            return
        scheme, _, given = http.headers.get("Authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else ""
        # All are compared, and each in constant time: how long it takes says nothing.
        if not any([hmac.compare_digest(key.encode(), given.encode("utf-8", "surrogateescape")) for key in keys]):
            raise unauthorized(bool(given))

    async def _answer(self, http: web.Request, *, read: BodyReader, form: Form) -> web.StreamResponse:
        try:
            raw = await http.read()
        except web.RequestPayloadError as error:
            raise ApiError(400, f"the body cannot be read: {error}") from None
        body: dict[str, Any] = {}
        name = f"{form.prefix}-{uuid.uuid4().hex}"
        with self._desk.ticket(name) as ticket:
            try:
                body = load_json_line(raw)
                call = read(body, self._options.model)
                # Long prompts take long to encode; others go on meanwhile.
                requests = await asyncio.to_thread(self._requests, name, call)
            except ValueError as error:
                raise invalid(error, body) from None
            await ticket.submit(requests)
            answer = Answer(name, self._options.model, call, requests, form=form, codec=self._codec)
            if call.stream:
                return await self._stream(http, call, ticket, answer)
            async for events in ticket.batches():
                answer.take(events)
        # Many log-probabilities take long to put into words; others go on meanwhile.
        text = await asyncio.to_thread(lambda: json.dumps(answer.whole(), allow_nan=False))
        response = web.json_response(text=text, headers={"X-Request-Id": name})
        self._metrics.ended(Outcome.COMPLETED)
        return response

    def _requests(self, name: str, call: Call) -> tuple[Request, ...]:
        requests = tuple(self._codec.request(f"{name}-{place}", body) for place, body in enumerate(call.bodies))
        count = sum(request.params.n for request in requests)
        if count > MAX_COMPLETIONS:
            raise ValueError(f"n: {count} completions are asked for, expected at most {MAX_COMPLETIONS} in a call")
        return requests

    async def _stream(self, http: web.Request, call: Call, ticket: Ticket, answer: Answer) -> web.StreamResponse:
        headers = {
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
            "X-Request-Id": ticket.name,
        }
        response = web.StreamResponse(headers=headers)
        try:
            await response.prepare(http)
            try:
                async for events in ticket.batches(pause=_PING_SECONDS):
                    data = b"".join(_event(chunk) for chunk in answer.chunks(events)) if events else b": waiting\n\n"
                    if data:
                        await response.write(data)
                usage = _event(answer.usage_chunk()) if call.include_usage else b""
                await response.write(usage + b"data: [DONE]\n\n")
                outcome = Outcome.COMPLETED
            except ApiError as error:
                # The status is sent already: an event tells the rest, and no [DONE] follows.
                await response.write(_event(error.body))
                outcome = outcome_of(error.status)
            await response.write_eof()
        except ConnectionResetError:
            outcome = Outcome.CANCELLED
        self._metrics.ended(outcome)
        return response

    async def _models(self, http: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._model_record()]})

    async def _model(self, http: web.Request) -> web.Response:
        asked = http.match_info["model"]
        if asked != self._options.model:
            raise unknown_model(asked, self._options.model)
        return web.json_response(self._model_record())

    def _model_record(self) -> dict[str, Any]:
        return {"id": self._options.model, "object": "model", "created": self._started, "owned_by": "qwq_jax"}

    async def _health(self, http: web.Request) -> web.Response:
        closed = self._desk.closed
        if closed is not None:
            return web.json_response({"status": str(closed)}, status=503)
        return web.json_response({"status": "ready"})

    async def _metrics_page(self, http: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})


def _event(record: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


def _reason(error: web.HTTPException, http: web.Request) -> str:
    match error.status:
        case 404:
            return f"{http.path}: there is nothing here"
        case 405:
            return f"{http.path}: {http.method} is not allowed here"
        case 413:
            return f"the body is larger than {MAX_BODY_BYTES} bytes"
        case _:
            return error.reason
