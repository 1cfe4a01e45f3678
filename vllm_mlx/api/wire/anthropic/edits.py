"""Edits of a long history that clients ask for (https://platform.claude.com/docs/en/build-with-claude/context-editing)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from vllm_mlx.api.wire.base import WireModel, unsupported


class ThinkingTurns(WireModel):
    """The last turns of the assistant."""

    type: Literal["thinking_turns"]
    """`thinking_turns`."""
    value: Annotated[int, Field(ge=1)]
    """How many."""


class AllTurns(WireModel):
    """All turns."""

    type: Literal["all"]
    """`all`."""


class ClearThinking(WireModel):
    """Take out what the model thought in earlier turns."""

    type: Literal["clear_thinking_20251015"]
    """`clear_thinking_20251015`."""
    keep: Literal["all"] | Annotated[ThinkingTurns | AllTurns, Field(discriminator="type")] | None = None
    """Turns that keep it: `all`, or a number; the last one if absent."""


class InputTokens(WireModel):
    """A number of tokens."""

    type: Literal["input_tokens"]
    """`input_tokens`."""
    value: Annotated[int, Field(ge=0)]
    """How many."""


class ToolUses(WireModel):
    """A number of calls."""

    type: Literal["tool_uses"]
    """`tool_uses`."""
    value: Annotated[int, Field(ge=0)]
    """How many."""


class ClearToolUses(WireModel):
    """Take out the results of earlier calls."""

    type: Literal["clear_tool_uses_20250919"]
    """`clear_tool_uses_20250919`."""
    trigger: Annotated[InputTokens | ToolUses, Field(discriminator="type")] | None = None
    """From how many tokens or calls on; 100,000 tokens if absent."""
    keep: ToolUses | None = None
    """How many of the last calls keep their results; 3 if absent."""
    clear_at_least: InputTokens | None = None
    """Nothing is taken out unless it is at least this much."""
    exclude_tools: list[str] | None = None
    """Tools whose results always stay."""
    clear_tool_inputs: bool | list[str] | None = None
    """Take out the arguments too: of all tools, or of those named."""


def _offered_edit(edit: Any) -> Any:
    kind = edit.get("type") if isinstance(edit, dict) else None
    if isinstance(kind, str) and kind not in ("clear_thinking_20251015", "clear_tool_uses_20250919"):
        raise unsupported(
            f"has type '{kind[:60]}', but only clear_tool_uses_20250919 and clear_thinking_20251015 are offered"
        )
    return edit


WireEdit = Annotated[ClearThinking | ClearToolUses, Field(discriminator="type"), BeforeValidator(_offered_edit)]


class ContextManagement(WireModel):
    """Edits that are applied before the model sees the conversation."""

    edits: list[WireEdit] = []
    """In the order in which they are applied."""
