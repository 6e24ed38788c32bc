"""From what a request asks for to what the engine is told: thoughts bounded or left out, masks, refusals."""

import json
import shutil

import numpy as np
import pytest

from qwq_jax import embedded
from qwq_jax.chat import ChatTokenizer
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.engine.request import Completion, FinishReason
from qwq_jax.jobs.answer import chat_prompt, choice_of, hooks_of, request_from_ids, request_of, text_prompt
from qwq_jax.jobs.batch_file import PromptLine

OPEN, CLOSE = 510, 511
MESSAGES = ({"role": "user", "content": "1 + 1?"},)
SWITCH = (
    "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}A:"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return ChatTokenizer.from_directory(embedded.TINY_REASONER)


def variant(tmp_path, template=None, without_tags=False):
    """The tiny tokenizer with another template, or without tokens for the tags."""
    folder = shutil.copytree(
        embedded.TINY_REASONER, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors")
    )
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    if without_tags:
        for name, key in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", "added_tokens_decoder")):
            content = json.loads((folder / name).read_text())
            if key == "added_tokens":
                content[key] = [token for token in content[key] if token["id"] < OPEN]
            else:
                content[key] = {id: token for id, token in content[key].items() if int(id) < OPEN}
            (folder / name).write_text(json.dumps(content))
    return ChatTokenizer.from_directory(folder)


def line(**fields):
    return PromptLine(1, "line-1", SamplingParams(**fields), False, None, messages=MESSAGES)


def test_bounded_thoughts_bring_the_tokens_that_end_them(tokenizer):
    for fields in ({"max_thinking_tokens": 5}, {"min_thinking_tokens": 5}):
        request = request_of(line(**fields), tokenizer)
        assert request.thinking is not None and request.thinking.close == CLOSE
        assert request.thinking.closing.count(CLOSE) == 1 and CLOSE not in request.thinking.continuation
        assert tokenizer.decode(request.thinking.closing).endswith("\n</think>\n\n")
        assert tokenizer.decode(request.thinking.continuation) == "\nWait"
    assert request_of(line(), tokenizer).thinking is None


def test_thoughts_that_cannot_be_bounded_are_refused(tokenizer, tmp_path):
    params = SamplingParams(max_thinking_tokens=5)
    with pytest.raises(ValueError, match="max_thinking_tokens: the prompt does not end in <think>"):
        request_from_ids("r", params, tokenizer.encode("1 + 1 ="), tokenizer)
    bare = variant(tmp_path, without_tags=True)
    with pytest.raises(ValueError, match="max_thinking_tokens: the tokenizer has no token </think>"):
        request_of(line(max_thinking_tokens=5), bare)


def test_thoughts_that_the_prompt_opens_are_closed_where_they_are_not_wanted(tokenizer):
    plain = chat_prompt(MESSAGES, None, tokenizer)
    assert chat_prompt(MESSAGES, True, tokenizer) == plain
    closed = chat_prompt(MESSAGES, False, tokenizer)
    assert tokenizer.decode(closed) == tokenizer.decode(plain) + "\n</think>\n\n"
    assert tokenizer.decode(text_prompt(tokenizer.encode("x <think>"), False, tokenizer)) == "x <think>\n\n</think>\n\n"
    assert request_of(line(enable_thinking=False), tokenizer).prompt_token_ids == closed


@pytest.mark.parametrize("wanted", [True, False])
def test_a_prompt_without_thoughts_and_without_a_switch_is_refused(wanted, tokenizer):
    with pytest.raises(ValueError, match=f"enable_thinking: {str(wanted).lower()} cannot be had"):
        text_prompt(tokenizer.encode("1 + 1 ="), wanted, tokenizer)


def test_a_template_with_the_switch_is_told(tmp_path):
    switching = variant(tmp_path, SWITCH)
    assert switching.decode(chat_prompt(MESSAGES, False, switching)).endswith("A:<think>\n\n</think>\n\n")
    assert switching.decode(chat_prompt(MESSAGES, True, switching)).endswith("A:")
    assert chat_prompt(MESSAGES, None, switching) == chat_prompt(MESSAGES, True, switching)
    # The model opens its thoughts itself, so they can be bounded, and a constraint lets it.
    assert request_of(line(max_thinking_tokens=5), switching).thinking is not None
    form = SamplingParams.from_openai({"guided_regex": "[0-9]"}).constraint
    for enabled, expected in ((None, True), (True, True), (False, False)):
        mask = hooks_of(switching, request_of(line(constraint=form, enable_thinking=enabled), switching)).mask
        assert mask is not None and mask.active
        bits = np.zeros(16, np.uint32)
        mask.fill(bits)
        assert bool(bits[OPEN // 32] >> (OPEN % 32) & 1) is expected


def test_a_constraint_waits_for_the_end_of_the_thoughts(tokenizer):
    form = SamplingParams.from_openai({"guided_choice": ["yes", "no"]}).constraint
    thinking = hooks_of(tokenizer, request_of(line(constraint=form), tokenizer)).mask
    silent = hooks_of(tokenizer, request_of(line(constraint=form, enable_thinking=False), tokenizer)).mask
    assert thinking is not None and not thinking.active and silent is not None and silent.active
    thinking.push(CLOSE)
    assert thinking.active
    assert hooks_of(tokenizer, request_of(line(), tokenizer)).mask is None


def test_a_constraint_that_cannot_be_compiled_is_refused_before_it_is_served(tokenizer):
    form = SamplingParams.from_openai({"guided_regex": "("}).constraint
    with pytest.raises(ValueError, match="guided_regex: unclosed group"):
        request_of(line(constraint=form), tokenizer)


def test_a_stop_string_before_the_least_length_stops_nothing_and_cuts_nothing(tokenizer):
    ids = tuple(tokenizer.encode("one. two. three. four"))
    texts = [tokenizer.decode([token]) for token in ids]
    least = next(count for count in range(len(ids)) if "".join(texts[:count]).startswith("one. "))
    params = SamplingParams(stop=(".",), min_tokens=least + 1, max_tokens=40)
    request = request_from_ids("r", params, (65,), tokenizer)
    stop = hooks_of(tokenizer, request).stop
    ends = next(count for count, token in enumerate(ids, start=1) if stop.push(token))
    assert "".join(texts[:ends]) == "one. two."
    choice = choice_of(Completion("r", 0, ids[:ends], FinishReason.STOP), request, tokenizer)
    assert choice.content == "one. two"


@pytest.mark.parametrize("fields", [{"stop": ("</think>",)}, {"stop_token_ids": (CLOSE,)}, {"stop": ("Wait",)}])
def test_bounds_of_thoughts_refuse_stops_that_what_is_put_in_would_meet(tokenizer, fields):
    params = SamplingParams(max_thinking_tokens=5, max_tokens=90, **fields)
    with pytest.raises(ValueError, match="holds the stop .*: leave one out"):
        request_from_ids("r", params, tuple(tokenizer.encode("1 + 1<think>\n")), tokenizer)
