"""One message while it is made: its stream, or all of it at once."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable

from vllm_mlx.api.context import Context
from vllm_mlx.api.errors import guarded
from vllm_mlx.api.observe import Meter, RequestRecord
from vllm_mlx.api.sse import KEEP_ALIVE
from vllm_mlx.api.wire.anthropic.answers import MessageAnswer, Ping, StreamEvent, framed
from vllm_mlx.api.wire.anthropic.encoder import MessageEncoder
from vllm_mlx.api.wire.anthropic.errors import error_answer
from vllm_mlx.api.wire.anthropic.usage import Kept, diagnostics_answer
from vllm_mlx.chat.stream import EventStream
from vllm_mlx.core.errors import RequestError
from vllm_mlx.core.events import Usage


class MessageRun:
    """Reads the events of the service to their end, once: with `whole` or `stream`."""

    def __init__(
        self, events: EventStream, encoder: MessageEncoder, *, record: RequestRecord, context: Context
    ) -> None:
        self.events = events
        self._encoder = encoder
        self._record = record
        self._meter = Meter(record, context.metrics)
        self._is_open = False

    async def whole(self) -> MessageAnswer:
        """The finished message. Raises what the service's events raise."""
        async for _ in self._pieces():
            pass
        return self._encoder.answer

    def stream(self) -> AsyncGenerator[bytes, None]:
        """Frames of the stream; a failure becomes an `error` event."""
        return guarded(self._frames(), self._record, last=self._failed)

    def sign(self) -> bytes:
        """What breaks a silence: a ping, or a comment as long as the first event must be another."""
        return framed(Ping()) if self._is_open else KEEP_ALIVE

    async def _frames(self) -> AsyncGenerator[bytes, None]:
        async for piece in self._pieces():
            if data := b"".join(framed(event) for event in piece):
                yield data

    async def _pieces(self) -> AsyncGenerator[list[StreamEvent], None]:
        """Events that belong together. The first come when it is known how much of the prompt was found."""
        while burst := await self.events.burst():
            piece: list[StreamEvent] = []
            if not self._is_open:
                self._is_open = True
                piece += self._opening()
            for event in burst:
                self._meter.note(event)
                piece += self._encoder.chunks(event)
            yield piece
        yield list(self._encoder.ending(diagnostics_answer(self.events.explanations())))

    def _opening(self) -> Iterable[StreamEvent]:
        usage = Usage(prompt_tokens=self.events.prompt_tokens, cached_tokens=self.events.num_cached or 0)
        return self._encoder.opening(usage, [Kept(*mark) for mark in self.events.marks])

    async def _failed(self, error: RequestError) -> bytes:
        return framed(error_answer(error, request_id=self._record.request_id))
