"""Content blocks of messages, as clients send them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from vllm_mlx.api.wire.anthropic.cache_control import Cacheable
from vllm_mlx.api.wire.anthropic.tool_changes import ToolAdditionBlock, ToolRemovalBlock
from vllm_mlx.api.wire.base import WireModel, unsupported

_IMAGES = "is an image, and this model takes text only; leave it out or describe it"


class TextBlock(Cacheable):
    """A piece of text."""

    type: Literal["text"]
    """`text`."""
    text: str
    """The text itself."""
    citations: list[Any] | None = None
    """Accepted, as it comes back in replayed answers; not shown to the model."""


class ThinkingBlock(WireModel):
    """What the model thought earlier."""

    type: Literal["thinking"]
    """`thinking`."""
    thinking: str
    """The reasoning; empty where the client asked not to see it, and then the signature has it."""
    signature: str | None = None
    """As it was given out; one of another server is accepted and means nothing here."""


class RedactedThinkingBlock(WireModel):
    """Reasoning that clients cannot read."""

    type: Literal["redacted_thinking"]
    """`redacted_thinking`."""
    data: str
    """As it was given out; that of another server is accepted and not shown to the model."""


class ToolUseBlock(Cacheable):
    """A call that the model made earlier."""

    type: Literal["tool_use"]
    """`tool_use`."""
    id: str
    """What the result refers to."""
    name: str
    """Name of the tool."""
    input: dict[str, Any]
    """Its arguments."""
    caller: dict[str, Any] | None = None
    """Accepted, as it comes back in replayed answers; calls are always the model's own."""


class SearchResultBlock(Cacheable):
    """A passage that the client found."""

    type: Literal["search_result"]
    """`search_result`."""
    source: str
    """Where it is from."""
    title: str
    """Its title."""
    content: list[TextBlock]
    """Its text."""
    citations: dict[str, Any] | None = None
    """Accepted; the model's answers carry no citations."""


class TextSource(WireModel):
    """A plain text."""

    type: Literal["text"]
    """`text`."""
    media_type: Literal["text/plain"]
    """`text/plain`."""
    data: str
    """The text."""


class ContentSource(WireModel):
    """Text in blocks."""

    type: Literal["content"]
    """`content`."""
    content: str | list[TextBlock]
    """Text, or a list of text blocks."""


class PdfSource(WireModel):
    """A PDF file, whose text is read."""

    type: Literal["base64"]
    """`base64`."""
    media_type: Literal["application/pdf"]
    """`application/pdf`."""
    data: str
    """The file."""


def _offered_source(source: Any) -> Any:
    kind = source.get("type") if isinstance(source, dict) else None
    if kind in ("url", "file"):
        raise unsupported(f"has type '{kind}', but this server fetches nothing; send the document itself")
    return source


class DocumentBlock(Cacheable):
    """A document that the model reads as text."""

    type: Literal["document"]
    """`document`."""
    source: Annotated[
        TextSource | ContentSource | PdfSource, Field(discriminator="type"), BeforeValidator(_offered_source)
    ]
    """Where its text is."""
    title: str | None = None
    """Shown before the text."""
    context: str | None = None
    """Shown before the text."""
    citations: dict[str, Any] | None = None
    """Accepted; the model's answers carry no citations."""


class ToolReferenceBlock(Cacheable):
    """A tool that a search of the client's found."""

    type: Literal["tool_reference"]
    """`tool_reference`."""
    tool_name: str
    """One of `tools`; the model reads its description and schema here."""


def _text_only(block: Any) -> Any:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "image":
        raise unsupported(_IMAGES)
    return block


_RESULTS = ("text", "document", "search_result", "tool_reference")


def _result_kind(block: Any) -> Any:
    kind = block.get("type") if isinstance(block, dict) else None
    if isinstance(kind, str) and kind not in (*_RESULTS, "image"):
        raise unsupported(f"has type '{kind[:60]}', but results are made of {', '.join(_RESULTS)}")
    return _text_only(block)


ResultPart = Annotated[
    TextBlock | DocumentBlock | SearchResultBlock | ToolReferenceBlock,
    Field(discriminator="type"),
    BeforeValidator(_result_kind),
]


class ToolResultBlock(Cacheable):
    """What a tool answered."""

    type: Literal["tool_result"]
    """`tool_result`."""
    tool_use_id: str
    """The call that this answers."""
    content: str | list[ResultPart] | None = None
    """Text, or a list of text, document, search_result and tool_reference blocks."""
    is_error: bool | None = None
    """Whether the call failed; the model is told."""
    toolset_name: None = None
    """Toolsets are not offered."""


_KINDS = (
    *("text", "thinking", "redacted_thinking", "tool_use", "tool_result", "document", "search_result"),
    *("tool_addition", "tool_removal"),
)


def _known_kind(block: Any) -> Any:
    kind = block.get("type") if isinstance(block, dict) else None
    if isinstance(kind, str) and kind not in (*_KINDS, "image"):
        raise unsupported(f"has type '{kind[:60]}', which only Anthropic's own servers run; leave it out")
    return _text_only(block)


Block = (
    TextBlock
    | ThinkingBlock
    | RedactedThinkingBlock
    | ToolUseBlock
    | ToolResultBlock
    | DocumentBlock
    | SearchResultBlock
    | ToolAdditionBlock
    | ToolRemovalBlock
)
WireBlock = Annotated[Block, Field(discriminator="type"), BeforeValidator(_known_kind)]


Effort = Literal["low", "medium", "high", "xhigh", "max"]


class TurnConfig(WireModel):
    """What answers are like from a turn on."""

    effort: Effort | None = None
    """Given to the chat template as `reasoning_effort`; that of the last turn that has one counts."""


class WireMessage(WireModel):
    """A turn of either side."""

    role: Literal["user", "assistant", "system"]
    """`user` or `assistant`; `system` for instructions that come in between."""
    content: str | Annotated[list[WireBlock], Field(fail_fast=True)] | None = None
    """Text, or a list of blocks; a turn of the system with an `output_config` needs none."""
    output_config: TurnConfig | None = None
    """Only of the system: what answers are like from here on."""
    clear_at: Literal["next_user_message", "never"] | None = None
    """Only of the system: `next_user_message` takes its text out once the user has a later turn."""


System = str | list[TextBlock]
