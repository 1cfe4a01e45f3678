"""A request in no vendor's dialect: what every endpoint decodes its body into."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.shape import OutputShape


class TextPart(msgspec.Struct, frozen=True, tag="text"):
    """A piece of text inside a message."""

    text: str


class ToolCall(msgspec.Struct, frozen=True):
    """A call that the assistant made earlier; `arguments` is JSON text as the model wrote it."""

    id: str
    name: str
    arguments: str


class Message(msgspec.Struct, frozen=True):
    """One turn. `role` is 'system', 'user', 'assistant' or 'tool'."""

    role: str
    content: str | tuple[TextPart, ...] | None = None
    name: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    is_breakpoint: bool = False
    """Its end was marked by the client as one from which others will go on."""
    keep_s: int = 0
    """How long what is remembered of the prompt up to its end stays, whatever else needs the memory; 0: no promise."""


class Tool(msgspec.Struct, frozen=True):
    """A tool that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments, an object; None: it takes none, or is freeform."""
    is_strict: bool = False
    """Whether arguments must match the schema whatever else holds."""
    is_freeform: bool = False
    """Whether it takes one plain text instead of named arguments."""
    syntax: OutputShape | None = None
    """What a freeform tool's text must look like."""
    is_listed: bool = True
    """Whether the prompt lists it with the others; if not, it can be called all the same: a message may show it."""


class ToolChoice(msgspec.Struct, frozen=True):
    """Whether tools are called, and which."""

    mode: Literal["auto", "none", "required"] = "auto"
    names: tuple[str, ...] = ()
    """Only these tools may be called; empty: all. A named function is 'required' with one name."""


class ChatRequest(msgspec.Struct, frozen=True):
    """Continue a conversation."""

    request_id: str
    messages: tuple[Message, ...]
    sampling: SamplingParams
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    thinking_budget: int | None = None
    """Most tokens of reasoning; None: the server's."""
    parallel_tool_calls: bool = True
    """Whether one answer may have several calls."""
    output: OutputShape | None = None
    """What the answer must look like; reasoning and tool calls are not part of it."""
    template_kwargs: dict[str, Any] = {}
    """Extra variables for the chat template."""
    timeout_s: float | None = None
    tenant: bytes = b""
    """Who shares remembered prefixes with whom; see `core.prompt.tenant_key`."""
    wants_cache_report: bool = False
    """Find out why prompt tokens had to be computed."""
    priority: int = 0
    """Higher goes first; see `core.messages.Submit`."""
    add_generation_prompt: bool = True
    """Whether the prompt ends with the beginning of an answer."""
    wants_token_ids: bool = False
    """Tell the tokens of prompt and output at the end."""
    continue_final_message: bool = False
    """Whether the answer goes on with the last message instead; then no beginning of an answer is added."""
    output_may_be_shorter: bool = False
    """Whether `max_tokens` only limits: where the context has room for less, the answer ends there."""


class CompletionRequest(msgspec.Struct, frozen=True):
    """Continue raw text or token ids; one choice set per prompt (choice = prompt index x n + i)."""

    request_id: str
    prompts: tuple[str | tuple[int, ...], ...]
    sampling: SamplingParams
    suffix: str | None = None
    """What follows the text to be written, for models that were taught to fill in."""
    echo: bool = False
    """Begin each choice's text with its prompt."""
    output: OutputShape | None = None
    """What each continuation must look like, from its first token on."""
    is_prompt_only: bool = False
    """Nothing is written at all; `sampling` asks for one token, which is dropped."""
    reports_end: bool = False
    """Whether the token that ends a choice has its log-probability reported too, although it is no text."""
    timeout_s: float | None = None
    tenant: bytes = b""
    """Who shares remembered prefixes with whom; see `core.prompt.tenant_key`."""
    wants_cache_report: bool = False
    """Find out why prompt tokens had to be computed."""
    priority: int = 0
    """Higher goes first; see `core.messages.Submit`."""
