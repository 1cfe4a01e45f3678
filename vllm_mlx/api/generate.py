"""The course of every generating request: admit, start, then stream events or fold them; end with the client."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.context import Context
from vllm_mlx.api.disconnect import while_connected
from vllm_mlx.api.errors import DONE, guarded
from vllm_mlx.api.limits import read_body
from vllm_mlx.api.observe import Meter, RequestRecord, observed, record_of
from vllm_mlx.api.sse import KEEP_ALIVE, EventResponse, frame
from vllm_mlx.api.wire.anthropic.body import MessagesBody
from vllm_mlx.api.wire.decode import decode
from vllm_mlx.api.wire.sampling import GenerationBody
from vllm_mlx.api.wire.usage import Cache, added, cache_answer, usage_answer
from vllm_mlx.chat.collect import Collected, collect
from vllm_mlx.chat.stream import EventStream
from vllm_mlx.core.events import Event, Finish, Usage

HIT_TOKENS = "x-cache-hit-tokens"
"""Header of every generated answer."""

Body = TypeVar("Body", bound=GenerationBody | MessagesBody)


class Encoder(Protocol):
    """One dialect's way to write one request's answer."""

    def chunks(self, event: Event) -> Iterable[msgspec.Struct]:
        """Events of the stream for one event of the service."""
        ...

    def last_chunk(self, usage: Usage, cache: Cache) -> msgspec.Struct | None:
        """One more before the end of the stream."""
        ...

    def answer(self, collected: Collected, cache: Cache) -> msgspec.Struct:
        """The answer without a stream."""
        ...


async def admitted(request: Request, model: type[Body], context: Context) -> tuple[Body, RequestRecord]:
    """The body of a request that may generate. Raises RequestError."""
    context.lifecycle.admit()
    record = record_of(request.scope)
    body = decode(await read_body(request, max_mb=context.config.max_body_mb), model)
    record.begin_generation(is_stream=bool(body.stream))
    context.check_model(body.model)
    return body, record


async def respond(
    request: Request,
    context: Context,
    *,
    start: Callable[[], Coroutine[Any, Any, EventStream]],
    encoder: Encoder,
    counts_on: bool = False,
) -> Response:
    """Answer with what `start` begins; `counts_on`: every chunk of a stream has the token counts so far.

    Raises RequestError; ClientDisconnect when nobody waits any more.
    """
    record = record_of(request.scope)
    answering = _respond(record, context, start(), encoder, counts_on=counts_on)
    return await while_connected(request.receive, answering)


async def _respond(
    record: RequestRecord,
    context: Context,
    starting: Coroutine[Any, Any, EventStream],
    encoder: Encoder,
    *,
    counts_on: bool,
) -> Response:
    events = await starting

    async def whole() -> msgspec.Struct:
        collected = await collect(observed(events, record, context.metrics))
        return encoder.answer(collected, cache_answer(events.explanations()))

    def frames() -> AsyncGenerator[bytes, None]:
        return guarded(_frames(events, record, context, encoder, counts_on=counts_on), record)

    return await delivered(events, context, is_stream=record.is_stream, whole=whole, frames=frames)


async def delivered(
    events: EventStream,
    context: Context,
    *,
    is_stream: bool,
    whole: Callable[[], Awaitable[msgspec.Struct]],
    frames: Callable[[], AsyncGenerator[bytes, None]],
    sign: Callable[[], bytes] = lambda: KEEP_ALIVE,
) -> Response:
    """Answer with `whole`, or with a stream of `frames`, made of the events, which are closed in the end.

    A stream begins when there is an event, so that what fails before has a status, or after `--keepalive-interval`.
    """
    is_handed_on = False
    try:
        if not is_stream:
            body = msgspec.json.encode(await whole())
            return Response(body, media_type="application/json", headers=cache_headers(events))
        keepalive_s = context.config.keepalive_interval
        await events.ready(keepalive_s)
        is_handed_on = True
        headers = cache_headers(events)
        return EventResponse(frames(), close=events.aclose, keepalive_s=keepalive_s, headers=headers, sign=sign)
    finally:
        if not is_handed_on:
            await events.aclose()


def cache_headers(events: EventStream) -> dict[str, str]:
    """How many prompt tokens were found. A stream begins without it only if it still waits for its turn."""
    return {} if events.num_cached is None else {HIT_TOKENS: str(events.num_cached)}


async def _frames(
    events: EventStream, record: RequestRecord, context: Context, encoder: Encoder, *, counts_on: bool
) -> AsyncGenerator[bytes, None]:
    usage, meter = Usage(), Meter(record, context.metrics)
    while burst := await events.burst():  # what came together is sent together
        data = bytearray()
        counts = {"usage": usage_answer(functools.reduce(added, events.usages))} if counts_on else {}
        for event in burst:
            meter.note(event)
            for chunk in encoder.chunks(event):
                data += frame(msgspec.structs.replace(chunk, **counts) if counts else chunk)
            if isinstance(event, Finish):
                usage = added(usage, event.usage)
        if data:
            yield bytes(data)
    last = encoder.last_chunk(usage, cache_answer(events.explanations()))
    yield (frame(last) if last is not None else b"") + DONE
