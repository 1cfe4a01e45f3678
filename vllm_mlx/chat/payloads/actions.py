"""What a payload parser says while it reads."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

import msgspec

T = TypeVar("T")


class CallOpen(msgspec.Struct, frozen=True):
    """A call begins. `id` is the model's own, if the format has one."""

    name: str
    id: str | None = None


class Arguments(msgspec.Struct, frozen=True):
    """More JSON text of the arguments of the call that was opened last."""

    text: str


class Shown(msgspec.Struct, frozen=True):
    """Text of the answer."""

    text: str


class Thought(msgspec.Struct, frozen=True):
    """Text of the reasoning."""

    text: str


SETTLED = Arguments("")
"""What was read until now holds, whatever becomes of the rest."""

Action = CallOpen | Arguments | Shown | Thought

Parsing = Generator[Action | None, None, T]
"""A parser that yields what it found, and None where it needs more text than there is now."""


class NotACall(ValueError):
    """The text is not what the parser reads; it stays visible."""
