"""Tools of a chat request, and the choice between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from vllm_mlx.api.wire.base import WireModel, unsupported
from vllm_mlx.core.chat import Tool, ToolChoice
from vllm_mlx.core.errors import InvalidRequest

MAX_TOOLS = 1024
NAME_PATTERN = r"^[A-Za-z0-9_.:/-]{1,128}$"
"""OpenAI allows letters, digits, `_` and `-`, up to 64; names of MCP servers' tools are longer and have dots."""


def _function_only(tool: Any) -> Any:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if isinstance(kind, str) and kind != "function":
        raise unsupported(f"has type '{kind[:40]}', but only 'function' is offered here; /v1/responses has others")
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
    """A tool that the model may call."""

    type: Literal["function"]
    """Only `function`."""
    function: FunctionDefinition
    """The function."""


class NamedFunction(WireModel):
    """A function by its name."""

    name: str
    """One of `tools`."""


class NamedTool(WireModel):
    """A tool by its name."""

    type: Literal["function"]
    """Only `function`."""
    function: NamedFunction
    """The function."""


class AllowedTools(WireModel):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    """Whether the model must call one of them."""
    tools: Annotated[list[Annotated[NamedTool, BeforeValidator(_function_only)]], Field(min_length=1)]
    """Those that may be called."""


class AllowedToolsChoice(WireModel):
    """Only some of the tools may be called."""

    type: Literal["allowed_tools"]
    """`allowed_tools`."""
    allowed_tools: AllowedTools
    """Which, and whether one must be."""


def _known_choice(choice: Any) -> Any:
    kind = choice.get("type") if isinstance(choice, dict) else None
    if isinstance(kind, str) and kind not in ("function", "allowed_tools"):
        raise unsupported(f"has type '{kind[:40]}', but only 'function' and 'allowed_tools' are offered")
    return choice


WireTools = Annotated[
    list[Annotated[FunctionTool, BeforeValidator(_function_only)]], Field(max_length=MAX_TOOLS, fail_fast=True)
]
WireToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice, BeforeValidator(_known_choice)
]


def to_tools(given: Sequence[FunctionTool] | None) -> tuple[Tool, ...]:
    """Tools in no dialect. Raises InvalidRequest if two have the same name."""
    tools: dict[str, Tool] = {}
    for position, wire in enumerate(given or ()):
        function = wire.function
        if function.name in tools:
            param = f"tools.{position}.function.name"
            raise InvalidRequest(f"{param}: there is another tool named '{function.name}'.", param=param)
        tools[function.name] = Tool(
            function.name, function.description, function.parameters, is_strict=bool(function.strict)
        )
    return tuple(tools.values())


def to_choice(
    given: str | NamedTool | AllowedToolsChoice | None, tools: Sequence[Tool], *, param: str = "tool_choice"
) -> ToolChoice:
    """The choice in no dialect; absent it is `auto`. Raises InvalidRequest for tools that are not there."""
    match given:
        case None | "auto":
            return ToolChoice()
        case "none":
            return ToolChoice("none")
        case "required":
            choice = ToolChoice("required")
        case NamedTool():
            choice = ToolChoice("required", (given.function.name,))
        case AllowedToolsChoice():
            allowed = given.allowed_tools
            choice = ToolChoice(allowed.mode, tuple(dict.fromkeys(tool.function.name for tool in allowed.tools)))
        case _:
            raise AssertionError(f"not a choice: {given}")
    if not tools:
        raise InvalidRequest(f"{param} asks for a tool, but there are no tools.", param=param)
    known = {tool.name for tool in tools}
    unknown = next((name for name in choice.names if name not in known), None)
    if unknown is not None:
        raise InvalidRequest(f"{param} names '{unknown}', which is not among the tools.", param=param)
    return choice
