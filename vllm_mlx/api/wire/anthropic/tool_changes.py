"""Tools that come and go in the middle of a conversation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from vllm_mlx.api.wire.anthropic.cache_control import Cacheable
from vllm_mlx.api.wire.anthropic.tools import WireTool
from vllm_mlx.api.wire.base import WireModel, unsupported


class NamedTool(WireModel):
    """A tool by its name."""

    type: Literal["tool_reference"]
    """`tool_reference`."""
    name: str
    """One of `tools`, or of those that earlier turns define."""


class DefinedTool(WireModel):
    """A tool that `tools` need not have."""

    type: Literal["tool_definition"]
    """`tool_definition`."""
    definition: WireTool
    """What `tools` would have."""


def _own_tool(tool: Any) -> Any:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if isinstance(kind, str) and kind.startswith("mcp_"):
        raise unsupported(f"has type '{kind[:60]}', but this server calls no MCP servers; send their tools")
    return tool


class ToolAdditionBlock(Cacheable):
    """From here on the model may call a tool."""

    type: Literal["tool_addition"]
    """`tool_addition`."""
    tool: Annotated[NamedTool | DefinedTool, Field(discriminator="type"), BeforeValidator(_own_tool)]
    """Which; the model reads its description and schema here."""


class ToolRemovalBlock(Cacheable):
    """From here on the model should not call a tool."""

    type: Literal["tool_removal"]
    """`tool_removal`."""
    tool: Annotated[NamedTool, BeforeValidator(_own_tool)]
    """Which; the model is told here."""
