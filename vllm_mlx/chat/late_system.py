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
    found: list[Message] = []
    joins = False
    for message in messages:
        is_late = message.role == "system" and any(each.role != "system" for each in found)
        shown = _as_user(message) if is_late else message
        if found and shown.role == found[-1].role == "user" and (is_late or joins):
            found[-1] = _joined(found[-1], shown)
        else:
            found.append(shown)
        joins = is_late
    return tuple(found)


def _as_user(message: Message) -> Message:
    text = "\n".join(part.text for part in _parts(message))
    return msgspec.structs.replace(message, role="user", content=f"<system>\n{text}\n</system>", name=None)


def _joined(one: Message, other: Message) -> Message:
    return msgspec.structs.replace(
        one,
        content=(*_parts(one), *_parts(other)),
        is_breakpoint=one.is_breakpoint or other.is_breakpoint,
        keep_s=max(one.keep_s, other.keep_s),
    )


def _parts(message: Message) -> tuple[TextPart, ...]:
    content = message.content or ""
    return (TextPart(content),) if isinstance(content, str) else content
