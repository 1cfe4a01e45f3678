"""The fold of events."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from vllm_mlx.chat.collect import collect
from vllm_mlx.core.events import Event, Finish, TextDelta, TokenInfo, Usage
from vllm_mlx.core.messages import FinishReason

pytestmark = pytest.mark.anyio


async def replay(*events: Event) -> AsyncIterator[Event]:
    for event in events:
        yield event


async def test_interleaved_choices_are_put_in_order() -> None:
    info = TokenInfo("c", b"c", -1.0)
    collected = await collect(
        replay(
            TextDelta(1, "c", (info,)),
            TextDelta(0, "a"),
            Finish(1, FinishReason.LENGTH, Usage(completion_tokens=1)),
            TextDelta(0, "b"),
            Finish(0, FinishReason.STOP, Usage(prompt_tokens=5, completion_tokens=3, cached_tokens=2), "X"),
        )
    )
    first, second = collected.choices
    assert (first.text, first.reason, first.stop_string, first.tokens) == ("ab", FinishReason.STOP, "X", ())
    assert (second.text, second.reason, second.stop_string, second.tokens) == ("c", FinishReason.LENGTH, None, (info,))
    assert collected.usage == Usage(prompt_tokens=5, completion_tokens=4, cached_tokens=2)


async def test_choice_without_text_is_empty() -> None:
    collected = await collect(replay(Finish(0, FinishReason.STOP, Usage(completion_tokens=1))))
    assert collected.choices[0].text == ""
