"""What a dialect must do for the check, and what is kept of one streamed turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import msgspec

from vllm_mlx.bench.agents.conversation import Call, Conversation, Step


class Heard(msgspec.Struct):
    """A turn, as far as it has been streamed."""

    calls: dict[Any, Call] = {}
    """By what the dialect numbers them with."""
    text: str = ""
    """Answer and reasoning."""
    num_prompt: int | None = None
    """Tokens of the prompt."""
    num_cached: int | None = None
    """Of these, found in a cache; None if the server does not say."""
    is_complete: bool = False
    """Whether the stream said that it is over."""
    error: str | None = None


class Dialect(Protocol):
    """One API that agents speak."""

    @property
    def name(self) -> str:
        """What users type."""
        ...

    @property
    def path(self) -> str:
        """Where requests go."""
        ...

    def body(self, conversation: Conversation, *, model: str, step: Step) -> Mapping[str, Any]:
        """A streamed request for one turn of the model."""
        ...

    def hear(self, event: Any, heard: Heard) -> None:
        """Take in one event of the stream. Raises KeyError, TypeError or ValueError if it lacks what it must have."""
        ...
