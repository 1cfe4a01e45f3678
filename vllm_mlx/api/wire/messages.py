"""Messages of the chat endpoint, and the way from them to `core.chat.Message`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from vllm_mlx.api.wire.base import WireModel, unsupported
from vllm_mlx.api.wire.freeform import freeform_arguments
from vllm_mlx.core.chat import Message, TextPart, ToolCall
from vllm_mlx.core.errors import InvalidRequest


class TextContent(WireModel):
    """A piece of text."""

    type: Literal["text"]
    """The kind of this part."""
    text: str
    """The text itself."""
    cache_control: Any = None
    """Marks the end of the message as a beginning that others share. Needed only for recurrent models, and seldom."""


def _text_only(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind != "text":
        raise unsupported(f"has type '{kind[:40]}', but this model takes text only")
    return part


Content = str | list[Annotated[TextContent, BeforeValidator(_text_only)]]


class SystemMessage(WireModel):
    """Instructions for the model."""

    role: Literal["system", "developer"]
    """`developer` is the newer name of `system`."""
    content: Content
    """Text, or a list of text parts."""
    name: str | None = None
    """Name of the participant, for templates that show it."""


class UserMessage(WireModel):
    """What the user says."""

    role: Literal["user"]
    """`user`."""
    content: Content
    """Text, or a list of text parts."""
    name: str | None = None
    """Name of the participant, for templates that show it."""


class FunctionCall(WireModel):
    """Which function was called, and how."""

    name: str
    """Name of the function."""
    arguments: str
    """Its arguments, as JSON text."""
    parsed_arguments: Any = None
    """Accepted, as OpenAI's clients leave it in the calls that they parse; `arguments` counts."""


class CustomCall(WireModel):
    """Which custom tool was called, and with what."""

    name: str
    """Name of the tool."""
    input: str
    """The text that it was given."""


class _EarlierCall(WireModel):
    """What calls of both kinds have."""

    id: str
    """Id that the tool's answer refers to."""
    index: int | None = None
    """Accepted; the order of the list counts."""


class FunctionToolCall(_EarlierCall):
    """A call of a function that the assistant made earlier."""

    type: Literal["function"] = "function"
    """`function`."""
    function: FunctionCall
    """Which function was called, and how."""


class CustomToolCall(_EarlierCall):
    """A call of a custom tool that the assistant made earlier."""

    type: Literal["custom"]
    """`custom`."""
    custom: CustomCall
    """Which tool was called, and with what."""


def _kind_of_call(call: Any) -> str:
    kind = call.get("type") if isinstance(call, dict) else getattr(call, "type", None)
    return "custom" if kind == "custom" else "function"


AssistantToolCall = Annotated[
    Annotated[FunctionToolCall, Tag("function")] | Annotated[CustomToolCall, Tag("custom")],
    Discriminator(_kind_of_call),
]


class AssistantMessage(WireModel):
    """What the model said earlier."""

    role: Literal["assistant"]
    """`assistant`."""
    content: Content | None = None
    """Text, or a list of text parts; may be absent beside `tool_calls`."""
    name: str | None = None
    """Name of the participant, for templates that show it."""
    refusal: str | None = None
    """Stands for the content where there is none."""
    reasoning_content: str | None = None
    """What the model thought, for templates that show it."""
    reasoning: str | None = None
    """The same under another name."""
    tool_calls: list[AssistantToolCall] | None = None
    """Calls that the assistant made."""
    parsed: Any = None
    """Accepted, as OpenAI's clients leave it in the answers that they parse; `content` counts."""
    annotations: list[Any] | None = None
    """Accepted, as it comes back in replayed answers; not shown to the model."""
    audio: None = None
    """This model takes text only."""
    function_call: None = None
    """Deprecated by OpenAI; send `tool_calls`."""


class ToolMessage(WireModel):
    """What a tool answered."""

    role: Literal["tool"]
    """`tool`."""
    content: Content
    """Text, or a list of text parts."""
    tool_call_id: str
    """Id of the call that this answers."""
    name: str | None = None
    """Name of the tool, for templates that show it."""


WireMessage = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


def to_message(wire: SystemMessage | UserMessage | AssistantMessage | ToolMessage, *, position: int) -> Message:
    """One message in no dialect. Raises InvalidRequest if an assistant says nothing."""
    content, marked = _content(wire.content), _is_marked(wire.content)
    match wire:
        case SystemMessage():
            return Message("system", content, wire.name, is_breakpoint=marked)
        case UserMessage():
            return Message("user", content, wire.name, is_breakpoint=marked)
        case ToolMessage():
            return Message("tool", content, wire.name, tool_call_id=wire.tool_call_id, is_breakpoint=marked)
    content = wire.refusal if content is None else content
    if content is None and not wire.tool_calls:
        param = f"messages.{position}.content"
        raise InvalidRequest(f"{param} is required, unless the assistant made tool_calls.", param=param)
    calls = tuple(map(_call, wire.tool_calls or ()))
    reasoning = wire.reasoning_content if wire.reasoning_content is not None else wire.reasoning
    return Message("assistant", content, wire.name, reasoning=reasoning, tool_calls=calls, is_breakpoint=marked)


def _call(wire: FunctionToolCall | CustomToolCall) -> ToolCall:
    if isinstance(wire, CustomToolCall):
        return ToolCall(wire.id, wire.custom.name, freeform_arguments(wire.custom.input))
    return ToolCall(wire.id, wire.function.name, wire.function.arguments)


def _is_marked(content: str | list[TextContent] | None) -> bool:
    return isinstance(content, list) and any(part.cache_control is not None for part in content)


def _content(content: str | list[TextContent] | None) -> str | tuple[TextPart, ...] | None:
    if isinstance(content, list):
        return tuple(TextPart(part.text) for part in content)
    return content
