"""Which tools a conversation offers, and which of them the model has been shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from vllm_mlx.api.wire.anthropic.blocks import Block, ResultPart, ToolReferenceBlock, ToolResultBlock, WireMessage
from vllm_mlx.api.wire.anthropic.tool_changes import DefinedTool, ToolAdditionBlock, ToolRemovalBlock
from vllm_mlx.api.wire.anthropic.tools import AnyTool, to_tool, to_tools
from vllm_mlx.core.chat import Tool
from vllm_mlx.core.errors import InvalidRequest

Change = ToolReferenceBlock | ToolAdditionBlock | ToolRemovalBlock


class Offer(NamedTuple):
    """The tools of a request."""

    tools: dict[str, Tool]
    """All that a call may be of, by name; of tools with the same name, the last."""
    seen: frozenset[str]
    """Those that the model was shown and that were not taken away since."""


def offer_of(given: Sequence[AnyTool] | None, turns: Sequence[WireMessage]) -> Offer:
    """What is in `tools`, as the turns change it.

    Raises InvalidRequest for a name that no tool has, and as `to_tools` does.
    """
    tools = {tool.name: tool for tool in to_tools(given)}
    seen = {name for name, tool in tools.items() if tool.is_listed}
    for path, change in _changes(turns):
        name, param = _name(change, path)
        if isinstance(change, ToolAdditionBlock) and isinstance(change.tool, DefinedTool):
            is_listed = name in tools and tools[name].is_listed
            tools[name] = msgspec.structs.replace(to_tool(change.tool.definition), is_listed=is_listed)
        if name not in tools:
            message = f"{param} is '{name}', which is not among the tools; send it there, or leave the block out."
            raise InvalidRequest(message, param=param)
        seen = seen - {name} if isinstance(change, ToolRemovalBlock) else seen | {name}
    return Offer(tools, frozenset(seen))


def result_parts(block: Block) -> Sequence[ResultPart]:
    """What a result is made of; nothing for other blocks, and for a result that is a text."""
    if not isinstance(block, ToolResultBlock) or isinstance(block.content, str):
        return ()
    return block.content or ()


def placed_blocks(turns: Iterable[WireMessage]) -> Iterator[tuple[str, Block]]:
    """All blocks with their place in the body."""
    for number, turn in enumerate(turns):
        blocks = () if turn.content is None or isinstance(turn.content, str) else turn.content
        for position, block in enumerate(blocks):
            yield f"messages.{number}.content.{position}", block


def _changes(turns: Iterable[WireMessage]) -> Iterator[tuple[str, Change]]:
    for path, block in placed_blocks(turns):
        if isinstance(block, ToolAdditionBlock | ToolRemovalBlock):
            yield path, block
        for position, part in enumerate(result_parts(block)):
            if isinstance(part, ToolReferenceBlock):
                yield f"{path}.content.{position}", part


def _name(change: Change, path: str) -> tuple[str, str]:
    """The name of the tool, and where it stands."""
    if isinstance(change, ToolReferenceBlock):
        return change.tool_name, f"{path}.tool_name"
    if isinstance(change.tool, DefinedTool):
        return change.tool.definition.name, f"{path}.tool.definition.name"
    return change.tool.name, f"{path}.tool.name"
