"""`vllm-mlx serve`: puts model, engine, chat service and HTTP together, and takes them down in order."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from vllm_mlx.api.app import create_app
from vllm_mlx.api.batches import Batches
from vllm_mlx.api.lifecycle import Lifecycle
from vllm_mlx.chat.service import ChatService
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.cli.banner import banner
from vllm_mlx.cli.compose import open_engine
from vllm_mlx.cli.display import Display
from vllm_mlx.cli.listen import BACKLOG, listen, url_of
from vllm_mlx.cli.signals import StopSignals
from vllm_mlx.cli.warm import Conversations, Warmer, read_warm_prompts
from vllm_mlx.core import log
from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import EngineClient
from vllm_mlx.models.resolve import ModelFiles, resolve

_log = log.get_logger("serve")
_LAST_WORDS_S = 1.0
"""How long responses without a client may take to be stored when all is over."""
LAST_ANSWERS_S = 5
"""After the engine ended, how long connections may take to send what they have."""
KEEP_ALIVE_S = 75
"""Longer than common proxies keep an idle connection, so that they never reuse one that is being closed."""


def serve(config: Config) -> int:
    """Serve until told to stop; returns the exit code: 0, or 1 if the engine was given up.

    Raises:
        StartupError: the port, the model or the engine cannot be had.
    """
    log.setup(config.log_level, config.log_format)
    prompts = read_warm_prompts(config.warm_prompts) if config.warm_prompts is not None else ()
    with listen(config.host, config.port) as listener, Display() as display:
        files = resolve(config, progress=display)
        return asyncio.run(_serve(config, files, prompts=prompts, listener=listener, display=display))


async def _serve(
    config: Config, files: ModelFiles, *, prompts: Conversations, listener: socket.socket, display: Display
) -> int:
    engine = open_engine(config, files.path, on_progress=display)
    service = ChatService(engine, Tokenizer.load(files.path, trust_remote_code=config.trust_remote_code), config=config)
    app = create_app(config, service, engine)
    lifecycle: Lifecycle = app.state.lifecycle
    batches: Batches = app.state.batches
    server = _http_server(app)
    with StopSignals() as signals:
        http = asyncio.create_task(server.serve(sockets=[listener]))
        warmer = Warmer(service, prompts, lifecycle=lifecycle, progress=display)
        life = asyncio.create_task(_live(engine, config, warmer=warmer, url=url_of(listener), display=display))
        asked = asyncio.create_task(signals.first.wait())
        batches.runner.resume()
        try:
            await asyncio.wait({http, life, asked}, return_when=asyncio.FIRST_COMPLETED)
            if life.done():
                return life.result()
            if http.done():
                _log.error("the HTTP server ended")
                return 1
            await batches.runner.stop()
            await _drain(lifecycle, signals, config)
            return 0
        finally:
            display.close()
            await batches.close()
            await _take_down(engine, server, life=life, http=http, asked=asked)
            await lifecycle.wait_idle(_LAST_WORDS_S)
            app.state.responses.close()


async def _live(engine: EngineClient, config: Config, *, warmer: Warmer, url: str, display: Display) -> int:
    """Start the engine, warm it, say so, and return the exit code when it is given up."""
    with warmer.lifecycle.warming():
        info = await engine.start()
        await warmer.run()
    display.close()
    print(banner(config, info, url=url), flush=True)
    keeping = asyncio.create_task(warmer.keep(engine))
    try:
        reason = await engine.wait_failed()
    finally:
        keeping.cancel()
    _log.error("no engine any more, the server ends: %s", reason)
    return 1


async def _drain(lifecycle: Lifecycle, signals: StopSignals, config: Config) -> None:
    """Let what runs finish, but no longer than `--drain-timeout` or until the second signal."""
    lifecycle.begin_drain()
    if not lifecycle.num_open:
        return
    _log.info("stopping; %d requests may take %g s to finish", lifecycle.num_open, config.drain_timeout)
    idle = asyncio.create_task(lifecycle.wait_idle(config.drain_timeout))
    now = asyncio.create_task(signals.second.wait())
    await asyncio.wait({idle, now}, return_when=asyncio.FIRST_COMPLETED)
    for task in (idle, now):
        task.cancel()
    if lifecycle.num_open:
        _log.warning("%d requests are ended unfinished", lifecycle.num_open)


async def _take_down(
    engine: EngineClient,
    server: uvicorn.Server,
    *,
    life: asyncio.Task[int],
    http: asyncio.Task[None],
    asked: asyncio.Task[bool],
) -> None:
    """End the engine first: requests that are still open then end with an error instead of a cut connection."""
    life.cancel()
    asked.cancel()
    await asyncio.wait({life, asked})
    await engine.stop()
    server.should_exit = True
    await asyncio.wait({http})


class _Server(uvicorn.Server):
    """Leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _http_server(app: FastAPI) -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=LAST_ANSWERS_S,
        )
    )
