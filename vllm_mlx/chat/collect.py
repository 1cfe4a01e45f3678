"""The non-streaming answer: a fold of the same events that a stream sends."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable

import msgspec

from vllm_mlx.core.events import Event, Finish, TextDelta, TokenInfo, Usage
from vllm_mlx.core.messages import FinishReason


class Choice(msgspec.Struct, frozen=True):
    """One finished choice."""

    index: int
    text: str
    finish_reason: FinishReason
    usage: Usage
    stop_string: str | None = None
    tokens: tuple[TokenInfo, ...] = ()
    """Filled only if log-probabilities were asked for."""


async def collect(events: AsyncIterable[Event]) -> tuple[Choice, ...]:
    """Read all events; the finished choices in order of their index."""
    texts: dict[int, list[str]] = {}
    tokens: dict[int, list[TokenInfo]] = {}
    choices = []
    async for event in events:
        match event:
            case TextDelta(choice=index):
                texts.setdefault(index, []).append(event.text)
                tokens.setdefault(index, []).extend(event.tokens)
            case Finish(choice=index):
                text, infos = "".join(texts.pop(index, ())), tuple(tokens.pop(index, ()))
                choices.append(Choice(index, text, event.reason, event.usage, event.stop_string, infos))
    return tuple(sorted(choices, key=lambda choice: choice.index))


def total_usage(usages: Iterable[Usage]) -> Usage:
    """The request's usage from that of its choices."""
    given = tuple(usages)
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in given),
        completion_tokens=sum(usage.completion_tokens for usage in given),
        cached_tokens=sum(usage.cached_tokens for usage in given),
        reasoning_tokens=sum(usage.reasoning_tokens for usage in given),
    )
