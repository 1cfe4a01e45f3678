"""Token counts as Anthropic divides them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from vllm_mlx.api.wire.anthropic.answers import (
    CacheCreation,
    CacheMiss,
    DiagnosticsAnswer,
    MessageUsage,
    ThinkingTokens,
)
from vllm_mlx.chat.explain import CacheReason, Explanation
from vllm_mlx.core.events import Usage

HOUR_S = 3600


class Kept(NamedTuple):
    """A beginning of the prompt that is kept."""

    num_tokens: int
    keep_s: int


def usage_answer(usage: Usage, kept: Iterable[Kept]) -> MessageUsage:
    """What was found was read; what was not, up to the last mark, was newly kept; the rest is neither."""
    found = usage.cached_tokens
    hour = max((mark.num_tokens for mark in kept if mark.keep_s >= HOUR_S), default=0)
    last = max((mark.num_tokens for mark in kept), default=0)
    for_hour, created = max(0, hour - found), max(0, last - found)
    thought = usage.reasoning_tokens
    return MessageUsage(
        input_tokens=usage.prompt_tokens - found - created,
        cache_creation_input_tokens=created,
        cache_read_input_tokens=found,
        cache_creation=CacheCreation(created - for_hour, for_hour),
        output_tokens=usage.completion_tokens,
        output_tokens_details=ThinkingTokens(thought) if thought else msgspec.UNSET,
    )


_MISSES = {
    CacheReason.DIFFERENT_TOOLS: "tools_changed",
    CacheReason.DIFFERENT_SYSTEM: "system_changed",
    CacheReason.DIFFERENT_MESSAGES: "messages_changed",
    CacheReason.VOLATILE_FIELD: "messages_changed",
    CacheReason.NEVER_SEEN: "previous_message_not_found",
}


def diagnostics_answer(explanations: Sequence[Explanation]) -> DiagnosticsAnswer | msgspec.UnsetType:
    """Why no more of the prompt was found, if the request asked."""
    if not explanations:
        return msgspec.UNSET
    [one] = explanations
    if one.reason in (CacheReason.HIT, CacheReason.TOO_SHORT):
        return DiagnosticsAnswer(None)
    kind = _MISSES.get(one.reason, "unavailable")
    if not kind.endswith("_changed"):
        return DiagnosticsAnswer(CacheMiss(kind))
    return DiagnosticsAnswer(CacheMiss(kind, one.num_tokens - one.num_found))
