"""Text at the ends of the engine: tokenizer, chat template, incremental decoding, thoughts apart from the answer.

A Hugging Face tokenizer directory is read with the `tokenizers` and `jinja2` packages alone: the ids are those of
transformers' ``apply_chat_template`` (the tests hold the two together), and a command starts a second earlier.
"""

import codecs
import datetime
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from tokenizers import AddedToken, Tokenizer

ROLES = ("system", "user", "assistant", "tool")
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
_THINKING_SWITCH = "enable_thinking"
# The names that thoughts are passed under; templates read the first.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# What the code of a template may end in.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)

_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")

Message = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class ChatTokenizer:
    """A byte-level BPE tokenizer and the chat template that belongs to it.

    Example: ``tokenizer = ChatTokenizer.from_directory(path)``, then
    ``tokenizer.apply_template([{"role": "user", "content": "What is 38 + 4?"}])`` gives the ids of the prompt.
    """

    directory: Path
    tokenizer: Tokenizer = field(repr=False)
    template: str | None = field(repr=False)
    special_tokens: Mapping[str, str]
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_directory(cls, path: str | Path) -> "ChatTokenizer":
        """Read tokenizer.json and what lies beside it: tokenizer_config, chat_template, generation_config."""
        directory = Path(path)
        source = directory / "tokenizer.json"
        if not source.is_file():
            raise ValueError(
                f"{directory}: no tokenizer.json; a tokenizer directory in the Hugging Face layout is needed"
            )
        if not _is_byte_level(_read_json(source)):
            raise ValueError(f"{source}: only byte-level BPE tokenizers are supported")
        tokenizer = _load_tokenizer(source)
        config = _read_json(directory / "tokenizer_config.json")
        _add_missing_tokens(tokenizer, config.get("added_tokens_decoder"), directory / "tokenizer_config.json")
        special_tokens = _special_tokens(config, directory / "tokenizer_config.json")
        template = _template(directory, config)
        if template is not None:
            try:
                _compile(template)
            except jinja2.TemplateSyntaxError as error:
                raise ValueError(f"{directory}: line {error.lineno} of the chat template: {error.message}") from None
        return cls(
            directory=directory,
            tokenizer=tokenizer,
            template=template,
            special_tokens=special_tokens,
            eos_token_ids=_eos_token_ids(directory, tokenizer, special_tokens),
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens the tokenizer knows, added tokens counted; a model's embedding may have more rows."""
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text; a mark such as ``<|im_end|>`` written in it becomes its one token, as in transformers."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("the text holds what is no character: bytes that are not UTF-8, or half a pair") from None
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids; ``<think>`` and ``</think>`` stay, they are not special tokens in this family."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(self, *, skip_special_tokens: bool = True) -> "IncrementalDetokenizer":
        """A decoder for tokens that arrive one by one."""
        return IncrementalDetokenizer(self._token_bytes, skip=self._skipped if skip_special_tokens else frozenset())

    def apply_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, *, enable_thinking: bool | None = None
    ) -> list[int]:
        """Ids of a conversation, equal to transformers' ``apply_chat_template``."""
        return self.encode(self.render(messages, add_generation_prompt, enable_thinking=enable_thinking))

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, *, enable_thinking: bool | None = None
    ) -> str:
        """The conversation as the template writes it; a template without the switch does not see `enable_thinking`."""
        checked = [checked_message(message, index) for index, message in enumerate(_listed(messages))]
        switch = {} if enable_thinking is None else {_THINKING_SWITCH: enable_thinking}
        return self._render(checked, add_generation_prompt, switch)

    @property
    def switches_thinking(self) -> bool:
        """Whether the template can be told to have the model think or not."""
        return self.template is not None and _THINKING_SWITCH in self.template

    @functools.cached_property
    def generation_prompt_opens_thinking(self) -> bool:
        """Whether the prompt itself ends in ``<think>``, so that a completion begins inside the thoughts."""
        messages = [{"role": "user", "content": "?"}]
        return self._render(messages, True, {}).rstrip().endswith(THINK_OPEN)

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool, switch: dict[str, bool]) -> str:
        if self.template is None:
            raise ValueError(f"{self.directory}: this tokenizer has no chat template; give a prompt or token ids")
        try:
            return _compile(self.template).render(
                **self.special_tokens,
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **switch,
            )
        except _TEMPLATE_ERRORS as error:
            reason = str(error) or type(error).__name__
            raise ValueError(f"the chat template of {self.directory} refused the messages: {reason}") from error

    @functools.cached_property
    def _token_bytes(self) -> dict[int, bytes]:
        alphabet = _byte_alphabet()
        return {id: _bytes_of_token(token, alphabet) for token, id in self.tokenizer.get_vocab().items()}

    @functools.cached_property
    def special_ids(self) -> Mapping[str, int]:
        """Tokens that `decode` leaves out, such as ``<|im_end|>``, with their ids."""
        added = self.tokenizer.get_added_tokens_decoder()
        return {token.content: id for id, token in added.items() if token.special}

    @functools.cached_property
    def _skipped(self) -> frozenset[int]:
        return frozenset(self.special_ids.values())


class IncrementalDetokenizer:
    """Turns tokens into text as they come, and never hands out half a character.

    The texts of all pushes and the final flush, joined, equal ``ChatTokenizer.decode`` of all ids.
    """

    def __init__(self, token_bytes: Mapping[int, bytes], *, skip: frozenset[int]) -> None:
        self._token_bytes = token_bytes
        self._skip = skip
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The text that this token completes, possibly none; an id without a token stands for nothing."""
        if id in self._skip:
            return ""
        return self._decoder.decode(self._token_bytes.get(id, b""))

    def flush(self) -> str:
        """What is left at the end: a replacement character for a character that was never finished."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class ThinkingSplitter:
    r"""Cuts streamed text into thoughts and answer, wherever the tags fall between the pieces.

    The tags and the line breaks beside them are dropped. Thoughts start at once where the prompt opened them, else at
    a ``<think>`` that the text begins with; the first ``</think>`` ends them for good.

    Example: ``ThinkingSplitter(opened=True).push("2+2\n</think>\n\n4")`` gives ``[(True, "2+2"), (False, "4")]``.
    """

    def __init__(self, *, opened: bool) -> None:
        self._part = _Part.BEFORE
        self._opened = opened
        self._held = ""

    def push(self, text: str) -> list[tuple[bool, str]]:
        """The pieces now certain, as ``(is_thinking, text)``."""
        self._held += text
        return [piece for piece in self._take(final=False) if piece[1]]

    def flush(self) -> list[tuple[bool, str]]:
        """The rest, when no more text follows."""
        return [piece for piece in self._take(final=True) if piece[1]]

    @property
    def thought(self) -> bool:
        """Whether thoughts have begun."""
        return self._opened

    def _take(self, *, final: bool) -> Iterator[tuple[bool, str]]:
        if self._part is _Part.BEFORE and not self._begin(final=final):
            return
        if self._part is _Part.THOUGHT_START:
            self._held = self._held.lstrip("\n")
            if self._held:
                self._part = _Part.THOUGHTS
        if self._part in (_Part.THOUGHT_START, _Part.THOUGHTS):
            yield True, self._thoughts(final=final)
        if self._part is _Part.ANSWER_START:
            self._held = self._held.lstrip("\n")
            if self._held:
                self._part = _Part.ANSWER
        if self._part is _Part.ANSWER:
            yield False, self._held
            self._held = ""

    def _begin(self, *, final: bool) -> bool:
        """Leave the state before everything, once it is certain whether the text starts with an opening tag."""
        start = self._held.lstrip()
        if len(start) < len(THINK_OPEN) and THINK_OPEN.startswith(start) and not final:
            return False
        if start.startswith(THINK_OPEN):
            self._opened = True
            self._held = start[len(THINK_OPEN) :]
        self._part = _Part.THOUGHT_START if self._opened else _Part.ANSWER
        return True

    def _thoughts(self, *, final: bool) -> str:
        """Thoughts up to the closing tag, or up to what may be the beginning of it."""
        before, closed, after = self._held.partition(THINK_CLOSE)
        if closed:
            self._part, self._held = _Part.ANSWER_START, after
            return before.rstrip("\n")
        keep = 0 if final else _possible_tag(before)
        sure = before[: len(before) - keep].rstrip("\n")
        self._held = "" if final else before[len(sure) :]
        return sure


class _Part(Enum):
    BEFORE = "before"
    THOUGHT_START = "thought start"
    THOUGHTS = "thoughts"
    ANSWER_START = "answer start"
    ANSWER = "answer"


def split_thinking(text: str, opened: bool) -> tuple[str | None, str]:
    r"""A whole completion as ``(reasoning_content, content)``; None where it holds no thoughts.

    ``opened`` says that the prompt already ended in ``<think>``. Thoughts that were cut off leave an empty content.

    >>> split_thinking("2 and 2...\n</think>\n\n4", opened=True)
    ('2 and 2...', '4')
    """
    splitter = ThinkingSplitter(opened=opened)
    pieces = splitter.push(text) + splitter.flush()
    reasoning = "".join(piece for is_thinking, piece in pieces if is_thinking)
    content = "".join(piece for is_thinking, piece in pieces if not is_thinking)
    return (reasoning if splitter.thought else None), content


def checked_message(message: Message, index: int) -> dict[str, Any]:
    """A message the template can be given; ValueError with its place in the conversation where it is malformed.

    Content may be a string or a list of OpenAI text parts, which are joined. Keys whose value is None are dropped, and
    thoughts are found under each name that templates read, as in transformers.
    """
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: an object with role and content is needed, not {message!r}")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}: unknown role {role!r}; expected one of {', '.join(ROLES)}")
    checked = {key: value for key, value in message.items() if value is not None}
    reasoning = next((checked[key] for key in _REASONING_KEYS if key in checked), None)
    if reasoning is not None:
        checked = {"thinking": reasoning, **checked, "reasoning_content": reasoning}
    content = checked.get("content")
    if isinstance(content, list):
        checked["content"] = "".join(_text_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    elif content is None:
        if role != "assistant" or not checked.get("tool_calls"):
            raise ValueError(f"{where}: content is missing")
    elif not isinstance(content, str):
        raise ValueError(f"{where}: content must be a string, not {content!r}")
    for name in ("reasoning_content", "name", "tool_call_id"):
        if not isinstance(checked.get(name, ""), str):
            raise ValueError(f"{where}: {name} must be a string, not {checked[name]!r}")
    _check_tool_calls(checked.get("tool_calls", []), f"{where}.tool_calls")
    return checked


def _check_tool_calls(calls: Any, where: str) -> None:
    """OpenAI's shape: ``[{"function": {"name": "...", "arguments": ...}}]``."""
    if not isinstance(calls, list):
        raise ValueError(f"{where}: a list is needed, not {calls!r}")
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where}[{index}]: a function with a name is needed, not {call!r}")


def _listed(messages: Sequence[Message]) -> Sequence[Message]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages: a list of objects is needed, not {messages!r}")
    if not messages:
        raise ValueError("messages: at least one message is needed")
    return messages


def _text_part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f'{where}: only parts {{"type": "text", "text": "..."}} are supported, not {part!r}')
    return part["text"]


def _possible_tag(text: str) -> int:
    """Length of the longest end of ``text`` that may grow into a closing tag."""
    return next(n for n in range(len(THINK_CLOSE) - 1, -1, -1) if text.endswith(THINK_CLOSE[:n]))


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    """The template in the environment transformers gives its chat templates: sandboxed, with the same additions."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks what the assistant wrote; here the text simply passes through."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is needed")
    return content


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path}: not a tokenizer: {error}") from error


def _template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else the template in tokenizer_config.json (of several named ones, the default)."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 text: {error}") from None
    where, template = directory / "tokenizer_config.json", config.get("chat_template")
    if isinstance(template, list):
        if not all(isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in template):
            raise ValueError(f"{where}: chat_template: each of several needs a name and a template")
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    if not isinstance(template, str | None):
        raise ValueError(f"{where}: chat_template: a text is needed, not {template!r}")
    return template


def _special_tokens(config: Mapping[str, Any], where: Path) -> dict[str, str]:
    """The named special tokens that templates may use, such as ``bos_token``."""
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        token = config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if not isinstance(content, str | None):
            raise ValueError(f"{where}: {name}: a text is needed, not {content!r}")
        if content is not None:
            found[name] = content
    return found


def _eos_token_ids(directory: Path, tokenizer: Tokenizer, special_tokens: Mapping[str, str]) -> tuple[int, ...]:
    """The ids of generation_config.json in its order, then the tokenizer's own end token."""
    where = directory / "generation_config.json"
    listed = _read_json(where).get("eos_token_id")
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    strange = next((id for id in ids if type(id) is not int or id < 0), None)
    if strange is not None:
        raise ValueError(f"{where}: eos_token_id: {strange!r} is not a token id")
    own = tokenizer.token_to_id(special_tokens["eos_token"]) if "eos_token" in special_tokens else None
    return tuple(dict.fromkeys([*ids, *([] if own is None else [own])]))


def _add_missing_tokens(tokenizer: Tokenizer, listed: Any, where: Path) -> None:
    """Tokens that only tokenizer_config.json knows; they must land on the ids it gives them."""
    known = tokenizer.get_added_tokens_decoder()
    for id, entry in sorted(_listed_tokens(listed, where).items()):
        if id in known:
            continue
        flags = {name: entry[name] for name in _TOKEN_FLAGS if name in entry}
        token = AddedToken(entry["content"], special=entry.get("special", False), **flags)
        tokenizer.add_special_tokens([token]) if token.special else tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != id:
            raise ValueError(f"{where}: added token {token.content!r} cannot have the id {id}")


def _listed_tokens(listed: Any, where: Path) -> dict[int, Mapping[str, Any]]:
    """``added_tokens_decoder``, checked."""
    if listed is None:
        return {}
    if not isinstance(listed, dict):
        raise ValueError(f"{where}: added_tokens_decoder: an object is needed, not {listed!r}")
    for id, entry in listed.items():
        if not id.isdecimal():
            raise ValueError(f"{where}: added_tokens_decoder: {id!r} is not a token id")
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise ValueError(f"{where}: added_tokens_decoder.{id}: an object with a content is needed, not {entry!r}")
        strange = next(
            (flag for flag in (*_TOKEN_FLAGS, "special") if not isinstance(entry.get(flag, True), bool)), None
        )
        if strange is not None:
            raise ValueError(f"{where}: added_tokens_decoder.{id}.{strange}: {entry[strange]!r} is not true or false")
    return {int(id): entry for id, entry in listed.items()}


def _is_byte_level(content: Mapping[str, Any]) -> bool:
    decoder = content.get("decoder")
    if isinstance(decoder, dict) and decoder.get("type") == "Sequence" and isinstance(decoder.get("decoders"), list):
        decoder = decoder["decoders"][0] if len(decoder["decoders"]) == 1 else None
    return _type_of(content.get("model")) == "BPE" and _type_of(decoder) == "ByteLevel"


def _type_of(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else None


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level BPE: itself if printable, else one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _bytes_of_token(token: str, alphabet: Mapping[str, int]) -> bytes:
    """A token spelt in the byte alphabet; one with any other character (some added tokens) stands for itself."""
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode()
