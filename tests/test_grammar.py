"""What masks admit, found by walking at random through the tokens that they allow, is what was asked for."""

import json
import re

import numpy as np
import pytest

from qwq_jax import embedded
from qwq_jax.chat import ChatTokenizer
from qwq_jax.config.constraint import Constraint, ConstraintKind
from qwq_jax.grammar import Place, compile_grammar

OPEN, CLOSE, END = 510, 511, 509
SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": -5, "maximum": 12},
        "tag": {"enum": ["a", "b\n", None]},
        "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["n", "list"],
    "additionalProperties": False,
}
GRAMMAR = 'start: sum\nsum: NUMBER ("+" NUMBER)~1..3\nNUMBER: /[1-9][0-9]?/\n'


@pytest.fixture(scope="module")
def tokenizer():
    return ChatTokenizer.from_directory(embedded.TINY_REASONER)


def compiled(tokenizer, kind, text):
    return compile_grammar(tokenizer, Constraint(kind=ConstraintKind(kind), text=text, field="guided_" + kind))


def allowed(mask, vocab=512):
    bits = np.full(-(-vocab // 32), 0xFFFFFFFF, np.uint32)
    mask.fill(bits)
    return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))


def walk(tokenizer, mask, rng, longest=200):
    """A completion, drawn evenly from what is allowed; it ends when it may, so that it ends at all."""
    tokens = []
    while len(tokens) < longest:
        choice = allowed(mask)
        tokens.append(END if END in choice and rng.random() < 0.5 else int(rng.choice(choice)))
        mask.push(tokens[-1])
        if tokens[-1] in tokenizer.eos_token_ids:
            assert sorted(allowed(mask)) == sorted(tokenizer.eos_token_ids)
            return tokenizer.decode(tokens)
    return None


def fits_schema(text):
    value = json.loads(text)
    return (
        set(value) <= {"n", "tag", "list"}
        and type(value["n"]) is int
        and -5 <= value["n"] <= 12
        and value.get("tag") in ("a", "b\n", None)
        and 1 <= len(value["list"]) <= 3
        and all(type(one) is bool for one in value["list"])
    )


def is_json(text):
    json.loads(text)
    return True


REGEX = r"(ab|ba+)?-[^\nx]{2,4}[0-9]"
CHOICES = ["yes", "no", 'a "b" \\ \n', "é☃🙂", "yes, but"]


@pytest.mark.parametrize(
    ("kind", "text", "fits"),
    [
        ("json", json.dumps(SCHEMA), fits_schema),
        ("json", '{"type": "object"}', lambda text: isinstance(json.loads(text), dict)),
        ("json", "true", is_json),
        ("regex", REGEX, re.compile(REGEX).fullmatch),
        ("choice", json.dumps(CHOICES), CHOICES.__contains__),
        ("grammar", GRAMMAR, re.compile(r"[1-9][0-9]?(\+[1-9][0-9]?){1,3}").fullmatch),
    ],
    ids=["schema", "object", "any", "regex", "choice", "grammar"],
)
def test_random_answers_are_of_the_form(kind, text, fits, tokenizer, rng):
    grammar = compiled(tokenizer, kind, text)
    answers = [walk(tokenizer, grammar.mask(Place.ANSWER), rng) for _ in range(30)]
    ended = [answer for answer in answers if answer is not None]
    assert len(ended) >= 10 and len(set(ended)) >= 3
    for answer in ended:
        assert fits(answer)


@pytest.mark.parametrize(
    ("kind", "text", "answer"),
    [
        ("json", json.dumps(SCHEMA), '{"n": -3, "tag": null, "list": [true, false]}'),
        ("json", json.dumps(SCHEMA), '{\n  "n": 12,\n  "list": [\n    true\n  ]\n}'),
        ("regex", REGEX, "-(é9"),
        *[("choice", json.dumps(CHOICES), one) for one in CHOICES],
        ("grammar", GRAMMAR, "1+22+3"),
    ],
)
def test_every_answer_of_the_form_may_come_as_the_tokenizer_spells_it(kind, text, answer, tokenizer):
    mask = compiled(tokenizer, kind, text).mask(Place.ANSWER)
    for token in tokenizer.encode(answer):
        assert token in allowed(mask)
        mask.push(token)
    assert END in allowed(mask)


def test_thoughts_are_free_and_a_blank_line_follows_them(tokenizer):
    mask = compiled(tokenizer, "regex", "[0-9]{2}").mask(Place.THOUGHTS)
    for token in tokenizer.encode("so 3 < 4, and </thin"):
        assert not mask.active
        mask.push(token)
    mask.push(CLOSE)
    digits, blank = set(tokenizer.encode("0123456789")), set(tokenizer.encode("\n"))
    assert mask.active and digits < set(allowed(mask)) and blank < set(allowed(mask))
    for token in tokenizer.encode("\n\n"):
        mask.push(token)
    assert set(allowed(mask)) == digits
    for token in tokenizer.encode("42"):
        mask.push(token)
    assert set(allowed(mask)) == set(tokenizer.eos_token_ids)


def test_a_tag_spelt_in_letters_ends_the_thoughts_too(tokenizer):
    mask = compiled(tokenizer, "regex", "[0-9]").mask(Place.THOUGHTS)
    letters = [tokenizer.encode(letter)[0] for letter in "</think>"]
    for token in letters:
        assert not mask.active
        mask.push(token)
    assert mask.active


def test_a_model_that_opens_its_thoughts_itself_may(tokenizer):
    grammar = compiled(tokenizer, "regex", "[0-9]")
    mask = grammar.mask(Place.START)
    assert OPEN in allowed(mask) and OPEN not in allowed(grammar.mask(Place.ANSWER))
    mask.push(OPEN)
    assert not mask.active
    other = grammar.mask(Place.START)
    other.push(tokenizer.encode("7")[0])
    assert other.active and set(allowed(other)) == set(tokenizer.eos_token_ids)


def test_stop_tokens_may_come_where_the_answer_may_end(tokenizer):
    mask = compiled(tokenizer, "regex", "1+").mask(Place.ANSWER, stop_token_ids=(3,))
    assert 3 not in allowed(mask)
    mask.push(tokenizer.encode("1")[0])
    assert {3, END, tokenizer.encode("1")[0]} <= set(allowed(mask))
    mask.push(3)
    assert set(allowed(mask)) == {3, *tokenizer.eos_token_ids}


def test_a_mask_may_be_wider_than_the_tokenizer_and_samples_do_not_share_one(tokenizer):
    """Models round their vocabulary up; of a grammar that two samples share each has its own copy."""
    grammar = compiled(tokenizer, "regex", "12")
    first, second = grammar.mask(Place.ANSWER), grammar.mask(Place.ANSWER)
    first.push(tokenizer.encode("1")[0])
    assert set(allowed(second, vocab=1000)) == set(tokenizer.encode("1"))
    assert set(allowed(first, vocab=1000)) == set(tokenizer.encode("2"))
    assert compiled(tokenizer, "regex", "12") is grammar


@pytest.mark.parametrize(
    ("kind", "text", "sentence"),
    [
        ("regex", "a(", "guided_regex: unclosed group"),
        ("regex", "(?=a)b", "guided_regex: look-around"),
        ("json", '{"type": "objec"}', "guided_json: Invalid type: objec"),
        ("json", '{"uniqueItems": true, "type": "array"}', "guided_json: Unimplemented keys"),
        ("json", "false", "guided_json: the schema false allows nothing"),
        ("grammar", "start: foo", 'guided_grammar: at 1(8): unknown name: "foo"'),
    ],
)
def test_what_cannot_be_compiled_is_said_in_one_line(kind, text, sentence, tokenizer):
    with pytest.raises(ValueError) as caught:
        compiled(tokenizer, kind, text)
    assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value)


def test_white_space_does_not_go_on_for_ever(tokenizer):
    mask = compiled(tokenizer, "json", '{"type": "object"}').mask(Place.ANSWER)
    mask.push(tokenizer.encode("{")[0])
    space = tokenizer.encode(" ")[0]
    for _ in range(40):
        assert space in allowed(mask)
        mask.push(space)
    assert not {space, *tokenizer.encode("\n")} & set(allowed(mask))
