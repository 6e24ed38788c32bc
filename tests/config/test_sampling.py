import pytest

from qwq_jax.config.sampling import SamplingParams


def test_defaults_draw_from_the_model_itself():
    assert SamplingParams.from_openai({"messages": [], "model": "x"}) == SamplingParams()
    assert SamplingParams().temperature == 1.0


def test_reads_every_field():
    body = {
        "temperature": 0,
        "top_p": 0.95,
        "top_k": 40,
        "min_p": 0.1,
        "max_tokens": 5,
        "stop": ["a", "b"],
        "stop_token_ids": [3],
        "seed": 7,
        "n": 2,
        "ignore_eos": True,
        "logprobs": True,
        "top_logprobs": 20,
    }
    assert SamplingParams.from_openai(body).model_dump() == body | {"stop": ("a", "b"), "stop_token_ids": (3,)}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"top_k": -1}, SamplingParams()),
        ({"stop": "END"}, SamplingParams(stop=("END",))),
        ({"stop": None, "seed": None, "presence_penalty": None}, SamplingParams()),
        ({"max_completion_tokens": 9}, SamplingParams(max_tokens=9)),
        ({"max_completion_tokens": 9, "max_tokens": 9}, SamplingParams(max_tokens=9)),
        ({"presence_penalty": 0.0, "frequency_penalty": 0, "repetition_penalty": 1.0}, SamplingParams()),
        ({"logit_bias": {}, "tools": [], "tool_choice": "none", "stream": False}, SamplingParams()),
        ({"response_format": {"type": "text"}, "return_token_ids": True, "user": "me"}, SamplingParams()),
    ],
)
def test_spellings(body, expected):
    assert SamplingParams.from_openai(body) == expected


def test_a_line_that_declines_logprobs_declines_the_likeliest_too():
    defaults = SamplingParams(logprobs=True, top_logprobs=3)
    declined = SamplingParams.from_openai({"logprobs": False}, defaults)
    assert not declined.logprobs and declined.top_logprobs == 0
    assert SamplingParams.from_openai({}, defaults) == defaults
    with pytest.raises(ValueError, match="top_logprobs 2 needs logprobs true"):
        SamplingParams.from_openai({"logprobs": False, "top_logprobs": 2}, defaults)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"presence_penalty": 1.5}, "presence_penalty: 1.5 is not implemented"),
        ({"frequency_penalty": 0.1}, "frequency_penalty: 0.1 is not implemented"),
        ({"repetition_penalty": 1.1}, "repetition_penalty: 1.1 is not implemented"),
        ({"presence_penalty": False}, "presence_penalty: False is not implemented"),
        ({"logit_bias": {"3": 1}}, "logit_bias: "),
        ({"response_format": {"type": "json_object"}}, "response_format: "),
        ({"tools": [{}]}, "tools: "),
        ({"stream": True}, "stream: True is not implemented"),
        ({"temprature": 1}, "temprature: unknown field"),
        ({"temperature": "hot"}, "temperature: expected a valid number, got 'hot'"),
        ({"temperature": True}, "temperature: expected a valid number, got True"),
        ({"temperature": -1}, "temperature: expected greater than or equal to 0, got -1"),
        ({"temperature": float("nan")}, "temperature: expected"),
        ({"top_p": 0}, "top_p: expected greater than 0, got 0"),
        ({"top_k": -2}, "top_k: expected greater than or equal to 0, got -2"),
        ({"top_k": 3_000_000_000}, "top_k: expected less than 2147483648, got 3000000000"),
        ({"min_p": 1.1}, "min_p: expected less than or equal to 1, got 1.1"),
        ({"max_tokens": 0}, "max_tokens: expected greater than 0, got 0"),
        ({"max_completion_tokens": "9"}, "max_tokens: expected a valid integer, got '9'"),
        ({"max_completion_tokens": 9, "max_tokens": 8}, "max_completion_tokens: 9 contradicts max_tokens 8"),
        ({"stop": 3}, "stop: expected a list, got 3"),
        ({"stop": [""]}, "stop: an empty text"),
        ({"stop": ["a", 3]}, "stop.1: expected a valid string, got 3"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0: "),
        ({"seed": 1.5}, "seed: expected a valid integer, got 1.5"),
        ({"n": 0}, "n: expected greater than or equal to 1, got 0"),
        ({"logprobs": 5}, "logprobs: expected a valid boolean, got 5"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: expected less than or equal to 20, got 21"),
        ({"top_logprobs": 2}, "top_logprobs 2 needs logprobs true"),
    ],
)
def test_refusals_name_the_field(body, sentence):
    with pytest.raises(ValueError) as caught:
        SamplingParams.from_openai({"messages": []} | body)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
