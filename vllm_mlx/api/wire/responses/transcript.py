"""From items to the messages of a chat request, and from wire items to what is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
from pydantic import TypeAdapter

from vllm_mlx.api.wire.freeform import freeform_arguments
from vllm_mlx.api.wire.responses.items import (
    Content,
    CustomToolCallInput,
    CustomToolCallOutput,
    FunctionCallInput,
    FunctionCallOutput,
    MessageInput,
    ReasoningInput,
    ResolvedItem,
    is_marked,
    text_of,
)
from vllm_mlx.api.wire.responses.tools import flat_name
from vllm_mlx.core.chat import Message, TextPart, ToolCall

Unseal = Callable[[str], str]
"""Sealed reasoning -> its text. Raises InvalidRequest for a seal that this server did not make."""

_ITEMS: TypeAdapter[list[ResolvedItem]] = TypeAdapter(list[ResolvedItem])


def messages_of(items: Iterable[ResolvedItem], *, instructions: str | None, unseal: Unseal) -> tuple[Message, ...]:
    """The conversation. Raises what `unseal` raises.

    Instructions and the system messages at the beginning become one message: many templates take only one. What the
    assistant thought, said and called in a row is one message of its own.
    """
    writer = _Writer(unseal)
    if instructions is not None:
        writer.add(Message("system", instructions))
    for item in items:
        writer.read(item)
    return writer.finished()


class _Writer:
    """Puts messages together, item by item."""

    def __init__(self, unseal: Unseal) -> None:
        self._unseal = unseal
        self._messages: list[Message] = []
        self._pending: Message | None = None
        """The assistant's turn, while it may grow; without its calls."""
        self._calls: list[ToolCall] = []

    def finished(self) -> tuple[Message, ...]:
        self._flush()
        leading = _leading_system(self._messages)
        if len(leading) < 2:
            return tuple(self._messages)
        marked = any(message.is_breakpoint for message in leading)
        text = "\n\n".join(_plain(message.content) for message in leading)
        return (Message("system", text, is_breakpoint=marked), *self._messages[len(leading) :])

    def add(self, message: Message) -> None:
        """A message that no other item is part of."""
        self._flush()
        self._messages.append(message)

    def read(self, item: ResolvedItem) -> None:
        match item:
            case MessageInput(role="assistant"):
                self._said(_content(item.content), is_breakpoint=is_marked(item.content))
            case MessageInput():
                role = "system" if item.role == "developer" else item.role
                self.add(Message(role, _content(item.content), is_breakpoint=is_marked(item.content)))
            case ReasoningInput():
                self._thought(self._reasoning(item))
            case FunctionCallInput():
                self._called(ToolCall(item.call_id, flat_name(item.name, item.namespace), item.arguments))
            case CustomToolCallInput():
                name = flat_name(item.name, item.namespace)
                self._called(ToolCall(item.call_id, name, freeform_arguments(item.input)))
            case FunctionCallOutput() | CustomToolCallOutput():
                content = _content(item.output)
                self.add(Message("tool", content, item.name, tool_call_id=item.call_id))

    def _reasoning(self, item: ReasoningInput) -> str:
        if item.encrypted_content:
            return self._unseal(item.encrypted_content)
        return "\n".join(piece.text for piece in item.content or item.summary)

    def _thought(self, text: str) -> None:
        if self._calls or (self._pending is not None and self._pending.content is not None):
            self._flush()
        before = self._pending.reasoning if self._pending is not None else None
        self._grow(reasoning=text if before is None else f"{before}\n{text}")

    def _said(self, content: str | tuple[TextPart, ...], *, is_breakpoint: bool) -> None:
        if self._calls or (self._pending is not None and self._pending.content is not None):
            self._flush()
        self._grow(content=content, is_breakpoint=is_breakpoint)

    def _called(self, call: ToolCall) -> None:
        self._calls.append(call)
        self._grow()

    def _grow(self, **fields: Any) -> None:
        self._pending = msgspec.structs.replace(self._pending or Message("assistant"), **fields)

    def _flush(self) -> None:
        if self._pending is not None:
            self._messages.append(msgspec.structs.replace(self._pending, tool_calls=tuple(self._calls)))
            self._pending, self._calls = None, []


def _leading_system(messages: Sequence[Message]) -> list[Message]:
    end = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    return list(messages[:end])


def _plain(content: str | tuple[TextPart, ...] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content)


def _content(content: Content) -> str | tuple[TextPart, ...]:
    found = text_of(content)
    return found if isinstance(found, str) else tuple(TextPart(text) for text in found)


# ---- what is stored ----

_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}


def stored_items(items: Iterable[ResolvedItem], *, key: str) -> list[dict[str, Any]]:
    """Items as the API shows them: with ids, and messages as lists of parts. `key` makes new ids unique."""
    return [_stored(item, f"{_PREFIXES[item.type]}_{key}{index:04x}") for index, item in enumerate(items)]


def _stored(item: ResolvedItem, new_id: str) -> dict[str, Any]:
    found = item.model_dump(mode="json", exclude_none=True, by_alias=True)
    found["id"] = item.id or new_id
    if isinstance(item, MessageInput):
        found.setdefault("status", "completed")
        if isinstance(item.content, str):
            kind = "output_text" if item.role == "assistant" else "input_text"
            found["content"] = [{"type": kind, "text": item.content}]
    return found


def read_items(stored: Sequence[dict[str, Any]]) -> list[ResolvedItem]:
    """The items of stored ones, or of a response's output."""
    return _ITEMS.validate_python(list(stored))
