"""The whole server but for the model: chat service, engine thread and fake runner, over HTTP or in memory."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import uvicorn
from fastapi import FastAPI

from vllm_mlx.api.app import create_app
from vllm_mlx.chat.service import ChatService
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.cli.compose import grammars_of
from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import EngineStatus
from vllm_mlx.engine.thread import ThreadEngine
from vllm_mlx.testing.fake import FakeFactory, fake_factory

T = TypeVar("T")
TIMEOUT_S = 30.0


async def until(holds: Callable[[], object]) -> None:
    """Wait for something that nobody announces."""
    async with asyncio.timeout(TIMEOUT_S):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


class Parts:
    """An app and what it is made of; built and used on one event loop."""

    def __init__(self, folder: Path, config: Config, **runner: Any) -> None:
        self.factory: FakeFactory = fake_factory(**runner)
        self.config = config
        self.engine = ThreadEngine(self.factory, config, grammars=grammars_of(folder, config))
        self.tokenizer = Tokenizer.load(folder)
        self.service = ChatService(self.engine, self.tokenizer, config=config)
        self.app: FastAPI = create_app(config, self.service, self.engine)

    def status(self) -> EngineStatus:
        return self.engine.status()

    async def idle(self) -> None:
        """Wait until the engine has nothing left to do."""
        runner = self.factory.runner
        assert runner is not None
        await until(lambda: not (self.num_open or runner.live_slots))

    @property
    def num_open(self) -> int:
        """Sequences that run or wait."""
        stats = self.status().stats
        return stats.num_running + stats.num_waiting


@contextlib.asynccontextmanager
async def running(folder: Path, config: Config, **runner: Any) -> AsyncIterator[Parts]:
    """Parts whose engine is ready."""
    parts = Parts(folder, config, **runner)
    await parts.engine.start()
    try:
        yield parts
    finally:
        await parts.app.state.batches.close()
        await parts.engine.stop()
        await parts.app.state.lifecycle.wait_idle(TIMEOUT_S)
        parts.app.state.responses.close()


def client_of(app: FastAPI, **options: Any) -> httpx.AsyncClient:
    """A client that calls the app in memory."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=TIMEOUT_S, **options)


class LiveServer:
    """An app on a real port, on an event loop in a thread."""

    def __init__(self, folder: Path, config: Config, **runner: Any) -> None:
        self._folder, self._config, self._runner = folder, config, runner
        self._started = threading.Event()
        self._stop: Callable[[], None] | None = None
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._loop: asyncio.AbstractEventLoop | None = None
        self.parts: Parts | None = None
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.model = config.model_name
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="live-server")

    def call(self, work: Callable[[Parts], Awaitable[T]]) -> T:
        """Run a coroutine of the parts on the server's loop."""

        async def run() -> T:
            return await work(self.parts)

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(TIMEOUT_S)

    def __enter__(self) -> LiveServer:
        self._thread.start()
        assert self._started.wait(TIMEOUT_S)
        return self

    def __exit__(self, *error: object) -> None:
        assert self._loop is not None
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop)
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with running(self._folder, self._config, **self._runner) as self.parts:
            server = uvicorn.Server(uvicorn.Config(self.parts.app, log_config=None, lifespan="off"))
            self._stop = lambda: setattr(server, "should_exit", True)
            task = asyncio.create_task(server.serve(sockets=[self._socket]))
            await until(lambda: server.started)
            self._started.set()
            await task
