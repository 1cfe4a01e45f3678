"""Recorded turns of coding agents through every dialect: what the last turn computed is found by the next."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from agent_script import write_agent_model
from fixtures_server import client_of, running
from fixtures_text import WordScript

from vllm_mlx.core.config import Config

pytestmark = pytest.mark.anyio

RECORDED = Path(__file__).resolve().parents[3] / "shared" / "clients" / "recorded"
TURNS = {
    "claude-code": ("002", "003"),
    "cn": ("001", "002"),
    "codex": ("001", "002"),
    "opencode": ("002", "003"),
    "opencode-anthropic": ("002", "003"),
    "pi-local": ("001", "002"),
    "pi-localant": ("001", "002"),
    "pi-localresp": ("001", "002"),
}


@pytest.fixture(scope="module")
async def agents_client(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    """A server whose template shows tools, and whose context holds the longest prompt."""
    folder = tmp_path_factory.mktemp("model")
    backend = write_agent_model(folder, [path.read_text() for path in sorted(RECORDED.glob("*/001*.json"))])
    options = {"script": WordScript(backend), "vocab_size": backend.get_vocab_size()}
    config = Config(model="/models/fake", model_alias=("mock-model",), engine="thread", max_tokens=4)
    server = running(folder, config, max_model_len=100_000, num_pages=8192, **options)
    async with server as parts, client_of(parts.app) as found:
        yield found


def recorded_request(client_name: str, number: str) -> Any:
    (path,) = (RECORDED / client_name).glob(f"{number}_POST*.json")
    return json.loads(path.read_text())


async def turn(client: httpx.AsyncClient, recorded: Any) -> tuple[int, int]:
    """Send a recorded request, but for a short answer in one piece: tokens of the prompt, and those from the cache."""
    body: dict[str, Any] = {**recorded["body"], "stream": False}
    body.pop("stream_options", None)
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if name in body:
            body[name] = 4
    if (body.get("thinking") or {}).get("budget_tokens"):
        body["thinking"] = {**body["thinking"], "budget_tokens": 1024}  # the least that there is
        body["max_tokens"] = 1028
    answer = await client.post(recorded["path"], json=body, headers={"anthropic-version": "2023-06-01"})
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    if "cache_read_input_tokens" in usage:
        cached = usage["cache_read_input_tokens"]
        return usage["input_tokens"] + usage["cache_creation_input_tokens"] + cached, cached
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    return usage.get("prompt_tokens") or usage["input_tokens"], details["cached_tokens"]


@pytest.mark.skipif(not RECORDED.exists(), reason="needs the recorded requests")
@pytest.mark.parametrize("client_name", TURNS)
async def test_next_turn_finds_what_the_last_computed(client_name: str, agents_client: httpx.AsyncClient) -> None:
    first, second = (recorded_request(client_name, number) for number in TURNS[client_name])
    before, _ = await turn(agents_client, first)
    num_prompt, num_cached = await turn(agents_client, second)
    assert num_cached >= before > 1000
    assert num_cached >= 0.95 * num_prompt
