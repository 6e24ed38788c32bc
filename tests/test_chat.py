"""The tokenizer against transformers: ids, streaming and the family's chat template."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from qwq_jax.chat import ChatTokenizer, ThinkingSplitter, split_thinking
from tools import make_tiny_tokenizer

USER = {"role": "user", "content": "What is 38 + 4?"}
REPLY = {"role": "assistant", "content": "<think>\n38 + 4:\nones 8+4=12\n</think>\n\nThe answer is \\boxed{42}."}

# A template in the manner of QwQ and R1 with what ours does not use: tools, tojson, namespaces, loop controls, named
# special tokens, a refusal.
BUSY_TEMPLATE = """\
{%- set state = namespace(system="none") %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message["role"] == "system" %}
        {%- if not loop.first %}
            {{- raise_exception("system must come first") }}
        {%- endif %}
        {%- set state.system = message["content"] %}
        {%- continue %}
    {%- endif %}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- "<|im_start|>call " ~ call.function.name }} {{ call.function.arguments | tojson(indent=1) }}
        {%- endfor %}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {% generation %}{% if "</think>" in content %}{% set content = content.split("</think>")[-1] %}{% endif %}
        {{- content + eos_token }}{% endgeneration %}
    {%- else %}
        {{- "<|im_start|>" + message.role + "\\n" + message.content | trim + "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{{- "[" + state.system + "]" }}
{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer.write(path, problems=2000)
    return path


@pytest.fixture(scope="module")
def ours(directory: Path) -> ChatTokenizer:
    return ChatTokenizer.from_directory(directory)


@pytest.fixture(scope="module")
def theirs(directory: Path):
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def editable(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "tokenizer"))


CONVERSATIONS = {
    "one turn": [USER],
    "system": [{"role": "system", "content": "Be brief."}, USER],
    "answered": [USER, REPLY],
    "two turns": [USER, REPLY, {"role": "user", "content": "And 東京 🙂\n\n\n  tabs\t?"}],
    "three turns": [USER, REPLY, USER, REPLY, USER, REPLY],
    "reasoning apart": [USER, {"role": "assistant", "reasoning_content": "hm", "content": "42"}],
    "reasoning, its other name": [USER, {"role": "assistant", "reasoning": "hm", "content": "42"}],
    "tool": [USER, {"role": "assistant", "content": None, "tool_calls": []} | {"content": "I call."},
             {"role": "tool", "content": "42", "tool_call_id": "c1"}],
    "marks in the text": [{"role": "user", "content": "<|im_end|> </think> <think>"}],
    "empty": [{"role": "user", "content": ""}],
}  # fmt: skip


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_template_ids_equal_those_of_transformers(ours, theirs, name, add_generation_prompt):
    expected = theirs.apply_chat_template(
        CONVERSATIONS[name], add_generation_prompt=add_generation_prompt, return_dict=False
    )
    assert ours.apply_template(CONVERSATIONS[name], add_generation_prompt) == expected


CALL = {"function": {"name": "add", "arguments": {"a": [1, 2], "städte": "<東京>"}}}
BUSY_CONVERSATIONS = [
    [USER, REPLY, USER],
    [{"role": "system", "content": "Be brief."}, USER, REPLY],
    [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": " 3 \n"}],
]


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json", "named"])
@pytest.mark.parametrize("messages", BUSY_CONVERSATIONS)
def test_a_busy_template_renders_as_in_transformers(editable, messages, where):
    (editable / "chat_template.jinja").unlink()
    config = json.loads((editable / "tokenizer_config.json").read_text())
    config["bos_token"] = {"__type": "AddedToken", "content": "<|endoftext|>", "special": True}
    if where == "chat_template.jinja":
        (editable / where).write_text(BUSY_TEMPLATE)
    else:
        named = [{"name": "other", "template": "no"}, {"name": "default", "template": BUSY_TEMPLATE}]
        config["chat_template"] = named if where == "named" else BUSY_TEMPLATE
    (editable / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = ChatTokenizer.from_directory(editable), AutoTokenizer.from_pretrained(editable)
    for add in (True, False):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=add, return_dict=False)
        assert ours.apply_template(messages, add) == expected
    assert not ours.generation_prompt_opens_thinking


def test_thoughts_of_earlier_turns_are_removed(ours):
    text = ours.render([USER, REPLY, USER], add_generation_prompt=True)
    assert "ones" not in text and "<|im_start|>assistant\nThe answer is \\boxed{42}.<|im_end|>\n" in text
    assert text.endswith("<|im_start|>assistant\n<think>\n")
    assert ours.generation_prompt_opens_thinking


def test_a_training_conversation_continues_its_own_generation_prompt(ours):
    prompt = ours.apply_template([USER])
    whole = ours.apply_template([USER, REPLY], add_generation_prompt=False)
    assert whole[: len(prompt)] == prompt
    assert whole[len(prompt) :] == ours.encode(REPLY["content"].removeprefix("<think>\n") + "<|im_end|>\n")


def test_eos_ids_and_sizes(ours, theirs):
    assert ours.eos_token_ids == (theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs) == 512


@settings(max_examples=100, deadline=None)
@given(st.text())
@example("ﬁ é 🙂👩‍👩‍👧 東京 12345\r\n <think>\n")
def test_encoding_and_decoding_equal_transformers(ours, theirs, text):
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    for skip in (True, False):
        expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special_tokens=skip) == expected


def _stream(ours: ChatTokenizer, ids: list[int], *, skip: bool) -> list[str]:
    detokenizer = ours.detokenizer(skip_special_tokens=skip)
    return [*(detokenizer.push(id) for id in ids), detokenizer.flush()]


@settings(max_examples=100, deadline=None)
@given(st.text(), st.booleans())
@example("👩‍👩‍👧 東京 <|im_end|> é\n</think>", True)
def test_streamed_text_equals_the_full_decode_and_holds_no_half_character(ours, text, skip):
    ids = ours.encode(text)
    pieces = _stream(ours, ids, skip=skip)
    assert "".join(pieces) == ours.decode(ids, skip_special_tokens=skip)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 511)))
def test_streaming_any_ids_equals_the_full_decode(ours, ids):
    """A sampled model writes broken UTF-8 too: the replacement characters must be the same ones."""
    assert "".join(_stream(ours, ids, skip=True)) == ours.decode(ids)


def test_ids_without_a_token_stand_for_nothing(ours):
    """Models pad their vocabulary, so a random one may emit ids the tokenizer does not know."""
    assert _stream(ours, [*ours.encode("4"), 70000, *ours.encode("2")], skip=True) == ["4", "", "2", ""]


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("a\nb\n</think>\n\nc\n", True, ("a\nb", "c\n")),
        ("<think>\na\n</think>\n\nc", False, ("a", "c")),
        ("<think>\na</think>c", True, ("a", "c")),
        ("\n <think>a</think>c", False, ("a", "c")),
        ("never ends", True, ("never ends", "")),
        ("</think>\n\nc", True, ("", "c")),
        ("no thoughts </think> here", False, (None, "no thoughts </think> here")),
        (" c", False, (None, " c")),
        ("a</think>b</think>c", True, ("a", "b</think>c")),
        ("a</thinc</think>c", True, ("a</thinc", "c")),
        ("", True, ("", "")),
        ("", False, (None, "")),
    ],
)
def test_split_thinking(text, opened, expected):
    assert split_thinking(text, opened) == expected


PIECES = st.lists(st.sampled_from(["a", " ", "\n", "<", "</", "think>", "</think>", "<think>", ">", "🙂"]), max_size=12)


@settings(max_examples=300, deadline=None)
@given(PIECES, st.booleans(), st.data())
def test_the_splitter_gives_the_same_however_the_text_is_cut(pieces, opened, data):
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    splitter = ThinkingSplitter(opened=opened)
    out = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        out += splitter.push(text[start:end])
    out += splitter.flush()
    joined = ["".join(t for thinking, t in out if thinking is part) for part in (True, False)]
    reasoning, content = split_thinking(text, opened)
    assert joined == [reasoning or "", content]
    assert [thinking for thinking, _ in out] == sorted((thinking for thinking, _ in out), reverse=True)


def test_the_splitter_shows_thoughts_at_once():
    splitter = ThinkingSplitter(opened=True)
    assert splitter.push("Let me") == [(True, "Let me")]
    assert splitter.push(" see\n<") == [(True, " see")]
    assert splitter.push("3") == [(True, "\n<3")]
    assert splitter.push("\n</thi") == []
    assert splitter.push("nk>\n\nYes") == [(False, "Yes")]
    assert splitter.push("\n") == [(False, "\n")]


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "at least one message"),
        ("hello", "a list of objects"),
        ({"role": "user"}, "a list of objects"),
        ([USER, "hello"], r"messages\[1\]: an object with role and content"),
        ([USER, {"role": "wizard", "content": "x"}], r"messages\[1\]: unknown role 'wizard'"),
        ([{"content": "x"}], r"messages\[0\]: unknown role None"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\]: unknown role \['user'\]"),
        ([{"role": "user"}], r"messages\[0\]: content is missing"),
        ([{"role": "user", "content": 5}], r"messages\[0\]: content must be a string, not 5"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\].content\[0\]: only parts"),
    ],
)
def test_malformed_messages_are_named(ours, messages, sentence):
    with pytest.raises(ValueError, match=sentence):
        ours.apply_template(messages)


def test_text_parts_are_joined(ours):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "38 + 4?"}]
    assert ours.apply_template([{"role": "user", "content": parts}]) == ours.apply_template([USER])


def test_a_refusal_of_the_template_is_a_value_error(editable):
    (editable / "chat_template.jinja").write_text("{{ raise_exception('no tools here') }}")
    with pytest.raises(ValueError, match="refused the messages: no tools here"):
        ChatTokenizer.from_directory(editable).apply_template([USER])


def test_a_template_cannot_reach_the_interpreter(editable):
    (editable / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ValueError, match="refused"):
        ChatTokenizer.from_directory(editable).apply_template([USER])


def test_without_a_template_only_text_and_ids(editable):
    (editable / "chat_template.jinja").unlink()
    tokenizer = ChatTokenizer.from_directory(editable)
    assert tokenizer.decode(tokenizer.encode("42")) == "42"
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.apply_template([USER])


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("tool_calls", 5, r"messages\[1\].tool_calls: a list is needed, not 5"),
        ("tool_calls", [{"name": 5}], r"messages\[1\].tool_calls\[0\]: a function with a name is needed"),
        ("reasoning_content", 5, r"messages\[1\]: reasoning_content must be a string"),
    ],
)
def test_malformed_parts_of_a_message_are_named(ours, field, value, sentence):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", field: value}]
    with pytest.raises(ValueError, match=sentence):
        ours.apply_template(messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content + 5 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages[0].content * 10**17 }}",
    ],
)
def test_whatever_a_template_trips_over_is_a_sentence(editable, template):
    (editable / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match="the chat template of .* refused the messages"):
        ChatTokenizer.from_directory(editable).apply_template([{"role": "user", "content": "a"}])


def test_a_broken_template_is_named_at_once(editable):
    (editable / "chat_template.jinja").write_text("{% if messages %}\n{% iff %}")
    with pytest.raises(ValueError, match="tokenizer: line 2 of the chat template: "):
        ChatTokenizer.from_directory(editable)


MALFORMED = [None, 5, 1.5, -1, True, "", "x", [], [1.5], [[]], ["x"], [{}], [{"foo": 1}], {}, {"foo": 1}, {"5": []}]
MALFORMED += [
    {"type": "Sequence", "decoders": 5},
    {"x": {}},
    {"5": {}},
    {"5": {"content": 3}},
    {"999": {"content": "<new>", "special": "yes"}},
]


@pytest.mark.parametrize("value", MALFORMED, ids=repr)
@pytest.mark.parametrize(
    ("file", "field"),
    [
        ("tokenizer_config.json", "chat_template"),
        ("tokenizer_config.json", "added_tokens_decoder"),
        ("tokenizer_config.json", "eos_token"),
        ("generation_config.json", "eos_token_id"),
        ("tokenizer.json", "model"),
        ("tokenizer.json", "decoder"),
        ("tokenizer.json", "added_tokens"),
    ],
)
def test_a_malformed_field_is_at_most_a_value_error_that_names_its_file(editable, file, field, value):
    (editable / "chat_template.jinja").unlink()
    path = editable / file
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {field: value}))
    try:
        ChatTokenizer.from_directory(editable).special_ids  # noqa: B018
    except ValueError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    ("file", "field", "value", "sentence"),
    [
        ("tokenizer_config.json", "chat_template", [{"foo": 1}], "chat_template: each of several needs a name and a"),
        ("tokenizer_config.json", "chat_template", 5, "chat_template: a text is needed, not 5"),
        ("tokenizer_config.json", "added_tokens_decoder", [1], "added_tokens_decoder: an object is needed"),
        (
            "tokenizer_config.json",
            "added_tokens_decoder",
            {"5": {}},
            "added_tokens_decoder.5: an object with a content",
        ),
        ("tokenizer_config.json", "added_tokens_decoder", {"x": {}}, "added_tokens_decoder: 'x' is not a token id"),
        ("tokenizer_config.json", "eos_token", 5, "eos_token: a text is needed, not 5"),
        ("generation_config.json", "eos_token_id", 1.5, "eos_token_id: 1.5 is not a token id"),
        ("tokenizer.json", "model", [1], "only byte-level BPE tokenizers are supported"),
    ],
)
def test_a_malformed_field_is_told(editable, file, field, value, sentence):
    (editable / "chat_template.jinja").unlink()
    content = json.loads((editable / file).read_text())
    (editable / file).write_text(json.dumps(content | {field: value}))
    with pytest.raises(ValueError, match=f"{file}: {re.escape(sentence)}"):
        ChatTokenizer.from_directory(editable)


def test_a_template_that_is_no_text_is_named(editable):
    (editable / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="chat_template.jinja: not UTF-8 text"):
        ChatTokenizer.from_directory(editable)


def test_text_that_is_no_text_is_refused(ours):
    with pytest.raises(ValueError, match="not UTF-8"):
        ours.encode("a\udcff")


def test_directories_that_are_no_tokenizer(editable, tmp_path):
    with pytest.raises(ValueError, match="no tokenizer.json"):
        ChatTokenizer.from_directory(tmp_path / "absent")
    file = editable / "tokenizer.json"
    content = file.read_text()
    file.write_text(content[:1000])
    with pytest.raises(ValueError, match="tokenizer.json: not valid JSON"):
        ChatTokenizer.from_directory(editable)
    file.write_text(json.dumps(json.loads(content) | {"decoder": {"type": "Metaspace"}}))
    with pytest.raises(ValueError, match="only byte-level BPE"):
        ChatTokenizer.from_directory(editable)
    file.write_text(json.dumps(json.loads(content) | {"added_tokens": [{"id": "seven"}]}))
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer: "):
        ChatTokenizer.from_directory(editable)


def test_tokens_that_only_the_config_names_are_added(editable):
    config = json.loads((editable / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["512"] = config["added_tokens_decoder"]["507"] | {"content": "<|extra|>"}
    (editable / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTokenizer.from_directory(editable).encode("<|extra|>") == [512]
    assert AutoTokenizer.from_pretrained(editable).encode("<|extra|>") == [512]
    config["added_tokens_decoder"]["600"] = config["added_tokens_decoder"].pop("512")
    (editable / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="cannot have the id 600"):
        ChatTokenizer.from_directory(editable)


def test_importing_chat_imports_neither_transformers_nor_torch_nor_jax():
    code = "import sys, qwq_jax.chat; print([m for m in ('transformers', 'torch', 'jax') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_tokenizer_directory_is_reproducible(directory, tmp_path):
    make_tiny_tokenizer.write(tmp_path, problems=2000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in directory.iterdir()
    }
