"""POST /v1/responses (https://platform.openai.com/docs/api-reference/responses)."""

from __future__ import annotations

from typing import Any

from vllm_mlx.bench.agents.conversation import TASK, TOOLS, Call, Conversation, Step
from vllm_mlx.bench.agents.dialect import Heard

_TEXTS = ("response.output_text.delta", "response.reasoning_text.delta", "response.reasoning_summary_text.delta")
_ENDS = ("response.completed", "response.incomplete")


class Responses:
    """The dialect of Codex; like Codex, all that was said is sent again, and nothing is stored."""

    name = "responses"
    path = "/v1/responses"

    def body(self, conversation: Conversation, *, model: str, step: Step) -> dict[str, Any]:
        """See `Dialect`."""
        items: list[dict[str, Any]] = [{"type": "message", "role": "user", "content": TASK}]
        for one in conversation.exchanges:
            call = {"call_id": one.call_id, "name": one.name, "arguments": one.arguments}
            items += [
                {"type": "function_call", **call},
                {"type": "function_call_output", "call_id": one.call_id, "output": one.result},
            ]
        return {
            "model": model,
            "instructions": conversation.system,
            "input": items,
            "tools": [
                {"type": "function", "name": tool.name, "description": tool.description, "parameters": tool.schema}
                for tool in TOOLS
            ],
            "tool_choice": {"type": "function", "name": step.calls} if step.calls else "auto",
            "max_output_tokens": step.max_tokens,
            "temperature": 0,
            "store": False,
            "stream": True,
        }

    def hear(self, event: Any, heard: Heard) -> None:
        """See `Dialect`."""
        kind = event["type"]
        if kind in _TEXTS:
            heard.text += event["delta"]
        elif kind == "response.output_item.added" and event["item"]["type"] == "function_call":
            item = event["item"]
            heard.calls[event["output_index"]] = Call(item["call_id"], item["name"])
        elif kind == "response.function_call_arguments.delta":
            heard.calls[event["output_index"]].arguments += event["delta"]
        elif kind in ("error", "response.failed"):
            heard.error = str(event.get("message") or event["response"]["error"])
        elif kind in _ENDS:
            usage = event["response"]["usage"]
            heard.is_complete = True
            heard.num_prompt = usage["input_tokens"]
            heard.num_cached = (usage.get("input_tokens_details") or {}).get("cached_tokens")
