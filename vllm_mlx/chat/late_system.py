"""System messages in the middle of a conversation, for templates that know them at its beginning only.

Coding agents send instructions between turns. Moved to the beginning they would change every prefix; so they stay where
they are, as text of the user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from vllm_mlx.core.chat import Message, TextPart
from vllm_mlx.core.errors import InvalidRequest

_PROBE = (
    Message("user", "first question"),
    Message("system", "late instruction"),
    Message("assistant", "first answer"),
    Message("user", "second question"),
)


def takes_late_system(render: Callable[[Sequence[Message]], str]) -> bool:
    """Whether a template shows a system message where it stands."""
    try:
        text = render(_PROBE)
    except InvalidRequest:
        return False
    places = [text.find(str(message.content)) for message in _PROBE]
    return -1 not in places and places == sorted(places)


def with_late_system_as_user(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The conversation with system messages at its beginning only; later ones are marked text of the user.

    They join messages of the user beside them, because such templates often want turns to alternate.
    """
    found: list[list[Message]] = []
    joins = has_begun = False
    for message in messages:
        has_begun = has_begun or message.role != "system"
        is_late = message.role == "system" and has_begun
        shown = _as_user(message) if is_late else message
        if found and shown.role == found[-1][0].role == "user" and (is_late or joins):
            found[-1].append(shown)
        else:
            found.append([shown])
        joins = is_late
    return tuple(_joined(group) if len(group) > 1 else group[0] for group in found)


def _as_user(message: Message) -> Message:
    text = "\n".join(part.text for part in _parts(message))
    return msgspec.structs.replace(message, role="user", content=f"<system>\n{text}\n</system>", name=None)


def _joined(group: Sequence[Message]) -> Message:
    return msgspec.structs.replace(
        group[0],
        content=tuple(part for message in group for part in _parts(message)),
        is_breakpoint=any(message.is_breakpoint for message in group),
        keep_s=max(message.keep_s for message in group),
    )


def _parts(message: Message) -> tuple[TextPart, ...]:
    content = message.content or ""
    return (TextPart(content),) if isinstance(content, str) else content
