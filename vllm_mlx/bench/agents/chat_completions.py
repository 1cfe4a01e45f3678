"""POST /v1/chat/completions (https://platform.openai.com/docs/api-reference/chat)."""

from __future__ import annotations

from typing import Any

from vllm_mlx.bench.agents.conversation import TASK, TOOLS, Call, Conversation, Step
from vllm_mlx.bench.agents.dialect import Heard


class ChatCompletions:
    """The dialect of OpenCode, Qwen Code, Cline and aider."""

    name = "chat"
    path = "/v1/chat/completions"

    def body(self, conversation: Conversation, *, model: str, step: Step) -> dict[str, Any]:
        """See `Dialect`."""
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": conversation.system},
            {"role": "user", "content": TASK},
        ]
        for one in conversation.exchanges:
            function = {"name": one.name, "arguments": one.arguments}
            call = {"id": one.call_id, "type": "function", "function": function}
            messages += [
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": one.call_id, "content": one.result},
            ]
        return {
            "model": model,
            "messages": messages,
            "tools": [_tool(tool.name, tool.description, tool.schema) for tool in TOOLS],
            "tool_choice": {"type": "function", "function": {"name": step.calls}} if step.calls else "auto",
            "max_tokens": step.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def hear(self, event: Any, heard: Heard) -> None:
        """See `Dialect`."""
        if event.get("error"):
            heard.error = str(event["error"])
        for choice in event.get("choices") or ():
            delta = choice["delta"]
            heard.text += "".join(delta.get(name) or "" for name in ("content", "reasoning_content", "reasoning"))
            for piece in delta.get("tool_calls") or ():
                call, function = heard.calls.setdefault(piece["index"], Call()), piece.get("function") or {}
                call.call_id = call.call_id or piece.get("id") or ""
                call.name += function.get("name") or ""
                call.arguments += function.get("arguments") or ""
            heard.is_complete |= choice.get("finish_reason") is not None
        if usage := event.get("usage"):
            heard.num_prompt = usage["prompt_tokens"]
            heard.num_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")


def _tool(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}
