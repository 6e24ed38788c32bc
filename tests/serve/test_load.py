"""Many clients, too many clients, clients that leave, and a server that has to."""

import asyncio
import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from qwq_jax.serve.server import EngineFailed
from tests.serve.live import MODEL, QUESTION, Live, eventually, running

CHAT = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 100}
# Uses up its context, 256 tokens.
ENDLESS = {**CHAT, "max_tokens": 10_000, "ignore_eos": True}


@pytest.fixture
def slow(engine, monkeypatch):
    """Makes a step take 20 ms at least, so that 200 tokens take 4 s."""
    step = engine.step

    def slowly():
        time.sleep(0.02)
        return step()

    monkeypatch.setattr(engine, "step", slowly)


@pytest.fixture
def all_free(engine):
    """Every page is free and no row taken, before and after."""
    free = engine.scheduler.free_pages
    yield free
    assert engine.scheduler.free_pages == free
    assert engine.scheduler.running == engine.scheduler.waiting == 0 and not engine.busy


def start(live: Live, body: dict[str, object]) -> http.client.HTTPConnection:
    """Sends a request and does not wait for the answer."""
    connection = http.client.HTTPConnection(live.address.removeprefix("http://"), timeout=30)
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    return connection


def gather(live: Live, count: int, **options) -> list[object]:
    """Asks `count` times at once; answers and errors in any order."""

    async def ask(client: openai.AsyncOpenAI) -> object:
        try:
            if not options.get("stream"):
                return await client.chat.completions.create(**{**CHAT, **options})
            return [chunk async for chunk in await client.chat.completions.create(**{**CHAT, **options})]
        except openai.APIStatusError as error:
            return error

    async def main() -> list[object]:
        async with openai.AsyncOpenAI(base_url=f"{live.address}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*[ask(client) for _ in range(count)])

    return asyncio.run(main())


def test_64_streams_at_once(live, all_free):
    with live.client() as client:
        expected = client.chat.completions.create(**{**CHAT, "max_tokens": 24}).choices[0].message.reasoning_content
    streams = gather(live, 64, stream=True, max_tokens=24)
    for chunks in streams:
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == expected
        assert chunks[-1].choices[0].finish_reason == "length"
    assert len({chunks[0].id for chunks in streams}) == 64


def test_overload_loses_nothing(engine, codec, all_free):
    with running(engine, codec, max_waiting=2) as live:  # 8 rows and 2 that wait
        with live.client() as client:
            expected = client.chat.completions.create(**CHAT).choices[0].message
        replies = gather(live, 100)
        refused = [reply for reply in replies if isinstance(reply, openai.RateLimitError)]
        answered = [reply for reply in replies if not isinstance(reply, openai.APIStatusError)]
        assert len(refused) + len(answered) == 100
        assert len(answered) >= 10 and len(refused) >= 50
        for answer in answered:
            assert answer.choices[0].message == expected and answer.choices[0].finish_reason == "stop"
        for error in refused:
            assert 1 <= int(error.response.headers["Retry-After"]) <= 60
            assert error.code == "rate_limit_exceeded"
        assert live.metric('qwq_requests_total{outcome="overloaded"}') == len(refused)
        assert live.metric('qwq_requests_total{outcome="completed"}') == len(answered) + 1
        with live.client() as client:  # and goes on
            assert client.chat.completions.create(**CHAT).choices[0].message == expected


def test_who_waits_for_retry_after_is_answered(engine, codec, all_free):
    with running(engine, codec, max_waiting=0) as live, live.client(max_retries=8) as client:
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda _: client.chat.completions.create(**{**CHAT, "max_tokens": 20}), range(12)))
    assert {answer.usage.completion_tokens for answer in answers} == {20}


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_frees_its_pages(live, engine, slow, all_free, stream):
    before = engine.stats.steps
    connections = [start(live, {**ENDLESS, "stream": stream, "n": n}) for n in (1, 2, 3, 8)]  # 14 for 8 rows
    if stream:
        response = connections[0].getresponse()
        assert response.read(10).startswith(b"data: {")
        response.close()
    eventually(lambda: live.metric("qwq_running_sequences") == 8 and live.metric("qwq_waiting_sequences") == 6)
    for connection in connections:
        connection.close()
    eventually(lambda: live.metric("qwq_free_pages") == sum(all_free), 2.0)
    assert live.metric("qwq_waiting_sequences") == live.metric("qwq_running_sequences") == 0
    eventually(lambda: live.metric('qwq_requests_total{outcome="cancelled"}') == 4, 2.0)
    steps = live.metric("qwq_engine_steps_total")
    time.sleep(0.1)
    assert live.metric("qwq_engine_steps_total") == steps < before + 200  # none goes on, and none came to its end


def test_the_python_client_closes_its_stream(live, slow, all_free):
    with live.client() as client:
        extra = {"extra_body": {"ignore_eos": True}}
        with client.chat.completions.create(**{**CHAT, "max_tokens": 200}, stream=True, **extra) as stream:
            next(iter(stream))
        eventually(lambda: live.metric("qwq_running_sequences") == 0, 2.0)


def test_a_drain_lets_what_runs_end(engine, codec, slow, all_free):
    with running(engine, codec, drain_seconds=30) as live:
        whole, stream = start(live, CHAT), start(live, {**CHAT, "stream": True})
        eventually(lambda: live.metric("qwq_running_sequences") == 2)
        live.stop()
        eventually(lambda: live.health() == 503)
        reply = live.call("POST", "/v1/chat/completions", CHAT)
        assert reply.status == 503 and reply.error["code"] == "shutting_down"
        assert json.loads(whole.getresponse().read())["choices"][0]["finish_reason"] == "stop"
        assert stream.getresponse().read().endswith(b"data: [DONE]\n\n")
        whole.close(), stream.close()
        live.thread.join(10)
        assert not live.thread.is_alive() and not live.error


def test_a_drain_ends_in_time(engine, codec, slow, all_free):
    with running(engine, codec, drain_seconds=0.2) as live:
        whole, stream = start(live, ENDLESS), start(live, {**ENDLESS, "stream": True})
        eventually(lambda: live.metric("qwq_running_sequences") == 2)
        live.stop()
        response = whole.getresponse()
        assert response.status == 503 and json.loads(response.read())["error"]["code"] == "shutting_down"
        *_, last = stream.getresponse().read().strip().split(b"\n\n")
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "shutting_down"
        whole.close(), stream.close()
        live.thread.join(10)
        assert not live.thread.is_alive() and not live.error


def test_a_second_signal_does_not_wait(engine, codec, slow, all_free):
    with running(engine, codec, drain_seconds=60) as live:
        connection = start(live, ENDLESS)
        eventually(lambda: live.metric("qwq_running_sequences") == 1)
        live.stop()
        live.stop()
        assert connection.getresponse().status == 503
        connection.close()


def test_a_dead_engine_fails_all_and_ends_the_server(engine, codec, monkeypatch, all_free):
    added, add, dying = [], engine.add, threading.Event()
    step = engine.step

    def dies():
        time.sleep(0.01)
        if dying.is_set():
            raise ValueError("the device is gone")
        return step()

    monkeypatch.setattr(engine, "add", lambda request, hooks: (added.append(request.request_id), add(request, hooks)))
    monkeypatch.setattr(engine, "step", dies)
    with running(engine, codec) as live:
        whole, stream = start(live, ENDLESS), start(live, {**ENDLESS, "stream": True})
        streaming = stream.getresponse()
        assert streaming.read(6) == b"data: "
        dying.set()
        response = whole.getresponse()
        assert response.status == 500 and json.loads(response.read())["error"]["code"] == "engine_failed"
        *_, last = streaming.read().strip().split(b"\n\n")
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine_failed"
        whole.close(), stream.close()
        live.thread.join(10)
        (error,) = live.error
        assert isinstance(error, EngineFailed) and str(error.__cause__) == "the device is gone"
    for request_id in added:
        engine.cancel(request_id)
