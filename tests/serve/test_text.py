"""Text that is held back: never a part of a stop string, never less than all of the rest."""

import random

import pytest

from qwq_jax.config.sampling import SamplingParams
from qwq_jax.engine.request import Completion, FinishReason, NewToken, Request, TokenLogprob
from qwq_jax.jobs.answer import choice_of
from qwq_jax.serve.answer import Answer, ChatForm, CompletionForm
from qwq_jax.serve.bodies import Call
from qwq_jax.serve.text import SampleText, StopHold


@pytest.mark.parametrize(
    ("stop", "pushes", "out"),
    [
        (["END"], ["an E", "gg, E", "ND", " more"], ["an ", "Egg, ", "", ""]),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""]),  # the first a turns out not to belong to it
        (["</s>", "\n\n"], ["x\n", "y\n", "\nz"], ["x", "\ny", ""]),
        (["abc", "b"], ["za", "b"], ["z", "a"]),  # the shorter one is complete first
        (["xyz"], ["one xyz two"], ["one "]),
        ([], ["as", " it is"], ["as", " it is"]),
    ],
)
def test_a_stop_string_is_held_back(stop, pushes, out):
    hold = StopHold(stop)
    assert [hold.push(text) for text in pushes] == out


def test_what_was_no_stop_string_comes_in_the_end():
    hold = StopHold(["STOP"])
    assert hold.push("this is a ST") == "this is a "
    assert hold.flush() == "ST"


def test_any_cutting_gives_the_text_before_the_first_stop_string():
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choices("ab", k=draw.randrange(12)))
        stops = ["".join(draw.choices("ab", k=draw.randrange(1, 5))) for _ in range(draw.randrange(3))]
        hold, sent, seen = StopHold(stops), "", ""
        while len(seen) < len(text):
            piece = text[len(seen) : len(seen) + draw.randrange(1, 4)]
            seen += piece
            sent += hold.push(piece)
            found = [seen.find(stop) for stop in stops if stop in seen]
            if found:
                break
            # Nothing sent can be the beginning of a stop string that is still to come, and nothing else is held.
            held = seen[len(sent) :]
            ends = [seen[at:] for at in range(len(seen)) if any(stop.startswith(seen[at:]) for stop in stops)]
            assert held == max(ends, key=len, default="")
        sent += hold.flush()
        found = [seen.find(stop) for stop in stops if stop in seen]
        assert sent == (seen[: min(found)] if found else seen), (text, stops)


@pytest.mark.parametrize("stop", [(), ("132",), ("7+5",), ("so ", "\nso")])
def test_pieces_join_to_the_answer_of_the_batch_job(codec, tokenizer, stop):
    text = "47 + 85:\nones 7+5=12, é carry 1\nso 132\n</think>\n\nThe answer is 132."
    cut = min([text.find(each) + len(each) for each in stop if each in text], default=len(text))
    tokens = tuple(tokenizer.encode(text[:cut]))
    prompt = tuple(tokenizer.apply_template([{"role": "user", "content": "What is 47 + 85?"}]))
    request = Request("a", prompt, SamplingParams(stop=stop))
    whole = choice_of(Completion("a", 0, tokens, FinishReason.STOP), request, tokenizer)
    sample, pieces = SampleText(codec, request, split=True), []
    for token in tokens:
        sample.push(TokenLogprob(token, -1.0))
        pieces += sample.take().pieces
    sample.finish()
    pieces += sample.take().pieces
    assert "".join(text for is_thinking, text in pieces if is_thinking) == whole.reasoning_content
    assert "".join(text for is_thinking, text in pieces if not is_thinking) == whole.content
    assert sample.reasoning_tokens == whole.reasoning_tokens
    assert len(pieces) > 5


@pytest.mark.parametrize("form", [ChatForm(), CompletionForm()], ids=["chat", "completion"])
def test_chunks_say_the_same_however_many_tokens_come_at_once(codec, tokenizer, form):
    tokens = tokenizer.encode("so 132\n</think>\n\nThe answer is 132. é")
    prompt = tuple(tokenizer.apply_template([{"role": "user", "content": "?"}]))
    params = SamplingParams(n=2, logprobs=True, stop=("is 1",))
    request = Request("a", prompt, params)
    call = Call(({},), stream=True, include_usage=False, return_token_ids=True)
    stopped = tokens[: next(n for n in range(len(tokens)) if "is 1" in tokenizer.decode(tokens[:n]))]
    events = [NewToken("a", index, TokenLogprob(token, -1.0)) for token in stopped for index in (0, 1)]
    ends = [Completion("a", index, tuple(stopped), FinishReason.STOP) for index in (0, 1)]
    said = []
    for size in (1, 3, 7, len(events)):
        answer = Answer("id", "m", call, [request], form=form, codec=codec)
        chunks = [chunk for at in range(0, len(events), size) for chunk in answer.chunks(events[at : at + size])]
        chunks += answer.chunks(ends)
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == 1]
        texts = {"content": "", "reasoning_content": "", "text": ""}
        for choice in choices:
            for name, text in {**choice.get("delta", {}), "text": choice.get("text", "")}.items():
                texts[name] = texts.get(name, "") + text
        ids = [token for choice in choices for token in choice["token_ids"]]
        counted = sum(len(next(iter(c["logprobs"].values()))) for c in choices if c["logprobs"])
        said.append((texts, ids, counted, choices[-1]["finish_reason"]))
        assert all(choice["finish_reason"] is None for choice in choices[:-1])
    assert said == [said[0]] * 4
    assert said[0][1:] == (list(stopped), len(stopped), "stop")
    thoughts, text = said[0][0]["reasoning_content"], said[0][0]["content"] + said[0][0]["text"]
    assert (thoughts, text) == (("so 132", "The answer ") if form.split else ("", "so 132\n</think>\n\nThe answer "))
