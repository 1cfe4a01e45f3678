"""What the Responses API answers. Encoded by msgspec."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from vllm_mlx.api.wire.answers import CacheAnswer, TokenLogprobAnswer


class OutputText(msgspec.Struct, frozen=True, tag_field="type", tag="output_text"):
    """Text of a message."""

    text: str
    annotations: list[Any] = []
    logprobs: list[TokenLogprobAnswer] = []


class ReasoningText(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning_text"):
    """Text of a reasoning item."""

    text: str


class SummaryText(msgspec.Struct, frozen=True, tag_field="type", tag="summary_text"):
    """Text of a reasoning item whose client asked for summaries."""

    text: str


class MessageItem(msgspec.Struct, frozen=True, tag_field="type", tag="message"):
    """What the model said."""

    id: str
    status: str
    content: list[OutputText]
    role: str = "assistant"


class ReasoningItem(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning"):
    """What the model thought."""

    id: str
    status: str
    summary: list[SummaryText]
    content: list[ReasoningText] = []
    encrypted_content: str | None = None


class FunctionCallItem(msgspec.Struct, frozen=True, tag_field="type", tag="function_call"):
    """A call of a function."""

    id: str
    status: str
    call_id: str
    name: str
    arguments: str
    namespace: str | UnsetType = UNSET


class CustomToolCallItem(msgspec.Struct, frozen=True, tag_field="type", tag="custom_tool_call"):
    """A call of a freeform tool."""

    id: str
    status: str
    call_id: str
    name: str
    input: str
    namespace: str | UnsetType = UNSET


OutputItem = MessageItem | ReasoningItem | FunctionCallItem | CustomToolCallItem


class InputTokensDetails(msgspec.Struct, frozen=True):
    """Where the prompt's tokens came from."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, frozen=True):
    """What the generated tokens were."""

    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, frozen=True):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(msgspec.Struct, frozen=True):
    """Why a response failed."""

    code: str
    message: str
    param: str | None = None
    type: str | None = None


class IncompleteDetails(msgspec.Struct, frozen=True):
    """Why a response is not whole."""

    reason: str


class ConversationRef(msgspec.Struct, frozen=True):
    """The conversation that a response belongs to."""

    id: str


class ResponseAnswer(msgspec.Struct, frozen=True, kw_only=True, tag_field="object", tag="response"):
    """A response, whole or on its way; `status` tells which."""

    id: str
    created_at: int
    """Unix seconds; so is `completed_at`."""
    status: str
    background: bool = False
    completed_at: int | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    model: str
    output: list[OutputItem] = []
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    conversation: ConversationRef | None = None
    prompt_cache_key: str | None = None
    reasoning: dict[str, Any]
    safety_identifier: str | None = None
    service_tier: str = "default"
    store: bool = True
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[Any]
    top_logprobs: int = 0
    top_p: float
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None
    metadata: dict[str, str] = {}
    cache: CacheAnswer | UnsetType = UNSET


class DeletedResponse(msgspec.Struct, frozen=True, tag_field="object", tag="response"):
    """Answer of DELETE /v1/responses/{id}."""

    id: str
    deleted: bool = True


class ItemList(msgspec.Struct, frozen=True, tag_field="object", tag="list"):
    """A page of items."""

    data: list[Any]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputTokensAnswer(msgspec.Struct, frozen=True, tag_field="object", tag="response.input_tokens"):
    """Answer of POST /v1/responses/input_tokens."""

    input_tokens: int


class ConversationAnswer(msgspec.Struct, frozen=True, tag_field="object", tag="conversation"):
    """A stored conversation."""

    id: str
    created_at: int
    metadata: dict[str, str] = {}


class DeletedConversation(msgspec.Struct, frozen=True, tag_field="object", tag="conversation.deleted"):
    """Answer of DELETE /v1/conversations/{id}."""

    id: str
    deleted: bool = True
