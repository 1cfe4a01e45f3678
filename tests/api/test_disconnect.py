"""When the client goes, its sequences go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fixtures_server import LiveServer, Parts, until
from starlette.requests import ClientDisconnect

from vllm_mlx.api.disconnect import while_connected
from vllm_mlx.core.config import Config

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
LONG = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 400}


async def freed(parts: Parts) -> int:
    """Steps that the engine computed when nothing was left to do."""
    await parts.idle()
    return parts.status().stats.num_steps


async def busy(parts: Parts) -> None:
    await until(lambda: parts.num_open)


async def num_gone(client: httpx.AsyncClient) -> int:
    """Requests that ended because their client had left."""
    return (await client.get("/metrics")).text.count('status="499"} 1.0')


@pytest.mark.parametrize("fields", [{}, {"n": 3}])
async def test_stream_that_is_left_is_aborted(serve: Callable[..., LiveServer], fields: dict[str, Any]) -> None:
    server = serve(Config(model="m"), step_s=0.01)
    async with httpx.AsyncClient(base_url=server.url) as client:
        request = client.build_request("POST", CHAT, json={**LONG, **fields, "stream": True})
        answer = await client.send(request, stream=True)
        lines = answer.aiter_lines()
        while "content" not in await anext(lines):
            pass
        await answer.aclose()
        assert await asyncio.to_thread(server.call, freed) < 100
        assert await num_gone(client) == 1


async def test_answer_that_nobody_waits_for_is_aborted(serve: Callable[..., LiveServer]) -> None:
    server = serve(Config(model="m"), step_s=0.01)
    async with httpx.AsyncClient(base_url=server.url) as client:
        asking = asyncio.create_task(client.post(CHAT, json=LONG))
        await asyncio.to_thread(server.call, busy)
        asking.cancel()
        await asyncio.wait([asking])
        assert await asyncio.to_thread(server.call, freed) < 100
        assert await num_gone(client) == 1


class Connection:
    """The receiving side of a request."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}


async def test_work_has_cleaned_up_when_the_disconnect_is_raised() -> None:
    connection, cleaned = Connection(), False

    async def work() -> None:
        nonlocal cleaned
        try:
            connection.gone.set()
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            cleaned = True

    with pytest.raises(ClientDisconnect):
        await while_connected(connection.receive, work())
    assert cleaned


async def test_result_and_errors_of_the_work_pass() -> None:
    async def good() -> int:
        return 7

    async def bad() -> None:
        raise KeyError("x")

    assert await while_connected(Connection().receive, good()) == 7
    with pytest.raises(KeyError):
        await while_connected(Connection().receive, bad())
