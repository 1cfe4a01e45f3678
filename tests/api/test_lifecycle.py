"""A draining server finishes what it has and takes nothing new."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from fixtures_server import Parts, client_of, running, until

from vllm_mlx.api.lifecycle import Lifecycle
from vllm_mlx.core.config import Config

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 30, "stream": True}


async def test_running_request_finishes_and_new_ones_are_refused(
    folder: Path, config: Config, runner_options: dict[str, Any]
) -> None:
    async with running(folder, config, **{**runner_options, "step_s": 0.01}) as parts, client_of(parts.app) as client:
        lifecycle: Lifecycle = parts.app.state.lifecycle
        asking = asyncio.create_task(client.post(CHAT, json=BODY))
        await until(lambda: parts.num_open)
        lifecycle.begin_drain()
        assert not await lifecycle.wait_idle(0.01)
        refused = await client.post(CHAT, json=BODY)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "5"
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/health")).json()["draining"] is True
        assert await lifecycle.wait_idle(30)
        answer = await asking
        assert answer.text.endswith('"finish_reason":"length"}]}\n\ndata: [DONE]\n\n')


async def test_open_requests_are_counted_until_their_answer_ends(parts: Parts, client: httpx.AsyncClient) -> None:
    lifecycle: Lifecycle = parts.app.state.lifecycle
    assert lifecycle.num_open == 0
    await asyncio.gather(*(client.post(CHAT, json=BODY) for _ in range(3)))
    await client.post(CHAT, content=b"nonsense")
    assert lifecycle.num_open == 0
    assert await lifecycle.wait_idle(0)
