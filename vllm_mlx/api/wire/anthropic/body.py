"""Bodies of the Messages API (https://platform.claude.com/docs/en/api/messages/create)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from vllm_mlx.api.wire.anthropic.blocks import Effort, System, WireMessage
from vllm_mlx.api.wire.anthropic.cache_control import CacheControl
from vllm_mlx.api.wire.anthropic.edits import ContextManagement
from vllm_mlx.api.wire.anthropic.tools import WireToolChoice, WireTools
from vllm_mlx.api.wire.base import WireModel
from vllm_mlx.api.wire.constraints import ShapeFields
from vllm_mlx.api.wire.sampling import MAX_PRIORITY, MAX_STOP_STRINGS

Display = Literal["summarized", "omitted"]


class EnabledThinking(WireModel):
    """The model thinks before it answers."""

    type: Literal["enabled"]
    """`enabled`."""
    budget_tokens: Annotated[int, Field(ge=0)]
    """Most tokens of reasoning; then the answer is made to begin."""
    display: Display | None = None
    """`omitted`: reasoning comes as a signature alone. `summarized` and absent: all of it is shown."""


class AdaptiveThinking(WireModel):
    """The model decides how long it thinks."""

    type: Literal["adaptive"]
    """`adaptive`."""
    display: Display | None = None
    """`omitted`: reasoning comes as a signature alone. `summarized` and absent: all of it is shown."""


class DisabledThinking(WireModel):
    """The model answers at once."""

    type: Literal["disabled"]
    """`disabled`."""


Thinking = Annotated[EnabledThinking | AdaptiveThinking | DisabledThinking, Field(discriminator="type")]


class JsonFormat(WireModel):
    """JSON of a schema."""

    type: Literal["json_schema"]
    """`json_schema`."""
    schema_: dict[str, Any] = Field(alias="schema")
    """The schema."""


class OutputConfig(WireModel):
    """What the answer is like."""

    effort: Effort | None = None
    """Given to the chat template as `reasoning_effort`; templates that do not know it ignore it."""
    format: JsonFormat | None = None
    """What the answer must look like."""
    task_budget: None = None
    """Not offered; set max_tokens."""


class Metadata(WireModel):
    """About the request."""

    user_id: str | None = None
    """Accepted; not used."""


class Diagnostics(WireModel):
    """Whether to say why a prompt was not found."""

    previous_message_id: str | None = None
    """Accepted; the prompt is compared with the most similar of the latest ones, whichever that is."""


class PromptFields(WireModel):
    """What a prompt is made of."""

    model: str | None = None
    """Served name, model argument, or `default`; the served model if absent."""
    messages: Annotated[list[WireMessage], Field(min_length=1, fail_fast=True)]
    """The conversation so far, oldest first. If the last turn is the assistant's, the answer goes on with it."""
    system: System | None = None
    """Instructions: text, or a list of text blocks."""
    tools: WireTools | None = None
    """Tools that the model may call: the client's own, and Anthropic's `bash` and `text_editor`."""
    tool_choice: WireToolChoice | None = None
    """`auto`, `any`, `tool` or `none`."""
    thinking: Thinking | None = None
    """`enabled` with a budget, `adaptive` or `disabled`; if absent the chat template decides."""
    output_config: OutputConfig | None = None
    """`effort` and `format`."""
    output_format: JsonFormat | None = None
    """Older name of `output_config.format`."""
    cache_control: CacheControl | None = None
    """Marks the end of the last message."""
    context_management: ContextManagement | None = None
    """Edits of a long history: `clear_tool_uses_20250919` and `clear_thinking_20251015`."""
    mcp_servers: Annotated[list[Any], Field(max_length=0)] | None = None
    """Only an empty list: the server calls no MCP servers; let the client do it and send their tools."""
    speed: Literal["standard"] | None = None
    """Only `standard`."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the chat template; they win over the server's own. Not Anthropic's."""


class CountTokensBody(PromptFields):
    """A prompt to be counted."""


class MessagesBody(ShapeFields, PromptFields):
    """A message to be made."""

    max_tokens: Annotated[int, Field(ge=1)]
    """Most tokens to generate, reasoning and calls included; fewer if the context ends before."""
    stream: bool | None = None
    """Send the answer as server-sent events while it is generated."""
    stop_sequences: Annotated[list[str], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None = None
    """Up to 16 texts at which generation ends; `stop_sequence` says which was found."""
    temperature: float | None = None
    """0 to 2; 0 takes the most likely token."""
    top_p: float | None = None
    """Keep the most likely tokens whose probabilities add up to this; above 0, at most 1."""
    top_k: int | None = None
    """Keep this many of the most likely tokens; 0 keeps all."""
    min_p: float | None = None
    """Drop tokens less likely than this fraction of the most likely one. Not Anthropic's."""
    repetition_penalty: float | None = None
    """Divide (positive) or multiply (negative) logits of tokens seen in prompt or output. Not Anthropic's."""
    seed: int | None = None
    """The same seed and request give the same tokens. Not Anthropic's."""
    timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds after which the request is given up; the server's --timeout if absent. Not Anthropic's."""
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    """Requests with a lower number go first; 0 if absent. Not Anthropic's."""
    metadata: Metadata | None = None
    """Accepted; not used."""
    service_tier: Literal["auto", "standard_only"] | None = None
    """Accepted; there is one tier, `standard`."""
    diagnostics: Diagnostics | None = None
    """Say in the answer, as `diagnostics`, what kept the prompt from being found, if something did."""
    container: None = None
    """The server runs no code."""
    inference_geo: None = None
    """The server is where it is."""
    fallbacks: None = None
    """Another model is not offered."""
    thread: None = None
    """Conversations are not kept; send all messages."""
    compaction: None = None
    """Conversations are not compacted; see context_management."""
    billing_policy: None = None
    """Nothing is billed."""
    fallback_credit_token: None = None
    """Nothing is billed."""
    user_profile_id: None = None
    """The server knows no users."""
    workspace_id: None = None
    """The server knows no workspaces."""
