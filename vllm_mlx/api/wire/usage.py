"""What every answer of the OpenAI dialect begins and ends with."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

import msgspec

from vllm_mlx import __version__
from vllm_mlx.api.wire.answers import (
    CacheAnswer,
    CompletionTokensDetails,
    DifferenceAnswer,
    PromptTokensDetails,
    UsageAnswer,
)
from vllm_mlx.chat.explain import CacheReason, Difference, Explanation
from vllm_mlx.core.events import Usage


class AnswerHead(msgspec.Struct, frozen=True):
    """The same in every chunk of an answer."""

    id: str
    model: str
    created: int
    """Unix seconds."""
    system_fingerprint: str
    """Changes when the software or the model does."""


def answer_head(answer_id: str, model: str) -> AnswerHead:
    """The head of an answer that begins now."""
    digest = hashlib.sha256(f"{__version__}\n{model}".encode()).hexdigest()
    return AnswerHead(answer_id, model, int(time.time()), f"fp_{digest[:10]}")


def usage_answer(usage: Usage) -> UsageAnswer:
    """Token counts with OpenAI's details."""
    return UsageAnswer(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(usage.cached_tokens),
        completion_tokens_details=CompletionTokensDetails(usage.reasoning_tokens),
    )


Cache = CacheAnswer | msgspec.UnsetType
"""The cache report of an answer, or nothing."""


def cache_answer(explanations: Sequence[Explanation]) -> Cache:
    """The report on all prompts of a request; nothing if there is none."""
    if not explanations:
        return msgspec.UNSET
    missed = [one for one in explanations if one.reason is not CacheReason.HIT]
    shown = (missed or list(explanations))[0]
    return CacheAnswer(
        hit_tokens=sum(one.num_found for one in explanations),
        prompt_tokens=sum(one.num_tokens for one in explanations),
        reason=shown.reason.value,
        message=shown.message,
        seen_tokens=shown.num_seen,
        difference=difference_answer(shown.difference),
    )


def difference_answer(found: Difference | None) -> DifferenceAnswer | None:
    """The texts of a difference, if there is one."""
    return DifferenceAnswer(found.before, found.given, found.earlier, found.field) if found else None


def added(one: Usage, other: Usage) -> Usage:
    """Token counts of two choices together."""
    return Usage(
        prompt_tokens=one.prompt_tokens + other.prompt_tokens,
        completion_tokens=one.completion_tokens + other.completion_tokens,
        cached_tokens=one.cached_tokens + other.cached_tokens,
        reasoning_tokens=one.reasoning_tokens + other.reasoning_tokens,
    )
