"""A small HTTP server that answers as it is told, also wrongly: for the tests of our own clients."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

HANG_UP = None
"""In a script: cut the connection."""
Action = bytes | float | None
"""Send these bytes, wait so many seconds, or hang up."""
CHUNKED = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Request:
    """What came."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


Script = Callable[[Request], Iterable[Action]]


def chunk(data: bytes) -> bytes:
    """One piece of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(value: Any) -> bytes:
    """One server-sent event, as a piece of a chunked body."""
    return chunk(b"data: " + json.dumps(value).encode() + b"\n\n")


def delta(finish_reason: str | None = None, **fields: Any) -> bytes:
    """A chunk of a chat completion."""
    return event({"choices": [{"index": 0, "delta": fields, "finish_reason": finish_reason}]})


def usage(prompt: int, completion: int, cached: int | None = None) -> bytes:
    """The chunk with token counts."""
    counts: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
    if cached is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": cached}
    return event({"choices": [], "usage": counts})


def whole(status: int, body: Any, *, head: str = "") -> list[Action]:
    """An answer in one piece."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return [f"HTTP/1.1 {status} X\r\ncontent-length: {len(data)}\r\n{head}\r\n".encode() + data]


def words(*texts: str, finish: str = "stop", wait_s: float = 0.0, tail: Iterable[bytes] = ()) -> list[Action]:
    """A well-behaved stream of these texts. `tail`: chunks before the end, such as usage."""
    actions: list[Action] = [CHUNKED, delta(role="assistant", content="")]
    for text in texts:
        actions += [wait_s, delta(content=text)]
    return [*actions, delta(finish), *tail, chunk(DONE), END]


@dataclass
class ScriptedServer:
    """Answers POSTs with `script`, other paths from `pages` (status, body) or 404. A context manager."""

    script: Script
    pages: dict[str, tuple[int, Any]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    max_open: int = 0
    """Most POSTs that were answered at once."""
    url: str = ""
    _num_open: int = 0

    def __enter__(self) -> ScriptedServer:
        self.pages.setdefault("/v1/models", (200, {"data": [{"id": "scripted"}]}))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="scripted-server")
        self._thread.start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result(10)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def asked(self) -> list[Any]:
        """Bodies of all POSTs."""
        return [request.body for request in self.requests if request.method == "POST"]

    async def _close(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await _read(reader)
            self.requests.append(request)
            await self._answer(request, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> None:
        if request.method != "POST":
            page = self.pages.get(request.path if request.method == "GET" else f"{request.method} {request.path}")
            actions: Iterator[Action] = iter(whole(*(page or (404, {"error": "not found"}))))
            return await _perform(actions, writer)
        self._num_open += 1
        self.max_open = max(self.max_open, self._num_open)
        try:
            await _perform(iter(self.script(request)), writer)
        finally:
            self._num_open -= 1


async def _perform(actions: Iterator[Action], writer: asyncio.StreamWriter) -> None:
    for action in actions:
        if action is HANG_UP:
            writer.transport.abort()
            return
        if isinstance(action, float):
            await asyncio.sleep(action)
        else:
            writer.write(action)
            await writer.drain()


async def _read(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    data = await reader.readexactly(int(headers.get("content-length", 0)))
    return Request(method, path, headers, json.loads(data) if data else None)
