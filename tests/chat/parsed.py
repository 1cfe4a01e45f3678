"""What a parser made of a text, folded, for comparison."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import msgspec

from vllm_mlx.chat.formats import tool_format
from vllm_mlx.chat.parse import OutputParser
from vllm_mlx.chat.payloads.tools import ToolSet
from vllm_mlx.chat.reasoning import reasoning_format
from vllm_mlx.core.events import Event, ReasoningDelta, TextDelta, ToolCallDelta


class Parsed(msgspec.Struct, frozen=True):
    content: str
    reasoning: str
    calls: tuple[tuple[str, str], ...]
    ids: tuple[str, ...]

    @property
    def values(self) -> list[tuple[str, Any]]:
        """Names and decoded arguments."""
        return [(name, decoded(arguments)) for name, arguments in self.calls]


def decoded(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return f"broken: {arguments}"


def parse(
    pieces: Iterable[str],
    *,
    tools: str | None = None,
    reasoning: str | None = None,
    schemas: dict[str, Any] | None = None,
    prompt_tail: str | None = "",
) -> Parsed:
    """Read pieces of text in a tool format, for tools with the schemas of their arguments ({}: any tool)."""
    parser = OutputParser(
        tools=ToolSet(schemas) if schemas is not None else None,
        tool_format=tool_format(tools) if tools else None,
        reasoning=reasoning_format(reasoning) if reasoning else None,
        prompt_tail=prompt_tail,
    )
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    return fold([*events, *parser.finish()])


def fold(events: list[Event]) -> Parsed:
    """All deltas joined; a call's first delta must carry its name, the others must not."""
    calls: list[list[str]] = []
    ids: list[str] = []
    for event in events:
        if isinstance(event, ToolCallDelta):
            if event.name is not None:
                assert event.index == len(calls)
                calls.append([event.name, ""])
                ids.append(event.id or "")
            assert event.index == len(calls) - 1
            calls[-1][1] += event.arguments
    return Parsed(
        content="".join(event.text for event in events if isinstance(event, TextDelta)),
        reasoning="".join(event.text for event in events if isinstance(event, ReasoningDelta)),
        calls=tuple((name, arguments) for name, arguments in calls),
        ids=tuple(ids),
    )
