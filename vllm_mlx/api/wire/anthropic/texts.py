"""What the model reads of blocks that are no plain text: documents, search results, and tools that come and go."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Protocol

from vllm_mlx.api.wire.anthropic.blocks import (
    Block,
    DocumentBlock,
    PdfSource,
    ResultPart,
    SearchResultBlock,
    TextBlock,
    TextSource,
    ToolReferenceBlock,
)
from vllm_mlx.api.wire.anthropic.tool_changes import DefinedTool, ToolAdditionBlock, ToolRemovalBlock
from vllm_mlx.api.wire.anthropic.tools import to_tool
from vllm_mlx.chat.plain_tools import loaded_tools_text, removed_tools_text
from vllm_mlx.core.chat import Tool
from vllm_mlx.core.errors import InvalidRequest


class ReadPdf(Protocol):
    """Makes text of a PDF file."""

    def __call__(self, data: bytes, *, param: str) -> str:
        """See `pdf_text`."""
        ...


class Texts:
    """Writes blocks as texts. Raises InvalidRequest for files that cannot be read."""

    def __init__(self, tools: Mapping[str, Tool], *, read_pdf: ReadPdf) -> None:
        """`tools` are all that the blocks refer to."""
        self._tools = tools
        self._read_pdf = read_pdf

    def spoken(self, role: str, blocks: Sequence[Block], *, path: str) -> Iterator[tuple[str, Block]]:
        """Blocks and their places; changes of tools that follow each other are one text."""
        placed = [(f"{path}.{position}", block) for position, block in enumerate(blocks)]
        for kind, group in groupby(placed, key=lambda pair: type(pair[1])):
            run = list(group)
            changes = [block for _, block in run if isinstance(block, ToolAdditionBlock | ToolRemovalBlock)]
            if not changes or role != "system":
                yield from run
                continue
            is_removal = kind is ToolRemovalBlock
            tools = [self._changed(change) for change in changes]
            text = removed_tools_text(tools) if is_removal else loaded_tools_text(tools)
            control = next((change.cache_control for change in changes if change.cache_control), None)
            yield run[0][0], TextBlock(type="text", text=text, cache_control=control)

    def _changed(self, change: ToolAdditionBlock | ToolRemovalBlock) -> Tool:
        if isinstance(change.tool, DefinedTool):
            return to_tool(change.tool.definition)
        return self._tools[change.tool.name]

    def result(self, parts: Sequence[ResultPart], *, path: str) -> Iterator[str]:
        """What the model reads of a result: tools that are referred to in a row are one text."""
        placed = [(f"{path}.{position}", part) for position, part in enumerate(parts)]
        for refers, group in groupby(placed, key=lambda pair: isinstance(pair[1], ToolReferenceBlock)):
            if refers:
                found = [part for _, part in group if isinstance(part, ToolReferenceBlock)]
                yield loaded_tools_text([self._tools[part.tool_name] for part in found])
            else:
                yield from (self.plain(part, path=where) for where, part in group)

    def plain(self, block: ResultPart, *, path: str) -> str:
        """What the model reads of a block; `path` is its place in the body."""
        match block:
            case TextBlock():
                return block.text
            case SearchResultBlock():
                return _titled(block.title, f"Source: {block.source}", _joined(block.content))
            case DocumentBlock():
                return _titled(block.title, block.context, self._document(block, path=f"{path}.source"))
            case ToolReferenceBlock():
                return loaded_tools_text([self._tools[block.tool_name]])

    def _document(self, block: DocumentBlock, *, path: str) -> str:
        match block.source:
            case TextSource(data=text):
                return text
            case PdfSource(data=data):
                return self._read_pdf(_decoded(data, param=f"{path}.data"), param=path)
            case source:
                return _joined(source.content)


def _decoded(data: str, *, param: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise InvalidRequest(f"{param} is not base64.", param=param) from error


def _joined(content: str | Iterable[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _titled(*parts: str | None) -> str:
    """A document's parts, marked off from what is around it."""
    shown = "\n".join(part for part in parts if part)
    return f"<document>\n{shown}\n</document>"
