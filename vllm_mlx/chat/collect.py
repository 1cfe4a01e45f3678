"""The non-streaming answer: a fold of the same events that a stream sends."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterable

import msgspec

from vllm_mlx.core.events import Event, Finish, TextDelta, TokenInfo, Usage
from vllm_mlx.core.messages import FinishReason


class CollectedChoice(msgspec.Struct, frozen=True):
    """One finished choice."""

    text: str
    reason: FinishReason
    usage: Usage
    stop_string: str | None = None
    tokens: tuple[TokenInfo, ...] = ()
    """Filled only if log-probabilities were asked for."""


class Collected(msgspec.Struct, frozen=True):
    """A whole answer."""

    choices: tuple[CollectedChoice, ...]
    """By choice number."""

    @property
    def usage(self) -> Usage:
        """Of all choices together."""
        given = [choice.usage for choice in self.choices]
        return Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in given),
            completion_tokens=sum(usage.completion_tokens for usage in given),
            cached_tokens=sum(usage.cached_tokens for usage in given),
            reasoning_tokens=sum(usage.reasoning_tokens for usage in given),
        )


async def collect(events: AsyncIterable[Event]) -> Collected:
    """Read all events; raises what they raise."""
    deltas: defaultdict[int, list[TextDelta]] = defaultdict(list)
    finishes: dict[int, Finish] = {}
    async for event in events:
        if isinstance(event, Finish):
            finishes[event.choice] = event
        elif isinstance(event, TextDelta):
            deltas[event.choice].append(event)
    return Collected(tuple(_fold(deltas[choice], finishes[choice]) for choice in sorted(finishes)))


def _fold(deltas: list[TextDelta], finish: Finish) -> CollectedChoice:
    return CollectedChoice(
        text="".join(delta.text for delta in deltas),
        reason=finish.reason,
        usage=finish.usage,
        stop_string=finish.stop_string,
        tokens=tuple(info for delta in deltas for info in delta.tokens),
    )
