"""Body and answer of POST /v1/parse: a given text, read as the output of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from vllm_mlx.api.wire.answers import FunctionAnswer, ToolCallAnswer
from vllm_mlx.api.wire.base import WireModel
from vllm_mlx.chat.collect import folded_calls
from vllm_mlx.chat.formats import tool_format
from vllm_mlx.chat.output_formats import AUTO, OutputFormats
from vllm_mlx.chat.parse import OutputParser
from vllm_mlx.chat.payloads.tools import ToolSet
from vllm_mlx.chat.reasoning import reasoning_format
from vllm_mlx.core.errors import InvalidRequest
from vllm_mlx.core.events import Event, ReasoningDelta, TextDelta, ToolCallDelta

_Format = TypeVar("_Format")


class ParseBody(WireModel):
    """A text and what to read it as."""

    text: str | None = None
    """The whole text; or send `chunks`."""
    chunks: list[str] | None = None
    """The text in pieces, as they would come."""
    tool_format: str | None = None
    """Name or alias of a tool format, `auto` for the served model's own; null looks for no calls."""
    reasoning_format: str | None = None
    """Name or alias of a reasoning format, `auto` for the served model's own; null looks for no reasoning."""
    tools: list[dict[str, Any]] | None = None
    """Functions in OpenAI's shape, for the types of their arguments; without any, every name is believed."""
    prompt_tail: str | None = None
    """End of the prompt, behind the last message; it may open reasoning. Null if it is not known."""


class ParseAnswer(msgspec.Struct, frozen=True):
    """What the text is read as."""

    content: str
    reasoning_content: str
    tool_calls: list[ToolCallAnswer]
    events: list[dict[str, Any]]
    """In order: `content` and `reasoning` with `text`; `tool_call` with `index` and `arguments`, the first of a call
    with `id` and `name` too."""


def parse(body: ParseBody, formats: OutputFormats) -> ParseAnswer:
    """Read the text. Raises InvalidRequest for a format that is not known, or a tool without a name."""
    if (body.text is None) == (body.chunks is None):
        raise InvalidRequest("Send text or chunks, one of them.", param="text")
    tools = _named(body.tool_format, formats.tools, tool_format, param="tool_format")
    parser = OutputParser(
        tools=ToolSet(_schemas(body.tools or ())) if tools else None,
        tool_format=tools,
        reasoning=_named(body.reasoning_format, formats.reasoning, reasoning_format, param="reasoning_format"),
        prompt_tail=body.prompt_tail,
    )
    events: list[Event] = []
    for chunk in [body.text or ""] if body.chunks is None else body.chunks:
        events += parser.feed(chunk)
    return _answer([*events, *parser.finish()])


def _named(name: str | None, own: _Format | None, by_name: Callable[[str], _Format], *, param: str) -> _Format | None:
    if name is None or name == AUTO:
        return own if name == AUTO else None
    try:
        return by_name(name)
    except KeyError:
        raise InvalidRequest(
            f"{param}: there is no format of that name; docs/reference/parsers.md lists them.", param=param
        ) from None


def _schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    schemas = {}
    for position, tool in enumerate(tools):
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str):
            param = f"tools.{position}.function.name"
            raise InvalidRequest(f"{param} is required.", param=param)
        parameters = function.get("parameters")
        schemas[name] = parameters if isinstance(parameters, dict) else {}
    return schemas


def _answer(events: Sequence[Event]) -> ParseAnswer:
    return ParseAnswer(
        content="".join(event.text for event in events if isinstance(event, TextDelta)),
        reasoning_content="".join(event.text for event in events if isinstance(event, ReasoningDelta)),
        tool_calls=[
            ToolCallAnswer(id=call.id, type="function", function=FunctionAnswer(call.name, call.arguments))
            for call in folded_calls(events)
        ],
        events=[_shown(event) for event in events],
    )


def _shown(event: Event) -> dict[str, Any]:
    match event:
        case TextDelta():
            return {"type": "content", "text": event.text}
        case ReasoningDelta():
            return {"type": "reasoning", "text": event.text}
        case ToolCallDelta():
            head = {} if event.id is None else {"id": event.id, "name": event.name}
            return {"type": "tool_call", "index": event.index, **head, "arguments": event.arguments}
    raise AssertionError(f"a parser does not say {event}")
