"""`qwq-jax serve`: an OpenAI-compatible server in front of the engine."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwq_jax.chat import ChatTokenizer, IncrementalDetokenizer
from qwq_jax.checkpoint.store import open_checkpoint
from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.engine.engine import Engine
from qwq_jax.engine.request import Hooks, Request
from qwq_jax.jobs.answer import hooks_of, prompt_opens_thinking, reasoning_tokens, request_of, token_record
from qwq_jax.jobs.batch_file import parse_body
from qwq_jax.jobs.warm_up import compile_programs
from qwq_jax.serve.options import ServeOptions
from qwq_jax.serve.server import Server, bind

_log = logging.getLogger(__name__)


def serve(
    checkpoint: str,
    options: ServeOptions,
    *,
    engine: EngineConfig,
    mesh: MeshConfig,
    sampling: SamplingParams,
    warm_up: bool = True,
) -> None:
    """Serves a model until a signal asks to stop.

    Args:
        checkpoint: Directory, local or ``gs://``.
        options: Where to listen, and whom to serve.
        engine: Sizes of the engine.
        mesh: Devices.
        sampling: For requests that do not say themselves.
        warm_up: Whether all usual programs are compiled before the first client can connect.

    Raises:
        ValueError: The address or the checkpoint cannot be used.
        EngineFailed: The engine raised an error.
    """
    # What is wrong with the address is found before weights are loaded, which takes minutes.
    with bind(options.host, options.port) as listener:
        tokenizer = ChatTokenizer.from_directory(open_checkpoint(checkpoint).tokenizer_dir)
        loaded = Engine.from_checkpoint(checkpoint, mesh=mesh, config=engine)
        if warm_up:
            compile_programs(loaded)
        server = Server(loaded, TokenizerCodec(tokenizer, sampling), options)

        def announce(address: str) -> None:
            keys = " (an API key is needed)" if options.api_keys else ""
            _log.info("serving %s at %s/v1%s", options.model, address, keys)

        asyncio.run(server.run(listener, ready=announce))
    _log.info("drained")


def read_keys(path: Path) -> tuple[str, ...]:
    """The API keys of a file, one a line.

    Raises:
        ValueError: The file cannot be read, or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"--api-key-file {path}: cannot be read: {reason}") from None
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise ValueError(f"--api-key-file {path}: holds no key")
    return keys


def model_name(checkpoint: str) -> str:
    """The name under which a checkpoint is served if no other is given: its directory's."""
    return Path(checkpoint.rstrip("/")).name or checkpoint


@dataclass(frozen=True)
class TokenizerCodec:
    """A tokenizer and the rules of the batch format as the server's `TextCodec`.

    Attributes:
        tokenizer: The model's.
        sampling: For requests that do not say themselves.
    """

    tokenizer: ChatTokenizer
    sampling: SamplingParams

    def request(self, request_id: str, body: Mapping[str, Any]) -> Request:
        """The engine's request of a body; ValueError names the field that is wrong."""
        return request_of(parse_body(request_id, dict(body), self.sampling), self.tokenizer)

    def hooks(self, request: Request) -> Hooks:
        """What watches the text of one sample of a request."""
        return hooks_of(self.tokenizer, request)

    def detokenizer(self) -> IncrementalDetokenizer:
        """A decoder for the tokens of one sample."""
        return self.tokenizer.detokenizer()

    def opens_thinking(self, prompt: Sequence[int]) -> bool:
        """Whether completions of this prompt begin inside the thoughts."""
        return prompt_opens_thinking(prompt, self.tokenizer)

    def reasoning_tokens(self, tokens: Sequence[int]) -> int:
        """How many tokens of a completion that begins with thoughts belong to them."""
        return reasoning_tokens(tokens, self.tokenizer)

    def token_record(self, token_id: int, logprob: float) -> dict[str, Any]:
        """A token as OpenAI reports it."""
        return token_record(token_id, logprob, self.tokenizer)
