"""HTTP/1.1 for a load generator: one connection a request, bytes handed over the moment they arrive.

A measuring client must cost little, or it measures itself. h11 reads the protocol; there are no coroutines, locks or
timers per chunk (docs/bench-serve.md has the cost per event).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

import h11

DataCallback = Callable[[bytes], None]
"""Gets each piece of a successful answer's body. It must not raise."""
_MAX_ERROR_BYTES = 64 * 1024
"""As much of an error's body is kept."""


class ConnectionFailed(Exception):
    """There is no connection, or it broke before an answer began."""


class TimedOut(Exception):
    """Nothing arrived for too long."""


class BrokenOff(Exception):
    """The answer began and did not end as HTTP says it must."""


class Answer(NamedTuple):
    """A whole answer; `body` is empty where a callback got it."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Origin(NamedTuple):
    """Where requests go, from a base URL."""

    host: str
    port: int
    is_secure: bool
    base_path: str

    @property
    def authority(self) -> str:
        """Value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_secure else 80) else f"{host}:{self.port}"


def parse_origin(url: str) -> Origin:
    """Take a base URL apart; a trailing `/v1`, as SDKs want it, is dropped. Raises ValueError with the reason."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"{url!r} is not an http:// or https:// address")
    if not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"{url!r} is not the base address of a server")
    is_secure = parts.scheme == "https"
    path = parts.path.rstrip("/").removesuffix("/v1")
    return Origin(parts.hostname, parts.port or (443 if is_secure else 80), is_secure, path)


class HttpClient:
    """Sends requests to one origin. `timeout_s`: longest silence while an answer is awaited (None: no limit)."""

    def __init__(self, origin: Origin, *, api_key: str | None = None, timeout_s: float | None = None) -> None:
        self._origin = origin
        self._timeout_s = timeout_s
        self._tls = ssl.create_default_context() if origin.is_secure else None
        self._headers = [("Host", origin.authority), ("Connection", "close"), ("User-Agent", "vllm-mlx-bench")]
        if api_key:
            self._headers.append(("Authorization", f"Bearer {api_key}"))

    async def request(
        self, method: str, path: str, *, body: bytes | None = None, on_data: DataCallback | None = None
    ) -> Answer:
        """Send a request and wait for the end of its answer. The body of a 2xx goes to `on_data` where there is one.

        Raises:
            ConnectionFailed, TimedOut, BrokenOff
        """
        loop = asyncio.get_running_loop()
        exchange = _Exchange(loop.create_future(), self._message(method, path, body), on_data, self._timeout_s)
        try:
            await self._connect(exchange)
            return await exchange.done
        finally:
            exchange.abort()

    async def _connect(self, exchange: _Exchange) -> None:
        loop, origin = asyncio.get_running_loop(), self._origin
        try:
            async with asyncio.timeout(self._timeout_s):
                await loop.create_connection(lambda: exchange, origin.host, origin.port, ssl=self._tls)
        except TimeoutError:
            raise TimedOut(f"no connection within {self._timeout_s:g} s") from None
        except OSError as error:
            raise ConnectionFailed(_reason(error)) from None

    def _message(self, method: str, path: str, body: bytes | None) -> tuple[h11.Request, bytes]:
        headers = list(self._headers)
        if body is not None:
            headers += [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        return h11.Request(method=method, target=self._origin.base_path + path, headers=headers), body or b""


class _Exchange(asyncio.Protocol):
    """One request on a connection of its own. `done` gets the answer, or the reason why there is none."""

    def __init__(
        self,
        done: asyncio.Future[Answer],
        message: tuple[h11.Request, bytes],
        on_data: DataCallback | None,
        timeout_s: float | None,
    ) -> None:
        self.done = done
        self._message = message
        self._on_data = on_data
        self._timeout_s = timeout_s
        self._http = h11.Connection(h11.CLIENT)
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._last_at = 0.0
        self._response: h11.Response | None = None
        self._kept = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        request, body = self._message
        for event in (request, h11.Data(data=body), h11.EndOfMessage()):
            transport.write(self._http.send(event) or b"")
        self._last_at = asyncio.get_running_loop().time()
        self._watch()

    def data_received(self, data: bytes) -> None:
        self._last_at = asyncio.get_running_loop().time()
        self._feed(data)

    def eof_received(self) -> None:
        self._feed(b"")

    def connection_lost(self, error: Exception | None) -> None:
        self._fail_connection("the connection was closed" if error is None else _reason(error))

    def abort(self) -> None:
        """Drop the connection and the timer; nobody waits for the answer any more."""
        self.done.cancel()
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()

    def _feed(self, data: bytes) -> None:
        if self.done.done():
            return
        try:
            self._http.receive_data(data)
            while (event := self._http.next_event()) is not h11.NEED_DATA and event is not h11.PAUSED:
                if not self._take(event):
                    return
        except h11.RemoteProtocolError as error:
            self._fail_connection(str(error))

    def _take(self, event: object) -> bool:
        """Whether there may be more events."""
        if isinstance(event, h11.Data):
            if self._on_data is not None and self._is_success:
                self._on_data(bytes(event.data))
            elif self._is_success or len(self._kept) < _MAX_ERROR_BYTES:
                self._kept += event.data
        elif isinstance(event, h11.Response):
            self._response = event
        elif isinstance(event, h11.EndOfMessage):
            self._finish()
            return False
        elif isinstance(event, h11.ConnectionClosed):
            self._fail_connection("the server closed the connection without an answer")
            return False
        return True

    @property
    def _is_success(self) -> bool:
        return self._response is not None and 200 <= self._response.status_code < 300

    def _finish(self) -> None:
        assert self._response is not None
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in self._response.headers}
        self.done.set_result(Answer(self._response.status_code, headers, bytes(self._kept)))

    def _fail_connection(self, reason: str) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionFailed(reason) if self._response is None else BrokenOff(reason))

    def _watch(self) -> None:
        """End a silent exchange. The timer is not reset for every byte: it looks again when it would be due."""
        if self._timeout_s is None or self.done.done():
            return
        loop = asyncio.get_running_loop()
        left_s = self._last_at + self._timeout_s - loop.time()
        if left_s <= 0:
            self.done.set_exception(TimedOut(f"nothing arrived for {self._timeout_s:g} s"))
            return
        self._timer = loop.call_later(left_s, self._watch)


def _reason(error: Exception) -> str:
    """Short words for a failed connection."""
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
