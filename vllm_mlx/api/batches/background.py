"""The way of a batch's lines: the server's own endpoints, called in the process, behind everybody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import msgspec
from starlette.types import ASGIApp, Message

from vllm_mlx.core.messages import CacheFreed, CacheMatch, EngineClient, EngineStatus, Output, Submit
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.step import RunnerInfo

BACKGROUND_PRIORITY = -(1 << 40)
"""Below whatever a request may ask for."""


class BackgroundEngine:
    """An `EngineClient` whose sequences go last and are preempted first. Starting and stopping is the owner's."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    async def start(self) -> RunnerInfo:
        """Start the engine itself."""
        return await self._engine.start()

    def generate(self, submit: Submit) -> AsyncGenerator[Output, None]:
        """Run one sequence when nobody else needs the engine."""
        return self._engine.generate(msgspec.structs.replace(submit, priority=BACKGROUND_PRIORITY))

    async def lookup(self, prompt: Prompt) -> CacheMatch:
        """What is remembered of a prompt."""
        return await self._engine.lookup(prompt)

    async def forget_cache(self) -> CacheFreed:
        """Drop all remembered prefixes."""
        return await self._engine.forget_cache()

    def status(self) -> EngineStatus:
        """A look without waiting."""
        return self._engine.status()

    async def wait_failed(self) -> str:
        """Wait until the engine is given up."""
        return await self._engine.wait_failed()

    async def stop(self) -> None:
        """End the engine itself."""
        await self._engine.stop()


class Answer(msgspec.Struct, frozen=True):
    """What an endpoint answered."""

    status: int
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes


async def post(app: ASGIApp, path: str, body: bytes, *, headers: dict[str, str]) -> Answer:
    """Send a JSON body to an app of this process and wait for the whole answer; cancelling it ends the work."""
    given = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in given.items()],
        "client": None,
        "server": None,
    }
    exchange = _Exchange(body)
    await app(scope, exchange.receive, exchange.send)
    return Answer(exchange.status, exchange.headers, bytes(exchange.body))


class _Exchange:
    """Both ends of one call."""

    def __init__(self, body: bytes) -> None:
        self._request: bytes | None = body
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()

    async def receive(self) -> Message:
        """The body once; after that, nothing: nobody disconnects."""
        if self._request is None:
            await _never()
        body, self._request = self._request, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        """Take in the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]}
        else:
            self.body += message.get("body", b"")


async def _never() -> None:
    await asyncio.Event().wait()
