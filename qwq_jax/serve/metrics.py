"""What the server counts, for Prometheus."""

from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from qwq_jax.serve.worker import Load

_FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_BETWEEN_TOKENS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)


class Outcome(StrEnum):
    """How a request to ``/v1`` ended."""

    COMPLETED = "completed"
    INVALID = "invalid"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"
    CANCELLED = "cancelled"
    FAILED = "failed"


def outcome_of(status: int) -> Outcome:
    """The outcome of a request that is answered with this HTTP status."""
    known = {429: Outcome.OVERLOADED, 503: Outcome.UNAVAILABLE}
    if status in known:
        return known[status]
    return Outcome.COMPLETED if status < 400 else Outcome.INVALID if status < 500 else Outcome.FAILED


class ServerMetrics:
    """Counters of one server; each has its own registry, so that nothing is global."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("qwq_requests", "Requests to /v1 by outcome.", ["outcome"], registry=registry)
        for outcome in Outcome:
            self._requests.labels(outcome.value)
        self._waiting = Gauge("qwq_waiting_sequences", "Sequences that wait for a row.", registry=registry)
        self._running = Gauge("qwq_running_sequences", "Sequences that have a row.", registry=registry)
        self._free_pages = Gauge("qwq_free_pages", "Pages of the key-value cache that are free.", registry=registry)
        self._prompt = Counter("qwq_prompt_tokens", "Tokens of prompts that were taken.", registry=registry)
        self._generated = Counter("qwq_generated_tokens", "Tokens that were drawn.", registry=registry)
        self._steps = Counter("qwq_engine_steps", "Steps of the engine.", registry=registry)
        self._steps_seen = 0
        self._first = Histogram(
            "qwq_time_to_first_token_seconds",
            "From the arrival of a request to its first token.",
            buckets=_FIRST_TOKEN_SECONDS,
            registry=registry,
        )
        self._between = Histogram(
            "qwq_inter_token_seconds",
            "Between two tokens of a sequence; tokens that come together share their time.",
            buckets=_BETWEEN_TOKENS_SECONDS,
            registry=registry,
        )

    def ended(self, outcome: Outcome) -> None:
        """Counts a request."""
        self._requests.labels(outcome.value).inc()

    def load(self, load: Load) -> None:
        """Notes how full the engine is."""
        self._waiting.set(load.waiting)
        self._running.set(load.running)
        self._free_pages.set(load.free_pages)
        self._steps.inc(load.steps - self._steps_seen)
        self._steps_seen = load.steps

    def prompt_tokens(self, count: int) -> None:
        """Counts the tokens of a prompt."""
        self._prompt.inc(count)

    def tokens(self, count: int) -> None:
        """Counts tokens that were drawn."""
        self._generated.inc(count)

    def first_token(self, seconds: float) -> None:
        """Notes how long a request waited for its first token."""
        self._first.observe(seconds)

    def between_tokens(self, seconds: float, count: int) -> None:
        """Notes that `count` tokens came `seconds` after the one before them."""
        for _ in range(count):
            self._between.observe(seconds / count)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
