"""Models as Anthropic's API shows them (https://platform.claude.com/docs/en/api/models)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec

from vllm_mlx.api.wire.answers import ModelCard


class Support(msgspec.Struct, frozen=True):
    """Whether something is offered."""

    supported: bool


class ContextManagement(msgspec.Struct, frozen=True):
    """Which edits of a history are offered."""

    supported: bool
    clear_thinking_20251015: Support
    clear_tool_uses_20250919: Support
    compact_20260112: Support


class Effort(msgspec.Struct, frozen=True):
    """Whether an effort can be named; what it changes is up to the model's template."""

    supported: bool
    low: Support
    medium: Support
    high: Support
    xhigh: Support
    max: Support


class ThinkingTypes(msgspec.Struct, frozen=True):
    """Ways to think."""

    enabled: Support
    adaptive: Support
    disabled: Support
    between_tools: Support


class Thinking(msgspec.Struct, frozen=True):
    """Whether the model marks what it thinks."""

    supported: bool
    types: ThinkingTypes


class ServerTools(msgspec.Struct, frozen=True):
    """Tools that the server runs itself."""

    supported: bool
    code_execution: Support
    web_search: Support


class ModelCapabilities(msgspec.Struct, frozen=True):
    """What requests may ask for."""

    batch: Support
    citations: Support
    code_execution: Support
    context_management: ContextManagement
    effort: Effort
    image_input: Support
    pdf_input: Support
    server_tools: ServerTools
    structured_outputs: Support
    thinking: Thinking


class ModelInfo(msgspec.Struct, frozen=True, tag="model"):
    """One model."""

    id: str
    display_name: str
    created_at: str
    max_input_tokens: int | None
    """Most tokens, prompt and output together; null while it loads."""
    max_tokens: int | None
    """Most that max_tokens may be."""
    capabilities: ModelCapabilities
    lifecycle: str = "active"


class ModelPage(msgspec.Struct, frozen=True):
    """Some models."""

    data: list[ModelInfo]
    first_id: str | None
    last_id: str | None
    has_more: bool = False


def model_info(card: ModelCard, *, max_output: int) -> ModelInfo:
    """The same model in this dialect."""
    yes, no = Support(True), Support(False)
    able = card.capabilities
    thinks = Support(able.reasoning)
    created_at = datetime.fromtimestamp(card.created, UTC).isoformat().replace("+00:00", "Z")
    capabilities = ModelCapabilities(
        batch=yes,
        citations=no,
        code_execution=no,
        context_management=ContextManagement(True, yes, yes, no),
        effort=Effort(True, yes, yes, yes, yes, yes),
        image_input=Support(able.vision),
        pdf_input=yes,
        server_tools=ServerTools(False, no, no),
        structured_outputs=yes,
        thinking=Thinking(able.reasoning, ThinkingTypes(thinks, thinks, thinks, no)),
    )
    most = card.max_model_len and min(card.max_model_len, max_output)
    return ModelInfo(card.id, card.id, created_at, card.max_model_len, most, capabilities)


def model_list(models: Sequence[ModelInfo]) -> ModelPage:
    """All models on one page."""
    return ModelPage(list(models), models[0].id if models else None, models[-1].id if models else None)
