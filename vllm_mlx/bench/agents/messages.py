"""POST /v1/messages (https://docs.anthropic.com/en/api/messages)."""

from __future__ import annotations

from typing import Any

import msgspec

from vllm_mlx.bench.agents.conversation import TASK, TOOLS, Call, Conversation, Step
from vllm_mlx.bench.agents.dialect import Heard

_CACHED = {"cache_control": {"type": "ephemeral"}}


class Messages:
    """The dialect of Claude Code, with its breakpoints after the system prompt and at the end."""

    name = "messages"
    path = "/v1/messages"

    def body(self, conversation: Conversation, *, model: str, step: Step) -> dict[str, Any]:
        """See `Dialect`."""
        messages: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": TASK}]}]
        for one in conversation.exchanges:
            call = {"id": one.call_id, "name": one.name, "input": msgspec.json.decode(one.arguments)}
            result = {"tool_use_id": one.call_id, "content": one.result}
            messages += [
                {"role": "assistant", "content": [{"type": "tool_use", **call}]},
                {"role": "user", "content": [{"type": "tool_result", **result}]},
            ]
        messages[-1]["content"][-1] |= _CACHED
        return {
            "model": model,
            "system": [{"type": "text", "text": conversation.system, **_CACHED}],
            "messages": messages,
            "tools": [
                {"name": tool.name, "description": tool.description, "input_schema": tool.schema} for tool in TOOLS
            ],
            "tool_choice": {"type": "tool", "name": step.calls} if step.calls else {"type": "auto"},
            "max_tokens": step.max_tokens,
            "temperature": 0,
            "stream": True,
        }

    def hear(self, event: Any, heard: Heard) -> None:
        """See `Dialect`."""
        kind = event["type"]
        if kind == "message_start":
            _count(event["message"]["usage"], heard)
        elif kind == "content_block_start" and event["content_block"]["type"] == "tool_use":
            block = event["content_block"]
            heard.calls[event["index"]] = Call(block["id"], block["name"])
        elif kind == "content_block_delta":
            delta = event["delta"]
            heard.text += delta.get("text") or delta.get("thinking") or ""
            if delta["type"] == "input_json_delta":
                heard.calls[event["index"]].arguments += delta["partial_json"]
        elif kind == "error":
            heard.error = str(event["error"])
        heard.is_complete |= kind == "message_stop"


def _count(usage: dict[str, Any], heard: Heard) -> None:
    """Here the tokens that were found or kept do not count as input."""
    read, made = (usage.get(f"cache_{verb}_input_tokens") for verb in ("read", "creation"))
    heard.num_prompt = usage["input_tokens"] + (read or 0) + (made or 0)
    heard.num_cached = read
