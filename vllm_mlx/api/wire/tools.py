"""Tools of a chat request, and the choice between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from vllm_mlx.api.wire.base import WireModel, unsupported
from vllm_mlx.api.wire.freeform import AnyText, LarkOrRegex, freeform_tool
from vllm_mlx.core.chat import Tool, ToolChoice
from vllm_mlx.core.errors import InvalidRequest

MAX_TOOLS = 1024
NAME_PATTERN = r"^[A-Za-z0-9_.:/-]{1,128}$"
"""OpenAI allows letters, digits, `_` and `-`, up to 64; names of MCP servers' tools are longer and have dots."""


def _offered_kind(tool: Any) -> Any:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if isinstance(kind, str) and kind not in ("function", "custom"):
        raise unsupported(f"has type '{kind[:40]}', but only 'function' and 'custom' are offered here")
    return tool


class FunctionDefinition(WireModel):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    """Letters, digits and `_.:/-`, at most 128."""
    description: str | None = None
    """What it does, for the model."""
    parameters: dict[str, Any] | None = None
    """JSON schema of its arguments, an object; without one it takes none."""
    strict: bool | None = None
    """Whether arguments must match the schema."""


class FunctionTool(WireModel):
    """A function with named arguments."""

    type: Literal["function"]
    """`function`."""
    function: FunctionDefinition
    """The function."""


class GrammarFormat(WireModel):
    """Text of a grammar."""

    type: Literal["grammar"]
    """`grammar`."""
    grammar: LarkOrRegex
    """Which."""


class CustomDefinition(WireModel):
    """A tool that takes one plain text."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    """Letters, digits and `_.:/-`, at most 128."""
    description: str | None = None
    """What it does, for the model."""
    format: Annotated[AnyText | GrammarFormat, Field(discriminator="type")] | None = None
    """What the text looks like; any text if absent."""


class CustomTool(WireModel):
    """A tool that takes one plain text."""

    type: Literal["custom"]
    """`custom`."""
    custom: CustomDefinition
    """The tool."""


class ToolName(WireModel):
    """A tool by its name."""

    name: str
    """One of `tools`."""


class NamedFunction(WireModel):
    """A function by its name."""

    type: Literal["function"]
    """`function`."""
    function: ToolName
    """The function."""


class NamedCustom(WireModel):
    """A custom tool by its name."""

    type: Literal["custom"]
    """`custom`."""
    custom: ToolName
    """The tool."""


NamedTool = Annotated[NamedFunction | NamedCustom, Field(discriminator="type"), BeforeValidator(_offered_kind)]


class AllowedTools(WireModel):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    """Whether the model must call one of them."""
    tools: Annotated[list[NamedTool], Field(min_length=1)]
    """Those that may be called."""


class AllowedToolsChoice(WireModel):
    """Only some of the tools may be called."""

    type: Literal["allowed_tools"]
    """`allowed_tools`."""
    allowed_tools: AllowedTools
    """Which, and whether one must be."""


def _known_choice(choice: Any) -> Any:
    kind = choice.get("type") if isinstance(choice, dict) else None
    if isinstance(kind, str) and kind not in ("function", "custom", "allowed_tools"):
        raise unsupported(f"has type '{kind[:40]}', but only 'function', 'custom' and 'allowed_tools' are offered")
    return choice


WireTool = Annotated[FunctionTool | CustomTool, Field(discriminator="type"), BeforeValidator(_offered_kind)]
WireTools = Annotated[list[WireTool], Field(max_length=MAX_TOOLS, fail_fast=True)]
WireToolChoice = Annotated[
    Literal["none", "auto", "required"]
    | Annotated[NamedFunction | NamedCustom | AllowedToolsChoice, Field(discriminator="type")],
    BeforeValidator(_known_choice),
]


def to_tools(given: Sequence[FunctionTool | CustomTool] | None) -> tuple[Tool, ...]:
    """Tools in no dialect. Raises InvalidRequest if two have the same name."""
    tools: dict[str, Tool] = {}
    for position, wire in enumerate(given or ()):
        tool = _tool(wire, param=f"tools.{position}.{wire.type}")
        if tool.name in tools:
            param = f"tools.{position}.{wire.type}.name"
            raise InvalidRequest(f"{param}: there is another tool named '{tool.name}'.", param=param)
        tools[tool.name] = tool
    return tuple(tools.values())


def _tool(wire: FunctionTool | CustomTool, *, param: str) -> Tool:
    if isinstance(wire, FunctionTool):
        function = wire.function
        return Tool(function.name, function.description, function.parameters, is_strict=bool(function.strict))
    custom = wire.custom
    grammar = custom.format.grammar if isinstance(custom.format, GrammarFormat) else None
    return freeform_tool(custom.name, custom.description, grammar, param=f"{param}.format.grammar.definition")


def to_choice(
    given: str | NamedFunction | NamedCustom | AllowedToolsChoice | None,
    tools: Sequence[Tool],
    *,
    param: str = "tool_choice",
) -> ToolChoice:
    """The choice in no dialect; absent it is `auto`. Raises InvalidRequest for tools that are not there."""
    named: list[NamedFunction | NamedCustom] = []
    match given:
        case None | "auto":
            return ToolChoice()
        case "none":
            return ToolChoice("none")
        case "required":
            choice = ToolChoice("required")
        case NamedFunction() | NamedCustom():
            named = [given]
            choice = ToolChoice("required", (_name(given),))
        case AllowedToolsChoice():
            named = given.allowed_tools.tools
            choice = ToolChoice(given.allowed_tools.mode, tuple(dict.fromkeys(map(_name, named))))
        case _:
            raise AssertionError(f"not a choice: {given}")
    if not tools:
        raise InvalidRequest(f"{param} asks for a tool, but there are no tools.", param=param)
    known = {(tool.name, tool.is_freeform) for tool in tools}
    unknown = next((one for one in named if (_name(one), one.type == "custom") not in known), None)
    if unknown is not None:
        kind = f"the {unknown.type} tool '{_name(unknown)}'"
        raise InvalidRequest(f"{param} names {kind}, which is not among the tools.", param=param)
    return choice


def _name(wire: NamedFunction | NamedCustom) -> str:
    return wire.function.name if isinstance(wire, NamedFunction) else wire.custom.name
