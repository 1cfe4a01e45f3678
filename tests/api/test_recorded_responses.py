"""Recorded requests of Codex, pi and OpenAI's agents: accepted as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_mlx.api.wire.decode import decode
from vllm_mlx.api.wire.responses.body import ResponsesBody
from vllm_mlx.api.wire.responses.items import ItemReference
from vllm_mlx.api.wire.responses.request import check, given_items, prompt_request
from vllm_mlx.core.chat import ChatRequest
from vllm_mlx.core.sampling import SamplingParams

RECORDED = Path(__file__).resolve().parents[3] / "shared" / "clients" / "recorded"
FILES = sorted(RECORDED.glob("*/*_POST_v1_responses.json"))


def request_of(body: dict[str, Any]) -> ChatRequest:
    found = decode(json.dumps(body).encode(), ResponsesBody)
    check(found)
    items = [item for item in given_items(found) if not isinstance(item, ItemReference)]
    request, _ = prompt_request(found, items, request_id="r", sampling=SamplingParams(), unseal=str)
    return request


@pytest.mark.skipif(not FILES, reason="needs the recorded requests")
@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name[:3]}")
def test_recorded_requests_are_taken_whole(path: Path) -> None:
    body = json.loads(path.read_text())["body"]
    request = request_of(body)
    shown = json.dumps(
        [
            message.content if isinstance(message.content, str) else [p.text for p in message.content or ()]
            for message in request.messages
        ],
        ensure_ascii=False,
    )
    texts = [
        item["content"] if isinstance(item["content"], str) else part["text"]
        for item in body["input"]
        if "content" in item
        for part in ([None] if isinstance(item["content"], str) else item["content"])
    ]
    assert texts
    for text in texts:
        assert json.dumps(text, ensure_ascii=False)[1:-1] in shown
    calls = [call for message in request.messages for call in message.tool_calls]
    assert [call.name for call in calls] == [
        item["name"] for item in body["input"] if item.get("type") == "function_call"
    ]


@pytest.mark.skipif(not FILES, reason="needs the recorded requests")
def test_tools_of_codex_are_offered_but_for_the_search() -> None:
    body = json.loads((RECORDED / "codex" / "002_POST_v1_responses.json").read_text())["body"]
    request = request_of(body)
    names = [tool.name for tool in request.tools]
    assert "exec_command" in names
    assert "multi_agent_v1__spawn_agent" in names
    assert "web_search" not in names
    assert [message.role for message in request.messages] == ["system", "user", "user", "assistant", "tool"]
