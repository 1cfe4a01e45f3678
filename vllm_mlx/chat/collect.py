"""The non-streaming answer: a fold of the same events that a stream sends."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterable, Iterable

import msgspec

from vllm_mlx.core.chat import ToolCall
from vllm_mlx.core.events import (
    Event,
    Finish,
    PromptScored,
    PromptToken,
    ReasoningDelta,
    TextDelta,
    TokenInfo,
    ToolCallDelta,
    Usage,
)
from vllm_mlx.core.messages import FinishReason


class CollectedChoice(msgspec.Struct, frozen=True):
    """One finished choice."""

    text: str
    reason: FinishReason
    usage: Usage
    stop_string: str | None = None
    tokens: tuple[TokenInfo, ...] = ()
    """Filled only if log-probabilities were asked for; those of reasoning and tool calls too."""
    prompt: tuple[PromptToken, ...] = ()
    """Of the choice's prompt; filled only if its log-probabilities were asked for."""
    reasoning: str = ""
    """What the model thought before it answered."""
    tool_calls: tuple[ToolCall, ...] = ()
    """In the order in which it made them."""
    prompt_token_ids: tuple[int, ...] = ()
    """Filled only if the request wants token ids; so is the next."""
    token_ids: tuple[int, ...] = ()


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
    deltas: defaultdict[int, list[Event]] = defaultdict(list)
    finishes: dict[int, Finish] = {}
    async for event in events:
        if isinstance(event, Finish):
            finishes[event.choice] = event
        else:
            deltas[event.choice].append(event)
    return Collected(tuple(_fold(deltas[choice], finishes[choice]) for choice in sorted(finishes)))


def _fold(deltas: list[Event], finish: Finish) -> CollectedChoice:
    return CollectedChoice(
        text="".join(delta.text for delta in deltas if isinstance(delta, TextDelta)),
        reason=finish.reason,
        usage=finish.usage,
        stop_string=finish.stop_string,
        tokens=tuple(
            info for delta in deltas if isinstance(delta, TextDelta | ReasoningDelta) for info in delta.tokens
        ),
        prompt=next((event.tokens for event in deltas if isinstance(event, PromptScored)), ()),
        reasoning="".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta)),
        tool_calls=folded_calls(deltas),
        prompt_token_ids=finish.prompt_token_ids,
        token_ids=finish.token_ids,
    )


def folded_calls(events: Iterable[Event]) -> tuple[ToolCall, ...]:
    """The whole tool calls of one choice."""
    heads: dict[int, ToolCallDelta] = {}
    arguments: defaultdict[int, list[str]] = defaultdict(list)
    for event in events:
        if isinstance(event, ToolCallDelta):
            heads.setdefault(event.index, event)
            arguments[event.index].append(event.arguments)
    return tuple(
        ToolCall(head.id or "", head.name or "", "".join(arguments[index])) for index, head in sorted(heads.items())
    )
