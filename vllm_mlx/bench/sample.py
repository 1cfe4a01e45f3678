"""What one request gave: times, tokens, text, and how it ended."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class FailureKind(StrEnum):
    """Why a request has no complete answer."""

    CONNECTION = "connection"
    """No connection, or it broke before the answer began."""
    TIMEOUT = "timeout"
    """Nothing arrived for too long."""
    STATUS = "status"
    """An HTTP status other than 2xx."""
    BROKEN_STREAM = "broken_stream"
    """The stream ended without a finish reason, or before its end as HTTP or SSE say it."""
    ERROR_EVENT = "error_event"
    """The stream carried an error."""
    MALFORMED = "malformed"
    """The stream carried something that is no chunk of an answer."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed request."""

    kind: FailureKind
    message: str
    status: int | None = None

    @property
    def label(self) -> str:
        """Class of failures that it is counted in: 'status 503', 'timeout'."""
        return f"{self.kind} {self.status}" if self.status is not None else str(self.kind)

    @property
    def is_out_of_memory(self) -> bool:
        """Whether the message speaks of memory that ran out."""
        words = r"out of memory|insufficient memory|\boom\b|failed to allocate"
        return re.search(words, self.message, re.IGNORECASE) is not None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call put together from its pieces."""

    name: str
    arguments: str
    """JSON, as the server sent it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Measured by the client; times in seconds. `None`: the server did not say, or it did not come so far."""

    started_s: float
    """When it was sent, on the load's clock."""
    e2e_s: float
    """From before the connection to the end of the answer, or to the failure."""
    ttft_s: float | None = None
    """To the first chunk with text, reasoning or a tool call."""
    last_s: float | None = None
    """To the last such chunk."""
    gaps_s: tuple[float, ...] = ()
    """Between such chunks."""
    num_chunks: int = 0
    """Such chunks."""
    usage_prompt_tokens: int | None = None
    usage_completion_tokens: int | None = None
    cached_tokens: int | None = None
    """Prompt tokens that the server did not have to compute."""
    finish_reason: str | None = None
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    failure: Failure | None = None

    @property
    def is_ok(self) -> bool:
        """Whether the answer is complete."""
        return self.failure is None

    @property
    def completion_tokens(self) -> int:
        """The server's count, else the number of chunks with text."""
        return self.num_chunks if self.usage_completion_tokens is None else self.usage_completion_tokens

    @property
    def counted_by(self) -> str:
        """Where `completion_tokens` comes from: 'usage' or 'chunks'."""
        return "chunks" if self.usage_completion_tokens is None else "usage"

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None below two tokens."""
        if self.ttft_s is None or self.last_s is None or self.completion_tokens < 2:
            return None
        return (self.last_s - self.ttft_s) / (self.completion_tokens - 1)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Output tokens per second after the first."""
        return 1 / self.tpot_s if self.tpot_s else None

    @property
    def prompt_tokens_per_s(self) -> float | None:
        """Prompt tokens over the time to the first token."""
        if self.usage_prompt_tokens is None or not self.ttft_s:
            return None
        return self.usage_prompt_tokens / self.ttft_s
