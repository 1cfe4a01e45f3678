"""Tools as templates read them, and as plain text for templates that know none.

Where the template does not mention `tools`, the system text says how to call them; where it does not mention
`tool_calls` either, calls and results in the history are written the same way. See docs/tools.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from vllm_mlx.core.chat import Message, TextPart, Tool, ToolCall

FREEFORM_ARGUMENT = "input"
"""A tool that takes plain text is shown as a function with this one argument."""

_LOADED = "These tools can be called from now on, like those that were listed at the beginning:"
_SYSTEM = """You can call functions. They are listed inside <tools></tools>, one a line, as JSON:
{tools}

To call a function, write a JSON object with its name and arguments inside <tool_call></tool_call>, once for each call:
<tool_call>
{{"name": "function-name", "arguments": {{"argument-name": "value"}}}}
</tool_call>
The results come back inside <tool_response></tool_response>."""


def tool_variables(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools in OpenAI's shape, keys always in the same order; the schema stays as the client wrote it."""
    return [{"type": "function", "function": _function(tool)} for tool in tools]


def parameters_of(tool: Tool) -> dict[str, Any]:
    """The JSON schema of a tool's arguments; empty if nothing is said of them."""
    if not tool.is_freeform:
        return tool.parameters or {}
    text = {"type": "string", "description": "The whole input of the tool, as plain text."}
    return {"type": "object", "properties": {FREEFORM_ARGUMENT: text}, "required": [FREEFORM_ARGUMENT]}


def loaded_tools_text(tools: Sequence[Tool]) -> str:
    """What a message says of tools that the beginning of the prompt does not list."""
    return f"{_LOADED}\n{_listed(tools)}"


def removed_tools_text(tools: Sequence[Tool]) -> str:
    """What a message says of tools that are listed above and should not be called any more."""
    return f"These tools cannot be called any more: {', '.join(tool.name for tool in tools)}."


def with_tools_as_text(messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[Message, ...]:
    """The conversation with a system text that lists the tools and says how to call them."""
    text = _system_text(tools)
    if messages and messages[0].role == "system":
        first = msgspec.structs.replace(messages[0], content=f"{_text(messages[0])}\n\n{text}")
        return (first, *messages[1:])
    return (Message("system", text), *messages)


def calls_as_text(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The conversation with roles 'system', 'user' and 'assistant' only: calls and their results are text."""
    plain: list[Message] = []
    for message in messages:
        if message.role == "tool" and plain and plain[-1].role == "user" and _is_result(plain[-1]):
            joined = f"{_text(plain[-1])}\n{_result(message)}"
            plain[-1] = Message("user", joined, is_breakpoint=message.is_breakpoint)
        else:
            plain.append(_plain(message))
    return tuple(plain)


def _function(tool: Tool) -> dict[str, Any]:
    described = {"description": tool.description} if tool.description is not None else {}
    schema = parameters_of(tool) or {"type": "object", "properties": {}}
    return {"name": tool.name, **described, "parameters": schema}


def _system_text(tools: Sequence[Tool]) -> str:
    return _SYSTEM.format(tools=_listed(tools))


def _listed(tools: Sequence[Tool]) -> str:
    lines = [json.dumps(tool, ensure_ascii=False) for tool in tool_variables(tools)]
    return "\n".join(["<tools>", *lines, "</tools>"])


def _plain(message: Message) -> Message:
    if message.role == "tool":
        return Message("user", _result(message), is_breakpoint=message.is_breakpoint)
    if not message.tool_calls:
        return message
    parts = [_text(message), *(_call(call) for call in message.tool_calls)]
    return msgspec.structs.replace(message, content="\n".join(part for part in parts if part), tool_calls=())


def _call(call: ToolCall) -> str:
    try:
        arguments = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = call.arguments
    body = json.dumps({"name": call.name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def _result(message: Message) -> str:
    return f"<tool_response>\n{_text(message)}\n</tool_response>"


def _is_result(message: Message) -> bool:
    return _text(message).startswith("<tool_response>\n")


def _text(message: Message) -> str:
    content: str | tuple[TextPart, ...] = message.content or ""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
