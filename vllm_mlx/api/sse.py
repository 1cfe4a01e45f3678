"""Server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vllm_mlx.api.disconnect import while_connected

KEEP_ALIVE = b": keep-alive\n\n"
_encoder = msgspec.json.Encoder()


def frame(value: Any) -> bytes:
    """One event with a JSON value."""
    return b"data: " + _encoder.encode(value) + b"\n\n"


class EventResponse(Response):
    """Sends frames as they come, and what `sign` gives (a comment, or an event) after `keepalive_s` seconds of silence.

    `frames` must turn its own errors into frames. `close` is called at the end, or as soon as the client goes.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        *,
        close: Callable[[], Awaitable[None]],
        keepalive_s: float,
        headers: Mapping[str, str] = {},
        sign: Callable[[], bytes] = lambda: KEEP_ALIVE,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self._frames = frames
        self._close = close
        self._keepalive_s = keepalive_s
        self._sign = sign
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ClientDisconnect if the client went before the end."""
        try:
            await while_connected(receive, self._pump(send))
        finally:
            await self._frames.aclose()
            await self._close()

    async def _pump(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._sent_at = loop.time()
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        ticker = asyncio.create_task(self._keep_alive(send))
        try:
            async for data in self._frames:
                self._sent_at = loop.time()
                await send({"type": "http.response.body", "body": data, "more_body": True})
                # Sending rarely waits: without this a burst of frames holds up other streams and hides a disconnect.
                await asyncio.sleep(0)
        finally:
            ticker.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        """Break silence. A frame is one send on the same loop, so the sign never cuts one."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._sent_at + self._keepalive_s - loop.time())
            if loop.time() - self._sent_at >= self._keepalive_s:
                self._sent_at = loop.time()
                await send({"type": "http.response.body", "body": self._sign(), "more_body": True})
