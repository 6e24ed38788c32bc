"""How the server listens, whom it serves, and when it turns requests away."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ServeOptions:
    """Everything about the server that is not the engine's.

    Attributes:
        model: Name under which the model is served.
        host: Name or address to listen on.
        port: 0 takes a free one.
        api_keys: Any of these opens ``/v1``; none leaves it open to all.
        max_waiting: Requests that may wait for a row of the engine; one more is answered 429.
        drain_seconds: How long running requests may go on after a signal to stop.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_waiting: int = 256
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("served model name: expected a text that is not empty")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port: expected 0 to 65535, got {self.port}")
        if not all(key.isascii() and key.isprintable() and key and " " not in key for key in self.api_keys):
            raise ValueError("API key: expected printable ASCII without spaces, as HTTP headers carry it")
        if self.max_waiting < 0:
            raise ValueError(f"max_waiting: expected 0 or more, got {self.max_waiting}")
        if not 0 <= self.drain_seconds < float("inf"):
            raise ValueError(f"drain_seconds: expected 0 or more, got {self.drain_seconds}")
