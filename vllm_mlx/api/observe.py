"""What becomes known of each request while it runs: one log line and the metrics at its end. Never its text."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_mlx.api.dialect import speaks_anthropic
from vllm_mlx.api.lifecycle import Lifecycle
from vllm_mlx.api.metrics import Metrics
from vllm_mlx.core import log
from vllm_mlx.core.errors import RequestError
from vllm_mlx.core.events import Event, Finish

_log = log.get_logger("request")
_SANE_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_KEY = "vllm_mlx.record"
_MAX_LOGGED_PATH = 100
CLIENT_GONE = 499
"""Status of a request whose client left before the answer; nginx's number, never sent."""
UNKNOWN = "unknown"
"""Endpoint label of every path that no route serves."""


@dataclass(slots=True)
class RequestRecord:
    """Facts of one request, gathered by whoever learns them. Times are on the monotonic clock."""

    key: str
    """Ours and unique; part of the ids in the answer."""
    request_id: str
    """In the header x-request-id: the client's, if it sent one, or the key."""
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    error: RequestError | None = None
    is_generation: bool = False
    is_stream: bool = False
    first_token: float | None = None
    last_token: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)

    def note_error(self, error: RequestError) -> None:
        """Remember why it failed."""
        self.error = error

    def begin_generation(self, *, is_stream: bool) -> None:
        """Mark it as one whose tokens and times are measured."""
        self.is_generation = True
        self.is_stream = is_stream


def record_of(scope: Scope) -> RequestRecord:
    """The record that `Observe` made for this request."""
    record = scope[_KEY]
    assert isinstance(record, RequestRecord)
    return record


class Observe:
    """ASGI middleware, outermost: names each request, counts it, and reports it when its answer has ended."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, lifecycle: Lifecycle) -> None:
        self._app = app
        self._metrics = metrics
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Adds the header x-request-id to the answer, and request-id for Anthropic's clients."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = scope[_KEY] = new_record(Headers(scope=scope).get("x-request-id"))

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                value = record.request_id.encode("ascii")
                names = [(name, value) for name in _id_headers(scope)]
                message = {**message, "headers": [*message.get("headers", ()), *names]}
            await send(message)

        try:
            with self._lifecycle.open_request():
                await self._app(scope, receive, send_named)
        finally:
            self._report(record, endpoint_of(scope), path=scope["path"])

    def _report(self, record: RequestRecord, endpoint: str, *, path: str) -> None:
        elapsed_s = time.monotonic() - record.started
        self._metrics.requests.labels(endpoint, record.status).inc()
        if record.is_generation:
            self._metrics.duration.labels(endpoint).observe(elapsed_s)
        level = logging.INFO if record.is_generation or record.error else logging.DEBUG
        if _log.isEnabledFor(level):
            shown = endpoint if endpoint != UNKNOWN else quote(path[:_MAX_LOGGED_PATH])
            _log.log(level, shown, extra=_line(record, elapsed_s))


def _id_headers(scope: Scope) -> tuple[bytes, ...]:
    return (b"x-request-id", b"request-id") if speaks_anthropic(scope) else (b"x-request-id",)


def new_record(client_id: str | None) -> RequestRecord:
    """A record with a key of its own, and the client's id if it is short and plain."""
    key = uuid.uuid4().hex
    is_sane = client_id is not None and _SANE_ID.fullmatch(client_id) is not None
    return RequestRecord(key=key, request_id=client_id if client_id is not None and is_sane else key)


def endpoint_of(scope: Scope) -> str:
    """The template of the route that served it: a bounded set of labels whatever paths are asked for."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else UNKNOWN


async def observed(
    events: AsyncIterator[Event], record: RequestRecord, metrics: Metrics
) -> AsyncGenerator[Event, None]:
    """The same events, with their times and counts noted."""
    meter = Meter(record, metrics)
    async for event in events:
        meter.note(event)
        yield event


class Meter:
    """Notes the times and counts of one request's events."""

    def __init__(self, record: RequestRecord, metrics: Metrics) -> None:
        self._record = record
        self._metrics = metrics
        self._last: dict[int, float] = {}

    def note(self, event: Event) -> None:
        """Call it when the event is about to be sent."""
        if isinstance(event, Finish):
            _note_finish(event, self._record, self._metrics)
        else:
            self._note_delta(event.choice, time.monotonic())

    def _note_delta(self, choice: int, now: float) -> None:
        record = self._record
        if choice in self._last:
            self._metrics.inter_token.observe(now - self._last[choice])
        elif record.first_token is None:
            record.first_token = now
            self._metrics.first_token.observe(now - record.started)
        self._last[choice] = record.last_token = now


def _note_finish(event: Finish, record: RequestRecord, metrics: Metrics) -> None:
    usage = event.usage
    record.finish_reasons.append(event.reason.value)
    record.prompt_tokens += usage.prompt_tokens
    record.completion_tokens += usage.completion_tokens
    record.cached_tokens += usage.cached_tokens
    metrics.prompt_tokens.inc(usage.prompt_tokens)
    metrics.generation_tokens.inc(usage.completion_tokens)
    metrics.cached_tokens.inc(usage.cached_tokens)
    if usage.prompt_tokens:  # further choices of the same prompt have none
        metrics.prompts.inc()
        metrics.prompts_with_hit.inc(usage.cached_tokens > 0)
    if event.queued_s is not None:
        metrics.queue_time.observe(event.queued_s)


def _line(record: RequestRecord, elapsed_s: float) -> dict[str, object]:
    generated = record.completion_tokens > 0
    return log.fields(
        id=record.key,
        request_id=record.request_id if record.request_id != record.key else None,
        status=record.status,
        finish=",".join(sorted(set(record.finish_reasons))) or None,
        error=record.error.code if record.error else None,
        param=record.error.param if record.error else None,
        stream=record.is_stream or None,
        tokens_in=record.prompt_tokens if generated else None,
        tokens_out=record.completion_tokens if generated else None,
        cached=record.cached_tokens if generated else None,
        ttft_s=None if record.first_token is None else round(record.first_token - record.started, 3),
        tok_per_s=_tokens_per_second(record),
        duration_s=round(elapsed_s, 3),
    )


def _tokens_per_second(record: RequestRecord) -> float | None:
    """Over the time from the first token to the last, so that queue and prompt do not count."""
    if record.first_token is None or record.last_token is None or record.completion_tokens < 2:
        return None
    span_s = record.last_token - record.first_token
    return round((record.completion_tokens - 1) / span_s, 1) if span_s > 0 else None
