"""Tools of a Messages request, and the choice between them."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from vllm_mlx.api.wire.anthropic.cache_control import CacheControl
from vllm_mlx.api.wire.base import WireModel, unsupported
from vllm_mlx.api.wire.tools import MAX_TOOLS, NAME_PATTERN
from vllm_mlx.core.chat import Tool, ToolChoice
from vllm_mlx.core.errors import InvalidRequest


class _Tool(WireModel):
    """What all tools have."""

    cache_control: CacheControl | None = None
    """Ends a beginning of the prompt that later requests share; it counts at the end of the system text."""
    allowed_callers: list[Literal["direct"]] | None = None
    """Only `["direct"]`: nobody but the model calls tools."""
    defer_loading: bool | None = None
    """True: the prompt does not list it; a `tool_reference` in a result shows it there."""
    strict: bool | None = None
    """Whether arguments must match the schema."""
    input_examples: list[dict[str, Any]] | None = None
    """Shown to the model behind the description."""
    eager_input_streaming: bool | None = None
    """Accepted; arguments are always streamed as they are written."""


class CustomTool(_Tool):
    """A tool of the client."""

    type: Literal["custom"] | None = None
    """`custom`, or absent."""
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    """Letters, digits and `_.:/-`, at most 128."""
    description: str | None = None
    """What it does, for the model."""
    input_schema: dict[str, Any]
    """JSON schema of its arguments, an object."""


class BashTool(_Tool):
    """Anthropic's shell, which the client runs; the model sees it as a function."""

    type: Literal["bash_20241022", "bash_20250124"]
    """Its version."""
    name: Literal["bash"]
    """`bash`."""


class TextEditorTool(_Tool):
    """Anthropic's editor, which the client runs; the model sees it as a function."""

    type: Literal["text_editor_20241022", "text_editor_20250124", "text_editor_20250429", "text_editor_20250728"]
    """Its version."""
    name: Literal["str_replace_editor", "str_replace_based_edit_tool"]
    """Its name in that version."""
    max_characters: Annotated[int, Field(ge=1)] | None = None
    """Accepted; the client is who shortens what it shows."""


AnyTool = CustomTool | BashTool | TextEditorTool


def _kind_of_tool(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    if not isinstance(kind, str) or kind == "custom":
        return "custom"
    return "bash" if kind.startswith("bash_") else "editor"


def _offered_tool(tool: Any) -> Any:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if isinstance(kind, str) and kind.startswith("tool_search_tool_"):
        raise unsupported(
            f"has type '{kind[:60]}', but this server searches no tools; send a search tool with an input_schema, and "
            "answer its calls with tool_reference blocks"
        )
    if isinstance(kind, str) and kind != "custom" and not kind.startswith(("bash_", "text_editor_")):
        raise unsupported(
            f"has type '{kind[:60]}', which this server does not run; leave it out, or send a tool with an input_schema"
        )
    return tool


WireTool = Annotated[
    Annotated[CustomTool, Tag("custom")] | Annotated[BashTool, Tag("bash")] | Annotated[TextEditorTool, Tag("editor")],
    Discriminator(_kind_of_tool),
    BeforeValidator(_offered_tool),
]
WireTools = Annotated[list[WireTool], Field(max_length=MAX_TOOLS, fail_fast=True)]


class _Choice(WireModel):
    disable_parallel_tool_use: bool | None = None
    """True: the answer ends after its first call."""


class AutoChoice(_Choice):
    """The model decides."""

    type: Literal["auto"]
    """`auto`."""


class AnyChoice(_Choice):
    """Some tool must be called."""

    type: Literal["any"]
    """`any`."""


class NamedChoice(_Choice):
    """One tool must be called."""

    type: Literal["tool"]
    """`tool`."""
    name: str
    """One of `tools`."""


class NoChoice(WireModel):
    """No tool is called; the model is not told of them."""

    type: Literal["none"]
    """`none`."""


WireToolChoice = Annotated[AutoChoice | AnyChoice | NamedChoice | NoChoice, Field(discriminator="type")]

_PATH = MappingProxyType({"type": "string", "description": "Absolute path of a file or folder."})
_EDITS = ("view", "create", "str_replace", "insert")
BASH = Tool(
    "bash",
    "Run a command in a shell that keeps its state between calls.",
    {
        "type": "object",
        "properties": {
            "command": {"type": "string", "description": "The command to run."},
            "restart": {"type": "boolean", "description": "True starts the shell anew, without a command."},
        },
    },
)


def to_tools(given: Sequence[AnyTool] | None) -> tuple[Tool, ...]:
    """Tools in no dialect. Raises InvalidRequest if two have the same name, or all are deferred."""
    tools: dict[str, Tool] = {}
    for position, wire in enumerate(given or ()):
        if wire.name in tools:
            param = f"tools.{position}.name"
            raise InvalidRequest(f"{param}: there is another tool named '{wire.name}'; names are unique.", param=param)
        tools[wire.name] = to_tool(wire)
    if tools and not any(tool.is_listed for tool in tools.values()):
        message = "tools: all of them have defer_loading, and the model would know none; leave it out of at least one."
        raise InvalidRequest(message, param="tools")
    return tuple(tools.values())


def to_choice(
    given: AutoChoice | AnyChoice | NamedChoice | NoChoice | None, tools: Sequence[Tool], *, seen: Collection[str]
) -> tuple[ToolChoice, bool]:
    """The choice in no dialect, and whether one answer may have several calls.

    `seen` are the names of those that the model has been shown: it is not made to call another.
    Raises InvalidRequest for tools that are not there.
    """
    if given is None or isinstance(given, NoChoice):
        return ToolChoice("none" if given else "auto"), True
    is_parallel = not given.disable_parallel_tool_use
    if isinstance(given, AutoChoice):
        return ToolChoice(), is_parallel
    if not tools or (not seen and isinstance(given, AnyChoice)):
        raise InvalidRequest("tool_choice asks for a tool, but there are no tools.", param="tool_choice")
    if isinstance(given, AnyChoice):
        names = tuple(tool.name for tool in tools if tool.name in seen)
        return ToolChoice("required", () if len(names) == len(tools) else names), is_parallel
    if given.name not in seen:
        known = any(tool.name == given.name for tool in tools)
        why = "is deferred and named by no tool_reference, or removed" if known else "is not among the tools"
        raise InvalidRequest(f"tool_choice.name is '{given.name}', which {why}.", param="tool_choice.name")
    return ToolChoice("required", (given.name,)), is_parallel


def to_tool(wire: AnyTool) -> Tool:
    """One tool in no dialect."""
    if isinstance(wire, CustomTool):
        description, parameters = wire.description, wire.input_schema
    elif isinstance(wire, BashTool):
        description, parameters = BASH.description, BASH.parameters or {}
    else:
        description, parameters = _editor(wire)
    if wire.input_examples:
        shown = "\n".join(json.dumps(example, ensure_ascii=False) for example in wire.input_examples)
        description = f"{description or ''}\n\nExamples of its input:\n{shown}".strip()
    return Tool(wire.name, description, parameters, is_strict=bool(wire.strict), is_listed=not wire.defer_loading)


def _editor(wire: TextEditorTool) -> tuple[str, dict[str, Any]]:
    """The editor of that version: earlier ones can take back an edit."""
    undoes = wire.name == "str_replace_editor"
    commands = [*_EDITS, "undo_edit"] if undoes else list(_EDITS)
    text = {"type": "string"}
    properties = {
        "command": {"type": "string", "enum": commands},
        "path": dict(_PATH),
        "file_text": {**text, "description": "With create: the text of the new file."},
        "old_str": {**text, "description": "With str_replace: the text to be replaced; it must occur once."},
        "new_str": {**text, "description": "With str_replace: what takes its place."},
        "insert_line": {"type": "integer", "description": "With insert: the line behind which to insert; 0: first."},
        "insert_text": {**text, "description": "With insert: the text to insert."},
        "view_range": {
            "type": "array",
            "items": {"type": "integer"},
            "description": "With view: first and last line; -1 is the end.",
        },
    }
    if undoes:  # where the text to insert is new_str too
        del properties["insert_text"]
    schema = {"type": "object", "properties": properties, "required": ["command", "path"]}
    return "View, create and edit files.", schema
