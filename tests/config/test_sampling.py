import pytest

from qwq_jax.config.constraint import Constraint, ConstraintKind
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
        "prompt_logprobs": 0,
        "presence_penalty": -2,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.3,
        "logit_bias": {"11": 100, "7": -0.5},
        "min_tokens": 2,
        "max_thinking_tokens": 4,
        "min_thinking_tokens": 4,
        "enable_thinking": True,
    }
    changed = {"stop": ("a", "b"), "stop_token_ids": (3,), "logit_bias": ((7, -0.5), (11, 100.0)), "constraint": None}
    params = SamplingParams.from_openai(body)
    assert params.model_dump() == body | changed
    assert body.keys() | {"constraint"} == SamplingParams.model_fields.keys()
    assert hash(params) == hash(SamplingParams.from_openai(body))
    assert SamplingParams.model_validate(params.model_dump(mode="json")) == params


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
        ({"logit_bias": {7: 1}}, SamplingParams(logit_bias=((7, 1.0),))),
        ({"chat_template_kwargs": {"enable_thinking": False}}, SamplingParams(enable_thinking=False)),
        ({"chat_template_kwargs": {}}, SamplingParams()),
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
        ({"presence_penalty": 2.5}, "presence_penalty: expected less than or equal to 2, got 2.5"),
        ({"frequency_penalty": -2.1}, "frequency_penalty: expected greater than or equal to -2, got -2.1"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected greater than 0, got 0"),
        ({"presence_penalty": False}, "presence_penalty: expected a valid number, got False"),
        ({"length_penalty": 2}, "length_penalty: 2 is not implemented"),
        ({"logit_bias": {"3": 101}}, "logit_bias: expected a bias from -100 to 100 for token 3, got 101"),
        ({"logit_bias": {"x": 1}}, "logit_bias: expected a token id, got 'x'"),
        ({"logit_bias": {"-1": 1}}, "logit_bias: expected a token id, got '-1'"),
        ({"logit_bias": {"3": 1, "03": 2}}, "logit_bias: token 3 is given twice"),
        ({"logit_bias": 1}, "logit_bias: expected an object of token ids and biases, got 1"),
        ({"logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias: expected at most 300 tokens, got 301"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens 9 is more than max_tokens 8"),
        ({"prompt_logprobs": 21}, "prompt_logprobs: expected less than or equal to 20, got 21"),
        ({"prompt_logprobs": True}, "prompt_logprobs: expected a valid integer, got True"),
        ({"max_thinking_tokens": 0}, "max_thinking_tokens: expected greater than or equal to 1, got 0"),
        ({"max_thinking_tokens": 8, "max_tokens": 8}, "max_thinking_tokens 8 leaves no token of max_tokens 8"),
        ({"min_thinking_tokens": 8, "max_tokens": 8}, "min_thinking_tokens 8 leaves no token of max_tokens 8"),
        (
            {"max_thinking_tokens": 3, "min_thinking_tokens": 4},
            "min_thinking_tokens 4 is more than max_thinking_tokens 3",
        ),
        ({"max_thinking_tokens": 3, "enable_thinking": False}, "max_thinking_tokens has no meaning where"),
        ({"min_thinking_tokens": 3, "enable_thinking": False}, "min_thinking_tokens has no meaning where"),
        ({"enable_thinking": 1}, "enable_thinking: expected a valid boolean, got 1"),
        ({"chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs.tools: is not implemented"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs: expected an object, got 3"),
        (
            {"chat_template_kwargs": {"enable_thinking": False}, "enable_thinking": True},
            "chat_template_kwargs.enable_thinking: False contradicts enable_thinking True",
        ),
        ({"constraint": {"kind": "regex", "text": "a"}}, "constraint: unknown field"),
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


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
SCHEMA_TEXT = '{"type": "object", "properties": {"a": {"type": "integer"}}}'


@pytest.mark.parametrize(
    ("body", "kind", "text", "field"),
    [
        ({"response_format": {"type": "json_object"}}, "json", '{"type": "object"}', "response_format"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            "json",
            SCHEMA_TEXT,
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {"json": SCHEMA}}, "json", SCHEMA_TEXT, "structured_outputs.json"),
        (
            {"structured_outputs": {"json_object": True, "regex": None}},
            "json",
            '{"type": "object"}',
            "structured_outputs.json_object",
        ),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+", "structured_outputs.regex"),
        ({"structured_outputs": {"choice": ["é", "b"]}}, "choice", '["é", "b"]', "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": "start: /a/"}}, "grammar", "start: /a/", "structured_outputs.grammar"),
        ({"guided_json": SCHEMA_TEXT}, "json", SCHEMA_TEXT, "guided_json"),
        ({"guided_regex": "a+", "response_format": {"type": "text"}}, "regex", "a+", "guided_regex"),
        ({"guided_choice": ["a", "b"]}, "choice", '["a", "b"]', "guided_choice"),
        ({"guided_grammar": "start: /a/"}, "grammar", "start: /a/", "guided_grammar"),
    ],
)
def test_every_spelling_of_a_constraint(body, kind, text, field):
    params = SamplingParams.from_openai(body)
    assert params.constraint == Constraint(kind=ConstraintKind(kind), text=text, field=field)
    assert SamplingParams.from_openai({}, params) == params
    assert SamplingParams.from_openai({"response_format": {"type": "text"}}, params).constraint is None
    assert SamplingParams.model_validate(params.model_dump(mode="json")) == params


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"response_format": "json"}, "response_format: expected an object whose type is text, json_object or"),
        ({"response_format": {"type": "xml"}}, "response_format: expected an object whose type is"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema: is not implemented"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema: expected an object with a schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}},
            "response_format.json_schema.schema: expected a JSON schema, got 3",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "x": 3}}},
            "response_format.json_schema.x: is not implemented",
        ),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag: is not implemented"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs: regex and choice cannot both"),
        ({"guided_json": "{"}, "guided_json: expected a JSON schema, but it is no JSON"),
        ({"guided_regex": ""}, "guided_regex: expected a text that is not empty, got"),
        ({"guided_choice": []}, "guided_choice: expected a list of texts"),
        ({"guided_choice": ["a", ""]}, "guided_choice: expected a list of texts"),
        (
            {"guided_choice": ["a"], "guided_regex": "b"},
            "guided_choice and guided_regex cannot both constrain one answer",
        ),
        ({"guided_decoding_backend": "x"}, "guided_decoding_backend: unknown field"),
        ({"guided_regex": "a", "min_tokens": 3}, "min_tokens and guided_regex cannot go together"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos and guided_regex cannot go together"),
    ],
)
def test_what_is_wrong_with_a_constraint(body, sentence):
    with pytest.raises(ValueError) as caught:
        SamplingParams.from_openai(body)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
