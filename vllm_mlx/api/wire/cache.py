"""Bodies and answers of /v1/cache and /v1/memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from pydantic import Field

from vllm_mlx.api.wire.answers import DifferenceAnswer
from vllm_mlx.api.wire.base import WireModel
from vllm_mlx.api.wire.messages import WireMessage, to_message
from vllm_mlx.core.chat import ChatRequest, Message
from vllm_mlx.core.errors import InvalidRequest
from vllm_mlx.core.sampling import SamplingParams

MAX_WARM_PROMPTS = 256

Conversation = Annotated[list[WireMessage], Field(min_length=1, fail_fast=True)]


class WarmBody(WireModel):
    """Conversations to compute and keep; each is the beginning of those that will be asked."""

    prompts: Annotated[list[Conversation], Field(min_length=1, max_length=MAX_WARM_PROMPTS, fail_fast=True)]
    """Lists of messages, such as only the system message."""
    model: str | None = None
    """Served name, model argument, or `default`; the served model if absent."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the chat template; the same as in the requests to come."""


def conversations(body: WarmBody) -> list[tuple[Message, ...]]:
    """The messages in no dialect. Raises InvalidRequest that names the entry."""
    return [_conversation(prompt, position=i) for i, prompt in enumerate(body.prompts)]


WARM_SAMPLING = SamplingParams(max_tokens=1, temperature=0.0)
"""One token is the least that can be asked for."""


def warm_request(
    messages: tuple[Message, ...], *, request_id: str, template_kwargs: Mapping[str, Any], tenant: bytes = b""
) -> ChatRequest:
    """A request that computes a conversation."""
    return ChatRequest(request_id, messages, WARM_SAMPLING, template_kwargs=dict(template_kwargs), tenant=tenant)


def _conversation(prompt: Conversation, *, position: int) -> tuple[Message, ...]:
    try:
        return tuple(to_message(wire, position=i) for i, wire in enumerate(prompt))
    except InvalidRequest as error:
        param = f"prompts.{position}.{(error.param or '').removeprefix('messages.')}"
        raise InvalidRequest(error.message.replace(error.param or "", param), param=param) from error


class WarmedPrompt(msgspec.Struct, frozen=True):
    """One prompt that is kept now."""

    prompt_tokens: int
    cached_tokens: int
    """Of them, those that were remembered already."""


class WarmAnswer(msgspec.Struct, frozen=True):
    """Answer of POST /v1/cache/warm, in the order of the prompts."""

    prompts: list[WarmedPrompt]


class ClearedAnswer(msgspec.Struct, frozen=True):
    """Answer of DELETE /v1/cache: what was freed."""

    pages: int
    checkpoints: int
    stored: int
    """Files on disk."""


class ExplainAnswer(msgspec.Struct, frozen=True):
    """Answer of POST /v1/cache/explain; nothing was computed."""

    prompt_tokens: int
    found_tokens: int
    """Length of the longest remembered beginning; the rest would be computed."""
    found_in_memory: int
    found_on_disk: int
    page_size: int
    """Beginnings are found in pages of so many tokens."""
    reason: str
    """Why no more was found; the words are those of `cache_report`."""
    message: str
    """The same for a person."""
    seen_tokens: int
    """With how many of its tokens an earlier prompt began too, if any is still known."""
    difference: DifferenceAnswer | None
    """Where it parts from the most similar earlier prompt of the same tenant."""
    tenant: str | None
    """Beginning of the hash of the request's tenant."""


class PagesAnswer(msgspec.Struct, frozen=True):
    """Pages of the KV cache."""

    total: int
    used: int
    free: int
    """Those that can be handed out, the kept ones included."""
    kept: int
    """Of remembered prefixes that nobody uses."""
    pinned: int
    evicted: int
    """Given to others."""
    tokens_per_page: int
    bytes_per_page: int


class DiskAnswer(msgspec.Struct, frozen=True):
    """The cache on disk, as far as this model may use it."""

    blobs: int
    """Pages and checkpoints on disk."""
    bytes: int
    """Of their files."""
    queued_bytes: int
    """Memory of what waits to be written."""
    ahead_bytes: int
    """Memory of what was read and not taken yet."""
    saved: int
    """Blobs written."""
    bytes_written: int
    hits: int
    """Blobs loaded."""
    bytes_read: int
    misses: int
    """Blobs that were asked for and could not be loaded."""
    corrupt: int
    """Files that were not what had been written; they were deleted, never used."""
    evicted: int
    """Files deleted to make room."""
    refused: dict[str, int]
    """Blobs that were not written, by reason; `known` ones are there already."""
    problem: str | None
    """Why the last write failed; None if it did not."""


class CacheStatsAnswer(msgspec.Struct, frozen=True):
    """Answer of GET /v1/cache/stats. Counts are since the server started, over all its engines."""

    pages: PagesAnswer
    checkpoints: int
    """Remembered states of layers that cannot be cut."""
    checkpoint_bytes: int
    prompt_tokens: int
    """Of finished requests."""
    cached_tokens: int
    """Of them, those that did not have to be computed."""
    token_hit_rate: float
    requests: int
    """Finished choices that read a prompt of their own."""
    requests_with_hit: int
    request_hit_rate: float
    requests_loading: int
    """Waiting now while their beginning is read from the disk."""
    disk: DiskAnswer | None
    """None without --ssd-cache-dir."""


class LedgerAnswer(msgspec.Struct, frozen=True):
    """Bytes by what they are for. All but `staging` and `allocator_cache` add up to `active_bytes`, or more while a
    report is stale."""

    weights: int
    pages_used: int
    pages_kept: int
    """Of remembered prefixes that nobody uses."""
    pages_free: int
    """Taken, and empty: a GPU's pages are taken when the server starts, a CPU's when they are first needed."""
    checkpoints: int
    rows: int
    """Caches and states of running sequences that are not in pages."""
    vision: int
    """Encoded images; 0, as this server takes text only."""
    staging: int
    """On their way to or from the disk: plain memory of the engine's process. What leaves is the device's memory until
    it is copied, a moment later."""
    other: int
    """Activations and temporary arrays of the step being computed."""
    allocator_cache: int
    """Freed by us, kept by the allocator for the next step."""


class BoundsAnswer(msgspec.Struct, frozen=True):
    """What keeps memory in bounds."""

    gpu_memory_utilization: float
    cache_memory_mb: int | None
    cache_memory_percent: float
    """Not in force beside `cache_memory_mb`."""
    page_bytes: int
    """Of all pages together: sequences are admitted only if their pages are free."""


class MemoryAnswer(msgspec.Struct, frozen=True):
    """Answer of GET /v1/memory."""

    ledger: LedgerAnswer
    active_bytes: int
    peak_bytes: int
    bounds: BoundsAnswer
