"""Answer of POST /v1/chat/render: what the model sees of a chat request, and how its output would be read."""

from __future__ import annotations

from typing import Any

import msgspec

from vllm_mlx.chat.service import Rendered


class RenderAnswer(msgspec.Struct, frozen=True):
    """Nothing was computed for it."""

    prompt: str
    """The exact text, special tokens written out."""
    token_ids: list[int]
    num_tokens: int
    chat_template: str | None
    """Source of the template."""
    tools_shown_as: str | None
    """'template': by the model's own template; 'text': by a system text; null: there are none."""
    prompt_tail: str
    """What the template wrote behind the last message."""
    begins_in_reasoning: bool
    """Whether the prompt opened reasoning, so that the output begins inside it."""
    tool_call_parser: str | None
    """Name of the format in which calls are looked for; null if none are."""
    reasoning_parser: str | None
    sampling: dict[str, Any]
    """Every sampling parameter of the request, defaults filled in."""


def render_answer(found: Rendered) -> RenderAnswer:
    """The wire's form of a rendering."""
    return RenderAnswer(
        prompt=found.text,
        token_ids=list(found.token_ids),
        num_tokens=len(found.token_ids),
        chat_template=found.chat_template,
        tools_shown_as=found.tools_shown_as,
        prompt_tail=found.tail,
        begins_in_reasoning=found.begins_in_reasoning,
        tool_call_parser=found.tool_format,
        reasoning_parser=found.reasoning_format,
        sampling=msgspec.to_builtins(found.sampling, str_keys=True),
    )
