"""Streams on the wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fixtures_server import client_of, running
from starlette.requests import ClientDisconnect

from vllm_mlx.api.sse import EventResponse
from vllm_mlx.core.config import Config

pytestmark = pytest.mark.anyio

BODY = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "stream": True}


async def test_headers_keep_proxies_from_buffering(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/chat/completions", json=BODY)
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert "content-length" not in answer.headers


async def test_silence_is_filled_with_comments(folder: Path, runner_options: dict[str, Any]) -> None:
    config = Config(model="m", keepalive_interval=0.02)
    async with running(folder, config, **{**runner_options, "step_s": 0.15}) as parts, client_of(parts.app) as client:
        text = (await client.post("/v1/chat/completions", json=BODY)).text
    assert text.count(": keep-alive\n\n") >= 4
    assert text.endswith("data: [DONE]\n\n")
    assert all(block.startswith(("data: {", ": keep-alive", "data: [DONE]")) for block in text.split("\n\n")[:-1])


async def test_lively_stream_has_no_comments(client: httpx.AsyncClient) -> None:
    assert ": keep-alive" not in (await client.post("/v1/chat/completions", json=BODY)).text


class Sink:
    """The server's side of a connection."""

    def __init__(self, *, gone_after: int | None = None) -> None:
        self.bodies: list[bytes] = []
        self._gone_after = gone_after
        self._gone = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            self.bodies.append(message["body"])
        if len(self.bodies) == self._gone_after:
            self._gone.set()
            await asyncio.sleep(60)


async def numbers(count: int) -> AsyncGenerator[bytes, None]:
    for number in range(count):
        yield str(number).encode()


class Source:
    """Frames, and how often they were closed."""

    def __init__(self, count: int) -> None:
        self.frames = numbers(count)
        self.num_closed = 0

    async def close(self) -> None:
        self.num_closed += 1

    async def send_to(self, sink: Sink) -> None:
        response = EventResponse(self.frames, close=self.close, keepalive_s=60)
        await response({"type": "http"}, sink.receive, sink.send)


async def test_frames_are_sent_in_order_and_the_source_is_closed() -> None:
    sink, source = Sink(), Source(3)
    await source.send_to(sink)
    assert sink.bodies == [b"0", b"1", b"2", b""]
    assert source.num_closed == 1


async def test_source_is_closed_when_the_client_goes_while_a_frame_is_sent() -> None:
    sink, source = Sink(gone_after=2), Source(10)
    with pytest.raises(ClientDisconnect):
        await source.send_to(sink)
    assert sink.bodies == [b"0", b"1"]
    assert source.num_closed == 1
    with pytest.raises(StopAsyncIteration):
        await anext(source.frames)


async def test_burst_of_frames_does_not_hide_a_disconnect() -> None:
    class Leaving(Sink):
        async def send(self, message: Any) -> None:
            await super().send(message)
            if len(self.bodies) == 3:
                self._gone.set()

    sink, source = Leaving(), Source(100)
    with pytest.raises(ClientDisconnect):
        await source.send_to(sink)
    assert len(sink.bodies) < 10
