"""Bodies of the Conversations API (https://platform.openai.com/docs/api-reference/conversations)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vllm_mlx.api.wire.base import WireModel
from vllm_mlx.api.wire.responses.body import Metadata
from vllm_mlx.api.wire.responses.items import InputItem


class ConversationBody(WireModel):
    """A conversation to be kept."""

    items: Annotated[list[InputItem], Field(max_length=20, fail_fast=True)] | None = None
    """What it begins with, at most 20 items."""
    metadata: Metadata | None = None
    """Up to 16 texts that come back with it."""


class ConversationUpdate(WireModel):
    """A change of a conversation."""

    metadata: Metadata | None = None
    """Replaces what it had."""


class ItemsBody(WireModel):
    """Items to be added."""

    items: Annotated[list[InputItem], Field(min_length=1, max_length=20, fail_fast=True)]
    """At most 20 items."""
