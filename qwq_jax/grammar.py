"""Answers of a given form: which tokens may come next, by a JSON schema, a regular expression or a grammar.

llguidance does the parsing; here it meets the tokenizer, and thoughts stay free: a constraint is one of the answer.
"""

import functools
import json
import logging
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from qwq_jax.chat import THINK_CLOSE, THINK_OPEN, ChatTokenizer
from qwq_jax.config.constraint import Constraint, ConstraintKind

_log = logging.getLogger(__name__)

# Between the parts of a JSON text. Without a limit a model can go on with white space for ever.
_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,40}"
# Models leave a blank line after their thoughts, which is no part of the answer.
_BLANK_LINE = 2


class Place(Enum):
    """Where in a completion its next token comes."""

    START = "start"
    """of a completion that may begin with thoughts"""
    THOUGHTS = "thoughts"
    BLANK = "blank"
    """right after the thoughts"""
    ANSWER = "answer"


@dataclass(frozen=True)
class Grammar:
    """A constraint, compiled for a tokenizer."""

    tokenizer: ChatTokenizer
    matcher: LLMatcher
    """At its beginning; masks take copies."""

    def mask(self, place: Place, stop_token_ids: Collection[int] = ()) -> "GrammarMask":
        """What watches one completion.

        Args:
            place: Where the completion begins.
            stop_token_ids: Tokens that end it, beside the model's own.
        """
        return GrammarMask(self.tokenizer, self.matcher.deep_copy(), place, stop_token_ids)


def compile_grammar(tokenizer: ChatTokenizer, constraint: Constraint) -> Grammar:
    """A constraint as a grammar over tokens; the last ones are remembered, for lines that share one.

    Raises:
        ValueError: It cannot be compiled; names the field and the reason.
    """
    return _compiled(tokenizer, constraint.kind, constraint.text, constraint.field)


@functools.lru_cache(maxsize=256)
def _compiled(tokenizer: ChatTokenizer, kind: ConstraintKind, text: str, field: str) -> Grammar:
    constraint = Constraint(kind=kind, text=text, field=field)
    if not tokenizer.eos_token_ids:
        raise ValueError(
            f"{constraint.field}: the tokenizer knows no end token, which an answer of a form has to end in"
        )
    matcher = LLMatcher(_token_trie(tokenizer), _written(constraint), log_level=0)
    if matcher.is_error():
        raise ValueError(f"{constraint.field}: {_reason(matcher.get_error())}")
    return Grammar(tokenizer, matcher)


@functools.lru_cache(maxsize=4)
def _token_trie(tokenizer: ChatTokenizer) -> LLTokenizer:
    return LLTokenizer(tokenizer.tokenizer.to_str(), eos_token=list(tokenizer.eos_token_ids))


def _written(constraint: Constraint) -> str:
    """A constraint in llguidance's own notation."""
    match constraint.kind:
        case ConstraintKind.JSON:
            if constraint.text in ("true", "{}"):
                return LLMatcher.grammar_from_json_schema("{}", defaults={"whitespace_pattern": _WHITE_SPACE})
            if constraint.text == "false":
                raise ValueError(f"{constraint.field}: the schema false allows nothing")
            return LLMatcher.grammar_from_json_schema(constraint.text, defaults={"whitespace_pattern": _WHITE_SPACE})
        case ConstraintKind.REGEX:
            return LLMatcher.grammar_from_regex(constraint.text)
        case ConstraintKind.CHOICE:
            texts = json.loads(constraint.text)
            return LLMatcher.grammar_from_lark(
                "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
            )
        case ConstraintKind.GRAMMAR:
            return LLMatcher.grammar_from_lark(constraint.text)


def _reason(message: str) -> str:
    """An error of llguidance in one line: it draws where in the text it stopped, which needs several."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])


class GrammarMask:
    """The tokens that may come next in one completion; the engine's `TokenMask`.

    In thoughts it forbids nothing. When the answer may end, the end tokens are among those allowed; when it is
    complete, they are all.
    """

    def __init__(
        self, tokenizer: ChatTokenizer, matcher: LLMatcher, place: Place, stop_token_ids: Collection[int] = ()
    ) -> None:
        self._matcher = matcher
        self._place = place
        self._ends = frozenset(tokenizer.eos_token_ids) | frozenset(stop_token_ids)
        self._ended = False
        self._detokenizer = tokenizer.detokenizer()
        self._tail = ""
        self._open = _single(tokenizer, THINK_OPEN)
        self._breaks = [_single(tokenizer, "\n" * count) for count in range(1, _BLANK_LINE + 1)]
        self._room = _BLANK_LINE

    @property
    def active(self) -> bool:
        """Whether it forbids anything now."""
        return self._place is not Place.THOUGHTS

    def fill(self, bits: np.ndarray) -> None:
        """Write the allowed tokens into `[ceil(V / 32)]` uint32: token t is bit t % 32 of word t // 32."""
        assert self.active and bits.dtype == np.uint32
        bits[:] = 0
        if self._ended or self._matcher.is_error():
            _set(bits, self._ends)
            return
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: len(bits)]
        bits[: len(words)] = words
        if self._matcher.is_error():
            _log.warning("a constraint became too complex, and its answer ends early: %s", self._matcher.get_error())
            bits[:] = 0
            _set(bits, self._ends)
        elif self._matcher.is_accepting():
            _set(bits, self._ends)
        if self._place is Place.START:
            _set(bits, self._open)
        if self._place is Place.BLANK:
            _set(bits, frozenset().union(*self._breaks[: self._room]))

    def push(self, token_id: int) -> None:
        """Take the token that was drawn, or put in."""
        if self._ended:
            return
        text = self._detokenizer.push(token_id)
        if self._place is Place.START and token_id in self._open:
            self._place = Place.THOUGHTS
        elif self._place is Place.THOUGHTS:
            self._tail = (self._tail + text)[-len(THINK_CLOSE) - len(text) :]
            if THINK_CLOSE in self._tail:
                self._place = Place.BLANK
        elif self._place is Place.BLANK and text and not text.strip("\n") and len(text) <= self._room:
            self._room -= len(text)
        else:
            self._place = Place.ANSWER
            self._ended = token_id in self._ends and self._matcher.is_accepting()
            if not self._ended and not self._matcher.is_error():
                taken = self._matcher.consume_token(token_id)
                assert taken, f"token {token_id} is not one that the constraint allows"


def _single(tokenizer: ChatTokenizer, text: str) -> frozenset[int]:
    """The token that a text is, if it is one."""
    ids = tokenizer.encode(text)
    return frozenset(ids if len(ids) == 1 else ())


def _set(bits: np.ndarray, tokens: Collection[int]) -> None:
    for token in tokens:
        if token // 32 < len(bits):
            bits[token // 32] |= np.uint32(1 << token % 32)
