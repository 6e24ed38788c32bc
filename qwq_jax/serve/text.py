"""One sample's tokens as text that may be sent: nothing of a stop string, and thoughts apart from the answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from qwq_jax.chat import ThinkingSplitter
from qwq_jax.engine.request import Request, TokenLogprob
from qwq_jax.serve.codec import TextCodec


class StopHold:
    """Passes text on, but never a stop string, and for as long as it may be one not even its beginning.

    Example: with the stop string ``"END"``, pushes of ``"an E"``, ``"gg, E"`` and ``"ND"`` give ``"an "``, ``"Egg, "``
    and nothing.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> str:
        """The text that is certain now; nothing any more once a stop string was complete."""
        if self._stopped:
            return ""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._stopped = True
            return self._take(min(found))
        return self._take(len(self._held) - max((_beginning(self._held, stop) for stop in self._stop), default=0))

    def flush(self) -> str:
        """The rest, when no more text follows: what was held was no stop string."""
        return "" if self._stopped else self._take(len(self._held))

    def _take(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text


def _beginning(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, `stop` itself excluded."""
    return next(n for n in range(min(len(stop) - 1, len(text)), -1, -1) if text.endswith(stop[:n]))


@dataclass(frozen=True)
class PlacedToken:
    """A token, and the length of the text before it in characters."""

    token: TokenLogprob
    offset: int


@dataclass
class Ready:
    """What can be sent of a sample: text as ``(is_thinking, text)``, and the tokens that came since the last time.

    The text lags behind the tokens while it may be the beginning of a tag or of a stop string.
    """

    pieces: list[tuple[bool, str]] = field(default_factory=list)
    tokens: list[PlacedToken] = field(default_factory=list)


class SampleText:
    """The text of one sample as its tokens come.

    Args:
        codec: Knows the tokenizer.
        request: What is answered.
        split: Whether thoughts are told from the answer; else all text is the answer, tags included.
    """

    def __init__(self, codec: TextCodec, request: Request, *, split: bool) -> None:
        self._codec = codec
        self._detokenizer = codec.detokenizer()
        self._stop = StopHold(request.params.stop)
        self._min_tokens = request.params.min_tokens
        self._splitter = ThinkingSplitter(opened=codec.opens_thinking(request.prompt_token_ids))
        self._split = split
        self._length = 0
        self._ready = Ready()
        self._token_ids: list[int] = []

    def push(self, token: TokenLogprob) -> None:
        """Takes the next token."""
        self._token_ids.append(token.token_id)
        self._ready.tokens.append(PlacedToken(token, self._length))
        text = self._detokenizer.push(token.token_id)
        self._length += len(text)
        # What comes before the first token that may end the sample is no stop string.
        early = len(self._token_ids) < self._min_tokens
        self._add(text if early else self._stop.push(text))

    def finish(self) -> None:
        """Takes note that no token follows."""
        self._add(self._stop.push(self._detokenizer.flush()) + self._stop.flush())
        rest = self._splitter.flush()
        if self._split:
            self._append(rest)

    def take(self) -> Ready:
        """Hands out what is ready, and forgets it."""
        ready, self._ready = self._ready, Ready()
        return ready

    @property
    def waits_for_text(self) -> bool:
        """Whether tokens have come whose text cannot be sent yet."""
        return not self._ready.pieces

    @property
    def thought(self) -> bool:
        """Whether there are thoughts, empty ones included."""
        return self._splitter.thought

    @property
    def completion_tokens(self) -> int:
        """Tokens so far."""
        return len(self._token_ids)

    @property
    def reasoning_tokens(self) -> int:
        """Those of them that are thoughts, the closing tag included."""
        return self._codec.reasoning_tokens(self._token_ids) if self.thought else 0

    def _add(self, text: str) -> None:
        pieces = self._splitter.push(text)
        self._append(pieces if self._split else [(False, text)])

    def _append(self, pieces: Sequence[tuple[bool, str]]) -> None:
        ready = self._ready.pieces
        for is_thinking, text in pieces:
            if ready and ready[-1][0] is is_thinking:
                ready[-1] = (is_thinking, ready[-1][1] + text)
            elif text:
                ready.append((is_thinking, text))
