"""What every answer of the OpenAI dialect begins and ends with."""

from __future__ import annotations

import hashlib
import time

import msgspec

from vllm_mlx import __version__
from vllm_mlx.api.wire.answers import CompletionTokensDetails, PromptTokensDetails, UsageAnswer
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


def added(one: Usage, other: Usage) -> Usage:
    """Token counts of two choices together."""
    return Usage(
        prompt_tokens=one.prompt_tokens + other.prompt_tokens,
        completion_tokens=one.completion_tokens + other.completion_tokens,
        cached_tokens=one.cached_tokens + other.cached_tokens,
        reasoning_tokens=one.reasoning_tokens + other.reasoning_tokens,
    )
