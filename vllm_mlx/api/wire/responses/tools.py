"""Tools of a response: as clients describe them, as the model sees them, and which of them may be called.

A namespace is a group of functions; the model sees its members as `namespace__name`, and calls come back with both
names apart. A custom tool takes one plain text; the model sees it as a function whose only argument is `input`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BeforeValidator, ConfigDict, Field

from vllm_mlx.api.wire.base import WireModel, unsupported
from vllm_mlx.api.wire.freeform import AnyText, LarkOrRegex, freeform_tool
from vllm_mlx.api.wire.tools import MAX_TOOLS, NAME_PATTERN
from vllm_mlx.core.chat import Tool, ToolChoice
from vllm_mlx.core.errors import InvalidRequest

NOT_OFFERED = ("web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11")
"""Built-in tools that agents list in every request: taken, and never shown to the model, so never called."""
Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class _CallableTool(WireModel):
    """What functions and custom tools share."""

    name: Name
    """What the model calls it by."""
    description: str | None = None
    """What it is for."""
    defer_loading: Literal[False] | None = None
    """Only false: tools cannot be looked up later."""
    allowed_callers: list[Literal["direct"]] | None = None
    """Only `direct`: the model itself calls."""
    is_async: Literal[False] | None = Field(None, alias="async")
    """Only false."""


class FunctionTool(_CallableTool):
    """A function with named arguments."""

    type: Literal["function"]
    """`function`."""
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments."""
    strict: bool | None = None
    """Whether arguments must match the schema whatever else holds."""
    output_schema: dict[str, Any] | None = None
    """Accepted; not shown to the model."""


class GrammarFormat(LarkOrRegex):
    """Text of a grammar."""

    type: Literal["grammar"]
    """`grammar`."""


class CustomTool(_CallableTool):
    """A tool that takes one plain text."""

    type: Literal["custom"]
    """`custom`."""
    format: Annotated[AnyText | GrammarFormat, Field(discriminator="type")] | None = None
    """What the text looks like; any text if absent."""


class NamespaceTool(WireModel):
    """A group of tools."""

    type: Literal["namespace"]
    """`namespace`."""
    name: Name
    """Name of the group."""
    description: str | None = None
    """Accepted; not shown to the model, whose templates know no groups."""
    tools: list[Annotated[FunctionTool | CustomTool, Field(discriminator="type")]]
    """The tools of the group."""


class NotOfferedTool(WireModel):
    """A built-in tool that is accepted and never called, since agents list it in every request."""

    model_config = ConfigDict(extra="allow")

    type: Literal["web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11"]
    """The server does not search the web; the model is not told of it."""


def _offered_kind(tool: Any) -> Any:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if isinstance(kind, str) and kind not in ("function", "custom", "namespace", *NOT_OFFERED):
        raise unsupported(f"has type '{kind[:40]}', which this server does not offer")
    return tool


WireTool = Annotated[
    FunctionTool | CustomTool | NamespaceTool | NotOfferedTool,
    Field(discriminator="type"),
    BeforeValidator(_offered_kind),
]


class NamedChoice(WireModel):
    """One tool."""

    type: Literal["function", "custom"]
    """The kind of the tool."""
    name: str
    """Its name."""
    namespace: str | None = None
    """Its namespace, if it has one."""


class AllowedChoice(WireModel):
    """Some tools."""

    type: Literal["allowed_tools"]
    """`allowed_tools`."""
    mode: Literal["auto", "required"]
    """Whether one of them must be called."""
    tools: list[NamedChoice]
    """The tools that may be called."""


def _offered_choice(choice: Any) -> Any:
    kind = choice.get("type") if isinstance(choice, dict) else None
    if isinstance(kind, str) and kind not in ("function", "custom", "allowed_tools"):
        raise unsupported(f"has type '{kind[:40]}', which this server does not offer")
    return choice


WireToolChoice = Annotated[
    Literal["auto", "none", "required"] | NamedChoice | AllowedChoice, BeforeValidator(_offered_choice)
]


class Origin(msgspec.Struct, frozen=True):
    """What the client knows a tool by."""

    name: str
    namespace: str | None = None
    is_freeform: bool = False


class OfferedTools(msgspec.Struct, frozen=True):
    """The tools that the model is shown."""

    tools: tuple[Tool, ...] = ()
    origins: dict[str, Origin] = {}
    """By the name that the model uses."""


NO_TOOLS = OfferedTools()


def flat_name(name: str, namespace: str | None) -> str:
    """The name that the model uses."""
    if not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("__") else f"{namespace}__{name}"


def offered_tools(wire: Sequence[FunctionTool | CustomTool | NamespaceTool | NotOfferedTool]) -> OfferedTools:
    """The tools as the model sees them. Raises InvalidRequest if two have the same name."""
    tools: list[Tool] = []
    origins: dict[str, Origin] = {}
    for index, given in enumerate(wire):
        if isinstance(given, NotOfferedTool):
            continue
        space = given.name if isinstance(given, NamespaceTool) else None
        for one in given.tools if isinstance(given, NamespaceTool) else [given]:
            name = flat_name(one.name, space)
            if name in origins:
                raise InvalidRequest(f"Two tools are named '{name}'.", param=f"tools.{index}.name")
            if len(tools) == MAX_TOOLS:
                raise InvalidRequest(f"tools: at most {MAX_TOOLS} can be offered.", param="tools")
            origins[name] = Origin(one.name, space, isinstance(one, CustomTool))
            tools.append(_tool(one, name, param=f"tools.{index}"))
    return OfferedTools(tuple(tools), origins)


def _tool(wire: FunctionTool | CustomTool, name: str, *, param: str) -> Tool:
    if isinstance(wire, FunctionTool):
        return Tool(name, wire.description, wire.parameters, is_strict=wire.strict is True)
    grammar = wire.format if isinstance(wire.format, GrammarFormat) else None
    return freeform_tool(name, wire.description, grammar, param=f"{param}.format")


def tool_choice(wire: str | NamedChoice | AllowedChoice | None, offered: OfferedTools) -> ToolChoice:
    """Which tools may be called. Raises InvalidRequest if there is none to call."""
    if isinstance(wire, NamedChoice):
        return ToolChoice("required", (_known(wire, offered, "tool_choice.name"),))
    if isinstance(wire, AllowedChoice):
        names = [_known(one, offered, f"tool_choice.tools.{i}.name") for i, one in enumerate(wire.tools)]
        if not names and wire.mode == "required":
            raise InvalidRequest("tool_choice requires one of no tools.", param="tool_choice.tools")
        return ToolChoice(wire.mode, tuple(names)) if names else ToolChoice("none")
    if wire == "required":
        if not offered.tools:
            raise InvalidRequest("tool_choice is 'required', but there is no tool to call.", param="tool_choice")
        return ToolChoice("required")
    return ToolChoice("none" if wire == "none" else "auto")


def _known(choice: NamedChoice, offered: OfferedTools, param: str) -> str:
    """The model's name of a chosen tool; without a namespace any tool of that name and kind will do."""
    for name, origin in offered.origins.items():
        is_named = choice.name in (origin.name, name) and choice.namespace in (None, origin.namespace)
        if is_named and origin.is_freeform == (choice.type == "custom"):
            return name
    raise InvalidRequest(f"{param} names a {choice.type} tool '{choice.name}' that is not in tools.", param=param)
