"""`qwq-jax chat`: talk to a model in the terminal, its thinking dimmed, tokens shown as they come."""

import functools
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console
from rich.text import Text

from qwq_jax.chat import ChatTokenizer, ThinkingSplitter
from qwq_jax.checkpoint.store import open_checkpoint
from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.inference import CHAT_SAMPLING
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.engine.engine import Engine
from qwq_jax.engine.request import NewToken
from qwq_jax.interrupt import StopRequested
from qwq_jax.jobs.answer import chat_prompt, hooks_of, prompt_opens_thinking, request_from_ids

HELP = "/reset forgets the conversation, /exit or the end of the input leaves, Ctrl-C stops an answer"


def chat(
    checkpoint: str,
    *,
    engine: EngineConfig,
    mesh: MeshConfig,
    sampling: SamplingParams = CHAT_SAMPLING,
    source: TextIO | None = None,
    console: Console | None = None,
) -> None:
    """Reads messages, one a line, and answers each, until the input ends or says ``/exit``.

    Args:
        checkpoint: Directory, local or ``gs://``.
        engine: Sizes of the engine; one row is enough and is what is used.
        mesh: Devices.
        sampling: How tokens are drawn.
        source: Where messages come from, stdin by default; a prompt is shown only if it is a terminal.
        console: Where answers go, stdout by default.

    Raises:
        ValueError: The checkpoint cannot be used, or sampling asks for what a terminal does not show.
    """
    if sampling.n != 1 or sampling.logprobs or sampling.stop or sampling.prompt_logprobs is not None:
        raise ValueError(
            "sampling.n, sampling.logprobs, sampling.prompt_logprobs and sampling.stop have no meaning in a chat: "
            "leave them out"
        )
    messages = source if source is not None else sys.stdin
    console = console or Console(highlight=False, soft_wrap=True)
    tokenizer = ChatTokenizer.from_directory(open_checkpoint(checkpoint).tokenizer_dir)
    one_row = engine.model_copy(update={"max_sequences": 1, "max_prefill_sequences": 1})
    server = Engine.from_checkpoint(checkpoint, mesh=mesh, config=one_row)
    conversation = Conversation(server, tokenizer, sampling)
    if messages.isatty():
        console.print(HELP, style="dim")
    for message in _messages(messages, console):
        if message == "/exit":
            return
        if message == "/help":
            console.print(HELP, style="dim")
            continue
        if message == "/reset":
            conversation.reset()
            console.print("forgotten", style="dim")
            continue
        _answer(conversation, message, console)


@dataclass
class Conversation:
    """The messages so far, without thoughts, and the engine that goes on with them."""

    engine: Engine
    tokenizer: ChatTokenizer
    sampling: SamplingParams
    messages: list[dict[str, str]] = field(default_factory=list)
    _count: int = 0

    def reset(self) -> None:
        """Forget all messages."""
        self.messages = []

    def ask(self, message: str) -> Generator[tuple[bool, str], None, None]:
        """The answer in pieces, as ``(is_thinking, text)``.

        Stopped early (the iterator closed), what was said so far is remembered, if anything was; a message that
        cannot be answered is a ValueError, and is not remembered.
        """
        asked = [*self.messages, {"role": "user", "content": message}]
        prompt = chat_prompt(asked, self.sampling.enable_thinking, self.tokenizer)
        self._count += 1
        request = request_from_ids(f"chat-{self._count}", self.sampling, prompt, self.tokenizer)
        self.engine.check(request)
        content = ""
        tokens = self.engine.stream(request, functools.partial(hooks_of, self.tokenizer))
        try:
            for is_thinking, text in _pieces(tokens, self.tokenizer, prompt_opens_thinking(prompt, self.tokenizer)):
                content += "" if is_thinking else text
                yield is_thinking, text
        finally:
            tokens.close()
            if content:
                self.messages = [*asked, {"role": "assistant", "content": content}]


def _pieces(tokens: Iterator[NewToken], tokenizer: ChatTokenizer, opened: bool) -> Iterator[tuple[bool, str]]:
    detokenizer, splitter = tokenizer.detokenizer(), ThinkingSplitter(opened=opened)
    for new in tokens:
        yield from splitter.push(detokenizer.push(new.token.token_id))
    yield from splitter.push(detokenizer.flush())
    yield from splitter.flush()


def _messages(source: TextIO, console: Console) -> Iterator[str]:
    """Lines of the source that say something; Ctrl-C at the prompt leaves, as the end of the input does."""
    while True:
        if source.isatty():
            console.print("> ", style="bold", end="")
        try:
            line = source.readline()
        except KeyboardInterrupt:
            line = ""
        if not line:
            return
        if line.strip():
            yield line.strip()


def _answer(conversation: Conversation, message: str, console: Console) -> None:
    """Shows one answer as it comes; a signal stops it between two tokens, never within a step."""
    pieces = conversation.ask(message)
    thought = False
    try:
        with StopRequested() as stop:
            for is_thinking, text in pieces:
                if thought and not is_thinking:
                    console.print("\n")
                thought = is_thinking
                console.print(Text(text, style="dim italic" if is_thinking else ""), end="")
                console.file.flush()
                if stop():
                    console.print("\nstopped", style="dim", end="")
                    break
        console.print()
    except ValueError as error:
        console.print(f"cannot answer: {error}", style="red")
    finally:
        pieces.close()
