"""Recorded requests of Claude Code, OpenCode, pi and pydantic-ai: accepted as they are, turn after turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_mlx.api.wire.anthropic.body import MessagesBody
from vllm_mlx.api.wire.anthropic.request import message_request
from vllm_mlx.api.wire.decode import decode
from vllm_mlx.core.chat import ChatRequest, Message

RECORDED = Path(__file__).resolve().parents[3] / "shared" / "clients" / "recorded"
FILES = sorted(RECORDED.glob("*/*_POST_v1_messages.json"))
TURNS = [("claude-code", "002", "003"), ("opencode-anthropic", "002", "003"), ("pi-localant", "001", "002")]

pytestmark = pytest.mark.skipif(not FILES, reason="needs the recorded requests")


def body_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())["body"]
    return found


def request_of(path: Path) -> ChatRequest:
    body = decode(json.dumps(body_of(path)).encode(), MessagesBody)
    return message_request(body, request_id="r", defaults={}, unseal=lambda _: None)


def text_of(message: Message) -> str:
    content = message.content or ""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name[:3]}")
def test_recorded_requests_are_taken_whole(path: Path) -> None:
    body, request = body_of(path), request_of(path)
    assert [tool.name for tool in request.tools] == [tool["name"] for tool in body.get("tools", ())]
    shown = "\n".join(map(text_of, request.messages))
    for turn in body["messages"]:
        blocks = [{"text": turn["content"]}] if isinstance(turn["content"], str) else turn["content"]
        assert all(block.get("text", "") in shown for block in blocks)
    calls = [call.id for message in request.messages for call in message.tool_calls]
    assert calls == [
        block["id"]
        for turn in body["messages"]
        if isinstance(turn["content"], list)
        for block in turn["content"]
        if block["type"] == "tool_use"
    ]


@pytest.mark.parametrize(("client", "one", "two"), TURNS)
def test_next_turn_begins_with_the_messages_of_the_last(client: str, one: str, two: str) -> None:
    first, second = (request_of(RECORDED / client / f"{number}_POST_v1_messages.json") for number in (one, two))
    before = [(message.role, text_of(message)) for message in first.messages]
    after = [(message.role, text_of(message)) for message in second.messages]
    assert after[: len(before)] == before
    assert first.tools == second.tools


def test_marks_of_claude_code_are_kept() -> None:
    request = request_of(RECORDED / "claude-code" / "002_POST_v1_messages.json")
    assert [(message.role, message.keep_s) for message in request.messages] == [
        ("system", 300),
        ("user", 300),
        ("system", 0),
    ]
