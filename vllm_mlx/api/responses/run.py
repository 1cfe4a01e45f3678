"""One response while it is made: its stream, or all of it at once. It is stored before its client is told the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from vllm_mlx.api.context import Context
from vllm_mlx.api.errors import guarded
from vllm_mlx.api.observe import Meter, RequestRecord
from vllm_mlx.api.response_store import Item, ResponseStore
from vllm_mlx.api.responses.earlier import CONVERSATION_ITEMS
from vllm_mlx.api.wire.responses.answers import ResponseAnswer
from vllm_mlx.api.wire.responses.encoder import ResponseEncoder
from vllm_mlx.api.wire.responses.events import StreamEvent
from vllm_mlx.api.wire.usage import cache_answer
from vllm_mlx.chat.stream import EventStream
from vllm_mlx.core.errors import RequestError


@dataclass(frozen=True, slots=True)
class Keeper:
    """Stores one response, if its client wants that, and what it adds to its conversation."""

    store: ResponseStore
    tenant: bytes
    input_items: list[Item]
    is_stored: bool
    conversation_id: str | None = None

    def begin(self, answer: ResponseAnswer) -> None:
        """Keep a response that has only begun; at once, so that it cannot be overtaken by its end."""
        self._put(answer, None)

    async def end(self, answer: ResponseAnswer, events: bytes | None = None) -> None:
        """Keep a response that has ended, however it did. A failed one adds nothing to its conversation."""
        if self.is_stored:
            await asyncio.to_thread(self._put, answer, events)
        if self.conversation_id is not None and answer.status in ("completed", "incomplete"):
            added = [*self.input_items, *_items(answer)]
            await asyncio.to_thread(self.store.append, self.conversation_id, CONVERSATION_ITEMS, added)

    def _put(self, answer: ResponseAnswer, events: bytes | None) -> None:
        sides = {"input": self.input_items, "output": _items(answer)}
        self.store.put(answer.id, msgspec.json.encode(answer), tenant=self.tenant, items=sides, events=events)


class Run:
    """Reads the events of the service to their end, once: with `whole`, `stream` or `background`."""

    def __init__(
        self, events: EventStream, encoder: ResponseEncoder, keeper: Keeper, *, record: RequestRecord, context: Context
    ) -> None:
        self.events = events
        self.encoder = encoder
        self.keeper = keeper
        self._record = record
        self._meter = Meter(record, context.metrics)

    async def whole(self) -> ResponseAnswer:
        """The finished response. Raises what the service's events raise."""
        async for event in self.events:
            self._meter.note(event)
            for _ in self.encoder.chunks(event):
                pass
        self._ending()
        await self.keeper.end(self.encoder.answer)
        return self.encoder.answer

    def stream(self) -> AsyncGenerator[bytes, None]:
        """Frames of the stream; a failure becomes `response.failed`."""
        return guarded(self._frames(is_kept=True), self._record, last=self._failed)

    def background(self) -> AsyncGenerator[bytes, None]:
        """The same, and the caller stores it."""
        return guarded(self._frames(is_kept=False), self._record, last=self._failed_alone)

    async def _frames(self, *, is_kept: bool) -> AsyncGenerator[bytes, None]:
        yield frames(self.encoder.opening())
        while burst := await self.events.burst():
            data = bytearray()
            for event in burst:
                self._meter.note(event)
                data += frames(self.encoder.chunks(event))
            if data:
                yield bytes(data)
        last = self._ending()
        if is_kept:
            await self.keeper.end(self.encoder.answer)
        yield last

    def _ending(self) -> bytes:
        return frames(self.encoder.ending(cache_answer(self.events.explanations())))

    async def _failed(self, error: RequestError) -> bytes:
        last = await self._failed_alone(error)
        await self.keeper.end(self.encoder.answer)
        return last

    async def _failed_alone(self, error: RequestError) -> bytes:
        return frames(self.encoder.failing(error))


def frames(events: Iterable[StreamEvent]) -> bytes:
    """Events as server-sent events, each under its own name."""
    return b"".join(b"event: %s\ndata: %s\n\n" % (event.kind.encode(), msgspec.json.encode(event)) for event in events)


def _items(answer: ResponseAnswer) -> list[Item]:
    found: list[dict[str, Any]] = msgspec.to_builtins(answer.output)
    return found
