"""Edits of a long history, applied before the model sees it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from vllm_mlx.api.wire.anthropic.answers import AppliedEdit, EditsAnswer
from vllm_mlx.api.wire.anthropic.edits import (
    ClearThinking,
    ClearToolUses,
    ContextManagement,
    InputTokens,
    ThinkingTurns,
    ToolUses,
)
from vllm_mlx.chat.service import ChatService
from vllm_mlx.core.chat import ChatRequest, Message
from vllm_mlx.core.errors import ContextLengthExceeded

CLEARED = "[This result was taken out to save room.]"
"""What the model reads in place of a result."""
_TRIGGER = InputTokens(type="input_tokens", value=100_000)
_KEEP = ToolUses(type="tool_uses", value=3)


async def edited(
    service: ChatService, request: ChatRequest, management: ContextManagement
) -> tuple[ChatRequest, EditsAnswer]:
    """The request after the edits, and what they took out. Raises what counting its tokens raises."""
    applied: list[AppliedEdit] = []
    for edit in management.edits:
        is_about_tools = isinstance(edit, ClearToolUses)
        if isinstance(edit, ClearToolUses):
            messages, count = await _without_results(service, request, edit)
        else:
            messages, count = _without_thinking(request.messages, edit)
        if not count:
            continue
        changed = msgspec.structs.replace(request, messages=messages)
        num_cleared = await _count(service, request) - await _count(service, changed)
        if isinstance(edit, ClearToolUses) and edit.clear_at_least and num_cleared < edit.clear_at_least.value:
            continue
        request = changed
        counted = {"cleared_tool_uses" if is_about_tools else "cleared_thinking_turns": count}
        applied.append(AppliedEdit(edit.type, num_cleared, **counted))
    return request, EditsAnswer(applied)


def _without_thinking(messages: Sequence[Message], edit: ClearThinking) -> tuple[tuple[Message, ...], int]:
    """The messages, and how many turns lost their reasoning."""
    if edit.keep is not None and not isinstance(edit.keep, ThinkingTurns):
        return tuple(messages), 0
    num_kept = edit.keep.value if edit.keep is not None else 1
    turns = _assistant_turns(messages)
    thinking = list(dict.fromkeys(turn for turn, message in zip(turns, messages, strict=True) if message.reasoning))
    cleared = set(thinking[:-num_kept])
    found = tuple(
        msgspec.structs.replace(message, reasoning=None) if message.reasoning and turn in cleared else message
        for turn, message in zip(turns, messages, strict=True)
    )
    return found, len(cleared)


def _assistant_turns(messages: Sequence[Message]) -> list[int]:
    """For each message, the turn that it is part of: a turn ends where the user says something."""
    turns, number = [], 0
    for message in messages:
        number += message.role == "user"
        turns.append(number)
    return turns


async def _without_results(
    service: ChatService, request: ChatRequest, edit: ClearToolUses
) -> tuple[tuple[Message, ...], int]:
    """The messages, and how many calls lost their results."""
    excluded, messages = set(edit.exclude_tools or ()), request.messages
    results = [i for i, message in enumerate(messages) if message.role == "tool"]
    trigger, num_kept = edit.trigger or _TRIGGER, (edit.keep or _KEEP).value
    reached = len(results) if isinstance(trigger, ToolUses) else await _count(service, request)
    if reached <= trigger.value:
        return messages, 0
    old = results[: max(0, len(results) - num_kept)]
    cleared = {i for i in old if messages[i].name not in excluded and messages[i].content != CLEARED}
    ids = {messages[i].tool_call_id for i in cleared}
    found = [
        msgspec.structs.replace(message, content=CLEARED) if i in cleared else _without_inputs(message, ids, edit)
        for i, message in enumerate(messages)
    ]
    return tuple(found), len(cleared)


def _without_inputs(message: Message, ids: Collection[str | None], edit: ClearToolUses) -> Message:
    """The message with the arguments of cleared calls taken out, where that is wanted."""
    wanted = edit.clear_tool_inputs
    if not wanted or not any(call.id in ids for call in message.tool_calls):
        return message
    names = {call.name for call in message.tool_calls} if wanted is True else set(wanted)
    calls = tuple(
        msgspec.structs.replace(call, arguments="{}") if call.id in ids and call.name in names else call
        for call in message.tool_calls
    )
    return msgspec.structs.replace(message, tool_calls=calls)


async def _count(service: ChatService, request: ChatRequest) -> int:
    """Tokens of the prompt; of one that is far too long, as many as it has at least."""
    try:
        return await service.count_tokens(request)
    except ContextLengthExceeded as error:
        return error.num_tokens
