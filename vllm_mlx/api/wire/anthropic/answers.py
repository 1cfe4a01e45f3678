"""What the Messages API answers, and the events of its stream. Encoded by msgspec."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType


class TextAnswer(msgspec.Struct, frozen=True, tag="text"):
    """What the model says. Without citations there is no such field: clients refuse one that is null."""

    text: str


class ThinkingAnswer(msgspec.Struct, frozen=True, tag="thinking"):
    """What the model thinks; `signature` is opaque and comes back with it."""

    thinking: str
    signature: str


class ToolUseAnswer(msgspec.Struct, frozen=True, tag="tool_use"):
    """A call that the model makes."""

    id: str
    name: str
    input: dict[str, Any]


BlockAnswer = TextAnswer | ThinkingAnswer | ToolUseAnswer


class CacheCreation(msgspec.Struct, frozen=True):
    """Prompt tokens that were newly kept up to a mark, by how long they are kept."""

    ephemeral_5m_input_tokens: int = 0
    ephemeral_1h_input_tokens: int = 0


class ThinkingTokens(msgspec.Struct, frozen=True):
    """What the generated tokens were."""

    thinking_tokens: int


class MessageUsage(msgspec.Struct, frozen=True):
    """Token counts. `input_tokens` are those of the prompt that were neither found nor newly kept up to a mark."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    cache_creation: CacheCreation
    output_tokens: int
    output_tokens_details: ThinkingTokens | UnsetType = UNSET
    service_tier: str = "standard"


class CacheMiss(msgspec.Struct, frozen=True, omit_defaults=True):
    """What kept a prompt from being found."""

    type: str
    cache_missed_input_tokens: int | UnsetType = UNSET


class DiagnosticsAnswer(msgspec.Struct, frozen=True):
    """Why no more of the prompt was found; null if nothing was missed."""

    cache_miss_reason: CacheMiss | None = None


class AppliedEdit(msgspec.Struct, frozen=True, omit_defaults=True):
    """An edit of the history that took something out."""

    type: str
    cleared_input_tokens: int
    cleared_tool_uses: int | UnsetType = UNSET
    cleared_thinking_turns: int | UnsetType = UNSET


class EditsAnswer(msgspec.Struct, frozen=True):
    """What was taken out of the history."""

    applied_edits: list[AppliedEdit]


class MessageAnswer(msgspec.Struct, frozen=True, tag="message"):
    """A whole answer, or one before anything of it is written."""

    id: str
    model: str
    content: list[BlockAnswer]
    usage: MessageUsage
    stop_reason: str | None = None
    """'end_turn', 'max_tokens', 'stop_sequence', 'tool_use' or 'model_context_window_exceeded'."""
    stop_sequence: str | None = None
    role: str = "assistant"
    context_management: EditsAnswer | UnsetType = UNSET
    diagnostics: DiagnosticsAnswer | UnsetType = UNSET


class TokenCount(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tokens of a prompt."""

    input_tokens: int
    context_management: OriginalCount | UnsetType = UNSET


class OriginalCount(msgspec.Struct, frozen=True):
    """Tokens of the prompt as it was before the edits."""

    original_input_tokens: int


class ErrorDetail(msgspec.Struct, frozen=True, omit_defaults=True):
    """What went wrong."""

    type: str
    message: str
    details: dict[str, Any] | UnsetType = UNSET
    """For clients that can do without what was refused."""


class ErrorAnswer(msgspec.Struct, frozen=True, tag="error"):
    """Body of every error of this dialect, and the event that ends a stream that failed."""

    error: ErrorDetail
    request_id: str


# ---- events; the name of each is its type ----


class MessageStart(msgspec.Struct, frozen=True, tag="message_start"):
    """The first event."""

    message: MessageAnswer


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """A sign of life."""


class BlockStart(msgspec.Struct, frozen=True, tag="content_block_start"):
    """A block begins, empty."""

    index: int
    content_block: BlockAnswer


class TextDelta(msgspec.Struct, frozen=True, tag="text_delta"):
    """More text."""

    text: str


class ThinkingDelta(msgspec.Struct, frozen=True, tag="thinking_delta"):
    """More reasoning."""

    thinking: str


class SignatureDelta(msgspec.Struct, frozen=True, tag="signature_delta"):
    """The signature of a block of reasoning, before its end."""

    signature: str


class InputJsonDelta(msgspec.Struct, frozen=True, tag="input_json_delta"):
    """More of the JSON text of a call's input."""

    partial_json: str


AnyDelta = TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta


class BlockDelta(msgspec.Struct, frozen=True, tag="content_block_delta"):
    """More of the block that is open."""

    index: int
    delta: AnyDelta


class BlockStop(msgspec.Struct, frozen=True, tag="content_block_stop"):
    """The block is whole."""

    index: int


class StopDelta(msgspec.Struct, frozen=True):
    """How the message ended."""

    stop_reason: str | None
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, frozen=True, tag="message_delta"):
    """The end of the message, with all counts."""

    delta: StopDelta
    usage: MessageUsage
    context_management: EditsAnswer | UnsetType = UNSET
    diagnostics: DiagnosticsAnswer | UnsetType = UNSET


class MessageStop(msgspec.Struct, frozen=True, tag="message_stop"):
    """The last event."""


StreamEvent = MessageStart | Ping | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | ErrorAnswer


def framed(event: StreamEvent) -> bytes:
    """An event as a server-sent event under its own name."""
    name = event.__struct_config__.tag
    return b"event: %s\ndata: %s\n\n" % (str(name).encode(), msgspec.json.encode(event))
