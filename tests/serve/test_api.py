"""Everything that is claimed, by the official client; the words are those that the engine gives without a server."""

import re
from pathlib import Path

import openai
import pytest

from qwq_jax.config.sampling import SamplingParams
from qwq_jax.engine.request import Request
from qwq_jax.jobs.answer import choice_of, hooks_of
from tests.serve.conftest import ENGINE
from tests.serve.live import MODEL, QUESTION, running

GREEDY = {"temperature": 0, "max_tokens": 100}


@pytest.fixture(scope="module")
def expected(engine, tokenizer):
    """What the batch job would answer."""
    request = Request("direct", tuple(tokenizer.apply_template(QUESTION)), SamplingParams(**GREEDY, logprobs=True))
    (completion,) = engine.generate([request], lambda request: hooks_of(tokenizer, request))
    return choice_of(completion, request, tokenizer)


@pytest.fixture
def client(live):
    with live.client() as client:
        yield client


def ask(client, **options):
    return client.chat.completions.create(model=MODEL, **{"messages": QUESTION, **GREEDY, **options})


def complete(client, prompt, **options):
    return client.completions.create(model=MODEL, prompt=prompt, **{"temperature": 0, "max_tokens": 12, **options})


def test_a_whole_answer(client, expected, tokenizer):
    answer = ask(client)
    (choice,) = answer.choices
    assert choice.message.content == expected.content and "\\boxed{" in expected.content
    assert choice.message.reasoning_content == expected.reasoning_content
    assert choice.message.role == "assistant" and choice.finish_reason == "stop" and choice.logprobs is None
    assert answer.object == "chat.completion" and answer.model == MODEL and answer.id.startswith("chatcmpl-")
    usage = answer.usage
    assert usage.prompt_tokens == len(tokenizer.apply_template(QUESTION))
    assert usage.completion_tokens == len(expected.token_ids)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens_details.reasoning_tokens == expected.reasoning_tokens > 0


def test_a_stream_says_the_same(client, expected):
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({c.id for c in chunks}) == 1
    *spoken, last = chunks
    assert last.choices == [] and all(chunk.usage is None for chunk in spoken)
    assert last.usage.completion_tokens == len(expected.token_ids)
    assert last.usage.completion_tokens_details.reasoning_tokens == expected.reasoning_tokens
    deltas = [chunk.choices[0].delta for chunk in spoken]
    assert [delta.role for delta in deltas] == ["assistant", *[None] * (len(deltas) - 1)]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == expected.reasoning_content
    assert "".join(delta.content or "" for delta in deltas) == expected.content
    reasons = [chunk.choices[0].finish_reason for chunk in spoken]
    assert reasons == [*[None] * (len(reasons) - 1), "stop"]
    assert len(spoken) > len(expected.token_ids) / ENGINE.decode_window  # as they come, not at once


def test_streams_of_several_samples_interleave(client):
    options = {"n": 3, "temperature": 2.0, "seed": 5, "max_tokens": 24}
    whole = ask(client, **options)
    texts, order = ["", "", ""], []
    for chunk in ask(client, stream=True, **options):
        (choice,) = chunk.choices
        order.append(choice.index)
        texts[choice.index] += getattr(choice.delta, "reasoning_content", None) or choice.delta.content or ""
    assert texts == [(c.message.reasoning_content or "") + c.message.content for c in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert order != sorted(order)


def test_logprobs_of_a_chat(client, expected):
    (choice,) = ask(client, logprobs=True, top_logprobs=2).choices
    records = choice.logprobs.content
    assert [record.logprob for record in records] == pytest.approx([r["logprob"] for r in expected.logprobs], abs=1e-5)
    assert [record.token for record in records] == [r["token"] for r in expected.logprobs]
    for record in records:
        assert len(record.top_logprobs) == 2 and record.top_logprobs[0].token == record.token
        assert record.token == bytes(record.bytes).decode()
    streamed = []
    for chunk in ask(client, logprobs=True, top_logprobs=2, stream=True):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content
    assert [record.token for record in streamed] == [record.token for record in records]


@pytest.mark.parametrize("stop", ["carry", ["zzz", "5=12"], "\nso"])
def test_a_stop_string_never_leaks(client, expected, stop):
    first = [stop] if isinstance(stop, str) else stop
    text = expected.reasoning_content
    before = text[: min(text.find(each) for each in first if each in text)].rstrip("\n")
    (whole,) = ask(client, stop=stop).choices
    pieces = [
        getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
        for chunk in ask(client, stop=stop, stream=True)
    ]
    assert "".join(pieces) == whole.message.reasoning_content == before
    assert whole.message.content == "" and whole.finish_reason == "stop"


def test_cut_off_at_its_length(client, expected):
    (choice,) = ask(client, max_tokens=5).choices
    assert choice.finish_reason == "length"
    assert expected.reasoning_content.startswith(choice.message.reasoning_content) and not choice.message.content
    assert ask(client, max_tokens=None, max_completion_tokens=5).usage.completion_tokens == 5


def test_token_ids_on_request(client, expected):
    asked = {"extra_body": {"return_token_ids": True}}
    assert tuple(ask(client, **asked).choices[0].token_ids) == expected.token_ids
    ids = [id for chunk in ask(client, stream=True, **asked) for id in chunk.choices[0].token_ids or ()]
    assert tuple(ids) == expected.token_ids


def test_completions_of_several_prompts(client, tokenizer):
    prompts = ["What is 1", "so 12", "The"]
    together = complete(client, prompts, n=2)
    assert together.object == "text_completion" and [c.index for c in together.choices] == list(range(6))
    for place, prompt in enumerate(prompts):
        alone = complete(client, prompt).choices[0].text
        assert together.choices[2 * place].text == together.choices[2 * place + 1].text == alone
    as_ids = complete(client, [tokenizer.encode(prompt) for prompt in prompts])
    assert [choice.text for choice in as_ids.choices] == [choice.text for choice in together.choices[::2]]
    assert complete(client, tokenizer.encode("The")).choices[0].text == as_ids.choices[2].text
    texts = [""] * 3
    for chunk in complete(client, prompts, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in as_ids.choices]


def test_completions_keep_the_tags(client, tokenizer, expected):
    answer = complete(client, tokenizer.render(QUESTION), max_tokens=100)
    text = answer.choices[0].text
    assert text.startswith(expected.reasoning_content) and text.endswith(expected.content) and "</think>" in text
    assert answer.usage.completion_tokens_details.reasoning_tokens == expected.reasoning_tokens


def test_legacy_logprobs(client):
    (choice,) = complete(client, "What is 1", logprobs=2).choices
    lists = choice.logprobs
    assert "".join(lists.tokens) == choice.text and len(lists.tokens) == 12
    assert [choice.text[a:].startswith(t) for a, t in zip(lists.text_offset, lists.tokens, strict=True)] == [True] * 12
    for token, logprob, top in zip(lists.tokens, lists.token_logprobs, lists.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values()) and len(top) == 2
    streamed = []
    for chunk in complete(client, "What is 1", logprobs=2, stream=True):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.text_offset
    assert streamed == lists.text_offset
    assert complete(client, "What is 1", logprobs=0).choices[0].logprobs.top_logprobs[0].keys() == {lists.tokens[0]}


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == MODEL and client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.models.retrieve("gpt")


@pytest.mark.parametrize(
    ("options", "param", "sentence"),
    [
        ({"temperature": 9}, "temperature", "temperature: "),
        ({"extra_body": {"colour": "red"}}, "colour", "colour: unknown field"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "tools: .* is not implemented"),
        ({"messages": [{"role": "king", "content": ""}]}, "messages", r"messages\[0\]: unknown role 'king'"),
        ({"messages": []}, "messages", "messages: "),
        ({"messages": [{"role": "user", "content": "1+" * 300}]}, None, "the prompt has .* context of 256"),
        ({"extra_body": {"min_tokens": "x"}}, "min_tokens", "min_tokens: "),
        ({"stop": ["ok", ""]}, "stop", "stop: an empty text"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_refused_by_name(client, options, param, sentence, stream):
    with pytest.raises(openai.BadRequestError, match=sentence) as caught:
        ask(client, stream=stream, **options)
    assert caught.value.param == param and caught.value.type == "invalid_request_error"


def test_echo_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="echo: True is not implemented"):
        complete(client, "a", echo=True)


def test_a_call_cannot_ask_for_everything(client):
    with pytest.raises(openai.BadRequestError, match="n: 640 completions are asked for, expected at most 512"):
        complete(client, ["a"] * 10, n=64)


def test_one_bad_prompt_of_several_takes_none(client, live):
    with pytest.raises(openai.BadRequestError, match="not in the vocabulary"):
        complete(client, [[1, 2], [10**6]])
    assert live.metric("qwq_prompt_tokens_total") == 0


def test_other_errors_have_openais_shape(live):
    assert live.call("POST", "/v1/chat/completions", b"{").error["message"].startswith("expected a JSON object")
    reply = live.call("POST", "/v1/chat/completions", {"messages": QUESTION, "model": "gpt"})
    assert (reply.status, reply.error["code"], reply.error["param"]) == (404, "model_not_found", "model")
    for method, path, status in [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)]:
        reply = live.call(method, path)
        assert reply.status == status and path in reply.error["message"]
    assert live.call("POST", "/v1/completions", b" " * (16 * 2**20 + 1)).status == 413
    assert live.metric('qwq_requests_total{outcome="invalid"}') == 5


def test_a_stream_that_waits_says_so(live, client, expected, monkeypatch):
    monkeypatch.setattr("qwq_jax.serve.app._PING_SECONDS", 1e-4)
    body = {"messages": QUESTION, "stream": True, **GREEDY}
    assert b"\n\n: waiting\n\n" in b"\n\n" + live.call("POST", "/v1/chat/completions", body).body
    assert "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True)) == expected.content


def test_the_example_of_the_readme(engine, codec, capsys, expected):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = re.findall(r"^```py\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    with running(engine, codec, model="qwq-32b", api_keys=("KEY",)) as live:
        names: dict[str, openai.OpenAI] = {}
        exec(compile(code.replace("http://localhost:8000", live.address), "README.md", "exec"), names)
        names["client"].close()
    assert "\\boxed{" in capsys.readouterr().out


def test_metrics_count(live, client):
    usage = ask(client).usage
    ask(client, stream=True, n=2).close()
    assert live.metric("qwq_prompt_tokens_total") == 2 * usage.prompt_tokens
    assert live.metric('qwq_requests_total{outcome="completed"}') >= 1
    assert live.metric("qwq_generated_tokens_total") >= usage.completion_tokens
    assert live.metric("qwq_inter_token_seconds_count") >= usage.completion_tokens - 1
    assert live.metric("qwq_time_to_first_token_seconds_count") >= 1
    assert live.metric("qwq_engine_steps_total") >= usage.completion_tokens / ENGINE.decode_window
    assert live.health() == 200


def test_keys(engine, codec):
    with running(engine, codec, api_keys=("first", "second")) as live:
        for key in ("first", "second"):
            with live.client(api_key=key) as client:
                assert client.models.list().data
                assert complete(client, "The", max_tokens=1).usage.completion_tokens == 1
        with live.client(api_key="third") as client, pytest.raises(openai.AuthenticationError) as caught:
            complete(client, "The")
        assert caught.value.code == "invalid_api_key" and "third" not in str(caught.value)
        for header in ({}, {"Authorization": "first"}, {"Authorization": "Basic first"}):
            assert live.call("POST", "/v1/completions", {"prompt": "a"}, **header).status == 401
        assert live.call("GET", "/v1/nothing").status == 401
        assert live.health() == 200
        assert "first" not in repr(live.server._options)


def test_thoughts_can_be_bounded_or_left_out(client, tokenizer):
    bounded = ask(client, extra_body={"max_thinking_tokens": 4})
    (choice,) = bounded.choices
    assert choice.message.reasoning_content.endswith("Time is up: I give my answer from what I have.")
    assert choice.message.content
    closing = len(tokenizer.encode("\n\nTime is up: I give my answer from what I have.\n</think>"))
    assert bounded.usage.completion_tokens_details.reasoning_tokens == pytest.approx(4 + closing, abs=1)
    for extra in ({"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}):
        (choice,) = ask(client, extra_body=extra).choices
        assert choice.message.content and not getattr(choice.message, "reasoning_content", None)
    with pytest.raises(
        openai.BadRequestError, match="max_thinking_tokens: the prompt does not end in <think>"
    ) as caught:
        complete(client, "1 + 1 =", extra_body={"max_thinking_tokens": 4})
    assert caught.value.param == "max_thinking_tokens"


@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.slow), True])
def test_an_answer_of_a_given_form(client, stream):
    form = {"guided_regex": r"sum=[0-9]{2,3}\.", "max_thinking_tokens": 20}
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True, extra_body=form))
    else:
        text = ask(client, extra_body=form).choices[0].message.content
    assert re.fullmatch(r"sum=[0-9]{2,3}\.", text)
    with pytest.raises(openai.BadRequestError, match="guided_regex: ") as caught:
        ask(client, extra_body={"guided_regex": "("})
    assert caught.value.param == "guided_regex"


def test_prompt_logprobs_are_those_of_the_batch_job(client, engine, tokenizer):
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2)
    request = Request("direct", tuple(tokenizer.apply_template(QUESTION)), params)
    (completion,) = engine.generate([request])
    expected = choice_of(completion, request, tokenizer).prompt_logprobs
    asked = {"max_tokens": 1, "extra_body": {"prompt_logprobs": 2}}
    assert [None, *expected[1:]] == list(expected) and len(expected) == len(request.prompt_token_ids)
    given = ask(client, **asked).prompt_logprobs
    assert [record and record["token"] for record in given] == [record and record["token"] for record in expected]
    logprobs = [[r["logprob"] for r in records if r] for records in (given, expected)]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)
    assert all(len(record["top_logprobs"]) == 2 for record in given[1:])
    texts = ["What is 1", "The"]
    for text, choice in zip(texts, [c for c in complete(client, texts, n=2, **asked).choices][::2], strict=True):
        assert "".join(record["token"] for record in choice.prompt_logprobs[1:]) in text
        assert choice.prompt_logprobs[0] is None and len(choice.prompt_logprobs) == len(tokenizer.encode(text))
    assert not hasattr(ask(client, max_tokens=1), "prompt_logprobs")
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs: cannot be had with stream true"):
        ask(client, stream=True, **asked)
